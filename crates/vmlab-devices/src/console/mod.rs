//! virtio-console with several ports (virtio 1.2, 5.3): consoles, and channels for programs of the guest.

mod control;
mod device;
mod gate;
mod stream;

pub use device::{Console, MAX_NAME, MAX_PORTS, Port};
