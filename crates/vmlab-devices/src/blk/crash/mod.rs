//! What may be on a disk after a power cut: logs of what a guest wrote, and the states that follow from them.
//!
//! A disk may lose, tear or reorder what it has acknowledged until a flush that was asked for after it has been
//! acknowledged, too. All of what came before such a flush is kept.

mod log;
mod rebuild;
mod states;

pub use log::{Change, Entry, Log, LogError};
pub(super) use log::{MAGIC, log_header, record_header};
pub use rebuild::{RebuildError, rebuild};
pub use states::{CrashState, Cuts, Survivor, at_flushes, at_random};
