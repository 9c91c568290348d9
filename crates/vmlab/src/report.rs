//! What a run did and how long it took, for machines to read.

use std::path::PathBuf;

use serde::Serialize;

use crate::Error;
use crate::config::{Accel, Machine};
use crate::hypervisor::ExitReason;
use crate::timings::{Span, Timeline};
use crate::units::Bytes;

/// A part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Phase {
    /// Finding the kernel, and fetching it where needed.
    Kernel,
    /// Making what it boots from, and choosing how.
    Prepare,
    /// From starting the hypervisor until the agent is up.
    Boot,
    /// Taking a snapshot of a VM that has booted.
    Snapshot,
    /// From starting the hypervisor until a guest goes on from a snapshot.
    Restore,
    /// Mounting the root and what else the guest needs.
    Setup,
    /// The commands.
    Run,
    /// From the last command's end until the VM is gone.
    Stop,
}

impl Phase {
    /// What a person reads while it lasts.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Kernel => "kernel",
            Phase::Prepare => "prepare",
            Phase::Boot => "boot",
            Phase::Snapshot => "snapshot",
            Phase::Restore => "restore",
            Phase::Setup => "setup",
            Phase::Run => "run",
            Phase::Stop => "stop",
        }
    }
}

/// The time that a phase took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PhaseTime {
    /// Which phase.
    pub phase: Phase,
    /// How long, in milliseconds.
    pub ms: f64,
}

/// Times on the guest kernel's own clock, in milliseconds since it started.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GuestBoot {
    /// The agent's first instruction.
    pub agent_started_ms: f64,
    /// The agent had loaded its modules and opened its channel.
    pub agent_ready_ms: f64,
}

/// A step inside the guest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GuestStep {
    /// What was done.
    pub step: String,
    /// How long it took, in milliseconds of the guest's clock.
    pub ms: f64,
}

/// How often CPUs have left the guest for one reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ExitCount {
    /// The reason.
    pub exit: &'static str,
    /// How often.
    pub count: u64,
}

/// What a VM did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The kernel, as it was asked for.
    pub kernel: String,
    /// Its release, as the guest says it.
    pub release: String,
    /// What ran it: `qemu`, or `kvm` for vmlab's own monitor.
    pub hypervisor: &'static str,
    /// How instructions were executed.
    pub accel: Accel,
    /// Why KVM was not used, where it was not.
    pub accel_reason: Option<String>,
    /// The board.
    pub machine: Machine,
    /// The guest's RAM in bytes.
    pub memory: Bytes,
    /// The guest's CPUs.
    pub cpus: u32,
    /// The phases so far, in order.
    pub phases: Vec<PhaseTime>,
    /// The same with what they consisted of, on the host, in the guest's kernel and in its agent.
    pub timings: Vec<Span>,
    /// How the guest came up, once it has.
    pub guest_boot: Option<GuestBoot>,
    /// What the guest's set-up consisted of.
    pub setup_steps: Vec<GuestStep>,
    /// How often its CPUs have left the guest for the hypervisor, by reason, where that is counted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exits: Vec<ExitCount>,
    /// Why the VM ended, once it has.
    pub exit_reason: Option<ExitReason>,
    /// The log of the serial console, once there is one. What the hypervisor said is beside it.
    pub console_log: Option<PathBuf>,
}

impl Report {
    /// What a failed start came to.
    pub(crate) fn failed(&mut self, timeline: &Timeline, error: &Error) {
        self.phases = timeline.phases();
        self.timings = timeline.spans();
        self.exit_reason = error.exit_reason().cloned();
        self.console_log = error.evidence().map(|evidence| evidence.log.clone());
    }
}
