//! The `vmlab` command.

mod cache;
mod cli;
mod command;
mod disk;
mod doctor;
mod exit;
mod generate;
mod image;
mod kernel;
mod module;
mod output;
mod progress;
mod repeat;
mod request;
mod run;
mod runner;
mod signals;
mod stdio;
mod terminal;
mod test;
mod timings;
mod vmtest;

fn main() -> std::process::ExitCode {
    cli::dispatch().into()
}
