//! A guest's vsock: Unix sockets of the host, in a directory that one VM has to itself at a time.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::Serialize;
use vmlab_devices::vsock::Vsock;

use crate::Error;
use crate::config::{ConfigError, ShareDevice};
use crate::hypervisor::HypervisorError;

/// The address (CID) of every guest. The host is 2, as ever.
pub const GUEST_CID: u64 = 3;

/// The socket that programs of the host connect to.
const SOCKET: &str = "vsock";

/// The longest path of a Unix socket in bytes: `sun_path` less its final NUL.
const MAX_SOCKET: usize = 107;

/// The longest directory: there has to be room for `/vsock_` and any port.
pub const MAX_DIR: usize = MAX_SOCKET - "/vsock_4294967295".len();

/// How long the VM before, which has just ended, may take to let the directory go.
const FREE_TIME: Duration = Duration::from_secs(2);

/// How often it is looked whether it has: nobody tells.
const FREE_LOOK: Duration = Duration::from_millis(5);

/// How long a guest may take to answer to a connection. One that runs does it at once.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// The longest answer: `OK` and a port.
const MAX_ANSWER: usize = 32;

/// What others may not do to the directory: put sockets into it that the guest would connect to.
const OTHERS_WRITE: u32 = 0o002;

/// Streams between the guest and programs of the host, for each of which there is a Unix socket on the host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct VsockDevice {
    /// The directory that the sockets are in. It is made when the VM starts, unless it is there.
    pub dir: PathBuf,
}

