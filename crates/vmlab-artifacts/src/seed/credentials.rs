//! Credentials that make systemd start the agent from the seed drive: from 256 on by units in them, from 252 on
//! by files for systemd-tmpfiles. Checked with the 252 of Debian 12 and the 257 of Debian 13.

use super::{LABEL, loader};
use crate::base64;

/// The unit, which the script gives to a unit of its own making, too: it is there once.
const UNIT: &str = "vmlab-agent.service";

/// Where systemd-tmpfiles puts it, for a systemd that takes no units from credentials.
pub const UNIT_FILE: &str = "/run/systemd/system/vmlab-agent.service";

/// What is reached in each boot; rescue and emergency mode have other targets.
const WANTED_BY: &str = "basic.target";

/// Has udev want the unit, since systemd looks for no units that come while it starts others.
const RULE: &str = concat!(
    "SUBSYSTEM==\"virtio-ports\", ATTR{name}==\"vmlab\", TAG+=\"systemd\", ",
    "ENV{SYSTEMD_WANTS}+=\"vmlab-agent.service\"\n"
);

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
Nice=-20
Restart=on-failure
RestartSec=2
ExecStart=/bin/sh -c '{}'
",
        // Both characters have a meaning in units.
        loader("here").replace('%', "%%").replace('$', "$$")
    );
    let wants = format!("[Unit]\nWants={UNIT}\n");
    let encoded = |text: &str| base64::encode(text.as_bytes());
    // The last line has udev look at the ports once more, for they may be there already: tmpfiles.d(5).
    let files = format!(
        "f~ {UNIT_FILE} 0644 - - - {}
f~ /run/udev/rules.d/99-vmlab.rules 0644 - - - {}
w /sys/class/virtio-ports/*/uevent - - - - change
",
        encoded(&unit),
        encoded(RULE)
    );
    [
        (format!("systemd.extra-unit.{UNIT}"), unit),
        (format!("systemd.unit-dropin.{WANTED_BY}~vmlab"), wants),
        ("tmpfiles.extra".to_owned(), files),
    ]
    .map(|(name, content)| format!("io.systemd.credential.binary:{name}={}", encoded(&content)))
    .to_vec()
}
