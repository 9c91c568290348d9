//! A VM: what it is made of, and what can be done to it.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_CAP_PRE_FAULT_MEMORY, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KvmIrqRouting,
    kvm_clock_data, kvm_irq_routing_entry, kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use super::boot::{self, Kernel};
use super::cpu::{self, CpuState};
use super::exits::Exits;
use super::interrupts::{Input, Interrupts};
use super::serial::{Line, LineState};
use super::slots::{Plug, Slots};
use super::state::{Shape, State};
use super::{acpi, cpuid, layout};
use vmlab_devices::Interrupt;

use crate::error::{Error, host, kvm};
use crate::gate::{End, Gate};
use crate::kick::Kick;
use crate::memory::{self, Backing};
use crate::topology::Topology;
use crate::working_set::WorkingSet;

/// What a VM is made of, besides its devices.
#[derive(Debug)]
pub struct Config {
    /// Bytes of memory.
    pub memory: u64,
    /// What is behind it.
    pub backing: Backing,
    /// Processors.
    pub topology: Topology,
    /// How many places it has for virtio devices, at most [`layout::MAX_SLOTS`].
    pub slots: usize,
    /// The host's ends of its serial lines, one or two.
    pub lines: Vec<UnixStream>,
    /// A number that no other VM has, and that its kernel is told of.
    pub generation: [u8; layout::VMGENID_LEN],
    /// Whether the threads of its processors keep no rights but those that running a guest takes.
    pub sandbox: bool,
}

/// How long the threads of a VM that has ended may take for what the host does for them, such as to write to a disk.
/// A host that takes longer, like a filesystem of the network whose server is gone, may never be done.
const END_TIME: Duration = Duration::from_secs(10);

/// A VM in this process. When it is dropped, it has ended; no thread of one of its devices may be the one that
/// drops it. Nothing of it is left then, unless the host takes very long for a request: the thread that waits for it
/// has the guest's memory and its device until then.
pub struct Machine {
    inner: Arc<Inner>,
}

/// What ends a VM, and does not keep it: for the threads of its devices.
#[derive(Debug, Clone)]
pub struct Ender(Arc<Processors>);

impl Ender {
    /// Ends it for this reason, unless it has ended before.
    pub fn end(&self, end: End) {
        self.0.end(end);
    }
}

/// The threads of a VM's processors.
#[derive(Debug)]
pub(super) struct Processors {
    pub(super) gate: Arc<Gate>,
    pub(super) kicks: Vec<Kick>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Processors {
    /// Has all of them leave their guests.
    fn kick(&self) {
        let threads = lock(&self.threads);
        self.kicks.iter().zip(&*threads).for_each(|(kick, thread)| kick.send(thread));
    }

    pub(super) fn end(&self, end: End) {
        self.gate.end(end);
        self.kick();
    }
}

/// What those threads share.
pub(super) struct Inner {
    pub(super) processors: Arc<Processors>,
    pub(super) cpus: Vec<Mutex<VcpuFd>>,
    pub(super) slots: Slots,
    pub(super) lines: Vec<Line>,
    pub(super) exits: Exits,
    /// Its kernel has said that it panicked.
    pub(super) panicked: AtomicBool,
    pub(super) memory: GuestMemoryMmap,
    pub(super) sandbox: bool,
    power_button: Arc<Input>,
    generation: Arc<Input>,
    /// It goes on elsewhere.
    saved: AtomicBool,
    /// Whether KVM maps pages for guests that have not asked for them.
    prefaults: bool,
    shape: Shape,
    msrs: Vec<u32>,
    more_registers: Option<usize>,
    // Last: all that KVM has of it goes with this.
    pub(super) vm: Arc<VmFd>,
}

/// KVM's places for its parts of an interrupt controller.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl Machine {
    /// A VM that will boot a kernel when it is [resumed](Self::resume).
    ///
    /// # Errors
    /// KVM or the host refuses something, or the kernel cannot be started.
    pub fn boot(config: Config, kernel: Kernel, devices: Vec<Plug>) -> Result<Self, Error> {
        let parts = Parts::new(&config)?;
        let entry = boot::load(&parts.memory, kernel)?;
        let machine = acpi::Machine {
            topology: config.topology,
            memory: config.memory,
            slots: config.slots,
            com2: config.lines.len() > 1,
            vmgenid: true,
        };
        let tables = acpi::tables(&machine).map_err(|error| Error::Tables(error.to_string()))?;
        let write = |bytes: &[u8], at| parts.memory.write_slice(bytes, GuestAddress(at));
        write(&tables, layout::ACPI.start).map_err(boot::BootError::from)?;
        write(&config.generation, layout::VMGENID).map_err(boot::BootError::from)?;
        if let Some(first) = parts.cpus.first() {
            cpu::enter(first, entry.instruction)?;
        }
        let inner = parts.build(config.lines, None)?;
        devices.into_iter().try_for_each(|plug| inner.slots.plug(plug))?;
        Self::start(inner)
    }

