mod archives;
mod references;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use super::*;
use crate::progress::Silent;
use crate::test_support::chain;

/// A directory for images, with a cache in it.
struct Site {
    dir: tempfile::TempDir,
    cache: Cache,
}

impl Site {
    fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        Site { dir, cache }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    fn open(&self, name: &str) -> Result<DiskImage, ImageError> {
        open(&self.cache, &self.path(name), &Silent)
    }

    /// What is said of a file that cannot be used, without the directory.
    fn refusal(&self, name: &str, content: &[u8]) -> String {
        self.file(name, content);
        let error = self.open(name).expect_err(name);
        chain(&error).replace(&format!("{}/", self.dir.path().display()), "")
    }
}

/// A raw disk of a mebibyte, with an MBR that has one partition up to its end.
fn raw_disk() -> Vec<u8> {
    let mut disk = vec![0; 1 << 20];
    disk[446 + 4] = 0x83;
    disk[446 + 8..446 + 12].copy_from_slice(&1_u32.to_le_bytes());
    disk[446 + 12..446 + 16].copy_from_slice(&2047_u32.to_le_bytes());
    disk[510..512].copy_from_slice(b"\x55\xaa");
    disk[600_000] = 7;
    disk
}

/// `qemu-img`, of the package qemu-utils.
fn qemu_img(args: &[&str]) -> String {
    let output =
        Command::new("qemu-img").args(args).output().expect("qemu-img (install qemu-utils)");
    let (said, errors) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "qemu-img {args:?}: {errors}");
    said
}

/// The raw disk as `qemu-img` makes an image of it.
fn converted(site: &Site, name: &str, format: &str, options: &[&str]) -> PathBuf {
    let source = site.file("source.raw", &raw_disk());
    let place = site.path(name);
    let (source, target) = (source.to_str().unwrap(), place.to_str().unwrap());
    let args = [&["convert", "-f", "raw", "-O", format], options, &[source, target]].concat();
    qemu_img(&args);
    place
}

#[test]
fn the_content_tells_the_format_and_the_name_does_not() {
    let site = Site::new();
    let cases: [(&str, &[&str], ImageFormat); 7] = [
        ("qcow2", &[], ImageFormat::Qcow2),
        ("qcow2", &["-o", "compat=0.10"], ImageFormat::Qcow2),
        ("qcow2", &["-c", "-o", "cluster_size=512"], ImageFormat::Qcow2),
        ("vmdk", &[], ImageFormat::Vmdk),
        ("vmdk", &["-o", "subformat=streamOptimized"], ImageFormat::Vmdk),
        ("vdi", &[], ImageFormat::Vdi),
        ("raw", &[], ImageFormat::Raw),
    ];
    for (format, options, wanted) in cases {
        converted(&site, "disk.img", format, options);
        let image = site.open("disk.img").unwrap();
        assert_eq!((image.format, &image.path), (wanted, &site.path("disk.img")), "{options:?}");
        assert!(image.lease.is_none());
    }
    // Nothing was written.
    assert!(!site.cache.root().exists());
}

#[test]
fn file_systems_are_disks_as_well() {
    let site = Site::new();
    for (offset, magic) in [
        (0x438, &b"\x53\xef"[..]),
        (0, b"XFSB"),
        (0x1_0040, b"_BHRfS_M"),
        (0, b"hsqs"),
        (0x400, b"\xe2\xe1\xf5\xe0"),
    ] {
        let mut disk = vec![0; 1 << 20];
        disk[offset..offset + magic.len()].copy_from_slice(magic);
        site.file("root.img", &disk);
        assert_eq!(site.open("root.img").unwrap().format, ImageFormat::Raw, "{magic:?}");
    }
}

