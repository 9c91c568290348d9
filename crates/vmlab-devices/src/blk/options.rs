//! What users ask of a disk.

use crate::blk::backend::Backend;
use crate::blk::config::BlockSize;
use crate::blk::device::OpenError;

/// Text that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind}: `{part}` should be {wanted}")]
pub struct ParseError {
    pub(super) kind: &'static str,
    pub(super) text: String,
    /// What is wrong of it.
    pub(super) part: String,
    /// What would be right there.
    pub(super) wanted: &'static str,
}

/// What users ask of a disk that is served here.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Options {
    /// The size of its blocks.
    pub block_size: BlockSize,
    /// Its queues, from 1 to [`MAX_QUEUES`](crate::blk::MAX_QUEUES).
    pub queues: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self { block_size: BlockSize::default(), queues: 1 }
    }
}

impl Options {
    /// Puts in front of a back end all that is asked for.
    pub(super) fn stack(&self, backend: Box<dyn Backend>) -> Result<Box<dyn Backend>, OpenError> {
        Ok(backend)
    }
}
