//! Devices that are replaced by others of their kind while the guest does not look.
//!
//! QEMU cannot take a snapshot of a VM with a file server's device, so the devices are taken out of the VM
//! before, without the guest's knowledge, and a VM that goes on from the snapshot has new ones in their
//! places. Their registers are what they were at power-on. For the guest's driver to go on, they are set to
//! what it had set them to: PCI configuration, MSI-X table, and the virtio registers (virtio 1.2, 4.1.4).
//! That takes a guest without KVM a fraction of what finding the devices anew would.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

/// Where the kernel lists the devices that its virtio-fs driver has.
const DRIVER: &str = "/sys/bus/virtio/drivers/virtiofs";

/// What is read of a device's PCI configuration.
const CONFIG_LEN: usize = 256;

/// Registers of PCI configuration.
mod pci {
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const STATUS_CAPABILITIES: u16 = 0x10;
    pub(super) const BARS: usize = 0x10;
    pub(super) const BAR_COUNT: usize = 6;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    pub(super) const VENDOR_CAPABILITY: u8 = 0x09;
    pub(super) const MSIX_CAPABILITY: u8 = 0x11;
}

/// Registers of `struct virtio_pci_common_cfg`.
mod common {
    pub(super) const GUEST_FEATURE_SELECT: u32 = 0x08;
    pub(super) const GUEST_FEATURE: u32 = 0x0c;
    pub(super) const MSIX_CONFIG: u32 = 0x10;
    pub(super) const NUM_QUEUES: u32 = 0x12;
    pub(super) const STATUS: u32 = 0x14;
    pub(super) const QUEUE_SELECT: u32 = 0x16;
    pub(super) const QUEUE_SIZE: u32 = 0x18;
    pub(super) const QUEUE_MSIX: u32 = 0x1a;
    pub(super) const QUEUE_ENABLE: u32 = 0x1c;
    /// Three addresses of 64 bits, each in two halves: descriptors, available ring, used ring.
    pub(super) const QUEUE_ADDRESSES: u32 = 0x20;
    pub(super) const QUEUE_ADDRESS_WORDS: u32 = 6;
}

/// Types of virtio's vendor capabilities.
const CAP_COMMON: u8 = 1;
const CAP_PCI_ACCESS: u8 = 5;

/// Bits of the device status.
const ACKNOWLEDGE: u8 = 1;
const DRIVER_FOUND: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// The most queues and MSI-X vectors that are believed.
const MAX_QUEUES: u16 = 64;
const MAX_VECTORS: usize = 128;

/// Bytes of an entry of an MSI-X table.
const VECTOR_LEN: usize = 16;

/// A device as the driver had set it up.
struct Device {
    registers: Registers,
    config: [u8; CONFIG_LEN],
    msix: Option<Msix>,
    features: [u32; 2],
    config_vector: u16,
    queues: Vec<Queue>,
}

struct Queue {
    enabled: bool,
    size: u16,
    vector: u16,
    addresses: [u32; common::QUEUE_ADDRESS_WORDS as usize],
}

/// The MSI-X table of a device.
struct Msix {
    control_at: usize,
    /// The memory that the table is in: of whatever device is in the place. It was mapped before the snapshot,
    /// so that a guest that goes on has nothing to map.
    mapped: Mapped,
    table_offset: usize,
    vectors: Vec<[u32; VECTOR_LEN / 4]>,
}

/// The virtio registers of a device, reached through its PCI configuration: a driver that holds the memory
/// which they are in lets nobody else map it.
struct Registers {
    file: File,
    /// Where the capability for that is.
    access: usize,
    bar: u8,
    offset: u32,
}

/// Where the kernel lists all PCI devices.
const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// Devices that may be replaced, in the order of their places.
#[derive(Default)]
pub(crate) struct Devices(Vec<Device>);

/// The kernel's driver for controllers of plugged devices, where it has one.
const HOTPLUG: &str = "/sys/bus/pci/drivers/shpchp";

