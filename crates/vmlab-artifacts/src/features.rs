//! Which of the things that vmlab builds on a kernel has.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::kconfig::{KernelConfig, Tristate};

/// A capability of a kernel that a run can depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Feature {
    /// Virtio devices on PCI.
    #[serde(rename = "virtio-pci")]
    VirtioPci,
    /// Virtio devices at fixed addresses.
    #[serde(rename = "virtio-mmio")]
    VirtioMmio,
    /// Virtio consoles and serial ports.
    #[serde(rename = "virtio-console")]
    VirtioConsole,
    /// Virtio disks.
    #[serde(rename = "virtio-blk")]
    VirtioBlk,
    /// Virtio network cards.
    #[serde(rename = "virtio-net")]
    VirtioNet,
    /// The virtio-fs filesystem.
    #[serde(rename = "virtiofs")]
    Virtiofs,
    /// The 9p filesystem over virtio.
    #[serde(rename = "9p")]
    NineP,
    /// The overlay filesystem.
    #[serde(rename = "overlay")]
    Overlay,
    /// Sockets between guest and host.
    #[serde(rename = "vsock")]
    Vsock,
    /// Random numbers of the host.
    #[serde(rename = "virtio-rng")]
    VirtioRng,
    /// The btrfs filesystem.
    #[serde(rename = "btrfs")]
    Btrfs,
    /// The XFS filesystem.
    #[serde(rename = "xfs")]
    Xfs,
    /// The ext4 filesystem.
    #[serde(rename = "ext4")]
    Ext4,
    /// Schedulers written in BPF.
    #[serde(rename = "sched_ext")]
    SchedExt,
    /// The PVH entry point, by which an uncompressed x86 image is started.
    #[serde(rename = "pvh")]
    Pvh,
}

impl Feature {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Feature; 15] = [
        Feature::VirtioPci,
        Feature::VirtioMmio,
        Feature::VirtioConsole,
        Feature::VirtioBlk,
        Feature::VirtioNet,
        Feature::Virtiofs,
        Feature::NineP,
        Feature::Overlay,
        Feature::Vsock,
        Feature::VirtioRng,
        Feature::Btrfs,
        Feature::Xfs,
        Feature::Ext4,
        Feature::SchedExt,
        Feature::Pvh,
    ];

    /// The name that users see, the same as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Feature::VirtioPci => "virtio-pci",
            Feature::VirtioMmio => "virtio-mmio",
            Feature::VirtioConsole => "virtio-console",
            Feature::VirtioBlk => "virtio-blk",
            Feature::VirtioNet => "virtio-net",
            Feature::Virtiofs => "virtiofs",
            Feature::NineP => "9p",
            Feature::Overlay => "overlay",
            Feature::Vsock => "vsock",
            Feature::VirtioRng => "virtio-rng",
            Feature::Btrfs => "btrfs",
            Feature::Xfs => "xfs",
            Feature::Ext4 => "ext4",
            Feature::SchedExt => "sched_ext",
            Feature::Pvh => "pvh",
        }
    }

    /// The kernel options that it needs, with the module that each makes when it is set to `m`.
    pub const fn needs(self) -> &'static [(&'static str, Option<&'static str>)] {
        match self {
            Feature::VirtioPci => &[("CONFIG_VIRTIO_PCI", Some("virtio_pci"))],
            Feature::VirtioMmio => &[("CONFIG_VIRTIO_MMIO", Some("virtio_mmio"))],
            Feature::VirtioConsole => &[("CONFIG_VIRTIO_CONSOLE", Some("virtio_console"))],
            Feature::VirtioBlk => &[("CONFIG_VIRTIO_BLK", Some("virtio_blk"))],
            Feature::VirtioNet => &[("CONFIG_VIRTIO_NET", Some("virtio_net"))],
            Feature::Virtiofs => &[("CONFIG_VIRTIO_FS", Some("virtiofs"))],
            Feature::NineP => {
                &[("CONFIG_9P_FS", Some("9p")), ("CONFIG_NET_9P_VIRTIO", Some("9pnet_virtio"))]
            }
            Feature::Overlay => &[("CONFIG_OVERLAY_FS", Some("overlay"))],
            Feature::Vsock => &[("CONFIG_VIRTIO_VSOCKETS", Some("vmw_vsock_virtio_transport"))],
            Feature::VirtioRng => &[("CONFIG_HW_RANDOM_VIRTIO", Some("virtio_rng"))],
            Feature::Btrfs => &[("CONFIG_BTRFS_FS", Some("btrfs"))],
            Feature::Xfs => &[("CONFIG_XFS_FS", Some("xfs"))],
            Feature::Ext4 => &[("CONFIG_EXT4_FS", Some("ext4"))],
            Feature::SchedExt => &[("CONFIG_SCHED_CLASS_EXT", None)],
            Feature::Pvh => &[("CONFIG_PVH", None)],
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How a kernel has a feature. The order is from the least to the most useful.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Availability {
    /// Not at all. A module that is configured but not in the module tree counts as absent.
    Absent,
    /// There is neither a configuration nor a module tree that would tell.
    Unknown,
    /// As a module of the kernel's module tree.
    Module,
    /// Compiled into the boot image.
    BuiltIn,
}

impl fmt::Display for Availability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Availability::Absent => "absent",
            Availability::Unknown => "unknown",
            Availability::Module => "module",
            Availability::BuiltIn => "built-in",
        })
    }
}

