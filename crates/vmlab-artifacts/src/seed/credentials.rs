//! Credentials that make systemd (256 and later) start the agent from the seed drive.
//! Checked with the 257 of Debian 13.

use super::{LABEL, loader};
use crate::base64;

/// The unit, which the script gives to a unit of its own making, too: it is there once.
const UNIT: &str = "vmlab-agent.service";

/// What is reached in each boot; rescue and emergency mode have other targets.
const WANTED_BY: &str = "basic.target";

/// Strings for SMBIOS (OEM strings, type 11), one for each credential.
///
/// The names are those of systemd.system-credentials(7), the form is that of systemd(1).
pub fn smbios_credentials() -> Vec<String> {
    // It waits for udev, not for file systems; a unit that the target only wants delays nobody. On a
    // slow machine the devices may come later than systemd waits for them.
    let unit = format!(
        "[Unit]
Description=Agent of vmlab
DefaultDependencies=no
IgnoreOnIsolate=yes
StartLimitIntervalSec=0
Wants=dev-disk-by\\x2dlabel-{LABEL}.device dev-virtio\\x2dports-vmlab.device
After={WANTED_BY} dev-disk-by\\x2dlabel-{LABEL}.device dev-virtio\\x2dports-vmlab.device

[Service]
OOMPolicy=continue
TasksMax=infinity
Restart=on-failure
RestartSec=2
ExecStart=/bin/sh -c '{}'
",
        // Both characters have a meaning in units.
        loader("here").replace('%', "%%").replace('$', "$$")
    );
    let wants = format!("[Unit]\nWants={UNIT}\n");
    [
        (format!("systemd.extra-unit.{UNIT}"), unit),
        (format!("systemd.unit-dropin.{WANTED_BY}~vmlab"), wants),
    ]
    .map(|(name, content)| {
        let content = base64::encode(content.as_bytes());
        format!("io.systemd.credential.binary:{name}={content}")
    })
    .to_vec()
}
