//! A device's registers as its guest reads them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{MmapRegion, VolatileMemory};

use crate::transport::mmio::register;

/// What is in the first registers of every device: virtio 1.2, 4.2.2.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// No driver looks at it.
const VENDOR: u32 = u32::from_le_bytes(*b"vmlb");

/// What the address and the length of shared memory are where there is none: virtio 1.2, 4.2.2.
const NO_SHARED_MEMORY: u32 = u32::MAX;

const WORD: usize = size_of::<u32>();

/// All registers of one device, always with what a read of them gives. A monitor that lets its guest read the page
/// itself, and not write to it, need not be asked then.
#[derive(Debug, Clone)]
pub struct Page {
    region: Arc<MmapRegion>,
    at: usize,
}

impl Page {
    /// Bytes of it.
    pub const SIZE: usize = 0x1000;

    /// One that no guest reads by itself.
    ///
    /// # Errors
    /// There is no more memory.
    pub fn alone() -> io::Result<Self> {
        let region = MmapRegion::new(Self::SIZE).map_err(io::Error::other)?;
        Self::of(&Arc::new(region), 0).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// The page of this index of a region that is mapped to be read and written; none beyond its end. A region of zeroes
    /// has no devices.
    pub fn of(region: &Arc<MmapRegion>, index: usize) -> Option<Self> {
        let at = index.checked_mul(Self::SIZE)?;
        region.get_slice(at, Self::SIZE).ok()?;
        let page = Self { region: Arc::clone(region), at };
        page.name();
        Some(page)
    }

    /// Says that there is no device: virtio 1.2, 4.2.2.
    pub fn clear(&self) {
        self.set(register::DEVICE_ID, 0);
        for offset in (0..Self::SIZE as u32).step_by(WORD) {
            self.set(offset, 0);
        }
        self.name();
    }

    /// Says what these registers are, with or without a device.
    fn name(&self) {
        self.set(register::VERSION, VERSION);
        self.set(register::MAGIC_VALUE, MAGIC);
    }

    /// Says what a device is, which has told its driver nothing yet.
    pub(super) fn begin(&self, device: u32, config: &[u8]) {
        self.clear();
        self.set(register::VENDOR_ID, VENDOR);
        for shared in [
            register::SHM_LEN_LOW,
            register::SHM_LEN_HIGH,
            register::SHM_BASE_LOW,
            register::SHM_BASE_HIGH,
        ] {
            self.set(shared, NO_SHARED_MEMORY);
        }
        self.configure(config);
        self.set(register::DEVICE_ID, device);
    }

    /// Shows the configuration space. What does not fit on the page is cut off.
    pub(super) fn configure(&self, config: &[u8]) {
        for (offset, word) in (register::CONFIG..).step_by(WORD).zip(config.chunks(WORD)) {
            let mut bytes = [0; WORD];
            bytes[..word.len()].copy_from_slice(word);
            self.set(offset, u32::from_le_bytes(bytes));
        }
    }

    /// The word at an offset.
    fn word(&self, offset: u32) -> Option<&AtomicU32> {
        let offset = usize::try_from(offset).ok().filter(|offset| *offset < Self::SIZE)?;
        self.region.get_atomic_ref(self.at + offset).ok()
    }

    pub(super) fn get(&self, offset: u32) -> u32 {
        self.word(offset).map_or(0, |word| u32::from_le(word.load(Ordering::SeqCst)))
    }

    pub(super) fn set(&self, offset: u32, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value.to_le(), Ordering::SeqCst);
        }
    }

    /// Sets bits.
    pub(super) fn add(&self, offset: u32, bits: u32) {
        if let Some(word) = self.word(offset) {
            word.fetch_or(bits.to_le(), Ordering::SeqCst);
        }
    }

    /// Takes bits away.
    pub(super) fn remove(&self, offset: u32, bits: u32) {
        if let Some(word) = self.word(offset) {
            word.fetch_and(!bits.to_le(), Ordering::SeqCst);
        }
    }

    /// The bytes from an offset on, with zeroes behind the end.
    pub(super) fn read(&self, offset: u32, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let within = at as usize % WORD;
            *byte = self.get(at - within as u32).to_le_bytes()[within];
        }
    }
}
