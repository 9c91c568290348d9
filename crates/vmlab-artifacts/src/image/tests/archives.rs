use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, *content).unwrap();
    }
    archive.into_inner().unwrap()
}

fn ovf(disks: &[(&str, &str)]) -> String {
    let files: String = disks
        .iter()
        .map(|(id, name)| format!("<File ovf:id=\"{id}\" ovf:href=\"{name}\"/>"))
        .collect();
    let refs: String = disks
        .iter()
        .map(|(id, _)| format!("<Disk ovf:diskId=\"d{id}\" ovf:fileRef=\"{id}\"/>"))
        .collect();
    format!(
        "<?xml version=\"1.0\"?><Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\"><References>{files}<File ovf:id=\"n\" \
         ovf:href=\"nvram\"/></References><DiskSection>{refs}<Disk ovf:diskId=\"new\"/></DiskSection></Envelope>"
    )
}

#[test]
fn compressed_images_are_unpacked_once_and_sparse() {
    let site = Site::new();
    let mut disk = raw_disk();
    disk.resize(64 << 20, 0);
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(&disk).unwrap();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 0);
    xz.write_all(&disk).unwrap();
    // Some tools write a stream for each block.
    let (head, tail) = disk.split_at(1 << 20);
    let compressed = [
        ("disk.gz", [gzip(head), gzip(tail)].concat()),
        ("disk.raw.zst", zstd::encode_all(&disk[..], 1).unwrap()),
        ("disk.xz", xz.finish().unwrap()),
        ("disk", bzip2.finish().unwrap()),
    ];
    for (name, stream) in &compressed {
        site.file(name, stream);
        let image = site.open(name).unwrap();
        assert_eq!(image.format, ImageFormat::Raw, "{name}");
        assert!(fs::read(&image.path).unwrap() == disk, "{name}");
        let meta = fs::metadata(&image.path).unwrap();
        assert!(meta.blocks() * 512 < 1 << 20, "{name} has {} blocks", meta.blocks());
        // In use, so nobody takes it away.
        let entry = site.cache.entries("unpacked-images").unwrap().remove(0);
        assert!(site.cache.remove("unpacked-images", &entry.key).is_err());
        let again = site.open(name).unwrap();
        assert_eq!(again.path, image.path);
        assert_eq!(fs::metadata(&again.path).unwrap().ino(), meta.ino(), "{name}");
        drop((image, again));
        site.cache.remove("unpacked-images", &entry.key).unwrap();
    }
}

#[test]
fn an_unpacked_image_that_was_changed_is_found_out() {
    let site = Site::new();
    site.file("disk.gz", &gzip(&raw_disk()));
    let image = site.open("disk.gz").unwrap();
    let entry = image.path.parent().unwrap().to_owned();
    (KIND.verify)(&entry).unwrap();
    let mut bytes = fs::read(&image.path).unwrap();
    bytes[700_000] = 1;
    fs::write(&image.path, &bytes).unwrap();
    assert!((KIND.verify)(&entry).is_err());
    // One that lost its end is made anew at once.
    fs::write(&image.path, &bytes[..1000]).unwrap();
    drop(image);
    let image = site.open("disk.gz").unwrap();
    assert!(fs::read(&image.path).unwrap() == raw_disk());
}

#[test]
fn the_one_disk_of_an_archive_is_taken() {
    let site = Site::new();
    let disk = raw_disk();
    let readme = &b"read me"[..];
    let whole = tar(&[("./README", readme), ("./disk.raw", &disk)]);
    let machine = ovf(&[("f", "box-disk.vmdk")]);
    let vmdk =
        fs::read(converted(&site, "x", "vmdk", &["-o", "subformat=streamOptimized"])).unwrap();
    let ova = tar(&[
        ("box.ovf", machine.as_bytes()),
        ("box.mf", readme),
        ("box-disk.vmdk", &vmdk),
        // It is not named, so it is no disk of the machine.
        ("nvram", &disk),
    ]);
    for (name, archive, format) in [
        ("a.tar", whole.clone(), ImageFormat::Raw),
        ("a.tar.gz", gzip(&whole), ImageFormat::Raw),
        ("b.ova", ova, ImageFormat::Vmdk),
        ("c.tar", tar(&[("disk.raw.gz", &gzip(&disk))]), ImageFormat::Raw),
    ] {
        site.file(name, &archive);
        let image = site.open(name).unwrap();
        assert_eq!(image.format, format, "{name}");
        let wanted = if format == ImageFormat::Vmdk { &vmdk } else { &disk };
        assert!(&fs::read(&image.path).unwrap() == wanted, "{name}");
    }
}

