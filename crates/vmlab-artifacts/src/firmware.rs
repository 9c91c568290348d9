//! UEFI firmware for guests: OVMF, as the host's distribution installs it.
//!
//! QEMU's firmware descriptors (`docs/interop/firmware.json`) say what there is and what it can. Hosts
//! without them, or with descriptors of files that are gone, have it in a few usual places.

mod descriptor;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::image::ImageFormat;

/// Names the two files, `CODE:VARS`, instead of any search.
pub const OVMF_ENV: &str = "VMLAB_OVMF";

/// A firmware, and the contents of its variables to begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uefi {
    /// The program: flash that is not written to.
    pub code: PathBuf,
    /// The variables that a new machine has. A VM writes to a copy.
    pub vars: PathBuf,
    /// The format of both files, raw or qcow2.
    pub format: ImageFormat,
    /// Whether it refuses to boot what is not signed: it can, and has keys.
    pub secure_boot: bool,
    /// Whether it needs system management mode (`-machine smm=on`, and flash that only this mode
    /// writes to: `-global driver=cfi.pflash01,property=secure,value=on`).
    pub smm: bool,
}

/// Why there is no firmware.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FirmwareError {
    /// It is not installed, or somewhere else.
    #[error(
        "there is no UEFI firmware{} on this host; install the package {PACKAGES}, or set {OVMF_ENV}=CODE:VARS; \
         looked at {}", if *secure_boot { " with secure boot and its keys" } else { "" }, looked.join(", ")
    )]
    NotFound {
        /// Whether one with secure boot was wanted.
        secure_boot: bool,
        /// All places, and what was wrong with those that are there.
        looked: Vec<String>,
    },
    /// The variable's value is wrong.
    #[error("{OVMF_ENV} is `{}`, {why}; give two files as CODE:VARS", value.display())]
    Variable {
        /// Its value.
        value: OsString,
        /// What is wrong with it, a clause.
        why: String,
    },
}

/// Who has what name for it.
const PACKAGES: &str =
    "ovmf (Debian, Ubuntu), edk2-ovmf (Fedora, Arch) or qemu-ovmf-x86_64 (openSUSE)";

/// Finds the firmware for an x86_64 guest with the q35 machine; for secure boot, one that has keys.
///
/// # Errors
/// [`FirmwareError`], which names the places that were looked at.
pub fn find_uefi(secure_boot: bool) -> Result<Uefi, FirmwareError> {
    let variable = |name: &str| std::env::var_os(name);
    Search { root: Path::new("/"), variable: &variable }.find(secure_boot)
}

/// Firmware in a place that distributions agree on.
struct Usual {
    code: &'static str,
    vars: &'static str,
    secure_boot: bool,
    smm: bool,
}

const fn usual(code: &'static str, vars: &'static str) -> Usual {
    Usual { code, vars, secure_boot: false, smm: false }
}

/// With the keys of Microsoft, by which distributions' loaders are signed.
const fn enrolled(code: &'static str, vars: &'static str) -> Usual {
    Usual { code, vars, secure_boot: true, smm: true }
}

/// The larger ones first: what is signed today does not fit into 2 MiB with all of its keys.
const USUAL: &[Usual] = &[
    // Debian, Ubuntu
    usual("usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd"),
    usual("usr/share/OVMF/OVMF_CODE.fd", "usr/share/OVMF/OVMF_VARS.fd"),
    enrolled("usr/share/OVMF/OVMF_CODE_4M.ms.fd", "usr/share/OVMF/OVMF_VARS_4M.ms.fd"),
    enrolled("usr/share/OVMF/OVMF_CODE.ms.fd", "usr/share/OVMF/OVMF_VARS.ms.fd"),
    // Fedora, RHEL
    usual("usr/share/edk2/ovmf/OVMF_CODE.fd", "usr/share/edk2/ovmf/OVMF_VARS.fd"),
    enrolled(
        "usr/share/edk2/ovmf/OVMF_CODE.secboot.fd",
        "usr/share/edk2/ovmf/OVMF_VARS.secboot.fd",
    ),
    // Arch
    usual("usr/share/edk2/x64/OVMF_CODE.4m.fd", "usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    usual("usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "usr/share/edk2-ovmf/x64/OVMF_VARS.fd"),
    // openSUSE
    usual("usr/share/qemu/ovmf-x86_64-4m-code.bin", "usr/share/qemu/ovmf-x86_64-4m-vars.bin"),
    usual("usr/share/qemu/ovmf-x86_64-code.bin", "usr/share/qemu/ovmf-x86_64-vars.bin"),
    enrolled(
        "usr/share/qemu/ovmf-x86_64-smm-ms-code.bin",
        "usr/share/qemu/ovmf-x86_64-smm-ms-vars.bin",
    ),
    // NixOS: as part of QEMU, or by virtualisation.libvirtd; the code has Intel's old name for it.
    usual(
        "run/current-system/sw/share/qemu/edk2-x86_64-code.fd",
        "run/current-system/sw/share/qemu/edk2-i386-vars.fd",
    ),
    usual("run/libvirt/nix-ovmf/OVMF_CODE.fd", "run/libvirt/nix-ovmf/OVMF_VARS.fd"),
    // QEMU's own, where it was installed from source.
    usual("usr/local/share/qemu/edk2-x86_64-code.fd", "usr/local/share/qemu/edk2-i386-vars.fd"),
    usual("usr/share/qemu/edk2-x86_64-code.fd", "usr/share/qemu/edk2-i386-vars.fd"),
];

