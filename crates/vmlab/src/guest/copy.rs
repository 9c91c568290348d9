//! Files between host and guest, copied by this library at one end and the agent at the other.

use std::io;
use std::path::{Path, PathBuf};

use vmlab_copy::{CopyError, Doing, own_name};

use super::command::{Command, ExitStatus, Stdio};
use crate::Error;
use crate::vm::Vm;

/// Whose file it is that could not be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopySide {
    /// One of the host.
    Host,
    /// One of the guest.
    Guest,
}

impl CopySide {
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Host => " on the host",
            Self::Guest => " in the guest",
        }
    }
}

impl Vm {
    /// Copies a file, or a directory with all that is in it, from the host into the guest, as `cp -r` would.
    /// Nothing in the guest is needed for it: no `cp`, no `tar`, no library, no share.
    ///
    /// - Where `guest_path` is a directory, or a link to one, the copy goes into it, under the name that it has
    ///   on the host. Otherwise it becomes `guest_path`, whose parent has to exist. A `host_path` that ends in
    ///   `/.` stands for what is in that directory, which fills `guest_path` where that exists.
    /// - Directories that exist are filled and stay what they are otherwise. Files and links that exist are
    ///   replaced, once their successor is complete. A directory never takes the place of anything else, nor
    ///   anything else that of a directory.
    /// - Content, permissions and times of the last change (to the nanosecond) are kept, empty directories are
    ///   copied, and holes in files stay holes. Set-user-ID and set-group-ID bits, owners, extended attributes and
    ///   hard links are not kept.
    /// - Names may be any bytes. `host_path` itself may be a symbolic link and is followed; links in a directory
    ///   are copied as links. Devices, pipes and sockets are refused.
    /// - In the guest, the VM's user does it, root unless the VM was given another one: what that user may not
    ///   do fails, and what is made is that user's. A relative `guest_path` is taken from the directory in which
    ///   the VM's commands run.
    ///
    /// No more than a megabyte or two is held in memory, whatever the size, and commands can run meanwhile.
    ///
    /// ```no_run
    /// # let vm = vmlab::Vm::builder().kernel("debian:6.12").start()?;
    /// vm.copy_to("tests/data", "/root")?;
    /// vm.exec(["mytool", "/root/data/input"])?;
    /// vm.copy_from("/root/data/output", "output")?;
    /// # Ok::<(), vmlab::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Copy`] when a file cannot be read or written, on either side, or is of a kind that cannot be
    /// copied. What was copied before stays, a file that is only half there does not. Other errors when the VM
    /// has ended.
    pub fn copy_to(
        &self,
        host_path: impl AsRef<Path>,
        guest_path: impl AsRef<Path>,
    ) -> Result<(), Error> {
        let (from, to) = (host_path.as_ref(), guest_path.as_ref());
        let what = format!("{} into the guest", from.display());
        let mut command = self.copying().args(["receive".as_ref(), self.in_guest(to).as_os_str()]);
        if let Some(name) = own_name(from) {
            command = command.arg(name);
        }
        let mut child = command.stdin(Stdio::Piped).spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let sent = match stdin {
            Some(stdin) => vmlab_copy::send(from, stdin),
            None => Ok(()),
        };
        let received = match stdout {
            Some(stdout) => vmlab_copy::outcome(stdout),
            None => Ok(()),
        };
        let status = child.wait()?;
        // Who reads no more has said why.
        let done = match (sent, received) {
            (Err(CopyError::Stream(_)) | Ok(()), received) => received,
            (sent, _) => sent,
        };
        done.map_err(|error| failed(error, what, status, to))
    }

    /// Copies a file, or a directory with all that is in it, from the guest to the host: as
    /// [`copy_to`](Self::copy_to), the other way round. What is made on the host is the caller's; in the guest,
    /// the VM's user reads.
    ///
    /// A guest is not trusted: it can write nothing but what is below the copy, whatever it sends, and whatever
    /// links it has sent before. It can fill the host's disk, and make links that lead anywhere, which are not to
    /// be followed by who reads the copy. `host_path` itself is trusted: it should not be in a directory that the
    /// guest can write to by a share, where a link could be in its place.
    ///
    /// Files that the kernel makes up, as those of `/proc` and `/sys`, are read to their end, whatever size they
    /// say they have.
    ///
    /// # Errors
    /// As of [`copy_to`](Self::copy_to), and when the guest sends what is no copy.
    pub fn copy_from(
        &self,
        guest_path: impl AsRef<Path>,
        host_path: impl AsRef<Path>,
    ) -> Result<(), Error> {
        let (from, to) = (guest_path.as_ref(), host_path.as_ref());
        let what = format!("{} from the guest", from.display());
        let command = self.copying().args(["send".as_ref(), self.in_guest(from).as_os_str()]);
        let mut child = command.spawn()?;
        let received = match child.stdout.take() {
            Some(stdout) => vmlab_copy::receive(stdout, to, own_name(from)),
            None => Ok(()),
        };
        let status = child.wait()?;
        received.map_err(|error| failed(error, what, status, from))
    }

    fn copying(&self) -> Command<'_> {
        Command::of_agent(self, self.environment().user.clone()).stderr(Stdio::Null)
    }

    /// A path of the guest as seen from its root.
    fn in_guest(&self, path: &Path) -> PathBuf {
        if path.is_absolute() || path.as_os_str().is_empty() {
            return path.to_owned();
        }
        // Joined as text: the end that stands for a directory's content has to stay.
        let mut whole = self.environment().cwd.clone().into_os_string();
        if !whole.as_encoded_bytes().ends_with(b"/") {
            whole.push("/");
        }
        whole.push(path);
        whole.into()
    }
}

/// The error of a copy; `guest_path` is what the guest's end was asked for.
fn failed(error: CopyError, what: String, status: ExitStatus, guest_path: &Path) -> Error {
    let of_guest = |source| (Doing::Receive, PathBuf::new(), CopySide::Guest, source);
    let (doing, path, side, source) = match error {
        CopyError::Here { doing, path, source } => (doing, path, CopySide::Host, source),
        CopyError::There { doing, path, source } => (doing, path, CopySide::Guest, source),
        CopyError::Malformed(error) => of_guest(io::Error::new(io::ErrorKind::InvalidData, error)),
        CopyError::Stream(_) => {
            let mut how = format!("the agent's part ended early: {status}");
            if status.oom_kills() > 0 {
                how.push_str(", and the guest ran out of memory");
            }
            of_guest(io::Error::other(how))
        }
    };
    // Some failures are of no file in particular.
    let path = if path.as_os_str().is_empty() { guest_path.to_owned() } else { path };
    Error::Copy { what, doing: doing.words(), path, side, source }
}

/// A path that may be a guest's, for people: nothing in it moves a terminal.
pub(crate) fn shown(path: &Path) -> String {
    let plain = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    path.to_string_lossy().chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_guests_move_no_terminal() {
        let path = Path::new("/a\u{1b}[2J\n\u{9b}x/ä");
        assert_eq!(shown(path), "/a\\u{1b}[2J\\n\\u{9b}x/ä");
    }
}
