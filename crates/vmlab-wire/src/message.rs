//! Messages: what host and agent tell each other on stream 0.
//!
//! Strings of the operating system (paths, arguments, environment) are bytes, not text.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::frame::{FrameHeader, FrameKind, MAX_MESSAGE, StreamId};

/// A command in the guest, numbered by the host from 0 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId(pub u32);

/// A standard stream of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stdio {
    /// Standard input, host to guest.
    Stdin = 1,
    /// Standard output, guest to host; with a terminal, all of its output.
    Stdout = 2,
    /// Standard error, guest to host.
    Stderr = 3,
}

impl ProcessId {
    /// The stream that carries a standard stream of this command.
    pub fn stream(self, stdio: Stdio) -> StreamId {
        StreamId(self.0.wrapping_mul(4).wrapping_add(stdio as u32))
    }
}

/// What the host tells the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum HostMessage {
    /// Reach the root and make the guest ready for commands. Sent once.
    Setup(Box<Setup>),
    /// Move the wall clock by so many nanoseconds.
    AdjustClock(i64),
    /// Start a command. Answered by `Started` or `StartFailed`.
    Exec(Box<Exec>),
    /// Send a signal to a command's process group, by its Linux number.
    Signal(ProcessId, i32),
    /// A command's terminal has a new size.
    Resize(ProcessId, TerminalSize),
    /// End everything, sync and power off.
    PowerOff,
    /// Say what the kernel's log has of its boot. Answered by `BootLog`.
    BootLog,
    /// Take a disk into use that has just been plugged in. Answered by `Done`.
    Attach(Disk),
    /// Take the disk with this serial number out of use, so that it can be unplugged. Answered by `Done`.
    Detach(String),
    /// Remember how the devices in these slots behind the bridge are set up. Answered by `Done`, after which the
    /// agent says and does nothing until `GoOn`, unless that was a failure.
    Hold(Vec<u8>),
    /// Go on after `Hold`. Answered by `Done`.
    GoOn(GoOn),
    /// As `Exec`, but the program is the agent itself, whatever the root has: the first argument is only its
    /// name, the others are `applet` and what of the agent is to run.
    ExecAgent(Box<Exec>),
    /// Nothing to do: it is the interrupt that counts, which comes with it. Not answered.
    Nudge,
}

/// What the agent tells the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum GuestMessage {
    /// The agent runs and can be given its `Setup`. The first message.
    Ready(Ready),
    /// The agent has its `Setup` and begins. Of a VM that was restored, it is the first sign of life.
    SettingUp,
    /// The guest is ready for commands.
    SetupDone(SetupReport),
    /// The guest cannot be made ready.
    SetupFailed(Failure),
    /// A command runs.
    Started(ProcessId),
    /// A command could not be started. It has no streams: no frame comes for them, not even `Eof`.
    StartFailed(ProcessId, StartFailure),
    /// A command has ended. Its output streams end by `Eof` frames, before or after.
    Exited(ProcessId, Exited),
    /// Something that went wrong without ending anything, for a person to read.
    Warning(String),
    /// The answer to `PowerOff`: all processes are gone, all writable filesystems are in sync, and the
    /// machine may be cut off. The last message.
    PoweringOff,
    /// The answer to `BootLog`.
    BootLog(BootLog),
    /// How something went that the host asked for.
    Done(Result<(), Failure>),
}

/// What a guest is told that goes on, perhaps where it was stopped long ago.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoOn {
    /// Other devices have come into the slots that `Hold` named.
    pub revive: bool,
    /// Wall-clock time, in nanoseconds since 1970.
    pub clock_ns: u64,
    /// Bytes to seed the kernel's random number generator with.
    pub entropy: Vec<u8>,
}

/// What a freshly booted agent knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The running kernel, as `uname -r`.
    pub release: String,
    /// Times in nanoseconds since the kernel's clock started: the agent's first instruction.
    pub started_ns: u64,
    /// The same, when it had loaded its modules and opened this channel.
    pub ready_ns: u64,
    /// How many virtio-fs devices it can go on with when others have come in their places.
    pub revivable: u32,
    /// What was done between these two, with beginning and end on the same clock.
    pub steps: Vec<(String, u64, u64)>,
    /// The same of each module that was loaded. These may overlap.
    pub modules: Vec<(String, u64, u64)>,
}

/// What the kernel's log says of its boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootLog {
    /// Parts of the boot in order, each with the time of its first message: nanoseconds on the clock of
    /// [`Ready`].
    pub parts: Vec<(String, u64)>,
}

