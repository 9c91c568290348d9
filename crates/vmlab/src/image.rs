//! Disk images: systems that a VM starts by their own boot loader, or has its root on.

use std::path::{Path, PathBuf};

use vmlab_artifacts::cache::{Flaw, Leases};
use vmlab_artifacts::firmware::{Uefi, find_uefi};
use vmlab_artifacts::image::{DiskImage, ImageFormat, open};
use vmlab_artifacts::image_build::{self, ImageRecipe};
use vmlab_artifacts::seed::{self, seed_image, smbios_credentials};
use vmlab_artifacts::{Bound, Cache, ContentKey, Kind, Progress};

use crate::Error;
use crate::boot::{AGENT, AGENT_SHA256, verify_digest, verify_length, write_sealed};
use crate::config::{self, DiskDevice, DiskWrites, FirmwareBoot};
use crate::targets::{Firmware, ImageSpec};

/// The serial number of the disk that a system is on.
pub(crate) const ROOT_DISK: &str = "vmlab-root";

/// A disk image with a system on it.
///
/// It is never written to, unless [`persist`](Self::persist) is asked for: what the guest writes is gone
/// with the VM.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    pub(crate) source: PathBuf,
    pub(crate) firmware: Firmware,
    pub(crate) firmware_file: Option<PathBuf>,
    pub(crate) persist: bool,
}

impl Image {
    /// An image: a file, or what `vmlab image build` makes, such as `debian:12`. It is started by a BIOS
    /// unless something else is asked for.
    pub fn new(source: impl Into<PathBuf>) -> Self {
        let source = source.into();
        Self { source, firmware: Firmware::Bios, firmware_file: None, persist: false }
    }

    /// The image of a target.
    pub(crate) fn of(spec: &ImageSpec) -> Self {
        let ImageSpec { path, firmware, firmware_file, persist, kernel: _ } = spec.clone();
        Self { source: path, firmware, firmware_file, persist }
    }

    /// What starts its boot loader.
    pub fn firmware(mut self, firmware: Firmware) -> Self {
        self.firmware = firmware;
        self
    }

    /// Another file of firmware than the distribution's.
    pub fn firmware_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.firmware_file = Some(file.into());
        self
    }

    /// Whether what the guest writes stays in the image.
    pub fn persist(mut self, persist: bool) -> Self {
        self.persist = persist;
        self
    }

    /// How it starts.
    pub(crate) fn boot(&self) -> Result<FirmwareBoot, Error> {
        let firmware = match (&self.firmware_file, self.firmware) {
            (Some(file), _) => config::Firmware::File(file.clone()),
            (None, Firmware::Bios) => config::Firmware::Bios,
            (None, Firmware::Uefi { secure_boot }) => {
                let Uefi { code, vars, format, smm, .. } = find_uefi(secure_boot)?;
                config::Firmware::Uefi { code, vars, format, smm }
            }
        };
        Ok(FirmwareBoot { firmware, oem_strings: smbios_credentials() })
    }

    /// What the VM has of disks when the image starts its own system. They are there as long as `leases` are.
    pub(crate) fn disks(
        &self,
        cache: &Cache,
        leases: &Leases,
        progress: &dyn Progress,
    ) -> Result<[DiskDevice; 2], Error> {
        Ok([self.disk(cache, leases, progress)?, seed(cache, self.persist, leases)?])
    }

    /// The disk that the image is.
    pub(crate) fn disk(
        &self,
        cache: &Cache,
        leases: &Leases,
        progress: &dyn Progress,
    ) -> Result<DiskDevice, Error> {
        let writes = if self.persist { DiskWrites::Kept } else { DiskWrites::Discarded };
        let recipe = self.source.to_str().filter(|text| ImageRecipe::is_meant(text));
        let serial = ROOT_DISK.to_owned();
        match recipe.filter(|_| !self.source.exists()) {
            Some(recipe) if !self.persist => {
                let built = image_build::build(cache, &recipe.parse()?, progress)?;
                leases.join(built.leases);
                Ok(DiskDevice {
                    serial,
                    path: built.path,
                    format: ImageFormat::Raw,
                    writes,
                    keep: None,
                    serve: None,
                })
            }
            Some(_) => Err(Error::CachedImage { image: self.source.clone() }),
            None => {
                let DiskImage { path, format, lease } = open(cache, &self.source, progress)?;
                if lease.is_some() && self.persist {
                    return Err(Error::CachedImage { image: self.source.clone() });
                }
                lease.into_iter().for_each(|lease| leases.add(lease));
                Ok(DiskDevice { serial, path, format, writes, keep: None, serve: None })
            }
        }
    }
}

/// The kind of the cache's entries with drives that bring the agent.
pub(crate) const CACHE_KIND: Kind =
    Kind { name: SEEDS, bound: Bound::Entries(SEEDS_KEPT), verify: |entry| verify_seed(entry) };

const SEEDS: &str = "seeds";

/// The one of this version, for disks that are kept and for others, and those of the version before.
const SEEDS_KEPT: usize = 4;

const SEED_FILE: &str = "seed.iso";

fn verify_seed(entry: &Path) -> Result<(), Flaw> {
    verify_length(entry, SEED_FILE)?;
    verify_digest(entry, SEED_FILE)
}

/// The serial number of the drive that brings the agent.
const SEED_DISK: &str = "vmlab-seed";

/// Makes, or finds, the drive that brings the agent into systems.
fn seed(cache: &Cache, persist: bool, leases: &Leases) -> Result<DiskDevice, Error> {
    let key = ContentKey::new("seed-1")
        .field("agent", AGENT_SHA256)
        .field("script", seed::START_AGENT)
        .field("persist", [u8::from(persist)])
        .finish();
    let build = |dir: &Path| write_sealed(dir, SEED_FILE, &seed_image(AGENT, persist));
    let verify = |entry: &Path| verify_length(entry, SEED_FILE);
    let entry = cache.get_or_build_bounded((SEEDS, SEEDS_KEPT), &key, leases, verify, build)?;
    let (serial, path) = (SEED_DISK.to_owned(), entry.join(SEED_FILE));
    Ok(DiskDevice {
        serial,
        path,
        format: ImageFormat::Raw,
        writes: DiskWrites::Refused,
        keep: None,
        serve: None,
    })
}
