//! What of a VM's parts can be checked before it is started.

use std::collections::HashSet;
use std::path::Path;

use vmlab_artifacts::image::ImageFormat;
use vmlab_devices::blk;

use super::{
    Boot, ConfigError, DiskDevice, DiskWrites, Firmware, FirmwareBoot, MAX_COMMAND_LINE,
    MAX_SERIAL, MAX_TAG, ShareDevice, ShareTransport,
};

fn readable(what: &'static str, path: &Path) -> Result<(), ConfigError> {
    std::fs::File::open(path).map(drop).map_err(|source| ConfigError::File {
        what,
        path: path.to_owned(),
        source,
    })
}

pub(super) fn check_boot(boot: &Boot) -> Result<(), ConfigError> {
    match boot {
        Boot::Kernel(kernel) => {
            readable("kernel image", &kernel.image)?;
            readable("initramfs", &kernel.initramfs)?;
            check_command_line(&kernel.command_line)
        }
        Boot::Firmware(FirmwareBoot { firmware, .. }) => match firmware {
            Firmware::Bios => Ok(()),
            Firmware::File(file) => readable("firmware", file),
            Firmware::Uefi { code, vars, .. } => {
                readable("firmware", code)?;
                readable("store of the firmware's variables", vars)
            }
        },
    }
}

pub(crate) fn check_disks(disks: &[DiskDevice]) -> Result<(), ConfigError> {
    let mut serials = HashSet::new();
    for DiskDevice { serial, path, writes, format, serve, keep: _ } in disks {
        if !is_serial(serial) {
            return Err(ConfigError::Serial { serial: serial.clone() });
        }
        if !serials.insert(serial) {
            return Err(ConfigError::DuplicateSerial { serial: serial.clone() });
        }
        let writable = *writes == DiskWrites::Kept;
        let opened = std::fs::File::options().read(true).write(writable).open(path);
        opened.map_err(|source| ConfigError::File { what: "disk", path: path.clone(), source })?;
        if path.to_str().is_none() {
            return Err(ConfigError::DiskEncoding { path: path.clone() });
        }
        if serve.is_some() && *format != ImageFormat::Raw {
            let format = format.name();
            return Err(ConfigError::ServedFormat { path: path.clone(), format });
        }
        if let Some(blk::Options { queues, .. }) = *serve
            && !(1..=blk::MAX_QUEUES).contains(&queues)
        {
            return Err(ConfigError::Queues { serial: serial.clone(), queues });
        }
    }
    Ok(())
}

/// Whether a disk can have this name.
pub(crate) fn is_serial(name: &str) -> bool {
    (1..=MAX_SERIAL).contains(&name.len()) && name.chars().all(is_plain)
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

pub(super) fn check_command_line(line: &str) -> Result<(), ConfigError> {
    if line.len() > MAX_COMMAND_LINE {
        return Err(ConfigError::CommandLineLength { len: line.len() });
    }
    match line.chars().find(|c| c.is_control()) {
        Some(found) => Err(ConfigError::CommandLineCharacter { found }),
        None => Ok(()),
    }
}

pub(super) fn check_shares(shares: &[ShareDevice]) -> Result<(), ConfigError> {
    let mut tags = HashSet::new();
    for share in shares {
        let fits = (1..=MAX_TAG).contains(&share.tag.len());
        if !fits || !share.tag.chars().all(is_plain) {
            return Err(ConfigError::Tag { tag: share.tag.clone() });
        }
        if !tags.insert(&share.tag) {
            return Err(ConfigError::DuplicateTag { tag: share.tag.clone() });
        }
        if share.transport == ShareTransport::NineP && share.path.to_str().is_none() {
            return Err(ConfigError::PathEncoding { path: share.path.clone() });
        }
        match std::fs::metadata(&share.path) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(ConfigError::NotADirectory { path: share.path.clone() }),
            Err(source) => {
                let path = share.path.clone();
                return Err(ConfigError::File { what: "shared directory", path, source });
            }
        }
    }
    Ok(())
}
