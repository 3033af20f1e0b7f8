//! Operations that fail: those who asked hear of it, nobody hangs, and the image stays right.

use super::crash::{check_clean_file, seeds};
use super::rig::{CrashFile, Fault, Faults, Past, Rig, full_parent};
use super::*;
use crate::io::{IoEngine, IoKind, IoOp};
use std::sync::atomic::Ordering;

/// Where things are in a new VDI.
const HEADER: std::ops::Range<u64> = 0..512;
const TABLE: std::ops::Range<u64> = 1 << 20..2 << 20;
const METADATA: std::ops::Range<u64> = 0..2 << 20;

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len).unwrap()
}

fn new_top(size: u64, block: u64, diff: bool) -> Arc<CrashFile> {
    CrashFile::new(new_vdi(size, block, 2, diff.then_some(1)).bytes())
}

/// One random fault in a random workload, then on without it.
fn survives(seed: u64, diff: bool) {
    let mut rng = Rng(seed);
    let (size, block) = (192 << 10, 4096 << rng.below(4));
    let (below, past) = match diff {
        true => {
            let (f, past) = full_parent(size, 4096 << rng.below(4), 1, &mut rng);
            (vec![f], past)
        }
        false => (Vec::new(), vec![Past::known(0); (size / SECTOR) as usize]),
    };
    let top = new_top(size, block, diff);
    let faults = Faults::default();
    let options = DiskOptions { write_through: rng.chance(15), ..DiskOptions::default() };
    let mut rig = Rig::new(&top, &below, options, &faults, past, rng.next());
    rig.steps(rng.below(200));
    let kinds: [&[IoKind]; 8] = [
        &[],
        &[IoKind::Write],
        &[IoKind::Write],
        &[IoKind::Read],
        &[IoKind::Allocate],
        &[IoKind::Sync],
        &[IoKind::Punch, IoKind::ZeroRange],
        &[IoKind::Truncate],
    ];
    let errno = [libc::EIO, libc::ENOSPC, libc::EOPNOTSUPP][rng.below(3) as usize];
    let mut f = Fault::of(kinds[rng.below(8) as usize], rng.below(30), errno);
    f.sticky = rng.chance(40);
    f.takes_effect = rng.chance(30);
    if rng.chance(40) && f.kinds == [IoKind::Write] {
        f.place = METADATA;
    }
    let metadata = f.kinds.is_empty() || f.kinds.contains(&IoKind::Write);
    faults.add(f);
    rig.steps(rng.below(400));
    rig.drain();
    faults.clear();
    let dead = rig.marks.load(Ordering::SeqCst) > 0;
    rig.failures.clear();
    rig.steps(200);
    rig.drain();
    if dead {
        let refused =
            |(r, f): &(Request, Failure)| !matches!(r, Request::Read(_)) && *f == Failure::SyncFailed;
        assert!(rig.failures.iter().all(refused), "seed {seed}: {:?}", rig.failures);
    } else {
        // A place that the disk may name is not used again before the close; a small image can run out of them.
        let left = |(_, f): &(Request, Failure)| *f == Failure::Os(libc::ENOSPC) && metadata;
        assert!(rig.failures.iter().all(left), "seed {seed}: {:?}", rig.failures);
    }
    rig.sweep();
    if !dead && rng.chance(50) {
        rig.close().unwrap();
        check_clean_file(&top, seed);
        rig.flushed = u64::MAX;
    }
    let cut = !dead && rng.chance(80);
    let past = rig.die(cut);
    if cut {
        top.power_cut(&mut rng);
    }
    let mut rig = Rig::new(&top, &below, options, &faults, past, rng.next());
    rig.look_again(cut);
    rig.steps(100);
    rig.close().unwrap();
    if rig.disk.start.is_done() {
        check_clean_file(&top, seed);
    }
}

#[test]
fn one_fault_fails_only_what_it_hits() {
    for seed in seeds("VDBLK_SEED", 300) {
        survives(seed, seed % 2 == 1);
    }
}

