//! What fuzz targets share.

/// A request of a guest, and the room that it gives for the reply.
#[derive(Debug)]
pub struct Request {
    /// The request, with its header.
    pub bytes: Vec<u8>,
    /// The room, in bytes.
    pub room: usize,
}

/// More requests than this show nothing new.
const MAX_REQUESTS: usize = 64;

/// Takes the input apart: for each request, two bytes of room (the highest bit: the length in the request's
/// header stays as it is), two of the request's length, the request.
pub fn requests(mut data: &[u8]) -> Vec<Request> {
    let mut requests = Vec::new();
    while let Some((&[a, b, c, d], rest)) = data.split_first_chunk() {
        if requests.len() == MAX_REQUESTS {
            break;
        }
        let (room, length) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        let (bytes, rest) = rest.split_at(rest.len().min(length.into()));
        let mut bytes = bytes.to_vec();
        let length = bytes.len() as u32;
        if room & 0x8000 == 0
            && let Some(len) = bytes.first_chunk_mut()
        {
            *len = length.to_ne_bytes();
        }
        requests.push(Request { bytes, room: usize::from(room & 0x7fff) });
        data = rest;
    }
    requests
}

/// The other way round.
pub fn input(requests: &[Request]) -> Vec<u8> {
    let mut out = Vec::new();
    for Request { bytes, room } in requests {
        out.extend_from_slice(&(*room as u16 & 0x7fff).to_le_bytes());
        out.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
        out.extend_from_slice(bytes);
    }
    out
}
