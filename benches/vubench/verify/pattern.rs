//! Content of a sector: it says where it belongs and which write put it there, and all the rest of
//! it follows from that, so that one look tells right, old, torn and foreign data apart.
use crate::rng::mix;

pub(super) const SECTOR: usize = 512;
const MAGIC: u64 = 0x3142_5542_4b4c_4256;
const WORDS: usize = SECTOR / 8;

#[derive(PartialEq, Debug, Clone, Copy)]
pub(super) enum Content {
    Zero,
    /// by the write of this generation
    Written(u64),
    Bad,
}

impl Content {
    pub(super) fn of_generation(g: u64) -> Content {
        if g == 0 { Content::Zero } else { Content::Written(g) }
    }
}

fn word(seed: u64, off: u64, generation: u64, i: usize) -> u64 {
    match i {
        0 => MAGIC,
        1 => off,
        2 => generation,
        3 => seed,
        _ => mix(seed
            ^ off.rotate_left(17)
            ^ generation.wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ (i as u64) << 56),
    }
}

/// Fills `b`, which lies at `off` on the disk, as the write of `generation` (not 0).
pub(super) fn fill(b: &mut [u8], seed: u64, off: u64, generation: u64) {
    for (k, s) in b.chunks_mut(SECTOR).enumerate() {
        let o = off + (SECTOR * k) as u64;
        for (i, w) in s.chunks_mut(8).enumerate() {
            w.copy_from_slice(&word(seed, o, generation, i).to_le_bytes());
        }
    }
}

/// The words of a sector.
pub(super) fn words(s: &[u8]) -> impl Iterator<Item = u64> + '_ {
    s.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().expect("8 bytes")))
}

pub(super) fn judge(s: &[u8], seed: u64, off: u64) -> Content {
    if s.iter().all(|b| *b == 0) {
        return Content::Zero;
    }
    let generation = words(s).nth(2).unwrap_or(0);
    let mut pairs = words(s).zip((0..WORDS).map(|i| word(seed, off, generation, i)));
    if generation != 0 && pairs.all(|(is, should)| is == should) {
        Content::Written(generation)
    } else {
        Content::Bad
    }
}
