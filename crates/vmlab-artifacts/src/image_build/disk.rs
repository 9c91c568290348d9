//! The disk: where its partitions lie, and what makes it boot.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::bootstrap::run_tool;
use super::error::ImageBuildError;
use super::gpt::{self, Guid, MIB, Partition, Role, SECTOR};
use super::grub;
use super::recipe::BootFirmware;
use crate::Digest;

/// The root's number, and the others', as in Debian's own images for clouds: the root is the last on
/// the disk, so that it can grow.
pub(super) const ROOT_NUMBER: usize = 1;
const BIOS_NUMBER: usize = 14;
const EFI_NUMBER: usize = 15;

const BIOS_LEN: u64 = MIB;
/// Shim and GRUB take 4 MiB.
const EFI_LEN: u64 = 14 * MIB;

/// What a loader's file is called on the EFI system partition, and where it comes from. The first is
/// what firmware looks for on a disk that it has no entry for.
const EFI_FILES: [(&str, &str); 2] =
    [("::/EFI/BOOT/BOOTX64.EFI", "shim.efi"), ("::/EFI/BOOT/grubx64.efi", "grub.efi")];

/// How much is copied at a time.
const CHUNK: usize = 1 << 20;

/// Where everything lies, and by which identifiers it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) size: u64,
    pub(super) guid: Guid,
    pub(super) bios: Option<Partition>,
    pub(super) efi: Option<Partition>,
    pub(super) root: Partition,
    /// The root's file system.
    pub(super) file_system: Guid,
    pub(super) hash_seed: Guid,
    /// The EFI system partition's file system.
    fat_id: u32,
}

impl Layout {
    /// All identifiers come from the key, so that the same inputs give the same disk.
    pub(super) fn new(
        size: u64,
        firmware: BootFirmware,
        key: &str,
    ) -> Result<Layout, ImageBuildError> {
        let hash = |what: &str| {
            let digest = Digest::of(format!("{key} {what}").as_bytes());
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&digest.as_ref()[..16]);
            bytes
        };
        let guid = |what: &str| Guid::from_hash(hash(what));
        let place = |role, number, (start, len), name| {
            let guid = guid(name);
            Partition { number, role, start, len, guid }
        };
        let (start, end) = gpt::usable(size);
        let efi_at = start + if firmware.bios() { BIOS_LEN } else { 0 };
        let root_at = efi_at + if firmware.uefi() { EFI_LEN } else { 0 };
        let root_len = end.checked_sub(root_at).filter(|len| *len > 0);
        let root_len = root_len.ok_or(ImageBuildError::NoRoom(size))?;
        let bios = place(Role::BiosBoot, BIOS_NUMBER, (start, BIOS_LEN), "bios boot");
        let efi = place(Role::EfiSystem, EFI_NUMBER, (efi_at, EFI_LEN), "efi system");
        let [a, b, c, d, ..] = hash("fat");
        Ok(Layout {
            size,
            guid: guid("disk"),
            bios: firmware.bios().then_some(bios),
            efi: firmware.uefi().then_some(efi),
            root: place(Role::Root, ROOT_NUMBER, (root_at, root_len), "root"),
            file_system: guid("file system"),
            hash_seed: guid("hash seed"),
            fat_id: u32::from_be_bytes([a, b, c, d]),
        })
    }

    /// Writes the partition table, and what boots beside the root. `scratch` is an empty directory.
    pub(super) fn finish(
        &self,
        disk: &File,
        files: &BTreeMap<String, Vec<u8>>,
        scratch: &Path,
    ) -> Result<(), ImageBuildError> {
        let failed = |e| ImageBuildError::cache_io("write the disk in", scratch, e);
        let partitions: Vec<Partition> =
            self.bios.into_iter().chain(self.efi).chain([self.root]).collect();
        gpt::write(disk, self.size, self.guid, &partitions).map_err(failed)?;
        let file = |name: &str| files.get(name).map(Vec::as_slice).unwrap_or_default();
        if let Some(bios) = self.bios {
            let mut mbr = [0; SECTOR as usize];
            disk.read_exact_at(&mut mbr, 0).map_err(failed)?;
            grub::patch_mbr(&mut mbr, file("boot.img"), bios.start)?;
            let mut core = file("core.img").to_vec();
            grub::patch_core(&mut core, bios.start, bios.len)?;
            disk.write_all_at(&core, bios.start).map_err(failed)?;
            disk.write_all_at(&mbr, 0).map_err(failed)?;
        }
        if let Some(efi) = self.efi {
            let image = scratch.join("esp");
            self.efi_file_system(&image, files, scratch)?;
            copy_to(&image, disk, efi.start).map_err(failed)?;
        }
        Ok(())
    }

    /// What GRUB's signed image reads first: it only knows the partition that it came from.
    fn efi_config(&self) -> String {
        format!(
            "search --no-floppy --fs-uuid --set=root --hint=hd0,gpt{ROOT_NUMBER} {}\n\
             configfile ($root)/boot/grub/grub.cfg\n",
            self.file_system
        )
    }

    fn efi_file_system(
        &self,
        image: &Path,
        files: &BTreeMap<String, Vec<u8>>,
        scratch: &Path,
    ) -> Result<(), ImageBuildError> {
        let failed = |e| ImageBuildError::cache_io("write", image, e);
        File::create_new(image).and_then(|file| file.set_len(EFI_LEN)).map_err(failed)?;
        let id = format!("{:08x}", self.fat_id);
        let doing = "make the EFI system partition";
        let run = |program, args: &[&OsStr]| run_tool(program, args, scratch, doing);
        let text = |text: &'static str| OsStr::new(text);
        let make = ["--invariant", "-n", "ESP", "-i", &id].map(OsStr::new);
        run("mkfs.vfat", &[&make[..], &[image.as_os_str()]].concat())?;
        let dirs = ["::/EFI", "::/EFI/BOOT", "::/EFI/debian"].map(OsStr::new);
        run("mmd", &[&[text("-i"), image.as_os_str()], &dirs[..]].concat())?;
        let config = self.efi_config();
        let loaders = EFI_FILES.map(|(to, from)| (to, files.get(from).map_or(&[][..], |f| f)));
        for (to, bytes) in
            loaders.into_iter().chain([("::/EFI/debian/grub.cfg", config.as_bytes())])
        {
            let from = scratch.join("file");
            fs::write(&from, bytes).map_err(failed)?;
            run("mcopy", &[text("-i"), image.as_os_str(), from.as_os_str(), text(to)])?;
        }
        Ok(())
    }
}

