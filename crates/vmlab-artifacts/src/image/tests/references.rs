use super::*;

/// An image with a backing file, by name and format, as it stands in the header.
fn backed(site: &Site, name: &str, backing: &str, format: Option<&str>) {
    let path = site.path(name);
    // Without a look at the backing file; `-u` also takes what is not there.
    let mut args = vec!["create", "-q", "-f", "qcow2", "-u", "-b", backing];
    args.extend(format.iter().flat_map(|format| ["-F", format]));
    qemu_img(&[&args[..], &[path.to_str().unwrap(), "1M"]].concat());
}

fn text(site: &Site, name: &str) -> String {
    site.open(name).expect_err(name).to_string()
}

#[test]
fn a_backing_file_has_to_be_beside_the_image() {
    let site = Site::new();
    site.file("base.raw", &raw_disk());
    backed(&site, "top.qcow2", "base.raw", Some("raw"));
    assert_eq!(site.open("top.qcow2").unwrap().format, ImageFormat::Qcow2);
    fs::create_dir(site.path("dir")).unwrap();
    site.file("dir/base.raw", &raw_disk());
    std::os::unix::fs::symlink("base.raw", site.path("link")).unwrap();
    let absolute = site.path("base.raw");
    for (backing, why) in [
        (absolute.to_str().unwrap(), "which is no plain file name"),
        ("/etc/shadow", "which is no plain file name"),
        ("../base.raw", "which is no plain file name"),
        ("dir/base.raw", "which is no plain file name"),
        ("json:{\"driver\":\"raw\"}", "which is no plain file name"),
        ("nbd:localhost:1", "which is no plain file name"),
        ("file:base.raw", "which is no plain file name"),
        ("..", "which is no plain file name"),
        ("link", "which is a symbolic link"),
        ("dir", "which is no regular file"),
        ("gone", "which is not beside it"),
    ] {
        backed(&site, "top.qcow2", backing, Some("raw"));
        let text = text(&site, "top.qcow2");
        let name = format!("has `{backing}` as its backing file, {why}");
        assert!(text.contains(&name), "{text}");
        assert!(text.contains("qemu-img convert"), "{text}");
    }
}

#[test]
fn what_is_behind_a_backing_file_counts_as_well() {
    let site = Site::new();
    backed(&site, "middle", "/etc/shadow", Some("raw"));
    backed(&site, "top.qcow2", "middle", Some("qcow2"));
    let refusal = text(&site, "top.qcow2");
    assert!(refusal.contains("middle has `/etc/shadow`"), "{refusal}");
    // Taken as a raw disk, a backing file names nothing.
    backed(&site, "top.qcow2", "middle", Some("raw"));
    site.open("top.qcow2").unwrap();
    // One that leads to itself.
    backed(&site, "top.qcow2", "top.qcow2", Some("qcow2"));
    let refusal = text(&site, "top.qcow2");
    assert!(refusal.contains("more than 16 images belong together"), "{refusal}");
    // QEMU takes it for what the header says, which nothing here can look into.
    site.file("odd", b"QED\0");
    backed(&site, "top.qcow2", "odd", Some("qed"));
    let refusal = text(&site, "top.qcow2");
    assert!(
        refusal.contains("`odd` as its backing file, said to be of the format `qed`"),
        "{refusal}"
    );
    // A descriptor of vmdk that looks like a raw disk.
    let mut descriptor = b"x\nRW 1 FLAT \"/etc/shadow\" 0\n".to_vec();
    descriptor.resize(512, b'\n');
    descriptor[510..].copy_from_slice(b"\x55\xaa");
    site.file("odd", &descriptor);
    backed(&site, "top.qcow2", "odd", Some("vmdk"));
    assert!(text(&site, "top.qcow2").contains("odd has `/etc/shadow` as its extent"));
}

/// The extension that says a backing file's format is not always there.
#[test]
fn a_backing_file_without_a_format_is_told_by_its_content() {
    let site = Site::new();
    site.file("base", &raw_disk());
    backed(&site, "top.qcow2", "base", Some("raw"));
    let mut bytes = fs::read(site.path("top.qcow2")).unwrap();
    let at = bytes.windows(4).position(|word| word == 0xe279_2aca_u32.to_be_bytes()).unwrap();
    bytes[at] = 0x12;
    site.file("top.qcow2", &bytes);
    site.open("top.qcow2").unwrap();
    backed(&site, "base", "/etc/shadow", Some("raw"));
    assert!(text(&site, "top.qcow2").contains("`/etc/shadow`"));
}

#[test]
fn data_files_and_encryption_are_refused() {
    let site = Site::new();
    let (path, data) = (site.path("disk"), site.path("data"));
    let option = format!("data_file={},data_file_raw=on", data.display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &option, path.to_str().unwrap(), "1M"]);
    let refusal = text(&site, "disk");
    assert!(refusal.contains("external data file, which is never opened"), "{refusal}");
    // Also where the name is not said.
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(4).position(|word| word == 0x4441_5441_u32.to_be_bytes()).unwrap();
    bytes[at] = 0;
    site.file("disk", &bytes);
    assert!(text(&site, "disk").contains("`(unnamed)` as its external data file"));
    let mut bytes = fs::read(converted(&site, "disk", "qcow2", &[])).unwrap();
    bytes[35] = 1;
    assert_eq!(
        site.refusal("disk", &bytes),
        "the qcow2 image disk cannot be used: it is encrypted"
    );
}

