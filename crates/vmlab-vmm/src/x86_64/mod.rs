//! What a PC is made of.

pub mod acpi;
pub mod cpuid;
pub mod layout;
