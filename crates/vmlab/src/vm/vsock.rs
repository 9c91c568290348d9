//! Streams between a guest and this process.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

use crate::Vm;
use crate::vsock::VsockDevice;

impl Vm {
    /// Connects to a program of the guest that listens at a port of its vsock. The VM has one by
    /// [`VmBuilder::vsock`](crate::VmBuilder::vsock).
    ///
    /// ```no_run
    /// use std::io::{Read, Write};
    /// use vmlab::Vm;
    ///
    /// let dir = tempfile::tempdir()?;
    /// let vm = Vm::builder().kernel("debian:6.12").vsock(dir.path()).start()?;
    ///
    /// // A program of the guest finds this one at port 1234 of the host, whose CID is 2.
    /// let listener = vm.vsock_listen(1234)?;
    /// let _client = vm.command("socat").args(["-u", "EXEC:uname", "VSOCK-CONNECT:2:1234"]).spawn()?;
    /// let mut said = String::new();
    /// listener.accept()?.0.read_to_string(&mut said)?;
    /// assert_eq!(said, "Linux\n");
    ///
    /// // And this one finds a server of the guest, once it listens.
    /// let _server = vm.command("socat").args(["VSOCK-LISTEN:99", "EXEC:cat"]).spawn()?;
    /// let mut stream = loop {
    ///     match vm.vsock_connect(99) {
    ///         Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
    ///         connected => break connected?,
    ///     }
    /// };
    /// stream.write_all(b"there and back")?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ConnectionRefused`](io::ErrorKind::ConnectionRefused) where nobody listens at the port,
    /// [`TimedOut`](io::ErrorKind::TimedOut) where the guest does not answer within ten seconds, as one that is paused;
    /// when the VM has no vsock or has ended.
    pub fn vsock_connect(&self, port: u32) -> io::Result<UnixStream> {
        self.vsock()?.connect(port)
    }

    /// Listens for programs of the guest that connect to this port of the host. The socket is removed with the VM.
    ///
    /// # Errors
    /// When somebody listens there already, or the VM has no vsock.
    pub fn vsock_listen(&self, port: u32) -> io::Result<UnixListener> {
        self.listening.listen(self.vsock()?.socket_of(port))
    }

    fn vsock(&self) -> io::Result<&VsockDevice> {
        let none = || io::Error::new(io::ErrorKind::Unsupported, "the VM has no vsock");
        self.prepared.config.vsock.as_ref().ok_or_else(none)
    }
}
