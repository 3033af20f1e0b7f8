//! The example of a plug-in (examples/plugin) in the simulator: what its maps and plans are worth when the power goes, through the C interface
//! as everybody uses it. And one that lies where nobody can see it, which the simulator has to find.

use super::sabotaged::find_nothing_in_what_is_sound;
use crate::format::Format;
use crate::plugin::plugin_load;
use crate::sim::{
    Judge, Kills, Kind, Landing, Play, Stats, Thorough, all_workloads, play, powercut_after_kills,
    powercut_workload, small_disk,
};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// The example's format, compiled with `define`.
fn compiled(define: &str) -> Format {
    let dir = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = dir.path().join("vdblk-plugin-example.so");
    let cc = Command::new("cc")
        .args(["-std=c99", "-O2", "-fPIC", "-shared", define])
        .arg("-I")
        .arg(root.join("include"))
        .arg("-o")
        .arg(&library)
        .arg(root.join("examples/plugin/vdblk-plugin-example.c"))
        .status();
    assert!(cc.expect("start cc").success());
    plugin_load(&library).unwrap().formats[0]
}

fn example() -> Format {
    static FORMAT: OnceLock<Format> = OnceLock::new();
    *FORMAT.get_or_init(|| compiled("-DSOUND"))
}

fn liar() -> Format {
    static FORMAT: OnceLock<Format> = OnceLock::new();
    *FORMAT.get_or_init(|| compiled("-DVDBLK_EXAMPLE_LIES"))
}

fn kinds() -> [Kind; 2] {
    [Kind::Other(example()), Kind::OtherDiff(example())]
}

#[test]
fn powercut_in_small_workloads_of_a_plugin() {
    for kind in kinds() {
        let disks: Vec<_> = (0..4).map(|seed| small_disk(kind, seed)).collect();
        let mut sum = Stats::default();
        for (seed, ops) in (0..).zip(all_workloads()) {
            let disk = &disks[seed as usize % disks.len()];
            let judge = Judge::new(8, 40, seed);
            let played = powercut_workload(disk, &ops, &Kills::default(), seed, judge);
            assert!(played.wrong.is_none(), "{kind:?} {ops:?} seed {seed}: {:?}", played.wrong);
            sum.add(played.stats);
        }
        println!("{kind:?}: {sum:?}");
        assert!(sum.states > 20_000, "too few states: {sum:?}");
    }
}

#[test]
fn powercut_after_kills_of_a_plugin() {
    for kind in kinds() {
        let disks: Vec<_> = (0..4).map(|seed| small_disk(kind, seed)).collect();
        let how = Thorough { every: 8, twice: 1, landings: &[Landing::Chance], exhaustive: 2, samples: 2 };
        let (mut sum, mut lives) = (Stats::default(), 0);
        for (seed, ops) in (0..).zip(all_workloads()) {
            let disk = &disks[seed as usize % disks.len()];
            let played = powercut_after_kills(disk, &ops, &how, seed);
            assert!(played.wrong.is_none(), "{kind:?} {ops:?} seed {seed}: {:?}", played.wrong);
            sum.add(played.stats);
            lives += played.lives;
        }
        println!("{kind:?}: {lives} processes, {sum:?}");
        assert!(lives > 1000 && sum.states > 2000, "too few: {lives} {sum:?}");
    }
}

#[test]
fn powercut_in_random_workloads_of_a_plugin() {
    for kind in kinds() {
        let mut sum = Stats::default();
        for seed in 0..12 {
            let p = play(&Play::powercut(kind, seed, 30));
            assert!(p.wrong.is_none(), "{kind:?} seed {seed}: {:?}", p.wrong);
            sum.add(p.stats);
        }
        println!("{kind:?}: {sum:?}");
        assert!(sum.states > 20_000, "too few states: {sum:?}");
    }
}

/// Guests and processes of all habits, on disks that fail.
#[test]
fn powercut_finds_nothing_in_a_plugin_that_is_sound() {
    kinds().into_iter().for_each(find_nothing_in_what_is_sound);
}

/// Thousands of requests through rings, with kills, failing disks and copies beside them.
#[test]
fn simulations_of_a_plugin_find_nothing() {
    let mut lives = 0;
    for kind in kinds() {
        for seed in 0..20 {
            let p = play(&Play { kind: Some(kind), ..Play::seed(seed) });
            assert!(p.wrong.is_none(), "{kind:?} seed {seed}: {:?}", p.wrong);
            lives += p.lives;
        }
    }
    println!("{lives} processes");
    assert!(lives > 200, "{lives} processes");
}

/// A plug-in that calls places clean in which old bytes are keeps the orders, and no host can tell. Its users would lose data.
#[test]
fn powercut_finds_a_plugin_that_lies() {
    let found = (0..30).find_map(|seed| play(&Play::powercut(Kind::Other(liar()), seed, 30)).wrong);
    println!("{found:?}");
    let what = found.expect("something is found");
    assert!(["holds", "reads"].iter().any(|w| what.contains(w)), "{what}");
}
