//! A VM of vmlab's own monitor, and the thread that looks after it.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmlab_devices::net::Passt;
use vmlab_devices::{Fault, OnFault, bear_file_limits, sparse};
use vmlab_vmm::End;
use vmlab_vmm::memory::{self, Backing};
use vmlab_vmm::topology::Topology;
use vmlab_vmm::working_set::WorkingSet;
use vmlab_vmm::x86_64::boot::Kernel;
use vmlab_vmm::x86_64::{Config, Ender, Machine, Plug, layout};

use super::super::fate::Fate;
use super::super::panic::panic_patience;
use super::super::served::FileServer;
use super::super::snapshot::empty_memory;
use super::super::{
    DeviceId, ExitReason, Hints, HypervisorError, Memory, Origin, RunDevices, SerialConsole,
    Snapshot, StartOptions, VmHandle, VmState, resource,
};
use super::places::{self, Making};
use crate::config::{AgentChannel, DiskDevice, KernelBoot, VmConfig};
use crate::error::chain;
use crate::lan::LanPort;
use crate::random;
use crate::report::ExitCount;
use crate::runs::private_file;
use crate::sync::lock;

/// How long the last output of an ended VM may take to be read. It is there already, so this only bounds a
/// fault.
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// The first slot for what a run brings; the console is before it.
const FIRST: usize = 1;

/// A VM that has used more pages than this has done so for its command, which the next one need not have: 64 MiB. One
/// that runs next to nothing uses a third of it.
const MOST_PAGES: u64 = 16 * 1024;

/// How many devices a run can bring.
pub(super) const MOST_DEVICES: usize = layout::MAX_SLOTS - FIRST;

/// A VM.
#[derive(Debug)]
pub(super) struct KvmVm {
    shared: Arc<Shared>,
    agent: Mutex<Option<UnixStream>>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
    /// Whether a guest's sync(2) waits for the host's disks.
    durable: Arc<AtomicBool>,
    /// What is behind its memory, if a snapshot can be taken.
    backing: Option<Backing>,
    shares: Vec<FileServer>,
    /// The devices that its run has brought, and their slots.
    placed: Mutex<Vec<(usize, DeviceId)>>,
    /// Whether it has the devices of a run.
    in_run: bool,
    pluggable: bool,
    /// Whether what serves its disks is restricted.
    sandbox: bool,
    /// What its console had shown before it went on from a snapshot.
    said_before: Arc<[u8]>,
}

/// What is known of a VM to all who have to do with it.
struct Shared {
    /// Gone when it has ended.
    machine: Mutex<Option<Arc<Machine>>>,
    /// There before any of its devices could fail.
    ender: OnceLock<Ender>,
    console: SerialConsole,
    fate: Fate,
    /// How often its processors had left the guest, once it has ended.
    exits: OnceLock<Vec<ExitCount>>,
}

fn counts(machine: &Machine) -> Vec<ExitCount> {
    machine.exits().into_iter().map(|(exit, count)| ExitCount { exit, count }).collect()
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("fate", &self.fate).finish_non_exhaustive()
    }
}

/// What is behind the memory of a VM that begins so.
fn backing(config: &VmConfig, origin: &Origin) -> io::Result<Backing> {
    Ok(match origin {
        Origin::Boot if !config.pluggable => Backing::Anonymous,
        Origin::Boot | Origin::BootForSnapshot => Backing::Shared(empty_memory(config.memory.0)?),
        Origin::Snapshot(snapshot) => match snapshot.memory.first() {
            Some(Memory::Own(file)) => Backing::Shared(Arc::clone(file)),
            Some(Memory::Template(file)) => Backing::Private(Arc::clone(file)),
            None => return Err(io::Error::other("the snapshot has none")),
        },
    })
}