/// Takes all bridges from the driver that would act on devices being plugged in and taken out: in its own
/// time it finds that they are there already, and switches their places off.
pub(crate) fn release_bridges() {
    let Ok(entries) = fs::read_dir(HOTPLUG) else { return };
    for entry in entries.flatten() {
        if entry.path().is_symlink() && entry.file_name() != "module" {
            // One that stays is seen by the devices going away, which ends the run with a message.
            let _ = fs::write(format!("{HOTPLUG}/unbind"), entry.file_name().as_encoded_bytes());
        }
    }
}

impl Devices {
    /// Those of the virtio-fs driver, as it has set them up. None at all if that cannot be done for all.
    pub(crate) fn find() -> Self {
        // Those that are not on a PCI bus are in a snapshot as they are, and never replaced.
        Self(find(Path::new(DRIVER)).unwrap_or_default())
    }

    /// Those in these slots behind the bridge, as their drivers have set them up.
    pub(crate) fn at(slots: &[u8]) -> io::Result<Self> {
        let device = |slot: &u8| {
            let path = behind_bridge(*slot)?.ok_or_else(|| invalid("a slot is empty"))?;
            Device::read(&path)
        };
        slots.iter().map(device).collect::<io::Result<_>>().map(Self)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        self.0.len() as u32
    }

    /// Sets up the first `count` of the devices that have come in their places.
    pub(crate) fn revive(&self, count: u32) -> io::Result<()> {
        self.0.iter().take(count as usize).try_for_each(Device::revive)
    }
}

/// The device in a slot behind a bridge; there is one bridge.
fn behind_bridge(slot: u8) -> io::Result<Option<PathBuf>> {
    // `0000:01:1f.0`, in a directory of the same form.
    let function = format!(":{slot:02x}.0");
    let is_device =
        |name: &OsStr| name.as_bytes().iter().filter(|byte| **byte == b':').count() == 2;
    for entry in fs::read_dir(PCI_DEVICES)?.flatten() {
        let path = fs::canonicalize(entry.path())?;
        let inner = path.parent().and_then(Path::file_name).is_some_and(is_device);
        if inner && entry.file_name().as_bytes().ends_with(function.as_bytes()) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn find(driver: &Path) -> io::Result<Vec<Device>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(driver)?.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(b"virtio") {
            let device = fs::canonicalize(entry.path())?;
            paths.extend(device.parent().map(Path::to_owned));
        }
    }
    // Places are in the names, at fixed lengths.
    paths.sort();
    paths.iter().map(|path| Device::read(path)).collect()
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Device {
    fn read(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path.join("config"))?;
        let mut config = [0; CONFIG_LEN];
        file.read_exact_at(&mut config, 0)?;
        let capabilities = Capabilities::of(&config)?;
        let registers = Registers {
            file,
            access: capabilities.access,
            bar: config[capabilities.common + 4],
            offset: u32_at(&config, capabilities.common + 8),
        };
        let msix = match capabilities.msix {
            Some(at) => Some(Msix::read(path, &config, at)?),
            None => None,
        };
        let mut features = [0; 2];
        for (half, features) in features.iter_mut().enumerate() {
            registers.write32(common::GUEST_FEATURE_SELECT, half as u32)?;
            *features = registers.read32(common::GUEST_FEATURE)?;
        }
        let count = registers.read16(common::NUM_QUEUES)?;
        if count > MAX_QUEUES {
            return Err(invalid("too many queues"));
        }
        let config_vector = registers.read16(common::MSIX_CONFIG)?;
        let queues = (0..count).map(|index| Queue::read(&registers, index));
        let queues = queues.collect::<io::Result<_>>()?;
        Ok(Self { registers, config, msix, features, config_vector, queues })
    }

    fn revive(&self) -> io::Result<()> {
        let Self { registers, config, .. } = self;
        let file = &registers.file;
        for bar in 0..pci::BAR_COUNT {
            let at = pci::BARS + 4 * bar;
            file.write_all_at(&config[at..at + 4], at as u64)?;
        }
        let line = pci::INTERRUPT_LINE;
        file.write_all_at(&config[line..=line], line as u64)?;
        file.write_all_at(&config[pci::COMMAND..pci::COMMAND + 2], pci::COMMAND as u64)?;
        if let Some(msix) = &self.msix {
            msix.restore(file, config)?;
        }
        let status = |bits: u8| registers.write8(common::STATUS, bits);
        status(0)?;
        status(ACKNOWLEDGE | DRIVER_FOUND)?;
        for (half, features) in self.features.iter().enumerate() {
            registers.write32(common::GUEST_FEATURE_SELECT, half as u32)?;
            registers.write32(common::GUEST_FEATURE, *features)?;
        }
        status(ACKNOWLEDGE | DRIVER_FOUND | FEATURES_OK)?;
        if registers.read8(common::STATUS)? & FEATURES_OK == 0 {
            return Err(invalid("the device does not have the features of the one before it"));
        }
        registers.write16(common::MSIX_CONFIG, self.config_vector)?;
        for (index, queue) in self.queues.iter().enumerate() {
            queue.restore(registers, index as u16)?;
        }
        status(ACKNOWLEDGE | DRIVER_FOUND | FEATURES_OK | DRIVER_OK)
    }
}