    /// A VM that will go on from a [saved](Self::save) state when it is [resumed](Self::resume), with what it had in
    /// its memory in the configuration's. Each of its slots that had a device has to have one of the same kind;
    /// others may have one that is new to the guest.
    ///
    /// # Errors
    /// KVM or the host refuses something, or the state is of another VM.
    pub fn restore(config: Config, state: &[u8], devices: Vec<Plug>) -> Result<Self, Error> {
        let state = State::decode(state)?;
        let parts = Parts::new(&config)?;
        if let Some(what) = state.shape.difference(&parts.shape) {
            return Err(Error::State(what.to_owned()));
        }
        if state.cpus.len() != parts.cpus.len() {
            return Err(Error::State(format!("it has {} processors", state.cpus.len())));
        }
        let inner = parts.build(config.lines, Some(&state.lines))?;
        devices.into_iter().try_for_each(|plug| inner.slots.plug(plug))?;
        inner.slots.check(&state.slots)?;
        for chip in &state.interrupts {
            inner.vm.set_irqchip(chip).map_err(kvm("set an interrupt controller"))?;
        }
        for (vcpu, state) in inner.cpus.iter().zip(&state.cpus) {
            state.write(&lock(vcpu), inner.more_registers)?;
        }
        // Only the time counts. How it is kept is the host's.
        let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
        inner.vm.set_clock(&clock).map_err(kvm("set a VM's clock"))?;
        let generation =
            inner.memory.write_slice(&config.generation, GuestAddress(layout::VMGENID));
        generation.map_err(boot::BootError::from)?;
        inner.slots.restore(&state.slots)?;
        inner.lines.iter().for_each(Line::raise);
        inner.generation.signal();
        Self::start(inner)
    }

    fn start(inner: Inner) -> Result<Self, Error> {
        let machine = Self { inner: Arc::new(inner) };
        for index in 0..machine.inner.cpus.len() {
            let inner = Arc::clone(&machine.inner);
            let thread = thread::Builder::new().name(format!("vcpu{index}"));
            let thread = thread.spawn(move || inner.run(index)).map_err(host("start a thread"))?;
            lock(&machine.inner.processors.threads).push(thread);
        }
        Ok(machine)
    }

    /// Lets its processors run.
    ///
    /// # Errors
    /// It has ended, or was [saved](Self::save).
    pub fn resume(&self) -> Result<(), Error> {
        if self.inner.saved.load(Ordering::Relaxed) {
            return Err(Error::Saved);
        }
        self.inner.processors.gate.open().then_some(()).ok_or(Error::Ended)
    }

    /// Stops its processors. When this returns, none of them runs.
    ///
    /// # Errors
    /// It has ended.
    pub fn pause(&self) -> Result<(), Error> {
        let processors = &self.inner.processors;
        processors.gate.close(|| processors.kick());
        match processors.gate.ended() {
            None => Ok(()),
            Some(_) => Err(Error::Ended),
        }
    }

    /// Whether its processors run.
    pub fn runs(&self) -> bool {
        self.inner.processors.gate.is_open()
    }

    /// Ends it for this reason, unless it has ended before.
    pub fn end(&self, end: End) {
        self.inner.processors.end(end);
    }

    /// What ends it and does not keep it.
    pub fn ender(&self) -> Ender {
        Ender(Arc::clone(&self.inner.processors))
    }

    /// Waits for its end, until the deadline.
    pub fn wait(&self, deadline: Option<Instant>) -> Option<End> {
        self.inner.processors.gate.wait_ended(deadline)
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.inner.power_button.signal();
    }

