//! Running the host's depmod.

use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use super::ModulesError;
use crate::{child, find_program};

/// How much of depmod's messages an error repeats, in bytes.
const MESSAGE_LEN_MAX: usize = 2048;

/// Makes the index files of the module tree `BASE/lib/modules/RELEASE` with the host's depmod.
///
/// Packages come without them, because installing them would run depmod. It reads every module,
/// which takes some seconds for the thousands of compressed ones of a distribution kernel.
pub fn depmod(base: &Path, release: &str) -> Result<(), ModulesError> {
    let dir = tree_dir(base, release)?;
    // depmod of a missing tree can succeed and make an empty index.
    std::fs::read_dir(&dir).map_err(|source| ModulesError::Read { path: dir.clone(), source })?;
    let program = find_program("depmod").ok_or(ModulesError::NoDepmod)?;
    let mut command = Command::new(&program);
    command.arg("-b").arg(base).arg(release).stdin(Stdio::null());
    child::dies_with_us(&mut command);
    let output = command.output().map_err(|source| ModulesError::RunDepmod { program, source })?;
    let failed = || {
        let stderr = &output.stderr;
        let tail = &stderr[stderr.len().saturating_sub(MESSAGE_LEN_MAX)..];
        ModulesError::Depmod {
            base: base.to_owned(),
            release: release.to_owned(),
            status: output.status,
            message: String::from_utf8_lossy(tail).trim().to_owned(),
        }
    };
    // It reports some errors without an exit status that says so.
    let index_len = dir.join("modules.dep").metadata().map(|index| index.len());
    match index_len {
        Ok(len) if output.status.success() => {
            let expected = dir.join("modules.order").metadata().is_ok_and(|order| order.len() > 0);
            // It passes over modules in a compression that it was built without.
            if len == 0 && expected { Err(ModulesError::NothingIndexed { dir }) } else { Ok(()) }
        }
        _ => Err(failed()),
    }
}

/// `BASE/lib/modules/RELEASE`, for a release that is one file name.
pub(super) fn tree_dir(base: &Path, release: &str) -> Result<PathBuf, ModulesError> {
    let mut parts = Path::new(release).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) if name == release && !release.starts_with('-') => {
            Ok(base.join("lib/modules").join(release))
        }
        _ => Err(ModulesError::BadRelease { release: release.to_owned() }),
    }
}
