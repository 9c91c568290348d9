//! Drives the kernel store by hand: `kernel resolve|pull|inspect SPEC`, `default`, `list`, `rm NAME`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use vmlab_artifacts::{Cache, Kernel, KernelStore, Progress};

#[derive(Default)]
struct Stderr {
    shown: AtomicU64,
}

impl Progress for Stderr {
    fn phase(&self, name: &str) {
        eprintln!("- {name}");
        self.shown.store(0, Ordering::Relaxed);
    }

    fn note(&self, text: &str) {
        eprintln!("note: {text}");
    }

    fn download(&self, done: u64, total: Option<u64>) {
        // One line for each 16 MiB is enough for a log.
        if self.shown.swap(1 + (done >> 24), Ordering::Relaxed) != 1 + (done >> 24) {
            eprintln!("  {done} of {total:?} bytes");
        }
    }
}

fn main() {
    let start = Instant::now();
    if let Err(error) = run() {
        eprintln!("error: {error}");
        let mut source = error.source();
        while let Some(cause) = source {
            eprintln!("  because: {cause}");
            source = cause.source();
        }
        std::process::exit(1);
    }
    eprintln!("took {:.2?}", start.elapsed());
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let store = KernelStore::open(Cache::open_default()?);
    let progress = Stderr::default();
    match words.as_slice() {
        ["resolve", spec] => show(&store.resolve(&spec.parse()?, &progress)?)?,
        ["pull", spec] => show(&store.pull(&spec.parse()?, &progress)?)?,
        ["inspect", spec] => show(&store.inspect(&spec.parse()?)?)?,
        ["default"] => show(&store.resolve_default(&progress)?)?,
        ["list"] => {
            for kernel in store.list()? {
                println!("{}", serde_json::to_string(&kernel)?);
            }
        }
        ["rm", name] => println!("{}", store.remove(name)?),
        _ => {
            return Err("usage: kernel resolve|pull|inspect SPEC | default | list | rm NAME".into());
        }
    }
    Ok(())
}

fn show(kernel: &Kernel) -> Result<(), Box<dyn Error>> {
    println!("{}", serde_json::to_string_pretty(kernel)?);
    for (feature, have) in kernel.features()?.iter() {
        println!("{feature:<16}{have}");
    }
    Ok(())
}
