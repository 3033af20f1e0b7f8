//! A queue worker stepped by hand: what the driver can see, and when.

mod common;

use common::guest::{GuestQueue, GuestRegion, QUEUE_BYTES, T_DISCARD, T_GET_ID, T_IN};
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;
use vdblk::error::Failure;
use vdblk::io::BufSlice;
use vdblk::vd::{BlockDevice, Done, Outcome, Request};
use vdblk::vhost::{
    DirtyLog, InflightRegion, Memory, QueueWorker, RegionInfo, Ring, RingError, RingExtras, RingLog,
    RingSetup, Tracker, WorkerOptions,
};
use vdblk::virtio::Rules;
use vmm_sys_util::event::{EventFlag, new_event_consumer_and_notifier};

/// Does what a test says at each submit.
struct Scripted {
    submit: Box<dyn FnMut(u16, Request) -> Option<Outcome>>,
    ready: Vec<Done>,
    flushes: usize,
    stuck: usize,
}

impl Scripted {
    fn new(submit: impl FnMut(u16, Request) -> Option<Outcome> + 'static) -> Self {
        Scripted { submit: Box::new(submit), ready: Vec::new(), flushes: 0, stuck: 0 }
    }
}

impl BlockDevice for Scripted {
    fn submit(&mut self, slot: u16, request: Request, _bufs: &[BufSlice]) -> Option<Outcome> {
        (self.submit)(slot, request)
    }
    fn flush_queue(&mut self) -> io::Result<()> {
        self.flushes += 1;
        if self.stuck > 0 {
            self.stuck -= 1;
            return Err(io::Error::from_raw_os_error(11));
        }
        Ok(())
    }
    fn poll(&mut self, done: &mut Vec<Done>) {
        done.append(&mut self.ready);
    }
    fn set_write_through(&mut self, _on: bool) {}
    fn is_idle(&self) -> bool {
        true
    }
    fn event_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }
}

fn worker(device: Scripted) -> QueueWorker<Scripted> {
    let rules = Rules { size_bytes: 1 << 20, read_only: false, discard: true };
    QueueWorker::new(device, &WorkerOptions { queue: 0, slots: 128, rules, serial: String::new() })
}

/// Starts a queue on the worker.
fn start(w: &mut QueueWorker<Scripted>, q: &GuestQueue) -> Result<(), RingError> {
    start_tracked(w, q, None)
}

fn start_tracked(
    w: &mut QueueWorker<Scripted>,
    q: &GuestQueue,
    inflight: Option<Tracker>,
) -> Result<(), RingError> {
    start_with(w, q, RingExtras { inflight, ..RingExtras::default() })
}

fn start_with(w: &mut QueueWorker<Scripted>, q: &GuestQueue, extras: RingExtras) -> Result<(), RingError> {
    let i = q.region.info();
    let info = RegionInfo {
        guest_addr: i.guest_phys_addr,
        len: i.memory_size,
        user_addr: i.userspace_addr,
        mmap_offset: i.mmap_offset,
    };
    let file =
        File::options().read(true).write(true).open(format!("/proc/self/fd/{}", i.mmap_handle)).unwrap();
    let memory = Arc::new(Memory::new([(info, file)]).unwrap());
    let c = q.config();
    let setup = RingSetup {
        size: q.size,
        descriptors: c.desc_table_addr,
        available: c.avail_ring_addr,
        used: c.used_ring_addr,
        next_avail: 0,
        event_idx: true,
    };
    w.set_memory(Arc::clone(&memory));
    let (_, call) = new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
    w.start(Ring::new(&setup, &memory).unwrap(), RingExtras { call: Some(call), ..extras })
}

fn queue() -> GuestQueue {
    GuestQueue::new(&GuestRegion::new(0, QUEUE_BYTES, 0), 0, 128, true)
}

#[test]
fn a_driver_waits_for_half_of_its_requests_at_most() {
    let q = queue();
    let region = Arc::clone(&q.region);
    let mut begun = 0u16;
    let mut w = worker(Scripted::new(move |_, _| {
        let seen = u16::from_le_bytes(region.get(0x8002, 2).try_into().unwrap());
        assert!(begun - seen <= 20, "{begun} begun, {seen} seen");
        begun += 1;
        Some(Ok(()))
    }));
    let mut q = q;
    start(&mut w, &q).unwrap();
    for _ in 0..40 {
        q.post(0, T_IN, 0, &[], 512);
    }
    assert!(w.step(false));
    assert!((0..40).all(|_| q.wait(Duration::ZERO).is_some()));
    assert_eq!((w.counters().answered, w.device().flushes), (40, 1));
    // the driver asked for one signal only
    assert_eq!(w.counters().signals, 1);
    assert!(!w.step(false) && w.arm());
}

