//! What a guest is like around the life of a kernel module: what the agent finds, for the host to compare.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

#[cfg(doc)]
use crate::message;

/// The most that an answer may have, in bytes.
pub const MAX_ANSWER: u32 = 8 * 1024 * 1024;

/// The most that a request may have, in bytes, which is nearly all modules.
pub const MAX_REQUEST: u32 = 1 << 30;

/// A module that is to be loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleFile {
    /// Its name, as the kernel lists it.
    pub name: String,
    /// Its parameters, as the kernel takes them.
    pub parameters: String,
    /// The file.
    pub content: Vec<u8>,
}

/// What is asked of the agent's part that looks after modules. It answers one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModuleRequest {
    /// Look at all that is in an observation.
    Look,
    /// Look at what changes at once and takes no time: the log, the taint and the list of modules.
    Glance,
    /// Load these, in their order, and glance.
    Insert(Vec<ModuleFile>),
    /// Unload these, in their order, and look.
    Remove(Vec<String>),
    /// Load these, in their order, and unload them in the opposite one, again and again, and look.
    Cycle {
        /// The modules.
        files: Vec<ModuleFile>,
        /// How often.
        count: u32,
    },
}

/// How many bytes the length in front of a request or an answer has; it is little-endian.
pub const LENGTH: usize = 4;

/// A request or an answer as bytes, with their length in front. What is behind that, [`message::decode`] reads.
pub fn framed(value: &impl Serialize) -> Vec<u8> {
    // Plain data can always be encoded.
    let bytes = postcard::to_stdvec(value).unwrap_or_default();
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    [&length.to_le_bytes()[..], &bytes].concat()
}

/// The answer to what was asked of modules.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleAnswer {
    /// The kernel's error number where it did not do it; 0 if it did, or nothing was asked but to look.
    pub errno: i32,
    /// The module that it was about.
    pub module: String,
    /// How long the kernel took for all of it, in microseconds.
    pub took_us: u64,
    /// How often modules were loaded and unloaded.
    pub cycles: u32,
    /// Each module and where it was loaded; the same place once.
    pub loads: Vec<Load>,
    /// What the guest is like now.
    pub observation: Observation,
}

/// A module and where it was loaded.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Load {
    /// Its name.
    pub module: String,
    /// Its sections.
    pub sections: Vec<Section>,
}

/// A part of a loaded module.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Section {
    /// Its name, such as `.text`.
    pub name: String,
    /// Where it begins in the kernel's memory.
    pub address: u64,
}

/// What a guest is like.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// `/proc/sys/kernel/tainted`.
    pub taint: u64,
    /// The modules that are loaded.
    pub modules: Vec<LoadedModule>,
    /// What has a name and is made by modules: nodes of `/dev`, `/proc` and `/sys`, registrations such as
    /// `filesystem ext4`, and caches of objects such as `slab cache ext4_inode_cache`.
    pub names: BTreeSet<String>,
    /// Memory that is there by vmalloc for code of modules.
    pub areas: Vec<Area>,
    /// Memory that code of modules has allocated since the first module was loaded, and that was not freed.
    pub unfreed: Vec<Unfreed>,
    /// Why it is not known what was not freed.
    pub untracked: Option<String>,
    /// What kmemleak has found, where the kernel has that: a report each.
    pub kmemleak: Vec<String>,
    /// Records of the kernel's log that are new since the last answer, as it gives them out.
    pub log: Vec<Vec<u8>>,
    /// The number of the next record.
    pub log_next: u64,
}

/// A line of `/proc/modules`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedModule {
    /// Its name.
    pub name: String,
    /// How many users it has; -1 where it cannot be unloaded.
    pub users: i64,
}

/// A line of `/proc/vmallocinfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// Where it begins.
    pub address: u64,
    /// Its length, in bytes.
    pub bytes: u64,
    /// Who asked for it: a function as the kernel prints it, or an address where it does not know any.
    pub caller: String,
}

/// Memory that was allocated by one call and not freed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfreed {
    /// The place behind the call.
    pub call_site: u64,
    /// How often it was called without its memory being freed.
    pub count: u64,
    /// All of that memory, in bytes.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::decode;

    #[test]
    fn requests_and_answers_come_back_as_they_were() {
        let file =
            ModuleFile { name: "m".to_owned(), parameters: "a=1".to_owned(), content: vec![1, 2] };
        let request = ModuleRequest::Cycle { files: vec![file], count: 3 };
        let bytes = framed(&request);
        assert_eq!(bytes[..LENGTH], u32::to_le_bytes((bytes.len() - LENGTH) as u32));
        assert_eq!(decode::<ModuleRequest>(&bytes[LENGTH..]).unwrap(), request);
        let answer = ModuleAnswer { errno: 2, module: "m".to_owned(), ..ModuleAnswer::default() };
        let bytes = framed(&answer);
        assert_eq!(decode::<ModuleAnswer>(&bytes[LENGTH..]).unwrap(), answer);
        decode::<ModuleAnswer>(&bytes).unwrap_err();
    }
}
