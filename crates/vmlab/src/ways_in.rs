//! The ways by which the agent comes into a system that an image has started.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::boot::AGENT;
use crate::error::chain;
use crate::guest::qga;
use crate::hypervisor::VmHandle;
use crate::sync::lock;

/// Which part of the time for the agent qemu-guest-agent may not use up, so that it can be told what came of
/// asking it.
const REST: u32 = 20;

/// All ways, tried at once until the first one has brought the agent. The seed drive is one of the VM's
/// disks, and the credentials are in its tables: only qemu-guest-agent has to be spoken to.
pub(crate) struct WaysIn {
    guest_agent: Arc<Mutex<GuestAgent>>,
    over: Arc<AtomicBool>,
}

/// What came of asking qemu-guest-agent.
#[derive(Debug, Default)]
enum GuestAgent {
    #[default]
    Asked,
    Started,
    Failed(String),
}

impl WaysIn {
    /// Begins to try them. Threads end with the VM, or when this is dropped.
    pub(crate) fn try_all(handle: &Arc<dyn VmHandle>, limit: Duration) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let guest_agent = Arc::new(Mutex::new(GuestAgent::default()));
        let ways = Self { guest_agent: Arc::clone(&guest_agent), over: Arc::clone(&over) };
        let Some(socket) = handle.take_guest_agent_channel() else { return ways };
        let deadline = Instant::now() + (limit - limit / REST);
        let ask = move || {
            let over = || over.load(Ordering::Relaxed);
            let outcome = match qga::put_agent(&socket, AGENT, deadline, &over) {
                Ok(()) => GuestAgent::Started,
                Err(error) => GuestAgent::Failed(chain(&error)),
            };
            *lock(&guest_agent) = outcome;
        };
        let thread = std::thread::Builder::new().name("vmlab-ways-in".to_owned());
        if let Err(error) = thread.spawn(ask) {
            *lock(&ways.guest_agent) = GuestAgent::Failed(format!("no thread for it: {error}"));
        }
        ways
    }

    /// What was tried, for a person to read.
    pub(crate) fn tried(&self) -> Vec<String> {
        let guest_agent = match &*lock(&self.guest_agent) {
            GuestAgent::Asked => "qemu-guest-agent did not answer".to_owned(),
            GuestAgent::Started => {
                "qemu-guest-agent started vmlab's agent, which did not answer".to_owned()
            }
            GuestAgent::Failed(why) => why.clone(),
        };
        vec![
            guest_agent,
            "cloud-init did not start the agent of the seed drive".to_owned(),
            "systemd did not by its credentials, as versions from 252 on do".to_owned(),
            "an image with one of them is needed, or a kernel (-k), which needs none".to_owned(),
        ]
    }
}

impl Drop for WaysIn {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