impl Queue {
    fn read(registers: &Registers, index: u16) -> io::Result<Self> {
        registers.write16(common::QUEUE_SELECT, index)?;
        let mut addresses = [0; common::QUEUE_ADDRESS_WORDS as usize];
        for (at, word) in (common::QUEUE_ADDRESSES..).step_by(4).zip(&mut addresses) {
            *word = registers.read32(at)?;
        }
        let enabled = registers.read16(common::QUEUE_ENABLE)? == 1;
        let size = registers.read16(common::QUEUE_SIZE)?;
        Ok(Self { enabled, size, vector: registers.read16(common::QUEUE_MSIX)?, addresses })
    }

    fn restore(&self, registers: &Registers, index: u16) -> io::Result<()> {
        // A disk may have more of them than the driver uses.
        if !self.enabled {
            return Ok(());
        }
        registers.write16(common::QUEUE_SELECT, index)?;
        registers.write16(common::QUEUE_SIZE, self.size)?;
        registers.write16(common::QUEUE_MSIX, self.vector)?;
        for (at, word) in (common::QUEUE_ADDRESSES..).step_by(4).zip(self.addresses) {
            registers.write32(at, word)?;
        }
        registers.write16(common::QUEUE_ENABLE, 1)
    }
}

/// Where the capabilities are that are needed here.
struct Capabilities {
    common: usize,
    access: usize,
    msix: Option<usize>,
}

impl Capabilities {
    fn of(config: &[u8; CONFIG_LEN]) -> io::Result<Self> {
        let (mut common, mut access, mut msix) = (None, None, None);
        let mut at = usize::from(config[pci::CAPABILITIES]) & !3;
        if u16_at(config, pci::STATUS) & pci::STATUS_CAPABILITIES == 0 {
            at = 0;
        }
        // A list that is a circle is longer than the configuration.
        for _ in 0..CONFIG_LEN / 4 {
            if at < 0x40 || at + 20 > CONFIG_LEN {
                break;
            }
            match (config[at], config[at + 3]) {
                (pci::VENDOR_CAPABILITY, CAP_COMMON) => common = common.or(Some(at)),
                (pci::VENDOR_CAPABILITY, CAP_PCI_ACCESS) => access = access.or(Some(at)),
                (pci::MSIX_CAPABILITY, _) => msix = Some(at),
                _ => {}
            }
            at = usize::from(config[at + 1]) & !3;
        }
        let missing = || invalid("a capability is missing");
        Ok(Self { common: common.ok_or_else(missing)?, access: access.ok_or_else(missing)?, msix })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

impl Registers {
    /// Points the window at a register of so many bytes.
    fn select(&self, register: u32, length: u32) -> io::Result<u64> {
        let access = self.access as u64;
        self.file.write_all_at(&[self.bar], access + 4)?;
        self.file.write_all_at(&(self.offset + register).to_le_bytes(), access + 8)?;
        self.file.write_all_at(&length.to_le_bytes(), access + 12)?;
        Ok(access + 16)
    }

    fn read<const N: usize>(&self, register: u32) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, self.select(register, N as u32)?)?;
        Ok(bytes)
    }

