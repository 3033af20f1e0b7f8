//! Power cuts and killed processes at any moment: what was flushed is there, nothing is where it does not belong, and
//! the image opens.

use super::rig::{CrashFile, Faults, Past, Rig, full_parent};
use super::*;

/// Dies and opens again, many times, on the same image.
fn lives(seed: u64, diff: bool, faults: &Faults) {
    let mut rng = Rng(seed);
    let block = 4096 << rng.below(4);
    let size = 192 << 10;
    let (below, mut past) = if diff {
        let (f, past) = full_parent(size, 4096 << rng.below(4), 1, &mut rng);
        (vec![f], past)
    } else {
        (Vec::new(), vec![Past::known(0); (size / SECTOR) as usize])
    };
    let beneath = past.clone();
    let top = CrashFile::new(new_vdi(size, block, 2, diff.then_some(1)).bytes());
    let mut cut = true;
    for _life in 0..8 {
        let options = DiskOptions { write_through: rng.chance(15), ..DiskOptions::default() };
        let mut rig = Rig::new(&top, &below, options, faults, past, rng.next());
        rig.look_again(cut);
        let steps = if rng.chance(40) { 30 } else { 400 };
        rig.steps(rng.below(steps));
        if rng.chance(20) {
            rig.drain();
            rig.close().unwrap();
            if rig.disk.start.is_done() {
                check_clean_file(&top, seed);
            }
            rig.flushed = u64::MAX;
        } else if rng.chance(30) {
            rig.close_halfway();
        }
        cut = rng.chance(70);
        past = rig.die(cut);
        if cut {
            top.power_cut(&mut rng);
        }
        let holes = rng.chance(40);
        for b in if holes { top.make_holes(&mut rng) } else { Vec::new() } {
            let per = block / SECTOR;
            for s in (b * per) as usize..((b + 1) * per).min(size / SECTOR) as usize {
                past[s].changed_by_another(beneath[s].after_cut(0)[0]);
            }
        }
        cut &= !holes;
        let bytes = top.bytes();
        let report = format::vdi::check(&bytes as &dyn ByteSource).unwrap();
        assert_eq!(report.corruptions, 0, "seed {seed}: {report:?}");
    }
}

pub(super) fn check_clean_file(top: &CrashFile, seed: u64) {
    let report = format::vdi::check(&top.bytes() as &dyn ByteSource).unwrap();
    assert!(report.is_clean(), "seed {seed}: {report:?}");
}

pub(super) fn seeds(name: &str, default: u64) -> std::ops::Range<u64> {
    match std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok()) {
        Some(s) => s..s + 1,
        None => 0..std::env::var("VDBLK_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(default),
    }
}

#[test]
fn powercut_bases_keep_what_was_flushed() {
    for seed in seeds("VDBLK_SEED", 150) {
        lives(seed, false, &Faults::default());
    }
}

#[test]
fn powercut_diffs_keep_what_was_flushed() {
    for seed in seeds("VDBLK_SEED", 150) {
        lives(seed, true, &Faults::default());
    }
}
