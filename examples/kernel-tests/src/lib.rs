//! A crate whose tests run in virtual machines: `cargo test -p kernel-tests`.

/// The running kernel's release, if `/proc` is there.
pub fn release() -> Option<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    Some(release.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiled into the program on the host, which the guest runs as well.
    #[vmlab::test]
    fn the_kernel_is_the_guests() {
        assert!(release().is_some_and(|release| release.starts_with("6.12.")), "{:?}", release());
    }
}
