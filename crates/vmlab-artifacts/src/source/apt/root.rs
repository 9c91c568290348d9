//! A private apt root for one suite: lists of our own, beside those of the host.
//!
//! It needs no root rights, touches nothing of the host, and lives in the cache directory:
//!
//! ```text
//! CACHE/apt/KEY/lock         held while apt works here
//! CACHE/apt/KEY/sources/     the one source
//! CACHE/apt/KEY/lists/       what apt fetched and checked
//! CACHE/apt/KEY/index.json   the kernel packages in those lists; its age is the lists' age
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::command::{apt, run};
use super::packages::{Package, PackageFilter};
use super::sources::HostSource;
use crate::cache::{Flaw, Lease};
use crate::source::deb::stanza_fields;
use crate::spec::Distro;
use crate::{Arch, ContentKey, KernelError, Progress};

/// How long fetched lists are used before apt is asked again.
pub(super) const LIST_LIFETIME: Duration = Duration::from_secs(60 * 60);

/// Settings that cannot be made on the command line. A host's hooks clean up its own caches or tell
/// its desktop about updates, and this is no update of the host.
const APT_CONF: &str = "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n\
    #clear APT::Update::Post-Invoke-Success;\n#clear APT::Architectures;\n";

/// What apt says of a suite that is not in the archive.
const NO_SUCH_SUITE: &str = "does not have a Release file";

/// A suite with lists of its own.
#[derive(Debug, Clone)]
pub(super) struct AptRoot {
    dir: PathBuf,
    pub(super) source: HostSource,
    arch: Arch,
    distro: Distro,
}

/// What a suite has.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Index {
    /// What apt said when there is no such suite.
    pub(super) missing: Option<String>,
    /// The Release file's `Origin`, `Codename` and `Suite`.
    pub(super) origin: String,
    pub(super) codename: String,
    pub(super) suite: String,
    /// The parts of kernels.
    pub(super) packages: Vec<Package>,
}

