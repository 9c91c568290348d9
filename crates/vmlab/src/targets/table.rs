//! The tables of a file: which keys there are, and what each can be. The reader, the JSON schema and the
//! lists of keys in messages are all made from these types.

use crate::config::{DiskWrites, Machine, NetworkMode, Topology};
use crate::disk::CloneMode;
use crate::events::EventKind;
use crate::hypervisor::HypervisorChoice;
use crate::units::Bytes;
use crate::{AccelChoice, RootMode, ShareVia};

use super::document::{At, Node, Span, Value};
use super::problem::Problems;
use super::spelling::{self, snake};
use super::value::{CommandText, Cpus, Env, FromNode, Kinds, Strings, Time, Word, expected};

/// The value of a key that is there.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Field<T> {
    pub(super) value: T,
    /// Where the key is.
    pub(super) key: Span,
    /// Where the value is.
    pub(super) span: Span,
}

/// Declares a table with its keys. A key may be written with `-` or with `_`.
macro_rules! table {
    (
        $(#[doc = $about:literal])+
        $name:ident is $what:literal {
            $($(#[doc = $doc:literal])+ $key:ident: $type:ty,)*
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, PartialEq, Default)]
        #[cfg_attr(test, derive(schemars::JsonSchema))]
        #[cfg_attr(test, schemars(rename_all = "kebab-case", deny_unknown_fields))]
        pub(super) struct $name {
            $(
                $(#[doc = $doc])+
                pub(super) $key: Option<Field<$type>>,
            )*
        }

        impl $name {
            /// The keys, with `_`.
            pub(super) const KEYS: &[&str] = &[$(stringify!($key)),*];

            /// Those of them whose value is a single string, number or boolean.
            #[allow(dead_code, reason = "only targets have a matrix")]
            pub(super) fn is_scalar(key: &str) -> bool {
                $((key == stringify!($key) && <$type as FromNode>::SCALAR) ||)* false
            }
        }

        impl FromNode for $name {
            fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
                let Value::Table(table) = &node.value else {
                    return expected("a table", node, problems);
                };
                let mut read = Self::default();
                for entry in &table.entries {
                    let key = &entry.key;
                    match snake(&key.value).as_str() {
                        $(stringify!($key) => {
                            if let Some(other) = &read.$key {
                                spelling::twice(&other.key, &key.span, problems);
                            }
                            let value = <$type>::from_node(&entry.node, problems);
                            read.$key = value.map(|value| Field {
                                value,
                                key: key.span.clone(),
                                span: entry.node.span.clone(),
                            });
                        })*
                        _ => spelling::unknown(key, $what, Self::KEYS, problems),
                    }
                }
                Some(read)
            }
        }
    };
}

table! {
    /// A directory of the host that the guest has.
    ShareTable is "key of a share" {
        /// Directory on the host; a relative path is from the file's directory.
        host: String,
        /// Where the guest has it; the host's path unless given.
        guest: String,
        /// Whether the guest can change it; not unless given.
        writable: bool,
    }
}

table! {
    /// A disk of the guest. In `[disks]`, the name of its table is its own.
    DiskTable is "key of a disk" {
        /// What the guest knows it by, at `/dev/disk/by-id/virtio-NAME`; `disk` and its number unless given.
        name: String,
        /// File with an image, or a block device; a relative path is from the file's directory.
        path: String,
        /// Another name of `path`.
        image: String,
        /// The size of a new disk, which each VM has for itself.
        size: Bytes,
        /// The filesystem of a new disk: any that has a `mkfs.NAME`, or `swap`; none unless given, which is `raw`.
        fs: String,
        /// The filesystem's label.
        label: String,
        /// The filesystem's UUID.
        uuid: String,
        /// Further arguments for the program that makes the filesystem.
        mkfs_options: Strings,
        /// What is in the filesystem: a directory, or a tar archive.
        content: String,
        /// Where it is mounted: a path, or `none`. A new filesystem is at `/mnt/NAME` unless given; others are not mounted.
        mount: String,
        /// Options of the mount.
        mount_options: Strings,
        /// What becomes of writes: `discard` (the default of files), `rw` keeps them in the file, `ro` refuses them, `clone` (the default of new disks) has them in a copy of the VM's own.
        mode: Word<DiskWrites>,
        /// Whether it is read-only, as `mode = "ro"`.
        read_only: bool,
        /// How the VM's own copy is made: `auto`, `reflink`, `copy` or `overlay`.
        clone: CloneMode,
        /// The file that the VM's own copy is, and that stays.
        keep: String,
        /// Whether vmlab serves it by a device of its own, and not QEMU by its. The keys that follow need that, too.
        serve: bool,
        /// How slow it is: `iops=100,iops-burst=10,bps=10M,bps-burst=1M`, or some of that.
        throttle: String,
        /// What fails of it, such as `fail:write:nth=3` or `delay=50ms:flush`.
        fault: Strings,
        /// The file that gets a log of all changes, for `vmlab disk crash-states`.
        record: String,
        /// The size of its blocks in bytes: 512, 1024, 2048 or 4096.
        block_size: u32,
        /// The number of its queues.
        queues: u32,
    }
}

table! {
    /// vmtest's form of a share, whose key is the guest's path.
    MountTable is "key of a mount" {
        /// Directory on the host; a relative path is from the file's directory.
        host_path: String,
        /// Whether the guest can change it; not unless given.
        writable: bool,
    }
}

table! {
    /// vmtest's table of what a VM is. Beside `mounts`, each key is another name of a target's.
    VmTable is "key of [target.vm]" {
        /// `cpus` of a target.
        num_cpus: Cpus,
        /// `memory` of a target.
        memory: Bytes,
        /// `bios` of a target.
        bios: String,
        /// `qemu-args` of a target.
        extra_args: Strings,
        /// Further shares: the guest's path, and what it has there.
        mounts: Mounts,
    }
}

table! {
    /// A named run: a command in a fresh VM.
    TargetTable is "key of a target" {
        /// What it is called; unique in the file.
        name: String,
        /// Words that it can be chosen by.
        tags: Strings,
        /// Kernel: `debian:6.12`, `host`, a release, or a path. With `image`, it is started instead of the image's own.
        kernel: String,
        /// Words for the kernel's command line.
        append: Strings,
        /// vmtest's name of `append`.
        kernel_args: Strings,
        /// Modules to load before the command, with their parameters: `kvm-amd nested=1`.
        modules: Strings,
        /// Directory that is the guest's root; the host's own root unless given.
        rootfs: String,
        /// What becomes of writes to the root: `ro`, `overlay` (the default) or `rw`.
        root_mode: Word<RootMode>,
        /// Disk image with a system in it, instead of a root directory.
        image: String,
        /// Whether the image is started by UEFI instead of a BIOS.
        uefi: bool,
        /// Whether UEFI starts only what is signed.
        secure_boot: bool,
        /// Another file of UEFI firmware than the distribution's.
        bios: String,
        /// Whether what the guest writes stays in the image; not unless given.
        persist: bool,
        /// Memory: `512M`, `2G`; a number alone is MiB.
        memory: Bytes,
        /// CPUs, all alike.
        cpus: Cpus,
        /// CPUs as NUMA nodes, last-level caches per node, cores per cache, threads per core: `1,2,4,2`.
        topology: Topology,
        /// Board: `microvm` or `q35`; the one that boots fastest unless given.
        machine: Word<Machine>,
        /// What runs it: `auto` (the default), `qemu`, or `kvm`, which is vmlab's own monitor.
        hypervisor: Word<HypervisorChoice>,
        /// Who executes instructions: `auto` (the default), `kvm` or `tcg`.
        accel: Word<AccelChoice>,
        /// QEMU's `-cpu` where KVM is used; `host` unless given.
        kvm_cpu_args: String,
        /// Whether it boots faster at the price that `vmlab run --fast` has.
        fast: bool,
        /// Network: `none` (the default) or `user`.
        net: Word<NetworkMode>,
        /// Directory for the sockets of the guest's vsock, which one VM can have at a time.
        vsock: String,
        /// Whether the guest has a source of random numbers of the host (virtio-rng).
        rng: bool,
        /// The guest's host name.
        hostname: String,
        /// Host directories in the guest: names from `[shares]`, or tables.
        shares: Shares,
        /// Disks of the guest beside its root: names from `[disks]`, or tables. `[[target.disk]]` is the same.
        disks: Disks,
        /// What carries shares: `auto` (the default), `virtiofs` or `9p`.
        share_via: Word<ShareVia>,
        /// Arguments for QEMU's command line.
        qemu_args: Strings,
        /// Another QEMU: a name in `PATH`, or a path.
        qemu_command: String,
        /// Processor; only `x86_64`.
        arch: String,
        /// vmtest's table of what a VM is.
        vm: VmTable,
        /// How long the guest may take to come up.
        boot_timeout: Time,
        /// What runs: a string is a script for bash, an array a program and its arguments, `"-"` a shell on the terminal.
        command: CommandText,
        /// Where it runs. A relative path is from the file's directory, and is shared, writable; an absolute one is the guest's.
        cwd: String,
        /// Variables beside the caller's.
        env: Env,
        /// Who runs it: a name or number of the guest's root, or `caller`; root unless given.
        user: String,
        /// Scripts for bash before it. One that fails is an error, and the command does not run.
        setup: Strings,
        /// Scripts for bash after it, in any case.
        teardown: Strings,
        /// Files of the guest, as patterns of the shell, that are kept when the target fails.
        keep_on_failure: Strings,
        /// How long an attempt may take: `90s`, `5m`; a number alone is seconds.
        timeout: Time,
        /// How often it is tried again when it fails.
        retries: u32,
        /// Whether the command has to fail.
        should_fail: bool,
        /// Kernel events that make it fail, by their names or those of groups.
        fail_on: Kinds,
        /// A kernel event that has to happen.
        expect: EventKind,
    }
}

/// Shares of a target.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Shares(pub(super) Vec<ShareItem>);

/// One of them.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ShareItem {
    /// From `[shares]`.
    Name(At<String>),
    /// Its own.
    Table(At<ShareTable>),
}

impl FromNode for Shares {
    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        let Value::Array(nodes) = &node.value else {
            return expected("an array of names and tables", node, problems);
        };
        let read = nodes.iter().map(|node| match node.value {
            Value::String(_) => At::from_node(node, problems).map(ShareItem::Name),
            Value::Table(_) => At::from_node(node, problems).map(ShareItem::Table),
            _ => expected("a share's name or a table", node, problems),
        });
        read.collect::<Vec<_>>().into_iter().collect::<Option<_>>().map(Self)
    }
}

