//! What is known of a kernel before it is booted, remembered from one run to the next.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmlab_artifacts::cache::Sources;
use vmlab_artifacts::features::ModuleNames;
use vmlab_artifacts::{Cache, ConfigSource, ContentKey, Kernel};

use super::{Known, Needs, Way, way_to_root};
use crate::Error;
use crate::config::{AgentChannel, ShareTransport};
use crate::identity::of_this_program;

/// What a run has to know of its kernel. To find it out means to read thousands of lines of its
/// configuration and of its lists of modules.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Findings {
    /// Modules to load, by name.
    pub(super) modules: Vec<String>,
    pub(super) channel: AgentChannel,
    pub(super) transport: ShareTransport,
    /// It finds a PCI Express bus that has no I/O ports.
    pub(super) sees_ecam: bool,
    /// Why nothing will be seen of its messages, if that is so.
    pub(super) silence: Option<String>,
}

impl Findings {
    /// Finds out whether and how a kernel can do what a run needs. `image` is what will be started, and is
    /// looked into where nothing else tells what the kernel can mount.
    ///
    /// # Errors
    /// [`Error::KernelLacks`] when it cannot.
    pub(super) fn of(
        cache: &Cache,
        kernel: &Kernel,
        needs: Needs,
        image: Option<&Path>,
    ) -> Result<Self, Error> {
        let files = files(kernel, image);
        let key = ContentKey::new("findings").field("needs", format!("{needs:?}"));
        let key = files.iter().fold(of_this_program(key), |key, file| {
            key.field("file", file.as_os_str().as_encoded_bytes())
        });
        cache.remembered("findings", &key.finish(), |sources: &mut Sources| {
            files.iter().for_each(|file| sources.add(file));
            let mut known = Known::of(kernel)?;
            if let Some(image) = image {
                known.find_drivers(image)?;
            }
            let Way { modules, channel, transport } =
                way_to_root(&known, needs).map_err(|lacking| lacking.of(kernel))?;
            Ok(Self {
                modules: modules.into_iter().map(str::to_owned).collect(),
                channel,
                transport,
                sees_ecam: known.sees_ecam(),
                silence: known.silence().map(str::to_owned),
            })
        })
    }
}

/// All that the findings come from.
fn files(kernel: &Kernel, image: Option<&Path>) -> Vec<PathBuf> {
    let mut files = vec![kernel.boot_image.clone()];
    match &kernel.config_source {
        Some(ConfigSource::File(file)) => files.push(file.clone()),
        // What is in the boot image, or not in it, changes with it.
        Some(ConfigSource::BootImage) | None => {}
    }
    files.extend(kernel.modules.iter().flat_map(|tree| ModuleNames::files(tree)));
    files.extend(image.map(Path::to_owned));
    files
}
