//! What carries devices to a guest.

pub mod mmio;
pub mod vhost_user;