/// As `tar -S` packs it, which the archives of clouds are made by.
#[test]
fn the_holes_of_a_packed_disk_are_kept() {
    let site = Site::new();
    let mut disk = raw_disk();
    disk.resize(8 << 20, 0);
    disk[7 << 20] = 9;
    let source = site.path("disk.raw");
    let file = File::create(&source).unwrap();
    for at in [0, 600_000 / 4096 * 4096, 7 << 20] {
        file.write_all_at(&disk[at..at + 4096], at as u64).unwrap();
    }
    file.set_len(disk.len() as u64).unwrap();
    let pack = |format: &str| {
        let mut tar = Command::new("tar");
        tar.arg("-S").arg(format!("--format={format}")).arg("-C").arg(site.dir.path());
        assert!(
            tar.args(["-cf"]).arg(site.path("a.tar")).arg("disk.raw").status().unwrap().success()
        );
        site.open("a.tar")
    };
    let image = pack("gnu").unwrap();
    assert!(fs::read(&image.path).unwrap() == disk);
    let text = pack("posix").unwrap_err().to_string();
    assert!(text.contains("a sparse archive of a form that is not supported"), "{text}");
}

#[test]
fn archives_without_one_disk_are_refused() {
    let site = Site::new();
    let disk = raw_disk();
    let machine = |disks: &[(&str, &str)]| {
        let text = ovf(disks);
        tar(&[("box.ovf", text.as_bytes()), ("a.vmdk", &disk), ("b.vmdk", &disk)])
    };
    let cases = [
        (
            tar(&[("a.raw", &disk), ("b/c.raw", &disk)]),
            "x has several disks; unpack it and name one of them: a.raw, b/c.raw",
        ),
        (
            machine(&[("1", "a.vmdk"), ("2", "b.vmdk")]),
            "x has several disks; unpack it and name one of them: a.vmdk, b.vmdk",
        ),
        (
            tar(&[("README", b"text"), ("vmlinuz", b"\x7fELF")]),
            "x has no disk image in it; it has README, vmlinuz",
        ),
        (
            tar(&[]),
            "x is a file that begins with nothing but zero bytes (no partition table, no file system), not",
        ),
        (
            machine(&[("1", "gone.vmdk")]),
            "x has no disk image in it; it has box.ovf, a.vmdk, b.vmdk",
        ),
        (
            machine(&[]),
            "the description `box.ovf` in x cannot be used: the machine has no disk with content",
        ),
        (
            tar(&[("box.ovf", b"<a"), ("a", &disk)]),
            "the description `box.ovf` in x cannot be used: it is no XML",
        ),
        (
            tar(&[("box.ovf", b"<a><Disk fileRef=\"f\"/></a>")]),
            "the description `box.ovf` in x cannot be used: a disk has the file `f`, and",
        ),
    ];
    for (archive, wanted) in cases {
        let text = site.refusal("x", &archive);
        assert!(text.starts_with(wanted), "{text}");
    }
}

#[test]
fn what_cannot_be_unpacked_is_told() {
    let site = Site::new();
    let disk = raw_disk();
    let packed = gzip(&disk);
    let mut iso = disk.clone();
    iso[0x8001..0x8006].copy_from_slice(b"CD001");
    let backed = site.path("backed");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-u",
        "-b",
        "image.json",
        "-F",
        "raw",
        backed.to_str().unwrap(),
        "1M",
    ]);
    let mut layers = disk.clone();
    for _ in 0..5 {
        layers = gzip(&layers);
    }
    let cases = [
        (
            packed[..packed.len() / 2].to_vec(),
            "x cannot be unpacked: it is damaged or incomplete: ",
        ),
        (gzip(&iso), "x is an ISO 9660 image (compressed), not a disk image: installation media"),
        (gzip(b"text"), "x is a text file (compressed), not a disk image: "),
        (gzip(b""), "x is an empty file (compressed), not a disk image: "),
        (
            gzip(&disk[..1 << 19]),
            "the raw image x is truncated: it reaches to byte 1048576, and the file has 524288",
        ),
        (
            gzip(&fs::read(&backed).unwrap()),
            "the image x has `image.json` as its backing file, which only an image with",
        ),
        (layers, "x is compressed or an archive 4 times over, not"),
    ];
    for (content, wanted) in cases {
        let text = site.refusal("x", &content);
        assert!(text.starts_with(wanted), "{text}");
    }
    assert!(site.cache.entries("unpacked-images").unwrap().is_empty());
}
