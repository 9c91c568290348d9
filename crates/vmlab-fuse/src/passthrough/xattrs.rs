//! Extended attributes.
//!
//! Names go to the host as they are. `security.*` and `trusted.*` too, which the host lets only root write:
//! a guest's root that writes to a share of the host's root can make a set-user-ID program there as well as
//! one with capabilities. `system.*` is not passed on: ACLs are not negotiated, so the guest's kernel would
//! not check the ones that it sets.

use std::ffi::CStr;

use rustix::fs::{
    XattrFlags, getxattr, getxattr_query, listxattr, listxattr_query, removexattr, setxattr,
};
use rustix::io::Errno;

use super::Passthrough;
use super::resolve::proc_path;
use crate::filesystem::{Result, XattrReply};
use crate::types::NodeId;

/// The longest value, and the longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_XATTR: usize = 64 * 1024;

const NOT_PASSED: &[u8] = b"system.";

fn passed(name: &CStr) -> Result<()> {
    if name.to_bytes().starts_with(NOT_PASSED) { Err(Errno::OPNOTSUPP) } else { Ok(()) }
}

/// A buffer for what was asked for.
fn buffer(size: u32) -> Vec<u8> {
    vec![0; (size as usize).min(MAX_XATTR)]
}

impl Passthrough {
    /// Does something with the path of an inode that was checked.
    fn at_path<T>(&self, node: NodeId, call: impl FnOnce(&str) -> Result<T>) -> Result<T> {
        let fd = self.descriptor(&self.inodes.get(node)?)?;
        call(&proc_path(&fd))
    }

    pub(super) fn get_xattr(&self, node: NodeId, name: &CStr, size: u32) -> Result<XattrReply> {
        passed(name)?;
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
                if !name.starts_with(NOT_PASSED) {
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
        passed(name)?;
        let flags = XattrFlags::from_bits_retain(flags);
        if !(XattrFlags::CREATE | XattrFlags::REPLACE).contains(flags) {
            return Err(Errno::INVAL);
        }
        self.at_path(node, |path| setxattr(path, name, value, flags))
    }

    pub(super) fn remove_xattr(&self, node: NodeId, name: &CStr) -> Result<()> {
        self.writable()?;
        passed(name)?;
        self.at_path(node, |path| removexattr(path, name))
    }
}
