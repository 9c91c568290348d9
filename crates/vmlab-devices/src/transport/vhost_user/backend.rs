//! What the monitor asks for: memory, rings, and their start and end.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap,
};

use crate::device::{Device, Interrupt, offered_features};
use crate::event::Event;
use crate::queue::VirtQueue;
use crate::workers::{OnFault, Workers};

/// One device, as the monitor has set it up so far.
pub(super) struct Backend {
    device: Arc<dyn Device>,
    on_fault: OnFault,
    features: u64,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    regions: Vec<Region>,
    rings: Vec<Ring>,
}

/// Where a part of the guest's memory is in the monitor's address space.
struct Region {
    monitor: u64,
    guest: u64,
    size: u64,
}

struct Ring {
    queue: Arc<VirtQueue>,
    call: Arc<Call>,
    kick: Option<OwnedFd>,
    enabled: bool,
    /// It has been in use, and is taken up where it was left.
    goes_on: bool,
    workers: Option<Workers>,
}

/// The eventfd that interrupts the guest. The monitor changes it at any time.
#[derive(Default)]
struct Call(RwLock<Option<Event>>);

impl Interrupt for Call {
    fn signal(&self) {
        let call = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(call) = &*call {
            call.signal();
        }
    }
}

fn invalid(what: &'static str) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, what))
}

fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

impl Backend {
    /// A device that is not set up. `goes_on` is as of [`serve_on`](super::serve_on).
    pub(super) fn new(
        device: Arc<dyn Device>,
        goes_on: bool,
        on_fault: OnFault,
    ) -> std::result::Result<Self, virtio_queue::Error> {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let ring = |max_size| {
            let call = Arc::new(Call::default());
            let queue = VirtQueue::new(Queue::new(max_size)?, memory.clone(), call.clone());
            let (kick, enabled, workers) = Default::default();
            Ok(Ring { queue: Arc::new(queue), call, kick, enabled, goes_on, workers })
        };
        let rings = device.queues().into_iter().map(|kind| ring(kind.max_size));
        let rings = rings.collect::<std::result::Result<_, _>>()?;
        Ok(Self { device, on_fault, features: 0, memory, regions: Vec::new(), rings })
    }

    fn ring(&mut self, index: impl TryInto<usize>) -> Result<&mut Ring> {
        let index = index.try_into().ok();
        let ring = index.and_then(|index| self.rings.get_mut(index));
        ring.ok_or_else(|| invalid("there is no such queue"))
    }

    /// The guest's address of something in the monitor's memory.
    fn guest_address(&self, monitor: u64) -> Result<GuestAddress> {
        let inside = |region: &Region| {
            let offset = monitor.checked_sub(region.monitor)?;
            (offset < region.size).then(|| GuestAddress(region.guest + offset))
        };
        let address = self.regions.iter().find_map(inside);
        address.ok_or_else(|| invalid("a ring is not in the guest's memory"))
    }

    /// Starts or ends the threads of a queue, as its state demands.
    fn update(&mut self, index: usize) -> Result<()> {
        let (device, on_fault) = (self.device.clone(), self.on_fault.clone());
        let memory = self.memory.memory();
        let ring = self.ring(index)?;
        let Some(kick) = ring.kick.as_ref().filter(|_| ring.enabled) else {
            // This waits for requests in progress.
            ring.workers = None;
            ring.queue.ring().set_ready(ring.kick.is_some());
            return Ok(());
        };
        if ring.workers.is_none() {
            {
                let mut queue = ring.queue.ring();
                queue.set_ready(true);
                if std::mem::take(&mut ring.goes_on) {
                    // No request was in progress when it was left. The monitor has begun with 0.
                    let next = queue.next_used();
                    queue.set_next_avail(next);
                }
                if !queue.is_valid(&*memory) {
                    return Err(invalid("a ring is not in the guest's memory"));
                }
            }
            let kick = kick.try_clone().map_err(Error::ReqHandlerError)?;
            let workers = Workers::start(device, index, ring.queue.clone(), kick, &on_fault);
            ring.workers = Some(workers.map_err(Error::ReqHandlerError)?);
        }
        Ok(())
    }

    fn stop_all(&mut self) -> Result<()> {
        for index in 0..self.rings.len() {
            self.ring(index)?.enabled = false;
            self.update(index)?;
        }
        Ok(())
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.features = 0;
        self.stop_all()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset_owner()
    }

    fn get_features(&mut self) -> Result<u64> {
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        Ok(offered_features(&*self.device) | protocol)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(invalid("a feature was not offered"));
        }
        self.features = features;
        for index in 0..self.rings.len() {
            let ring = self.ring(index)?;
            ring.queue.ring().set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            // Without this feature there is no SET_VRING_ENABLE.
            if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
                ring.enabled = true;
                self.update(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mapped = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let guest = GuestAddress(region.guest_phys_addr);
            let region = GuestRegionMmap::new(region.mmap_region(file)?, guest);
            mapped.push(region.ok_or_else(|| invalid("memory is beyond the end of addresses"))?);
        }
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(other)?;
        // Requests in progress keep what they have begun with.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).replace(memory);
        let place = |region: &VhostUserMemoryRegion| Region {
            monitor: region.user_addr,
            guest: region.guest_phys_addr,
            size: region.memory_size,
        };
        self.regions = regions.iter().map(place).collect();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| invalid("a ring is too long"))?;
        self.ring(index)?.queue.ring().try_set_size(size).map_err(other)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        let descriptor = self.guest_address(descriptor)?;
        let used = self.guest_address(used)?;
        let available = self.guest_address(available)?;
        let memory = self.memory.memory();
        let ring = self.ring(index)?;
        let mut queue = ring.queue.ring();
        queue.try_set_desc_table_address(descriptor).map_err(other)?;
        queue.try_set_avail_ring_address(available).map_err(other)?;
        queue.try_set_used_ring_address(used).map_err(other)?;
        // The protocol has no message for the used index: what is in the ring counts.
        let next = queue.used_idx(&*memory, std::sync::atomic::Ordering::Relaxed).map_err(other)?;
        queue.set_next_used(next.0);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| invalid("a ring has no such index"))?;
        self.ring(index)?.queue.ring().set_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index)?;
        ring.kick = None;
        self.update(index as usize)?;
        let ring = self.ring(index)?;
        *ring.call.0.write().unwrap_or_else(PoisonError::into_inner) = None;
        let next = ring.queue.ring().next_avail();
        Ok(VhostUserVringState::new(index, u32::from(next)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = fd.ok_or_else(|| invalid("rings cannot be polled"))?;
        let ring = self.ring(index)?;
        ring.workers = None;
        ring.kick = Some(kick.into());
        self.update(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = &self.ring(index)?.call;
        *call.0.write().unwrap_or_else(PoisonError::into_inner) =
            fd.map(|fd| OwnedFd::from(fd).into());
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _: Option<File>) -> Result<()> {
        // Errors end the connection, which the monitor cannot miss.
        self.ring(index).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        features.set(VhostUserProtocolFeatures::CONFIG, self.device.provides_config());
        Ok(features)
    }

    fn set_protocol_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        self.update(index as usize)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let config = self.device.config();
        let range = offset as usize..(offset as usize).saturating_add(size as usize);
        let part = config.get(range).map(<[u8]>::to_vec);
        part.ok_or_else(|| invalid("the configuration space is not that long"))
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(invalid("the configuration space cannot be written to"))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("no such device"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidOperation("not offered"))
    }
}
