//! What a command inherits, taken from the caller so that it behaves as it would on the host.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::process::{Gid, Resource, getegid, geteuid, getgid, getgroups, getrlimit, getuid};
use vmlab_artifacts::SYSTEM_DIRS;

/// Who runs a command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuestUser {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
}

/// The mask that systems have where nobody has chosen another.
const USUAL_UMASK: u32 = 0o022;

/// What a command inherits: it is given to the VM once and can be changed for each command.
#[derive(Debug, Clone)]
pub struct Environment {
    /// The environment variables, all of them. For root, a `PATH` is completed with the directories of
    /// system programs, which an ordinary caller's may lack.
    pub vars: Vec<(OsString, OsString)>,
    /// The working directory.
    pub cwd: PathBuf,
    /// The user.
    pub user: GuestUser,
    /// The file mode creation mask.
    pub umask: u32,
    /// Resource limits: the kernel's number of the resource, soft and hard limit, `u64::MAX` for none.
    pub rlimits: Vec<(u32, u64, u64)>,
}

impl Environment {
    /// Takes it from this process, less the variables that name things of the host's session. The
    /// user is root.
    ///
    /// # Errors
    /// When the working directory is gone.
    pub fn of_caller() -> io::Result<Self> {
        let vars = std::env::vars_os().filter(|(key, _)| !is_of_the_session(key.as_bytes()));
        let mut vars: Vec<_> = vars.collect();
        // As under sudo: git and others then accept the files of the user behind root.
        if !getuid().is_root() && std::env::var_os("SUDO_UID").is_none() {
            vars.push(("SUDO_UID".into(), getuid().as_raw().to_string().into()));
            vars.push(("SUDO_GID".into(), getgid().as_raw().to_string().into()));
        }
        Ok(Self {
            vars,
            cwd: std::env::current_dir()?,
            user: GuestUser::default(),
            umask: caller_umask(),
            rlimits: caller_rlimits(),
        })
    }
}

/// What a system's own programs are found by.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Environment {
    /// What root has in a system that is not the caller's: nothing is taken from this process but the working
    /// directory and the kind of its terminal.
    ///
    /// # Errors
    /// When the working directory is gone.
    pub fn of_system() -> io::Result<Self> {
        Ok(Self::of_system_in(std::env::current_dir()?))
    }

    /// The same in some working directory.
    pub(crate) fn of_system_in(cwd: PathBuf) -> Self {
        let own = [("PATH", SYSTEM_PATH), ("HOME", "/root"), ("USER", "root"), ("LOGNAME", "root")];
        let mut vars: Vec<(OsString, OsString)> =
            own.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        vars.extend(std::env::var_os("TERM").map(|term| ("TERM".into(), term)));
        let user = GuestUser::default();
        Self { vars, cwd, user, umask: USUAL_UMASK, rlimits: Vec::new() }
    }

    /// Sets a variable, in the place of what it was.
    pub fn set(&mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) {
        let name = name.as_ref();
        self.vars.retain(|(other, _)| other != name);
        self.vars.push((name.to_owned(), value.as_ref().to_owned()));
    }

    /// Names a user in the variables that named root in [`of_system`](Self::of_system); what the caller has
    /// set otherwise stays.
    pub(crate) fn become_login(&mut self, user: &GuestUser, passwd: &str) {
        let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
        let of_user = |fields: &Vec<String>| fields.get(2) == Some(&user.uid.to_string());
        let Some(fields) = passwd.lines().map(fields).find(of_user) else { return };
        let home = fields.get(5).map_or("/", String::as_str);
        let values = [
            ("HOME", "/root", home),
            ("USER", "root", &fields[0]),
            ("LOGNAME", "root", &fields[0]),
        ];
        for (name, of_root, value) in values {
            if self.vars.iter().any(|(other, set)| other == name && set == of_root) {
                self.set(name, value);
            }
        }
    }

    /// The variables as the guest is given them.
    pub(crate) fn variables(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let root = self.user.uid == 0;
        let given = |(name, value): &(OsString, OsString)| {
            let mut value = value.as_bytes().to_vec();
            if root && name == "PATH" {
                for dir in SYSTEM_DIRS.map(str::as_bytes) {
                    if !value.split(|byte| *byte == b':').any(|listed| listed == dir) {
                        value.push(b':');
                        value.extend_from_slice(dir);
                    }
                }
            }
            (name.as_bytes().to_vec(), value)
        };
        self.vars.iter().map(given).collect()
    }
}

fn is_of_the_session(key: &[u8]) -> bool {
    const NAMES: [&[u8]; 14] = [
        b"DISPLAY",
        b"XAUTHORITY",
        b"SSH_AUTH_SOCK",
        b"SSH_AGENT_PID",
        b"GPG_AGENT_INFO",
        b"TMUX",
        b"TMUX_PANE",
        b"STY",
        b"NOTIFY_SOCKET",
        b"JOURNAL_STREAM",
        b"INVOCATION_ID",
        b"LISTEN_FDS",
        b"LISTEN_PID",
        b"XDG_RUNTIME_DIR",
    ];
    const PREFIXES: [&[u8]; 3] = [b"WAYLAND_", b"DBUS_", b"XDG_SESSION_"];
    NAMES.contains(&key) || PREFIXES.iter().any(|prefix| key.starts_with(prefix))
}

/// Read from procfs: the system call can only change it, and would change it for all threads.
fn caller_umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    line.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(USUAL_UMASK)
}

