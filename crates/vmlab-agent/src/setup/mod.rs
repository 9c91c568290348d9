//! Making the guest ready for commands, as the host says.

mod bus;
mod by_id;
mod clean;
mod disk;
mod disks;
mod files;
mod modules;
mod network;
mod pseudo;
mod revive;
mod root;
mod system;
mod upper;

use std::fmt::Display;

use rustix::io::Errno;
use vmlab_wire::message::{Disk, Failure, GoOn, Mount, RootMode, Setup, SetupReport};

use crate::exec::OwnFilesystems;
use crate::sys::monotonic_ns;

/// What a step returns: nothing, or why the guest cannot be made ready.
pub(crate) type Step = Result<(), Failure>;

/// A failure of `step` by a system call.
fn failed(step: impl Display, errno: Errno, hint: &str) -> Failure {
    let detail = match hint {
        "" => errno.to_string(),
        hint => format!("{errno} ({hint})"),
    };
    Failure { step: step.to_string(), detail, errno: Some(errno.raw_os_error()) }
}

/// A failure of `step` in the standard library's I/O.
fn failed_io(step: impl Display, error: &std::io::Error, hint: &str) -> Failure {
    let errno = error.raw_os_error();
    let detail = match hint {
        "" => error.to_string(),
        hint => format!("{error} ({hint})"),
    };
    Failure { step: step.to_string(), detail, errno }
}

/// A guest that is ready.
pub(crate) struct Done {
    /// What the host wants to know.
    pub(crate) report: SetupReport,
    /// The filesystems that are the guest's own, with no share among them.
    pub(crate) own_filesystems: OwnFilesystems,
}

pub(crate) use clean::make_clean;
pub(crate) use disks::take_out;
pub(crate) use revive::{Devices, release_bridges};

/// Takes a disk into use that has just been plugged in.
pub(crate) fn take_in(disk: &Disk) -> Step {
    system::find_devices()?;
    disks::set_up(std::slice::from_ref(disk)).inspect_err(|_| {
        // The host takes it out. What has not appeared need not be forgotten.
        let _ = take_out(&disk.serial);
    })
}

/// Makes a guest good for the present, that was stopped at some time: `devices` are those that were replaced.
pub(crate) fn go_on(go_on: &GoOn, devices: &Devices, warn: &mut dyn FnMut(String)) -> Step {
    system::clock(go_on.clock_ns, warn);
    if go_on.revive {
        let revived = devices.revive(devices.count());
        revived.map_err(|e| failed_io("go on with its devices", &e, ""))?;
    }
    system::entropy(&go_on.entropy, warn);
    Ok(())
}

/// Remembers the devices in these slots behind the bridge.
pub(crate) fn hold(slots: &[u8]) -> Result<Devices, Failure> {
    Devices::at(slots).map_err(|e| failed_io("look at its devices", &e, ""))
}

/// Does what is the same for every guest, before the host says what this one is to be. Where VMs are
/// restored, it was done before the snapshot. `warn` is as for [`run`].
pub(crate) fn begin(warn: &mut dyn FnMut(String)) -> Step {
    release_bridges();
    network::loopback(warn);
    pseudo::mount_kernels_own()
}

/// Moves the wall clock.
pub(crate) fn adjust_clock(by_ns: i64, warn: &mut dyn FnMut(String)) {
    system::clock(system::wall_clock_ns().saturating_add_signed(by_ns), warn);
}

/// What was done, each with the time that it took.
struct Steps {
    done: Vec<(String, u64)>,
    since: u64,
}

impl Steps {
    fn begin() -> Self {
        Self { done: Vec::new(), since: monotonic_ns() }
    }

    fn done(&mut self, name: &str) {
        let now = monotonic_ns();
        self.done.push((name.to_string(), (now - self.since) / 1000));
        self.since = now;
    }

    /// What the host wants to know when all is done.
    fn report(self, setup: &Setup) -> SetupReport {
        let accounts = setup.accounts.then(files::accounts);
        SetupReport { steps: self.done, clock_ns: system::wall_clock_ns(), accounts }
    }
}