impl KvmVm {
    pub(super) fn start(config: &VmConfig, options: StartOptions) -> Result<Self, HypervisorError> {
        let StartOptions { log_dir, deadline, origin, lans, vms } = options;
        let Some(kernel) = config.boot.kernel() else {
            let said = "vmlab's own monitor starts kernels only".to_owned();
            return Err(HypervisorError::Refused { said });
        };
        let in_run = !matches!(origin, Origin::BootForSnapshot);
        let may_change = config.pluggable || !matches!(origin, Origin::Boot);
        let durable = Arc::new(AtomicBool::new(true));
        let run = match &origin {
            Origin::Snapshot(snapshot) => snapshot.run.clone(),
            Origin::Boot | Origin::BootForSnapshot => None,
        };

        let log_path = log_dir.join("console.log");
        let mut log = private_file(&log_path)
            .map_err(|source| HypervisorError::Log { path: log_path.clone(), source })?;
        let pair = || UnixStream::pair().map_err(resource("sockets"));
        let (console, line) = pair()?;
        let (agent, to_agent) = pair()?;
        let input = console.try_clone().map_err(resource("sockets"))?;
        let serial = SerialConsole::new(log_path, input);
        // Without a limit the kernel's own word is waited for, for ever if need be.
        console
            .set_read_timeout(panic_patience(&kernel.command_line))
            .map_err(resource("sockets"))?;
        let (mut lines, to_agent) = (vec![line], Some(to_agent));
        let to_console = match config.channel {
            AgentChannel::Virtio => to_agent,
            AgentChannel::Serial => {
                lines.extend(to_agent);
                None
            }
        };

        let shared = Arc::new(Shared {
            machine: Mutex::default(),
            ender: OnceLock::new(),
            console: serial,
            fate: Fate::default(),
            exits: OnceLock::new(),
        });
        let mut next = FIRST..layout::MAX_SLOTS;
        let making = Making {
            config,
            vms,
            durable: &durable,
            known: run.as_ref().map_or(&[], |run| &run.shares),
            lans: &lans,
            network_ended: shared.network_ended(),
        };
        let devices = making.devices(to_console, |id| match &run {
            Some(run) => run.slot_of(id),
            None => next.next().ok_or(HypervisorError::Full { most: MOST_DEVICES as u32 }),
        })?;
        let slots = match may_change {
            true => layout::MAX_SLOTS,
            false => devices.placed.iter().map(|placed| placed.slot + 1).max().unwrap_or(0),
        };

        let mut plugs = Vec::new();
        let mut placed = Vec::new();
        for device in devices.placed {
            placed.extend(device.id.map(|id| (device.slot, id)));
            let on_fault = shared.on_fault(device.what);
            plugs.push(Plug { slot: device.slot, device: device.device, on_fault });
        }
        let backing = backing(config, &origin).map_err(resource("memory"))?;
        let mut generation = [0; layout::VMGENID_LEN];
        random::fill(&mut generation).map_err(resource("random numbers"))?;
        let of_topology = config.topology;
        let machine_config = Config {
            memory: config.memory.0,
            backing: backing.clone(),
            topology: Topology {
                nodes: of_topology.nodes,
                llcs: of_topology.llcs,
                cores: of_topology.cores,
                threads: of_topology.threads,
            },
            slots,
            lines,
            generation,
            sandbox: config.sandbox,
        };
        let (mut said_before, mut learns) = (Arc::default(), None);
        let machine = match origin {
            Origin::Boot | Origin::BootForSnapshot => {
                Machine::boot(machine_config, open(kernel)?, plugs)?
            }
            Origin::Snapshot(snapshot) => {
                // The log is whole, though the console began before.
                if let Err(error) = io::Write::write_all(&mut log, &snapshot.console) {
                    shared.console.log_failed(&error);
                }
                said_before = snapshot.console;
                let machine = Machine::restore(machine_config, &snapshot.state, plugs)?;
                learns = snapshot.hints.filter(|hints| !prefault(&machine, hints));
                machine
            }
        };
        let _ = shared.ender.set(machine.ender());
        if shared.fate.is_asked() {
            // One of its devices has failed before there was anything to end.
            machine.end(End::Stopped);
        }
        let machine = Arc::new(machine);
        *lock(&shared.machine) = Some(Arc::clone(&machine));
        let supervisor = {
            let shared = Arc::clone(&shared);
            let outputs = Outputs { console, log, lans, passt: devices.passt, learns };
            let work = move || shared.supervise(outputs, deadline);
            thread::Builder::new().name("vmlab-kvm".to_owned()).spawn(work)
        };
        let vm = Self {
            shared,
            agent: Mutex::new(Some(agent)),
            supervisor: Mutex::new(Some(supervisor.map_err(resource("a thread"))?)),
            durable,
            backing: may_change.then_some(backing),
            shares: devices.shares,
            placed: Mutex::new(placed),
            in_run,
            pluggable: config.pluggable,
            sandbox: config.sandbox,
            said_before,
        };
        // A device may have failed already. Whoever uses the VM finds out why.
        let _ = machine.resume();
        Ok(vm)
    }

