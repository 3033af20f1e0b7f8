//! A connection to a device: negotiation, memory table, what the device says of itself.
use crate::features::*;
use crate::mem::{GPA_BASE, Mem};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use vhost::vhost_user::message::*;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

/// Bytes of the config space we ask for: they reach write_zeroes_may_unmap.
const CONFIG_LEN: u32 = 60;

#[derive(Clone)]
pub(crate) struct Opts {
    pub(crate) socket: String,
    pub(crate) queues: usize,
    pub(crate) vring: u16,
    pub(crate) segs: usize,
    pub(crate) no_event_idx: bool,
    pub(crate) no_indirect: bool,
    pub(crate) mem_slots: bool,
    /// negotiate INFLIGHT_SHMFD (a back-end may then insist on SET_INFLIGHT_FD)
    pub(crate) inflight: bool,
}

pub(crate) fn err<E: std::fmt::Debug>(what: &str) -> impl Fn(E) -> io::Error + '_ {
    move |e| io::Error::other(format!("{what}: {e:?}"))
}

/// What the device told us about itself.
#[derive(Clone)]
pub(crate) struct Info {
    pub(crate) offered: u64,
    pub(crate) acked: u64,
    pub(crate) proto_offered: VhostUserProtocolFeatures,
    pub(crate) proto: VhostUserProtocolFeatures,
    pub(crate) max_queues: u64,
    pub(crate) max_slots: u64,
    cfg: Vec<u8>,
}

impl Info {
    fn bytes<const N: usize>(&self, o: usize) -> [u8; N] {
        let b = self.cfg.get(o..o + N).and_then(|b| b.try_into().ok());
        b.unwrap_or([0; N])
    }

    pub(crate) fn c8(&self, o: usize) -> u8 {
        self.bytes::<1>(o)[0]
    }

    pub(crate) fn c16(&self, o: usize) -> u16 {
        u16::from_le_bytes(self.bytes(o))
    }

    pub(crate) fn c32(&self, o: usize) -> u32 {
        u32::from_le_bytes(self.bytes(o))
    }

    /// Capacity in bytes.
    pub(crate) fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.bytes(0)) * 512
    }

    pub(crate) fn max_discard_seg(&self) -> u32 {
        self.c32(40)
    }

    pub(crate) fn blk_size(&self) -> u32 {
        if self.has(BLK_F_BLK_SIZE) { self.c32(20).max(512) } else { 512 }
    }

    /// Was this virtio feature negotiated?
    pub(crate) fn has(&self, feature: u64) -> bool {
        self.acked & feature != 0
    }

    pub(crate) fn inflight(&self) -> bool {
        self.proto.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }
}

pub(crate) struct Dev {
    pub(crate) fe: Frontend,
    pub(crate) info: Info,
}

impl Dev {
    /// Negotiates everything but the vrings.
    pub(crate) fn connect(o: &Opts) -> io::Result<Dev> {
        let mut fe = Frontend::connect(&o.socket, 256).map_err(err("connect"))?;
        let offered = fe.get_features().map_err(err("get_features"))?;
        fe.set_owner().map_err(err("set_owner"))?;
        let mut info = Info {
            offered,
            acked: offered & wanted(o),
            proto_offered: VhostUserProtocolFeatures::empty(),
            proto: VhostUserProtocolFeatures::empty(),
            max_queues: 1,
            max_slots: 0,
            cfg: Vec::new(),
        };
        if offered & F_PROTOCOL != 0 {
            negotiate_protocol(&mut fe, &mut info, o.inflight)?;
        }
        fe.set_features(info.acked).map_err(err("set_features"))?;
        Ok(Dev { fe, info })
    }

    pub(crate) fn set_mem(&mut self, mem: &Mem, slots: bool) -> io::Result<()> {
        let r = VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA_BASE,
            memory_size: mem.len() as u64,
            userspace_addr: mem.uaddr(0),
            mmap_offset: 0,
            mmap_handle: mem.fd.as_raw_fd(),
        };
        if slots {
            self.fe.add_mem_region(&r).map(drop).map_err(err("add_mem_region"))
        } else {
            self.fe.set_mem_table(&[r]).map(drop).map_err(err("set_mem_table"))
        }
    }

    /// A new inflight region from the back-end, if that was negotiated.
    pub(crate) fn get_inflight(&mut self, o: &Opts) -> io::Result<Option<(VhostUserInflight, File)>> {
        if !self.info.inflight() {
            return Ok(None);
        }
        let want = VhostUserInflight::new(0, 0, o.queues as u16, o.vring);
        self.fe.get_inflight_fd(&want).map(Some).map_err(err("get_inflight_fd"))
    }

    /// Gives the region back, before the vrings start.
    pub(crate) fn set_inflight(&mut self, d: &VhostUserInflight, f: &File) -> io::Result<()> {
        self.fe.set_inflight_fd(d, f.as_raw_fd()).map_err(err("set_inflight_fd"))
    }
}

fn wanted(o: &Opts) -> u64 {
    let mut want = F_VERSION_1 | F_PROTOCOL | BLK_DRIVEN;
    if !o.no_event_idx {
        want |= F_EVENT_IDX;
    }
    if !o.no_indirect {
        want |= F_INDIRECT_DESC;
    }
    want
}

fn negotiate_protocol(fe: &mut Frontend, info: &mut Info, inflight: bool) -> io::Result<()> {
    use VhostUserProtocolFeatures as P;
    info.proto_offered = fe.get_protocol_features().map_err(err("get_protocol_features"))?;
    let mut want = P::MQ | P::REPLY_ACK | P::CONFIG | P::CONFIGURE_MEM_SLOTS;
    if inflight {
        want |= P::INFLIGHT_SHMFD;
    }
    info.proto = info.proto_offered & want;
    fe.set_protocol_features(info.proto).map_err(err("set_protocol_features"))?;
    if info.proto.contains(P::REPLY_ACK) {
        fe.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    if info.proto.contains(P::MQ) {
        info.max_queues = fe.get_queue_num().map_err(err("get_queue_num"))?;
    }
    if info.proto.contains(P::CONFIGURE_MEM_SLOTS) {
        info.max_slots = fe.get_max_mem_slots().map_err(err("get_max_mem_slots"))?;
    }
    if info.proto.contains(P::CONFIG) {
        let blank = [0; CONFIG_LEN as usize];
        let (_, b) =
            fe.get_config(0, CONFIG_LEN, VhostUserConfigFlags::empty(), &blank).map_err(err("get_config"))?;
        info.cfg = b;
    }
    Ok(())
}

/// Stops the queues as a VMM does when the guest lets go of the device.
pub(crate) fn close(mut dev: Dev, queues: usize) {
    for i in 0..queues {
        let _ = dev.fe.set_vring_enable(i, false);
        let _ = dev.fe.get_vring_base(i);
    }
}
