//! What this host can do, what is missing, and how to get it.

use serde::Serialize;
use vmlab_artifacts::firmware::find_uefi;
use vmlab_artifacts::{Cache, KernelStore, find_program};
use vmlab_devices::fs::Landlock;
use vmlab_vmm::probe;

use crate::error::chain;
use crate::hypervisor::{Hypervisor, qemu::Qemu};
use crate::runs;
use crate::sandbox::{self, without_landlock};
use crate::units::Bytes;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What it is.
    pub name: &'static str,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    pub remedy: Option<String>,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Good,
    /// Something can be done without it, slower or not everything.
    Lacking,
    /// Nothing can be run without it.
    Bad,
}

/// Free space below which the next fetched kernel may not fit: the largest of Debian's takes 400 MB
/// unpacked, and as much while it is made.
const SPACE_WANTED: Bytes = Bytes(1 << 30);

/// Looks at everything that running VMs depends on.
pub fn examine() -> Vec<Check> {
    let kvm = kvm();
    vec![
        qemu(kvm.status == Status::Good),
        kvm,
        passt(),
        sandbox(),
        depmod(),
        apt(),
        cache(),
        logs(),
        kernels(),
        uefi(),
        image_build(),
        memory(),
    ]
}

fn good(name: &'static str, detail: impl Into<String>) -> Check {
    Check { name, status: Status::Good, detail: detail.into(), remedy: None }
}

fn wrong(
    name: &'static str,
    status: Status,
    detail: impl Into<String>,
    remedy: impl Into<String>,
) -> Check {
    Check { name, status, detail: detail.into(), remedy: Some(remedy.into()) }
}

/// `kvm` is whether there is another way to run VMs.
fn qemu(kvm: bool) -> Check {
    let qemu = Qemu::new();
    let found = qemu.probe().and_then(|report| Ok((report, qemu.prove()?)));
    match found {
        Ok((report, took)) => good(
            "qemu",
            format!(
                "{} ({}), ran a guest in {:.0} ms",
                report.version,
                report.program.display(),
                took.as_secs_f64() * 1e3
            ),
        ),
        Err(error) => wrong(
            "qemu",
            if kvm { Status::Lacking } else { Status::Bad },
            chain(&error),
            "without QEMU, no systems of images run, and without KVM nothing does",
        ),
    }
}

fn kvm() -> Check {
    match probe::prove() {
        Ok(proof) => good("kvm", format!("{proof}; used by vmlab's own monitor, and by QEMU")),
        Err(unusable) => wrong(
            "kvm",
            Status::Lacking,
            chain(&unusable),
            "without KVM, guests run in QEMU under TCG: everything works, about ten times slower",
        ),
    }
}

fn passt() -> Check {
    match find_program("passt") {
        Some(path) => good("passt", path.display().to_string()),
        None => wrong(
            "passt",
            Status::Lacking,
            "not found",
            "VMs of vmlab's own monitor reach the network (--net user) with passt; QEMU does without",
        ),
    }
}

fn sandbox() -> Check {
    let name = "sandbox";
    let found = match sandbox::of_host() {
        Ok(found) => found,
        Err(why) => {
            let remedy = "`vmlab run --no-sandbox` runs and serves guests without it";
            return wrong(name, Status::Lacking, why, remedy);
        }
    };
    let seccomp = if found.seccomp { "seccomp" } else { "no seccomp" };
    match (without_landlock(found.landlock), found.landlock) {
        (None, Landlock::Version(version)) if found.seccomp => {
            good(name, format!("Landlock (ABI {version}), seccomp"))
        }
        (Some((why, remedy)), _) => {
            wrong(name, Status::Lacking, format!("{why}; {seccomp}"), remedy)
        }
        (None, _) => wrong(
            name,
            Status::Lacking,
            "no seccomp: the host's kernel does not filter system calls",
            "what serves guests is restricted to fewer system calls where a kernel has \
             CONFIG_SECCOMP_FILTER",
        ),
    }
}

fn depmod() -> Check {
    match find_program("depmod") {
        Some(path) => good("depmod", path.display().to_string()),
        None => wrong(
            "depmod",
            Status::Lacking,
            "not found",
            "kernels from packages need depmod once each; install kmod",
        ),
    }
}

