//! Who executes the guest's instructions.

use vmlab_vmm::probe;

use crate::Error;
use crate::config::Accel;

/// Which accelerator a user wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AccelChoice {
    /// KVM where it is proved to work, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// TCG, which works everywhere.
    Tcg,
}

/// The accelerator to use, and why it is not KVM where it might have been.
pub(crate) fn choose(choice: AccelChoice) -> Result<(Accel, Option<String>), Error> {
    match choice {
        AccelChoice::Tcg => Ok((Accel::Tcg, None)),
        AccelChoice::Kvm => match probe::prove() {
            Ok(_) => Ok((Accel::Kvm, None)),
            Err(unusable) => Err(Error::Kvm(unusable)),
        },
        AccelChoice::Auto => match probe::prove() {
            Ok(_) => Ok((Accel::Kvm, None)),
            Err(unusable) => Ok((Accel::Tcg, Some(unusable.to_string()))),
        },
    }
}
