//! What a PC is made of.

pub mod acpi;
pub mod layout;