/// A plan whose data was written before a sync failed must not go on with a sync of its own: the kernel may have
/// dropped that data, and says so only once.
#[test]
fn a_failed_sync_is_final_for_plans_under_way() {
    let size = 2 << 20;
    let (below, past) = full_parent(size, 1 << 20, 1, &mut Rng(7));
    let below = [below];
    let mut tried = 0;
    for seed in 0..100 {
        let top = new_top(size, 1 << 20, true);
        let faults = Faults::default();
        let mut rig = Rig::new(&top, &below, DiskOptions::default(), &faults, past.clone(), seed);
        // A block of four pieces, some of which are written when the sync fails.
        assert!(rig.post(0, Request::Write(range(4096, 512)), 99));
        let pieces = 1 + seed % 3;
        for _ in 0..10_000 {
            if top.data_writes() >= pieces {
                break;
            }
            rig.poll(0);
        }
        faults.add(Fault::of(&[IoKind::Sync], 0, libc::EIO));
        let last = rig.channels.len() - 1;
        let posted = rig.post(last, Request::Flush, 0);
        for _ in 0..1000 {
            if rig.marks.load(Ordering::SeqCst) > 0 {
                break;
            }
            rig.poll(last);
        }
        let in_time = top.data_writes() < 4;
        rig.drain();
        if !posted || !in_time {
            continue; // its own sync may have been before
        }
        tried += 1;
        let failed = |r: &Request| rig.failures.iter().any(|(f, why)| f == r && *why == Failure::SyncFailed);
        assert!(failed(&Request::Flush), "seed {seed}");
        assert!(
            failed(&Request::Write(range(4096, 512))),
            "seed {seed}: a write went on behind a failed sync"
        );
        let past = rig.die(true);
        top.power_cut(&mut Rng(seed));
        let mut rig = Rig::new(&top, &below, DiskOptions::default(), &faults, past, seed);
        rig.look_again(true);
    }
    assert!(tried > 20, "only {tried} of the seeds met the moment");
}

/// A clean close after a failed sync must not say that all is well, and a close whose sync fails leaves the mark.
#[test]
fn a_close_does_not_hide_a_failed_sync() {
    let faults = Faults::default();
    let top = new_top(64 << 10, 4096, false);
    let past = vec![Past::known(0); 128];
    let mut rig = Rig::new(&top, &[], DiskOptions::default(), &faults, past, 1);
    assert!(rig.post(0, Request::Write(range(0, 4096)), 7));
    rig.drain();
    // In place: nothing but the flush will sync this one.
    assert!(rig.post(0, Request::Write(range(0, 4096)), 8));
    rig.drain();
    faults.add(Fault::of(&[IoKind::Sync], 0, libc::EIO));
    assert!(rig.post(0, Request::Flush, 0));
    rig.drain();
    assert_eq!(rig.failures, [(Request::Flush, Failure::SyncFailed)]);
    assert!(rig.close().is_err(), "a disk with a failed sync was closed as if it were durable");
}

#[test]
fn a_failed_sync_at_the_close_leaves_the_mark() {
    let faults = Faults::default();
    let top = new_top(64 << 10, 4096, false);
    let past = vec![Past::known(0); 128];
    let mut rig = Rig::new(&top, &[], DiskOptions::default(), &faults, past, 1);
    assert!(rig.post(0, Request::Write(range(0, 4096)), 7));
    rig.drain();
    top.fail_direct_syncs();
    assert!(rig.close().is_err());
    assert_eq!(rig.marks.load(Ordering::SeqCst), 1, "the next process would be told that all is well");
}

/// Where the file system cannot reserve space, the file still grows with need only: another program that opens the
/// image after a crash allocates behind the count.
#[test]
fn without_fallocate_the_file_grows_no_faster_than_needed() {
    let (size, block) = (16 << 20, 4096);
    let faults = Faults::default();
    let top = new_top(size, block, false);
    let past = vec![Past::known(0); (size / SECTOR) as usize];
    let mut rig = Rig::new(&top, &[], DiskOptions::default(), &faults, past, 3);
    faults.add(Fault { sticky: true, ..Fault::of(&[IoKind::Allocate], 0, libc::EOPNOTSUPP) });
    for i in 0..16 {
        assert!(rig.post(0, Request::Write(range(i * block, block)), 7));
        rig.drain();
    }
    let places = (top.bytes().len() as u64 - (2 << 20)) / block;
    assert!(places <= 64, "16 blocks were written and the file has {places}");
}

