//! The served device against front-ends as they really behave: orders of messages, rings that stop, memory that comes and
//! goes, front-ends that vanish. No VM: the `vhost` crate's front-end and virtqueues of our own.

mod common;

use common::guest::{
    GuestQueue, GuestRegion, QUEUE_BYTES, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES,
};
use common::ram::Pace;
use common::{Server, negotiate, set_up, shape};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vdblk::vhost::ServeOptions;
use vdblk::virtio::feature;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::eventfd::EventFd;

const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(10);
const MEMORY: u64 = 4 * QUEUE_BYTES;
const PACES: [Pace; 2] = [Pace::Inline, Pace::Deferred];

fn region() -> Arc<GuestRegion> {
    GuestRegion::new(0, MEMORY, 0)
}

fn config(fe: &mut Frontend, offset: u32, size: u32) -> Vec<u8> {
    let place = vec![0; size as usize];
    fe.get_config(offset, size, VhostUserConfigFlags::empty(), &place).unwrap().1
}

/// A connection with `n` running queues.
fn connect(server: &Server, n: usize) -> (Frontend, Vec<GuestQueue>) {
    let mut fe = server.connect();
    negotiate(&mut fe);
    let region = region();
    fe.set_mem_table(&[region.info()]).unwrap();
    let queues: Vec<_> = (0..n).map(|i| GuestQueue::new(&region, i as u64, 64, true)).collect();
    for (i, q) in queues.iter().enumerate() {
        set_up(&fe, i, q);
        fe.set_vring_enable(i, true).unwrap();
    }
    (fe, queues)
}

#[test]
fn all_requests_do_what_they_say() {
    for pace in PACES {
        let server = Server::start(1, pace);
        let (_fe, mut queues) = connect(&server, 1);
        let q = &mut queues[0];
        q.check_io(100, 1);
        q.check_io(shape(1).size_bytes / 512 - 2, 2);
        assert_eq!(q.request(T_FLUSH, 0, &[], 0).0, 0);
        assert_eq!(server.disk.flushes.load(Ordering::SeqCst), 1);
        let (status, len, id) = q.request(T_GET_ID, 0, &[], 20);
        assert_eq!((status, len, id.as_slice()), (0, 21, &b"ram-0123456789-01234"[..]));
        let (status, len, id) = q.request(T_GET_ID, 0, &[], 4);
        assert_eq!((status, len, id.as_slice()), (0, 5, &b"ram-"[..]));
        let segments = |flags: u32| -> Vec<u8> {
            let one =
                |s: u64, n: u32| [&s.to_le_bytes()[..], &n.to_le_bytes(), &flags.to_le_bytes()].concat();
            [one(100, 1), one(0, 0), one(101, 1), one(4000, 8)].concat()
        };
        assert_eq!(q.request(T_DISCARD, 0, &segments(0), 0).0, 0);
        assert_eq!(server.disk.discards.load(Ordering::SeqCst), 3);
        assert_eq!(q.request(T_IN, 100, &[], 1024).2, vec![0; 1024]);
        q.check_io(100, 3);
        assert_eq!(q.request(T_WRITE_ZEROES, 0, &segments(1), 0).0, 0);
        assert_eq!(q.request(T_IN, 100, &[], 1024).2, vec![0; 1024]);
        for (kind, sector, out, inward, status) in [
            (T_DISCARD, 0, segments(1), 0, 2),
            (T_WRITE_ZEROES, 0, segments(2), 0, 2),
            (T_DISCARD, 0, Vec::new(), 0, 1),
            (T_OUT, 1 << 40, vec![0; 512], 0, 1),
            (T_IN, 1 << 55, Vec::new(), 512, 1),
            (T_IN, 0, Vec::new(), 513, 1),
            (99, 0, Vec::new(), 512, 2),
        ] {
            assert_eq!(q.request(kind, sector, &out, inward).0, status, "request {kind}");
        }
    }
}

#[test]
fn a_read_only_disk_refuses_changes() {
    let mut shape = shape(1);
    shape.read_only = true;
    let server = Server::with(shape, Pace::Inline, ServeOptions::default());
    let (mut fe, mut queues) = connect(&server, 1);
    assert_ne!(fe.get_features().unwrap() & feature::RO, 0);
    assert_eq!(config(&mut fe, 36, 24), vec![0; 24]);
    let q = &mut queues[0];
    assert_eq!(q.request(T_OUT, 0, &[1; 512], 0).0, 1);
    assert_eq!(q.request(T_WRITE_ZEROES, 0, &[0; 16], 0).0, 1);
    assert_eq!(q.request(T_IN, 0, &[], 512), (0, 513, vec![0; 512]));
}

