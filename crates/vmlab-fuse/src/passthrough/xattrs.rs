//! Extended attributes.
//!
//! - `user.*` and `trusted.*` go to the host as they are; the latter has a meaning to the host's root alone.
//! - `security.*` is what the host's own kernel acts on: the capabilities that a program gets there, labels,
//!   signatures. It can be read, for the guest's kernel acts on it as well, but not set, not even by a guest of
//!   the host's root. A program's capabilities can be taken away, as kernels do when it is written to.
//! - `system.*` is not passed on, but for ACLs where INIT has agreed on them: otherwise the guest's kernel would
//!   not check the ones that it sets.

use std::ffi::CStr;

use rustix::fs::{
    XattrFlags, getxattr, getxattr_query, listxattr, listxattr_query, removexattr, setxattr,
};
use rustix::io::Errno;

use super::Passthrough;
use super::resolve::proc_path;
use crate::abi::init;
use crate::filesystem::{Result, XattrReply};
use crate::types::NodeId;

/// The longest value, and the longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_XATTR: usize = 64 * 1024;

const NOT_PASSED: &[u8] = b"system.";

/// The ACLs of a file, and those that a directory gives to what is made in it.
const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

const NOT_SET: &[u8] = b"security.";

const CAPABILITIES: &CStr = c"security.capability";

/// A buffer for what was asked for.
fn buffer(size: u32) -> Vec<u8> {
    vec![0; (size as usize).min(MAX_XATTR)]
}

impl Passthrough {
    fn passes(&self, name: &[u8]) -> bool {
        !name.starts_with(NOT_PASSED) || ACLS.contains(&name) && self.negotiated(init::POSIX_ACL)
    }

    fn passed(&self, name: &CStr) -> Result<()> {
        if self.passes(name.to_bytes()) { Ok(()) } else { Err(Errno::OPNOTSUPP) }
    }

    fn changeable(&self, name: &CStr) -> Result<()> {
        self.passed(name)?;
        if name.to_bytes().starts_with(NOT_SET) { Err(Errno::OPNOTSUPP) } else { Ok(()) }
    }

    /// Does something with the path of an inode that was checked.
    fn at_path<T>(&self, node: NodeId, call: impl FnOnce(&str) -> Result<T>) -> Result<T> {
        let fd = self.descriptor(&self.inodes.get(node)?)?;
        call(&proc_path(&fd))
    }

    pub(super) fn get_xattr(&self, node: NodeId, name: &CStr, size: u32) -> Result<XattrReply> {
        self.passed(name)?;
        self.at_path(node, |path| {
            if size == 0 {
                return getxattr_query(path, name).map(|size| XattrReply::Size(size as u32));
            }
            let mut value = buffer(size);
            let length = getxattr(path, name, &mut value[..])?;
            value.truncate(length);
            Ok(XattrReply::Value(value))
        })
    }

    pub(super) fn list_xattrs(&self, node: NodeId, size: u32) -> Result<XattrReply> {
        self.at_path(node, |path| {
            let mut names = vec![0; listxattr_query(path)?.min(MAX_XATTR)];
            let length = listxattr(path, &mut names[..])?;
            let mut kept = Vec::with_capacity(length);
            for name in names[..length].split_inclusive(|byte| *byte == 0) {
                if self.passes(name.strip_suffix(b"\0").unwrap_or(name)) {
                    kept.extend_from_slice(name);
                }
            }
            match size as usize {
                0 => Ok(XattrReply::Size(kept.len() as u32)),
                size if size < kept.len() => Err(Errno::RANGE),
                _ => Ok(XattrReply::Value(kept)),
            }
        })
    }

    pub(super) fn set_xattr(
        &self,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> Result<()> {
        self.writable()?;
        self.changeable(name)?;
        let flags = XattrFlags::from_bits_retain(flags);
        if !(XattrFlags::CREATE | XattrFlags::REPLACE).contains(flags) {
            return Err(Errno::INVAL);
        }
        self.at_path(node, |path| setxattr(path, name, value, flags))
    }

    pub(super) fn remove_xattr(&self, node: NodeId, name: &CStr) -> Result<()> {
        self.writable()?;
        if name != CAPABILITIES {
            self.changeable(name)?;
        }
        self.at_path(node, |path| removexattr(path, name))
    }
}