/// How to make the guest ready for commands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The guest's host name.
    pub hostname: String,
    /// The root filesystem. A system that has a PID 1 of its own keeps its root, name and files.
    pub root: Option<Root>,
    /// The kernel's own module tree, mounted at `/lib/modules/<release>`.
    pub modules: Option<Filesystem>,
    /// Further mounts, in order.
    pub shares: Vec<Mount>,
    /// Disks beside the root's, which have to be there before commands run, in order.
    pub disks: Vec<Disk>,
    /// Files that replace those of the root, such as `/etc/resolv.conf`. The root below is not changed,
    /// nor is any share: where one is mounted over a file, the share is seen.
    pub files: Vec<File>,
    /// The network interface's address, when there is one.
    pub network: Option<Network>,
    /// Interfaces on networks of VMs, which are not the one of `network`.
    pub lans: Vec<Interface>,
    /// Names of modules to load with `modprobe` once the root is there, with their parameters.
    pub modprobe: Vec<Vec<String>>,
    /// So many virtio-fs devices, the first ones, are others than those that the kernel found.
    pub revive: u32,
    /// Devices were added since the kernel looked for any, as to a VM that was restored.
    pub new_devices: bool,
    /// The host wants to know the guest's users and groups.
    pub accounts: bool,
    /// Wall-clock time, in nanoseconds since 1970.
    pub clock_ns: u64,
    /// Bytes to seed the kernel's random number generator with.
    pub entropy: Vec<u8>,
}

/// The root filesystem and how it is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// Where it comes from.
    pub filesystem: Filesystem,
    /// How it can be written to.
    pub mode: RootMode,
}

/// How the root can be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootMode {
    /// Not at all; `/tmp`, `/run` and `/var/tmp` are of the guest's own memory.
    ReadOnly,
    /// Into the guest's memory, over the read-only root.
    Overlay,
    /// Really.
    ReadWrite,
}

/// Something to mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    /// Type, as `mount -t` takes it, `bind` for a directory of the root, or `disk` for the root of a system
    /// on a disk, whatever its filesystem.
    pub kind: String,
    /// Source: a share's tag, a device, an absolute path for `bind`, or the serial number of a disk.
    pub source: String,
    /// Options of the filesystem, comma-separated, without `ro` and `rw`.
    pub options: String,
}

/// A filesystem at a place. The mount point is made where it is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// What to mount.
    pub filesystem: Filesystem,
    /// What to mount where the kernel does not know that filesystem.
    pub otherwise: Option<Filesystem>,
    /// Absolute path in the guest.
    pub target: Vec<u8>,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// A virtio disk of the guest, at `/dev/disk/by-id/virtio-SERIAL`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its serial number.
    pub serial: String,
    /// What it is used for.
    pub used: DiskUse,
}

/// What a disk is used for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskUse {
    /// Whatever commands make of it.
    Device,
    /// Mounted.
    Mounted(DiskMount),
    /// Swap space.
    Swap,
}

/// How a disk is mounted. The mount point is made where it is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMount {
    /// Type of its filesystem, as `mount -t` takes it; `None` to look what is on it.
    pub kind: Option<String>,
    /// Absolute path in the guest.
    pub target: Vec<u8>,
    /// Options as of `mount -o`.
    pub options: String,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// A file that the guest gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Absolute path in the guest.
    pub path: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Content.
    pub content: Vec<u8>,
}

/// Static addresses of the guest's network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The guest's IPv4 address.
    pub address: [u8; 4],
    /// Length of the network's prefix in bits.
    pub prefix: u8,
    /// The IPv4 address of the default route.
    pub gateway: [u8; 4],
}

/// An interface on a network of VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The device's address, which it is known by.
    pub mac: [u8; 6],
    /// The guest's IPv4 address there.
    pub address: [u8; 4],
    /// Length of the network's prefix in bits.
    pub prefix: u8,
}

/// How the set-up went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupReport {
    /// Steps in order with the time each took, in microseconds.
    pub steps: Vec<(String, u64)>,
    /// The guest's wall clock when all was done, in nanoseconds since 1970.
    pub clock_ns: u64,
    /// Its users and groups, if they were asked for.
    pub accounts: Option<Accounts>,
}

/// A system's users and groups, as far as its own files name them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounts {
    /// `/etc/passwd`.
    pub passwd: Vec<u8>,
    /// `/etc/group`.
    pub group: Vec<u8>,
}

/// A step that failed in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What was being done, such as `mount / from 9p`.
    pub step: String,
    /// What went wrong.
    pub detail: String,
    /// The error number, where there is one.
    pub errno: Option<i32>,
}

/// A command to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Its number, not used before.
    pub process: ProcessId,
    /// Program and arguments. A program without `/` is looked for in the `PATH` of `env`.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory.
    pub cwd: Vec<u8>,
    /// Who runs it.
    pub user: User,
    /// File mode creation mask.
    pub umask: u32,
    /// Resource limits: `RLIMIT_*` number, soft and hard limit; `u64::MAX` is none.
    pub rlimits: Vec<(u32, u64, u64)>,
    /// What its standard streams are.
    pub stdio: ExecStdio,
}