fn caller_rlimits() -> Vec<(u32, u64, u64)> {
    const ALL: [Resource; 16] = [
        Resource::Cpu,
        Resource::Fsize,
        Resource::Data,
        Resource::Stack,
        Resource::Core,
        Resource::Rss,
        Resource::Nproc,
        Resource::Nofile,
        Resource::Memlock,
        Resource::As,
        Resource::Locks,
        Resource::Sigpending,
        Resource::Msgqueue,
        Resource::Nice,
        Resource::Rtprio,
        Resource::Rttime,
    ];
    let limit = |value: Option<u64>| value.unwrap_or(u64::MAX);
    let read = |resource: Resource| {
        let got = getrlimit(resource);
        (resource as u32, limit(got.current), limit(got.maximum))
    };
    ALL.into_iter().map(read).collect()
}

impl GuestUser {
    /// The user who runs this program, with all groups.
    pub fn caller() -> Self {
        let groups = getgroups().unwrap_or_default();
        Self {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            groups: groups.into_iter().map(Gid::as_raw).collect(),
        }
    }

    /// The user that a person names: `root`, whatever files there are; `caller`; else as [`named`](Self::named).
    ///
    /// # Errors
    /// As for [`named`](Self::named).
    pub fn of(name: &str, root: &Path) -> io::Result<Self> {
        match name {
            "root" => Ok(Self::default()),
            "caller" => Ok(Self::caller()),
            name => Self::named(name, root),
        }
    }

    /// Looks a name or a numeric id up in the `passwd` and `group` files below `root`. A numeric id
    /// that is in neither is taken as it is.
    ///
    /// # Errors
    /// When the files cannot be read, or do not have the name.
    pub fn named(name: &str, root: &Path) -> io::Result<Self> {
        let read = |file: &str| {
            std::fs::read(root.join(file)).map(|text| String::from_utf8_lossy(&text).into_owned())
        };
        Self::find(name, &read("etc/passwd")?, &read("etc/group")?).ok_or_else(|| {
            let passwd = root.join("etc/passwd");
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("{} has no user `{name}`", passwd.display()),
            )
        })
    }

    /// The same, in what these files have.
    pub(crate) fn find(name: &str, passwd: &str, group: &str) -> Option<Self> {
        let user = passwd.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [login, _, uid, gid, ..] = fields[..] else { return None };
            (login == name || uid == name)
                .then(|| Some((login, uid.parse().ok()?, gid.parse().ok()?)))
                .flatten()
        });
        let Some((login, uid, gid)) = user else {
            let uid = name.parse().ok()?;
            return Some(Self { uid, gid: uid, groups: Vec::new() });
        };
        let member = |line: &str| {
            let fields: Vec<&str> = line.split(':').collect();
            let [_, _, gid, members, ..] = fields[..] else { return None };
            members.split(',').any(|member| member == login).then(|| gid.parse().ok()).flatten()
        };
        Some(Self { uid, gid, groups: group.lines().filter_map(member).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nbroken\neve:x:1000:1001:,,,:/home/eve:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:adam,eve\nkvm:x:104:eve\nx:x:9:adam\nbroken:x\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let eve = GuestUser { uid: 1000, gid: 1001, groups: vec![27, 104] };
        assert_eq!(GuestUser::find("eve", PASSWD, GROUP), Some(eve.clone()));
        assert_eq!(GuestUser::find("1000", PASSWD, GROUP), Some(eve));
        let stranger = GuestUser { uid: 77, gid: 77, groups: vec![] };
        assert_eq!(GuestUser::find("77", PASSWD, GROUP), Some(stranger));
        assert_eq!(GuestUser::find("adam", PASSWD, GROUP), None);
    }

    #[test]
    fn a_user_of_the_guest_has_a_home_there() {
        let mut environment = Environment::of_system_in("/".into());
        environment.set("USER", "given");
        let eve = GuestUser::find("eve", PASSWD, GROUP).unwrap();
        environment.become_login(&eve, PASSWD);
        let value = |name: &str| {
            let found = environment.vars.iter().find(|(other, _)| other == name);
            found.map(|(_, value)| value.to_str().unwrap().to_owned()).unwrap()
        };
        assert_eq!([value("HOME"), value("LOGNAME"), value("USER")], ["/home/eve", "eve", "given"]);
    }

    #[test]
    fn things_of_the_session_stay() {
        assert!(is_of_the_session(b"DBUS_SESSION_BUS_ADDRESS"));
        assert!(is_of_the_session(b"TMUX"));
        assert!(!is_of_the_session(b"TMUXX"));
        assert!(!is_of_the_session(b"PATH"));
    }

    #[test]
    fn root_finds_system_programs() {
        let mut environment = Environment::of_caller().unwrap();
        environment.vars = vec![("PATH".into(), "/bin:/usr/sbin".into()), ("A".into(), "b".into())];
        let path = |environment: &Environment| {
            let variables = environment.variables();
            assert_eq!(variables[1], (b"A".to_vec(), b"b".to_vec()));
            String::from_utf8(variables[0].1.clone()).unwrap()
        };
        assert_eq!(path(&environment), "/bin:/usr/sbin:/usr/local/sbin:/sbin");
        environment.user.uid = 1000;
        assert_eq!(path(&environment), "/bin:/usr/sbin");
    }

    #[test]
    fn the_callers_own_is_read() {
        let environment = Environment::of_caller().unwrap();
        assert_eq!(environment.cwd, std::env::current_dir().unwrap());
        assert_eq!(environment.rlimits.len(), 16);
        assert!(environment.umask <= 0o777);
    }
}
