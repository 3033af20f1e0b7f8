//! Messages no front-end should send. The connection may be closed for them; the daemon serves the next front-end, and no
//! descriptor is left behind. One test in this file: it counts the descriptors of the process.

mod common;

use common::guest::{GuestQueue, GuestRegion, QUEUE_BYTES};
use common::ram::Pace;
use common::{Server, shape};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vdblk::vhost::ServeOptions;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// All protocol features that are offered: MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE,
/// CONFIGURE_MEM_SLOTS, DEVICE_STATE.
const PROTOCOL: u64 = 0x8_b22b;
/// Memory that a process may take more or less of without anybody having lost it.
const SLACK_KB: u64 = 4096;

/// Good enough to try things, and the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
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

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    [&request.to_ne_bytes()[..], &flags.to_ne_bytes(), &size.to_ne_bytes(), body].concat()
}

/// A body of the length the request has, with random fields; sometimes of another length.
fn body(r: &mut Random, request: u32) -> Vec<u8> {
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

fn begin(stream: &UnixStream) {
    // GET_FEATURES, the protocol features and features offered: what lies behind is reachable then
    let mut s = stream;
    s.write_all(&message(1, 1, &[])).unwrap();
    s.write_all(&message(15, 1, &[])).unwrap();
    s.write_all(&message(16, 1, &PROTOCOL.to_ne_bytes())).unwrap();
    s.write_all(&message(2, 1, &0x1_7000_7e54u64.to_ne_bytes())).unwrap();
}

fn nonsense(r: &mut Random, stream: &UnixStream, files: &[RawFd]) {
    for _ in 0..r.below(12) {
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
        // the other side may have closed already
        if stream.send_with_fds(&[m.as_slice()], &files).is_err() {
            return;
        }
    }
    if r.below(4) == 0 {
        let mut s = stream;
        let _ = s.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 99, 0, 0, 0, 1, 2, 3][..1 + r.below(14) as usize]);
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn serves(server: &Server) {
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

/// Each message with 0 to 8 descriptors, on a connection that is set up; `true` while there is a next one.
fn descriptors_round(server: &Server, r: &mut Random, round: u64, files: &[RawFd]) {
    let (request, n) = (u32::try_from(round / 9 % 46).unwrap(), round % 9);
    let stream = server.stream();
    begin(&stream);
    let m = message(request, 1 + 8 * (round & 1) as u32, &body(r, request));
    let files: Vec<RawFd> = (0..n).map(|_| files[r.below(files.len() as u64) as usize]).collect();
    let _ = stream.send_with_fds(&[m.as_slice()], &files);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = std::io::copy(&mut &stream, &mut std::io::sink());
}

fn resident_kb() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4
}

/// Rounds of connect, misbehave, disconnect: `VDBLK_ROUNDS`, 10,000 in the long form.
fn rounds() -> u64 {
    std::env::var("VDBLK_ROUNDS").map_or(1000, |n| n.parse().expect("VDBLK_ROUNDS is a number"))
}

#[test]
fn nonsense_ends_a_connection_at_most() {
    let server = Server::with(shape(2), Pace::Deferred, ServeOptions::default());
    serves(&server);
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(1 << 20).unwrap();
    let event = EventFd::new(0).unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    let null = File::open("/dev/null").unwrap();
    let files = [memory.as_raw_fd(), event.as_raw_fd(), reader.as_raw_fd(), null.as_raw_fd()];
    // the first connection is being closed while we look
    std::thread::sleep(Duration::from_millis(200));
    let before = descriptors();
    let mut resident = u64::MAX;
    let mut r = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..rounds() {
        descriptors_round(&server, &mut r, round, &files);
        let stream = server.stream();
        if round % 8 != 0 {
            begin(&stream);
        }
        nonsense(&mut r, &stream, &files);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        // until the other side has closed too; without that its replies would find nobody and end the talk
        let _ = std::io::copy(&mut &stream, &mut std::io::sink());
        if round % 100 == 0 {
            serves(&server);
        }
        if round == rounds() / 4 {
            // by then all that is kept for later use is there
            resident = resident_kb();
        }
    }
    serves(&server);
    // the last connection is being closed while we look
    let start = Instant::now();
    while descriptors() != before {
        assert!(start.elapsed() < Duration::from_secs(5), "{} descriptors, {before} before", descriptors());
        std::thread::sleep(Duration::from_millis(5));
    }
    let now = resident_kb();
    assert!(now <= resident.saturating_add(SLACK_KB), "{now} KiB resident, {resident} before");
    // a front-end that stops in the middle of a message holds up neither shutdown ...
    let mut half = server.stream();
    half.write_all(&message(1, 1, &[])[..7]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let start = Instant::now();
    server.tell_to_end();
    server.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
}
