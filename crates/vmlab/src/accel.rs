//! Who executes the guest's instructions.

mod verdict;

use vmlab_artifacts::Cache;

use crate::Error;
use crate::config::Accel;
use verdict::Verdict;

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
#[derive(Debug, Clone)]
pub(crate) struct Chosen {
    pub(crate) accel: Accel,
    /// Why it is not KVM, where it might have been.
    pub(crate) reason: Option<String>,
    /// What the guest's kernel has to be told.
    pub(crate) arguments: &'static [&'static str],
}

/// Chooses. That KVM works, or does not, is proved once in a while, and remembered in the cache.
pub(crate) fn choose(choice: AccelChoice, cache: &Cache) -> Result<Chosen, Error> {
    let tcg = |reason| Chosen { accel: Accel::Tcg, reason, arguments: &[] };
    match choice {
        AccelChoice::Tcg => Ok(tcg(None)),
        // Whoever insists on KVM gets a new proof rather than an old refusal.
        AccelChoice::Kvm => match Verdict::recall(cache) {
            Some(Verdict::Works { xsetbv_lost }) => Ok(kvm(xsetbv_lost)),
            _ => Verdict::prove(cache).map(|proof| kvm(proof.xsetbv_lost)).map_err(Error::Kvm),
        },
        AccelChoice::Auto => Ok(match Verdict::recall(cache) {
            Some(Verdict::Works { xsetbv_lost }) => kvm(xsetbv_lost),
            Some(Verdict::Unusable { why }) => tcg(Some(why)),
            None => Verdict::prove(cache).map_or_else(
                |unusable| tcg(Some(unusable.to_string())),
                |proof| kvm(proof.xsetbv_lost),
            ),
        }),
    }
}

fn kvm(xsetbv_lost: bool) -> Chosen {
    // Where the guest's choice of what XSAVE saves is lost, its processes would lose registers.
    let arguments: &[&str] = if xsetbv_lost { &["noxsave"] } else { &[] };
    Chosen { accel: Accel::Kvm, reason: None, arguments }
}
