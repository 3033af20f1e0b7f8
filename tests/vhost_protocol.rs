//! The parts of the protocol that few front-ends use every day: logging of dirty pages, the device's state, a disk that
//! grows, the inflight region's negotiation.

mod common;

use common::guest::{GuestQueue, GuestRegion, QUEUE_BYTES, T_DISCARD, T_GET_ID, T_IN};
use common::ram::{Pace, RamDisk};
use common::{DISK_BYTES, Server, device, shape};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vdblk::vhost::{InflightRegion, Resize, ServeOptions};
use vdblk::virtio::feature;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const PAGE: u64 = 4096;

fn negotiate(fe: &mut Frontend) -> u64 {
    let features = fe.get_features().unwrap();
    fe.set_owner().unwrap();
    let protocol = fe.get_protocol_features().unwrap();
    fe.set_protocol_features(protocol).unwrap();
    fe.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    fe.set_features(features & !feature::LOG_ALL).unwrap();
    features
}

fn start(fe: &mut Frontend, q: &GuestQueue) {
    fe.set_vring_num(0, q.size).unwrap();
    fe.set_vring_base(0, q.avail_index()).unwrap();
    fe.set_vring_addr(0, &q.config()).unwrap();
    fe.set_vring_call(0, &q.call).unwrap();
    fe.set_vring_kick(0, &q.kick).unwrap();
    fe.set_vring_enable(0, true).unwrap();
}

fn connect(server: &Server) -> (Frontend, u64, GuestQueue) {
    let mut fe = server.connect();
    let features = negotiate(&mut fe);
    let region = GuestRegion::new(0, QUEUE_BYTES, 0);
    fe.set_mem_table(&[region.info()]).unwrap();
    let q = GuestQueue::new(&region, 0, 64, true);
    start(&mut fe, &q);
    (fe, features, q)
}

fn capacity(fe: &mut Frontend) -> u64 {
    let (_, bytes) = fe.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
    u64::from_le_bytes(bytes.try_into().unwrap()) * 512
}

/// The numbers of all pages logged since the last look.
fn take_log(file: &File) -> Vec<u64> {
    let mut bytes = vec![0; 64];
    file.read_exact_at(&mut bytes, 0).unwrap();
    file.write_all_at(&[0; 64], 0).unwrap();
    (0..512).filter(|p| bytes[*p / 8] >> (p % 8) & 1 == 1).map(|p| p as u64).collect()
}

