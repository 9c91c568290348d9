//! How many VMs run at the same time.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};
use vmlab::config::{Accel, VmConfig};
use vmlab::units::{Bytes, MIB};

use crate::request::Repeat;

/// What a VM needs beside its RAM: QEMU itself, and under TCG the code that it translates the guest's to.
/// Measured: 85 MiB after the boot, and 440 MiB when Python, Perl, cargo and gcc had run as well.
const fn overhead(accel: Accel) -> Bytes {
    match accel {
        Accel::Kvm => Bytes(128 * MIB),
        Accel::Tcg => Bytes(512 * MIB),
    }
}

/// How much of the memory that is available is used unless the user says how much: the guests' files go
/// through the host's page cache, which needs room as well.
const SHARE: (u64, u64) = (3, 4);

/// Where memory limits of control groups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// What the host has for VMs.
#[derive(Debug)]
struct Host {
    cpus: usize,
    /// `None` where it cannot be known.
    memory: Option<Bytes>,
}

/// What one VM takes.
#[derive(Debug)]
struct Need {
    cpus: usize,
    memory: Bytes,
}

/// How many VMs run at the same time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Jobs {
    pub(super) count: usize,
    /// Why it is fewer than asked for, or than there are CPUs for.
    pub(super) lowered: Option<String>,
}

/// Decides how many VMs run at the same time.
///
/// # Errors
/// When not even one fits into the budget that the user gave.
pub(super) fn jobs(repeat: &Repeat, vm: &VmConfig) -> Result<Jobs> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let host = Host { cpus, memory: available_memory() };
    let guest_cpus = vm.topology.cpus().and_then(|cpus| cpus.try_into().ok()).unwrap_or(1);
    let memory = Bytes(vm.memory.0.saturating_add(overhead(vm.accel).0));
    decide(repeat, &Need { cpus: guest_cpus, memory }, &host)
}

fn decide(repeat: &Repeat, need: &Need, host: &Host) -> Result<Jobs> {
    let runs = repeat.count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let by_cpus = || (host.cpus / need.cpus.max(1)).max(1);
    let wanted = repeat.jobs.unwrap_or_else(by_cpus).min(runs);
    let share = |memory: Bytes| Bytes(memory.0 / SHARE.1 * SHARE.0);
    let Some(budget) = repeat.memory_budget.or(host.memory.map(share)) else {
        return Ok(Jobs { count: wanted, lowered: None });
    };
    let fitting = usize::try_from(budget.0 / need.memory.0.max(1)).unwrap_or(usize::MAX);
    if fitting >= wanted {
        return Ok(Jobs { count: wanted, lowered: None });
    }
    let needed = need.memory;
    if fitting == 0 && repeat.memory_budget.is_some() {
        bail!("--memory-budget: a VM needs {needed}, which is more than {budget}");
    }
    let count = fitting.max(1);
    let of = match repeat.memory_budget {
        Some(_) => "",
        None => ", three quarters of what is available; --memory-budget changes that",
    };
    let lowered = format!(
        "{count} at a time instead of {wanted}: each VM needs {needed}, and the memory budget is \
         {budget}{of}"
    );
    Ok(Jobs { count, lowered: Some(lowered) })
}

/// The memory that this process and its children can still have: the host's, or what the control groups
/// above this process leave, as in a container.
fn available_memory() -> Option<Bytes> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let host = field(&meminfo, "MemAvailable:")?.checked_mul(1024)?;
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limited = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let limited = limited.and_then(|path| room(Path::new(CGROUPS), path));
    Some(Bytes(limited.map_or(host, |limited| limited.min(host))))
}

/// What the group at `path` below `root` and all groups above it leave: their limit less what is used,
/// where file pages that were not used lately count as free.
fn room(root: &Path, path: &str) -> Option<u64> {
    let group = root.join(path);
    let groups = group.ancestors().take_while(|dir| dir.starts_with(root));
    let left = groups.filter_map(|dir| {
        let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok();
        let limit: u64 = number("memory.max")?;
        let used: u64 = number("memory.current")?;
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let reclaimable = field(&stat, "inactive_file").unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
    });
    left.min()
}

/// The number after a name, in a file with one of each a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix([' ', '\t']));
    line?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1024 * MIB;

    fn repeat(count: Option<u64>, jobs: Option<usize>, budget: Option<u64>) -> Repeat {
        Repeat { count, until_failure: false, jobs, memory_budget: budget.map(Bytes) }
    }

    fn count(repeat: &Repeat, cpus: usize, memory: Option<u64>) -> Jobs {
        let need = Need { cpus, memory: Bytes(GIB) };
        decide(repeat, &need, &Host { cpus: 8, memory: memory.map(Bytes) }).unwrap()
    }

    #[test]
    fn as_many_as_the_cpus_carry() {
        let all = |cpus| count(&repeat(Some(100), None, None), cpus, None).count;
        assert_eq!((all(1), all(2), all(3), all(8), all(9)), (8, 4, 2, 1, 1));
        assert_eq!(count(&repeat(Some(3), None, None), 1, None).count, 3);
        assert_eq!(count(&repeat(Some(100), Some(20), None), 8, None).count, 20);
        assert_eq!(count(&repeat(None, Some(20), None), 8, None).count, 20);
    }

    #[test]
    fn memory_lowers_it_and_says_so() {
        let plenty = count(&repeat(None, None, None), 1, Some(11 * GIB));
        assert_eq!(plenty, Jobs { count: 8, lowered: None });
        // Three quarters of 10 GiB hold seven.
        let few = count(&repeat(None, None, None), 1, Some(10 * GIB));
        assert_eq!(few.count, 7);
        let said = few.lowered.unwrap();
        assert!(said.starts_with("7 at a time instead of 8: each VM needs 1 GiB"), "{said}");
        assert!(said.contains("7.5 GiB") && said.contains("--memory-budget"), "{said}");
        // One runs in any case.
        assert_eq!(count(&repeat(None, None, None), 1, Some(MIB)).count, 1);
    }

    #[test]
    fn a_budget_of_the_users_is_kept() {
        let given = repeat(Some(9), Some(9), Some(4 * GIB + 1));
        let jobs = count(&given, 1, Some(MIB));
        assert_eq!(jobs.count, 4);
        assert!(jobs.lowered.unwrap().ends_with("the memory budget is 4.0 GiB"));
        let exact = repeat(Some(9), Some(4), Some(4 * GIB));
        assert_eq!(count(&exact, 1, Some(MIB)), Jobs { count: 4, lowered: None });
        let need = Need { cpus: 1, memory: Bytes(GIB) };
        let little = repeat(Some(9), None, Some(GIB - 1));
        decide(&little, &need, &Host { cpus: 8, memory: None }).unwrap_err();
    }

    #[test]
    fn limits_of_control_groups_count() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        let write = |dir: &Path, name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
        assert_eq!(room(root.path(), "a/b"), None);
        write(&inner, "memory.max", "max\n");
        write(&inner, "memory.current", "5\n");
        assert_eq!(room(root.path(), "a/b"), None);
        let outer = root.path().join("a");
        write(&outer, "memory.max", "1000\n");
        write(&outer, "memory.current", "700\n");
        write(&outer, "memory.stat", "anon 400\ninactive_file 100\n");
        assert_eq!(room(root.path(), "a/b"), Some(400));
        write(&inner, "memory.max", "50\n");
        assert_eq!(room(root.path(), "a/b"), Some(45));
    }

    #[test]
    fn this_host_has_memory() {
        assert!(available_memory().unwrap() > Bytes(MIB));
    }
}
