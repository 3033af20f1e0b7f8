//! Repairs that are interrupted, of images that are damaged in ways no power cut of ours damages them.

use crate::format::vdi;
use crate::sim::{Bytes, Faults, Images, Kind, Rng, Shape, Trace, World, interrupted_repairs};
use crate::vd::DiskOptions;

const TABLE: u64 = 1 << 20;
const COUNT: u64 = 0x184;
const BLOCKS: u64 = 0x180;

fn word(b: &Bytes, at: u64) -> u32 {
    let mut w = [0; 4];
    b.read(at, &mut w);
    u32::from_le_bytes(w)
}

/// A part-full image.
fn image(kind: Kind, rng: &mut Rng) -> Images {
    let shape = Shape { kind, size: 96 << 10, block: 4096 << rng.below(2) };
    let (images, past) = Images::new(shape, rng);
    let setup = (DiskOptions::default(), Faults::default(), Trace::default());
    let mut w = World::new(&images, setup, past, rng.draw()).unwrap();
    w.steps(40);
    w.close().unwrap();
    images
}

/// Another program, or a bad disk, has been at the table.
fn damage(b: &mut Bytes, rng: &mut Rng) {
    let blocks = word(b, BLOCKS);
    for _ in 0..1 + rng.below(4) {
        let entry = TABLE + 4 * rng.below(u64::from(blocks));
        let value = match rng.below(5) {
            // a place another block has, perhaps
            0 | 1 => u32::try_from(rng.below(u64::from(blocks))).unwrap(),
            // one that cannot be
            2 => blocks + u32::try_from(rng.below(5)).unwrap(),
            3 => u32::MAX,
            _ => u32::MAX - 1,
        };
        b.write(entry, &value.to_le_bytes());
    }
    match rng.below(4) {
        0 => b.write(COUNT, &u32::try_from(rng.below(u64::from(blocks) + 1)).unwrap().to_le_bytes()),
        1 => b.set_len(b.len().saturating_sub(512 * rng.below(20)).max(2 << 20)),
        2 => b.set_len(b.len() + 512 * rng.below(40)),
        _ => {}
    }
}

#[test]
fn powercut_in_a_repair_leaves_what_another_repair_makes_clean() {
    let seeds = if cfg!(debug_assertions) { 60 } else { 600 };
    let (mut states, mut broken, mut repaired) = (0, 0, 0);
    for seed in 0..seeds {
        let mut rng = Rng(seed);
        let images = image([Kind::Vdi, Kind::DiffDiscard][rng.index(2)], &mut rng);
        let mut bytes = images.top.bytes();
        damage(&mut bytes, &mut rng);
        if vdi::repair(&bytes).is_err() {
            continue;
        }
        repaired += 1;
        broken += u32::from(images.view(&bytes).is_err());
        states +=
            interrupted_repairs(&images, &bytes, 8, &mut rng).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
    println!("{repaired} images, {broken} of which did not open: {states} states of interrupted repairs");
    assert!(repaired * 2 > seeds && broken > 10 && states > 1000, "{repaired} {broken} {states}");
}
