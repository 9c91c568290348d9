//! The words of the protocol, parsed once.

use std::ffi::CStr;

use rustix::io::Errno;

use crate::abi;

/// The longest name of a file, in bytes (`NAME_MAX`).
pub const MAX_NAME: usize = 255;

/// What the server calls an inode that it has told the kernel of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The directory that is shared.
    pub const ROOT: Self = Self(abi::ROOT_ID);
}

/// What the server calls an open file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub u64);

/// Who in the guest asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Filesystem user id.
    pub uid: u32,
    /// Filesystem group id.
    pub gid: u32,
    /// Process id.
    pub pid: u32,
}

/// A name that can only mean an entry of one directory: 1 to [`MAX_NAME`] bytes without `/`, and neither
/// `.` nor `..`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks a name.
    ///
    /// # Errors
    /// `ENAMETOOLONG` for one that is too long, `EINVAL` for one that is none.
    pub fn new(name: &'a CStr) -> Result<Self, Errno> {
        match name.to_bytes() {
            long if long.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(Self(name)),
        }
    }

    /// As a string for system calls.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }

    /// Its bytes, without the terminating zero.
    pub fn as_bytes(self) -> &'a [u8] {
        self.0.to_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_one_directory() {
        let long = format!("{}\0", "x".repeat(MAX_NAME));
        let longer = format!("{}\0", "x".repeat(MAX_NAME + 1));
        for (text, wanted) in [
            ("a\0", Ok(())),
            ("...\0", Ok(())),
            (".a\0", Ok(())),
            ("\n\\ \u{7f}\0", Ok(())),
            (&long, Ok(())),
            (&longer, Err(Errno::NAMETOOLONG)),
            ("\0", Err(Errno::INVAL)),
            (".\0", Err(Errno::INVAL)),
            ("..\0", Err(Errno::INVAL)),
            ("/\0", Err(Errno::INVAL)),
            ("a/b\0", Err(Errno::INVAL)),
            ("/etc\0", Err(Errno::INVAL)),
        ] {
            let name = CStr::from_bytes_with_nul(text.as_bytes()).unwrap();
            assert_eq!(Name::new(name).map(drop), wanted, "{text:?}");
        }
        assert!(Name::new(c"\xff\xfe").is_ok());
    }
}