/// The features of one kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Features(BTreeMap<Feature, Availability>);

impl Features {
    /// Works the features out from the configuration and the module tree, as far as there are any.
    pub fn of(config: Option<&KernelConfig>, modules: Option<&ModuleNames>) -> Features {
        let have = |feature: Feature| {
            feature
                .needs()
                .iter()
                .map(|&(option, module)| availability(option, module, config, modules))
                .min()
                .unwrap_or(Availability::Unknown)
        };
        Features(Feature::ALL.into_iter().map(|feature| (feature, have(feature))).collect())
    }

    /// How the kernel has this feature.
    pub fn get(&self, feature: Feature) -> Availability {
        self.0.get(&feature).copied().unwrap_or(Availability::Unknown)
    }

    /// All features in the order in which they are shown.
    pub fn iter(&self) -> impl Iterator<Item = (Feature, Availability)> {
        self.0.iter().map(|(feature, have)| (*feature, *have))
    }
}

fn availability(
    option: &str,
    module: Option<&str>,
    config: Option<&KernelConfig>,
    modules: Option<&ModuleNames>,
) -> Availability {
    let in_tree = |name| modules.is_some_and(|modules| modules.loadable.contains(name));
    match (config, module, modules) {
        (Some(config), _, _) => match (config.get(option), module) {
            (Tristate::BuiltIn, _) => Availability::BuiltIn,
            (Tristate::Module, Some(name)) if in_tree(name) => Availability::Module,
            _ => Availability::Absent,
        },
        (None, Some(name), Some(modules)) => {
            if modules.builtin.contains(name) {
                Availability::BuiltIn
            } else if modules.loadable.contains(name) {
                Availability::Module
            } else {
                Availability::Absent
            }
        }
        (None, _, _) => Availability::Unknown,
    }
}

/// An option that a kernel lacks, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MissingOption {
    /// `CONFIG_…`.
    pub option: &'static str,
    /// In which way it is missing.
    pub why: Lack,
}

/// In which way a kernel lacks an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lack {
    /// It is not set; or, where only the module tree is known, the tree has nothing of it.
    NotSet,
    /// It is a module, and the module tree has no such file.
    NotInTree,
    /// It is a module, and there is no module tree.
    NoTree,
}

impl fmt::Display for MissingOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.option)?;
        f.write_str(match self.why {
            Lack::NotSet => "",
            Lack::NotInTree => " (a module that the module tree does not have)",
            Lack::NoTree => " (a module, and no modules are known)",
        })
    }
}

/// Those of a feature's options because of which it is [`Availability::Absent`]; none when it is not.
pub fn missing(
    feature: Feature,
    config: Option<&KernelConfig>,
    modules: Option<&ModuleNames>,
) -> Vec<MissingOption> {
    let lack = |option| match (config.map(|config| config.get(option)), modules) {
        (Some(Tristate::Module), Some(_)) => Lack::NotInTree,
        (Some(Tristate::Module), None) => Lack::NoTree,
        _ => Lack::NotSet,
    };
    let needs = feature.needs().iter();
    needs
        .filter(|(option, module)| {
            availability(option, *module, config, modules) == Availability::Absent
        })
        .map(|&(option, _)| MissingOption { option, why: lack(option) })
        .collect()
}

/// The names of a tree's modules, with `_` for `-` as the kernel itself spells them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModuleNames {
    loadable: BTreeSet<String>,
    builtin: BTreeSet<String>,
}

impl ModuleNames {
    /// The files that [`read`](ModuleNames::read) reads.
    pub fn files(tree: &Path) -> [PathBuf; 2] {
        [tree.join("modules.dep"), tree.join("modules.builtin")]
    }

    /// Reads `modules.dep` and `modules.builtin` of a module tree.
    ///
    /// # Errors
    /// When one of the two cannot be read; a missing `modules.builtin` is an empty one.
    pub fn read(tree: &Path) -> io::Result<ModuleNames> {
        let [dep, builtin] = ModuleNames::files(tree);
        let dep = std::fs::read_to_string(dep)?;
        let builtin = match std::fs::read_to_string(builtin) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        Ok(ModuleNames::parse(&dep, &builtin))
    }

