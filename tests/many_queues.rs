//! Eight queues on the same few blocks at the same time, with discards, write-zeroes, and a job that copies the disk
//! meanwhile: no read finds what no order of the writes explains.
//!
//! `VDBLK_QUEUE_OPS` says how many requests in all (300,000; `scripts/test.sh`: 2,000,000).

mod common;
mod queues_support;

use queues_support::broken::{Broken, FAULTS};
use queues_support::{Kind, Rig, Shown, Way};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use vdblk::io::EngineKind;

/// Requests on one image.
const ROUND: u64 = 25_000;
/// Requests past the page cache take long: this is their part of all.
const DIRECT_SHARE: u64 = 20;

/// Of the reads of zeros, in percent, so many at most may be ones that more than one write explains: the check demands
/// less of them. A third is usual.
const MOST_AMBIGUOUS: u64 = 50;

/// One test at a time: each has twenty threads.
static TURN: Mutex<()> = Mutex::new(());

fn all_operations() -> u64 {
    std::env::var("VDBLK_QUEUE_OPS").map_or(300_000, |n| n.parse().expect("VDBLK_QUEUE_OPS is a number"))
}

fn way(kind: Kind, engine: EngineKind, direct: bool) -> Way {
    let block = if engine == EngineKind::Threads { 64 << 10 } else { 16 << 10 };
    Way { kind, engine, direct, block, size: 8 << 20 }
}

fn play(way: Way, operations: u64) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (rig, start, mut all) = (Rig::new(way), Instant::now(), Shown::default());
    for seed in 1..=operations.div_ceil(ROUND) {
        let n = ROUND.min(operations - all.operations);
        let shown = rig.round(n, seed, |_, channel| channel);
        all.add(shown.unwrap_or_else(|v| panic!("{way:?}, seed {seed}: {v}")));
    }
    let share = 100 * all.seen.overlapping / all.seen.of_queues;
    let ambiguous = 100 * all.seen.ambiguous / all.seen.zeros.max(1);
    println!(
        "{way:?}: {all:?}, {share} % overlapping, {ambiguous} % of the zeros ambiguous, {:?}",
        start.elapsed()
    );
    assert!(all.operations == operations && all.copies > 0 && share >= 50, "{all:?}");
    assert!(all.seen.zeros > 0 && ambiguous <= MOST_AMBIGUOUS, "{ambiguous} % of the zeros: {all:?}");
}

fn cached(kind: Kind) {
    for engine in [EngineKind::IoUring, EngineKind::Threads] {
        play(way(kind, engine, false), (all_operations() - all_operations() / DIRECT_SHARE) / 6);
    }
}

fn direct(kind: Kind) {
    for engine in [EngineKind::IoUring, EngineKind::Threads] {
        play(way(kind, engine, true), all_operations() / DIRECT_SHARE / 6);
    }
}

#[test]
fn a_raw_disk_through_the_page_cache() {
    cached(Kind::Raw);
}

#[test]
fn a_vdi_through_the_page_cache() {
    cached(Kind::Vdi);
}

#[test]
fn a_diff_through_the_page_cache() {
    cached(Kind::Diff);
}

#[test]
fn all_kinds_past_the_page_cache() {
    [Kind::Raw, Kind::Vdi, Kind::Diff].into_iter().for_each(direct);
}

/// The check itself: what lies in one write of ten thousand, or in a few discards or reads, is noticed.
#[test]
fn a_device_that_lies_is_caught() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for (fault, one_in) in FAULTS {
        let rig = Rig::new(way(Kind::Raw, EngineKind::Threads, false));
        let image = rig.image();
        let found = (1..=16).find_map(|seed| {
            let image = image.clone();
            let wrap = move |queue, channel| Broken::new(channel, &image, fault, one_in, queue);
            rig.round(50_000, seed, wrap).err().map(|v| (seed, v))
        });
        let (seed, v) = found.unwrap_or_else(|| panic!("{fault:?} was not noticed"));
        println!("{fault:?}: round {seed}, sector {}: {}", v.sector, v.why);
    }
}
