//! What the thread of a processor gives up before it enters its guest.
//!
//! It opens no file, runs its own processor alone, and may interrupt its VM. Threads of devices start and end in another
//! thread ([`Control`](super::control::Control)), since they would inherit this.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{KVMIO, kvm_regs, kvm_sregs, kvm_translation};
use rustix::ioctl::{Opcode, opcode};
use vmlab_devices::sandbox::{Calls, Filter, Is, KVM_IRQ_LINE, Sandbox};

const GROUP: u8 = KVMIO as u8;

/// Of `linux/kvm.h`: running, what is told of a processor that cannot run, and the clock of one that was paused.
const ON_PROCESSOR: [Opcode; 5] = [
    opcode::none(GROUP, 0x80),                          // KVM_RUN
    opcode::read::<kvm_regs>(GROUP, 0x81),              // KVM_GET_REGS
    opcode::read::<kvm_sregs>(GROUP, 0x83),             // KVM_GET_SREGS
    opcode::read_write::<kvm_translation>(GROUP, 0x85), // KVM_TRANSLATE
    opcode::none(GROUP, 0xad),                          // KVM_KVMCLOCK_CTRL
];

/// Restricts the calling thread, which runs this processor of this VM and has blocked the signal of its kick, for good.
/// What the host's kernel lacks is left out.
///
/// # Errors
/// The kernel has something and refuses it.
pub(super) fn enter(vcpu: BorrowedFd<'_>, vm: BorrowedFd<'_>) -> io::Result<()> {
    let on = |fd: BorrowedFd<'_>, operation| {
        vec![(0, Is::This(fd.as_raw_fd().cast_unsigned())), (1, Is::This(operation))]
    };
    let operations = ON_PROCESSOR.map(|operation| on(vcpu, operation)).into_iter();
    // What a serial line says goes to its socket, which has its other end. To others, nothing is sent.
    let connected = vec![(4, Is::This(0)), (5, Is::This(0))];
    let calls = Calls::runtime()
        // The kick is taken by it.
        .and(&[libc::SYS_rt_sigtimedwait])
        // It waits for a host that does not read what a serial line says.
        .and(&[libc::SYS_poll, libc::SYS_ppoll])
        .and_if(libc::SYS_sendto, [connected])
        // The last one is for the interrupts of serial lines.
        .and_if(libc::SYS_ioctl, operations.chain([on(vm, KVM_IRQ_LINE)]));
    // It names the processor, so that it is of use to this thread alone.
    Sandbox::without_files(&Filter::new(&calls)?)?.enter().map(drop)
}

#[cfg(test)]
mod tests;
