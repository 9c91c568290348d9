//! What a PC is made of.

pub mod acpi;
pub mod boot;
mod control;
mod cpu;
pub mod cpuid;
mod exits;
#[doc(hidden)]
pub mod fuzzing;
mod interrupts;
pub mod layout;
mod machine;
mod run;
mod sandbox;
mod serial;
mod slots;
mod state;

pub use machine::{Config, Ender, Machine};
pub use slots::Plug;
