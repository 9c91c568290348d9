//! Requests as a guest writes them, and replies as it reads them.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::abi::{self, Opcode};
use crate::filesystem::FileSystem;
use crate::server::Server;
use crate::testing::Pieces;

/// What is in the room of a reply that nothing was written to.
const UNTOUCHED: u8 = 0xa5;

/// A request in the making.
#[derive(Debug, Clone)]
pub struct RawRequest {
    header: abi::InHeader,
    arguments: Vec<u8>,
    claimed: Option<u32>,
}

impl RawRequest {
    /// A request for the root, from user 1000, group 100, process 42, unique 7.
    pub fn new(opcode: Opcode) -> Self {
        Self::numbered(opcode as u32)
    }

    /// The same with a number that may be no opcode.
    pub fn numbered(opcode: u32) -> Self {
        let header = abi::InHeader {
            opcode,
            unique: 7,
            nodeid: abi::ROOT_ID,
            uid: 1000,
            gid: 100,
            pid: 42,
            ..Default::default()
        };
        Self { header, arguments: Vec::new(), claimed: None }
    }

    /// For another node.
    #[must_use]
    pub fn node(mut self, node: u64) -> Self {
        self.header.nodeid = node;
        self
    }

    /// With another number to know the reply by.
    #[must_use]
    pub fn unique(mut self, unique: u64) -> Self {
        self.header.unique = unique;
        self
    }

    /// From another user and group.
    #[must_use]
    pub fn by(mut self, uid: u32, gid: u32) -> Self {
        (self.header.uid, self.header.gid) = (uid, gid);
        self
    }

    /// With a structure.
    #[must_use]
    pub fn with(self, structure: &(impl IntoBytes + Immutable)) -> Self {
        self.bytes(structure.as_bytes())
    }

    /// With a string and the zero that ends it.
    #[must_use]
    pub fn string(self, text: impl AsRef<[u8]>) -> Self {
        self.bytes(text.as_ref()).bytes(&[0])
    }

    /// With bytes as they are.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.arguments.extend_from_slice(bytes);
        self
    }

    /// With the arguments cut off after so many bytes.
    #[must_use]
    pub fn truncated(mut self, length: usize) -> Self {
        self.arguments.truncate(length);
        self
    }

    /// With a header that says it is so long.
    #[must_use]
    pub fn claiming(mut self, len: u32) -> Self {
        self.claimed = Some(len);
        self
    }

    /// How many bytes of arguments it has.
    pub fn arguments(&self) -> usize {
        self.arguments.len()
    }

    /// The request's bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let len = size_of::<abi::InHeader>() + self.arguments.len();
        let len = self.claimed.unwrap_or(u32::try_from(len).unwrap_or(u32::MAX));
        let header = abi::InHeader { len, ..self.header };
        [header.as_bytes(), &self.arguments].concat()
    }

    /// Has it served, with so much room for the reply's body.
    pub fn serve<F: FileSystem>(&self, server: &Server<F>, room: usize) -> Option<Reply> {
        serve(server, &self.to_vec(), size_of::<abi::OutHeader>() + room, 0)
    }
}

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The error number, 0 or negative.
    pub error: i32,
    /// The request's unique.
    pub unique: u64,
    /// What follows the header.
    pub body: Vec<u8>,
}

impl Reply {
    /// The structure that it begins with.
    ///
    /// # Panics
    /// If it is shorter.
    pub fn get<T: FromBytes>(&self) -> T {
        let (value, _) = T::read_from_prefix(&self.body).expect("a longer reply");
        value
    }
}

/// Has the bytes of a request served that lies in pieces of some size (0: in one), as the room for the reply
/// does.
///
/// # Panics
/// If the server writes what is no reply, or to where no reply is.
pub fn serve<F: FileSystem>(
    server: &Server<F>,
    request: &[u8],
    capacity: usize,
    piece: usize,
) -> Option<Reply> {
    let mut room = Pieces::new(&vec![UNTOUCHED; capacity], piece);
    let length = server.serve(&Pieces::new(request, piece), &mut room);
    let bytes = room.concat();
    assert!(length <= capacity, "{length} bytes in the room of {capacity}");
    if length == 0 {
        assert!(bytes.iter().all(|byte| *byte == UNTOUCHED), "no reply, but bytes");
        return None;
    }
    let (header, rest) = abi::OutHeader::read_from_prefix(&bytes).expect("a header");
    assert_eq!(header.len as usize, length);
    assert!((-4095..=0).contains(&header.error), "{}", header.error);
    let (body, _) = rest.split_at(length - size_of::<abi::OutHeader>());
    assert!(header.error == 0 || body.is_empty(), "an error with {body:?}");
    Some(Reply { error: header.error, unique: header.unique, body: body.to_vec() })
}

/// INIT of a kernel that speaks the newest protocol, with these flags.
pub fn init(flags: u64) -> RawRequest {
    RawRequest::new(Opcode::Init).node(0).with(&abi::InitIn {
        major: abi::KERNEL_VERSION,
        minor: abi::KERNEL_MINOR_VERSION,
        max_readahead: 128 * 1024,
        flags: flags as u32,
        flags2: (flags >> 32) as u32,
        unused: [0; 11],
    })
}
