//! The device's answers to a front-end's messages: state of the connection and its rings, orders to the workers.
//!
//! Front-ends differ in their order, so there is none here: a message changes what is known of a ring, and a ring runs as
//! soon, and as long, as everything it needs is known: addresses, a kick message, and that it is enabled. Rings are
//! quiet (nothing taken that has not ended) before a message that says so is answered: GET_VRING_BASE, disabling, resets
//! and every change of memory but an addition.
//!
//! An error returned from here closes the connection, with its reason in the log. But for `InvalidOperation`: the message
//! was in order, only its wish is refused.

use super::dirty::{DirtyLog, RingLog};
use super::inflight::{InflightRegion, Tracker};
use super::memory::{Memory, RegionInfo};
use super::ring::RingSetup;
use super::state::{DeviceState, Transfer};
use super::sys;
use super::thread::{Order, Pending, Reply, StartRing, WorkerHandle};
use super::worker::RingExtras;
use crate::limits;
use crate::virtio::{ConfigSpace, DeviceShape, feature};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures as Protocol, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost_user_backend::{VringMutex, VringT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::event::{EventConsumer, EventNotifier};

/// The framework's ring state; its memory stays empty, since workers have their own.
type VringState = VringMutex<GuestMemoryAtomic<GuestMemoryMmap>>;

/// Descriptor table, available ring and used ring in the front-end's addresses.
type Addresses = [u64; 3];

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG without a body: request, flags (version 1, no reply wanted), length.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// What is known of a ring.
struct Vring {
    /// Size, next index, descriptors, whether enabled.
    state: VringState,
    addresses: Option<Addresses>,
    /// Where writes to the used ring are logged, if they are.
    log_used: Option<u64>,
    err: Option<File>,
    /// SET_VRING_KICK came (with or without a descriptor) since the ring was stopped.
    kicked: bool,
    /// The worker serves it.
    running: bool,
}

impl Vring {
    fn new(queue_size: u16) -> io::Result<Self> {
        let nowhere = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let state = VringState::new(nowhere, queue_size).map_err(io::Error::other)?;
        Ok(Vring { state, addresses: None, log_used: None, err: None, kicked: false, running: false })
    }

    /// What the worker needs to start, if the ring is to run and does not yet.
    fn start_order(
        &self,
        event_idx: bool,
        inflight: Option<Tracker>,
        log: Option<Arc<DirtyLog>>,
    ) -> Option<Order> {
        use virtio_queue::QueueT;
        let [descriptors, available, used] = self.addresses?;
        let state = self.state.get_ref();
        if self.running || !self.kicked || !state.is_enabled() {
            return None;
        }
        let queue = state.get_queue();
        let setup = RingSetup {
            size: queue.size(),
            descriptors,
            available,
            used,
            next_avail: queue.next_avail(),
            event_idx,
        };
        let kick = copy(state.get_kick(), EventConsumer::try_clone);
        let call = copy(state.get_call(), EventNotifier::try_clone);
        let err = copy(&self.err, File::try_clone);
        let log = log.map(|log| RingLog { log, used: self.log_used });
        let extras = RingExtras { call, err, inflight, log };
        Some(Order::Start(Box::new(StartRing { setup, kick, extras })))
    }
}

/// The device as one front-end has negotiated it. Each connection has its own.
pub(super) struct Handler {
    shape: Arc<DeviceShape>,
    workers: Arc<[WorkerHandle]>,
    vrings: Vec<Vring>,
    memory: Arc<Memory>,
    config: ConfigSpace,
    features: u64,
    protocol: Protocol,
    write_through: Option<bool>,
    /// Where the front-end keeps what is in flight.
    inflight: Option<Arc<InflightRegion>>,
    /// Where writes to guest memory are logged while LOG_ALL is on.
    log: Option<Arc<DirtyLog>>,
    /// The device's state on its way from or to another host.
    transfer: Option<Transfer>,
    /// For messages to the front-end.
    back_channel: Option<OwnedFd>,
    /// The descriptor that the next message brings for that.
    expected: Option<OwnedFd>,
}

impl Handler {
    /// The protocol features to offer.
    const PROTOCOL: Protocol = Protocol::CONFIG
        .union(Protocol::MQ)
        .union(Protocol::REPLY_ACK)
        .union(Protocol::CONFIGURE_MEM_SLOTS)
        .union(Protocol::BACKEND_REQ)
        .union(Protocol::RESET_DEVICE)
        .union(Protocol::INFLIGHT_SHMFD)
        .union(Protocol::LOG_SHMFD)
        .union(Protocol::DEVICE_STATE);

    /// A device that nothing has been negotiated with.
    pub(super) fn new(shape: Arc<DeviceShape>, workers: Arc<[WorkerHandle]>) -> io::Result<Self> {
        let vrings = (0..shape.num_queues).map(|_| Vring::new(shape.queue_size));
        Ok(Handler {
            vrings: vrings.collect::<io::Result<_>>()?,
            config: ConfigSpace::new(&shape),
            shape,
            workers,
            memory: Arc::new(Memory::empty()),
            features: 0,
            protocol: Protocol::empty(),
            write_through: None,
            inflight: None,
            log: None,
            transfer: None,
            back_channel: None,
            expected: None,
        })
    }

    /// The front-end has gone: ends what it has in flight and lets its memory go.
    pub(super) fn close(&mut self) {
        self.stop_all();
        self.replace_memory(Memory::empty());
        self.inflight = None;
        self.log = None;
        self.transfer = None;
        self.back_channel = None;
        self.expected = None;
    }

    /// The next message brings this. The `vhost` crate's own type for the channel has no word for CONFIG_CHANGE.
    pub(super) fn expect_back_channel(&mut self, channel: Option<OwnedFd>) {
        self.expected = channel;
    }

    /// The disk has grown: says so to the front-end, which asks for the config space then.
    pub(super) fn grown(&mut self, shape: &Arc<DeviceShape>) {
        self.shape = Arc::clone(shape);
        self.config.set_size(shape.size_bytes);
        let Some(channel) = &self.back_channel else {
            return tracing::info!("the front-end has no ear for it; it sees the size when it asks");
        };
        let message: Vec<u8> = CONFIG_CHANGE.iter().flat_map(|word| word.to_ne_bytes()).collect();
        if let Err(e) = sys::send_now(channel, &message) {
            tracing::warn!("cannot tell the front-end that the disk has grown: {e}");
        }
    }

    fn ring(&mut self, index: u32) -> Result<(usize, &mut Vring)> {
        let i = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.vrings.get_mut(i).map(|v| (i, v)).ok_or_else(|| bad(format!("there is no queue {index}")))
    }

    fn has(&self, bit: u64) -> bool {
        self.features & bit != 0
    }

    /// Starts a ring if it is to run.
    fn update(&mut self, i: usize) {
        let number = u16::try_from(i).ok();
        let inflight = self.inflight.as_ref().zip(number).and_then(|(region, n)| region.tracker(n));
        let log = self.log.clone().filter(|_| self.has(feature::LOG_ALL));
        let event_idx = self.has(feature::EVENT_IDX);
        let Some(order) = self.vrings[i].start_order(event_idx, inflight, log) else { return };
        match self.workers[i].ask(order) {
            Reply::Refused(why) => tracing::warn!("queue {i}: {why}; this queue is not served"),
            _ => self.vrings[i].running = true,
        }
    }

    fn update_all(&mut self) {
        (0..self.vrings.len()).for_each(|i| self.update(i));
    }

    /// Stops rings: nothing is in flight on them afterwards, and their next index is known. All of them drain at the
    /// same time.
    fn stop(&mut self, rings: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let running: Vec<usize> = rings.into_iter().filter(|i| self.vrings[*i].running).collect();
        let pending: Vec<Pending> = running.iter().map(|i| self.workers[*i].send(Order::Stop)).collect();
        for (i, p) in running.iter().zip(pending) {
            let v = &mut self.vrings[*i];
            v.running = false;
            match p.wait() {
                Reply::Stopped(next) => v.state.set_queue_next_avail(next),
                Reply::Refused(why) => tracing::error!("queue {i}: cannot be stopped: {why}"),
                Reply::Done => {}
            }
        }
        running
    }

    fn stop_all(&mut self) {
        self.stop(0..self.vrings.len());
    }

    /// Gives all workers other memory. Rings run only if it contains all of the former.
    fn replace_memory(&mut self, memory: Memory) {
        self.memory = Arc::new(memory);
        let orders = self.workers.iter().map(|w| w.send(Order::Memory(Arc::clone(&self.memory))));
        orders.collect::<Vec<_>>().into_iter().for_each(|p| drop(p.wait()));
    }

    /// Lets memory go: rings are quiet meanwhile and resolved again, each on its own.
    fn swap_memory(&mut self, memory: Memory) {
        self.stop_all();
        self.replace_memory(memory);
        self.update_all();
    }

    /// A driver that takes neither FLUSH nor CONFIG_WCE cannot flush, one that chose write-through will not.
    fn update_write_through(&mut self) {
        let cannot_flush = self.features & (feature::FLUSH | feature::CONFIG_WCE) == 0;
        let on = cannot_flush || !self.config.write_back();
        if self.write_through != Some(on) {
            self.write_through = Some(on);
            let orders: Vec<_> = self.workers.iter().map(|w| w.send(Order::WriteThrough(on))).collect();
            orders.into_iter().for_each(|p| drop(p.wait()));
        }
    }

    fn disable_all(&mut self) {
        self.stop_all();
        self.vrings.iter().for_each(|v| v.state.set_enabled(false));
    }

    fn state(&self) -> DeviceState {
        DeviceState { write_back: self.config.write_back(), size_bytes: self.shape.size_bytes }
    }

    fn take_state(&mut self, state: DeviceState) -> io::Result<()> {
        if state.size_bytes != self.shape.size_bytes {
            let (theirs, ours) = (state.size_bytes, self.shape.size_bytes);
            let what = format!("it is that of a disk of {theirs} bytes, this one has {ours}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        self.config.set_write_back(state.write_back);
        self.update_write_through();
        Ok(())
    }

    fn check_inflight(&self, i: &VhostUserInflight) -> Result<()> {
        let (queues, size) = (self.shape.num_queues, self.shape.queue_size);
        if i.num_queues > queues || i.queue_size > size {
            let what = format!("{} queues of {} entries in flight", i.num_queues, i.queue_size);
            return Err(bad(format!("{what}: there are {queues} of up to {size}")));
        }
        Ok(())
    }

    /// Changes something of a ring that a worker has to know too while it runs.
    fn tell(&self, i: usize, order: Option<Order>) -> Result<()> {
        match order.map(|o| self.workers[i].ask(o)) {
            Some(Reply::Refused(why)) => {
                tracing::warn!("queue {i}: {why}");
                Err(Error::InvalidOperation("the descriptor is of no use"))
            }
            _ => Ok(()),
        }
    }
}

/// A duplicate for the worker. Without one the queue goes on as if there were none, which a guest may notice.
fn copy<T>(fd: &Option<T>, duplicate: impl Fn(&T) -> io::Result<T>) -> Option<T> {
    let made = duplicate(fd.as_ref()?);
    made.inspect_err(|e| tracing::error!("cannot duplicate a descriptor of the front-end: {e}")).ok()
}

/// The message makes no sense; the connection is closed.
fn bad(why: String) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, why))
}

