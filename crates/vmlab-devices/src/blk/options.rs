//! What users ask of a disk.

use std::path::PathBuf;

use crate::blk::backend::{Backend, FaultRule, Faulty, Recorded, Throttle, Throttled};
use crate::blk::config::BlockSize;
use crate::blk::device::OpenError;

/// Text that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind}: `{part}` should be {wanted}")]
pub struct ParseError {
    kind: &'static str,
    text: String,
    part: String,
    wanted: &'static str,
}

/// A text that is being read, and what it should be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words<'t> {
    pub(super) kind: &'static str,
    pub(super) text: &'t str,
}

impl Words<'_> {
    /// What is wrong, and what would be right there.
    pub(super) fn bad(&self, part: &str, wanted: &'static str) -> ParseError {
        ParseError { kind: self.kind, text: self.text.to_owned(), part: part.to_owned(), wanted }
    }
}

/// A whole number that may end in `K`, `M` or `G`, powers of `unit`.
pub(super) fn number(text: &str, unit: u64) -> Option<u64> {
    let (digits, power) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'K' => (&text[..text.len() - 1], 1),
        b'M' => (&text[..text.len() - 1], 2),
        b'G' => (&text[..text.len() - 1], 3),
        _ => (text, 0),
    };
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse::<u64>().ok().filter(|_| plain)?.checked_mul(unit.pow(power))
}

/// What users ask of a disk that is served here.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Options {
    /// How slow it is.
    pub throttle: Option<Throttle>,
    /// What fails of it. Of several rules for one request, the first one holds.
    pub faults: Vec<FaultRule>,
    /// The file that gets a log of all changes, for [`crash`](crate::blk::crash). It is written anew.
    pub record: Option<PathBuf>,
    /// The size of its blocks.
    pub block_size: BlockSize,
    /// Its queues, from 1 to [`MAX_QUEUES`](crate::blk::MAX_QUEUES).
    pub queues: u16,
}

impl Default for Options {
    fn default() -> Self {
        let block_size = BlockSize::default();
        Self { throttle: None, faults: Vec::new(), record: None, block_size, queues: 1 }
    }
}

impl Options {
    /// Puts in front of a back end all that is asked for. What is recorded is what reaches the disk, and a
    /// request that fails takes its time, too.
    pub(super) fn stack(
        &self,
        mut backend: Box<dyn Backend>,
    ) -> Result<Box<dyn Backend>, OpenError> {
        if let Some(path) = &self.record {
            let recorded = Recorded::create(backend, path);
            let wrong = |source| OpenError::Record { path: path.clone(), source };
            backend = Box::new(recorded.map_err(wrong)?);
        }
        if !self.faults.is_empty() {
            backend = Box::new(Faulty::new(backend, self.faults.clone()));
        }
        if let Some(throttle) = self.throttle {
            backend = Box::new(Throttled::new(backend, throttle));
        }
        Ok(backend)
    }
}