    fn machine(&self) -> Result<Arc<Machine>, HypervisorError> {
        lock(&self.shared.machine).clone().ok_or(vmlab_vmm::Error::Ended.into())
    }

    /// Its memory in a file of its own.
    fn memory(&self, machine: &Machine) -> Result<Arc<File>, HypervisorError> {
        match &self.backing {
            Some(Backing::Shared(file)) => Ok(Arc::clone(file)),
            Some(Backing::Private(template)) => {
                copy(template, machine).map_err(resource("a copy of the guest's memory"))
            }
            Some(Backing::Anonymous) | None => Err(HypervisorError::Command {
                command: "snapshot",
                said: "it was not started for a snapshot".to_owned(),
            }),
        }
    }
}

fn open(kernel: &KernelBoot) -> Result<Kernel, HypervisorError> {
    let image = File::open(&kernel.image).map_err(resource("the kernel"))?;
    let initrd = File::open(&kernel.initramfs).map_err(resource("the initramfs"))?;
    Ok(Kernel { image, initrd: Some(initrd), command_line: kernel.command_line.clone() })
}

/// Has the pages there that an earlier VM of the snapshot used; whether that is known.
fn prefault(machine: &Machine, hints: &Hints) -> bool {
    let pages = hints.read().and_then(|content| WorkingSet::decode(&content));
    if let Some(pages) = &pages {
        machine.prefault(pages);
    }
    pages.is_some()
}

/// Keeps which pages a VM has used, of which little more than its start is to be told.
fn learn(machine: &Machine, hints: &Hints) {
    // Where the kernel does not tell, there is nothing to keep.
    let pages = machine.working_set(MOST_PAGES).ok().flatten();
    if let Some(content) = pages.and_then(|pages| pages.encode()) {
        hints.keep(&content);
    }
}

/// A guest's memory, which began as this file, in a new one.
fn copy(template: &File, machine: &Machine) -> io::Result<Arc<File>> {
    let file = empty_memory(template.metadata()?.len())?;
    sparse::copy(template, &file)?;
    memory::write_changes(machine.memory(), &file)?;
    Ok(file)
}

impl RunDevices {
    /// The slot that a device had.
    fn slot_of(&self, id: &DeviceId) -> Result<usize, HypervisorError> {
        let place = self.place_of(id).map(|place| place as usize);
        place.ok_or_else(|| HypervisorError::Command {
            command: "restore",
            said: format!("the snapshot has no place for {id:?}"),
        })
    }
}

/// What a VM writes, and what is its own as long as it runs.
struct Outputs {
    console: UnixStream,
    log: File,
    lans: Vec<Arc<LanPort>>,
    passt: Option<Passt>,
    /// Where what is learnt of the VM is kept.
    learns: Option<Hints>,
}

