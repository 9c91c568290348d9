//! From a test's attribute, the crate's defaults and the caller's environment to a VM.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use super::defaults::Defaults;
use super::{CHANNEL, INSIDE, Settings, Test};
use crate::config::{NetworkMode, Topology};
use crate::events::{EventKind, EventKinds, default_kinds, parse_kinds};
use crate::units::{Bytes, duration};
use crate::{Disk, Environment, Error, GuestUser, Image, Share, Vm, VmBuilder};

/// Variables that are above what tests say.
const KERNEL: &str = "VMLAB_KERNEL";
const MEMORY: &str = "VMLAB_MEMORY";

/// How long a body may take in its guest, unless it is said otherwise. The harness has no limit of its own, and
/// a guest that hangs would hang it.
const TEST_TIME: Duration = Duration::from_secs(300);

/// Why a test cannot be run as it is described.
#[derive(Debug, Error)]
pub(super) enum TestError {
    /// The VM is at fault.
    #[error(transparent)]
    Vm(#[from] Error),
    /// The crate's defaults make no sense.
    #[error("the defaults of tests in {}: {why}", path.display())]
    Defaults {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A value makes no sense.
    #[error("{key} of the test: {why}")]
    Value {
        /// The key of the attribute.
        key: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Something that the test has of the host cannot be found.
    #[error("{what} cannot be found")]
    Find {
        /// What.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// All that a test needs.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) vm: VmBuilder,
    /// This program, which the guest has at the same path.
    pub(super) program: PathBuf,
    /// The kernel of the caller's environment, if that is the one.
    pub(super) other_kernel: Option<String>,
    pub(super) timeout: Duration,
    pub(super) fail_on: EventKinds,
    pub(super) expect: Option<EventKind>,
}

impl Plan {
    /// `channel` is the word for records of a test that runs in the guest.
    pub(super) fn of(test: &Test, channel: Option<&str>) -> Result<Self, TestError> {
        let Settings { timeout, fail_on, expect_event, .. } = test.settings;
        let defaults = Defaults::of(Path::new(test.manifest_dir))?;
        let find = |what| move |source| TestError::Find { what, source };
        let program = std::env::current_exe().map_err(find("the test's program"))?;
        let timeout = timeout.map(str::to_owned).or_else(|| defaults.timeout.clone());
        let timeout = timeout.map(|text| duration(&text).map_err(value("timeout"))).transpose()?;
        let other_kernel = std::env::var(KERNEL).ok().filter(|_| !test.settings.named_by_kernel);
        let vm = machine(test, &defaults, other_kernel.as_deref())?;
        let mut vm = with_files(vm, test)?;
        let environment = environment(test, channel).map_err(find("the working directory"))?;
        vm = match (test.settings.image, test.settings.user) {
            (Some(_), user) => vm.environment(environment).user_of_guest(user.unwrap_or("root")),
            (None, user) => {
                let root = Path::new(test.settings.rootfs.unwrap_or("/"));
                let user = GuestUser::of(user.unwrap_or("root"), &from(test, root));
                let user = user.map_err(value("user"))?;
                vm.environment(Environment { user, ..environment })
            }
        };
        if channel.is_some() {
            vm = vm.program(&program);
        }
        let kinds = fail_on.map(|names| parse_kinds(names.iter().copied())).transpose();
        let kinds = kinds.map_err(value("fail_on"))?;
        let expect = expect_event.map(str::parse::<EventKind>).transpose();
        Ok(Self {
            // Events are read from the console.
            vm: vm.full_console(true).pluggable(channel.is_none()),
            program,
            other_kernel,
            timeout: timeout.unwrap_or(TEST_TIME),
            fail_on: kinds.unwrap_or_else(default_kinds),
            expect: expect.map_err(value("expect_event"))?,
        })
    }
}

fn value<E: Display>(key: &'static str) -> impl Fn(E) -> TestError {
    move |why| TestError::Value { key, why: why.to_string() }
}

/// A path of the attribute, which is from the crate's directory where it is relative.
fn from(test: &Test, path: &Path) -> PathBuf {
    Path::new(test.manifest_dir).join(path)
}

fn machine(
    test: &Test,
    defaults: &Defaults,
    other_kernel: Option<&str>,
) -> Result<VmBuilder, TestError> {
    let Settings { kernel, cpus, topology, memory, network, append, image, .. } = test.settings;
    let mut vm = Vm::builder();
    // An image has its own kernel, unless the test itself names another.
    let default = defaults.kernel.as_deref().filter(|_| image.is_none());
    if let Some(kernel) = other_kernel.filter(|_| image.is_none()) {
        vm = vm.kernel(kernel);
    } else if let Some(kernel) = kernel.or(default) {
        // What begins otherwise may be a distribution's, or a release.
        vm = match kernel.starts_with('.') {
            true => vm.kernel(from(test, Path::new(kernel)).to_string_lossy()),
            false => vm.kernel(kernel),
        };
    }
    let of_caller = std::env::var(MEMORY).ok();
    if let Some(memory) = of_caller.as_deref().or(memory).or(defaults.memory.as_deref()) {
        vm = vm.memory(memory.parse::<Bytes>().map_err(value("memory"))?);
    }
    if let Some(topology) = topology {
        vm = vm.topology(topology.parse::<Topology>().map_err(value("topology"))?);
    } else if let Some(cpus) = cpus {
        vm = vm.cpus(cpus);
    } else if let Some(cpus) = &defaults.cpus {
        vm = vm.cpus(cpus.parse().map_err(value("cpus"))?);
    }
    if network == Some("user") {
        vm = vm.network(NetworkMode::User);
    }
    Ok(append.iter().fold(vm, |vm, arguments| vm.append(*arguments)))
}

fn with_files(mut vm: VmBuilder, test: &Test) -> Result<VmBuilder, TestError> {
    let Settings { rootfs, image, shares, disks, .. } = test.settings;
    if let Some(rootfs) = rootfs {
        vm = vm.rootfs(from(test, Path::new(rootfs)));
    }
    if let Some(image) = image {
        // `debian:12` is no path.
        let file = from(test, Path::new(image));
        vm = vm.image(Image::new(if file.is_file() { file } else { image.into() }));
    }
    for shared in shares {
        let host = from(test, Path::new(shared.host));
        let find = |source| TestError::Find { what: "a shared directory", source };
        let host = host.canonicalize().map_err(find)?;
        let share = match shared.guest {
            Some(guest) => Share::new(host).at(guest),
            None => Share::new(host),
        };
        vm = vm.share(if shared.writable { share } else { share.read_only() });
    }
    disks.iter().try_fold(vm, |vm, options| {
        let from_crate = |(key, value): &(&'static str, &'static str)| match *key {
            "path" | "image" | "content" | "keep" | "record" => {
                (*key, from(test, Path::new(value)).to_string_lossy().into_owned())
            }
            key => (key, (*value).to_owned()),
        };
        let options: Vec<(&str, String)> = options.iter().map(from_crate).collect();
        let options: Vec<(&str, &str)> =
            options.iter().map(|(key, value)| (*key, value.as_str())).collect();
        Ok(disk(vm, &options)?)
    })
}

/// Adds a disk as `--disk` does, from the names and values of its options.
///
/// # Errors
/// When they make no disk.
pub fn disk(vm: VmBuilder, options: &[(&str, &str)]) -> Result<VmBuilder, Error> {
    let disk = Disk::from_pairs(options.iter().copied()).map_err(|why| {
        let words: Vec<String> =
            options.iter().map(|(name, value)| format!("{name}={value}")).collect();
        Error::Disk { text: words.join(","), why }
    })?;
    Ok(vm.disk(disk))
}

fn environment(test: &Test, channel: Option<&str>) -> io::Result<Environment> {
    let mut environment = match test.settings.image {
        None => Environment::of_caller()?,
        Some(_) => {
            let mut environment = Environment::of_system()?;
            let asked = |name: &std::ffi::OsString| {
                name.as_encoded_bytes().starts_with(b"RUST_") || name == "CARGO_MANIFEST_DIR"
            };
            for (name, value) in std::env::vars_os().filter(|(name, _)| asked(name)) {
                environment.set(name, value);
            }
            environment
        }
    };
    if let Some(channel) = channel {
        environment.set(INSIDE, test.path());
        environment.set(CHANNEL, channel);
    }
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_those_of_the_command_line() {
        let options = [("name", "data"), ("size", "256M"), ("mount-options", "a,b")];
        let why = disk(VmBuilder::default(), &options).unwrap_err().to_string();
        assert!(why.starts_with("`name=data,size=256M,mount-options=a,b` is not a disk"), "{why}");
        assert!(disk(VmBuilder::default(), &options[..2]).is_ok());
    }
}
