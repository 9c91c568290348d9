//! What fuzz targets reach of this crate. It is no part of its interface.

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip};
use vm_memory::GuestMemoryMmap;
use vmlab_devices::transport::mmio::{MmioState, QueueState};

use super::boot::{self, BootError, Kernel};
use super::cpu::CpuState;
use super::serial::LineState;
use super::state::{Shape, State};
use crate::error::Error;

/// Puts a kernel into memory, and says where it is entered.
///
/// # Errors
/// It cannot be started.
pub fn load(memory: &GuestMemoryMmap, kernel: Kernel) -> Result<u64, BootError> {
    boot::load(memory, kernel).map(|entry| entry.instruction)
}

/// Reads a state, and writes it again.
///
/// # Errors
/// It is none.
pub fn state(bytes: &[u8]) -> Result<Vec<u8>, Error> {
    State::decode(bytes)?.encode()
}

/// The state of a VM with two processors, and two slots of which the second has no device.
pub fn sample_state() -> Vec<u8> {
    sample().encode().unwrap_or_default()
}

pub(super) fn sample() -> State {
    let leaf = kvm_cpuid_entry2 { function: 1, eax: 0x8086, ..Default::default() };
    let queue = QueueState {
        size: 256,
        ready: true,
        descriptors: 0x10_0000,
        available: 0x10_1000,
        used: 0x10_2000,
        next_available: 3,
        next_used: 3,
    };
    let device = MmioState {
        device_id: 2,
        status: 15,
        device_features_select: 1,
        driver_features_select: 1,
        driver_features: 1 << 32,
        queue_select: 0,
        interrupt_status: 1,
        config_generation: 0,
        queues: vec![queue],
        device: b"its own".to_vec(),
    };
    State {
        shape: Shape {
            memory: 1 << 30,
            topology: [1, 1, 2, 1],
            slots: 2,
            lines: 1,
            cpuid: vec![leaf],
        },
        cpus: vec![CpuState::default(), CpuState::default()],
        interrupts: vec![kvm_irqchip { chip_id: 2, ..Default::default() }],
        clock: kvm_clock_data { clock: 0x0123_4567_89ab, ..Default::default() },
        lines: vec![LineState::default()],
        slots: vec![Some(device), None],
    }
}
