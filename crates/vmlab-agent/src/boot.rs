//! From the kernel's start of PID 1 to the session with the host.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink};
use rustix::termios::{ControlModes, OptionalActions, tcgetattr, tcsetattr};
use vmlab_wire::message::Ready;

use crate::session::{Role, Session};
use crate::setup::Devices;
use crate::{kmsg, modules, power, sys};

/// The name of the virtio-serial port that leads to the host.
const PORT_NAME: &str = "vmlab";

/// What the command line of a guest has of which a snapshot will be taken.
const SNAPSHOT: &str = "vmlab.snapshot";

/// Where the kernel lists the ports of its virtio consoles.
const PORTS: &str = "/sys/class/virtio-ports";

/// How long the port may take to appear. The kernel finds it while it loads the driver or a few
/// milliseconds later; this only bounds the wait for one that is not there.
const PORT_TIMEOUT_S: i64 = 20;

/// Runs as PID 1. Never returns while the machine is on.
pub(crate) fn run(started_ns: u64) -> ExitCode {
    match boot(started_ns) {
        Ok(()) => {}
        Err(why) => kmsg::error(&format!("fatal: {why}")),
    }
    power::off();
    ExitCode::FAILURE
}

fn boot(started_ns: u64) -> Result<(), String> {
    let mut since = started_ns;
    let mut steps = Vec::new();
    let mut done = |name: &str| {
        let now = sys::monotonic_ns();
        steps.push((name.to_owned(), std::mem::replace(&mut since, now), now));
    };
    mount_early()?;
    sys::reserve_stdio().map_err(|e| format!("opening /dev/null: {e}"))?;
    // The kernel would kill this process first: it has no parent to blame.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let events = uevents().map_err(|e| format!("listening for devices: {e}"))?;
    done("first mounts");
    let (modules, trouble) = modules::load();
    done("modules");
    let with_trouble = |why: String| match trouble.as_slice() {
        [] => why,
        trouble => format!("{why}; before that: {}", trouble.join("; ")),
    };
    let command_line =
        fs::read_to_string("/proc/cmdline").map_err(|e| format!("reading /proc/cmdline: {e}"))?;
    let fd = open_channel(&command_line, &events).map_err(with_trouble)?;
    drop(events);
    let mut session = Session::new(Role::Init, fd).map_err(|e| format!("starting: {e}"))?;
    session.note_trouble(trouble);
    done("channel to the host");
    let for_snapshot = command_line.split_whitespace().any(|word| word == SNAPSHOT);
    session.begin_setup();
    done("kernel's filesystems");
    let devices = match for_snapshot {
        true => Devices::find(),
        false => Devices::default(),
    };
    let revivable = devices.count();
    session.keep_devices(devices);
    let ready_ns = sys::monotonic_ns();
    let release = release();
    let over = session.run(Ready { release, started_ns, ready_ns, steps, modules, revivable });
    session.end(&over);
    Ok(())
}

/// The running kernel's release.
pub(crate) fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn mount_early() -> Result<(), String> {
    let none = MountFlags::empty();
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        match rustix::mount::mount(kind, target, kind, none, None) {
            // CONFIG_DEVTMPFS_MOUNT does not reach into an initramfs, but others may have.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(e) => return Err(format!("mounting {kind} at {target}: {e}")),
        }
    }
    Ok(())
}

/// Opens a socket that becomes readable when the kernel announces a device.
fn uevents() -> rustix::io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(netlink::KOBJECT_UEVENT),
    )?;
    rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, 1))?;
    Ok(socket)
}

/// Opens the channel that the kernel's command line names, `vmlab.channel=`.
fn open_channel(command_line: &str, events: &OwnedFd) -> Result<OwnedFd, String> {
    let named = command_line.split_whitespace().find_map(|w| w.strip_prefix("vmlab.channel="));
    match named.unwrap_or("virtio") {
        "virtio" => open_port(events),
        tty => open_tty(tty).map_err(|e| format!("opening the serial port {tty}: {e}")),
    }
}

fn open_port(events: &OwnedFd) -> Result<OwnedFd, String> {
    let until = sys::monotonic_ns() + PORT_TIMEOUT_S as u64 * 1_000_000_000;
    loop {
        if let Some(path) = find_port()? {
            return open_device(&path).map_err(|e| format!("opening the virtio port {path}: {e}"));
        }
        if !power::wait_until(events, until) {
            return Err(format!(
                "no virtio-serial port named {PORT_NAME} appeared (is the device there, and its \
                 transport's driver in the kernel or initramfs: virtio_pci or virtio_mmio?)"
            ));
        }
        let mut event = [0; 4096];
        while matches!(rustix::io::read(events, &mut event), Ok(n) if n > 0) {}
    }
}

/// Opens a virtio port, which only one process can have open at a time.
pub(crate) fn open_device(path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// Looks for the device of the port among those that the kernel has found by now.
pub(crate) fn find_port() -> Result<Option<String>, String> {
    let ports = fs::read_dir(PORTS).map_err(|e| {
        format!(
            "{PORTS}: {e} (the kernel lacks CONFIG_VIRTIO_CONSOLE, or its module virtio_console)"
        )
    })?;
    for port in ports.flatten() {
        let name = fs::read_to_string(port.path().join("name"));
        if name.is_ok_and(|name| name.trim_end() == PORT_NAME) {
            return Ok(Some(format!("/dev/{}", port.file_name().to_string_lossy())));
        }
    }
    Ok(None)
}

/// Opens a serial port so that all bytes pass as they are.
fn open_tty(name: &str) -> rustix::io::Result<OwnedFd> {
    let path: PathBuf = ["/dev", name].iter().collect();
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(&path, flags, Mode::empty())?;
    let mut settings = tcgetattr(&fd)?;
    settings.make_raw();
    // A line without modem signals is up all the same, and never waits for them.
    settings.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
    settings.control_modes -= ControlModes::CRTSCTS;
    tcsetattr(&fd, OptionalActions::Now, &settings)?;
    Ok(fd)
}
