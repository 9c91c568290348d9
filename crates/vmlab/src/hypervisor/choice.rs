//! Which hypervisor a user wants.

use crate::config::ConfigError;

/// Names the variable that says so where nothing else does.
const VARIABLE: &str = "VMLAB_HYPERVISOR";

/// Which hypervisor runs a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HypervisorChoice {
    /// vmlab's own monitor where KVM is proved to work and the monitor has all that the VM needs, else QEMU.
    #[default]
    Auto,
    /// QEMU, with KVM or without it.
    Qemu,
    /// vmlab's own monitor, by KVM.
    Kvm,
}

impl HypervisorChoice {
    /// The names that users have for them.
    pub const NAMES: [(&'static str, Self); 3] =
        [("auto", Self::Auto), ("qemu", Self::Qemu), ("kvm", Self::Kvm)];

    /// What the environment says.
    pub(crate) fn of_environment() -> Result<Self, ConfigError> {
        let Some(value) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) else {
            return Ok(Self::default());
        };
        let found = Self::NAMES.into_iter().find(|(name, _)| value == *name);
        found.map(|(_, choice)| choice).ok_or_else(|| ConfigError::HypervisorName {
            variable: VARIABLE,
            value: value.to_string_lossy().into_owned(),
        })
    }
}