fn apt() -> Check {
    match find_program("apt-get") {
        Some(path) => good("apt", path.display().to_string()),
        None => wrong(
            "apt",
            Status::Lacking,
            "not found",
            "kernels such as debian:6.12 are fetched with apt; paths and installed kernels work \
             without it",
        ),
    }
}

fn cache() -> Check {
    let name = "cache";
    let remedy = "VMLAB_CACHE_DIR chooses another place";
    let cache = match Cache::open_default() {
        Ok(cache) => cache,
        Err(error) => return wrong(name, Status::Bad, chain(&error), remedy),
    };
    let root = cache.root().to_owned();
    let existing = root.ancestors().find(|dir| dir.exists()).unwrap_or(&root);
    if let Err(error) = rustix::fs::access(existing, rustix::fs::Access::WRITE_OK) {
        let detail = format!("{} cannot be written ({error})", root.display());
        return wrong(name, Status::Bad, detail, remedy);
    }
    match rustix::fs::statvfs(existing) {
        Ok(stat) => {
            let free = Bytes(stat.f_bavail.saturating_mul(stat.f_frsize));
            let detail = format!("{}, {free} free", root.display());
            if free < SPACE_WANTED {
                let remedy = format!("the next kernel may not fit; {remedy}");
                wrong(name, Status::Lacking, detail, remedy)
            } else {
                good(name, detail)
            }
        }
        Err(error) => wrong(name, Status::Bad, format!("{}: {error}", root.display()), remedy),
    }
}

fn logs() -> Check {
    match runs::RunDir::create() {
        Ok(dir) => {
            let parent = dir.path().parent().unwrap_or(dir.path()).display().to_string();
            // Made only to find out; there is nothing in it.
            let _ = std::fs::remove_dir_all(dir.path());
            good("logs", parent)
        }
        Err(error) => {
            wrong("logs", Status::Bad, chain(&error), "XDG_STATE_HOME chooses another place")
        }
    }
}

fn kernels() -> Check {
    let listed = Cache::open_default()
        .map_err(|error| chain(&error))
        .and_then(|cache| KernelStore::open(cache).list().map_err(|error| chain(&error)));
    match listed {
        Ok(list) if list.is_empty() => wrong(
            "kernels",
            Status::Lacking,
            "none fetched yet",
            "`vmlab kernel pull debian:6.12` fetches one; a run without -k does it by itself",
        ),
        Ok(list) => {
            let releases: Vec<&str> = list.iter().map(|kernel| kernel.release.as_str()).collect();
            good("kernels", releases.join(", "))
        }
        Err(error) => {
            wrong("kernels", Status::Lacking, error, "paths and installed kernels work without it")
        }
    }
}

fn uefi() -> Check {
    let remedy = "images start by UEFI (--uefi, --secure-boot) with it; by a BIOS they do without";
    let found = find_uefi(false).and_then(|plain| Ok((plain, find_uefi(true)?)));
    match found {
        Ok((plain, secure)) => {
            let (plain, secure) = (plain.code.display(), secure.code.display());
            good("uefi", format!("{plain}, with secure boot {secure}"))
        }
        Err(error) => wrong("uefi", Status::Lacking, chain(&error), remedy),
    }
}

fn image_build() -> Check {
    match find_program("mmdebstrap") {
        Some(path) => good("images", format!("built by {}", path.display())),
        None => wrong(
            "images",
            Status::Lacking,
            "mmdebstrap was not found",
            "`vmlab image build` needs it; image files work without it",
        ),
    }
}

fn memory() -> Check {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    match kib.map(|kib| Bytes(kib * 1024)) {
        Some(free) if free.0 >= 1 << 30 => good("memory", format!("{free} available")),
        Some(free) => wrong(
            "memory",
            Status::Lacking,
            format!("{free} available"),
            "guests have 1 GiB unless told otherwise; --memory 512M does for most",
        ),
        None => wrong("memory", Status::Lacking, "unknown", "is /proc mounted?"),
    }
}