/// Room was refused, and the write that asked for it went into a hole. The reason may be gone when the next one needs
/// room: it asks again rather than fail with it.
#[test]
fn a_refusal_of_room_is_for_the_one_that_asked() {
    let faults = Faults::default();
    let top = new_top(64 << 10, 4096, false);
    let past = vec![Past::known(0); 128];
    let mut rig = Rig::new(&top, &[], DiskOptions::default(), &faults, past.clone(), 1);
    assert!(rig.post(0, Request::Write(range(0, 8 * 4096)), 7));
    rig.close().unwrap();
    let freed = top.make_holes(&mut Rng(1));
    // The block at the end leaves no hole.
    let last = (0..8).filter(|b| !freed.contains(b)).max().unwrap();
    let holes = freed.iter().filter(|b| **b < last).count();
    assert!(holes > 0);
    let mut rig = Rig::new(&top, &[], DiskOptions::default(), &faults, past, 1);
    faults.add(Fault { sticky: true, ..Fault::of(&[IoKind::Allocate], 0, libc::EIO) });
    for i in 0..holes as u64 {
        assert!(rig.post(0, Request::Write(range((8 + i) * 4096, 4096)), 8));
        rig.drain();
    }
    faults.clear();
    assert!(rig.post(0, Request::Write(range(15 * 4096, 4096)), 9));
    rig.close().unwrap();
    assert_eq!(rig.failures, []);
}

/// A step behind a barrier is not begun if one before it has failed.
#[test]
fn a_failed_count_at_the_close_leaves_the_file_uncut() {
    let faults = Faults::default();
    for seed in 0..20 {
        let top = new_top(64 << 10, 4096, false);
        let past = vec![Past::known(0); 128];
        let mut rig = Rig::new(&top, &[], DiskOptions::default(), &faults, past, seed);
        assert!(rig.post(0, Request::Write(range(0, 4096)), 7));
        rig.drain();
        let len = top.bytes().len();
        faults.add(Fault { place: HEADER, ..Fault::of(&[IoKind::Write], 0, libc::EIO) });
        assert!(rig.close().is_err());
        assert_eq!(top.bytes().len(), len, "seed {seed}: cut although the count could not be written");
        faults.clear();
        rig.die(false);
    }
}

/// The entry of a failed write may be on the disk. A later write that finds its bytes there already, as far as memory
/// knows, must not leave it at that.
#[test]
fn an_entry_in_doubt_does_not_outlive_a_flushed_write() {
    for seed in 0..50 {
        let (below, past) = full_parent(64 << 10, 4096, 1, &mut Rng(5));
        let old = past[0].clone();
        let top = new_top(64 << 10, 4096, true);
        let faults = Faults::default();
        let mut rig =
            Rig::new(&top, std::slice::from_ref(&below), DiskOptions::default(), &faults, past, seed);
        rig.sweep();
        faults.add(Fault { place: TABLE, takes_effect: true, ..Fault::of(&[IoKind::Write], 0, libc::EIO) });
        assert!(rig.post(0, Request::Write(range(0, 512)), 99));
        rig.drain();
        faults.clear();
        assert_eq!(rig.failures.len(), 1);
        let value = old.after_cut(0)[0];
        assert!(rig.post(0, Request::Write(range(0, 512)), value));
        rig.drain();
        assert!(rig.post(0, Request::Flush, 0));
        rig.drain();
        let past = rig.die(true);
        top.power_cut(&mut Rng(seed));
        let mut rig = Rig::new(&top, &[below], DiskOptions::default(), &faults, past, seed);
        rig.look_again(true);
    }
}