impl Shared {
    /// What ends the VM, with what has happened to something that serves it.
    fn fails(self: &Arc<Self>) -> impl Fn(String) + Send + Sync + 'static {
        // The devices belong to the VM, which belongs to this.
        let shared = Arc::downgrade(self);
        move |said| {
            if let Some(shared) = shared.upgrade() {
                shared.end(ExitReason::DeviceFailed(said));
            }
        }
    }

    /// What is told of a device that cannot go on.
    fn on_fault(self: &Arc<Self>, what: String) -> OnFault {
        let fails = self.fails();
        Arc::new(move |_, fault: Fault| fails(format!("{what} ended: {}", chain(&fault))))
    }

    /// The same of the user's network.
    fn network_ended(self: &Arc<Self>) -> Box<dyn FnOnce(&str) + Send> {
        let fails = self.fails();
        Box::new(move |said| fails(format!("the network ended, as passt did: {said}")))
    }

    fn end(&self, reason: ExitReason) {
        self.fate.ask(reason);
        // The machine itself is not for this thread to have, which may be one of its devices'.
        if let Some(ender) = self.ender.get() {
            ender.end(End::Stopped);
        }
    }

    /// Looks after a VM until its end, and finds out why it ended.
    fn supervise(self: &Arc<Self>, outputs: Outputs, deadline: Option<Instant>) {
        let Outputs { console, log, lans, passt, learns } = outputs;
        let closing = console.try_clone();
        {
            let shared = Arc::clone(self);
            thread::spawn(move || {
                // What the guest says on its console must not end this process. It is only a log that ends.
                let _ = bear_file_limits();
                let stuck = |message| {
                    if shared.runs() {
                        shared.end(ExitReason::GuestPanic(Some(message)));
                    }
                };
                shared.console.pump(console, log, stuck);
            });
        }
        let machine = lock(&self.machine).clone();
        let mut end = machine.as_ref().and_then(|machine| machine.wait(deadline));
        if end.is_none() {
            self.end(ExitReason::Timeout);
            end = machine.as_ref().and_then(|machine| machine.wait(None));
        }
        // The threads of its processors and devices end with it, and with them the files of its disks are free for
        // the next VM. Whoever has it still is about to give it back.
        if let Some(machine) = &machine {
            let _ = self.exits.set(counts(machine));
            if let Some(hints) = learns {
                learn(machine, &hints);
            }
        }
        lock(&self.machine).take();
        drop(machine);
        let drained = Instant::now() + DRAIN_TIME;
        self.console.wait_closed(drained);
        if let Ok(socket) = closing {
            let _ = socket.shutdown(Shutdown::Both);
        }
        // Others can have its places on networks.
        drop((lans, passt));
        self.fate.decide(|asked| self.reason(end, asked));
    }

    fn runs(&self) -> bool {
        lock(&self.machine).as_ref().is_some_and(|machine| machine.runs())
    }

    fn reason(&self, end: Option<End>, asked: Option<&ExitReason>) -> ExitReason {
        let panicked = || self.console.panic_message();
        let or_panic = |otherwise| match panicked() {
            Some(message) => ExitReason::GuestPanic(Some(message)),
            None => otherwise,
        };
        match end {
            Some(End::PowerOff) => ExitReason::Shutdown,
            Some(End::Reset) => or_panic(ExitReason::Reset),
            // A kernel that has nothing else to reset a PC by faults on purpose.
            Some(End::TripleFault) if self.console.restart_announced() => {
                or_panic(ExitReason::Reset)
            }
            Some(End::TripleFault) => or_panic(ExitReason::TripleFault),
            Some(End::Panic) => ExitReason::GuestPanic(panicked()),
            Some(End::InternalError(what)) => ExitReason::ProcessorFailed(what),
            Some(End::Failed(what)) => ExitReason::MonitorFailed(what),
            _ => match asked {
                // It stayed in its panic: see `panic_patience`.
                Some(ExitReason::Timeout) => or_panic(ExitReason::Timeout),
                Some(asked) => asked.clone(),
                None => ExitReason::Killed,
            },
        }
    }
}

impl VmHandle for KvmVm {
    fn state(&self) -> VmState {
        match () {
            () if self.shared.fate.is_decided() => VmState::Ended,
            () if self.shared.runs() => VmState::Running,
            () => VmState::Paused,
        }
    }