#[test]
fn a_slow_device_does_not_hold_answers_back() {
    let q = queue();
    let region = Arc::clone(&q.region);
    let mut begun = 0u16;
    let mut w = worker(Scripted::new(move |_, _| {
        let seen = u16::from_le_bytes(region.get(0x8002, 2).try_into().unwrap());
        assert!(begun - seen <= 4, "{begun} begun, {seen} seen");
        begun += 1;
        std::thread::sleep(Duration::from_millis(1));
        Some(Ok(()))
    }));
    let mut q = q;
    start(&mut w, &q).unwrap();
    for _ in 0..12 {
        q.post(0, T_IN, 0, &[], 512);
    }
    w.step(false);
    assert!((0..12).all(|_| q.wait(Duration::ZERO).is_some()));
}

#[test]
fn segments_follow_one_another_and_a_failure_ends_them() {
    let mut n = 0;
    let mut w = worker(Scripted::new(move |_, _| {
        n += 1;
        match n {
            1 => Some(Ok(())),
            2 => None,
            _ => Some(Err(Failure::Os(libc::ENOSPC))),
        }
    }));
    let mut q = queue();
    start(&mut w, &q).unwrap();
    let segment = |s: u64| [&s.to_le_bytes()[..], &1u32.to_le_bytes(), &[0; 4]].concat();
    let head = q.post(0, T_DISCARD, 0, &[segment(1), segment(2), segment(3), segment(4)].concat(), 0);
    assert!(w.step(false));
    assert_eq!((w.in_flight(), q.wait(Duration::ZERO)), (1, None));
    w.stop();
    assert_eq!(w.stopped(), None);
    w.device().ready.push(Done { slot: head, outcome: Ok(()) });
    // an end that was never begun is not believed
    w.device().ready.push(Done { slot: head, outcome: Ok(()) });
    w.device().ready.push(Done { slot: 9999, outcome: Ok(()) });
    assert!(w.step(true));
    assert_eq!((q.wait(Duration::ZERO), q.status(0)), (Some((head, 1)), 1));
    assert_eq!((w.counters().failed, w.stopped()), (1, Some(1)));
}

#[test]
fn a_device_that_cannot_take_its_queue_is_asked_again() {
    let mut device = Scripted::new(|_, _| None);
    device.stuck = 2;
    let mut w = worker(device);
    let mut q = queue();
    start(&mut w, &q).unwrap();
    q.post(0, T_IN, 0, &[], 512);
    w.step(false);
    assert!(w.wants_retry());
    w.step(false);
    assert!(w.wants_retry());
    w.step(false);
    assert!(!w.wants_retry());
    assert_eq!(w.device().flushes, 3);
}

#[test]
fn rings_larger_than_the_slots_are_refused() {
    let q = GuestQueue::new(&GuestRegion::new(0, QUEUE_BYTES, 0), 0, 256, true);
    let mut w = worker(Scripted::new(|_, _| None));
    assert_eq!(start(&mut w, &q), Err(RingError::Size(256)));
}

