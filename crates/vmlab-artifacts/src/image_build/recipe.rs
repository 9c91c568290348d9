//! What an image is made of, and how a user writes it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ContentKey;
use crate::spec::{Distro, nearest};

/// Size of a disk unless one is given. The file is sparse, so what is not used costs nothing.
pub const DEFAULT_SIZE: u64 = 4 << 30;

/// The smallest disk: the system itself takes about half of this.
pub const MIN_SIZE: u64 = 1 << 30;

/// The largest disk: what an ext4 file system without the `64bit` feature could have, and far beyond
/// what a test wants.
pub const MAX_SIZE: u64 = 16 << 40;

/// Most packages that a recipe may name, so that a command line made of them stays possible.
const MAX_PACKAGES: usize = 1000;

/// Debian's releases by number.
const RELEASES: [(&str, &str); 5] =
    [("11", "bullseye"), ("12", "bookworm"), ("13", "trixie"), ("14", "forky"), ("15", "duke")];

/// What is said after every parse error.
const GRAMMAR: &str =
    "an image is debian:SUITE, such as debian:12, debian:bookworm or debian:testing";

/// How a disk can be booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootFirmware {
    /// By a BIOS and by UEFI.
    #[default]
    Both,
    /// By UEFI alone, with and without secure boot.
    Uefi,
    /// By a BIOS alone.
    Bios,
}

impl BootFirmware {
    pub(super) const fn name(self) -> &'static str {
        match self {
            BootFirmware::Both => "both",
            BootFirmware::Uefi => "uefi",
            BootFirmware::Bios => "bios",
        }
    }

    pub(super) const fn bios(self) -> bool {
        !matches!(self, BootFirmware::Uefi)
    }

    pub(super) const fn uefi(self) -> bool {
        !matches!(self, BootFirmware::Bios)
    }
}

/// What an image is made of. `debian:12` parses into one.
///
/// ```
/// use vmlab_artifacts::image_build::ImageRecipe;
/// let recipe: ImageRecipe = "debian:12".parse()?;
/// assert_eq!(recipe.suite, "bookworm");
/// # Ok::<(), vmlab_artifacts::image_build::RecipeError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageRecipe {
    /// Whose packages. Only Debian's for now.
    pub distribution: Distro,
    /// The suite by its name; a number was replaced by it.
    pub suite: String,
    /// Packages besides those that every image has; sorted, each once.
    pub packages: Vec<String>,
    /// Size of the disk in bytes, a multiple of 1 MiB.
    pub size: u64,
    /// How it can be booted.
    pub firmware: BootFirmware,
}

/// A text or a value that makes no recipe.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// The text names no image.
    #[error("`{spec}` names no image that can be built: {reason}; {GRAMMAR}")]
    Spec {
        /// The text.
        spec: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The name is no package's.
    #[error(
        "`{0}` is no name of a package: small letters, digits and `+-.`, then perhaps =VERSION"
    )]
    Package(String),
    /// Too many packages.
    #[error("an image can be given {MAX_PACKAGES} packages, not {0}")]
    Packages(usize),
    /// The disk is too small or too large.
    #[error("the disk can have {} to {} MiB, not {} MiB", MIN_SIZE >> 20, MAX_SIZE >> 20, _0 >> 20)]
    Size(u64),
}

impl FromStr for ImageRecipe {
    type Err = RecipeError;

    fn from_str(text: &str) -> Result<ImageRecipe, RecipeError> {
        let fail = |reason: String| RecipeError::Spec { spec: text.to_owned(), reason };
        let Some((name, suite)) = text.split_once(':') else {
            return Err(fail("it has no colon".to_owned()));
        };
        let names = Distro::ALL.map(Distro::name);
        let Some(distribution) = Distro::ALL.into_iter().find(|distro| distro.name() == name)
        else {
            let hint = nearest(name, &names)
                .map_or(String::new(), |near| format!(" (did you mean {near}:{suite}?)"));
            return Err(fail(format!("`{name}` is no distribution{hint}")));
        };
        if distribution != Distro::Debian {
            return Err(fail("only Debian's images are built so far".to_owned()));
        }
        let suite = suite_name(suite).map_err(fail)?;
        Ok(ImageRecipe {
            distribution,
            suite,
            packages: Vec::new(),
            size: DEFAULT_SIZE,
            firmware: BootFirmware::Both,
        })
    }
}