/// SeaBIOS drives the disk first, then the operating system sets it up again with other features and rings.
#[test]
fn qemu_boots() {
    for pace in PACES {
        let server = Server::start(2, pace);
        let mut fe = server.connect();
        let region = region();
        let offered = fe.get_features().unwrap();
        let protocol = fe.get_protocol_features().unwrap();
        fe.set_protocol_features(protocol).unwrap();
        assert_eq!(fe.get_queue_num().unwrap(), 2);
        assert_eq!(fe.get_max_mem_slots().unwrap(), 509);
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        fe.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        fe.set_backend_request_fd(&ours).unwrap();
        fe.set_hdr_flags(VhostUserHeaderFlag::empty());
        fe.set_owner().unwrap();
        assert_eq!(fe.get_features().unwrap(), offered);
        let masked: Vec<EventFd> = (0..2).map(|_| EventFd::new(0).unwrap()).collect();
        for (i, m) in masked.iter().enumerate() {
            fe.set_vring_call(i, m).unwrap();
            fe.set_vring_err(i, m).unwrap();
        }
        assert_eq!(config(&mut fe, 0, 57)[32], 1);
        let bios = feature::SEG_MAX | feature::BLK_SIZE | feature::VERSION_1 | feature::PROTOCOL_FEATURES;
        for (activation, features, size) in [(0, bios, 128), (1, offered, 256), (2, offered, 64)] {
            let event_idx = features & feature::EVENT_IDX != 0;
            let used = if activation == 0 { 1 } else { 2 };
            let mut queues: Vec<_> =
                (0..used).map(|i| GuestQueue::new(&region, i, size, event_idx)).collect();
            fe.set_features(features).unwrap();
            (0..2).for_each(|i| fe.set_vring_call(i, &masked[i]).unwrap());
            fe.set_features(features).unwrap();
            if activation == 0 {
                fe.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
                fe.add_mem_region(&region.info()).unwrap();
                fe.set_hdr_flags(VhostUserHeaderFlag::empty());
            }
            for (i, q) in queues.iter().enumerate() {
                fe.set_vring_num(i, q.size).unwrap();
                fe.set_vring_base(i, 0).unwrap();
                fe.set_vring_addr(i, &q.config()).unwrap();
                fe.set_vring_kick(i, &q.kick).unwrap();
                fe.set_vring_call(i, &q.call).unwrap();
            }
            // all of them, also those that were never set up
            (0..2).for_each(|i| fe.set_vring_enable(i, true).unwrap());
            for q in &mut queues {
                (0..100).for_each(|n| q.check_io(8 * n, n as u8));
            }
            (0..2).for_each(|i| fe.set_vring_enable(i, false).unwrap());
            for (i, q) in queues.iter().enumerate() {
                assert_eq!(fe.get_vring_base(i).unwrap(), u32::from(q.avail_index()));
            }
        }
    }
}

/// Every message asks for a reply; rings are enabled again and again, one has no call descriptor.
#[test]
fn cloud_hypervisor_starts() {
    let server = Server::start(2, Pace::Deferred);
    let mut fe = server.connect();
    let offered = fe.get_features().unwrap();
    let protocol = fe.get_protocol_features().unwrap();
    let wanted = Protocol::CONFIG | Protocol::MQ | Protocol::CONFIGURE_MEM_SLOTS | Protocol::REPLY_ACK;
    assert!(protocol.contains(wanted));
    fe.set_protocol_features(wanted).unwrap();
    fe.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(fe.get_queue_num().unwrap(), 2);
    assert_eq!(config(&mut fe, 0, 60).len(), 60);
    fe.set_owner().unwrap();
    fe.set_features(offered).unwrap();
    let region = region();
    fe.set_mem_table(&[region.info()]).unwrap();
    let mut queues: Vec<_> = (0..2).map(|i| GuestQueue::new(&region, i, 128, true)).collect();
    (0..2).for_each(|i| fe.set_vring_num(i, 128).unwrap());
    for (i, q) in queues.iter().enumerate() {
        fe.set_vring_addr(i, &q.config()).unwrap();
        fe.set_vring_base(i, 0).unwrap();
        if i == 0 {
            fe.set_vring_call(i, &q.call).unwrap();
        }
        fe.set_vring_kick(i, &q.kick).unwrap();
    }
    (0..3).for_each(|_| (0..2).for_each(|i| fe.set_vring_enable(i, true).unwrap()));
    for q in &mut queues {
        (0..50).for_each(|n| q.check_io(n, n as u8));
    }
    assert!(queues[0].call.read().is_ok());
    // the guest gets its interrupt after all: it is told at once what it may have missed
    fe.set_vring_call(1, &queues[1].call).unwrap();
    assert!(queues[1].call.read().is_ok());
}

