use std::fs;

use super::*;

/// A cache with one whole entry of a known kind, and one of an unknown kind.
fn site() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path());
    let fill = |dir: &Path| -> Result<(), CacheError> {
        fs::write(dir.join("initramfs.cpio"), "archive").unwrap();
        fs::write(dir.join("initramfs.cpio.length"), "7").unwrap();
        Ok(())
    };
    cache.get_or_build("initramfs", "a", |_| Ok(()), fill).unwrap();
    cache.get_or_build("of-tomorrow", "b", |_| Ok(()), fill).unwrap();
    (dir, cache)
}

fn damage(cache: &Cache) {
    fs::write(cache.root().join("initramfs/a/initramfs.cpio"), "arch").unwrap();
}

#[test]
fn every_kind_has_a_name_of_its_own() {
    let mut names: Vec<&str> = kinds().map(|kind| kind.name).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "apt",
            "boot-images",
            "configs",
            "disks",
            "headers",
            "images",
            "initramfs",
            "kernels",
            "linked-modules",
            "modules",
            "seeds",
            "snapshots",
            "unpacked-images"
        ],
        "a kind was added: name it in the table of ARCHITECTURE.md, too"
    );
    assert!(!names.contains(&REMEMBERED));
}

#[test]
fn an_empty_entry_is_damaged_whatever_its_kind() {
    let dir = tempfile::tempdir().unwrap();
    // An apt root has no index until apt has fetched one.
    for kind in kinds().filter(|kind| kind.name != "apt") {
        assert!(verify_entry(kind.name, dir.path()).unwrap().is_err(), "{}", kind.name);
    }
    assert!(verify_entry("apt", dir.path()).unwrap().is_ok());
    fs::write(dir.path().join("index.json"), "{").unwrap();
    assert!(verify_entry("apt", dir.path()).unwrap().is_err());
    assert!(verify_entry("of-tomorrow", dir.path()).is_none());
}

#[test]
fn what_is_damaged_is_named_and_removed_if_wanted() {
    let (_dir, cache) = site();
    let found = verify(&cache, &[], false).unwrap();
    assert_eq!(found, Verification { verified: 1, damaged: Vec::new(), unknown: 1 });
    damage(&cache);
    let found = verify(&cache, &["initramfs".to_owned()], false).unwrap();
    assert_eq!((found.verified, found.unknown), (1, 0));
    let [damaged] = &found.damaged[..] else { panic!("{found:?}") };
    assert_eq!((damaged.key.as_str(), damaged.removed), ("a", false));
    assert_eq!(damaged.flaw, "4 bytes instead of 7");

    let lease = cache.lease("initramfs", "a").unwrap();
    assert!(!verify(&cache, &[], true).unwrap().damaged[0].removed, "it is in use");
    drop(lease);
    assert!(verify(&cache, &[], true).unwrap().damaged[0].removed);
    let found = verify(&cache, &[], true).unwrap();
    assert_eq!(found, Verification { verified: 0, damaged: Vec::new(), unknown: 1 });
    // What is not known is left alone.
    assert_eq!(cache.entries("of-tomorrow").unwrap().len(), 1);
}

#[test]
fn kinds_are_cleared_by_name() {
    let (_dir, cache) = site();
    let error = clear(&cache, &["initrd".to_owned()]).unwrap_err().to_string();
    assert!(error.contains("no kind `initrd`; there are apt, boot-images, configs"), "{error}");
    assert!(error.contains("of-tomorrow, remembered"), "{error}");
    assert!(verify(&cache, &["initrd".to_owned()], false).is_err());

    let kinds_there = || cache.kinds().unwrap();
    cache.remember("s", "k", &Default::default(), &1);
    let removed = clear(&cache, &["of-tomorrow".to_owned()]).unwrap();
    assert_eq!((removed.len(), removed[0].entries), (1, 1));
    assert_eq!(cache.recall("s", "k"), Some(1));
    assert!(clear(&cache, &["kernels".to_owned()]).unwrap().is_empty());
    assert_eq!(list(&cache).unwrap().entries.len(), 1);

    let removed = clear(&cache, &[REMEMBERED.to_owned()]).unwrap();
    assert_eq!((removed[0].kind.as_str(), removed[0].entries), (REMEMBERED, 1));
    assert_eq!(cache.recall::<u64>("s", "k"), None);
    assert_eq!(list(&cache).unwrap().entries.len(), 1);
    let removed = clear(&cache, &[]).unwrap();
    assert_eq!((removed[0].kind.as_str(), removed[0].entries), ("initramfs", 1));
    let contents = list(&cache).unwrap();
    assert_eq!((contents.entries.len(), contents.bytes), (0, 0));
    assert_eq!(kinds_there(), ["initramfs", "of-tomorrow"]);
}

#[test]
fn garbage_is_what_is_beyond_a_bound() {
    let (_dir, cache) = site();
    let kind = kinds().find(|kind| kind.name == "initramfs").unwrap();
    let Bound::Entries(bound) = kind.bound else { panic!("{kind:?}") };
    for n in 0..bound + 2 {
        let fill = |_: &Path| -> Result<(), CacheError> { Ok(()) };
        cache.get_or_build("initramfs", &format!("n{n}"), |_| Ok(()), fill).unwrap();
    }
    let removed = collect_garbage(&cache, None).unwrap();
    assert_eq!((removed.len(), removed[0].entries), (1, 3));
    assert_eq!(cache.entries("initramfs").unwrap().len(), bound);
    assert_eq!(cache.entries("of-tomorrow").unwrap().len(), 1);
    assert!(collect_garbage(&cache, Some(u64::MAX)).unwrap().is_empty());
    let removed = collect_garbage(&cache, Some(0)).unwrap();
    assert_eq!((removed[0].kind.as_str(), removed[0].entries), ("all kinds", bound + 1));
}