/// Copies a file into the disk, all but what is zero there, too.
fn copy_to(from: &Path, disk: &File, start: u64) -> std::io::Result<()> {
    let mut from = File::open(from)?;
    let mut chunk = vec![0; CHUNK];
    let mut at = start;
    loop {
        let n = from.read(&mut chunk)?;
        if n == 0 {
            return Ok(());
        }
        if chunk[..n].iter().any(|byte| *byte != 0) {
            disk.write_all_at(&chunk[..n], at)?;
        }
        at += n as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_follow_each_other_and_fill_the_disk() {
        let size = 1 << 30;
        for (firmware, before) in
            [(BootFirmware::Both, 16), (BootFirmware::Uefi, 15), (BootFirmware::Bios, 2)]
        {
            let layout = Layout::new(size, firmware, "key").unwrap();
            let mut at = MIB;
            for part in layout.bios.into_iter().chain(layout.efi).chain([layout.root]) {
                assert_eq!(part.start, at);
                assert_eq!(part.len % MIB, 0);
                at += part.len;
            }
            assert_eq!(at, size - MIB);
            assert_eq!((layout.root.number, layout.root.start / MIB), (1, before), "{firmware:?}");
        }
        assert!(matches!(
            Layout::new(4 * MIB, BootFirmware::Both, "key"),
            Err(ImageBuildError::NoRoom(_))
        ));
    }

    #[test]
    fn identifiers_come_from_the_key_and_differ() {
        let layout = |key| Layout::new(1 << 30, BootFirmware::Both, key).unwrap();
        assert_eq!(layout("a"), layout("a"));
        let (a, b) = (layout("a"), layout("b"));
        assert_ne!(a.file_system, b.file_system);
        assert_ne!(a.fat_id, b.fat_id);
        let mut all = vec![a.guid, a.file_system, a.hash_seed, a.root.guid];
        all.extend(a.bios.map(|p| p.guid).into_iter().chain(a.efi.map(|p| p.guid)));
        all.sort_by_key(|guid| guid.0);
        all.dedup();
        assert_eq!(all.len(), 6);
    }
}