    /// Reads the text of the two files: `kernel/fs/9p/9p.ko.xz: ...` and `kernel/fs/9p/9p.ko`.
    pub fn parse(dep: &str, builtin: &str) -> ModuleNames {
        let names = |text: &str| {
            text.lines()
                .filter_map(|line| {
                    let path = line.split(':').next()?;
                    let file = path.rsplit('/').next()?;
                    Some(file.split_once(".ko")?.0.replace('-', "_"))
                })
                .collect()
        };
        ModuleNames { loadable: names(dep), builtin: names(builtin) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "CONFIG_VIRTIO_PCI=y\nCONFIG_9P_FS=m\nCONFIG_NET_9P_VIRTIO=m\n\
        CONFIG_OVERLAY_FS=m\n# CONFIG_XFS_FS is not set\nCONFIG_PVH=y\n";
    const DEP: &str = "kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz\n\
        kernel/net/9p/9pnet_virtio.ko.xz:\nkernel/drivers/virtio/virtio-mmio.ko:\n";

    #[test]
    fn config_and_tree_together() {
        let config = KernelConfig::parse(CONFIG);
        let modules = ModuleNames::parse(DEP, "kernel/drivers/virtio/virtio_pci.ko\n");
        let features = Features::of(Some(&config), Some(&modules));
        assert_eq!(features.get(Feature::VirtioPci), Availability::BuiltIn);
        assert_eq!(features.get(Feature::NineP), Availability::Module);
        // Configured as a module, but the tree has no such module.
        assert_eq!(features.get(Feature::Overlay), Availability::Absent);
        assert_eq!(features.get(Feature::Xfs), Availability::Absent);
        assert_eq!(features.get(Feature::Pvh), Availability::BuiltIn);
        assert_eq!(features.get(Feature::SchedExt), Availability::Absent);
    }

    #[test]
    fn half_of_9p_is_none() {
        let config = KernelConfig::parse("CONFIG_9P_FS=y\n");
        assert_eq!(Features::of(Some(&config), None).get(Feature::NineP), Availability::Absent);
    }

    #[test]
    fn the_tree_alone_tells_of_modules_only() {
        let modules = ModuleNames::parse(DEP, "kernel/drivers/virtio/virtio_pci.ko\n");
        let features = Features::of(None, Some(&modules));
        assert_eq!(features.get(Feature::VirtioPci), Availability::BuiltIn);
        assert_eq!(features.get(Feature::VirtioMmio), Availability::Module);
        assert_eq!(features.get(Feature::Btrfs), Availability::Absent);
        assert_eq!(features.get(Feature::Pvh), Availability::Unknown);
    }

    #[test]
    fn nothing_known_is_unknown() {
        let features = Features::of(None, None);
        assert_eq!(features.iter().count(), Feature::ALL.len());
        assert!(features.iter().all(|(_, have)| have == Availability::Unknown));
    }

    #[test]
    fn what_is_missing_is_told_option_by_option() {
        let text = |feature, config: &str, dep: Option<&str>| -> Vec<String> {
            let (config, tree) =
                (KernelConfig::parse(config), dep.map(|dep| ModuleNames::parse(dep, "")));
            let missing = missing(feature, Some(&config), tree.as_ref());
            missing.iter().map(MissingOption::to_string).collect()
        };
        let none: [&str; 0] = [];
        assert_eq!(text(Feature::NineP, "", None), ["CONFIG_9P_FS", "CONFIG_NET_9P_VIRTIO"]);
        assert_eq!(text(Feature::NineP, "CONFIG_9P_FS=y\n", None), ["CONFIG_NET_9P_VIRTIO"]);
        assert_eq!(
            text(Feature::NineP, "CONFIG_9P_FS=m\nCONFIG_NET_9P_VIRTIO=y\n", None),
            ["CONFIG_9P_FS (a module, and no modules are known)"]
        );
        assert_eq!(
            text(Feature::NineP, "CONFIG_9P_FS=m\nCONFIG_NET_9P_VIRTIO=m\n", Some("9p.ko:\n")),
            ["CONFIG_NET_9P_VIRTIO (a module that the module tree does not have)"]
        );
        assert_eq!(text(Feature::Overlay, "CONFIG_OVERLAY_FS=m\n", Some("overlay.ko:\n")), none);
        assert!(missing(Feature::NineP, None, None).is_empty());
        let tree = ModuleNames::parse("9p.ko:\n", "");
        let names = missing(Feature::NineP, None, Some(&tree));
        let wanted = MissingOption { option: "CONFIG_NET_9P_VIRTIO", why: Lack::NotSet };
        assert_eq!(names, [wanted]);
    }

    #[test]
    fn json_uses_the_names_that_users_see() {
        let json = serde_json::to_value(Features::of(None, None)).unwrap();
        for feature in Feature::ALL {
            assert_eq!(json[feature.name()], "unknown");
        }
    }
}