/// No replies, no multiqueue, few features.
#[test]
fn firecracker_starts() {
    let server = Server::start(1, Pace::Inline);
    let mut fe = server.connect();
    fe.set_owner().unwrap();
    fe.get_features().unwrap();
    fe.get_protocol_features().unwrap();
    fe.set_protocol_features(Protocol::CONFIG).unwrap();
    fe.set_features(feature::VERSION_1 | feature::FLUSH | feature::PROTOCOL_FEATURES).unwrap();
    assert_eq!(config(&mut fe, 0, 60)[..8], (shape(1).size_bytes / 512).to_le_bytes());
    let region = region();
    let mut q = GuestQueue::new(&region, 0, 256, false);
    fe.set_mem_table(&[region.info()]).unwrap();
    fe.set_vring_num(0, 256).unwrap();
    fe.set_vring_addr(0, &q.config()).unwrap();
    fe.set_vring_base(0, 0).unwrap();
    fe.set_vring_call(0, &q.call).unwrap();
    fe.set_vring_kick(0, &q.kick).unwrap();
    fe.set_vring_enable(0, true).unwrap();
    (0..300).for_each(|n| q.check_io(n, n as u8));
    assert_eq!(config(&mut fe, 0, 60).len(), 60);
}

/// The guest's own reads of the config space come through; sleep is ENABLE(0) and GET_VRING_BASE.
#[test]
fn crosvm_sleeps_and_wakes() {
    let server = Server::start(1, Pace::Deferred);
    let mut fe = server.connect();
    fe.set_owner().unwrap();
    let features = fe.get_features().unwrap();
    let protocol = Protocol::CONFIG | Protocol::MQ | Protocol::BACKEND_REQ | Protocol::REPLY_ACK;
    assert!(fe.get_protocol_features().unwrap().contains(protocol));
    fe.set_protocol_features(protocol).unwrap();
    fe.set_features(features).unwrap();
    assert_eq!(fe.get_queue_num().unwrap(), 1);
    let all = config(&mut fe, 0, 256);
    for (offset, size) in [(0, 8), (20, 4), (3, 7), (32, 1), (200, 56), (255, 1), (250, 100), (300, 4)] {
        let mut want = all.clone();
        want.resize(512, 0);
        let from = offset as usize;
        assert_eq!(config(&mut fe, offset, size), want[from..from + size as usize]);
    }
    let region = region();
    fe.set_mem_table(&[region.info()]).unwrap();
    let mut q = GuestQueue::new(&region, 0, 64, true);
    set_up(&fe, 0, &q);
    for round in 0..5 {
        fe.set_vring_enable(0, true).unwrap();
        q.check_io(round, 3);
        fe.set_vring_enable(0, false).unwrap();
        let base = fe.get_vring_base(0).unwrap();
        assert_eq!(base, u32::from(q.avail_index()));
        // a request announced while asleep is served after waking
        q.post(0, T_FLUSH, 0, &[], 0);
        q.kick();
        assert!(q.wait(SHORT).is_none());
        fe.set_vring_base(0, base as u16).unwrap();
        fe.set_vring_kick(0, &q.kick).unwrap();
        fe.set_vring_enable(0, true).unwrap();
        assert!(q.wait(LONG).is_some());
    }
}

