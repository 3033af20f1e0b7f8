//! Operations that fail at the moments that once mattered: those who asked hear of it, nobody hangs, and the image stays
//! right.

use crate::error::Failure;
use crate::format::{Format, vdi};
use crate::io::IoKind;
use crate::map::{GuestOffset, GuestRange};
use crate::sim::images::check;
use crate::sim::{
    Bytes, DATA, Failing, Fault, FaultMix, Faults, Images, Kind, Left, Past, Rng, Shape, Through, Trace,
    World, take_away,
};
use crate::vd::{DiskOptions, Request};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Where things are in a new VDI.
const HEADER: Range<u64> = 0..512;
const TABLE: Range<u64> = 1 << 20..DATA;

const EIO: Failing = Failing::Error(libc::EIO);

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len).unwrap()
}

fn write(start: u64, len: u64) -> Request {
    Request::Write(range(start, len))
}

fn images(kind: Kind, size: u64, block: u64, rng: &mut Rng) -> (Images, Vec<Past>) {
    Images::new(Shape { kind, size, block }, rng)
}

fn world(images: &Images, faults: &Faults, left: Left, seed: u64) -> World {
    let setup = (DiskOptions::default(), faults.clone(), Trace::default());
    World::after(images, setup, left, Through::Channels, seed).unwrap()
}

/// Posts and waits; what matters afterwards are the failures.
fn run(w: &mut World, request: Request, value: u64) {
    assert!(w.post(0, request, value));
    w.drain();
}

/// The power goes where the process is; what is left.
fn cut_power(mut w: World, images: &Images, seed: u64) -> Left {
    let cut = images.top.cut_now();
    w.kill();
    let left = w.afterwards(true);
    images.top.restart_with(cut.random_state(&mut Rng(seed)));
    left
}

fn is_sound(w: &mut World, seed: u64) {
    assert_eq!(w.wrong.take(), None, "seed {seed}");
}

fn check_clean(images: &Images, seed: u64) {
    let report = vdi::check(&images.top.bytes()).unwrap();
    assert!(report.is_clean(), "seed {seed}: {report:?}");
}

/// Errors only: what is short or interrupted is tried again and fails nobody.
const FAULTS: FaultMix = FaultMix {
    kinds: &[
        &[],
        &[IoKind::Write],
        &[IoKind::Write],
        &[IoKind::Read],
        &[IoKind::Allocate],
        &[IoKind::Sync],
        &[IoKind::WriteThrough],
        &[IoKind::Punch, IoKind::ZeroRange],
        &[IoKind::Truncate],
    ],
    errnos: &[libc::EIO, libc::ENOSPC, libc::EOPNOTSUPP],
    how: |rng, errno| match rng.chance(30) {
        true => Failing::ErrorAfterEffect(errno),
        false => Failing::Error(errno),
    },
    sticky: 40,
    metadata: 40,
};

/// One random fault in a random workload, then on without it.
fn survives(seed: u64, kind: Kind) {
    let mut rng = Rng(seed);
    let (images, past) = images(kind, 192 << 10, 4096 << rng.below(4), &mut rng);
    let faults = Faults::default();
    let mut w = world(&images, &faults, Left::new(past), rng.draw());
    w.steps(rng.below(200));
    let fault = Fault::by_chance(&FAULTS, &mut rng);
    let metadata = fault.kinds.is_empty() || fault.kinds.contains(&IoKind::Write);
    faults.add(fault);
    w.steps(rng.below(400));
    w.drain();
    let dead = w.sync_has_failed();
    faults.clear();
    w.failures.clear();
    w.steps(200);
    w.drain();
    if dead {
        let refused =
            |(r, f): &(Request, Failure)| !matches!(r, Request::Read(_)) && *f == Failure::SyncFailed;
        assert!(w.failures.iter().all(refused), "seed {seed}: {:?}", w.failures);
    } else {
        // A place that the disk may name is not used again before the close; a small image can run out of them.
        let left = |(_, f): &(Request, Failure)| *f == Failure::Os(libc::ENOSPC) && metadata;
        assert!(w.failures.iter().all(left), "seed {seed}: {:?}", w.failures);
        w.sweep();
        if rng.chance(50) {
            w.close().unwrap();
            check_clean(&images, seed);
        }
    }
    is_sound(&mut w, seed);
    let cut = dead || rng.chance(80);
    let left = if cut {
        cut_power(w, &images, rng.draw())
    } else {
        w.kill();
        w.afterwards(false)
    };
    let mut w = world(&images, &faults, left, rng.draw());
    w.look_again(cut);
    w.steps(100);
    w.close().unwrap();
    is_sound(&mut w, seed);
    check_clean(&images, seed);
}

#[test]
fn one_fault_fails_only_what_it_hits() {
    for seed in 0..300 {
        survives(seed, if seed % 2 == 1 { Kind::DiffDiscard } else { Kind::Vdi });
    }
}

