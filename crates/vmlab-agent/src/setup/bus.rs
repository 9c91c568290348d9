//! Devices that come and go while the guest runs, on a PCI bus or in slots at fixed addresses.
//!
//! Slots are announced at boot, by ACPI or a device tree, and nothing tells the kernel when an empty one is
//! filled: its driver has to be asked to look again.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use vmlab_wire::message::Failure;

use super::{Step, failed_io};

/// Where the kernel has its devices and drivers.
pub(super) const SYSFS: &str = "/sys";

/// What makes the kernel look for devices on all PCI buses, below that.
const RESCAN: &str = "bus/pci/rescan";

/// Where the devices at fixed addresses are.
const PLATFORM: &str = "bus/platform/devices";

/// The driver of those of them that are slots for virtio devices.
const SLOT_DRIVER: &str = "virtio-mmio";

/// Has the kernel find the devices that have come since it last looked, and waits for their drivers.
pub(super) fn find(sysfs: &Path) -> Step {
    let (rescan, driver) = (sysfs.join(RESCAN), driver(sysfs));
    let on_pci = rescan.exists();
    if on_pci {
        fs::write(&rescan, "1").map_err(|e| {
            failed_io(format!("look for new devices by {}", rescan.display()), &e, "")
        })?;
    }
    if driver.is_dir() {
        let step = || format!("look for new devices by {}", driver.display());
        return look(sysfs, &driver).map_err(|e| failed_io(step(), &e, ""));
    }
    match on_pci {
        true => Ok(()),
        false => Err(Failure {
            step: "look for new devices".to_string(),
            detail: format!("there is neither {} nor {}", rescan.display(), driver.display()),
            errno: None,
        }),
    }
}

fn driver(sysfs: &Path) -> PathBuf {
    sysfs.join("bus/platform/drivers").join(SLOT_DRIVER)
}

/// Has the driver look at each slot that it has no device in.
fn look(sysfs: &Path, driver: &Path) -> io::Result<()> {
    let slots = empty_slots(&sysfs.join(PLATFORM))?;
    if slots.is_empty() {
        return Ok(());
    }
    let mut bind = File::options().write(true).open(driver.join("bind"))?;
    fill(&slots, &mut bind)
}

/// Offers each of these slots to the driver, one in a write.
fn fill(slots: &[OsString], bind: &mut impl Write) -> io::Result<()> {
    for slot in slots {
        match bind.write_all(&line(slot)) {
            // It is still empty.
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => {}
            other => other?,
        }
    }
    Ok(())
}

/// The slots that no driver has, in the order of their numbers or addresses, so that the kernel numbers what is
/// in them in that order.
fn empty_slots(devices: &Path) -> io::Result<Vec<OsString>> {
    let mut slots = Vec::new();
    for entry in fs::read_dir(devices)? {
        let entry = entry?;
        let name = entry.file_name();
        if is_slot(&name) && !entry.path().join("driver").exists() {
            slots.push(name);
        }
    }
    slots.sort();
    Ok(slots)
}

/// Whether a platform device of this name is a slot: `LNRO0005:01` where ACPI names it, and
/// `d0001000.virtio_mmio` where a device tree does.
fn is_slot(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.starts_with(b"LNRO0005:") || name.ends_with(b".virtio_mmio")
}

/// Has the kernel forget the device that a virtio device is on.
pub(super) fn forget(device: &Path) -> io::Result<()> {
    let driver = device.join("driver");
    match (fs::read_link(&driver), device.file_name()) {
        (Ok(target), Some(name)) if target.ends_with(SLOT_DRIVER) => {
            // The slot itself stays, for what comes after.
            let mut unbind = File::options().write(true).open(driver.join("unbind"))?;
            unbind.write_all(&line(name))
        }
        _ => fs::write(device.join("remove"), "1"),
    }
}

