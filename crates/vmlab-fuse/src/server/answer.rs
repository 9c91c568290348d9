//! Replies.

use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use crate::abi::{self, Opcode};
use crate::directory::entry_out;
use crate::filesystem::{Attributes, Entry, Opened, Result, XattrReply};
use crate::request::ReplyBytes;

pub(super) const OUT_HEADER: usize = size_of::<abi::OutHeader>();

/// The room behind the header of a reply.
pub(super) struct Answer<'a>(pub(super) &'a mut dyn ReplyBytes);

impl Answer<'_> {
    pub(super) fn room(&self) -> usize {
        self.0.capacity().saturating_sub(OUT_HEADER)
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Result<usize> {
        if bytes.len() > self.room() {
            return Err(Errno::INVAL);
        }
        self.0.write(OUT_HEADER, bytes);
        Ok(bytes.len())
    }

    pub(super) fn put(&mut self, value: &(impl IntoBytes + Immutable)) -> Result<usize> {
        self.bytes(value.as_bytes())
    }
}

/// Writes the header of a reply whose body is there.
pub(super) fn finish(
    header: abi::InHeader,
    reply: &mut dyn ReplyBytes,
    result: Result<usize>,
) -> usize {
    let (length, error) = match result {
        Ok(length) => (length, 0),
        Err(error) => (0, -error.raw_os_error()),
    };
    let len = OUT_HEADER + length;
    let out = abi::OutHeader { len: len as u32, error, unique: header.unique };
    reply.write(0, out.as_bytes());
    len
}

/// The least room that a reply needs. A request without it is refused before anything is done, so that no
/// node or handle is made of which the guest never hears.
pub(super) fn reply_size(opcode: Opcode) -> usize {
    match opcode {
        Opcode::Lookup | Opcode::Symlink | Opcode::MkNod | Opcode::MkDir | Opcode::Link => {
            size_of::<abi::EntryOut>()
        }
        Opcode::Create | Opcode::TmpFile => size_of::<(abi::EntryOut, abi::OpenOut)>(),
        Opcode::Open | Opcode::OpenDir => size_of::<abi::OpenOut>(),
        Opcode::Write | Opcode::CopyFileRange => size_of::<abi::WriteOut>(),
        Opcode::SetAttr => size_of::<abi::AttrOut>(),
        _ => 0,
    }
}

fn open_out(opened: &Opened) -> abi::OpenOut {
    abi::OpenOut { fh: opened.handle.0, open_flags: opened.flags, backing_id: 0 }
}

pub(super) fn entry(answer: &mut Answer<'_>, entry: Result<Entry>) -> Result<usize> {
    answer.put(&entry_out(&entry?))
}

pub(super) fn opened(answer: &mut Answer<'_>, opened: Result<Opened>) -> Result<usize> {
    answer.put(&open_out(&opened?))
}

pub(super) fn created(answer: &mut Answer<'_>, created: Result<(Entry, Opened)>) -> Result<usize> {
    let (entry, opened) = created?;
    let bytes = [entry_out(&entry).as_bytes(), open_out(&opened).as_bytes()].concat();
    answer.bytes(&bytes)
}

pub(super) fn attributes(answer: &mut Answer<'_>, attributes: Result<Attributes>) -> Result<usize> {
    let Attributes { attr, valid } = attributes?;
    answer.put(&abi::AttrOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        dummy: 0,
        attr,
    })
}

pub(super) fn xattr(
    answer: &mut Answer<'_>,
    size: u32,
    reply: Result<XattrReply>,
) -> Result<usize> {
    match reply? {
        XattrReply::Value(value) if value.len() > size as usize => Err(Errno::RANGE),
        XattrReply::Value(value) => answer.bytes(&value),
        XattrReply::Size(size) => answer.put(&abi::GetxattrOut { size, padding: 0 }),
    }
}