/// An engine during whose page writes another thread stages the next change.
struct Busy {
    inner: SimEngine,
    other: Arc<std::sync::Mutex<Option<Channel>>>,
    next: u64,
    depth: usize,
    deepest: Arc<std::sync::atomic::AtomicUsize>,
}

impl IoEngine for Busy {
    fn attach(&mut self, id: FileId, file: &Arc<dyn HostFile>) -> std::io::Result<()> {
        self.inner.attach(id, file)
    }
    fn try_now(&mut self, op: &IoOp, bufs: &[BufSlice]) -> Option<Result<u64, i32>> {
        if op.kind == IoKind::Write && op.off.0 == 1 << 20 && self.next < 500 {
            self.depth += 1;
            self.deepest.fetch_max(self.depth, Ordering::SeqCst);
            // What another thread does while this one is in the kernel.
            let buf = Box::leak(Box::new(AlignedBuf::new(4096)));
            buf.as_mut_slice().fill(1);
            // SAFETY: leaked.
            let bufs = [unsafe { buf.as_buf() }];
            let slot = self.next as u16;
            self.next += 1;
            let r = range(self.next * 4096, 4096);
            if let Some(c) = self.other.lock().unwrap().as_mut() {
                c.submit(slot, Request::Write(r), &bufs);
            }
        }
        self.inner.try_now(op, bufs)
    }
    fn submit(&mut self, op: &IoOp, bufs: &[BufSlice], tag: crate::io::Tag) -> Result<(), crate::io::Full> {
        self.inner.submit(op, bufs, tag)
    }
    fn enter(&mut self) -> std::io::Result<()> {
        self.inner.enter()
    }
    fn reap(&mut self, out: &mut Vec<crate::io::Completion>) {
        self.depth = 0;
        self.inner.reap(out);
    }
    fn wait(&mut self, t: std::time::Duration) -> std::io::Result<()> {
        self.inner.wait(t)
    }
    fn event_fd(&self) -> Option<i32> {
        None
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
}

/// Pages that many channels change: the one that writes them serves its own guest, too, and its stack stays small.
#[test]
fn a_page_many_write_to_is_no_endless_task_for_one() {
    let files = [new_vdi(4 << 20, 4096, 1, None)];
    let disk = open(&files, true, DiskOptions::default());
    let mut engine = SimEngine::new(1);
    engine.inline_percent = 100;
    let mut other = Channel::new(disk.clone(), Box::new(engine), 600).unwrap();
    let mut inner = SimEngine::new(2);
    inner.inline_percent = 100;
    // Plenty of prepared blocks.
    let buf = AlignedBuf::new(4096 * 64);
    let mut data = AlignedBuf::new(4096 * 64);
    data.as_mut_slice().fill(3);
    for i in 0..5 {
        finish(&mut other, Request::Write(range((600 + i * 64) * 4096, 4096 * 64)), &data).unwrap();
    }
    drop(buf);
    let shared = Arc::new(std::sync::Mutex::new(Some(other)));
    let deepest = Arc::default();
    let busy = Busy { inner, other: shared.clone(), next: 0, depth: 0, deepest: Arc::clone(&deepest) };
    let mut c = Channel::new(disk, Box::new(busy), 1).unwrap();
    finish(&mut c, Request::Write(range(0, 4096)), &data_of(&data)).unwrap();
    let deepest = deepest.load(Ordering::SeqCst);
    let mut done = Vec::new();
    let mut other = shared.lock().unwrap().take().unwrap();
    for _ in 0..100_000 {
        for ch in [&mut c, &mut other] {
            ch.flush_queue().unwrap();
            ch.poll(&mut done);
        }
    }
    assert!(c.is_idle() && other.is_idle());
    assert!(deepest < 10, "{deepest} page writes within each other");
}

fn data_of(b: &AlignedBuf) -> AlignedBuf {
    let mut a = AlignedBuf::new(4096);
    a.as_mut_slice().copy_from_slice(&b.as_slice()[..4096]);
    a
}