    /// Puts a device into an empty slot. The guest is not told.
    ///
    /// # Errors
    /// The slot has a device, or the host lacks something.
    pub fn plug(&self, plug: Plug) -> Result<(), Error> {
        self.inner.slots.plug(plug)
    }

    /// Takes a device out of its slot. The guest is not told.
    ///
    /// # Errors
    /// There is none.
    pub fn unplug(&self, slot: usize) -> Result<(), Error> {
        self.inner.slots.unplug(slot)
    }

    /// How often its processors left the guest so far, by reason.
    pub fn exits(&self) -> Vec<(&'static str, u64)> {
        self.inner.exits.counts()
    }

    /// Its memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.inner.memory
    }

    /// The pages that it has used so far; `None` where those are more than `most`.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn working_set(&self, most: u64) -> io::Result<Option<WorkingSet>> {
        WorkingSet::of(self.memory(), most)
    }

    /// Has the pages there that others have used, before it runs. That costs less than to give it each when it needs it;
    /// nothing else changes, and what the host cannot do is left out.
    pub fn prefault(&self, pages: &WorkingSet) {
        pages.populate(self.memory());
        if let Some(vcpu) = self.inner.cpus.first().filter(|_| self.inner.prefaults) {
            pages.map_for_guest(self.memory(), &lock(vcpu));
        }
    }

    /// Saves a VM that is paused: all but its memory, whose content belongs to it. Its devices have ended then, so
    /// that it can go on elsewhere only.
    ///
    /// # Errors
    /// It runs, has ended, or KVM refuses something.
    pub fn save(&self) -> Result<Vec<u8>, Error> {
        let inner = &self.inner;
        if inner.processors.gate.ended().is_some() {
            return Err(Error::Ended);
        }
        if inner.processors.gate.is_open() {
            return Err(Error::Running);
        }
        inner.saved.store(true, Ordering::Relaxed);
        inner.slots.quiesce();
        inner.lines.iter().for_each(Line::quiesce);
        inner.slots.let_go();
        let cpus = inner.cpus.iter();
        let cpus = cpus.map(|cpu| CpuState::read(&lock(cpu), &inner.msrs, inner.more_registers));
        let interrupts = CHIPS.into_iter().map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            inner.vm.get_irqchip(&mut chip).map_err(kvm("read an interrupt controller"))?;
            Ok(chip)
        });
        let state = State {
            cpus: cpus.collect::<Result<_, _>>()?,
            interrupts: interrupts.collect::<Result<_, Error>>()?,
            clock: inner.vm.get_clock().map_err(kvm("read a VM's clock"))?,
            lines: inner.lines.iter().map(Line::state).collect(),
            slots: inner.slots.state(),
            shape: inner.shape.clone(),
        };
        state.encode()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.inner.processors.end(End::Stopped);
        self.inner.lines.iter().for_each(Line::hang_up);
        let inner = Arc::clone(&self.inner);
        let (ended, wait) = channel();
        let thread = thread::Builder::new().name("end".into()).spawn(move || {
            inner.end_threads();
            // Unless it is too late, the one below is the last who has it.
            drop(inner);
            let _ = ended.send(());
        });
        match thread {
            Ok(thread) => {
                if wait.recv_timeout(END_TIME) != Err(RecvTimeoutError::Timeout) {
                    let _ = thread.join();
                }
            }
            Err(_) => self.inner.end_threads(),
        }
    }
}

impl Inner {
    /// Waits for the end of all threads of a VM that has ended.
    fn end_threads(&self) {
        let threads = std::mem::take(&mut *lock(&self.processors.threads));
        for thread in threads {
            // Whatever it ended with has been reported.
            let _ = thread.join();
        }
        self.slots.quiesce();
    }
}

/// A VM without devices.
struct Parts {
    vm: Arc<VmFd>,
    memory: GuestMemoryMmap,
    cpus: Vec<VcpuFd>,
    shape: Shape,
    msrs: Vec<u32>,
    sandbox: bool,
}