/// Loads the modules that the host asks for, the last thing in every system.
fn load_modules(setup: &Setup, done: &mut impl FnMut(&str)) -> Step {
    if !setup.modprobe.is_empty() {
        setup.modprobe.iter().try_for_each(|words| modules::modprobe(words))?;
        done("modprobe");
    }
    Ok(())
}

/// Makes the guest ready. `warn` tells the host of what does not keep it from running commands.
pub(crate) fn run(
    setup: &Setup,
    devices: &Devices,
    warn: &mut dyn FnMut(String),
) -> Result<Done, Failure> {
    let mut steps = Steps::begin();
    let mut done = |name: &str| steps.done(name);
    system::clock(setup.clock_ns, warn);
    system::entropy(&setup.entropy, warn);
    done("clock and entropy");
    if setup.revive > 0 {
        let revived = devices.revive(setup.revive);
        revived.map_err(|e| failed_io("go on with the devices of the snapshot", &e, ""))?;
        done("revived devices");
    }
    if setup.new_devices {
        system::find_devices()?;
        done("new devices");
    }
    let Some(root) = &setup.root else {
        return Err(Failure {
            step: "find its root".to_string(),
            detail: "the host names none".to_string(),
            errno: None,
        });
    };
    let mut placed = false;
    root::mount(root, |layers| {
        // What cannot be made now is made through the overlay, which says why if it cannot be made there.
        placed = layers.place(&setup.files).is_ok();
        if setup.modules.is_some() {
            let _ = layers.make_dir(&modules::place());
        }
    })?;
    done("root");
    root::switch()?;
    done("switch root");
    pseudo::mount_memory(root.mode)?;
    done("memory filesystems");
    if let Some(tree) = &setup.modules {
        modules::mount(tree, root.mode, warn)?;
        done("module tree");
    }
    // Before the shares: whatever is written after them may end up on the host.
    if !placed {
        files::place(&setup.files, root.mode, warn)?;
        done("files");
    }
    let own: &[_] = match root.mode {
        RootMode::Overlay | RootMode::ReadOnly => &["/tmp", "/run", "/var/tmp"],
        // The rest is the root's.
        RootMode::ReadWrite => &["/tmp", "/run"],
    };
    let own_filesystems = OwnFilesystems::of(own.iter().copied());
    for share in &setup.shares {
        files::share(share)?;
    }
    if !setup.shares.is_empty() {
        done("shares");
    }
    if !setup.disks.is_empty() {
        disks::set_up(&setup.disks)?;
        done("disks");
    }
    system::hostname(&setup.hostname, warn);
    done("hostname");
    if !setup.lans.is_empty() {
        network::configure_lans(&setup.lans, warn)?;
        done("networks of VMs");
    }
    if let Some(network) = &setup.network {
        network::configure(network, &setup.lans, warn)?;
        done("network");
    }
    load_modules(setup, &mut done)?;
    let report = steps.report(setup);
    Ok(Done { report, own_filesystems })
}

/// Makes a system ready that has a PID 1 of its own: it keeps its root and all that is in it.
pub(crate) fn run_in_system(setup: &Setup, warn: &mut dyn FnMut(String)) -> Result<Done, Failure> {
    let mut steps = Steps::begin();
    let mut done = |name: &str| steps.done(name);
    system::entropy(&setup.entropy, warn);
    if !setup.hostname.is_empty() {
        system::hostname(&setup.hostname, warn);
    }
    done("entropy and name");
    if !setup.shares.is_empty() {
        files::await_writable_root(&setup.shares);
        done("writable root");
    }
    for share in &setup.shares {
        files::share(share)?;
    }
    done("shares");
    if !setup.disks.is_empty() {
        disks::set_up(&setup.disks)?;
        done("disks");
    }
    load_modules(setup, &mut done)?;
    let report = steps.report(setup);
    Ok(Done { report, own_filesystems: OwnFilesystems::of([]) })
}

/// Takes the shares from such a system, so that all that was written to them is on the host.
pub(crate) fn unmount(shares: &[Mount]) {
    for share in shares.iter().rev() {
        if let Err(e) = files::unshare(share) {
            crate::kmsg::error(&format!("a share is still in use: {}", e.detail));
        }
    }
}
