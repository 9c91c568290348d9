//! What the thread of a processor does: it runs the guest, and does what the guest asks devices for.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::control::Panicked;
use super::exits::Exit;
use super::layout;
use super::machine::Inner;
use super::sandbox;
use crate::gate::End;

/// The ports of a serial line.
const LINE_PORTS: u16 = 8;

/// The keyboard controller, which older kernels reset a PC by: its command port, and the command.
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;

/// `PVPANIC_PANICKED` and `PVPANIC_CRASH_LOADED`.
const PVPANIC_EVENTS: u8 = 0b11;
const PVPANIC_PANICKED: u8 = 0b01;

/// Of the sleep control register (ACPI 4.8.3.7): go to sleep, and how.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// What a bus says where nothing is.
const NOTHING: u8 = 0xff;

/// How many bytes of code are shown where KVM could not go on.
const SHOWN_CODE: usize = 15;

/// Why a processor has left its guest, which can go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    /// For something that was done.
    Served,
    /// By a signal.
    Interrupted,
}

impl Inner {
    /// Runs a processor until the VM has ended.
    pub(super) fn run(&self, index: usize) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve(index)));
        let end = match outcome {
            Ok(Ok(())) => return,
            Ok(Err(end)) => end,
            Err(_) => End::Failed(format!("the thread of processor {index} panicked")),
        };
        self.processors.end(end);
    }

    fn serve(&self, index: usize) -> Result<(), End> {
        let kick = &self.processors.kicks[index];
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            End::Failed(format!("processor {index} {what}: {error}"))
        };
        kick.block_signal().map_err(|error| failed("cannot be interrupted", &error))?;
        {
            let vcpu = self.cpus[index].lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the descriptor belongs to the processor, which is open during the borrow.
            let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
            // SAFETY: the same, of the VM.
            let vm = unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) };
            let unblocked = kick.unblock_while_running(fd);
            unblocked.map_err(|error| failed("cannot be interrupted", &error))?;
            if self.sandbox {
                sandbox::enter(fd, vm).map_err(|error| failed("cannot be restricted", &error))?;
            }
        }
        while self.processors.gate.pass() {
            if !self.slots.settle().map_err(setup_failed)? {
                continue;
            }
            let mut vcpu = self.cpus[index].lock().unwrap_or_else(PoisonError::into_inner);
            while !kick.is_sent() {
                if self.enter(&mut vcpu)? == Left::Interrupted {
                    kick.drain();
                }
            }
            kick.take();
            self.finish(&mut vcpu)?;
            // Tells the guest that it was not its own fault that it did not run. Not all have such a clock.
            let _ = vcpu.kvmclock_ctrl();
        }
        Ok(())
    }

    /// Has KVM finish the instruction that it left the guest for, so that the registers are those after it.
    fn finish(&self, vcpu: &mut VcpuFd) -> Result<(), End> {
        vcpu.set_kvm_immediate_exit(1);
        let finished = loop {
            // One that is done in several steps leaves the guest for each.
            match self.enter(vcpu) {
                Ok(Left::Served) => {}
                Ok(Left::Interrupted) => break Ok(()),
                Err(end) => break Err(end),
            }
        };
        vcpu.set_kvm_immediate_exit(0);
        finished
    }

    /// Runs the guest until it needs something, and does that.
    fn enter(&self, vcpu: &mut VcpuFd) -> Result<Left, End> {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::EINTR => {
                self.exits.count(Exit::Kick);
                return Ok(Left::Interrupted);
            }
            // A processor that another one has started.
            Err(error) if error.errno() == libc::EAGAIN => {
                self.exits.count(Exit::Other);
                return Ok(Left::Served);
            }
            Err(error) => return Err(End::Failed(format!("a processor cannot run: {error}"))),
        };
        match exit {
            VcpuExit::IoOut(port, data) => {
                self.exits.count(Exit::Port);
                data.iter().try_for_each(|value| self.write_port(port, *value))?;
            }
            VcpuExit::IoIn(port, data) => {
                self.exits.count(Exit::Port);
                data.iter_mut().for_each(|value| *value = self.read_port(port));
            }
            // Registers of slots are read without that.
            VcpuExit::MmioRead(_, data) => {
                self.exits.count(Exit::Register);
                data.fill(NOTHING);
            }
            VcpuExit::MmioWrite(address, data) => {
                self.exits.count(Exit::Register);
                if is_slot(address) {
                    self.slots.write(address, data).map_err(setup_failed)?;
                }
            }
            VcpuExit::Intr => {
                self.exits.count(Exit::Kick);
                return Ok(Left::Interrupted);
            }
            VcpuExit::Shutdown => {
                self.exits.count(Exit::End);
                return Err(self.ended_by_guest(End::TripleFault));
            }
            VcpuExit::InternalError => {
                self.exits.count(Exit::End);
                return Err(End::InternalError(self.describe(vcpu)));
            }
            VcpuExit::FailEntry(reason, cpu) => {
                self.exits.count(Exit::End);
                let state = self.describe_registers(vcpu);
                return Err(End::InternalError(format!(
                    "the guest cannot be entered on the host's processor {cpu} \
                     (hardware reason {reason:#x}); {state}"
                )));
            }
            // Whatever a guest can ask for that is not offered.
            VcpuExit::Hlt | VcpuExit::IrqWindowOpen => self.exits.count(Exit::Other),
            other => {
                let what = format!("{other:?}");
                self.exits.count(Exit::Other);
                return Err(End::Failed(format!(
                    "a processor stopped for an unknown reason: {what}"
                )));
            }
        }
        Ok(Left::Served)
    }

    /// The reason for an end that the guest has brought about.
    fn ended_by_guest(&self, end: End) -> End {
        if self.panicked.load(Ordering::Relaxed) { End::Panic } else { end }
    }

    fn read_port(&self, port: u16) -> u8 {
        if let Some((line, register)) = self.line(port) {
            return line.read(register);
        }
        match port {
            layout::PVPANIC => PVPANIC_EVENTS,
            layout::SLEEP_CONTROL | layout::SLEEP_STATUS => 0,
            _ => NOTHING,
        }
    }

    fn write_port(&self, port: u16, value: u8) -> Result<(), End> {
        if let Some((line, register)) = self.line(port) {
            line.write(register, value);
            return Ok(());
        }
        match (port, value) {
            (layout::SLEEP_CONTROL, value)
                if value & SLEEP_ENABLE != 0
                    && value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == layout::SLEEP_TYPE_OFF =>
            {
                Err(self.ended_by_guest(End::PowerOff))
            }
            (layout::RESET, layout::RESET_VALUE) | (I8042_COMMAND, I8042_RESET) => {
                Err(self.ended_by_guest(End::Reset))
            }
            (layout::PVPANIC, value) if value & PVPANIC_PANICKED != 0 => {
                self.panicked.store(true, Ordering::Relaxed);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The serial line that a port belongs to, and the register.
    fn line(&self, port: u16) -> Option<(&super::serial::Line, u8)> {
        let of = |line: usize, base: u16| {
            let register = port.checked_sub(base).filter(|register| *register < LINE_PORTS)?;
            Some((self.lines.get(line)?, register as u8))
        };
        of(0, layout::COM1).or_else(|| of(1, layout::COM2))
    }

    /// What is known of a processor that KVM could not go on with.
    fn describe(&self, vcpu: &mut VcpuFd) -> String {
        // SAFETY: with this exit reason KVM has filled in this member of the union, which is made of integers.
        let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
        let what = match internal.suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "it could not emulate an instruction",
            kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions met that it cannot combine",
            kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
            _ => "it does not say why",
        };
        let data = internal.data.iter().take((internal.ndata as usize).min(internal.data.len()));
        let data: Vec<String> = data.map(|word| format!("{word:#x}")).collect();
        let state = self.describe_registers(vcpu);
        format!("{what} (suberror {}, data [{}]); {state}", internal.suberror, data.join(", "))
    }

    fn describe_registers(&self, vcpu: &VcpuFd) -> String {
        let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
            return "its registers cannot be read".to_owned();
        };
        let code = vcpu.translate_gva(regs.rip).ok().filter(|found| found.valid != 0);
        let code = code.and_then(|found| {
            let mut bytes = [0; SHOWN_CODE];
            // It may be where no memory is.
            let read = self.memory.read(&mut bytes, GuestAddress(found.physical_address)).ok()?;
            let bytes = bytes.iter().take(read).map(|byte| format!("{byte:02x}"));
            Some(bytes.collect::<Vec<_>>().join(" "))
        });
        format!(
            "rip {:#x} [{}] rsp {:#x} rflags {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x} \
             cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} cs {:#x}",
            regs.rip,
            code.as_deref().unwrap_or("no code there"),
            regs.rsp,
            regs.rflags,
            regs.rax,
            regs.rbx,
            regs.rcx,
            regs.rdx,
            regs.rsi,
            regs.rdi,
            sregs.cr0,
            sregs.cr2,
            sregs.cr3,
            sregs.cr4,
            sregs.efer,
            sregs.cs.selector,
        )
    }
}

fn setup_failed(_: Panicked) -> End {
    End::Failed("the thread that sets up devices panicked".to_owned())
}

/// Whether a slot's registers are at an address.
fn is_slot(address: u64) -> bool {
    let end = layout::slot_address(layout::MAX_SLOTS);
    (layout::SLOTS..end).contains(&address)
}