/// One region with an offset in its file, config space read to the end of each field, no GET_VRING_BASE at the end.
#[test]
fn uml_comes_and_goes() {
    let server = Server::start(1, Pace::Inline);
    for boot in 0..3 {
        let mut fe = server.connect();
        fe.set_owner().unwrap();
        let features = fe.get_features().unwrap();
        fe.get_protocol_features().unwrap();
        let protocol = Protocol::MQ | Protocol::REPLY_ACK | Protocol::BACKEND_REQ | Protocol::CONFIG;
        fe.set_protocol_features(protocol).unwrap();
        fe.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        fe.set_backend_request_fd(&ours).unwrap();
        assert_eq!(fe.get_queue_num().unwrap(), 1);
        fe.set_features(features).unwrap();
        for size in [36, 16, 12, 24, 25, 26, 28, 32, 48, 40, 44, 52, 33, 8] {
            assert_eq!(config(&mut fe, 0, size).len(), size as usize);
        }
        let region = GuestRegion::new(0xc4_f000, MEMORY, 0xc4_f000);
        fe.set_mem_table(&[region.info()]).unwrap();
        let mut q = GuestQueue::new(&region, 0, 256, true);
        fe.set_vring_call(0, &q.call).unwrap();
        fe.set_vring_num(0, 256).unwrap();
        fe.set_vring_base(0, 0).unwrap();
        fe.set_vring_addr(0, &q.config()).unwrap();
        fe.set_vring_kick(0, &q.kick).unwrap();
        fe.set_vring_enable(0, true).unwrap();
        q.check_io(boot, 9);
        fe.set_vring_enable(0, false).unwrap();
        fe.get_features().unwrap();
    }
}

#[test]
fn memory_comes_while_rings_run_and_goes_when_they_are_quiet() {
    for pace in PACES {
        let server = Server::start(2, pace);
        let mut fe = server.connect();
        negotiate(&mut fe);
        let near = region();
        let far = GuestRegion::new(1 << 32, MEMORY, 0x5000);
        fe.add_mem_region(&near.info()).unwrap();
        let mut a = GuestQueue::new(&near, 0, 64, true);
        set_up(&fe, 0, &a);
        fe.set_vring_enable(0, true).unwrap();
        a.check_io(0, 1);
        // a buffer in memory that is not there yet is refused, and served once it is
        let read_far = |q: &mut GuestQueue| {
            let parts = [
                (near.gpa + MEMORY - 32, 16, false),
                (far.gpa + 77, 512, true),
                (near.gpa + MEMORY - 16, 1, true),
            ];
            q.push(&parts);
            q.kick();
            q.wait(LONG).unwrap();
            near.get(near.gpa + MEMORY - 16, 1)[0]
        };
        assert_eq!(read_far(&mut a), 1);
        fe.add_mem_region(&far.info()).unwrap();
        assert_eq!(read_far(&mut a), 0);
        // a second queue in the new memory
        let mut b = GuestQueue::new(&far, 0, 64, true);
        set_up(&fe, 1, &b);
        fe.set_vring_enable(1, true).unwrap();
        b.check_io(1, 2);
        fe.remove_mem_region(&far.info()).unwrap();
        // its ring has gone: that queue stops, the other one goes on
        b.post(0, T_FLUSH, 0, &[], 0);
        b.kick();
        assert!(b.wait(SHORT).is_none());
        a.check_io(2, 3);
        assert_eq!(read_far(&mut a), 1);
        // it comes back with its memory
        fe.add_mem_region(&far.info()).unwrap();
        assert!(b.wait(LONG).is_some());
        b.check_io(3, 4);
    }
}

#[test]
fn a_new_memory_table_waits_for_requests_in_flight() {
    let server = Server::start(1, Pace::Deferred);
    let (fe, mut queues) = connect(&server, 1);
    let q = &mut queues[0];
    server.disk.hold();
    q.post(0, T_IN, 0, &[], 512);
    q.kick();
    assert!(q.wait(SHORT).is_none());
    let info = q.region.info();
    let disk = Arc::clone(&server.disk);
    let start = Instant::now();
    let later = std::thread::spawn(move || {
        std::thread::sleep(SHORT);
        disk.release();
    });
    fe.set_mem_table(&[info]).unwrap();
    assert!(start.elapsed() >= SHORT, "answered with a request in flight");
    later.join().unwrap();
    assert!(q.wait(LONG).is_some());
    q.check_io(0, 5);
}

#[test]
fn the_base_is_told_when_everything_taken_has_ended() {
    let server = Server::start(1, Pace::Deferred);
    let (fe, mut queues) = connect(&server, 1);
    let q = &mut queues[0];
    server.disk.hold();
    for n in 0..8 {
        q.post(n, T_IN, n, &[], 512);
    }
    q.kick();
    assert!(q.wait(SHORT).is_none());
    let disk = Arc::clone(&server.disk);
    let later = std::thread::spawn(move || {
        std::thread::sleep(SHORT);
        disk.release();
    });
    assert_eq!(fe.get_vring_base(0).unwrap(), 8);
    later.join().unwrap();
    for _ in 0..8 {
        assert_eq!(q.wait(Duration::ZERO).unwrap().1, 513);
    }
    (0..8).for_each(|n| assert_eq!(q.status(n), 0));
}