fn region_info(r: &VhostUserMemoryRegion) -> RegionInfo {
    RegionInfo {
        guest_addr: r.guest_phys_addr,
        len: r.memory_size,
        user_addr: r.user_addr,
        mmap_offset: r.mmap_offset,
    }
}

fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated; the specification suggests to ignore it or to disable all rings.
    fn reset_owner(&mut self) -> Result<()> {
        self.disable_all();
        Ok(())
    }

    /// Back to what it was when the connection began, but for what the front-end keeps account of itself and need not
    /// send again: memory, and the descriptors for signals. The inflight region goes: QEMU too forgets its own then, and
    /// nothing is in flight.
    fn reset_device(&mut self) -> Result<()> {
        self.disable_all();
        for v in &mut self.vrings {
            v.addresses = None;
            v.log_used = None;
            v.kicked = false;
            v.state.set_kick(None);
            v.state.set_queue_size(self.shape.queue_size);
            v.state.set_queue_next_avail(0);
        }
        self.features = 0;
        self.config = ConfigSpace::new(&self.shape);
        self.write_through = None;
        self.inflight = None;
        self.log = None;
        self.transfer = None;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.shape.features())
    }

    /// Comes twice in QEMU, and again while rings run. Whether EVENT_IDX is used is decided when a ring starts.
    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.shape.features();
        if unknown != 0 {
            return Err(bad(format!("the features {unknown:#x} were not offered")));
        }
        let logging = (features ^ self.features) & feature::LOG_ALL != 0;
        if logging {
            // a request that runs would not know that it is to be logged
            self.stop_all();
        }
        self.features = features;
        self.update_write_through();
        if logging {
            self.update_all();
        }
        if !self.has(feature::PROTOCOL_FEATURES) {
            // there is no message to enable them then
            self.vrings.iter().for_each(|v| v.state.set_enabled(true));
            self.update_all();
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let memory =
            Memory::new(regions.iter().map(region_info).zip(files)).map_err(Error::ReqHandlerError)?;
        self.swap_memory(memory);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let most = self.shape.queue_size;
        let (i, _) = self.ring(index)?;
        let size = u16::try_from(num).ok().filter(|n| n.is_power_of_two() && *n <= most);
        let Some(size) = size else {
            return Err(bad(format!("queue {i}: a size of {num} is not a power of two up to {most}")));
        };
        self.stop([i]);
        self.vrings[i].state.set_queue_size(size);
        self.update(i);
        Ok(())
    }

    /// Only noted: whether the addresses mean anything is found out when the ring starts, with the memory of then.
    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let new = Some([descriptor, available, used]);
        let log_used = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let (i, v) = self.ring(index)?;
        // QEMU repeats the addresses of running rings when it turns dirty logging on and off
        if v.addresses != new || v.log_used != log_used {
            self.stop([i]);
            self.vrings[i].addresses = new;
            self.vrings[i].log_used = log_used;
            self.update(i);
        }
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| bad(format!("{base} is no ring index")))?;
        let (i, _) = self.ring(index)?;
        self.stop([i]);
        self.vrings[i].state.set_queue_next_avail(base);
        self.update(i);
        Ok(())
    }

    /// Stops the ring; a kick message starts it again.
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (i, _) = self.ring(index)?;
        self.stop([i]);
        let v = &mut self.vrings[i];
        v.kicked = false;
        v.state.set_kick(None);
        Ok(VhostUserVringState::new(index, u32::from(v.state.queue_next_avail())))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (i, v) = self.ring(u32::from(index))?;
        v.kicked = true;
        v.state.set_kick(fd);
        if v.running {
            let kick = copy(v.state.get_ref().get_kick(), EventConsumer::try_clone);
            return self.tell(i, Some(Order::Kick(kick)));
        }
        self.update(i);
        Ok(())
    }

    /// Without a descriptor the queue completes silently: cloud-hypervisor sends none if the guest polls.
    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (i, v) = self.ring(u32::from(index))?;
        if let Some(Err(e)) = fd.as_ref().map(sys::set_nonblocking) {
            tracing::debug!("queue {i}: its call descriptor stays blocking: {e}");
        }
        v.state.set_call(fd);
        let call = copy(v.state.get_ref().get_call(), EventNotifier::try_clone);
        let order = v.running.then_some(Order::Call(call));
        self.tell(i, order)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (i, v) = self.ring(u32::from(index))?;
        if let Some(Err(e)) = fd.as_ref().map(sys::set_nonblocking) {
            tracing::debug!("queue {i}: its error descriptor stays blocking: {e}");
        }
        v.err = fd;
        let err = copy(&v.err, File::try_clone);
        let order = v.running.then_some(Order::Err(err));
        self.tell(i, order)
    }

    fn get_protocol_features(&mut self) -> Result<Protocol> {
        Ok(Self::PROTOCOL)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let bits = Protocol::from_bits(features).filter(|b| Self::PROTOCOL.contains(*b));
        self.protocol =
            bits.ok_or_else(|| bad(format!("not all protocol features of {features:#x} were offered")))?;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.shape.num_queues))
    }

    /// Also for rings that were never set up: QEMU enables all of them.
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (i, v) = self.ring(index)?;
        v.state.set_enabled(enable);
        if enable {
            self.update(i);
        } else {
            self.stop([i]);
        }
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let size = usize::try_from(size).map_err(|_| Error::InvalidParam)?;
        Ok(self.config.read(offset, size))
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        if self.config.write(offset, data).is_err() {
            return Err(Error::InvalidOperation("a driver can write the cache mode only"));
        }
        self.update_write_through();
        Ok(())
    }

    /// Kept for CONFIG_CHANGE: the descriptor, not the crate's type around another of its kind.
    fn set_backend_req_fd(&mut self, _backend: Backend) {
        self.back_channel = self.expected.take();
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    /// The size is ours to compute; the front-end's numbers only say for how many queues of which size.
    fn get_inflight_fd(&mut self, wish: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.check_inflight(wish)?;
        let (bytes, file) =
            InflightRegion::create(wish.num_queues, wish.queue_size).map_err(Error::ReqHandlerError)?;
        Ok((VhostUserInflight::new(bytes, 0, wish.num_queues, wish.queue_size), file))
    }

    /// Comes before the rings start, mostly. Whether something was in flight is looked at when a ring starts. A
    /// front-end that negotiates the feature and never sends this is served without.
    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Result<()> {
        self.check_inflight(region)?;
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *region;
        let region = InflightRegion::open(file, mmap_offset, mmap_size, num_queues, queue_size);
        let region = region.map_err(Error::ReqHandlerError)?;
        self.stop_all();
        self.inflight = Some(Arc::new(region));
        self.update_all();
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(limits::MAX_MEM_SLOTS as u64)
    }

    /// Rings go on meanwhile. Those whose addresses had not been there get another chance.
    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let memory = self.memory.with(region_info(region), file).map_err(Error::ReqHandlerError)?;
        self.replace_memory(memory);
        self.update_all();
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.without(region_info(region)).map_err(Error::ReqHandlerError)?;
        self.swap_memory(memory);
        Ok(())
    }

    /// Of a device at rest: the state of one that runs would be old before it arrives.
    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        self.transfer = None;
        if !self.protocol.contains(Protocol::DEVICE_STATE) {
            return not_offered();
        }
        if self.vrings.iter().any(|v| v.running) {
            tracing::warn!("front-end's wish refused: the state of a device whose rings run");
            return Err(Error::InvalidOperation("rings run"));
        }
        self.transfer = Some(match direction {
            VhostTransferStateDirection::SAVE => Transfer::save(self.state(), file),
            VhostTransferStateDirection::LOAD => Transfer::Loading(file),
        });
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        let Some(transfer) = self.transfer.take() else { return not_offered() };
        match transfer.end().and_then(|state| state.map_or(Ok(()), |s| self.take_state(s))) {
            Ok(()) => Ok(()),
            Err(e) => {
                tracing::warn!("the device's state was not transferred: {e}");
                Err(Error::ReqHandlerError(e))
            }
        }
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    /// Rings that run with another log take this one up. Logging as such is turned on and off by a feature bit.
    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::open(file, log.mmap_offset, log.mmap_size).map_err(Error::ReqHandlerError)?;
        self.stop_all();
        self.log = Some(Arc::new(log));
        self.update_all();
        Ok(())
    }
}