    fn wait(&self, deadline: Option<Instant>) -> Option<ExitReason> {
        self.shared.fate.wait(deadline)
    }

    fn take_agent_channel(&self) -> Option<UnixStream> {
        lock(&self.agent).take()
    }

    fn serial(&self) -> &SerialConsole {
        &self.shared.console
    }

    fn pause(&self) -> Result<(), HypervisorError> {
        Ok(self.machine()?.pause()?)
    }

    fn resume(&self) -> Result<(), HypervisorError> {
        Ok(self.machine()?.resume()?)
    }

    fn shutdown(&self) -> Result<(), HypervisorError> {
        self.machine()?.press_power_button();
        Ok(())
    }

    fn snapshot(&self) -> Result<Snapshot, HypervisorError> {
        let machine = self.machine()?;
        machine.pause()?;
        let state = machine.save()?;
        let memory = self.memory(&machine)?;
        let run = || RunDevices::of(self.places(), &self.shares, &self.durable);
        let run = self.in_run.then(run).transpose()?;
        Ok(Snapshot {
            state: state.into(),
            memory: vec![match run {
                // What goes on from the midst of a run may do so again.
                Some(_) => Memory::Template(memory),
                None => Memory::Own(memory),
            }],
            console: self.shared.console.kept_after(&self.said_before).into(),
            shares: u32::try_from(self.shares.len()).unwrap_or(u32::MAX),
            kept: 0,
            run: run.map(Arc::new),
            hints: None,
        })
    }

    fn attach_disk(&self, disk: &DiskDevice) -> Result<(), HypervisorError> {
        self.pluggable.then_some(()).ok_or(HypervisorError::NotPluggable)?;
        let (id, device, what) = places::disk(disk, self.sandbox)?;
        let mut placed = lock(&self.placed);
        let free = |slot: &usize| placed.iter().all(|(other, _)| other != slot);
        let slot = (FIRST..layout::MAX_SLOTS).find(free);
        let slot = slot.ok_or(HypervisorError::Full { most: MOST_DEVICES as u32 })?;
        let on_fault = self.shared.on_fault(what);
        self.machine()?.plug(Plug { slot, device, on_fault })?;
        placed.push((slot, id));
        Ok(())
    }

    fn can_detach(&self, serial: &str) -> bool {
        self.pluggable && self.slot_of_disk(serial).is_some()
    }

    fn detach_disk(&self, serial: &str) -> Result<(), HypervisorError> {
        self.pluggable.then_some(()).ok_or(HypervisorError::NotPluggable)?;
        let missing = || HypervisorError::NoSuchDisk { serial: serial.to_owned() };
        let slot = self.slot_of_disk(serial).ok_or_else(missing)?;
        self.machine()?.unplug(slot)?;
        lock(&self.placed).retain(|(other, _)| *other != slot);
        Ok(())
    }

    fn exits(&self) -> Vec<ExitCount> {
        let machine = lock(&self.shared.machine).clone();
        match machine {
            Some(machine) => counts(&machine),
            None => self.shared.exits.get().cloned().unwrap_or_default(),
        }
    }

    fn wind_down(&self) {
        self.durable.store(false, Ordering::Relaxed);
    }

    fn kill(&self, reason: ExitReason) {
        self.shared.end(reason);
        self.wait(None);
    }
}

impl KvmVm {
    fn slot_of_disk(&self, serial: &str) -> Option<usize> {
        let wanted = DeviceId::Disk(serial.to_owned());
        lock(&self.placed).iter().find(|(_, id)| *id == wanted).map(|(slot, _)| *slot)
    }

    /// The slot of each device that its run has brought.
    fn places(&self) -> Vec<(u32, DeviceId)> {
        lock(&self.placed).iter().map(|(slot, id)| (*slot as u32, id.clone())).collect()
    }
}

impl Drop for KvmVm {
    fn drop(&mut self) {
        self.shared.end(ExitReason::Killed);
        let supervisor = lock(&self.supervisor).take();
        if let Some(supervisor) = supervisor {
            let _ = supervisor.join();
        }
    }
}