/// As it is written: `debian:bookworm`.
impl fmt::Display for ImageRecipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.distribution, self.suite)
    }
}

impl ImageRecipe {
    /// Whether a text is meant as a recipe and not as a file: `debian:` and whatever follows.
    pub fn is_meant(text: &str) -> bool {
        text.split_once(':').is_some_and(|(name, rest)| {
            Distro::ALL.iter().any(|distro| distro.name() == name) && !rest.contains('/')
        })
    }

    /// With these packages besides.
    ///
    /// # Errors
    /// [`RecipeError::Package`] and [`RecipeError::Packages`].
    pub fn with_packages(
        mut self,
        packages: impl IntoIterator<Item = impl Into<String>>,
    ) -> Result<ImageRecipe, RecipeError> {
        for package in packages {
            let package = package.into();
            if !is_package(&package) {
                return Err(RecipeError::Package(package));
            }
            self.packages.push(package);
        }
        self.packages.sort();
        self.packages.dedup();
        match self.packages.len() {
            count if count > MAX_PACKAGES => Err(RecipeError::Packages(count)),
            _ => Ok(self),
        }
    }

    /// With a disk of so many bytes, rounded up to whole MiB.
    ///
    /// # Errors
    /// [`RecipeError::Size`].
    pub fn with_size(mut self, bytes: u64) -> Result<ImageRecipe, RecipeError> {
        if !(MIN_SIZE..=MAX_SIZE).contains(&bytes) {
            return Err(RecipeError::Size(bytes));
        }
        self.size = bytes.next_multiple_of(1 << 20);
        Ok(self)
    }

    /// With this firmware.
    #[must_use]
    pub fn with_firmware(self, firmware: BootFirmware) -> ImageRecipe {
        ImageRecipe { firmware, ..self }
    }

    /// All packages that are asked for by name: one kernel, what a system needs to boot and to be
    /// spoken with, and the recipe's own.
    pub(super) fn all_packages(&self) -> Vec<&str> {
        /// `zstd` compresses the initramfs; without udev, no device would have its name.
        const ALWAYS: [&str; 9] = [
            "systemd-sysv",
            "udev",
            "dbus",
            "kmod",
            "iproute2",
            "procps",
            "initramfs-tools",
            "zstd",
            "qemu-guest-agent",
        ];
        let mut all = ALWAYS.to_vec();
        // The cloud kernel has all devices of a VM, boots faster, and takes a fourth of the space.
        if !self.packages.iter().any(|package| package.starts_with("linux-image-")) {
            all.push("linux-image-cloud-amd64");
        }
        all.extend(self.packages.iter().map(String::as_str));
        all
    }

    /// Adds all that the recipe says to a key.
    pub(super) fn add_to(&self, key: ContentKey) -> ContentKey {
        let key = key
            .field("distribution", self.distribution.name())
            .field("suite", &self.suite)
            .field("size", self.size.to_le_bytes())
            .field("firmware", self.firmware.name());
        self.packages.iter().fold(key, |key, package| key.field("package", package))
    }
}

/// The name of a suite that may be given by its number.
fn suite_name(suite: &str) -> Result<String, String> {
    if let Some((_, name)) = RELEASES.iter().find(|(number, _)| *number == suite) {
        return Ok((*name).to_owned());
    }
    if suite.is_empty() {
        return Err("it has no suite after its colon".to_owned());
    }
    if suite.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        let known: Vec<&str> = RELEASES.iter().map(|(number, _)| *number).collect();
        return Err(format!("there is no release {suite} (there are {})", known.join(", ")));
    }
    // It becomes a part of paths and of an address.
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if !suite.bytes().all(legal) || !suite.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Err(format!("`{suite}` is no name of a suite"));
    }
    // A misspelt suite may still exist, so that this is only for the archive to say.
    Ok(suite.to_owned())
}