/// A plan whose data was written before a sync failed must not go on with a sync of its own: the kernel may have
/// dropped that data, and says so only once.
#[test]
fn a_failed_sync_is_final_for_plans_under_way() {
    let (original, past) = images(Kind::DiffDiscard, 2 << 20, 1 << 20, &mut Rng(7));
    let mut tried = 0;
    for seed in 0..100 {
        let images = original.copy();
        let faults = Faults::default();
        let mut w = world(&images, &faults, Left::new(past.clone()), seed);
        // A block of four pieces, some of which are written when the sync fails.
        assert!(w.post(0, write(4096, 512), 99));
        let pieces = 1 + seed % 3;
        for _ in 0..10_000 {
            if images.top.data_writes() >= pieces {
                break;
            }
            w.poll(0);
        }
        faults.add(Fault::of(&[IoKind::Sync], 0, EIO));
        let last = w.queues() - 1;
        let posted = w.post(last, Request::Flush, 0);
        for _ in 0..1000 {
            if w.marks.load(Ordering::SeqCst) > 0 {
                break;
            }
            w.poll(last);
        }
        // a flush that finds nothing completed needs no sync
        let in_time = w.marks.load(Ordering::SeqCst) > 0 && images.top.data_writes() < 4;
        w.drain();
        is_sound(&mut w, seed);
        if !posted || !in_time {
            continue; // its own sync may have been before
        }
        tried += 1;
        let failed = |r: &Request| w.failures.iter().any(|(f, why)| f == r && *why == Failure::SyncFailed);
        assert!(failed(&Request::Flush), "seed {seed}");
        assert!(failed(&write(4096, 512)), "seed {seed}: a write went on behind a failed sync");
        let left = cut_power(w, &images, seed);
        let mut w = world(&images, &Faults::default(), left, seed);
        w.look_again(true);
        is_sound(&mut w, seed);
    }
    assert!(tried > 20, "only {tried} of the seeds met the moment");
}

/// A disk that is full now and then, or fails to write a table. What a failed extension of a QCOW2 has written of refcount blocks
/// lies where the next one, which takes fewer or others, has clusters for data and tables; and of its blocks some may count.
#[test]
fn what_a_failed_extension_wrote_is_not_taken_for_zeros() {
    for seed in 0..300 {
        let mut rng = Rng(seed);
        let cluster = 512 << rng.below(3);
        let (images, past) = images(Kind::Qcow2, 128 << (10 + rng.below(4)), cluster, &mut rng);
        let faults = Faults::default();
        let mut w = world(&images, &faults, Left::new(past), rng.draw());
        for _ in 0..4 {
            w.steps(rng.below(100));
            let behind = images.top.bytes().len()..u64::MAX;
            let (kind, place, errno) = match rng.below(3) {
                0 => (IoKind::Allocate, 0..u64::MAX, libc::ENOSPC),
                1 => (IoKind::Write, behind, libc::EIO),
                _ => (IoKind::Write, cluster..2 * cluster, libc::EIO), // the refcount table
            };
            let fault = Fault::of(&[kind], rng.below(4), Failing::Error(errno));
            faults.add(Fault { place, sticky: rng.chance(30), ..fault });
            w.steps(rng.below(200));
            w.drain();
            faults.clear();
            let expected = |(_, f): &(Request, Failure)| matches!(f, Failure::Os(libc::ENOSPC | libc::EIO));
            assert!(w.failures.iter().all(expected), "seed {seed}: {:?}", w.failures);
            w.sweep();
            is_sound(&mut w, seed);
        }
        w.close().unwrap();
        let report = check(Format::Qcow2, &images.top.bytes()).unwrap().unwrap();
        assert_eq!(report.corruptions, 0, "seed {seed}: {report:?}");
    }
}

fn small(seed: u64) -> (Images, Faults, World) {
    let (images, past) = images(Kind::Vdi, 64 << 10, 4096, &mut Rng(seed));
    let faults = Faults::default();
    let w = world(&images, &faults, Left::new(past), seed);
    (images, faults, w)
}

/// A clean close after a failed sync must not say that all is well, and a close whose sync fails leaves the mark.
#[test]
fn a_close_does_not_hide_a_failed_sync() {
    let (_images, faults, mut w) = small(1);
    run(&mut w, write(0, 4096), 7);
    // In place: nothing but the flush will sync this one.
    run(&mut w, write(0, 4096), 8);
    faults.add(Fault::of(&[IoKind::Sync], 0, EIO));
    run(&mut w, Request::Flush, 0);
    assert_eq!(w.failures, [(Request::Flush, Failure::SyncFailed)]);
    assert!(w.close().is_err(), "a disk with a failed sync was closed as if it were durable");
}

