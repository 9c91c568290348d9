//! QEMU's firmware descriptors.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::Uefi;
use crate::image::ImageFormat;

/// The longest descriptor that is read, in bytes. They have about one thousand.
const DESCRIPTOR_MAX: u64 = 1 << 20;

/// The machine that images are booted on, as a versioned name of it.
const MACHINE: &str = "pc-q35-";

#[derive(Deserialize)]
struct Descriptor {
    #[serde(rename = "interface-types")]
    interface_types: Vec<String>,
    mapping: Mapping,
    targets: Vec<Target>,
    #[serde(default)]
    features: Vec<String>,
}

/// Other devices than flash have other members.
#[derive(Deserialize)]
struct Mapping {
    device: String,
    /// `split` if it is not said; others have no store of variables.
    mode: Option<String>,
    executable: Option<Flash>,
    #[serde(rename = "nvram-template")]
    nvram_template: Option<Flash>,
}

#[derive(Deserialize)]
struct Flash {
    filename: PathBuf,
    format: String,
}

#[derive(Deserialize)]
struct Target {
    architecture: String,
    machines: Vec<String>,
}

/// The first that fits, in the order of their file names; a directory's files come before those of the
/// same name in the directories after it. Tells in `looked` what did not fit.
pub(super) fn find(
    root: &Path,
    dirs: &[PathBuf],
    secure_boot: bool,
    looked: &mut Vec<String>,
) -> Option<Uefi> {
    let mut files = BTreeMap::new();
    for dir in dirs {
        let listing = fs::read_dir(dir);
        looked.push(match &listing {
            Ok(_) => format!("{}/*.json", dir.display()),
            Err(_) => dir.display().to_string(),
        });
        for item in listing.into_iter().flatten().flatten() {
            let name = item.file_name();
            if Path::new(&name).extension().is_some_and(|extension| extension == "json") {
                files.entry(name).or_insert_with(|| item.path());
            }
        }
    }
    for path in files.into_values() {
        // An empty one hides another of its name, and is not said to be wrong.
        match read(&path) {
            Ok(None) => {}
            Ok(Some(descriptor)) => match usable(root, &descriptor, secure_boot) {
                Ok(Some(uefi)) => return Some(uefi),
                Ok(None) => {}
                Err(why) => looked.push(format!("{} ({why})", path.display())),
            },
            Err(why) => looked.push(format!("{} ({why})", path.display())),
        }
    }
    None
}

fn read(path: &Path) -> Result<Option<Descriptor>, String> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| format!("cannot be read: {e}"))?;
    file.take(DESCRIPTOR_MAX)
        .read_to_end(&mut bytes)
        .map_err(|e| format!("cannot be read: {e}"))?;
    if bytes.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|e| format!("is no descriptor: {e}"))
}

/// What a descriptor has, if it is what is wanted, or why it cannot be used although it is.
fn usable(root: &Path, descriptor: &Descriptor, secure_boot: bool) -> Result<Option<Uefi>, String> {
    let has = |feature: &str| descriptor.features.iter().any(|name| name == feature);
    let Descriptor { interface_types, mapping, targets, .. } = descriptor;
    let for_machine = targets.iter().any(|target| {
        target.architecture == "x86_64"
            && target.machines.iter().any(|pattern| matches_machine(pattern))
    });
    let split = mapping.mode.as_deref().is_none_or(|mode| mode == "split");
    // Secure boot without keys lets everything pass, but its firmware needs what others do not.
    let wanted = interface_types.iter().any(|name| name == "uefi")
        && for_machine
        && mapping.device == "flash"
        && split
        && has("secure-boot") == secure_boot
        && has("enrolled-keys") == secure_boot
        && !has("amd-sev-snp")
        && !has("intel-tdx");
    let (true, Some(code), Some(vars)) = (wanted, &mapping.executable, &mapping.nvram_template)
    else {
        return Ok(None);
    };
    let format = match (code.format.as_str(), vars.format.as_str()) {
        ("raw", "raw") => ImageFormat::Raw,
        ("qcow2", "qcow2") => ImageFormat::Qcow2,
        (code, vars) => return Err(format!("has the formats {code} and {vars}")),
    };
    let file = |flash: &Flash| {
        let path = root.join(flash.filename.strip_prefix("/").unwrap_or(&flash.filename));
        match path.is_file() {
            true => Ok(path),
            false => Err(format!("names {}, which is not there", path.display())),
        }
    };
    let (code, vars) = (file(code)?, file(vars)?);
    Ok(Some(Uefi { code, vars, format, secure_boot, smm: has("requires-smm") }))
}

/// Machines are named by patterns, of which only the star occurs, at the end.
fn matches_machine(pattern: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(head) => MACHINE.starts_with(head) || head.starts_with(MACHINE),
        None => pattern == "q35" || pattern.starts_with(MACHINE),
    }
}
