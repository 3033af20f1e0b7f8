//! What several tests share.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod guest;
pub mod hostile;
pub mod ram;

use guest::GuestQueue;
use ram::{Pace, RamDisk};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use vdblk::vhost::{Control, Device, Endpoint, ServeOptions, serve};
use vdblk::virtio::DeviceShape;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const DISK_BYTES: usize = 8 << 20;

/// A served disk; ends with the value.
pub struct Server {
    pub disk: Arc<RamDisk>,
    path: PathBuf,
    shutdown: EventFd,
    thread: Option<JoinHandle<vdblk::Result<()>>>,
    _dir: tempfile::TempDir,
}

pub fn shape(num_queues: u16) -> DeviceShape {
    let mut shape = DeviceShape::new(DISK_BYTES as u64);
    shape.num_queues = num_queues;
    shape
}

/// The device over a disk in memory.
pub fn device(disk: &Arc<RamDisk>, shape: DeviceShape, pace: Pace) -> Device<ram::RamChannel> {
    let disk = Arc::clone(disk);
    let make = Box::new(move |_queue, _slots| Ok(disk.channel(pace)));
    Device {
        shape,
        serial: "ram-0123456789-0123456789".to_string(),
        poll_us: 0,
        make,
        resize: None,
        control: Control::default(),
    }
}

impl Server {
    pub fn start(num_queues: u16, pace: Pace) -> Self {
        Self::with(shape(num_queues), pace, ServeOptions::default())
    }

    pub fn with(shape: DeviceShape, pace: Pace, options: ServeOptions) -> Self {
        let disk = RamDisk::new(DISK_BYTES);
        let device = device(&disk, shape, pace);
        Self::of(disk, device, options)
    }

    pub fn of(disk: Arc<RamDisk>, device: Device<ram::RamChannel>, options: ServeOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let shutdown = EventFd::new(EFD_NONBLOCK).unwrap();
        let told = shutdown.try_clone().unwrap();
        let endpoint = Endpoint::Listener(listener);
        let thread = std::thread::spawn(move || serve(device, endpoint, options, &told, || ()));
        Server { disk, path, shutdown, thread: Some(thread), _dir: dir }
    }

    pub fn stream(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    pub fn connect(&self) -> Frontend {
        Frontend::from_stream(self.stream(), 64)
    }

    pub fn tell_to_end(&self) {
        self.shutdown.write(1).unwrap();
    }

    /// Waits until `serve` has returned.
    pub fn join(mut self) -> vdblk::Result<()> {
        self.thread.take().unwrap().join().unwrap()
    }

    pub fn has_returned(&self) -> bool {
        self.thread.as_ref().is_none_or(|t| t.is_finished())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.disk.release();
        self.tell_to_end();
        if let Some(t) = self.thread.take() {
            let end = t.join();
            if !std::thread::panicking() {
                end.unwrap().unwrap();
            }
        }
    }
}

/// Negotiates everything that is offered.
pub fn negotiate(fe: &mut Frontend) -> u64 {
    let features = fe.get_features().unwrap();
    fe.set_owner().unwrap();
    let protocol = fe.get_protocol_features().unwrap();
    fe.set_protocol_features(protocol).unwrap();
    fe.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    fe.set_features(features).unwrap();
    features
}

pub fn set_up(fe: &Frontend, i: usize, q: &GuestQueue) {
    fe.set_vring_num(i, q.size).unwrap();
    fe.set_vring_base(i, 0).unwrap();
    fe.set_vring_addr(i, &q.config()).unwrap();
    fe.set_vring_call(i, &q.call).unwrap();
    fe.set_vring_err(i, &q.err).unwrap();
    fe.set_vring_kick(i, &q.kick).unwrap();
}
