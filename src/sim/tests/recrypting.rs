//! Changes of keys that are interrupted.

use crate::filter::{Cipher, Crypt, Secret};
use crate::sim::{Kind, Rng, Stack, interrupted_recrypt};
use std::sync::Arc;

const SEEDS: u64 = if cfg!(debug_assertions) { 10 } else { 60 };

fn key(cipher: Cipher, seed: u8) -> Arc<Crypt> {
    let bytes: Vec<u8> = (0..if cipher == Cipher::Xts128 { 32 } else { 64 })
        .map(|i: u8| i.wrapping_mul(5).wrapping_add(seed))
        .collect();
    Arc::new(Crypt::new(cipher, &Secret::copy_of(&bytes)).expect("a key"))
}

/// Encrypts, changes the key of, and decrypts chains of images of these kinds, the base first.
fn changes(kinds: &[Kind]) {
    let name = kinds.iter().map(|k| k.name()).collect::<Vec<_>>().join(" < ");
    let (old, new) = (key(Cipher::Xts128, 3), key(Cipher::Xts256, 9));
    let mut states = 0;
    for seed in 0..SEEDS {
        let mut rng = Rng(seed);
        let plain = Stack::new(kinds, &mut rng);
        let before = plain.view_behind(&Default::default()).expect("opens");
        let mut stack = plain;
        for (what, keys) in [
            ("encrypting", (None, Some(&old))),
            ("another key", (Some(&old), Some(&new))),
            ("decrypting", (Some(&new), None)),
        ] {
            let (after, looked_at) = interrupted_recrypt(&stack, keys, 3, &mut rng)
                .unwrap_or_else(|e| panic!("{name} seed {seed}, {what}: a change {e}"));
            (stack, states) = (after, states + looked_at);
        }
        assert!(stack.view_behind(&Default::default()).expect("opens") == before, "{name} seed {seed}");
    }
    println!("{name}: {states} states");
    assert!(states > SEEDS * 10, "{states}");
}

#[test]
fn powercut_while_keys_of_vdis_change() {
    changes(&[Kind::Vdi, Kind::DiffDiscard, Kind::DiffDiscard]);
}

#[test]
fn powercut_while_keys_of_raw_and_vmdk_change() {
    changes(&[Kind::Raw, Kind::VmdkDiff, Kind::VmdkZeroed]);
}

#[test]
fn powercut_while_keys_of_vhds_change() {
    changes(&[Kind::Vhd, Kind::VhdDiff]);
}

#[test]
fn powercut_while_keys_of_parallels_images_change() {
    changes(&[Kind::Parallels, Kind::ParallelsDiff]);
}

#[test]
fn powercut_while_keys_of_qcow2s_and_qeds_change() {
    changes(&[Kind::Qcow2, Kind::QedDiff, Kind::Qcow2Diff, Kind::QcowDiff]);
}