/// Whether this is a package's name, perhaps with a version. Nothing else may reach apt, which also
/// takes patterns, files and options there.
fn is_package(text: &str) -> bool {
    let (name, version) = text.split_once('=').unwrap_or((text, "0"));
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b);
    name.len() >= 2
        && name.bytes().all(legal)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        // apt takes a last `+` or `-` for "install" and "remove"; g++ is a package all the same.
        && !name.ends_with('-')
        && !version.is_empty()
        && version.bytes().all(|b| b.is_ascii_alphanumeric() || b".+-:~".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(text: &str) -> ImageRecipe {
        text.parse().unwrap()
    }

    #[test]
    fn numbers_are_names() {
        assert_eq!(recipe("debian:12"), recipe("debian:bookworm"));
        assert_eq!(recipe("debian:13").suite, "trixie");
        assert_eq!(recipe("debian:testing").suite, "testing");
        assert_eq!(recipe("debian:12").to_string(), "debian:bookworm");
    }

    #[test]
    fn errors_say_what_is_meant() {
        for (text, words) in [
            ("debian", "no colon"),
            ("debain:12", "did you mean debian:12?"),
            ("ubuntu:noble", "only Debian's"),
            ("debian:", "no suite"),
            ("debian:99", "there is no release 99 (there are 11, 12,"),
            ("debian:12.5", "there is no release 12.5"),
            ("debian:../etc", "no name of a suite"),
            ("debian:Bookworm", "no name of a suite"),
            ("debian:-x", "no name of a suite"),
        ] {
            let error = text.parse::<ImageRecipe>().unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(GRAMMAR), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_is_no_recipe() {
        assert!(ImageRecipe::is_meant("debian:12"));
        assert!(ImageRecipe::is_meant("ubuntu:"));
        for file in ["debian", "debian.qcow2", "debian:/x", "./debian:12", "nbd:x"] {
            assert!(!ImageRecipe::is_meant(file), "{file}");
        }
    }

    #[test]
    fn packages_are_names() {
        let two = recipe("debian:12").with_packages(["vim", "g++", "vim"]).unwrap();
        assert_eq!(two.packages, ["g++", "vim"]);
        assert!(recipe("debian:12").with_packages(["vim=2:9.0.1378-2+deb12u2"]).is_ok());
        let apt_means_more =
            ["", "v", "vim-", "-o", "~nvim", "./x.deb", "?obsolete", "a/sid", "a,b"];
        for bad in apt_means_more.iter().chain(&["Vim", "vim=", "vim=1 2", "a b", "a:b", "ab%25"]) {
            let error = recipe("debian:12").with_packages([*bad]).unwrap_err();
            assert_eq!(error, RecipeError::Package((*bad).to_owned()));
        }
        let many: Vec<String> = (0..=MAX_PACKAGES).map(|n| format!("p{n}")).collect();
        assert!(matches!(
            recipe("debian:12").with_packages(many),
            Err(RecipeError::Packages(1001))
        ));
    }

    #[test]
    fn a_kernel_of_the_recipe_takes_the_place_of_the_usual_one() {
        let kernels = |recipe: &ImageRecipe| -> Vec<String> {
            let all = recipe.all_packages();
            all.into_iter().filter(|name| name.starts_with("linux-")).map(str::to_owned).collect()
        };
        let usual = recipe("debian:12");
        assert_eq!(kernels(&usual), ["linux-image-cloud-amd64"]);
        let own = usual.with_packages(["linux-image-amd64"]).unwrap();
        assert_eq!(kernels(&own), ["linux-image-amd64"]);
    }

    #[test]
    fn sizes_are_bounded_and_rounded() {
        let sized = |size| recipe("debian:12").with_size(size);
        assert_eq!(sized((2 << 30) + 1).unwrap().size, (2 << 30) + (1 << 20));
        for bad in [0, MIN_SIZE - 1, MAX_SIZE + 1, u64::MAX] {
            assert_eq!(sized(bad), Err(RecipeError::Size(bad)));
        }
    }

    #[test]
    fn all_of_a_recipe_is_in_its_key() {
        let key = |recipe: &ImageRecipe| recipe.add_to(ContentKey::new("t")).finish();
        let base = recipe("debian:12");
        let others = [
            recipe("debian:13"),
            base.clone().with_packages(["vim"]).unwrap(),
            base.clone().with_size(2 << 30).unwrap(),
            base.clone().with_firmware(BootFirmware::Bios),
            base.clone().with_firmware(BootFirmware::Uefi),
        ];
        let mut keys: Vec<String> = others.iter().chain([&base]).map(key).collect();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), others.len() + 1);
        assert_eq!(key(&base), key(&recipe("debian:bookworm")));
    }
}