/// Disks of a target.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Disks(pub(super) Vec<DiskItem>);

/// One of them.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum DiskItem {
    /// From `[disks]`.
    Name(At<String>),
    /// Its own.
    Table(At<Box<DiskTable>>),
}

impl FromNode for Disks {
    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        let one = std::slice::from_ref(node);
        let nodes = match &node.value {
            Value::Array(nodes) => nodes.as_slice(),
            Value::String(_) | Value::Table(_) => one,
            _ => return expected("an array of names and tables", node, problems),
        };
        let read = nodes.iter().map(|node| match node.value {
            Value::String(_) => At::from_node(node, problems).map(DiskItem::Name),
            Value::Table(_) => {
                let table = At::<DiskTable>::from_node(node, problems)?;
                Some(DiskItem::Table(At { value: Box::new(table.value), span: table.span }))
            }
            _ => expected("a disk's name or a table", node, problems),
        });
        read.collect::<Vec<_>>().into_iter().collect::<Option<_>>().map(Self)
    }
}

/// Shares by their places in the guest.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Mounts(pub(super) Vec<(At<String>, MountTable)>);

impl FromNode for Mounts {
    fn from_node(node: &Node, problems: &mut Problems<'_>) -> Option<Self> {
        let Value::Table(table) = &node.value else {
            return expected("a table of mounts", node, problems);
        };
        let read = table.entries.iter().map(|entry| {
            let mount = MountTable::from_node(&entry.node, problems)?;
            Some((entry.key.clone(), mount))
        });
        read.collect::<Vec<_>>().into_iter().collect::<Option<_>>().map(Self)
    }
}
