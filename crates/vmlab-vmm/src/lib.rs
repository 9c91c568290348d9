//! KVM for vmlab.
//!
//! For now this is only the proof that the host's `/dev/kvm` runs guest code, and at the speed of
//! the processor: see [`probe`].

pub mod probe;