/// Whether the saved index of an apt root, if it has one, can be read.
pub(super) fn verify(dir: &Path) -> Result<(), Flaw> {
    match fs::read(dir.join("index.json")) {
        Ok(bytes) => Ok(serde_json::from_slice::<Index>(&bytes).map(drop)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl AptRoot {
    pub(super) fn new(
        cache_root: &Path,
        source: HostSource,
        arch: Arch,
        distro: Distro,
    ) -> AptRoot {
        // The configuration that a caller chose with APT_CONFIG can decide what is trusted.
        let config = std::env::var_os("APT_CONFIG").unwrap_or_default();
        let key = source
            .kept
            .iter()
            .fold(ContentKey::new("apt-root-1"), |key, (name, value)| key.field(name, value))
            .field("uri", &source.uri)
            .field("suite", &source.suite)
            .field("signed-by", source.signed_by.as_deref().unwrap_or_default())
            .field("arch", arch.debian())
            .field("config", config.as_encoded_bytes())
            .finish();
        AptRoot { dir: cache_root.join(super::APT).join(&key[..24]), source, arch, distro }
    }

    /// The suite's kernel packages; asks the archive where the lists are old, or `fresh` says so.
    ///
    /// # Errors
    /// [`KernelError::Apt`] with apt's words; a suite that does not exist is no error.
    pub(super) fn index(&self, fresh: bool, progress: &dyn Progress) -> Result<Index, KernelError> {
        let _lock = self.prepare()?;
        if !fresh && let Some(index) = self.saved_index() {
            return Ok(index);
        }
        progress.phase(&format!("refresh the package lists of {}", self.source.suite));
        let mut command = self.apt_get();
        command.args(["update", "-qq", "-o", "APT::Status-Fd=1"]);
        // The package cache that an update ends with is of no use here and takes seconds.
        command.args(["-o", "pkgCacheFile::Generate=false", "-o", "APT::Update::Error-Mode=any"]);
        let index = match run(command, self.distro, |_| {})? {
            Ok(()) => self.read_lists()?,
            Err(words) if words.contains(NO_SUCH_SUITE) => {
                Index { missing: Some(words), ..Index::default() }
            }
            Err(words) => {
                let doing = format!("fetch the package lists of {}", self.source.suite);
                return Err(KernelError::Apt { doing, words });
            }
        };
        self.save_index(&index)?;
        Ok(index)
    }

    /// Downloads packages into `dest`, an empty directory. apt checks them against its lists.
    ///
    /// # Errors
    /// [`KernelError::Apt`] with apt's words.
    pub(super) fn download(
        &self,
        packages: &[Package],
        dest: &Path,
        progress: &dyn Progress,
    ) -> Result<Vec<PathBuf>, KernelError> {
        let _lock = self.prepare()?;
        let total: u64 = packages.iter().map(|package| package.size).sum();
        let mut command = self.apt_get();
        command.current_dir(dest).args(["download", "-qq", "-o", "APT::Status-Fd=1"]);
        command.args(packages.iter().map(|p| format!("{}={}", p.name, p.version)));
        progress.download(0, Some(total));
        let outcome = run(command, self.distro, |line| {
            if let Some(percent) = percent_done(line) {
                progress.download((total as f64 * percent / 100.0) as u64, Some(total));
            }
        })?;
        let names = || packages.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ");
        let failed = |words| KernelError::Apt { doing: format!("download {}", names()), words };
        outcome.map_err(failed)?;
        progress.download(total, Some(total));
        let mut debs = Vec::new();
        for item in fs::read_dir(dest).map_err(|e| KernelError::cache_io("list", dest, e))? {
            let path = item.map_err(|e| KernelError::cache_io("list", dest, e))?.path();
            if path.extension().is_some_and(|ext| ext == "deb") {
                debs.push(path);
            }
        }
        debs.sort();
        if debs.len() != packages.len() {
            let words = format!("nothing, but it left {} of {} files", debs.len(), packages.len());
            return Err(failed(words));
        }
        Ok(debs)
    }

    /// Makes the directories and files that apt wants, and locks them against other processes that use
    /// or delete them.
    fn prepare(&self) -> Result<(Lease, File), KernelError> {
        let make = |dir: &Path| {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|e| KernelError::cache_io("make the directory for apt's lists", dir, e))
        };
        // It can be deleted until it is in use.
        let lease = loop {
            make(&self.dir)?;
            if let Some(lease) = Lease::take(&self.dir)? {
                break lease;
            }
        };
        for sub in ["sources", "lists/partial", "cache/archives/partial", "state"] {
            make(&self.dir.join(sub))?;
        }
        let path = self.dir.join("lock");
        let fail = |e| KernelError::cache_io("lock apt's lists with", &path, e);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(fail)?;
        lock.lock().map_err(fail)?;
        for (name, text) in [
            ("sources/suite.sources", self.deb822()),
            ("apt.conf", APT_CONF.to_owned()),
            ("status", String::new()),
        ] {
            let path = self.dir.join(name);
            fs::write(&path, text)
                .map_err(|e| KernelError::cache_io("write apt's settings to", &path, e))?;
        }
        Ok((lease, lock))
    }

    /// The `Release` file of the lists that [`index`](AptRoot::index) has fetched, as the archive signed it.
    ///
    /// # Errors
    /// [`KernelError::Cache`] when it is not there.
    pub(super) fn release_file(&self) -> Result<String, KernelError> {
        let dir = self.dir.join("lists");
        let read = || -> io::Result<String> {
            let mut found = Vec::new();
            for item in fs::read_dir(&dir)? {
                let path = item?.path();
                if path
                    .to_str()
                    .is_some_and(|p| p.ends_with("_InRelease") || p.ends_with("_Release"))
                {
                    found.push(path);
                }
            }
            found.sort();
            let path = found.first().ok_or(io::ErrorKind::NotFound)?;
            Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
        };
        read().map_err(|e| KernelError::cache_io("find the Release file in", &dir, e))
    }

    pub(super) fn deb822(&self) -> String {
        let source = &self.source;
        let mut text = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\nArchitectures: {}\nTargets: Packages\n",
            source.uri,
            source.suite,
            self.arch.debian()
        );
        let kept = source.kept.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in kept.chain(source.signed_by.as_deref().map(|key| ("Signed-By", key))) {
            // A key that stands in the field itself goes on in indented lines.
            text.push_str(&format!("{name}: {}\n", value.replace('\n', "\n ")));
        }
        text
    }

    fn apt_get(&self) -> Command {
        let mut command = apt("apt-get");
        self.settings(&mut command);
        command
    }

    fn settings(&self, command: &mut Command) {
        command.arg("-c").arg(self.dir.join("apt.conf"));
        for (name, place) in [
            ("Dir::State", "state"),
            ("Dir::State::Lists", "lists"),
            ("Dir::State::status", "status"),
            ("Dir::Cache", "cache"),
            ("Dir::Cache::archives", "cache/archives"),
            ("Dir::Etc::sourceparts", "sources"),
        ] {
            let mut value = std::ffi::OsString::from(format!("{name}="));
            value.push(self.dir.join(place));
            command.arg("-o").arg(value);
        }
        let arch = self.arch.debian();
        for setting in [
            "Dir::Etc::sourcelist=/dev/null",
            "Dir::Etc::preferences=/dev/null",
            "Dir::Etc::preferencesparts=/dev/null",
            "Acquire::Languages=none",
            // Two suites' lists would be 100 MB otherwise.
            "Acquire::GzipIndexes=true",
            // The directories are private to this user, whoever that is.
            "APT::Sandbox::User=root",
            &format!("APT::Architecture={arch}"),
            &format!("APT::Architectures::={arch}"),
        ] {
            command.args(["-o", setting]);
        }
    }

    /// Reads the kernel packages out of the lists that apt has just checked.
    fn read_lists(&self) -> Result<Index, KernelError> {
        let mut command = self.apt_get();
        command.args(["indextargets", "Created-By: Packages"]);
        let mut text = String::new();
        let doing = || format!("read the package lists of {}", self.source.suite);
        let failed = |words| KernelError::Apt { doing: doing(), words };
        run(command, self.distro, |line| {
            text.push_str(line);
            text.push('\n');
        })?
        .map_err(failed)?;
        let mut fields = stanza_fields(text.split("\n\n").next().unwrap_or_default());
        let mut take = |name: &str| fields.remove(name).unwrap_or_default();
        let file = take("filename");
        if file.is_empty() {
            return Err(failed("nothing, but it has no list of packages".to_owned()));
        }
        let mut command = apt(super::helper(self.distro)?);
        self.settings(&mut command);
        command.arg("cat-file").arg(&file);
        let mut filter = PackageFilter::new(self.arch);
        run(command, self.distro, |line| filter.line(line))?.map_err(failed)?;
        Ok(Index {
            missing: None,
            origin: take("origin"),
            codename: take("codename"),
            suite: take("suite"),
            packages: filter.finish(),
        })
    }

    fn saved_index(&self) -> Option<Index> {
        let path = self.dir.join("index.json");
        let age = fs::metadata(&path).ok()?.modified().ok()?.elapsed().ok()?;
        if age >= LIST_LIFETIME {
            return None;
        }
        serde_json::from_slice(&fs::read(&path).ok()?).ok()
    }

    fn save_index(&self, index: &Index) -> Result<(), KernelError> {
        let path = self.dir.join("index.json");
        let temporary = self.dir.join("index.json.new");
        let write = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec(index)?)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|e| KernelError::cache_io("save the package lists to", &path, e))
    }
}

