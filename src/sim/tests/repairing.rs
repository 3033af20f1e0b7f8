//! Repairs that are interrupted, of images that are damaged in ways no power cut of ours damages them.

use crate::format::{self, ImageFile, vdi};
use crate::map::FileId;
use crate::sim::{Bytes, Faults, Images, Kind, Past, Rng, Shape, Trace, World, interrupted_repairs};
use crate::vd::DiskOptions;

const TABLE: u64 = 1 << 20;
const COUNT: u64 = 0x184;
const BLOCKS: u64 = 0x180;

fn word(b: &Bytes, at: u64) -> u32 {
    let mut w = [0; 4];
    b.read(at, &mut w);
    u32::from_le_bytes(w)
}

fn image(kind: Kind, rng: &mut Rng) -> Images {
    image_of(kind, 96 << 10, rng)
}

/// A part-full image.
pub(super) fn image_of(kind: Kind, size: u64, rng: &mut Rng) -> Images {
    let shape = Shape { kind, size, block: 4096 << rng.below(2) };
    let (images, past) = Images::new(shape, rng);
    lived(images, past, rng)
}

/// The same images after some work on them.
pub(super) fn lived(images: Images, past: Vec<Past>, rng: &mut Rng) -> Images {
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

/// The same to a VHD: its table follows the header, or a locator of a sector.
fn damage_vhd(b: &mut Bytes, rng: &mut Rng) {
    let be = |b: &Bytes, at: u64| word(b, at).swap_bytes();
    let (table, blocks, stride) =
        (u64::from(be(b, 512 + 20)), u64::from(be(b, 512 + 28)), be(b, 512 + 32) + 512);
    for _ in 0..1 + rng.below(4) {
        let other = be(b, table + 4 * rng.below(blocks));
        let near = u32::try_from(rng.below(20)).unwrap();
        let value = match rng.below(6) {
            // where another block is, or a bit further on
            0 | 1 => other,
            2 => other.saturating_add(near),
            // on metadata, or behind the file
            3 => near,
            4 => 2 * stride * 40 / 512 + near,
            _ => u32::MAX,
        };
        b.write(table + 4 * rng.below(blocks), &value.to_be_bytes());
    }
    match rng.below(5) {
        0 => b.write(0, &[7; 512]),
        1 => b.set_len(b.len() - 512 * rng.below(20).min(b.len() / 512 - 8)),
        2 => b.set_len(b.len() + 512 * rng.below(40)),
        3 => b.write(b.len() - 512, &[7; 512]),
        _ => {}
    }
}

/// Damages a VMDK: entries and their copies upon each other and elsewhere, the file's end, the mark.
fn damage_vmdk(b: &mut Bytes, rng: &mut Rng) {
    let word = |b: &Bytes, at| {
        let mut w = [0; 4];
        b.read(at, &mut w);
        u32::from_le_bytes(w)
    };
    let grain = word(b, 20);
    let tables = [48, 56].map(|at| u64::from(word(b, u64::from(word(b, at)) * 512)) * 512);
    let grains = u64::from(word(b, 12).div_ceil(grain));
    for _ in 0..1 + rng.below(3) {
        let other = word(b, tables[1] + 4 * rng.below(grains));
        let value = match rng.below(8) {
            0..=4 => other,
            // upon it in part, or behind the file
            5 | 6 if other > 0 => other + u32::try_from(rng.below(u64::from(grain))).expect("few"),
            _ => u32::try_from(b.len() / 512 + 8).expect("a small file"),
        };
        let at = 4 * rng.below(grains);
        let both = rng.chance(60);
        b.write(tables[1] + at, &value.to_le_bytes());
        if both {
            b.write(tables[0] + at, &value.to_le_bytes());
        }
    }
    match rng.below(4) {
        0 => b.set_len(b.len() + 512 * rng.below(40)),
        1 => b.write(72, &[1]),
        _ => {}
    }
}

/// Damages a VHDX: entries upon each other, on metadata, behind the file; a table of regions or a header; the file's end.
fn damage_vhdx(b: &mut Bytes, rng: &mut Rng) {
    let (table, blocks) = (3 << 20, 10);
    let entry = |b: &Bytes, block: u64| u64::from(word(b, table + 8 * block));
    for _ in 0..1 + rng.below(4) {
        let other = entry(b, rng.below(blocks));
        let value = match rng.below(6) {
            // where another block is, or a unit further on
            0 | 1 => other,
            2 => other + 4096,
            // on metadata, or behind the file
            3 => (rng.below(4 << 8) << 12) | 6,
            4 => (b.len() + (rng.below(3) << 12)).next_multiple_of(4096) | 6,
            _ => 0,
        };
        b.write(table + 8 * rng.below(blocks), &value.to_le_bytes());
    }
    match rng.below(5) {
        0 => b.write([64 << 10, 128 << 10, 192 << 10, 256 << 10][rng.index(4)], &[7; 512]),
        1 => b.set_len(b.len().saturating_sub(512 * rng.below(20)).max(4 << 20)),
        2 => b.set_len(b.len() + 512 * rng.below(40)),
        _ => {}
    }
}

/// Repairs of images of these kinds, of one format, that were damaged: interrupted at moments of them.
fn interrupted(kinds: [Kind; 2], damage: impl Fn(&mut Bytes, &mut Rng)) {
    let seeds = if cfg!(debug_assertions) { 60 } else { 600 };
    let (mut states, mut broken, mut repaired) = (0, 0, 0);
    for seed in 0..seeds {
        let mut rng = Rng(seed);
        let images = image(kinds[rng.index(2)], &mut rng);
        let mut bytes = images.top.bytes();
        damage(&mut bytes, &mut rng);
        let files = [ImageFile { id: FileId(0), source: &bytes }];
        if format::repair(kinds[0].format(), &files).is_err() {
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

#[test]
fn powercut_in_a_repair_of_a_vhdx_leaves_what_another_repair_makes_clean() {
    interrupted([Kind::Vhdx, Kind::VhdxDiff], damage_vhdx);
}

#[test]
fn powercut_in_a_repair_of_a_vmdk_leaves_what_another_repair_makes_clean() {
    interrupted([Kind::Vmdk, Kind::VmdkDiff], damage_vmdk);
}

#[test]
fn powercut_in_a_repair_of_a_vhd_leaves_what_another_repair_makes_clean() {
    interrupted([Kind::Vhd, Kind::VhdDiff], damage_vhd);
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