/// Where to look.
struct Search<'a> {
    root: &'a Path,
    variable: &'a dyn Fn(&str) -> Option<OsString>,
}

impl Search<'_> {
    fn find(&self, secure_boot: bool) -> Result<Uefi, FirmwareError> {
        if let Some(value) = (self.variable)(OVMF_ENV) {
            return named(&value, secure_boot);
        }
        let mut looked = Vec::new();
        let dirs = self.descriptor_dirs();
        if let Some(uefi) = descriptor::find(self.root, &dirs, secure_boot, &mut looked) {
            return Ok(uefi);
        }
        for place in USUAL.iter().filter(|place| place.secure_boot == secure_boot) {
            let (code, vars) = (self.root.join(place.code), self.root.join(place.vars));
            let missing = [&code, &vars].into_iter().find(|file| !file.is_file());
            if let Some(missing) = missing {
                looked.push(missing.display().to_string());
                continue;
            }
            let Usual { secure_boot, smm, .. } = *place;
            return Ok(Uefi { code, vars, format: ImageFormat::Raw, secure_boot, smm });
        }
        Err(FirmwareError::NotFound { secure_boot, looked })
    }

    /// The directories of descriptors, in QEMU's order: a file in one hides those of the same name in
    /// the ones after it.
    fn descriptor_dirs(&self) -> Vec<PathBuf> {
        let set = |name: &str| (self.variable)(name).filter(|value| !value.is_empty());
        let config = set("XDG_CONFIG_HOME")
            .map(PathBuf::from)
            .or_else(|| set("HOME").map(|home| Path::new(&home).join(".config")));
        let own = config.filter(|dir| dir.is_absolute()).map(|dir| dir.join("qemu/firmware"));
        let of_host = ["etc/qemu/firmware", "usr/share/qemu/firmware"];
        own.into_iter().chain(of_host.map(|dir| self.root.join(dir))).collect()
    }
}

/// The files that the user names. Which of them need system management mode is not to be seen; those
/// with secure boot do.
fn named(value: &OsStr, secure_boot: bool) -> Result<Uefi, FirmwareError> {
    let wrong = |why: String| FirmwareError::Variable { value: value.to_owned(), why };
    let bytes = value.as_bytes();
    let Some(colon) = bytes.iter().position(|&byte| byte == b':') else {
        return Err(wrong("which has no colon".to_owned()));
    };
    let path = |bytes| PathBuf::from(OsStr::from_bytes(bytes));
    let (code, vars) = (path(&bytes[..colon]), path(&bytes[colon + 1..]));
    let absolute = |file: PathBuf| match file.metadata() {
        Ok(meta) if meta.is_file() => std::path::absolute(&file)
            .map_err(|error| wrong(format!("and {} has no path ({error})", file.display()))),
        Ok(_) => Err(wrong(format!("and {} is no file", file.display()))),
        Err(error) => Err(wrong(format!("and {} cannot be used ({error})", file.display()))),
    };
    let (code, vars) = (absolute(code)?, absolute(vars)?);
    let format = match std::fs::File::open(&code).map(|file| crate::image::is_qcow2(&file)) {
        Ok(true) => ImageFormat::Qcow2,
        _ => ImageFormat::Raw,
    };
    Ok(Uefi { code, vars, format, secure_boot, smm: secure_boot })
}