/// The percentage in a line that apt writes to its status descriptor, `dlstatus:2:9.2172:text`.
fn percent_done(line: &str) -> Option<f64> {
    let mut parts = line.strip_prefix("dlstatus:")?.splitn(3, ':');
    let percent: f64 = parts.nth(1)?.parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_progress() {
        assert_eq!(percent_done("dlstatus:2:9.5:Retrieving file 2 of 3"), Some(9.5));
        assert_eq!(percent_done("Get:1 http://m.example"), None);
        assert_eq!(percent_done("dlstatus:2:nan:x"), None);
        assert_eq!(percent_done("dlstatus:2:1e9:x"), None);
    }

    #[test]
    fn a_key_in_the_field_stays_whole() {
        let source = HostSource {
            uri: "http://m.example/debian/".to_owned(),
            suite: "trixie".to_owned(),
            signed_by: Some("\n-----BEGIN-----\n.\nabc".to_owned()),
            kept: Vec::new(),
        };
        let root = AptRoot::new(Path::new("/c"), source, Arch::X86_64, Distro::Debian);
        let text = root.deb822();
        assert!(text.ends_with("Signed-By: \n -----BEGIN-----\n .\n abc\n"), "{text}");
        assert!(text.contains("Architectures: amd64\n"));
        assert!(!text.to_ascii_lowercase().contains("trusted"));
    }
}
