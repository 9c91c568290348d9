//! What tests and fuzzers need in the place of a guest and of a filesystem.

mod fake;
mod raw;
mod samples;
mod transport;

pub use fake::{Answers, Fake, Listed};
pub use raw::{RawRequest, Reply, init, serve};
pub use samples::samples;
pub use transport::{Pieces, write_at};