#[test]
fn every_page_the_device_writes_is_logged_while_that_is_on() {
    for pace in [Pace::Inline, Pace::Deferred] {
        let server = Server::start(1, pace);
        let log = tempfile::tempfile().unwrap();
        log.set_len(8192).unwrap();
        let base =
            VhostUserDirtyLogRegion { mmap_size: 4096, mmap_offset: 4096, mmap_handle: log.as_raw_fd() };
        // a log that its file does not hold costs the connection
        let long = VhostUserDirtyLogRegion { mmap_size: 8193, ..base };
        assert!(connect(&server).0.set_log_base(0, Some(long)).is_err());
        let (fe, features, mut q) = connect(&server);
        fe.set_log_base(0, Some(VhostUserDirtyLogRegion { mmap_offset: 0, ..base })).unwrap();
        q.check_io(0, 1);
        assert!(take_log(&log).is_empty(), "it is not on yet");

        // data of slot 0 lies in page 17, its status in page 16, the used ring in page 8; it is logged as page 100
        fe.set_features(features).unwrap();
        let mut config = q.config();
        config.flags = 1;
        config.log_addr = Some(100 * PAGE);
        fe.set_vring_addr(0, &config).unwrap();
        q.check_io(0, 2);
        take_log(&log);
        assert_eq!(q.request(T_IN, 0, &[], 6000).0, 1);
        assert_eq!(take_log(&log), [16, 100], "a refused request writes its status only");
        assert_eq!(q.request(T_IN, 0, &[], 8192).0, 0);
        assert_eq!(take_log(&log), [16, 17, 18, 100]);
        assert_eq!(q.request(T_GET_ID, 0, &[], 20).0, 0);
        assert_eq!(take_log(&log), [16, 17, 100]);
        let segment = [&1u64.to_le_bytes()[..], &1u32.to_le_bytes(), &[0; 4]].concat();
        assert_eq!(q.request(T_DISCARD, 0, &segment, 0).0, 0);
        assert_eq!(take_log(&log), [16, 100]);
        // without the flag the ring is not logged
        fe.set_vring_addr(0, &q.config()).unwrap();
        q.check_io(0, 2);
        assert_eq!(take_log(&log), [16, 17]);

        fe.set_features(features & !feature::LOG_ALL).unwrap();
        q.check_io(0, 3);
        assert!(take_log(&log).is_empty(), "it is off again");
        // one that is too short stops the ring before the driver is told of what would be missing on another host
        fe.set_features(features).unwrap();
        q.check_io(0, 4);
        let short = tempfile::tempfile().unwrap();
        short.set_len(1).unwrap();
        let one = VhostUserDirtyLogRegion { mmap_size: 1, mmap_offset: 0, mmap_handle: short.as_raw_fd() };
        take_log(&log);
        fe.set_vring_err(0, &q.err).unwrap();
        fe.set_log_base(0, Some(one)).unwrap();
        q.post(0, T_IN, 0, &[], 512);
        q.kick();
        let begun = Instant::now();
        while q.err.read().is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10), "the ring goes on");
        }
        assert_eq!(q.wait(Duration::from_millis(50)), None);
        assert!(take_log(&log).is_empty());
        // with a new log the ring can be set up again, behind what was taken from it
        fe.set_log_base(0, Some(VhostUserDirtyLogRegion { mmap_offset: 0, ..base })).unwrap();
        q.check_io(0, 5);
    }
}

#[test]
fn the_state_goes_from_device_to_device() {
    let stopped = VhostTransferStatePhase::STOPPED;
    let server = Server::start(1, Pace::Inline);
    let (mut fe, _, mut q) = connect(&server);
    q.check_io(0, 1);
    let pipe = || {
        let (r, w) = std::io::pipe().unwrap();
        (OwnedFd::from(r), OwnedFd::from(w))
    };
    assert!(fe.set_device_state_fd(Direction::SAVE, stopped, pipe().1).is_err(), "rings run");
    assert!(fe.check_device_state().is_err());
    fe.get_vring_base(0).unwrap();
    fe.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    let (reader, writer) = pipe();
    assert!(fe.set_device_state_fd(Direction::SAVE, stopped, writer).unwrap().is_none());
    let mut state = Vec::new();
    File::from(reader).read_to_end(&mut state).unwrap();
    fe.check_device_state().unwrap();
    drop(fe);

    let (mut fe, _, _q) = connect(&server);
    fe.get_vring_base(0).unwrap();
    assert!(!server.disk.write_through.load(Ordering::SeqCst));
    let load = |fe: &mut Frontend, state: &[u8]| {
        let (reader, writer) = pipe();
        assert!(fe.set_device_state_fd(Direction::LOAD, stopped, reader).unwrap().is_none());
        File::from(writer).write_all(state).unwrap();
        fe.check_device_state()
    };
    let mut other = state.clone();
    other[16] ^= 1;
    assert!(load(&mut fe, &other).is_err(), "another disk's");
    assert!(load(&mut fe, &state[1..]).is_err());
    assert!(!server.disk.write_through.load(Ordering::SeqCst));
    load(&mut fe, &state).unwrap();
    assert!(server.disk.write_through.load(Ordering::SeqCst));
    assert!(fe.check_device_state().is_err(), "there is one answer for each transfer");
}

