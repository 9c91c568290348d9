//! What most tests need.

pub use crate::testing::{Ctx, Recorder};
pub use crate::{Error, Lan, Vm, VmBuilder};

/// What a test returns that passes errors of any kind on with `?`.
pub type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;
