use thiserror::Error;

/// Version of everything in this crate. Host and agent are built together, so they differ only when
/// something old is brought back, such as a snapshot; they then refuse each other.
pub const PROTOCOL_VERSION: u32 = 6;

const MAGIC: [u8; 8] = *b"vmlab\0w\n";

/// The first bytes that each side sends: 8 bytes of magic and the version, little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// The sender's [`PROTOCOL_VERSION`].
    pub version: u32,
}

/// Why a peer's preamble was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PreambleError {
    /// The bytes are not a preamble at all.
    #[error("the other end does not speak vmlab's protocol (it began with {found:02x?})")]
    NotVmlab {
        /// What came instead of the magic.
        found: [u8; 8],
    },
    /// The peer speaks another version.
    #[error("the other end speaks version {theirs} of the protocol, this one version {ours}")]
    Version {
        /// The peer's version.
        theirs: u32,
        /// This build's version.
        ours: u32,
    },
}

impl Preamble {
    /// Length of an encoded preamble in bytes.
    pub const LEN: usize = 12;

    /// The preamble of this build.
    pub const OURS: Preamble = Preamble { version: PROTOCOL_VERSION };

    /// The bytes to send.
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..8].copy_from_slice(&MAGIC);
        out[8..].copy_from_slice(&self.version.to_le_bytes());
        out
    }

    /// Checks what a peer sent: the magic first, then that it speaks this build's version.
    ///
    /// # Errors
    /// When the bytes are no preamble, or one of another version.
    pub fn check(bytes: [u8; Self::LEN]) -> Result<(), PreambleError> {
        let [m0, m1, m2, m3, m4, m5, m6, m7, v0, v1, v2, v3] = bytes;
        let found = [m0, m1, m2, m3, m4, m5, m6, m7];
        if found != MAGIC {
            return Err(PreambleError::NotVmlab { found });
        }
        let theirs = u32::from_le_bytes([v0, v1, v2, v3]);
        if theirs != PROTOCOL_VERSION {
            return Err(PreambleError::Version { theirs, ours: PROTOCOL_VERSION });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_itself_only() {
        assert_eq!(Preamble::check(Preamble::OURS.encode()), Ok(()));
        let other = Preamble { version: PROTOCOL_VERSION + 1 }.encode();
        assert_eq!(
            Preamble::check(other),
            Err(PreambleError::Version { theirs: PROTOCOL_VERSION + 1, ours: PROTOCOL_VERSION })
        );
        assert!(matches!(
            Preamble::check(*b"SeaBIOS (ver"),
            Err(PreambleError::NotVmlab { found }) if &found == b"SeaBIOS "
        ));
    }
}