#[test]
fn extents_of_vmdk_have_to_be_beside_it() {
    let site = Site::new();
    site.file("flat.img", &raw_disk());
    let descriptor = |extent: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\n{extent}\n\nddb.adapterType = \"ide\"\n"
        )
    };
    site.file("disk.vmdk", descriptor("RW 2048 FLAT \"flat.img\" 0").as_bytes());
    assert_eq!(site.open("disk.vmdk").unwrap().format, ImageFormat::Vmdk);
    // QEMU agrees that it is an image.
    qemu_img(&["info", "-f", "vmdk", site.path("disk.vmdk").to_str().unwrap()]);
    for (extent, name) in [
        ("RW 2048 FLAT \"/etc/shadow\" 0", "/etc/shadow"),
        ("\t RW\t2048\nFLAT\r\"../x\" 0", "../x"),
        ("RW 2048 FLAT \"flat.img\" 0\nRW 1 FLAT \"/etc/passwd\" 0", "/etc/passwd"),
        ("# RW 1 = \"x\" RW 1 FLAT \"json:{}\" 0", "json:{}"),
        ("parentFileNameHint=\"/etc/shadow\"", "/etc/shadow"),
    ] {
        let refusal = site.refusal("disk.vmdk", descriptor(extent).as_bytes());
        assert!(refusal.contains(&format!("has `{name}` as its ")), "{refusal}");
    }
    // QEMU ends a name with its line, so that quotes cannot be paired over lines.
    let over_lines = "x=\"\nRW 2 VMFS \"/etc/shadow\n";
    for extent in ["RW 1 FLAT \"/etc/shadow", over_lines, "parentFileNameHint = \"x\""] {
        let refusal = site.refusal("disk.vmdk", format!("version=1\n{extent}").as_bytes());
        assert!(refusal.contains("whose name is malformed"), "{refusal}");
    }
}

#[test]
fn a_sparse_vmdk_can_name_files_as_well() {
    let site = Site::new();
    let whole = fs::read(converted(&site, "disk.vmdk", "vmdk", &[])).unwrap();
    let at = whole.windows(4).position(|word| word == b"RW 2").unwrap();
    let end = at + whole[at..].iter().position(|&byte| byte == b'\n').unwrap();
    let mut other = whole.clone();
    let line = b"RW 2048 FLAT \"/etc/x\" 0";
    other[at..end].fill(b' ');
    other[at..at + line.len()].copy_from_slice(line);
    // QEMU ignores what it names as long as the image has a size.
    site.file("disk.vmdk", &other);
    site.open("disk.vmdk").unwrap();
    other[12..20].fill(0);
    let refusal = site.refusal("disk.vmdk", &other);
    assert!(refusal.contains("has `/etc/x` as its extent"), "{refusal}");
    // The same as the extent of a descriptor.
    site.file("inner.vmdk", &other);
    let refusal = site.refusal("outer.vmdk", b"version=1\nRW 2048 SPARSE \"inner.vmdk\"\n");
    assert!(refusal.contains("inner.vmdk has `/etc/x` as its extent"), "{refusal}");
    let mut child = whole;
    let hint = b"parentFileNameHint=\"/etc/y\"\n";
    child[at..at + hint.len()].copy_from_slice(hint);
    let refusal = site.refusal("disk.vmdk", &child);
    assert!(refusal.contains("has `/etc/y` as its parent"), "{refusal}");
}

/// QEMU looks for a parent behind the header, wherever that says that the descriptor is.
#[test]
fn a_sparse_vmdk_has_its_descriptor_in_its_place() {
    let site = Site::new();
    let mut image = fs::read(converted(&site, "disk.vmdk", "vmdk", &[])).unwrap();
    image[28..36].copy_from_slice(&200_u64.to_le_bytes());
    let refusal = site.refusal("disk.vmdk", &image);
    assert!(refusal.contains("its descriptor is not where it belongs"), "{refusal}");
    // Without a descriptor there is nothing to begin with, but it is looked for all the same.
    image[28..36].fill(0);
    let hint = b"parentFileNameHint=\"/etc/y\"\n";
    image[512..512 + hint.len()].copy_from_slice(hint);
    let refusal = site.refusal("disk.vmdk", &image);
    assert!(refusal.contains("has `/etc/y` as its parent"), "{refusal}");
}

/// A guest may have written it to a raw disk.
#[test]
fn only_a_name_that_says_the_format_lets_an_image_have_others_beside_it() {
    let site = Site::new();
    site.file("base.raw", &raw_disk());
    for name in ["disk.raw", "disk.img", "disk", "disk.vmdk"] {
        backed(&site, name, "base.raw", Some("raw"));
        let refusal = text(&site, name);
        assert!(refusal.contains("a name that ends in its format"), "{refusal}");
        let data = open_data(&site.path(name)).unwrap_err().to_string();
        assert!(data.contains("a name that ends in its format"), "{data}");
    }
    backed(&site, "disk.QCOW2", "base.raw", Some("raw"));
    site.open("disk.QCOW2").unwrap();
}

#[test]
fn a_vdi_that_builds_on_another_is_refused() {
    let site = Site::new();
    let mut bytes = fs::read(converted(&site, "disk", "vdi", &[])).unwrap();
    bytes[0x4c] = 4;
    let refusal = site.refusal("disk", &bytes);
    assert_eq!(refusal, "the vdi image disk cannot be used: it is a difference to another image");
}