#[test]
fn what_is_no_disk_is_told_with_what_can_be_used() {
    let site = Site::new();
    let with = |offset: usize, magic: &[u8]| {
        let mut content = raw_disk();
        content[offset..offset + magic.len()].copy_from_slice(magic);
        content
    };
    let usable = "give a raw, qcow2, vmdk or vdi image, which may be compressed (.zst, .xz, .gz, \
                  .bz2) or in a tar archive (.ova)";
    let convert = "`qemu-img convert -O qcow2` makes a usable one of it";
    let cases: [(&[u8], &str, &str); 11] = [
        (b"", "an empty file", usable),
        (b"QF", "a text file", usable),
        (b"#!/bin/sh\n", "a script", usable),
        (
            &[0; 4096],
            "a file that begins with nothing but zero bytes (no partition table, no file system)",
            usable,
        ),
        (
            &with(0x8001, b"CD001"),
            "an ISO 9660 image",
            "installation media are not disk images; install it to a disk first, or take the cloud image of the same distribution",
        ),
        (
            &crate::test_support::bzimage("6.12"),
            "a kernel or another program",
            "give kernels by -k (--kernel)",
        ),
        (b"\x7fELF and more", "a kernel or another program", "give kernels by -k (--kernel)"),
        (b"QFI\xfb\0\0\0\x01", "a qcow image of version 1", convert),
        (b"vhdxfile", "a VHDX image (Hyper-V)", convert),
        (b"conectix", "a VHD image (Hyper-V, Azure)", convert),
        (b"\x89LZO\0\r\n\x1a\n", "compressed by lz4 or lzop", "unpack it first"),
    ];
    for (content, what, advice) in cases {
        let text = site.refusal("disk.qcow2", content);
        assert_eq!(text, format!("disk.qcow2 is {what}, not a disk image: {advice}"));
    }
    fs::create_dir(site.path("dir")).unwrap();
    let text = site.open("dir").unwrap_err().to_string();
    assert!(text.ends_with(&format!("dir is a directory, not a disk image: {usable}")), "{text}");
    let text = chain(&site.open("none").unwrap_err());
    assert!(
        text.starts_with("cannot open the disk image /") && text.contains("none: No such file")
    );
    let fifo = site.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert!(site.open("fifo").unwrap_err().to_string().contains("is a named pipe"));
}

/// A GPT header that has its second one in the last block.
fn gpt_disk() -> Vec<u8> {
    let mut disk = raw_disk();
    disk[446 + 4] = 0xee;
    disk[446 + 12..446 + 16].fill(0xff);
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[512 + 32..512 + 40].copy_from_slice(&2047_u64.to_le_bytes());
    disk
}

#[test]
fn a_truncated_image_is_found_out() {
    let site = Site::new();
    let mut ext = raw_disk();
    ext[446..512].fill(0);
    ext[0x404..0x408].copy_from_slice(&1024_u32.to_le_bytes());
    ext[0x438..0x43a].copy_from_slice(b"\x53\xef");
    let made =
        |format, options: &[&str]| fs::read(converted(&site, "made", format, options)).unwrap();
    let cases = [
        ("raw", raw_disk()),
        ("raw", gpt_disk()),
        ("raw", ext),
        ("qcow2", made("qcow2", &[])),
        ("qcow2", made("qcow2", &["-o", "compat=0.10,cluster_size=4096"])),
        ("qcow2", made("qcow2", &["-c", "-o", "cluster_size=512"])),
        ("qcow2", made("qcow2", &["-o", "refcount_bits=1"])),
        ("vmdk", made("vmdk", &["-o", "subformat=streamOptimized"])),
        ("vdi", made("vdi", &[])),
    ];
    for (format, whole) in cases {
        site.file("whole", &whole);
        site.open("whole").unwrap();
        let len = whole.len() - whole.len() / 2;
        let text = site.refusal("half", &whole[..len]);
        let head = format!("the {format} image half is truncated: it reaches to byte ");
        assert!(text.starts_with(&head), "{text}");
        assert!(text.contains(&format!("the file has {len}; was it copied")), "{text}");
    }
}

/// What gets a file further than to be refused for what it is.
const MAGICS: [&[u8]; 5] =
    [b"QFI\xfb\0\0\0\x03", b"QFI\xfb\0\0\0\x02", b"KDMV", b"# x\nversion=1\n", b""];

proptest::proptest! {
    #[test]
    fn arbitrary_headers_do_no_harm(
        magic in proptest::sample::select(&MAGICS[..]),
        tail in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..600),
        small in proptest::prelude::any::<bool>(),
    ) {
        let site = Site::new();
        let mut content = [magic, &tail].concat();
        // Most numbers are absurd; some are to get further.
        if small {
            content.iter_mut().skip(magic.len()).for_each(|byte| *byte &= 0x11);
        }
        content.resize(4096, 0);
        site.file("odd", &content);
        let _ = site.open("odd");
    }
}
