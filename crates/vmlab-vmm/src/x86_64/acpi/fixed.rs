//! Tables about what every PC has: the fixed description (FADT) and the interrupt controllers (MADT).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{FIRST_WIDE_ID, OEM, OEM_REVISION, OEM_TABLE, entry, table};
use crate::topology::Topology;
use crate::x86_64::layout;

/// Bits of the FADT's boot architecture flags (ACPI 6.5, table 5.11). That there are neither devices of an ISA bus
/// nor a keyboard controller is told by bits that are clear.
mod boot {
    /// There is no VGA.
    pub(super) const NO_VGA: u16 = 1 << 2;
    /// There is no PCI Express either, whose power could be managed.
    pub(super) const NO_ASPM: u16 = 1 << 4;
    /// There is no real time clock in a CMOS.
    pub(super) const NO_CMOS_RTC: u16 = 1 << 5;
}

/// The version of the MADT that ACPI 6.5 has.
const MADT_REVISION: u8 = 6;
/// An entry for the interrupt that is wired to a local APIC's input.
const LOCAL_APIC_NMI: u8 = 4;
/// An entry for a CPU whose id does not fit a byte.
const LOCAL_X2APIC: u8 = 9;
/// [`LOCAL_APIC_NMI`] for those.
const LOCAL_X2APIC_NMI: u8 = 10;
/// The input that is for NMIs on every PC.
const NMI_INPUT: u8 = 1;

/// The fixed description of a machine whose devices are described at an address.
pub(super) fn fadt(dsdt: u64) -> FADT {
    // No fixed button's bit is clear: the power button is a device of its own.
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (boot::NO_VGA | boot::NO_ASPM | boot::NO_CMOS_RTC).into();
    fadt.reset_reg = port(layout::RESET);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS);
    fadt.finalize()
}

/// A register of one byte.
fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// The interrupt controllers. The flag that would tell of a PIC is clear.
pub(super) fn madt(topology: Topology) -> Sdt {
    let mut body = Vec::new();
    body.dword(layout::LOCAL_APIC);
    body.dword(0);
    let mut wide = false;
    for cpu in 0..topology.cpus() {
        let id = topology.apic_id(cpu);
        if id < FIRST_WIDE_ID {
            // A CPU's number is not above its APIC id.
            let local = ProcessorLocalApic::new(cpu as u8, id as u8, EnabledStatus::Enabled);
            local.to_aml_bytes(&mut body);
        } else {
            wide = true;
            entry(&mut body, LOCAL_X2APIC, |fields| {
                fields.word(0);
                fields.dword(id);
                fields.dword(EnabledStatus::Enabled as u32);
                fields.dword(cpu);
            });
        }
    }
    IoApic::new(0, layout::IO_APIC, 0).to_aml_bytes(&mut body);
    entry(&mut body, LOCAL_APIC_NMI, |fields| {
        fields.byte(u8::MAX);
        fields.word(0);
        fields.byte(NMI_INPUT);
    });
    if wide {
        entry(&mut body, LOCAL_X2APIC_NMI, |fields| {
            fields.word(0);
            fields.dword(u32::MAX);
            fields.byte(NMI_INPUT);
            fields.vec(&[0; 3]);
        });
    }
    table(b"APIC", MADT_REVISION, &body)
}
