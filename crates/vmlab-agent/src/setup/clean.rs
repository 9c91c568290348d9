//! Filesystems of disks at the end of the guest.

use rustix::mount::{MountFlags, mount_remount};

/// Makes what is mounted of disks read-only, so that a disk whose writes are kept has no filesystem that
/// would have to be recovered. What is still in use by the kernel itself stays as a sync leaves it.
pub(crate) fn make_clean() {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // What was mounted last may be a file in what was mounted before.
    for target in mounts.lines().rev().filter_map(of_disk) {
        let _ = mount_remount(target, MountFlags::RDONLY, c"");
    }
}

/// Where a line of `mountinfo` mounts a disk, by proc(5): the fifth field is the place, the sixth has the
/// options of the mount, and the source is the second one behind the hyphen. The number of the device tells
/// nothing: that of btrfs is none of a disk.
fn of_disk(line: &str) -> Option<Vec<u8>> {
    let mut fields = line.split(' ');
    let target = fields.nth(4)?;
    let options = fields.next()?;
    let source = fields.skip_while(|field| *field != "-").nth(2)?;
    let is_disk = source.starts_with("/dev/");
    let is_writable = options.split(',').any(|option| option == "rw");
    (is_disk && is_writable).then(|| unescaped(target))
}

/// A path without the escapes of `mountinfo`: `\` and three octal digits.
fn unescaped(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        let octal = |digits: &[u8]| {
            let text = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(text, 8).ok()
        };
        match (first, more.split_at_checked(3)) {
            (b'\\', Some((digits, after))) if octal(digits).is_some() => {
                bytes.extend(octal(digits));
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writable_mounts_of_disks_are_found() {
        let disk = "40 21 254:0 / /mnt/a\\040b\\134c rw,relatime - ext4 /dev/vda rw";
        assert_eq!(of_disk(disk).unwrap(), b"/mnt/a b\\c");
        assert_eq!(of_disk("41 21 0:30 / /tmp rw,nosuid shared:5 - tmpfs tmpfs rw"), None);
        let btrfs = "44 21 0:37 / /mnt/b rw,relatime shared:9 - btrfs /dev/vdb rw,subvol=/";
        assert_eq!(of_disk(btrfs).unwrap(), b"/mnt/b");
        assert_eq!(of_disk("42 21 254:16 / /mnt/x ro,relatime - ext4 /dev/vdb ro"), None);
        assert_eq!(
            of_disk("43 21 7:0 / /mnt/ü\\9 rw - ext4 /dev/loop0 rw").unwrap(),
            "/mnt/ü\\9".as_bytes()
        );
        assert_eq!(of_disk(""), None);
    }
}
