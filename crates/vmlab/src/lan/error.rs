//! Networks that cannot be.

use std::io;

use thiserror::Error;

use super::{MAX_LANS, MAX_MEMBERS};

/// A network that cannot be as it is asked for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LanError {
    /// It has no members, or too many.
    #[error("a network has 1 to {MAX_MEMBERS} members, not {count}")]
    Count {
        /// How many were named.
        count: usize,
    },
    /// A member's name cannot be that of a host.
    #[error("`{name}` cannot be a member of a network: {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A name is there twice.
    #[error("two members of a network have the name `{name}`")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// Hosts can have no addresses there.
    #[error("a network cannot be at {}.{}.{}.0/24", subnet[0], subnet[1], subnet[2])]
    Subnet {
        /// The first three bytes of its addresses.
        subnet: [u8; 3],
    },
    /// The network has no such member.
    #[error("the network has no member `{name}`; it has {}", members.join(", "))]
    Unknown {
        /// The name that was asked for.
        name: String,
        /// Those that there are.
        members: Vec<String>,
    },
    /// A VM is on two networks with the same addresses.
    #[error(
        "a VM cannot be `{}` and `{}`: both are at {}.{}.{}.0/24 (Lan::in_subnet chooses another place)",
        names[0], names[1], subnet[0], subnet[1], subnet[2]
    )]
    SameSubnet {
        /// What it was to be on them.
        names: [String; 2],
        /// The first three bytes of the addresses.
        subnet: [u8; 3],
    },
    /// A VM is on too many networks.
    #[error("a VM can be on {MAX_LANS} networks, not on {count}")]
    TooMany {
        /// How many were asked for.
        count: usize,
    },
    /// A VM that runs is that member already.
    #[error(
        "a VM that runs is `{name}` already; it has to end before another one can be that member"
    )]
    Taken {
        /// The member.
        name: String,
    },
    /// A member is to be on two sides of a split network.
    #[error("`{name}` cannot be on two sides of a network that is split")]
    TwoSides {
        /// The member.
        name: String,
    },
    /// The host has no more threads or descriptors for it.
    #[error("the switch of a network cannot be made")]
    Switch {
        /// Why.
        #[source]
        source: io::Error,
    },
}
