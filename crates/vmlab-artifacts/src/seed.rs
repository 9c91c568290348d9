//! The drive that brings vmlab's agent into a booted disk image: a NoCloud seed of cloud-init, which
//! also systemd's credentials and QEMU's guest agent start the agent from.
//!
//! ```text
//! sector 15   `vmlab-seed 1 BLOCK BLOCKS`: where the agent is, in 64 KiB
//! sector 21   start, as long as START_SECTORS
//! then        user-data, meta-data, vmlab-agent
//! ```
//!
//! Whoever starts the agent reads these sectors from the drive as it is: no file system has to be
//! mounted, nor does the guest's kernel need to have its driver.

mod credentials;
mod iso9660;
#[cfg(test)]
mod tests;

pub use credentials::{UNIT_FILE, smbios_credentials};

use crate::cache::Digest;
use iso9660::{File, SECTOR};

/// The volume label by which cloud-init knows a seed.
pub const LABEL: &str = "cidata";

/// The shell script that starts the agent in a booted system, to be run by `sh -c`. It says at its head
/// which arguments it takes and how it exits.
pub const START_AGENT: &str = include_str!("seed/start-agent.sh");

/// `START_AGENT` could not find the seed drive.
pub const EXIT_NO_DRIVE: i64 = 4;

/// The sector of the system area that says where the agent is. The first ones would be read as a
/// partition table.
const HEAD_SECTOR: usize = 15;

/// What the agent is read by: a slow guest takes seconds for a thousand sectors one by one.
const BLOCK: usize = 64 << 10;

/// The room of the script, so that its end is known without looking.
const START_SECTORS: usize = 3;

const _: () = assert!(START_AGENT.len() <= START_SECTORS * SECTOR, "START_SECTORS is to be raised");

/// A drive with the agent. What is written to a guest's disk is kept if `persist` says so.
///
/// Of the guest's configuration it changes nothing: of cloud-init's modules only the one runs that starts
/// the agent.
pub fn seed_image(agent: &[u8], persist: bool) -> Vec<u8> {
    let user_data = user_data();
    // Another id makes cloud-init forget what it has done to this machine. That must not happen to a
    // disk that is kept each time when vmlab has a new agent, which cloud-init never looks at.
    let mut identity = user_data.clone().into_bytes();
    if !persist {
        identity.extend(START_AGENT.as_bytes());
        identity.extend(agent);
    }
    let digest = Digest::of(&identity).to_string();
    let meta_data = format!("instance-id: vmlab-{}\n", &digest[..32]);
    let mut start = START_AGENT.as_bytes().to_vec();
    // A shell skips what follows the script.
    start.resize(START_SECTORS * SECTOR, b'\n');
    let file = |name, short_name, content| File { name, short_name, content, align: 1 };
    let files = [
        file("start", "START.", &start),
        file("user-data", "USERDATA.", user_data.as_bytes()),
        file("meta-data", "METADATA.", meta_data.as_bytes()),
        File { align: BLOCK / SECTOR, ..file("vmlab-agent", "AGENT.", agent) },
    ];
    let places = iso9660::places(&files);
    let mut system = vec![0; HEAD_SECTOR * SECTOR];
    let head =
        format!("vmlab-seed 1 {} {}\n", places[3] * SECTOR / BLOCK, agent.len().div_ceil(BLOCK));
    system.extend(head.as_bytes());
    iso9660::image(LABEL, &system, &files)
}

/// The shell command that reads the script from the drive and runs it. Another drive with the label
/// is left alone.
fn loader(how: &str) -> String {
    let first = iso9660::FIRST_FILE;
    format!(
        "s=$(dd if=/dev/disk/by-label/{LABEL} bs={SECTOR} skip={first} count={START_SECTORS} \
         2>/dev/null); case $s in \"# vmlab-start 1\"*) exec sh -c \"$s\" start {how};; esac"
    )
}

/// Configuration for cloud-init. The lists of modules say what it does, and the rest makes sure of it
/// where an image's own configuration puts a module elsewhere.
fn user_data() -> String {
    format!(
        "#cloud-config
cloud_init_modules: [bootcmd]
cloud_config_modules: []
cloud_final_modules: []
preserve_hostname: true
manage_etc_hosts: false
ssh_deletekeys: false
disable_root: false
users: []
package_update: false
package_upgrade: false
package_reboot_if_required: false
resize_rootfs: false
growpart: {{mode: 'off'}}
bootcmd:
- - sh
  - -c
  - |
    {}
",
        loader("detached")
    )
}
