//! Requests for VMs that cannot work.

use std::path::PathBuf;

use thiserror::Error;
use vmlab_artifacts::Arch;
use vmlab_devices::blk::MAX_QUEUES;

use super::{MAX_COMMAND_LINE, MAX_CPUS, MAX_MEMORY, MAX_SERIAL, MAX_TAG, MIN_MEMORY, Topology};
use crate::units::Bytes;
use crate::vsock::MAX_DIR;

/// A request that cannot work, found before anything was started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The environment names no hypervisor.
    #[error("{variable} is `{value}`; it can be auto, qemu or kvm")]
    HypervisorName {
        /// The variable.
        variable: &'static str,
        /// What it says.
        value: String,
    },
    /// The kernel is for another processor.
    #[error("the kernel {} is for {kernel}, and this host runs {host} guests", path.display())]
    ArchMismatch {
        /// The kernel image.
        path: PathBuf,
        /// What it is for.
        kernel: Arch,
        /// What the hypervisor runs.
        host: Arch,
    },
    /// Too little or too much memory.
    #[error(
        "a guest cannot have {asked} of memory: from {MIN_MEMORY} to {MAX_MEMORY} are possible"
    )]
    Memory {
        /// What was asked for.
        asked: Bytes,
    },
    /// No or too many CPUs.
    #[error("the topology {topology} (nodes, LLCs, cores, threads) is not 1 to {MAX_CPUS} CPUs")]
    Cpus {
        /// What was asked for.
        topology: Topology,
    },
    /// More NUMA nodes than memory can be divided among.
    #[error("{nodes} NUMA nodes cannot share {memory} of memory: each needs a whole number of MiB")]
    NodeMemory {
        /// Nodes asked for.
        nodes: u32,
        /// Memory asked for.
        memory: Bytes,
    },
    /// Not a topology.
    #[error("`{text}` is not a topology: NODES,LLCS,CORES,THREADS such as 1,2,4,2")]
    TopologySyntax {
        /// What was given.
        text: String,
    },
    /// The hypervisor cannot do it.
    #[error("the hypervisor {hypervisor} cannot have {what}")]
    Unsupported {
        /// The hypervisor's name.
        hypervisor: &'static str,
        /// What it cannot have.
        what: &'static str,
    },
    /// The machine type cannot do it.
    #[error("the machine {machine} has no {what}; use --machine q35")]
    Machine {
        /// The machine's name.
        machine: &'static str,
        /// What it lacks.
        what: &'static str,
    },
    /// A file that should be there is not.
    #[error("the {what} {} cannot be used", path.display())]
    File {
        /// What the file is for.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A shared path is not a directory.
    #[error("{} cannot be shared: it is not a directory", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// Two shares of one name.
    #[error("two shares have the tag `{tag}`")]
    DuplicateTag {
        /// The tag.
        tag: String,
    },
    /// A tag that the device cannot have.
    #[error("`{tag}` cannot be a share's tag: 1 to {MAX_TAG} letters, digits, `-` or `_`")]
    Tag {
        /// The tag.
        tag: String,
    },
    /// A path that cannot be given to QEMU.
    #[error(
        "{} cannot be shared over 9p: its name is not UTF-8, which QEMU's options need",
        path.display()
    )]
    PathEncoding {
        /// The path.
        path: PathBuf,
    },
    /// Two disks of one name.
    #[error("two disks have the name `{serial}`")]
    DuplicateSerial {
        /// The name.
        serial: String,
    },
    /// A name that a disk cannot have.
    #[error("`{serial}` cannot be a disk's name: 1 to {MAX_SERIAL} letters, digits, `-` or `_`")]
    Serial {
        /// The name.
        serial: String,
    },
    /// The same of a disk.
    #[error("{} cannot be a disk: its name is not UTF-8, which QEMU's options need", path.display())]
    DiskEncoding {
        /// The path.
        path: PathBuf,
    },
    /// A disk that vmlab cannot serve itself.
    #[error(
        "{} is a {format} image, and vmlab throttles, breaks and records raw ones only; \
         qemu-img convert -O raw makes one",
        path.display()
    )]
    ServedFormat {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: &'static str,
    },
    /// A disk that vmlab itself is to serve, with no queue or too many.
    #[error("the disk {serial} cannot have {queues} queues: from 1 to {MAX_QUEUES} are possible")]
    Queues {
        /// Its name.
        serial: String,
        /// How many were asked for.
        queues: u16,
    },
    /// Sockets whose paths would be too long.
    #[error(
        "{} cannot be the directory of a VM's vsock: it has {len} bytes, and {MAX_DIR} bytes are possible, as \
         Linux has 107 for the path of a socket in it",
        dir.display()
    )]
    VsockDir {
        /// The directory.
        dir: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Sockets that a guest could replace by links.
    #[error(
        "{} cannot be the directory of a VM's vsock: the guest can write to {}, and with it decide to which sockets of \
         the host it is connected; take a directory outside of writable shares",
        dir.display(),
        share.display()
    )]
    VsockInShare {
        /// The directory.
        dir: PathBuf,
        /// The share that it is in.
        share: PathBuf,
    },
    /// Kernel arguments too long.
    #[error("the kernel command line has {len} bytes, {MAX_COMMAND_LINE} are possible")]
    CommandLineLength {
        /// Its length.
        len: usize,
    },
    /// Kernel arguments with control characters.
    #[error("the kernel command line contains the control character {found:?}")]
    CommandLineCharacter {
        /// The first one.
        found: char,
    },
}
