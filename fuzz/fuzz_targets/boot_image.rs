//! A file that a user says is a kernel: headers, payload, ELF, version string, configuration.
#![no_main]

use std::cell::RefCell;
use std::io::{Seek, Write};

use libfuzzer_sys::fuzz_target;
use tempfile::NamedTempFile;
use vmlab_artifacts::boot_image::{self, BootImage};
use vmlab_artifacts::kconfig::KernelConfig;

thread_local! {
    static FILE: RefCell<NamedTempFile> =
        RefCell::new(NamedTempFile::new_in("/dev/shm").expect("a temporary file"));
}

fuzz_target!(|data: &[u8]| {
    FILE.with_borrow_mut(|file| {
        file.as_file().set_len(0).expect("truncated");
        file.rewind().expect("rewound");
        file.write_all(data).expect("written");
        if let Ok(image) = BootImage::open(file.path()) {
            assert_eq!(image.file_len(), data.len() as u64);
            let _ = (image.arch(), image.format(), image.compression(), image.pvh_entry());
            if let (Some(release), Some(version)) = (image.release(), image.version_string()) {
                assert!(version.starts_with(release), "{release:?} {version:?}");
            }
            if let Ok(Some(vmlinux)) = image.extract() {
                let _ = boot_image::pvh_entry(&vmlinux);
            }
        }
    });
    let _ = boot_image::pvh_entry(data);
    let _ = KernelConfig::from_ikconfig(data);
});
