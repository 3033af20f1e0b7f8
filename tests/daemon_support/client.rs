//! A guest with one or more queues of a served disk.

use super::guest::{GuestQueue, GuestRegion, QUEUE_BYTES, T_FLUSH, T_GET_ID, T_IN, T_OUT};
use super::{PATIENCE, comes_true};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
const SECTOR: u64 = 512;
/// Data that fits one request.
pub const MOST: usize = 16 << 10;

/// A front-end whose queues run.
pub struct Guest {
    pub front_end: Frontend,
    pub features: u64,
    queues: Vec<GuestQueue>,
}

impl Guest {
    /// Connects as soon as somebody listens at `path`.
    pub fn connect(path: &Path, queues: usize) -> Guest {
        Self::over(dial(path), queues)
    }

    /// The same with one queue, at the begin of this memory.
    pub fn connect_in(path: &Path, region: &Arc<GuestRegion>) -> Guest {
        Self::in_memory(dial(path), region, 1)
    }

    /// Over a connection that is there already.
    pub fn over(stream: UnixStream, queues: usize) -> Guest {
        let region = GuestRegion::new(0, queues as u64 * QUEUE_BYTES, 0);
        Self::in_memory(stream, &region, queues)
    }

    fn in_memory(stream: UnixStream, region: &Arc<GuestRegion>, queues: usize) -> Guest {
        stream.set_read_timeout(Some(PATIENCE)).expect("time-out");
        let mut fe = Frontend::from_stream(stream, 64);
        let features = fe.get_features().expect("features");
        fe.set_owner().expect("owner");
        let protocol = fe.get_protocol_features().expect("protocol features");
        fe.set_protocol_features(protocol).expect("protocol features");
        fe.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        fe.set_features(features).expect("features");
        fe.set_mem_table(&[region.info()]).expect("memory");
        let queues: Vec<_> = (0..queues).map(|i| GuestQueue::new(region, i as u64, 64, true)).collect();
        for (i, q) in queues.iter().enumerate() {
            set_up(&mut fe, i, q);
        }
        Guest { front_end: fe, features, queues }
    }

    /// The first queue.
    pub fn queue(&mut self) -> &mut GuestQueue {
        &mut self.queues[0]
    }

    pub fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    pub fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let place = vec![0; len as usize];
        self.front_end.get_config(offset, len, VhostUserConfigFlags::empty(), &place).expect("config").1
    }

    pub fn size_bytes(&mut self) -> u64 {
        u64::from_le_bytes(self.config(0, 8).try_into().expect("8 bytes")) * SECTOR
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> u8 {
        self.queues[0].request(T_OUT, offset / SECTOR, data, 0).0
    }

    pub fn try_read(&mut self, offset: u64, len: u32) -> (u8, Vec<u8>) {
        let (status, _, data) = self.queues[0].request(T_IN, offset / SECTOR, &[], len);
        (status, data)
    }

    #[track_caller]
    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        let (status, data) = self.try_read(offset, len);
        assert_eq!(status, OK, "a read at {offset}");
        data
    }

    pub fn flush(&mut self) -> u8 {
        self.queues[0].request(T_FLUSH, 0, &[], 0).0
    }

    pub fn serial(&mut self) -> String {
        let (status, _, id) = self.queues[0].request(T_GET_ID, 0, &[], 20);
        assert_eq!(status, OK);
        String::from_utf8_lossy(&id).trim_end_matches('\0').to_string()
    }

    /// Writes a pattern of `seed` over 4 KiB at `offset`.
    #[track_caller]
    pub fn mark(&mut self, offset: u64, seed: u8) {
        assert_eq!(self.write(offset, &pattern(seed)), OK, "a write at {offset}");
    }

    #[track_caller]
    pub fn assert_marked(&mut self, offset: u64, seed: u8) {
        assert!(self.read(offset, 4096) == pattern(seed), "the pattern {seed} is not at {offset}");
    }

    #[track_caller]
    pub fn assert_zero(&mut self, offset: u64) {
        assert!(self.read(offset, 4096).iter().all(|b| *b == 0), "not zero at {offset}");
    }
}

/// Waits for somebody to listen.
fn dial(path: &Path) -> UnixStream {
    let mut stream = None;
    let came = comes_true(|| {
        stream = UnixStream::connect(path).ok();
        stream.is_some()
    });
    assert!(came, "nobody listens at {}", path.display());
    stream.expect("connected")
}

/// 4 KiB that are like no others.
pub fn pattern(seed: u8) -> Vec<u8> {
    (0..4096u32).map(|i| (i.wrapping_mul(31) >> 3) as u8 ^ seed | 1).collect()
}

fn set_up(fe: &mut Frontend, i: usize, q: &GuestQueue) {
    fe.set_vring_num(i, q.size).expect("ring size");
    fe.set_vring_base(i, 0).expect("ring base");
    fe.set_vring_addr(i, &q.config()).expect("ring addresses");
    fe.set_vring_call(i, &q.call).expect("call");
    fe.set_vring_err(i, &q.err).expect("err");
    fe.set_vring_kick(i, &q.kick).expect("kick");
    fe.set_vring_enable(i, true).expect("enable");
}
