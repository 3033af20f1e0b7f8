//! Changes of size that are interrupted.

use super::repairing::image_of;
use crate::sim::{Bytes, Images, Kind, Rng, interrupted_resizes};

const SEEDS: u64 = if cfg!(debug_assertions) { 8 } else { 200 };

/// Changes the size of many images of a kind, `dress` having been at each of them.
fn resizes(kind: Kind, sizes: &[u64], dress: impl Fn(&Bytes, &mut Rng) -> Bytes) {
    let mut states = 0;
    for seed in 0..SEEDS {
        let mut rng = Rng(seed);
        let size = 512 * (1 + rng.below(192));
        let images: Images = image_of(kind, size, &mut rng);
        let bytes = dress(&images.top.bytes(), &mut rng);
        for to in sizes {
            let to = if *to == 0 { 512 * (1 + rng.below(size / 512)) } else { size + to };
            states += interrupted_resizes(&images, &bytes, to, 6, &mut rng)
                .unwrap_or_else(|e| panic!("{} seed {seed}, {size} to {to}: {e}", kind.name()));
        }
    }
    println!("{}: {states} states", kind.name());
    assert!(states > SEEDS * sizes.len() as u64 * 4, "{states}");
}

fn as_it_is(bytes: &Bytes, _: &mut Rng) -> Bytes {
    bytes.clone()
}

/// A VDI as QEMU makes it: the table behind the header, the blocks behind the table.
fn without_gaps(bytes: &Bytes, _: &mut Rng) -> Bytes {
    let word = |at: u64| {
        let mut w = [0; 4];
        bytes.read(at, &mut w);
        u64::from(u32::from_le_bytes(w))
    };
    let (table, data, blocks) = (word(0x154), word(0x158), word(0x180));
    let mut all = bytes.to_vec();
    let blocks_from = usize::try_from(data).unwrap();
    let entries = usize::try_from(table).unwrap()..usize::try_from(table + 4 * blocks).unwrap();
    let begin = (512 + 4 * blocks).next_multiple_of(512);
    let mut out = all[..512].to_vec();
    out[0x154..0x158].copy_from_slice(&512u32.to_le_bytes());
    out[0x158..0x15c].copy_from_slice(&u32::try_from(begin).unwrap().to_le_bytes());
    out.extend_from_slice(&all[entries]);
    out.resize(usize::try_from(begin).unwrap(), 0);
    out.extend(all.drain(blocks_from..));
    Bytes::of(&out)
}

#[test]
fn powercut_while_a_vdi_is_resized() {
    for kind in [Kind::Vdi, Kind::DiffDiscard] {
        resizes(kind, &[0, 4096, 1 << 20], as_it_is);
        resizes(kind, &[0, 512 << 10, 3 << 20], without_gaps);
    }
}

#[test]
fn powercut_while_a_raw_disk_is_resized() {
    resizes(Kind::Raw, &[0, 512, 1 << 20], as_it_is);
}

#[test]
fn powercut_while_a_vhd_is_resized() {
    for kind in [Kind::Vhd, Kind::VhdDiff] {
        resizes(kind, &[0, 512, 3 << 20], as_it_is);
    }
}

#[test]
fn powercut_while_a_parallels_image_is_resized() {
    for kind in [Kind::Parallels, Kind::ParallelsDiff] {
        resizes(kind, &[0, 512, 5 << 20], as_it_is);
    }
}

#[test]
fn powercut_while_a_vmdk_is_enlarged() {
    for kind in [Kind::Vmdk, Kind::VmdkDiff] {
        resizes(kind, &[512, 200 << 10, 3 << 20], as_it_is);
    }
}

#[test]
fn powercut_while_a_qcow2_is_enlarged() {
    for kind in [Kind::Qcow2, Kind::Qcow2Diff] {
        resizes(kind, &[512, 200 << 10, 1 << 20], as_it_is);
    }
}
