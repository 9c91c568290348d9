//! How many VMs run at the same time.

use anyhow::{Result, bail};
use vmlab::budget::{self, Need};
use vmlab::config::VmConfig;
use vmlab::units::Bytes;

use crate::request::Repeat;

/// What the host has for VMs.
#[derive(Debug)]
struct Host {
    cpus: usize,
    /// What they take unless the user says how much; `None` where it cannot be known.
    memory: Option<Bytes>,
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
    decide(repeat, &Need::of(vm), &Host { cpus, memory: budget::usual_memory() })
}

fn decide(repeat: &Repeat, need: &Need, host: &Host) -> Result<Jobs> {
    let runs = repeat.count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let by_cpus = || (host.cpus / need.cpus.max(1)).max(1);
    let wanted = repeat.jobs.unwrap_or_else(by_cpus).min(runs);
    let Some(budget) = repeat.memory_budget.or(host.memory) else {
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

#[cfg(test)]
mod tests {
    use super::*;
    use vmlab::units::MIB;

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
        let plenty = count(&repeat(None, None, None), 1, Some(8 * GIB));
        assert_eq!(plenty, Jobs { count: 8, lowered: None });
        let few = count(&repeat(None, None, None), 1, Some(7 * GIB + GIB / 2));
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
}