impl Parts {
    fn new(config: &Config) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(kvm("be opened"))?;
        let vm = kvm.create_vm().map_err(self::kvm("make a VM"))?;
        vm.set_tss_address(layout::KVM_TSS).map_err(self::kvm("place a task state"))?;
        let memory = memory::map(&layout::memory(config.memory), &config.backing);
        let memory = memory.map_err(host("map the guest's memory"))?;
        register_memory(&vm, &memory)?;
        vm.create_irq_chip().map_err(self::kvm("make interrupt controllers"))?;
        route_interrupts(&vm)?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let supported = supported.map_err(self::kvm("tell what its processors can do"))?;
        let topology = config.topology;
        let options = cpuid::Options { tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) };
        let mut cpus = Vec::new();
        let mut first: Option<CpuId> = None;
        for number in 0..topology.cpus() {
            let id = u64::from(topology.apic_id(number));
            let vcpu = vm.create_vcpu(id).map_err(self::kvm("make a processor"))?;
            let cpuid = cpuid::for_vcpu(&supported, topology, number, options);
            let cpuid = cpuid.map_err(|error| Error::Tables(error.to_string()))?;
            cpu::power_on(&vcpu, &cpuid)?;
            cpus.push(vcpu);
            first.get_or_insert(cpuid);
        }
        let shape = Shape {
            memory: config.memory,
            topology: Shape::topology(topology),
            slots: config.slots,
            lines: config.lines.len(),
            cpuid: first.map_or_else(Vec::new, |cpuid| cpuid.as_slice().to_vec()),
        };
        let (msrs, sandbox) = (cpu::msrs(&kvm)?, config.sandbox);
        Ok(Self { vm: Arc::new(vm), memory, cpus, shape, msrs, sandbox })
    }

    fn build(self, lines: Vec<UnixStream>, states: Option<&[LineState]>) -> Result<Inner, Error> {
        let Self { vm, memory, cpus, shape, msrs, sandbox } = self;
        const EVENTS: &str = "make an event";
        let gate = Arc::new(Gate::new(cpus.len()).map_err(host(EVENTS))?);
        let interrupts = Interrupts::new(vm.clone());
        let mut built = Vec::new();
        for (index, (socket, gsi)) in
            lines.into_iter().zip([layout::gsi::COM1, layout::gsi::COM2]).enumerate()
        {
            let state = states.and_then(|states| states.get(index));
            let awaited = gate.awaited().map_err(host(EVENTS))?;
            let line = Line::new(socket, interrupts.input(gsi), awaited, state);
            built.push(line.map_err(host("start a serial line"))?);
        }
        let power_button = interrupts.input(layout::gsi::POWER_BUTTON);
        let generation = interrupts.input(layout::gsi::VMGENID);
        let atomic = GuestMemoryAtomic::new(memory.clone());
        Ok(Inner {
            processors: Arc::new(Processors {
                gate: Arc::clone(&gate),
                kicks: cpus.iter().map(|_| Kick::default()).collect(),
                threads: Mutex::default(),
            }),
            slots: Slots::new((Arc::clone(&vm), atomic), gate, interrupts, shape.slots)?,
            lines: built,
            exits: Exits::default(),
            panicked: AtomicBool::new(false),
            power_button,
            generation,
            saved: AtomicBool::new(false),
            prefaults: vm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0,
            more_registers: cpu::more_registers(&vm),
            cpus: cpus.into_iter().map(Mutex::new).collect(),
            memory,
            sandbox,
            shape,
            msrs,
            vm,
        })
    }
}

fn register_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let address = memory::host_address(region).map_err(host("map the guest's memory"))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: address as u64,
        };
        // SAFETY: the region is a whole mapping, which `Inner` keeps until no processor runs any more; all that
        // the host does with it goes through `vm_memory`, which takes it for memory that others change.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("take guest memory"))?;
    }
    Ok(())
}

/// Has every interrupt go to the I/O APIC alone. By default the first ones go to the older controllers as well, which
/// no guest sets up, and which would deliver them as exceptions.
fn route_interrupts(vm: &VmFd) -> Result<(), Error> {
    let entries: Vec<_> = (0..layout::gsi::INPUTS)
        .map(|gsi| {
            let mut entry =
                kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = gsi;
            entry
        })
        .collect();
    let routing = KvmIrqRouting::from_entries(&entries);
    let routing = routing
        .map_err(|_| host("route interrupts")(io::Error::from(io::ErrorKind::OutOfMemory)))?;
    vm.set_gsi_routing(&routing).map_err(kvm("route interrupts"))
}

/// Locks what no panic leaves half-changed.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