#[test]
fn a_failed_sync_at_the_close_leaves_the_mark() {
    let (images, _, mut w) = small(1);
    run(&mut w, write(0, 4096), 7);
    images.top.fail_direct_syncs(true);
    assert!(w.close().is_err());
    assert_eq!(w.marks.load(Ordering::SeqCst), 1, "the next process would be told that all is well");
}

/// Where the file system cannot reserve space, the file still grows with need only: another program that opens the
/// image after a crash allocates behind the count.
#[test]
fn without_fallocate_the_file_grows_no_faster_than_needed() {
    let (images, past) = images(Kind::Vdi, 16 << 20, 4096, &mut Rng(3));
    let faults = Faults::default();
    let mut w = world(&images, &faults, Left::new(past), 3);
    let how = Failing::Error(libc::EOPNOTSUPP);
    faults.add(Fault { sticky: true, ..Fault::of(&[IoKind::Allocate], 0, how) });
    (0..16).for_each(|i| run(&mut w, write(i * 4096, 4096), 7));
    assert_eq!(w.failures, []);
    let places = (images.top.bytes().len() - DATA) / 4096;
    assert!(places <= 64, "16 blocks were written and the file has {places}");
}

/// Room was refused, and the write that asked for it went into a hole. The reason may be gone when the next one needs
/// room: it asks again rather than fail with it.
#[test]
fn a_refusal_of_room_is_for_the_one_that_asked() {
    let (images, _, mut w) = small(1);
    run(&mut w, write(0, 8 * 4096), 7);
    w.close().unwrap();
    drop(w);
    let freed = take_away(&images.top, &mut Rng(1));
    // The block at the end leaves no hole.
    let last = (0..8).filter(|b| !freed.contains(b)).max().unwrap();
    let holes = freed.iter().filter(|b| **b < last).count() as u64;
    assert!(holes > 0);
    let (faults, past) = (Faults::default(), vec![Past::known(0); 128]);
    let mut w = world(&images, &faults, Left::new(past), 1);
    faults.add(Fault { sticky: true, ..Fault::of(&[IoKind::Allocate], 0, EIO) });
    (0..holes).for_each(|i| run(&mut w, write((8 + i) * 4096, 4096), 8));
    faults.clear();
    run(&mut w, write(15 * 4096, 4096), 9);
    w.close().unwrap();
    assert_eq!(w.failures, []);
}

/// A step behind a barrier is not begun if one before it has failed.
#[test]
fn a_failed_count_at_the_close_leaves_the_file_uncut() {
    for seed in 0..20 {
        let (images, faults, mut w) = small(seed);
        run(&mut w, write(0, 4096), 7);
        let len = images.top.bytes().len();
        faults.add(Fault { place: HEADER, ..Fault::of(&[IoKind::Write], 0, EIO) });
        assert!(w.close().is_err());
        let now = images.top.bytes().len();
        assert_eq!(now, len, "seed {seed}: cut although the count could not be written");
    }
}

/// The entry of a failed write may be on the disk. A later write that finds its bytes there already, as far as memory
/// knows, must not leave it at that.
#[test]
fn an_entry_in_doubt_does_not_outlive_a_flushed_write() {
    let (original, past) = images(Kind::DiffDiscard, 64 << 10, 4096, &mut Rng(5));
    for seed in 0..50 {
        let images = original.copy();
        let faults = Faults::default();
        let mut w = world(&images, &faults, Left::new(past.clone()), seed);
        w.sweep();
        let how = Failing::ErrorAfterEffect(libc::EIO);
        faults.add(Fault { place: TABLE, ..Fault::of(&[IoKind::Write], 0, how) });
        run(&mut w, write(0, 512), 99);
        faults.clear();
        assert_eq!(w.failures.len(), 1);
        run(&mut w, write(0, 512), past[0].after_cut(0)[0]);
        run(&mut w, Request::Flush, 0);
        is_sound(&mut w, seed);
        let left = cut_power(w, &images, seed);
        let mut w = world(&images, &faults, left, seed);
        w.look_again(true);
        is_sound(&mut w, seed);
    }
}

/// What [`take_away`] does is what it says, or the test above proves nothing.
#[test]
fn blocks_taken_away_are_holes() {
    let (images, _, mut w) = small(2);
    run(&mut w, write(0, 8 * 4096), 7);
    w.close().unwrap();
    drop(w);
    let before = images.view(&images.top.bytes()).unwrap();
    let freed = take_away(&images.top, &mut Rng(1));
    let after: Bytes = images.top.bytes();
    let after = images.view(&after).unwrap();
    for b in 0..8u32 {
        let own = b as usize * 4096..(b as usize + 1) * 4096;
        let zero = after[own.clone()].iter().all(|x| *x == 0);
        assert!(zero == freed.contains(&b) && (zero || after[own.clone()] == before[own]), "block {b}");
    }
}
