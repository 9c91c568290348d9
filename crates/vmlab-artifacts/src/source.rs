//! The places that kernels come from.

pub(crate) mod apt;
pub(crate) mod deb;
pub(crate) mod local;
