//! What the host has for VMs, and how many of them that carries at the same time.

use std::fs;
use std::path::Path;
use std::sync::{Condvar, Mutex};

use crate::config::{Accel, VmConfig};
use crate::sync::{lock, wait};
use crate::units::{Bytes, MIB};

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

/// What one VM takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// CPUs of the guest.
    pub cpus: usize,
    /// Memory of the host, its RAM included.
    pub memory: Bytes,
}

impl Need {
    /// What a VM of this configuration takes at most, as far as that can be known.
    pub fn of(vm: &VmConfig) -> Self {
        let cpus = vm.topology.cpus().and_then(|cpus| cpus.try_into().ok()).unwrap_or(1);
        Self { cpus, memory: Bytes(vm.memory.0.saturating_add(overhead(vm.accel).0)) }
    }
}

/// How many VMs may run at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slots {
    /// So many.
    Count(usize),
    /// As many as have this many CPUs together.
    Cpus(usize),
}

/// Lets VMs run at the same time as far as there is room for them. One that is too large for all of it runs
/// alone.
#[derive(Debug)]
pub struct Budget {
    slots: Slots,
    memory: Option<Bytes>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    running: usize,
    cpus: usize,
    memory: u64,
    /// Tickets that were handed out, and the one whose turn it is: the first to come is the first to go.
    tickets: u64,
    turn: u64,
}

/// A VM's part of a budget, until it is dropped.
#[derive(Debug)]
pub struct Permit<'a> {
    budget: &'a Budget,
    need: Need,
}

impl Budget {
    /// A budget; without `memory`, memory is no limit.
    pub fn new(slots: Slots, memory: Option<Bytes>) -> Self {
        Self { slots, memory, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Waits for room, in the order of the calls; `None` once the budget is closed.
    pub fn acquire(&self, need: Need) -> Option<Permit<'_>> {
        let mut state = lock(&self.state);
        let ticket = state.tickets;
        state.tickets += 1;
        while !state.closed && (state.turn != ticket || !self.has_room(&state, need)) {
            state = wait(&self.changed, state);
        }
        if state.closed {
            return None;
        }
        state.turn += 1;
        state.running += 1;
        state.cpus += need.cpus;
        state.memory = state.memory.saturating_add(need.memory.0);
        self.changed.notify_all();
        Some(Permit { budget: self, need })
    }

    /// Lets nobody in any more.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    fn has_room(&self, state: &State, need: Need) -> bool {
        let slot = match self.slots {
            Slots::Count(count) => state.running < count,
            Slots::Cpus(cpus) => state.cpus + need.cpus <= cpus,
        };
        let fits = |memory: Bytes| state.memory.saturating_add(need.memory.0) <= memory.0;
        state.running == 0 || (slot && self.memory.is_none_or(fits))
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.budget.state);
        state.running -= 1;
        state.cpus -= self.need.cpus;
        state.memory = state.memory.saturating_sub(self.need.memory.0);
        self.budget.changed.notify_all();
    }
}

/// The memory that VMs may take unless the user says how much: a part of what is available. `None` where
/// that cannot be known.
pub fn usual_memory() -> Option<Bytes> {
    available_memory().map(|memory| Bytes(memory.0 / SHARE.1 * SHARE.0))
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
    use std::sync::mpsc::channel;
    use std::time::Duration;

    /// Long enough for a thread to do what it should not.
    const MOMENT: Duration = Duration::from_millis(50);

    fn need(cpus: usize, mib: u64) -> Need {
        Need { cpus, memory: Bytes(mib * MIB) }
    }

    #[test]
    fn vms_wait_for_room_in_their_order() {
        let budget = Budget::new(Slots::Cpus(4), Some(Bytes(1000 * MIB)));
        let first = budget.acquire(need(2, 100)).unwrap();
        std::thread::scope(|scope| {
            let (sender, entered) = channel();
            let enter = |name: &'static str, need: Need| {
                let (budget, sender) = (&budget, sender.clone());
                scope.spawn(move || {
                    let permit = budget.acquire(need).unwrap();
                    sender.send(name).unwrap();
                    drop(permit);
                });
                while lock(&budget.state).tickets < 2 {
                    std::thread::yield_now();
                }
            };
            // The large one waits, and the small one that there is room for does not overtake it.
            enter("large", need(4, 950));
            enter("small", need(1, 10));
            assert!(entered.recv_timeout(MOMENT).is_err());
            drop(first);
            let order: Vec<_> = entered.iter().take(2).collect();
            assert_eq!(order, ["large", "small"]);
        });
        assert_eq!(lock(&budget.state).running, 0);
    }

    #[test]
    fn what_is_too_large_runs_alone() {
        let budget = Budget::new(Slots::Count(9), Some(Bytes(MIB)));
        let permit = budget.acquire(need(64, 1 << 20)).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| budget.acquire(need(1, 1)).is_none());
            std::thread::sleep(MOMENT);
            assert!(!waiting.is_finished());
            budget.close();
            assert!(waiting.join().unwrap());
        });
        drop(permit);
    }

    #[test]
    fn a_number_is_no_matter_of_cpus() {
        let budget = Budget::new(Slots::Count(3), None);
        let all: Vec<_> = (0..3).map(|_| budget.acquire(need(100, 100)).unwrap()).collect();
        assert!(!budget.has_room(&lock(&budget.state), need(1, 1)));
        drop(all);
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
