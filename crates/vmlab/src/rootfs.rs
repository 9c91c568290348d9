//! Files of the root that cannot be in the guest as they are on the host.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use vmlab_wire::message::File;

use crate::config::NetworkMode;
use crate::random;

/// The name server of QEMU's user-mode network.
const USER_NETWORK_DNS: &str = "10.0.2.3";

/// What the names of guests begin with that are given none. The rest is each one's own.
const HOSTNAME: &str = "vmlab-";

/// Digits behind it: enough for all guests of a host at a time.
const HOSTNAME_DIGITS: usize = 6;

/// Digits of a machine id, as machine-id(5) has them.
const MACHINE_ID_DIGITS: usize = 32;

/// Where the machine id is.
const MACHINE_ID: &str = "etc/machine-id";

/// What makes a guest with some root another one than the host and than all other guests.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// Its root, where that is a directory of the host.
    pub(crate) root: Option<PathBuf>,
    /// Its host name, if it is given one.
    pub(crate) hostname: Option<String>,
    pub(crate) network: NetworkMode,
}

impl Identity {
    /// A guest's host name, and the files that it gets.
    ///
    /// # Errors
    /// When the host has no random numbers.
    pub(crate) fn fresh(&self) -> io::Result<(String, Vec<File>)> {
        let hostname = match &self.hostname {
            Some(name) => name.clone(),
            None => format!("{HOSTNAME}{}", random::hex(HOSTNAME_DIGITS)?),
        };
        let mut files = files(self.root.as_deref(), &hostname, self.network);
        if self.root.as_ref().is_none_or(|root| root.join(MACHINE_ID).is_file()) {
            let id = random::hex(MACHINE_ID_DIGITS)?;
            files.push(file(&format!("/{MACHINE_ID}"), 0o444, format!("{id}\n")));
        }
        Ok((hostname, files))
    }
}

/// The files that a guest with the root `root` gets.
///
/// `hostname` is the guest's. Where this process is not root, what sudo and PAM need of files that
/// only root can read is made up: everybody may become the guest's root, and nobody has a password.
fn files(root: Option<&Path>, hostname: &str, network: NetworkMode) -> Vec<File> {
    let mut files = vec![file("/etc/hostname", 0o644, format!("{hostname}\n"))];
    let read = |path| std::fs::read_to_string(root?.join(path)).ok();
    if let Some(hosts) = read("etc/hosts") {
        files.push(file("/etc/hosts", 0o644, with_host(&hosts, hostname)));
    }
    match network {
        NetworkMode::User => {
            let content = format!("nameserver {USER_NETWORK_DNS}\n");
            files.push(file("/etc/resolv.conf", 0o644, content));
        }
        // Often a link into /run, which the guest has for itself.
        NetworkMode::None => {
            if let Some(content) = read("etc/resolv.conf") {
                files.push(file("/etc/resolv.conf", 0o644, content));
            }
        }
    }
    if let Some(root) = root.filter(|_| !rustix::process::geteuid().is_root()) {
        files.extend(substitutes(root));
    }
    files
}

fn file(path: &str, mode: u32, content: String) -> File {
    File { path: path.as_bytes().to_vec(), mode, content: content.into_bytes() }
}

fn with_host(hosts: &str, hostname: &str) -> String {
    let known = hosts.lines().any(|line| {
        let line = line.split('#').next().unwrap_or_default();
        line.split_whitespace().skip(1).any(|name| name == hostname)
    });
    let end = if hosts.ends_with('\n') || hosts.is_empty() { "" } else { "\n" };
    if known { hosts.to_owned() } else { format!("{hosts}{end}127.0.1.1 {hostname}\n") }
}

/// Stand-ins for the files that exist but cannot be read, and so could not be in the guest either.
fn substitutes(root: &Path) -> Vec<File> {
    let names = |database: &str| {
        let text = std::fs::read(root.join("etc").join(database)).unwrap_or_default();
        let name = |line: &str| Some(line.split_once(':')?.0.to_owned());
        String::from_utf8_lossy(&text).lines().filter_map(name).collect::<Vec<_>>()
    };
    let shadow: String =
        names("passwd").iter().map(|name| format!("{name}:*:1:0:99999:7:::\n")).collect();
    let gshadow: String = names("group").iter().map(|name| format!("{name}:*::\n")).collect();
    let candidates = [
        ("/etc/sudoers", 0o440, "ALL ALL=(ALL:ALL) NOPASSWD: ALL\n".to_owned()),
        ("/etc/sudo.conf", 0o644, String::new()),
        ("/etc/sudo_logsrvd.conf", 0o644, String::new()),
        ("/etc/shadow", 0o640, shadow),
        ("/etc/gshadow", 0o640, gshadow),
    ];
    let unreadable = |path: &str| {
        let path = root.join(path.trim_start_matches('/'));
        std::fs::File::open(path).is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
    };
    candidates
        .into_iter()
        .filter(|(path, ..)| unreadable(path))
        .map(|(path, mode, content)| file(path, mode, content))
        .collect()
}

/// A path's place below another root, as bytes for the guest.
pub(crate) fn guest_bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_knows_its_own_name() {
        assert_eq!(with_host("127.0.0.1 localhost", "g"), "127.0.0.1 localhost\n127.0.1.1 g\n");
        let known = "127.0.0.1 localhost g # it\n";
        assert_eq!(with_host(known, "g"), known);
        assert_eq!(with_host("# g\n", "g"), "# g\n127.0.1.1 g\n");
        assert_eq!(with_host("", "g"), "127.0.1.1 g\n");
    }

    #[test]
    fn every_guest_is_another() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let identity = |hostname: Option<&str>| {
            let root = Some(root.path().to_owned());
            let hostname = hostname.map(str::to_owned);
            Identity { root, hostname, network: NetworkMode::None }.fresh().unwrap()
        };
        let id = |files: &[File]| {
            let file = files.iter().find(|f| f.path == b"/etc/machine-id")?;
            Some(String::from_utf8(file.content.clone()).unwrap())
        };
        let (one, two) = (identity(None), identity(None));
        assert!(one.0.starts_with("vmlab-") && one.0 != two.0, "{} {}", one.0, two.0);
        assert_eq!(identity(Some("given")).0, "given");
        assert_eq!(id(&one.1), None, "its root has none");
        std::fs::write(root.path().join("etc/machine-id"), "of the host\n").unwrap();
        let (one, two) = (id(&identity(None).1).unwrap(), id(&identity(None).1).unwrap());
        assert!(one.trim_end().len() == 32 && one != two, "{one} {two}");
    }

    #[test]
    fn a_user_network_has_its_own_name_server() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
        let content = |network| {
            let files = files(Some(root.path()), "g", network);
            let file = files.into_iter().find(|f| f.path == b"/etc/resolv.conf").unwrap();
            String::from_utf8(file.content).unwrap()
        };
        assert_eq!(content(NetworkMode::None), "nameserver 192.0.2.1\n");
        assert_eq!(content(NetworkMode::User), "nameserver 10.0.2.3\n");
    }
}