/// What a driver's files take in one write.
fn line(name: &OsStr) -> Vec<u8> {
    [name.as_bytes(), b"\n"].concat()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A tree like that of sysfs, whose files keep what is written to them.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self) -> &Path {
            self.0.path()
        }

        fn file(&self, path: &str) {
            let path = self.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }

        fn written(&self, path: &str) -> String {
            fs::read_to_string(self.path().join(path)).unwrap()
        }

        fn with_slot_driver() -> Self {
            let tree = Self::new();
            tree.file("bus/platform/drivers/virtio-mmio/bind");
            tree.file("bus/platform/drivers/virtio-mmio/unbind");
            tree
        }

        /// A platform device, with a driver or none.
        fn device(&self, name: &str, driver: Option<&str>) -> PathBuf {
            let device = self.path().join(PLATFORM).join(name);
            fs::create_dir_all(&device).unwrap();
            if let Some(driver) = driver {
                let target = Path::new("../../drivers").join(driver);
                fs::create_dir_all(device.join(&target)).unwrap();
                symlink(target, device.join("driver")).unwrap();
            }
            device
        }
    }

    #[test]
    fn a_pci_bus_is_rescanned() {
        let tree = Tree::new();
        tree.file(RESCAN);
        find(tree.path()).unwrap();
        assert_eq!(tree.written(RESCAN), "1");
    }

    #[test]
    fn empty_slots_are_looked_at_in_their_order() {
        let tree = Tree::with_slot_driver();
        for name in
            ["LNRO0005:0b", "LNRO0005:02", "d0001000.virtio_mmio", "PNP0501:00", "LNRO00051"]
        {
            tree.device(name, None);
        }
        tree.device("LNRO0005:00", Some(SLOT_DRIVER));
        // Something else may have one, such as a driver that hands it to a program.
        tree.device("LNRO0005:01", Some("vfio-platform"));
        find(tree.path()).unwrap();
        let bound = tree.written("bus/platform/drivers/virtio-mmio/bind");
        assert_eq!(bound, "LNRO0005:02\nLNRO0005:0b\nd0001000.virtio_mmio\n");
    }

    #[test]
    fn both_kinds_of_places_are_looked_at() {
        let tree = Tree::with_slot_driver();
        tree.file(RESCAN);
        tree.device("LNRO0005:00", None);
        find(tree.path()).unwrap();
        assert_eq!(tree.written(RESCAN), "1");
        assert_eq!(tree.written("bus/platform/drivers/virtio-mmio/bind"), "LNRO0005:00\n");
    }

    /// A driver's file that answers each write in its turn.
    struct Answers(Vec<Result<(), i32>>, Vec<Vec<u8>>);

    impl Write for Answers {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.push(bytes.to_vec());
            self.0.remove(0).map(|()| bytes.len()).map_err(io::Error::from_raw_os_error)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slot_that_stays_empty_is_no_failure_and_others_are() {
        let slots = ["a", "b", "c"].map(OsString::from);
        let mut bind = Answers(vec![Err(libc::ENODEV), Ok(()), Err(libc::ENODEV)], Vec::new());
        fill(&slots, &mut bind).unwrap();
        assert_eq!(bind.1, [b"a\n", b"b\n", b"c\n"]);
        let mut bind = Answers(vec![Err(libc::ENODEV), Err(libc::ENXIO)], Vec::new());
        let error = fill(&slots, &mut bind).unwrap_err();
        assert_eq!((error.raw_os_error(), bind.1.len()), (Some(libc::ENXIO), 2));
    }

    #[test]
    fn without_an_empty_slot_the_driver_is_left_alone() {
        let tree = Tree::with_slot_driver();
        fs::remove_file(tree.path().join("bus/platform/drivers/virtio-mmio/bind")).unwrap();
        tree.device("LNRO0005:00", Some(SLOT_DRIVER));
        find(tree.path()).unwrap();
        tree.device("LNRO0005:01", None);
        let failure = find(tree.path()).unwrap_err();
        assert_eq!(failure.errno, Some(libc::ENOENT));
        assert!(failure.step.ends_with("drivers/virtio-mmio"), "{}", failure.step);
    }

    #[test]
    fn a_guest_without_any_place_says_so() {
        let tree = Tree::new();
        let failure = find(tree.path()).unwrap_err();
        assert!(failure.detail.contains(RESCAN) && failure.detail.contains(SLOT_DRIVER));
    }

    #[test]
    fn a_device_in_a_slot_is_taken_from_its_driver() {
        let tree = Tree::with_slot_driver();
        forget(&tree.device("LNRO0005:03", Some(SLOT_DRIVER))).unwrap();
        assert_eq!(tree.written("bus/platform/drivers/virtio-mmio/unbind"), "LNRO0005:03\n");
    }

    #[test]
    fn a_device_on_a_bus_is_removed() {
        let tree = Tree::with_slot_driver();
        let device = tree.device("0000:01:02.0", Some("virtio-pci"));
        forget(&device).unwrap();
        assert_eq!(fs::read_to_string(device.join("remove")).unwrap(), "1");
        assert_eq!(tree.written("bus/platform/drivers/virtio-mmio/unbind"), "");
    }
}
