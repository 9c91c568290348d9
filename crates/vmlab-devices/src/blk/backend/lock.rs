//! Locks of disks' files, in the way of QEMU (`block/file-posix.c`), so that both respect each other: who uses a file
//! in some way holds a lock on one byte, who bears no other use in that way on another one. All are locks for
//! reading, so that nobody waits; whoever comes looks whether there are any against him.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Where the bytes for uses begin: RAW_LOCK_PERM_BASE.
const USES: i64 = 100;
/// Where those for uses begin that others must not make: RAW_LOCK_SHARED_BASE.
const EXCLUDES: i64 = 200;
/// To read what is consistent: BLK_PERM_CONSISTENT_READ, by its bit.
const READ: i64 = 0;
/// BLK_PERM_WRITE.
const WRITE: i64 = 1;
/// BLK_PERM_RESIZE.
const RESIZE: i64 = 3;

/// Locks a file for as long as this description of it is open. Returns whether nobody else uses it in a way that
/// excludes that: any number of readers go together, but a writer with nobody. Files that cannot be locked are
/// not.
pub(in crate::blk) fn lock(file: &File, writes: bool) -> io::Result<bool> {
    let uses = if writes { &[READ, WRITE][..] } else { &[READ] };
    let excludes = [WRITE, RESIZE];
    let hold = uses.iter().map(|use_| USES + use_);
    for byte in hold.chain(excludes.map(|use_| EXCLUDES + use_)) {
        match fcntl(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
            Ok(_) => {}
            Err(error) if cannot(&error) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
    let against = uses.iter().map(|use_| EXCLUDES + use_);
    for byte in against.chain(excludes.map(|use_| USES + use_)) {
        if fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)? != libc::F_UNLCK {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a filesystem has no such locks.
fn cannot(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP))
}

/// Asks for a lock on one byte. Returns the type of lock that the kernel answers with.
fn fcntl(
    file: &File,
    command: libc::c_int,
    kind: libc::c_int,
    byte: i64,
) -> io::Result<libc::c_int> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: `lock` is a live structure of the kind that both commands read and write.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(lock.l_type.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_alone_and_readers_are_not() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(place.path()).unwrap();
        let (one, two, three) = (open(), open(), open());
        assert!(lock(&one, false).unwrap());
        assert!(lock(&two, false).unwrap());
        assert!(!lock(&three, true).unwrap());
        drop((one, two, three));
        let writer = open();
        assert!(lock(&writer, true).unwrap());
        // Another descriptor of the same description does not count.
        assert!(lock(&writer.try_clone().unwrap(), true).unwrap());
        assert!(!lock(&open(), true).unwrap());
        assert!(!lock(&open(), false).unwrap());
        drop(writer);
        assert!(lock(&File::open(place.path()).unwrap(), false).unwrap());
    }
}