#[test]
fn kicks_before_enable_are_remembered() {
    let server = Server::start(1, Pace::Inline);
    let mut fe = server.connect();
    negotiate(&mut fe);
    let region = region();
    fe.set_mem_table(&[region.info()]).unwrap();
    let mut q = GuestQueue::new(&region, 0, 64, true);
    q.post(0, T_FLUSH, 0, &[], 0);
    q.kick();
    set_up(&fe, 0, &q);
    assert!(q.wait(SHORT).is_none());
    fe.set_vring_enable(0, true).unwrap();
    assert!(q.wait(LONG).is_some());
    // another kick descriptor while the ring runs
    q.check_io(0, 1);
    q.kick = EventFd::new(0).unwrap();
    fe.set_vring_kick(0, &q.kick).unwrap();
    q.check_io(1, 2);
    // the base set while it runs does not lose the ring
    fe.set_vring_base(0, q.avail_index()).unwrap();
    q.check_io(2, 3);
}

#[test]
fn without_protocol_features_rings_start_enabled() {
    let server = Server::start(1, Pace::Inline);
    let fe = server.connect();
    fe.set_owner().unwrap();
    fe.get_features().unwrap();
    fe.set_features(feature::VERSION_1).unwrap();
    let region = region();
    fe.set_mem_table(&[region.info()]).unwrap();
    let mut q = GuestQueue::new(&region, 0, 64, false);
    set_up(&fe, 0, &q);
    q.check_io(0, 1);
    assert!(q.call.read().is_ok());
}

#[test]
fn resets_stop_rings_and_forget_them() {
    let server = Server::start(1, Pace::Deferred);
    let (mut fe, mut queues) = connect(&server, 1);
    queues[0].check_io(0, 1);
    fe.reset_owner().unwrap();
    queues[0].post(0, T_FLUSH, 0, &[], 0);
    queues[0].kick();
    assert!(queues[0].wait(SHORT).is_none());
    fe.set_vring_enable(0, true).unwrap();
    assert!(queues[0].wait(LONG).is_some());
    fe.reset_device().unwrap();
    let features = fe.get_features().unwrap();
    fe.set_features(features).unwrap();
    let mut q = GuestQueue::new(&queues[0].region, 1, 128, true);
    fe.set_vring_enable(0, true).unwrap();
    set_up(&fe, 0, &q);
    q.check_io(5, 6);
}

#[test]
fn the_cache_mode_reaches_the_disk() {
    let server = Server::start(1, Pace::Inline);
    let mut fe = server.connect();
    let offered = negotiate(&mut fe);
    let through = || server.disk.write_through.load(Ordering::SeqCst);
    assert!(!through());
    let w = VhostUserConfigFlags::WRITABLE;
    fe.set_config(32, w, &[0]).unwrap();
    assert!(through());
    assert_eq!(config(&mut fe, 32, 1), [0]);
    // anything else is refused and costs the front-end nothing but the error
    assert!(fe.set_config(0, w, &[1; 8]).is_err());
    fe.set_config(32, w, &[1]).unwrap();
    assert!(!through());
    fe.set_features(offered & !(feature::FLUSH | feature::CONFIG_WCE)).unwrap();
    assert!(through());
    fe.set_features(offered & !feature::CONFIG_WCE).unwrap();
    assert!(!through());
}

#[test]
fn a_front_end_that_vanishes_leaves_a_disk_to_be_served() {
    for pace in PACES {
        let server = Server::start(1, pace);
        for round in 0..5 {
            let (fe, mut queues) = connect(&server, 1);
            queues[0].check_io(round, 1);
            server.disk.hold();
            for n in 0..8 {
                queues[0].post(n, T_OUT, n, &[7; 512], 0);
            }
            queues[0].kick();
            std::thread::sleep(Duration::from_millis(5));
            drop(fe);
            server.disk.release();
        }
        // one that waits in the backlog is served when the first has gone
        let (fe, mut queues) = connect(&server, 1);
        let waiting = server.connect();
        let asker = std::thread::spawn(move || waiting.get_features().unwrap());
        queues[0].check_io(0, 2);
        assert!(!asker.is_finished());
        drop(fe);
        assert_ne!(asker.join().unwrap(), 0);
    }
}

