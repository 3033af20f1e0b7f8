//! Front-ends that misbehave: messages of any request, length, body and number of descriptors, in any order.

use super::Server;
use super::guest::{GuestQueue, GuestRegion, QUEUE_BYTES};
use std::io::Write;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// All protocol features that are offered: MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE,
/// CONFIGURE_MEM_SLOTS, DEVICE_STATE.
const PROTOCOL: u64 = 0x8_b22b;

/// What decides among things to do.
pub trait Choices {
    /// 64 bits.
    fn next(&mut self) -> u64;

    /// A number below `n`, which is not 0.
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A number of the kind that makes trouble.
    fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(4),
            1 => self.below(1 << 20) & !0xfff,
            2 => u64::MAX - self.below(3) * 0xfff,
            3 => 1 << self.below(64),
            4 => self.next(),
            _ => [0x1000, 0x10_0000, 128, 256, 1, 0][self.below(6) as usize],
        }
    }
}

/// Good enough to try things, and the same each time. Never 0.
pub struct Random(pub u64);

impl Choices for Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

pub fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    [&request.to_ne_bytes()[..], &flags.to_ne_bytes(), &size.to_ne_bytes(), body].concat()
}

/// A body of the length the request has, with random fields; sometimes of another length.
pub fn body(r: &mut dyn Choices, request: u32) -> Vec<u8> {
    let words = match request {
        1 | 3 | 4 | 15 | 17 | 34 | 36 => 0,
        2 | 12..=14 | 16 => 1,
        8 | 10 | 11 | 18 => 1,
        9 => 5,
        5 => 1 + 4 * r.below(4),
        37 | 38 => 5,
        24 | 25 => 3,
        31 | 32 => 3,
        42 => 1,
        6 => 2,
        _ => r.below(3),
    };
    let mut b: Vec<u8> = (0..words).flat_map(|_| r.number().to_ne_bytes()).collect();
    if request == 5 && !b.is_empty() {
        b[..8].copy_from_slice(&((words - 1) / 4).to_ne_bytes());
    }
    if matches!(request, 8 | 10 | 11 | 18) {
        b[..4].copy_from_slice(&(r.below(3) as u32).to_ne_bytes());
    }
    if request == 2 && r.below(8) > 0 {
        b.copy_from_slice(&(r.next() & 0x1_7000_7e54 | 1 << 30).to_ne_bytes());
    }
    if request == 37 && r.below(2) == 0 {
        let at = r.below(16) * 0x1_0000;
        b = [0, at, 0x1_0000, at, at].iter().flat_map(|w: &u64| w.to_ne_bytes()).collect();
    }
    if request == 9 && r.below(2) == 0 {
        let at = r.below(16) * 0x1_0000;
        b[8..32].copy_from_slice(&[at, at + 0x8000, at + 0x4000].map(u64::to_ne_bytes).concat());
        b[..8].fill(0);
    }
    if request == 8 && r.below(2) == 0 {
        b[4..].copy_from_slice(&[64, 0, 0, 0]);
    }
    if request == 18 {
        b[4..].copy_from_slice(&[r.below(2) as u8, 0, 0, 0]);
    }
    if matches!(request, 12..=14) {
        b[1..].fill(0);
        b[0] = r.below(3) as u8;
        b[1] = r.below(2) as u8;
    }
    if r.below(40) == 0 {
        b.truncate(r.below(9) as usize);
    }
    b
}

pub fn begin(stream: &UnixStream) {
    // GET_FEATURES, the protocol features and features offered: what lies behind is reachable then
    let mut s = stream;
    s.write_all(&message(1, 1, &[])).unwrap();
    s.write_all(&message(15, 1, &[])).unwrap();
    s.write_all(&message(16, 1, &PROTOCOL.to_ne_bytes())).unwrap();
    s.write_all(&message(2, 1, &0x1_7000_7e54u64.to_ne_bytes())).unwrap();
}

/// One message, most of the time with the descriptors it should have: `files` begin with memory and an event. False if
/// the other side has closed.
pub fn misbehave(r: &mut dyn Choices, stream: &UnixStream, files: &[RawFd]) -> bool {
    let usual = [2, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 18, 21, 24, 25, 31, 32, 34, 36, 37, 38, 42, 43];
    let request = if r.below(15) == 0 { r.below(46) as u32 } else { usual[r.below(23) as usize] };
    let flags =
        if r.below(20) == 0 { [0, 5, u32::MAX][r.below(3) as usize] } else { 1 + 8 * r.below(2) as u32 };
    let m = message(request, flags, &body(r, request));
    let wanted = match request {
        5 => m.len() as u64 / 32,
        12..=14 => u64::from(m.get(13) == Some(&0)),
        6 | 21 | 32 | 37 | 42 => 1,
        _ => 0,
    };
    let n = if r.below(20) == 0 { r.below(33) } else { wanted };
    let kinds = if r.below(4) == 0 { files.len() as u64 } else { 2 };
    let first = u64::from(matches!(request, 12..=14));
    let files: Vec<RawFd> = (0..n).map(|_| files[r.below(kinds).max(first) as usize]).collect();
    stream.send_with_fds(&[m.as_slice()], &files).is_ok()
}

/// Some messages, and perhaps a part of one.
pub fn nonsense(r: &mut dyn Choices, stream: &UnixStream, files: &[RawFd]) {
    for _ in 0..r.below(12) {
        if !misbehave(r, stream, files) {
            return;
        }
    }
    if r.below(4) == 0 {
        let mut s = stream;
        let _ = s.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 99, 0, 0, 0, 1, 2, 3][..1 + r.below(14) as usize]);
    }
}

/// Descriptors this process has open.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// What they are.
pub fn open_files() -> Vec<PathBuf> {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    fds.filter_map(|fd| std::fs::read_link(fd.path()).ok()).collect()
}

/// A well-behaved front-end is served.
pub fn serves(server: &Server) {
    let mut fe: Frontend = server.connect();
    fe.set_owner().unwrap();
    fe.get_features().unwrap();
    let protocol = fe.get_protocol_features().unwrap();
    fe.set_protocol_features(protocol).unwrap();
    fe.set_features(0x1_7000_7e54).unwrap();
    let region = GuestRegion::new(0, QUEUE_BYTES, 0);
    fe.set_mem_table(&[region.info()]).unwrap();
    let mut q = GuestQueue::new(&region, 0, 64, true);
    fe.set_vring_num(0, 64).unwrap();
    fe.set_vring_base(0, 0).unwrap();
    fe.set_vring_addr(0, &q.config()).unwrap();
    fe.set_vring_kick(0, &q.kick).unwrap();
    fe.set_vring_call(0, &q.call).unwrap();
    fe.set_vring_enable(0, true).unwrap();
    q.check_io(0, 1);
}
