//! What a PC is made of.

pub mod acpi;
pub mod boot;
mod control;
mod cpu;
pub mod cpuid;
mod exits;
pub mod layout;
mod machine;
mod run;
mod sandbox;
mod serial;
mod slots;
mod state;

pub use machine::{Config, Machine};
pub use slots::Plug;
