//! Raw requests to a server over a filesystem that records what it is asked.

use super::*;
use crate::filesystem::{Entry, XattrReply};
use crate::testing::{Answers, Fake, RawRequest, Reply, init as init_request, samples, serve};

mod decoding;
mod limits;
mod negotiation;
mod refusals;
mod replies;

/// Room for every reply but those of READ.
const ROOM: usize = 1024;

/// A server that has had INIT of a kernel that knows everything.
fn server(answers: Answers) -> Server<Fake> {
    let server = Server::new(Fake::new(answers, b"content of a file").unwrap());
    assert_eq!(init_request(u64::MAX).serve(&server, ROOM).unwrap().error, 0);
    server.filesystem().take_calls();
    server
}

/// What comes of a request: the error number, and the calls.
fn asked(server: &Server<Fake>, request: &RawRequest) -> (i32, Vec<String>) {
    let reply = request.serve(server, ROOM).expect("a reply");
    assert_eq!(reply.unique, 7);
    (reply.error, server.filesystem().take_calls())
}

#[track_caller]
fn refused(server: &Server<Fake>, request: &RawRequest, error: Errno) {
    let (number, calls) = asked(server, request);
    assert_eq!((number, calls), (-error.raw_os_error(), Vec::new()), "{request:?}");
}

fn opcode_of(request: &RawRequest) -> Opcode {
    let bytes = request.to_vec();
    Opcode::of(u32::from_ne_bytes(*bytes[4..].first_chunk().unwrap())).unwrap()
}

/// Those that the server answers by itself.
fn is_the_servers(opcode: Opcode) -> bool {
    matches!(
        opcode,
        Opcode::GetLk
            | Opcode::SetLk
            | Opcode::SetLkW
            | Opcode::Bmap
            | Opcode::Ioctl
            | Opcode::Poll
            | Opcode::SetupMapping
            | Opcode::RemoveMapping
    )
}

fn has_no_reply(opcode: Opcode) -> bool {
    matches!(opcode, Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt | Opcode::NotifyReply)
}
