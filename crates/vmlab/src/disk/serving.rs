//! What users ask of a disk that vmlab itself serves.

use std::path::PathBuf;

use vmlab_devices::blk::{BlockSize, FaultRule, MAX_QUEUES, Options, Throttle};

/// What was given of it, wherever.
#[derive(Debug, Default)]
pub(crate) struct Serving {
    /// Whether it is to be served so even if nothing else is asked for.
    pub(crate) own: bool,
    /// As [`Throttle`] reads it.
    pub(crate) throttle: Option<String>,
    /// As [`FaultRule`] reads each.
    pub(crate) faults: Vec<String>,
    pub(crate) record: Option<PathBuf>,
    /// In bytes.
    pub(crate) block_size: Option<u32>,
    pub(crate) queues: Option<u32>,
}

impl Serving {
    /// The options of the device; `None` where nothing was given.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub(crate) fn options(self) -> Result<Option<Options>, String> {
        let Self { own, throttle, faults, record, block_size, queues } = self;
        let given = throttle.is_some() || !faults.is_empty() || record.is_some();
        if !own && !given && block_size.is_none() && queues.is_none() {
            return Ok(None);
        }
        let mut options = Options { record, ..Options::default() };
        if let Some(text) = throttle {
            options.throttle = Some(text.parse::<Throttle>().map_err(|error| error.to_string())?);
        }
        let rules = faults.iter().map(|text| text.parse::<FaultRule>());
        options.faults = rules.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        if let Some(bytes) = block_size {
            let found = BlockSize::ALL.into_iter().find(|size| size.bytes() == bytes);
            options.block_size = found
                .ok_or_else(|| format!("a block has 512, 1024, 2048 or 4096 bytes, not {bytes}"))?;
        }
        if let Some(queues) = queues {
            let number = u16::try_from(queues).ok().filter(|n| (1..=MAX_QUEUES).contains(n));
            options.queues = number
                .ok_or_else(|| format!("a disk has 1 to {MAX_QUEUES} queues, not {queues}"))?;
        }
        Ok(Some(options))
    }
}
