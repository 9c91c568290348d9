//! Files of the root that cannot be in the guest as they are on the host.

use std::io;
use std::net::Ipv4Addr;
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

/// What a file of hosts has at least.
const NO_HOSTS: &str = "127.0.0.1 localhost\n::1 localhost\n";

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
    /// Others that it knows by their names.
    pub(crate) hosts: Vec<(Ipv4Addr, String)>,
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
        let mut files = files(self.root.as_deref(), &hostname, &self.hosts, self.network);
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
fn files(
    root: Option<&Path>,
    hostname: &str,
    others: &[(Ipv4Addr, String)],
    network: NetworkMode,
) -> Vec<File> {
    let mut files = vec![file("/etc/hostname", 0o644, format!("{hostname}\n"))];
    let read = |path| std::fs::read_to_string(root?.join(path)).ok();
    let no_hosts = || (!others.is_empty()).then(|| NO_HOSTS.to_owned());
    if let Some(hosts) = read("etc/hosts").or_else(no_hosts) {
        let hosts = with_host(&with_others(&hosts, others), hostname);
        files.push(file("/etc/hosts", 0o644, hosts));
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

/// Adds names to a file of hosts, which has them for no other addresses then.
fn with_others(hosts: &str, others: &[(Ipv4Addr, String)]) -> String {
    let is_other = |name: &str| others.iter().any(|(_, other)| other.eq_ignore_ascii_case(name));
    let mut text = String::new();
    for line in hosts.lines().filter(|_| !others.is_empty()) {
        let (entry, comment) = line.split_at(line.find('#').unwrap_or(line.len()));
        let mut words = entry.split_whitespace();
        let address = words.next().unwrap_or_default();
        let names: Vec<&str> = words.clone().filter(|name| !is_other(name)).collect();
        match names.len() == words.count() {
            true => text.push_str(line),
            false if names.is_empty() => continue,
            false => text.push_str(&format!("{address} {} {comment}", names.join(" "))),
        }
        text.push('\n');
    }
    for (address, name) in others {
        text.push_str(&format!("{address} {name}\n"));
    }
    if others.is_empty() { hosts.to_owned() } else { text }
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
    fn members_of_a_network_are_known_by_their_addresses_alone() {
        let others =
            [([10, 77, 1, 1].into(), "a".to_owned()), ([10, 77, 1, 2].into(), "b".to_owned())];
        let hosts =
            "# it\n127.0.0.1 localhost\n127.0.1.1 A\n\n10.0.0.1\tx a y # mine\n::1 localhost";
        let known = with_others(hosts, &others);
        let kept = "# it\n127.0.0.1 localhost\n\n10.0.0.1 x y # mine\n::1 localhost\n";
        assert_eq!(known, format!("{kept}10.77.1.1 a\n10.77.1.2 b\n"));
        assert_eq!(with_host(&known, "a"), known);
        assert_eq!(with_others(hosts, &[]), hosts);
        let files = files(None, "a", &others, NetworkMode::None);
        let hosts = files.iter().find(|file| file.path == b"/etc/hosts").unwrap();
        assert!(hosts.content.starts_with(NO_HOSTS.as_bytes()));
    }

    #[test]
    fn every_guest_is_another() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let identity = |hostname: Option<&str>| {
            let root = Some(root.path().to_owned());
            let hostname = hostname.map(str::to_owned);
            Identity { root, hostname, hosts: Vec::new(), network: NetworkMode::None }
                .fresh()
                .unwrap()
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
            let files = files(Some(root.path()), "g", &[], network);
            let file = files.into_iter().find(|f| f.path == b"/etc/resolv.conf").unwrap();
            String::from_utf8(file.content).unwrap()
        };
        assert_eq!(content(NetworkMode::None), "nameserver 192.0.2.1\n");
        assert_eq!(content(NetworkMode::User), "nameserver 10.0.2.3\n");
    }
}