#[test]
fn a_broken_ring_stops_alone() {
    let server = Server::start(2, Pace::Inline);
    let (fe, mut queues) = connect(&server, 2);
    queues[0].check_io(0, 1);
    queues[0].announce(3, 65);
    queues[0].kick();
    std::thread::sleep(SHORT);
    assert!(queues[0].err.read().is_ok(), "no error was signalled");
    queues[1].check_io(1, 2);
    fe.get_vring_base(0).unwrap();
    let mut again = GuestQueue::new(&queues[0].region, 0, 64, true);
    set_up(&fe, 0, &again);
    again.check_io(2, 3);
    again.announce(64, 1);
    again.kick();
    std::thread::sleep(SHORT);
    assert!(again.err.read().is_ok());
    queues[1].check_io(1, 2);
}

#[test]
fn a_head_announced_again_in_flight_is_answered_apart() {
    let server = Server::start(1, Pace::Deferred);
    let (_fe, mut queues) = connect(&server, 1);
    let q = &mut queues[0];
    server.disk.hold();
    let head = q.post(0, T_IN, 0, &[], 512);
    q.announce(head, 1);
    q.kick();
    assert_eq!(q.wait(LONG), Some((head, 0)));
    server.disk.release();
    assert_eq!(q.wait(LONG), Some((head, 513)));
    q.check_io(0, 1);
}

#[test]
fn signals_are_sent_once_a_batch() {
    let server = Server::start(1, Pace::Deferred);
    let (_fe, mut queues) = connect(&server, 1);
    let q = &mut queues[0];
    q.check_io(0, 1);
    q.call.read().unwrap();
    server.disk.hold();
    for n in 0..12 {
        q.post(n, T_IN, 0, &[], 512);
    }
    q.kick();
    std::thread::sleep(SHORT);
    assert!(q.call.read().is_err());
    server.disk.release();
    assert!((0..12).all(|_| q.wait(LONG).is_some()));
    std::thread::sleep(SHORT);
    assert_eq!(q.call.read().unwrap(), 1);
}

#[test]
fn shutdown_ends_what_is_in_flight() {
    let server = Server::start(1, Pace::Deferred);
    let (_fe, mut queues) = connect(&server, 1);
    server.disk.hold();
    let data = vec![0x5a; 512];
    queues[0].post(0, T_OUT, 9, &data, 0);
    queues[0].kick();
    std::thread::sleep(SHORT);
    server.tell_to_end();
    std::thread::sleep(SHORT);
    assert!(!server.has_returned());
    server.disk.release();
    assert!(queues[0].wait(LONG).is_some());
    let disk = Arc::clone(&server.disk);
    server.join().unwrap();
    assert_eq!(disk.bytes.lock().unwrap()[9 * 512..10 * 512], data);
}

#[test]
fn once_means_one_front_end_that_said_something() {
    let server = Server::with(shape(1), Pace::Inline, ServeOptions { once: true });
    drop(server.stream());
    std::thread::sleep(SHORT);
    assert!(!server.has_returned());
    let (fe, mut queues) = connect(&server, 1);
    queues[0].check_io(0, 1);
    drop(fe);
    server.join().unwrap();
}

/// Not a test: serves a disk in memory on the socket named by VDBLK_RAM_SOCKET, for load generators.
#[test]
#[ignore = "serves until it is killed"]
fn serve_a_ram_disk() {
    use vdblk::vhost::{SocketFile, SocketOptions, serve};
    let path = std::env::var_os("VDBLK_RAM_SOCKET").expect("VDBLK_RAM_SOCKET");
    let pace = if std::env::var_os("VDBLK_RAM_DEFERRED").is_some() { Pace::Deferred } else { Pace::Inline };
    let (_file, endpoint) = SocketFile::bind(path.as_ref(), &SocketOptions::default()).unwrap();
    let bytes = 256 << 20;
    let mut shape = shape(4);
    shape.size_bytes = bytes as u64;
    let disk = common::ram::RamDisk::new(bytes);
    let never = EventFd::new(0).unwrap();
    assert!(never.as_raw_fd() >= 0);
    serve(common::device(&disk, shape, pace), endpoint, ServeOptions::default(), &never, || ()).unwrap();
}
