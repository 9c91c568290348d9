//! A crate whose tests run in virtual machines: `cargo test -p kernel-tests`.

use std::fs;
use std::io;

/// The running kernel's release.
///
/// # Errors
/// When `/proc` is not there.
pub fn release() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiled into the program on the host, which the guest runs as well.
    #[vmlab::test]
    fn the_kernel_is_the_guests() -> io::Result<()> {
        assert!(release()?.starts_with("6.12."), "{}", release()?);
        Ok(())
    }
}
