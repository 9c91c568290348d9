//! Processor architectures, under the names that the various tools give them.

use serde::{Deserialize, Serialize};

/// A processor architecture that a kernel can be built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arch {
    /// 64-bit x86, `x86_64` or `amd64`.
    #[serde(rename = "x86_64")]
    X86_64,
    /// 64-bit ARM, `aarch64` or `arm64`.
    Aarch64,
}

impl Arch {
    /// The architecture that this program was built for.
    pub const HOST: Arch = if cfg!(target_arch = "aarch64") { Arch::Aarch64 } else { Arch::X86_64 };

    /// The name that `uname -m` and QEMU use.
    pub const fn machine(self) -> &'static str {
        match self {
            Arch::X86_64 => "x86_64",
            Arch::Aarch64 => "aarch64",
        }
    }

    /// The name that Debian and Ubuntu packages use.
    pub const fn debian(self) -> &'static str {
        match self {
            Arch::X86_64 => "amd64",
            Arch::Aarch64 => "arm64",
        }
    }

    /// The name of the kernel's own directory under `arch/`.
    pub const fn kernel_dir(self) -> &'static str {
        match self {
            Arch::X86_64 => "x86",
            Arch::Aarch64 => "arm64",
        }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.machine())
    }
}
