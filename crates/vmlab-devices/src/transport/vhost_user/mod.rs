//! Devices for a monitor that speaks vhost-user, over one half of a socket pair.
//!
//! This is made on `vhost`, not on the daemon of `vhost-user-backend`: that takes connections from a path or
//! a listener only, keeps what its threads end with to itself, and answers GET_VRING_BASE while requests are
//! in progress, whose replies then go to memory that the guest may have given another use.

mod backend;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::device::Device;
use crate::workers::{Fault, OnFault};
use backend::Backend;

/// Why a device is not served any more, other than that the monitor has ended the connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A queue, by its index.
    #[error("queue {queue} of a virtio device (kind {device}) cannot be served any more")]
    Queue {
        /// `VIRTIO_ID_*`.
        device: u32,
        /// Its index.
        queue: usize,
        /// What happened.
        source: Fault,
    },
    /// The monitor asked for what cannot be.
    #[error("the hypervisor's vhost-user connection failed (virtio device of kind {device})")]
    Protocol {
        /// `VIRTIO_ID_*`.
        device: u32,
        /// What happened.
        source: ProtocolError,
    },
    /// A mistake of this crate.
    #[error("the thread of a vhost-user connection panicked")]
    Panic,
}

/// A device that is being served. When it is dropped, the connection and all threads end.
#[derive(Debug)]
pub struct Served {
    connection: UnixStream,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

/// Serves a device to the monitor that has the other half of the socket pair.
///
/// # Errors
/// No more threads or descriptors.
pub fn serve(device: Arc<dyn Device>, stream: UnixStream) -> io::Result<Served> {
    start(device, false, stream)
}

/// As [`serve`], to a guest that had such a device in its place and goes on with its queues: each begins where the
/// used ring ends, instead of where the monitor says.
///
/// # Errors
/// No more threads or descriptors.
pub fn serve_on(device: Arc<dyn Device>, stream: UnixStream) -> io::Result<Served> {
    start(device, true, stream)
}

fn start(device: Arc<dyn Device>, goes_on: bool, stream: UnixStream) -> io::Result<Served> {
    let connection = stream.try_clone()?;
    let first: Arc<Mutex<Option<(usize, Fault)>>> = Arc::default();
    let on_fault: OnFault = {
        let (first, connection) = (first.clone(), stream.try_clone()?);
        Arc::new(move |queue, fault| {
            let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert((queue, fault));
            // This ends the thread below, which ends all the others.
            let _ = connection.shutdown(Shutdown::Both);
        })
    };
    let id = device.id();
    let backend = Backend::new(device, goes_on, on_fault).map_err(io::Error::other)?;
    let thread = thread::Builder::new().name(format!("vhost-user{id}")).spawn(move || {
        let backend = Arc::new(Mutex::new(backend));
        let mut handler = BackendReqHandler::from_stream(stream, backend.clone());
        let end = loop {
            if let Err(error) = handler.handle_request() {
                break error;
            }
        };
        // The monitor sees the end at once, the threads have ended when this one has.
        let connection = handler.try_clone_connection();
        drop((handler, backend));
        if let Ok(connection) = connection {
            let _ = connection.shutdown(Shutdown::Both);
        }
        let fault = first.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (fault, end) {
            (Some((queue, source)), _) => Err(Error::Queue { device: id, queue, source }),
            (None, ProtocolError::Disconnected | ProtocolError::SocketBroken(_)) => Ok(()),
            (None, source) => Err(Error::Protocol { device: id, source }),
        }
    })?;
    Ok(Served { connection, thread: Some(thread) })
}

impl Served {
    /// Waits until the monitor has ended the connection.
    ///
    /// # Errors
    /// It was ended here, for this reason.
    pub fn wait(mut self) -> Result<(), Error> {
        self.join()
    }

    /// Ends the connection. No request is served any more when it returns.
    ///
    /// # Errors
    /// It had ended before, for this reason.
    pub fn stop(mut self) -> Result<(), Error> {
        let _ = self.connection.shutdown(Shutdown::Both);
        self.join()
    }

    fn join(&mut self) -> Result<(), Error> {
        let joined = self.thread.take().map(JoinHandle::join);
        joined.unwrap_or(Ok(Ok(()))).unwrap_or(Err(Error::Panic))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.connection.shutdown(Shutdown::Both);
        let _ = self.join();
    }
}
