//! What carries devices to a guest.

pub mod vhost_user;
