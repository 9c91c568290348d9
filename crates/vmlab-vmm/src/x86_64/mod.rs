//! What a PC is made of.

pub mod layout;
