//! How what is kept for later VMs is written.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A kind of content: what it begins with, the version of all that follows, and how many bytes of it are believed.
/// The version rises with every change to what is in it.
pub(crate) struct Format {
    pub(crate) magic: [u8; 8],
    pub(crate) version: u32,
    pub(crate) max: usize,
}

impl Format {
    /// As bytes.
    pub(crate) fn encode(&self, content: &impl Serialize) -> Result<Vec<u8>, String> {
        let head = [&self.magic[..], &self.version.to_le_bytes()].concat();
        postcard::to_extend(content, head).map_err(|error| error.to_string())
    }

    /// From bytes; else what is wrong with them.
    pub(crate) fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, String> {
        if bytes.len() > self.max {
            return Err("it is too long".to_owned());
        }
        let rest = bytes.strip_prefix(&self.magic).ok_or("it is something else")?;
        let (version, rest) = rest.split_first_chunk().ok_or("it is cut off")?;
        let version = u32::from_le_bytes(*version);
        if version != self.version {
            return Err(format!("it has version {version}, not {}", self.version));
        }
        match postcard::take_from_bytes(rest) {
            Ok((content, [])) => Ok(content),
            Ok(_) => Err("there is more behind its end".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}