#[test]
fn a_disk_that_grows_tells_the_front_end() {
    let disk = RamDisk::new(2 * DISK_BYTES);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let size = Arc::new(AtomicU64::new(DISK_BYTES as u64));
    let looked = Arc::clone(&size);
    let look = Box::new(move || Some(looked.load(Ordering::SeqCst)));
    let mut device = device(&disk, shape(1), Pace::Deferred);
    device.resize = Some(Resize { event: event.try_clone().unwrap(), look });
    let server = Server::of(disk, device, ServeOptions::default());
    let behind = DISK_BYTES as u64 / 512;

    let (mut fe, _, mut q) = connect(&server);
    let (ours, theirs) = UnixStream::pair().unwrap();
    fe.set_backend_request_fd(&ours).unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(q.request(T_IN, behind, &[], 512).0, 1);
    // neither the same size nor a smaller one is news
    for bytes in [DISK_BYTES as u64, 512, DISK_BYTES as u64 + 4096] {
        size.store(bytes, Ordering::SeqCst);
        event.write(1).unwrap();
    }
    let mut message = [0; 12];
    (&theirs).read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(capacity(&mut fe), DISK_BYTES as u64 + 4096);
    q.check_io(behind, 1);
    assert_eq!(q.request(T_IN, behind + 8, &[], 512).0, 1);
    // a front-end that has gone from its end of the channel, or never had one, does not matter
    drop(theirs);
    size.store(DISK_BYTES as u64 + 8192, Ordering::SeqCst);
    event.write(1).unwrap();
    while capacity(&mut fe) != DISK_BYTES as u64 + 8192 {}
    q.check_io(behind + 8, 1);
    drop(fe);
    size.store(DISK_BYTES as u64 + 16384, Ordering::SeqCst);
    event.write(1).unwrap();
    let (mut fe, _, mut q) = connect(&server);
    while capacity(&mut fe) != DISK_BYTES as u64 + 16384 {}
    q.check_io(behind + 24, 1);
}

#[test]
fn the_region_is_ours_to_measure_and_the_front_ends_to_keep() {
    let server = Server::start(2, Pace::Deferred);
    let (mut fe, _, mut q) = connect(&server);
    let (wish, file) = fe.get_inflight_fd(&VhostUserInflight::new(7, 7, 2, 64)).unwrap();
    assert_eq!((wish.mmap_size, wish.mmap_offset), (2 * 1088, 0));
    assert!(file.set_len(0).is_err(), "sealed");
    // also while rings run
    fe.set_inflight_fd(&wish, file.as_raw_fd()).unwrap();
    q.check_io(0, 1);
    let mark = || {
        let mut raw = [0; 1088];
        file.read_exact_at(&mut raw, 0).unwrap();
        raw
    };
    assert_eq!(mark()[8..12], [1, 0, 64, 0]);
    server.disk.hold();
    q.post(0, T_IN, 0, &[], 512);
    q.kick();
    while mark()[16..].chunks(16).all(|entry| entry[0] == 0) {}
    server.disk.release();
    assert!(q.wait(Duration::from_secs(10)).is_some());
    // the device forgets the region with everything else; the front-end brings it again, or another
    fe.reset_device().unwrap();
    let before = mark();
    let features = fe.get_features().unwrap();
    fe.set_features(features & !feature::LOG_ALL).unwrap();
    start(&mut fe, &q);
    q.check_io(0, 2);
    assert_eq!(mark(), before);

    // one front-end at a time
    drop(fe);
    let too_many: [(u64, u64, u16, u16); 5] = [
        (1 << 20, 0, 3, 64),
        (1 << 20, 0, 2, 2048),
        (100, 0, 2, 64),
        (2176, 1, 2, 64),
        (1 << 20, 4096, 2, 64),
    ];
    for (bytes, offset, queues, size) in too_many {
        let (mut fe, _, _q) = connect(&server);
        let bad = VhostUserInflight::new(bytes, offset, queues, size);
        assert!(fe.set_inflight_fd(&bad, file.as_raw_fd()).is_err(), "{bytes} {offset} {queues} {size}");
    }
    let (bytes, larger) = InflightRegion::create(2, 128).unwrap();
    let (mut fe, _, mut q) = connect(&server);
    fe.set_inflight_fd(&VhostUserInflight::new(bytes, 0, 2, 128), larger.as_raw_fd()).unwrap();
    q.check_io(0, 3);
}