/// Numeric identity of a command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// What a command's standard streams are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecStdio {
    /// Pipes, or `/dev/null` for those that the host has no use for.
    Pipes {
        /// Whether data comes on the stdin stream; otherwise `/dev/null`.
        stdin: bool,
        /// Whether stdout is carried; otherwise `/dev/null`.
        stdout: bool,
        /// Where stderr goes.
        stderr: StderrTo,
    },
    /// A terminal of the guest's own, carried by the stdin and stdout streams.
    Terminal(TerminalSize),
}

/// Where a command's stderr goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StderrTo {
    /// Nowhere.
    Null,
    /// Its own stream.
    Stream,
    /// Into the same pipe as stdout, so that their order is kept.
    Stdout,
}

/// Size of a terminal in characters. Zero stands for what the host does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Why a command could not be started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartFailure {
    /// Which part failed.
    pub stage: StartStage,
    /// The error number.
    pub errno: i32,
}

/// The parts of starting a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartStage {
    /// Pipes or terminal.
    Stdio,
    /// Entering the working directory.
    Cwd,
    /// Taking on user, limits or session.
    Identity,
    /// Executing the program.
    Program,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exited {
    /// Exit code or signal.
    pub status: ExitStatus,
    /// Whether the guest's kernel killed some process for want of memory while it ran.
    pub oom_kills: u64,
    /// CPU time used by it and its children, in microseconds: user and system.
    pub cpu_us: (u64, u64),
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// By itself, with this code.
    Code(u8),
    /// By this signal.
    Signal(i32),
}

/// A message that cannot be sent or understood.
#[derive(Debug, Error)]
pub enum MessageError {
    /// The message does not fit into a frame.
    #[error(
        "a message of {len} bytes is over the limit of {MAX_MESSAGE} (are the arguments or the environment that large?)"
    )]
    TooLong {
        /// Its encoded length.
        len: usize,
    },
    /// The bytes are not the message that they should be.
    #[error("a message could not be encoded or decoded")]
    Codec(#[from] postcard::Error),
}

/// Appends a message as a frame.
///
/// # Errors
/// When it is longer than [`MAX_MESSAGE`]. `out` is then unchanged.
pub fn encode<M: Serialize>(message: &M, out: &mut Vec<u8>) -> Result<(), MessageError> {
    let payload = postcard::to_stdvec(message)?;
    if payload.len() > MAX_MESSAGE {
        return Err(MessageError::TooLong { len: payload.len() });
    }
    let len = payload.len() as u32;
    let header = FrameHeader { stream: StreamId::CONTROL, kind: FrameKind::Message, len };
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(&payload);
    Ok(())
}

/// Reads the payload of a [`Frame::Message`](crate::frame::Frame::Message).
///
/// # Errors
/// When the bytes are not such a message, or more than one.
pub fn decode<'a, M: Deserialize<'a>>(payload: &'a [u8]) -> Result<M, MessageError> {
    match postcard::take_from_bytes(payload)? {
        (message, []) => Ok(message),
        _ => Err(MessageError::Codec(postcard::Error::DeserializeBadEncoding)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Decoder, Frame};
    use proptest::prelude::*;

    fn exec() -> Exec {
        Exec {
            process: ProcessId(3),
            argv: vec![b"printf".to_vec(), vec![0xff, b'\n', 0x80]],
            env: vec![(b"PATH".to_vec(), b"/bin".to_vec())],
            cwd: b"/tmp".to_vec(),
            user: User { uid: 1, gid: 2, groups: vec![3, 4] },
            umask: 0o22,
            rlimits: vec![(7, 1024, u64::MAX)],
            stdio: ExecStdio::Pipes { stdin: true, stdout: true, stderr: StderrTo::Stream },
        }
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let sent = HostMessage::Exec(Box::new(exec()));
        let mut bytes = Vec::new();
        encode(&sent, &mut bytes).unwrap();
        let mut decoder = Decoder::new();
        decoder.push(&bytes);
        let Ok(Some(Frame::Message(payload))) = decoder.next_frame() else { panic!("no message") };
        assert_eq!(decode::<HostMessage>(payload).unwrap(), sent);
        assert!(decode::<HostMessage>(&payload[..payload.len() - 1]).is_err());
        assert!(decode::<HostMessage>(&[payload, &[0]].concat()).is_err());
    }

    #[test]
    fn an_oversized_message_is_refused() {
        let mut exec = exec();
        exec.argv.push(vec![b'x'; MAX_MESSAGE]);
        let mut bytes = Vec::new();
        assert!(matches!(
            encode(&HostMessage::Exec(Box::new(exec)), &mut bytes),
            Err(MessageError::TooLong { .. })
        ));
        assert!(bytes.is_empty());
    }

    #[test]
    fn streams_of_processes_do_not_meet() {
        let mut seen = std::collections::HashSet::from([StreamId::CONTROL]);
        for process in 0..100 {
            for stdio in [Stdio::Stdin, Stdio::Stdout, Stdio::Stderr] {
                assert!(seen.insert(ProcessId(process).stream(stdio)));
            }
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<HostMessage>(&bytes);
            let _ = decode::<GuestMessage>(&bytes);
        }
    }
}
