//! The devices, and what is to be done when they call (DSDT).

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use super::{Machine, table};
use crate::x86_64::layout::{self, gsi};

/// The version in which integers have 64 bits.
const REVISION: u8 = 2;

/// A button was pressed (ACPI 6.5, table 5.159), or the number of the VM's generation has changed (Microsoft's
/// "Virtual Machine Generation ID").
const NOTIFICATION: u8 = 0x80;

/// A device is present, enabled, shown and working (ACPI 6.5, section 6.3.7).
const WORKING: u8 = 0xf;

/// How many ports a serial line has.
const COM_PORTS: u8 = 8;

/// The table.
pub(super) fn dsdt(machine: &Machine) -> Sdt {
    let mut devices = Vec::new();
    let mut add = |device: &dyn Aml| device.to_aml_bytes(&mut devices);
    for cpu in 0..machine.topology.cpus() {
        add(&Device::new(
            Path::new(&format!("C{cpu:03X}")),
            vec![&name("_HID", &"ACPI0007"), &name("_UID", &cpu)],
        ));
    }
    serial(&mut add, "COM1", 0, layout::COM1, gsi::COM1);
    if machine.com2 {
        serial(&mut add, "COM2", 1, layout::COM2, gsi::COM2);
    }
    pvpanic(&mut add);
    for slot in 0..machine.slots {
        virtio(&mut add, slot);
    }
    if machine.vmgenid {
        generation(&mut add);
    }
    events(&mut add, machine.vmgenid);

    let mut body = Scope::raw(Path::new("_SB_"), devices);
    let off = layout::SLEEP_TYPE_OFF;
    name("_S5_", &Package::new(vec![&off, &off, &0u8, &0u8])).to_aml_bytes(&mut body);
    table(b"DSDT", REVISION, &body)
}

/// What is handed each device.
type Add<'a> = dyn FnMut(&dyn Aml) + 'a;

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

/// An edge, with which several devices may call.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, true, gsi)
}

/// A 16550 (`drivers/tty/serial/8250/8250_pnp.c`). Its interrupt is not shared.
fn serial(add: &mut Add<'_>, path: &str, number: u8, port: u16, gsi: u32) {
    let ports = IO::new(port, port, 1, COM_PORTS);
    let interrupt = Interrupt::new(true, true, false, false, gsi);
    add(&Device::new(
        Path::new(path),
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &number),
            &name("_CRS", &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    ));
}

/// What a kernel that panics tells (`drivers/misc/pvpanic/pvpanic-mmio.c`).
fn pvpanic(add: &mut Add<'_>) {
    let port = IO::new(layout::PVPANIC, layout::PVPANIC, 1, 1);
    add(&Device::new(
        Path::new("PVPN"),
        vec![
            &name("_HID", &"QEMU0001"),
            &name("_STA", &WORKING),
            &name("_CRS", &ResourceTemplate::new(vec![&port])),
        ],
    ));
}

/// A slot's device, whichever it is (`drivers/virtio/virtio_mmio.c`).
fn virtio(add: &mut Add<'_>, slot: usize) {
    // All slots are below 4 GiB.
    let address = layout::slot_address(slot) as u32;
    let registers = Memory32Fixed::new(true, address, layout::SLOT_SIZE as u32);
    let interrupt = edge(layout::slot_gsi(slot));
    add(&Device::new(
        Path::new(&format!("V{slot:03}")),
        vec![
            &name("_HID", &"LNRO0005"),
            &name("_UID", &slot),
            &name("_CCA", &1u8),
            &name("_CRS", &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    ));
}

/// Where the number of the VM's generation is (`drivers/virt/vmgenid.c`): the low and the high half of an address.
///
/// Linux knows it by the first two of its compatible names. The third is as Microsoft writes the second.
fn generation(add: &mut Add<'_>) {
    let names = Package::new(vec![&"VMGENCTR", &"VM_GEN_COUNTER", &"VM_Gen_Counter"]);
    let (low, high) = (layout::VMGENID as u32, (layout::VMGENID >> 32) as u32);
    add(&Device::new(
        Path::new("VGEN"),
        vec![
            &name("_HID", &"VMLB0001"),
            &name("_CID", &names),
            &name("ADDR", &Package::new(vec![&low, &high])),
        ],
    ));
}

/// The power button, and the device whose interrupts say that it or the VM's generation is to be looked at
/// (`drivers/acpi/evged.c`).
fn events(add: &mut Add<'_>, vmgenid: bool) {
    add(&Device::new(
        Path::new("PWRB"),
        vec![&name("_HID", &EISAName::new("PNP0C0C")), &name("_UID", &0u8)],
    ));

    let button = edge(gsi::POWER_BUTTON);
    let generation = edge(gsi::VMGENID);
    let mut resources: Vec<&dyn Aml> = vec![&button];
    let (button, generation_device) = (Path::new("PWRB"), Path::new("VGEN"));
    let pressed = Notify::new(&button, &NOTIFICATION);
    let changed = Notify::new(&generation_device, &NOTIFICATION);
    let is_button = Equal::new(&Arg(0), &gsi::POWER_BUTTON);
    let is_generation = Equal::new(&Arg(0), &gsi::VMGENID);
    let on_button = If::new(&is_button, vec![&pressed]);
    let on_generation = If::new(&is_generation, vec![&changed]);
    let mut handlers: Vec<&dyn Aml> = vec![&on_button];
    if vmgenid {
        resources.push(&generation);
        handlers.push(&on_generation);
    }
    add(&Device::new(
        Path::new("GED_"),
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &0u8),
            &name("_CRS", &ResourceTemplate::new(resources)),
            &Method::new(Path::new("_EVT"), 1, true, handlers),
        ],
    ));
}