    fn write<const N: usize>(&self, register: u32, bytes: [u8; N]) -> io::Result<()> {
        self.file.write_all_at(&bytes, self.select(register, N as u32)?)
    }

    fn read8(&self, register: u32) -> io::Result<u8> {
        self.read(register).map(u8::from_le_bytes)
    }

    fn read16(&self, register: u32) -> io::Result<u16> {
        self.read(register).map(u16::from_le_bytes)
    }

    fn read32(&self, register: u32) -> io::Result<u32> {
        self.read(register).map(u32::from_le_bytes)
    }

    fn write8(&self, register: u32, value: u8) -> io::Result<()> {
        self.write(register, value.to_le_bytes())
    }

    fn write16(&self, register: u32, value: u16) -> io::Result<()> {
        self.write(register, value.to_le_bytes())
    }

    fn write32(&self, register: u32, value: u32) -> io::Result<()> {
        self.write(register, value.to_le_bytes())
    }
}

impl Msix {
    fn read(path: &Path, config: &[u8; CONFIG_LEN], at: usize) -> io::Result<Self> {
        let count = usize::from(u16_at(config, at + 2) & 0x7ff) + 1;
        let place = u32_at(config, at + 4);
        let table = path.join(format!("resource{}", place & 7));
        let table_offset = (place & !7) as usize;
        if count > MAX_VECTORS {
            return Err(invalid("too many vectors"));
        }
        let mapped = Mapped::new(&table, table_offset + count * VECTOR_LEN)?;
        let vectors = (0..count).map(|index| {
            let at = table_offset + index * VECTOR_LEN;
            [0, 4, 8, 12].map(|word| mapped.read(at + word))
        });
        let vectors = vectors.collect();
        Ok(Self { control_at: at + 2, table_offset, vectors, mapped })
    }

    fn restore(&self, file: &File, config: &[u8; CONFIG_LEN]) -> io::Result<()> {
        for (index, vector) in self.vectors.iter().enumerate() {
            for (word, value) in vector.iter().enumerate() {
                self.mapped.write(self.table_offset + index * VECTOR_LEN + word * 4, *value);
            }
        }
        let at = self.control_at;
        file.write_all_at(&config[at..at + 2], at as u64)
    }
}

/// The beginning of a device's memory.
struct Mapped {
    start: NonNull<u32>,
    length: usize,
}

impl Mapped {
    fn new(resource: &Path, length: usize) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(resource)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.as_raw_fd();
        let null = std::ptr::null_mut();
        // SAFETY: the kernel chooses a place where nothing is.
        let start = unsafe { libc::mmap(null, length, protection, libc::MAP_SHARED, fd, 0) };
        match NonNull::new(start.cast::<u32>()) {
            Some(place) if start != libc::MAP_FAILED => Ok(Self { start: place, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The place of the word at an offset in bytes.
    fn word(&self, at: usize) -> *mut u32 {
        assert!(
            at.is_multiple_of(4) && at + 4 <= self.length,
            "offset {at} is not of this mapping"
        );
        self.start.as_ptr().wrapping_byte_add(at)
    }

    fn read(&self, at: usize) -> u32 {
        // SAFETY: `word` gives an aligned place within the mapping, which is there as long as this is.
        unsafe { self.word(at).read_volatile() }
    }

    fn write(&self, at: usize, value: u32) {
        // SAFETY: as in `read`; it is a device's memory and nobody's object.
        unsafe { self.word(at).write_volatile(value) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn devices_at_fixed_addresses_are_none_to_revive() {
        let dir = tempfile::tempdir().unwrap();
        let (driver, device) =
            (dir.path().join("virtiofs"), dir.path().join("LNRO0005:01/virtio1"));
        assert!(find(&driver).is_err());
        for path in [&driver, &device] {
            fs::create_dir_all(path).unwrap();
        }
        assert_eq!(find(&driver).unwrap().len(), 0);
        symlink(&device, driver.join("virtio1")).unwrap();
        // It has no file of its configuration.
        let error = find(&driver).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn nothing_is_revived_in_no_slots() {
        let none = Devices::at(&[]).unwrap();
        assert_eq!(none.count(), 0);
        none.revive(none.count()).unwrap();
    }
}