/// Three lives of a worker on one ring: the first two end with requests in flight.
#[test]
fn what_was_in_flight_is_repeated_in_order_and_before_anything_new() {
    let (bytes, file) = InflightRegion::create(1, 128).unwrap();
    let region = Arc::new(InflightRegion::open(file, 0, bytes, 1, 128).unwrap());
    let mut q = queue();
    // 512 bytes at the sector that is the request's number
    let sector = |r: Request| match r {
        Request::Read(range) => range.start().0 / 512,
        other => panic!("{other:?}"),
    };
    let (tell, told) = std::sync::mpsc::channel();
    let life = || {
        let tell = tell.clone();
        let mut w = worker(Scripted::new(move |slot, r| {
            tell.send((slot, sector(r))).unwrap();
            // every fourth ends at once, the others when the test says so
            sector(r).is_multiple_of(4).then_some(Ok(()))
        }));
        w.device().stuck = 0;
        w
    };
    let submitted = || told.try_iter().collect::<Vec<(u16, u64)>>();
    let numbers = |s: &[(u16, u64)]| s.iter().map(|(_, n)| *n).collect::<Vec<_>>();

    let mut first = life();
    start_tracked(&mut first, &q, region.tracker(0)).unwrap();
    for n in 0..8 {
        q.post(n, T_IN, n, &[], 512);
    }
    assert!(first.step(false));
    let begun = submitted();
    assert_eq!(numbers(&begun), [0, 1, 2, 3, 4, 5, 6, 7]);
    // 6 ends before 1; the driver sees 0, 4 and 6
    first.device().ready.push(Done { slot: begun[6].0, outcome: Ok(()) });
    assert!(first.step(true));
    let seen: Vec<u16> = (0..3).map(|_| q.wait(Duration::ZERO).unwrap().0).collect();
    assert_eq!(seen, [begun[0].0, begun[4].0, begun[6].0]);
    drop(first);

    q.post(8, T_IN, 8, &[], 512);
    q.post(9, T_IN, 9, &[], 512);
    let mut second = life();
    start_tracked(&mut second, &q, region.tracker(0)).unwrap();
    while second.step(false) {}
    assert_eq!(numbers(&submitted()), [1, 2, 3, 5, 7], "nothing new as long as these have not ended");
    assert!(second.arm() && !second.has_work());
    for at in [7, 3] {
        second.device().ready.push(Done { slot: begun[at].0, outcome: Ok(()) });
    }
    second.step(true);
    assert_eq!(q.wait(Duration::ZERO), Some((begun[7].0, 513)));
    assert_eq!(q.wait(Duration::ZERO), Some((begun[3].0, 513)));
    assert!(submitted().is_empty());
    drop(second);

    let mut third = life();
    start_tracked(&mut third, &q, region.tracker(0)).unwrap();
    assert_eq!(third.counters().signals, 1, "an answer may have gone without its signal");
    while third.step(false) {}
    assert_eq!(numbers(&submitted()), [1, 2, 5]);
    // told to stop, it ends what it has taken over
    third.stop();
    assert_eq!(third.stopped(), None);
    for at in [1, 2, 5] {
        third.device().ready.push(Done { slot: begun[at].0, outcome: Ok(()) });
    }
    while third.step(true) {}
    assert!((0..3).all(|_| q.wait(Duration::ZERO).is_some()));
    assert_eq!((third.stopped(), submitted().len()), (Some(8), 0));
    // and what was never taken is there for the next
    start_tracked(&mut third, &q, region.tracker(0)).unwrap();
    while third.step(false) {}
    assert_eq!(numbers(&submitted()), [8, 9]);
}

#[test]
fn a_ring_that_contradicts_its_region_is_refused() {
    let (bytes, file) = InflightRegion::create(1, 128).unwrap();
    let region = Arc::new(InflightRegion::open(file, 0, bytes, 1, 128).unwrap());
    let mut q = queue();
    let mut w = worker(Scripted::new(|_, _| None));
    start_tracked(&mut w, &q, region.tracker(0)).unwrap();
    q.post(0, T_IN, 0, &[], 512);
    assert!(w.step(false));
    // the used index runs ahead of everything that was ever answered
    q.region.put(0x8002, &4000u16.to_le_bytes());
    let mut w = worker(Scripted::new(|_, _| None));
    let refused = start_tracked(&mut w, &q, region.tracker(0)).unwrap_err();
    assert!(matches!(refused, RingError::InFlight(_)), "{refused}");
}

/// The answer asks nothing of the disk, and still of the memory.
#[test]
fn get_id_into_memory_that_is_taken_away_fails_and_ends_the_ring() {
    let mut q = GuestQueue::new(&GuestRegion::new(0, QUEUE_BYTES + 4096, 0), 0, 128, true);
    let mut w = worker(Scripted::new(|_, _| Some(Ok(()))));
    start(&mut w, &q).unwrap();
    let (header, status) = (q.data_at(0), q.data_at(0) + 16);
    q.region.put(header, &[&T_GET_ID.to_le_bytes()[..], &[0; 12], &[0xee]].concat());
    let parts = [(header, 16, false), (QUEUE_BYTES, 20, true), (status, 1, true)];
    let head = q.push(&parts);
    assert!(w.step(false));
    assert_eq!((q.wait(Duration::ZERO), q.region.get(status, 1)), (Some((head, 21)), vec![0]));
    let head = q.push(&parts);
    q.region.shorten(QUEUE_BYTES);
    assert!(w.step(false));
    assert_eq!((q.wait(Duration::ZERO), q.region.get(status, 1)), (Some((head, 1)), vec![1]));
    assert_eq!(w.counters().failed, 1);
    q.post(1, T_IN, 0, &[], 512);
    assert!(!w.step(false) && w.in_flight() == 0, "the ring goes on");
}

