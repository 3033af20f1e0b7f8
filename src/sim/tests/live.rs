//! Live snapshots in the midst of workloads: power cuts at every moment, kills at any, and rules broken on purpose.

use crate::sim::{Kind, Played, Sabotage, Snapping, Stats, Through, sabotage, snapshot_under_load};

/// What is served, and what is put above it.
const PAIRS: [(Kind, Kind); 9] = [
    (Kind::Vdi, Kind::Diff),
    (Kind::Diff, Kind::DiffDiscard),
    (Kind::Raw, Kind::Qcow2Diff),
    (Kind::Qcow2, Kind::Qcow2Diff),
    (Kind::Vmdk, Kind::VmdkDiff),
    (Kind::Vhd, Kind::VhdDiff),
    (Kind::VhdxDiff, Kind::VhdxDiff),
    (Kind::Qed, Kind::QedDiff),
    (Kind::Vdi, Kind::Qcow2Diff),
];

fn how(seed: u64) -> Snapping {
    let (kind, above) = PAIRS[usize::try_from(seed).unwrap() % PAIRS.len()];
    let through = if seed.is_multiple_of(2) { Through::Channels } else { Through::Rings };
    Snapping { seed, kind, above, through, kill: None, samples: 4 }
}

fn right(how: &Snapping) -> Played {
    let played = snapshot_under_load(how);
    assert!(played.wrong.is_none(), "{how:?}: {:?}", played.wrong);
    played
}

fn seeds() -> u64 {
    if cfg!(debug_assertions) { 45 } else { 450 }
}

#[test]
fn the_power_goes_at_every_moment_of_a_snapshot() {
    let mut sum = Stats::default();
    (0..seeds()).for_each(|seed| sum.add(right(&how(seed)).stats));
    println!("{} snapshots: {sum:?}", seeds());
    assert!(sum.states > 100 * seeds(), "too few states: {sum:?}");
}

#[test]
fn a_process_is_killed_at_any_moment_of_a_snapshot() {
    let (mut lives, mut states) = (0, 0);
    for seed in 0..seeds() / 5 {
        let whole = right(&Snapping { samples: 0, ..how(seed) });
        let every = whole.events / 10 + 1;
        for n in 0..10 {
            let kill = Some(n * every + seed % every);
            let played = right(&Snapping { kill, samples: 1, ..how(seed) });
            (lives, states) = (lives + played.lives, states + played.stats.states);
        }
    }
    println!("{lives} processes, {states} states");
    assert!(lives > 12 * seeds() / 5, "few were killed: {lives}");
}

#[test]
fn a_broken_rule_of_a_snapshot_is_noticed() {
    for what in [Sabotage::RecordedAfterSwitch, Sabotage::NewImageUnsynced, Sabotage::SwitchedApart] {
        let broken = |seed| {
            sabotage(Some(what));
            let played = snapshot_under_load(&how(seed));
            sabotage(None);
            Some((seed, played.wrong?))
        };
        let caught = (0..400).find_map(broken);
        let (seed, why) = caught.unwrap_or_else(|| panic!("{what:?} is not noticed"));
        println!("{what:?}: seed {seed}: {why}");
    }
}
