//! The standard streams of a command in the guest, as they are seen on the host.

use std::io::{self, Read, Write};
use std::sync::Arc;

use vmlab_wire::StreamId;

use super::connection::Connection;

/// The stdin of a command. Dropping it is the end of the input.
#[derive(Debug)]
pub struct ChildStdin {
    connection: Arc<Connection>,
    stream: StreamId,
}

impl ChildStdin {
    pub(super) fn new(connection: Arc<Connection>, stream: StreamId) -> Self {
        Self { connection, stream }
    }

    /// Waits until the command can take more input. False when it reads no more, or has ended.
    ///
    /// A caller that asks this first need not take bytes from its own source that nobody wants.
    pub fn wait_wanted(&self) -> bool {
        self.connection.input_wanted(self.stream)
    }
}

impl Write for ChildStdin {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.connection.write_input(self.stream, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ChildStdin {
    fn drop(&mut self) {
        self.connection.end_input(self.stream);
    }
}

/// A stream of bytes from the guest.
#[derive(Debug)]
struct OutputStream {
    connection: Arc<Connection>,
    stream: StreamId,
    chunk: Vec<u8>,
    position: usize,
}

impl OutputStream {
    fn new(connection: Arc<Connection>, stream: StreamId) -> Self {
        Self { connection, stream, chunk: Vec::new(), position: 0 }
    }

    fn next_chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.connection
            .read_output(self.stream)
            .map_err(|_| io::Error::new(io::ErrorKind::ConnectionReset, "the VM has ended"))
    }

    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.position == self.chunk.len() {
            self.chunk = self.next_chunk()?.unwrap_or_default();
            self.position = 0;
        }
        let rest = &self.chunk[self.position..];
        let count = rest.len().min(out.len());
        out[..count].copy_from_slice(&rest[..count]);
        self.position += count;
        if count > 0 {
            self.connection.consumed(self.stream, count);
        }
        Ok(count)
    }

    fn copy_to(&mut self, out: &mut dyn Write) -> io::Result<()> {
        while let Some(chunk) = self.next_chunk()? {
            out.write_all(&chunk)?;
            self.connection.consumed(self.stream, chunk.len());
        }
        Ok(())
    }
}

impl Drop for OutputStream {
    fn drop(&mut self) {
        self.connection.stop_output(self.stream);
    }
}

macro_rules! output_stream {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// It ends when the command does, or closes it; what children that the command left behind
        /// write later is lost. Dropping it before its end is what a closed pipe is: the command gets
        /// `SIGPIPE`.
        #[derive(Debug)]
        pub struct $name(OutputStream);

        impl $name {
            pub(super) fn new(connection: Arc<Connection>, stream: StreamId) -> Self {
                Self(OutputStream::new(connection, stream))
            }

            /// Writes everything to `out`, each piece as it comes, until the stream ends.
            ///
            /// # Errors
            /// When `out` fails, or the VM ends before the stream does.
            pub fn copy_to(&mut self, out: &mut dyn Write) -> io::Result<()> {
                self.0.copy_to(out)
            }
        }

        impl Read for $name {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                self.0.read(out)
            }
        }
    };
}

output_stream! {
    /// The stdout of a command; with a terminal, all of its output.
    ChildStdout
}
output_stream! {
    /// The stderr of a command.
    ChildStderr
}