impl VsockDevice {
    /// The one with its sockets in this directory, wherever this process goes.
    pub(crate) fn in_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.to_owned();
        let absolute = std::path::absolute(dir);
        let dir = absolute.map_err(|source| Error::Io { what: "use", path, source, hint: "" })?;
        Ok(Self { dir })
    }

    /// Where programs of the host connect to, and write `CONNECT PORT` and a newline, to reach the guest's port.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }

    /// Where a program of the host listens that the guest finds at this port of the host.
    pub fn socket_of(&self, port: u32) -> PathBuf {
        self.dir.join(format!("{SOCKET}_{port}"))
    }

    /// Checks it for a VM with these shares. A guest that can write to the directory could make a link there, to any
    /// socket of the host that this process can connect to.
    pub(crate) fn check(&self, shares: &[ShareDevice]) -> Result<(), ConfigError> {
        let dir = self.dir.clone();
        let len = dir.as_os_str().len();
        if len > MAX_DIR {
            return Err(ConfigError::VsockDir { dir, len });
        }
        let place = real(&dir);
        let inside =
            |share: &&ShareDevice| !share.read_only && place.starts_with(real(&share.path));
        match shares.iter().find(inside) {
            Some(share) => Err(ConfigError::VsockInShare { dir, share: share.path.clone() }),
            None => Ok(()),
        }
    }

    /// Makes the device of a VM, which has the directory as long as the device is there.
    ///
    /// # Errors
    /// The directory cannot be made, others can write to it, or it is another VM's.
    pub(crate) fn open(&self) -> Result<Vsock, HypervisorError> {
        let failed = |source| HypervisorError::Vsock { dir: self.dir.clone(), source };
        let lock = self.lock().map_err(failed)?;
        // Of a VM whose process was killed. Nobody else has the directory.
        remove_socket(&self.socket()).map_err(failed)?;
        let device = Vsock::new(GUEST_CID, &self.socket()).map_err(io::Error::other);
        Ok(device.map_err(failed)?.keeping(Box::new(lock)))
    }

    /// Has the directory for one VM alone, as long as what is returned is open.
    fn lock(&self) -> io::Result<File> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let dir = File::open(&self.dir)?;
        if dir.metadata()?.permissions().mode() & OTHERS_WRITE != 0 {
            return Err(io::Error::other("everybody can write to it, and so talk to the guest"));
        }
        let until = Instant::now() + FREE_TIME;
        loop {
            match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(dir),
                Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(FREE_LOOK),
                Err(Errno::WOULDBLOCK) => return Err(io::Error::other("another VM has it")),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Connects to a port of the guest.
    pub(crate) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let until = Instant::now() + CONNECT_TIME;
        let mut stream = UnixStream::connect(self.socket())?;
        stream.set_write_timeout(Some(CONNECT_TIME))?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut answer = Vec::new();
        let mut byte = [0];
        // One at a time, as what is behind the answer is the guest's.
        while answer.last() != Some(&b'\n') {
            let left = until.saturating_duration_since(Instant::now());
            let late = || io::Error::new(io::ErrorKind::TimedOut, "the guest does not answer");
            if left.is_zero() {
                return Err(late());
            }
            stream.set_read_timeout(Some(left))?;
            match stream.read(&mut byte) {
                Ok(0) => {
                    let what = format!("nobody listens at port {port} of the guest");
                    return Err(io::Error::new(io::ErrorKind::ConnectionRefused, what));
                }
                Ok(_) if answer.len() < MAX_ANSWER => answer.extend(byte),
                Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(late()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if !answer.starts_with(b"OK ") {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        Ok(stream)
    }
}

/// A path without links, also of what is not there yet.
fn real(path: &Path) -> PathBuf {
    let found = path.ancestors().find_map(|there| Some((there, there.canonicalize().ok()?)));
    let below = found.and_then(|(there, real)| Some(real.join(path.strip_prefix(there).ok()?)));
    below.unwrap_or_else(|| path.to_owned())
}

/// Removes a socket, and nothing else.
fn remove_socket(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("{} is there, and is no socket", path.display()),
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Sockets that somebody listens at on a VM's behalf, which are removed with it.
#[derive(Debug, Default)]
pub(crate) struct Listening(Mutex<Vec<PathBuf>>);

impl Listening {
    /// Listens at a path, also where somebody who listened there is gone.
    pub(crate) fn listen(&self, path: PathBuf) -> io::Result<UnixListener> {
        let listener = match UnixListener::bind(&path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let gone = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
                if !UnixStream::connect(&path).is_err_and(gone) {
                    return Err(error);
                }
                remove_socket(&path)?;
                UnixListener::bind(&path)?
            }
            bound => bound?,
        };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(path);
        Ok(listener)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let paths = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        for path in paths {
            // Who removed it before has done this.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Caching, ShareTransport};

    fn device() -> (tempfile::TempDir, VsockDevice) {
        let dir = tempfile::tempdir().unwrap();
        let device = VsockDevice { dir: dir.path().join("a/b") };
        (dir, device)
    }

    fn why(device: &VsockDevice) -> String {
        let error = device.open().err().unwrap();
        crate::error::chain(&error)
    }

    #[test]
    fn the_directory_is_made_for_its_user_alone_and_left_without_the_socket() {
        let (_dir, device) = device();
        let vsock = device.open().unwrap();
        assert!(fs::symlink_metadata(device.socket()).unwrap().file_type().is_socket());
        assert_eq!(fs::metadata(&device.dir).unwrap().permissions().mode() & 0o777, 0o700);
        drop(vsock);
        assert_eq!(fs::read_dir(&device.dir).unwrap().count(), 0);
    }

    #[test]
    fn one_vm_at_a_time_has_the_directory() {
        let (_dir, device) = device();
        let vsock = device.open().unwrap();
        assert!(why(&device).ends_with("another VM has it"), "{}", why(&device));
        assert!(device.socket().exists());
        drop(vsock);
        drop(device.open().unwrap());
    }

    #[test]
    fn what_a_killed_vm_left_is_replaced_and_nothing_else_is() {
        let (_dir, device) = device();
        fs::create_dir_all(&device.dir).unwrap();
        drop(UnixListener::bind(device.socket()).unwrap());
        drop(device.open().unwrap());
        fs::write(device.socket(), "precious").unwrap();
        assert!(why(&device).contains("is no socket"), "{}", why(&device));
        assert_eq!(fs::read(device.socket()).unwrap(), b"precious");
    }

    #[test]
    fn a_directory_that_everybody_can_write_to_is_refused() {
        let (_dir, device) = device();
        fs::create_dir_all(&device.dir).unwrap();
        fs::set_permissions(&device.dir, fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(why(&device).contains("everybody can write"), "{}", why(&device));
    }

    #[test]
    fn the_longest_directory_has_room_for_all_sockets() {
        let device =
            |len: usize| VsockDevice { dir: PathBuf::from(format!("/{:x<1$}", "", len - 1)) };
        let socket = device(MAX_DIR).socket_of(u32::MAX);
        assert_eq!(socket.as_os_str().len(), MAX_SOCKET);
        device(MAX_DIR).check(&[]).unwrap();
        let error = device(MAX_DIR + 1).check(&[]).unwrap_err().to_string();
        assert!(error.contains("90 bytes"), "{error}");
    }

    #[test]
    fn a_guest_cannot_write_to_the_directory() {
        let (dir, device) = device();
        let share = |path: &Path, read_only| ShareDevice {
            tag: "a".to_owned(),
            path: path.to_owned(),
            read_only,
            transport: ShareTransport::VirtioFs,
            caching: Caching::Coherent,
        };
        let refused = |device: &VsockDevice, share| {
            matches!(device.check(&[share]), Err(ConfigError::VsockInShare { .. }))
        };
        assert!(refused(&device, share(dir.path(), false)));
        assert!(!refused(&device, share(dir.path(), true)));
        assert!(!refused(&device, share(&dir.path().join("other"), false)));
        // Neither of the two is what it seems to be.
        let link = dir.path().join("link");
        fs::create_dir(dir.path().join("a")).unwrap();
        std::os::unix::fs::symlink("a", &link).unwrap();
        assert!(refused(&device, share(&link, false)));
        let device = VsockDevice { dir: link.join("c") };
        assert!(refused(&device, share(&dir.path().join("a"), false)));
    }

    #[test]
    fn listeners_are_replaced_when_they_are_gone_and_removed_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let device = VsockDevice { dir: dir.path().to_owned() };
        let listening = Listening::default();
        let listener = listening.listen(device.socket_of(1)).unwrap();
        let again = listening.listen(device.socket_of(1)).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        let listener = listening.listen(device.socket_of(1)).unwrap();
        UnixStream::connect(device.socket_of(1)).unwrap();
        drop((listener, listening));
        assert!(!device.socket_of(1).exists());
    }
}
