//! Which program and which host this is, for what is remembered from one run to the next.

use std::io::{self, Read};
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

/// What identifies the host's processor and what it can do: the beginning of /proc/cpuinfo, without what
/// changes from moment to moment.
///
/// # Errors
/// It cannot be read.
pub(crate) fn processor() -> io::Result<String> {
    /// Enough for the first processor; all are alike.
    const FIRST: u64 = 8192;
    let mut text = Vec::new();
    std::fs::File::open("/proc/cpuinfo")?.take(FIRST).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().take_while(|line| !line.is_empty());
    let changing = |line: &&str| !["cpu MHz", "bogomips"].iter().any(|name| line.starts_with(name));
    Ok(lines.filter(changing).collect::<Vec<_>>().join("\n"))
}

/// What nobody else has in a key: nothing is found under it.
fn unique() -> String {
    format!("{} {:?}", std::process::id(), SystemTime::now())
}