/// Guest memory that one page of a log stands for.
const LOGGED_BYTES: u64 = 4096 * 8 * 4096;

/// A log of two pages, the used ring in the second, and where it is told that the ring is broken.
fn logged(file: &File, inflight: Option<Tracker>) -> (RingExtras, File) {
    file.set_len(8192).unwrap();
    let log = Arc::new(DirtyLog::open(file.try_clone().unwrap(), 0, 8192).unwrap());
    let told = tempfile::tempfile().unwrap();
    let err = told.try_clone().ok();
    let log = Some(RingLog { log, used: Some(LOGGED_BYTES) });
    (RingExtras { inflight, err, log, ..RingExtras::default() }, told)
}

fn is_told(err: &File) -> bool {
    err.metadata().unwrap().len() == 8
}

#[test]
fn what_cannot_be_logged_is_not_answered_and_the_next_ring_repeats_it() {
    let (bytes, file) = InflightRegion::create(1, 128).unwrap();
    let region = Arc::new(InflightRegion::open(file, 0, bytes, 1, 128).unwrap());
    let mut q = queue();
    let mut w = worker(Scripted::new(|_, _| Some(Ok(()))));
    let log = tempfile::tempfile().unwrap();
    let (extras, err) = logged(&log, region.tracker(0));
    start_with(&mut w, &q, extras).unwrap();
    q.post(0, T_IN, 0, &[], 512);
    w.step(false);
    assert!(q.wait(Duration::ZERO).is_some() && !is_told(&err));
    let read = q.post(1, T_IN, 0, &[], 512);
    let identify = q.post(2, T_GET_ID, 0, &[], 20);
    log.set_len(0).unwrap();
    w.step(false);
    assert_eq!((q.wait(Duration::ZERO), is_told(&err)), (None, true));
    q.post(3, T_IN, 0, &[], 512);
    assert!(!w.step(false), "the ring goes on");
    assert!(w.stopped().is_some());
    assert_eq!(q.wait(Duration::ZERO), None, "answered when it was stopped");

    let (extras, err) = logged(&log, region.tracker(0));
    start_with(&mut w, &q, extras).unwrap();
    while w.step(false) {}
    // the second was not begun when the ring broke, and is still announced
    let answers: Vec<_> = std::iter::from_fn(|| q.wait(Duration::ZERO)).map(|(head, _)| head).collect();
    assert_eq!((answers.len(), answers[0], answers[1], is_told(&err)), (3, read, identify, false));
}

/// The driver sees the answer, which is there; the next one would be missing.
#[test]
fn a_used_ring_that_cannot_be_logged_is_stopped() {
    let mut q = queue();
    let mut w = worker(Scripted::new(|_, _| Some(Ok(()))));
    let log = tempfile::tempfile().unwrap();
    let (extras, err) = logged(&log, None);
    start_with(&mut w, &q, extras).unwrap();
    w.step(false);
    w.arm();
    log.set_len(4096).unwrap();
    q.post(0, T_IN, 0, &[], 512);
    w.step(false);
    assert!(is_told(&err));
    q.post(1, T_IN, 0, &[], 512);
    assert!(!w.step(false), "the ring goes on");
}

#[test]
fn nothing_is_begun_that_cannot_be_noted_as_in_flight() {
    let (bytes, _) = InflightRegion::create(1, 128).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    let region = Arc::new(InflightRegion::open(file.try_clone().unwrap(), 0, bytes, 1, 128).unwrap());
    let mut q = queue();
    let mut w = worker(Scripted::new(|_, _| Some(Ok(()))));
    start_tracked(&mut w, &q, region.tracker(0)).unwrap();
    q.post(0, T_IN, 0, &[], 512);
    w.step(false);
    assert!(q.wait(Duration::ZERO).is_some());
    file.set_len(0).unwrap();
    q.post(1, T_IN, 0, &[], 512);
    w.step(false);
    assert_eq!((q.wait(Duration::ZERO), w.counters().answered), (None, 1));
    assert!(!w.step(false) && w.stopped().is_some());
    let refused = start_tracked(&mut w, &q, region.tracker(0)).unwrap_err();
    assert!(refused.to_string().contains("shortened"), "{refused}");
}
