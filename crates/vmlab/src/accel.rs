//! Who executes the guest's instructions.

use vmlab_vmm::probe::{self, KvmProof};

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

/// What was chosen.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) accel: Accel,
    /// Why it is not KVM, where it might have been.
    pub(crate) reason: Option<String>,
    /// What the guest's kernel has to be told.
    pub(crate) arguments: &'static [&'static str],
}

pub(crate) fn choose(choice: AccelChoice) -> Result<Chosen, Error> {
    let tcg = |reason| Chosen { accel: Accel::Tcg, reason, arguments: &[] };
    match choice {
        AccelChoice::Tcg => Ok(tcg(None)),
        AccelChoice::Kvm => probe::prove().map(kvm).map_err(Error::Kvm),
        AccelChoice::Auto => {
            Ok(probe::prove().map_or_else(|unusable| tcg(Some(unusable.to_string())), kvm))
        }
    }
}

fn kvm(proof: KvmProof) -> Chosen {
    // Where the guest's choice of what XSAVE saves is lost, its processes would lose registers.
    let arguments: &[&str] = if proof.xsetbv_lost { &["noxsave"] } else { &[] };
    Chosen { accel: Accel::Kvm, reason: None, arguments }
}
