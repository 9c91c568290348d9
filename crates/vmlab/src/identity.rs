//! Which program and which host this is, for what is remembered from one run to the next.

use std::io;
use std::path::Path;
use std::time::SystemTime;

use vmlab_artifacts::ContentKey;
use vmlab_artifacts::cache::ContentStamp;

/// Adds this very build of the program to a key, so that what another one has worked out is not taken for
/// what this one would.
pub(crate) fn of_this_program(key: ContentKey) -> ContentKey {
    match ContentStamp::of(Path::new("/proc/self/exe")) {
        Ok(stamp) => key.field("program", format!("{stamp:?}")),
        Err(_) => key.field("no program", unique()),
    }
}

/// Adds the host and the time since it was booted to a key.
pub(crate) fn of_this_boot(key: ContentKey) -> ContentKey {
    match boot_id() {
        Ok(id) if !id.is_empty() => key.field("boot", id),
        _ => key.field("no boot", unique()),
    }
}

/// What the host's kernel calls the time since it was booted: `Documentation/admin-guide/sysctl/kernel.rst`.
///
/// # Errors
/// When it does not say.
pub(crate) fn boot_id() -> io::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim_end().to_owned())
}

/// What nobody else has in a key: nothing is found under it.
fn unique() -> String {
    format!("{} {:?}", std::process::id(), SystemTime::now())
}
