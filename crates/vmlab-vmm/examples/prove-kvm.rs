//! Prints what the proof of KVM found on this host, and what it cost.
//!
//! `prove-kvm [COUNT]` repeats it; the exit status is 0 when KVM can be used.

use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vmlab_vmm::probe::prove;

#[allow(clippy::print_stdout)]
fn main() -> ExitCode {
    let count = std::env::args().nth(1).and_then(|count| count.parse().ok()).unwrap_or(1).max(1);
    let mut times: Vec<Duration> = Vec::new();
    let mut usable = true;
    for _ in 0..count {
        let started = Instant::now();
        let verdict = prove();
        times.push(started.elapsed());
        usable &= verdict.is_ok();
        match verdict {
            Ok(proof) => println!("KVM works: {proof}"),
            Err(reason) => {
                let source = reason.source().map(|source| format!(": {source}"));
                println!("KVM is not used: {reason}{}", source.unwrap_or_default());
            }
        }
    }
    times.sort();
    let (last, median) = (times[times.len() - 1], times[times.len() / 2]);
    println!("{count} runs, median {median:.1?}, longest {last:.1?}");
    if usable { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
