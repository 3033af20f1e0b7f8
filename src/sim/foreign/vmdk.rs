//! Other programs that write to a sparse VMDK: both QEMU and VirtualBox put a new grain at the end of the file, at a whole grain,
//! and name it in the table and its copy.

use super::super::Rng;
use super::super::bytes::Bytes;
use super::{Order, carry_out};

/// Where the header says how large grains are, and where the directories lie; in sectors.
const GRAIN: u64 = 20;
const CAPACITY: u64 = 12;
const COPY_AT: u64 = 48;
const MAIN_AT: u64 = 56;

fn word(b: &Bytes, at: u64) -> u32 {
    let mut w = [0; 4];
    b.read(at, &mut w);
    u32::from_le_bytes(w)
}

/// Where the entry of a block is, in an image that has one table and its copy.
fn entry_of(b: &Bytes, directory: u64, block: u32) -> u64 {
    let table = u64::from(word(b, u64::from(word(b, directory)) * 512)) * 512;
    table + u64::from(block) * 4
}

/// Takes the table of a new image away, or its copy, or both: some programs make them when they are needed.
pub(in super::super) fn take_tables(b: &mut Bytes, rng: &mut Rng) {
    let which = rng.below(3);
    for (at, _) in [(MAIN_AT, 0), (COPY_AT, 1)].into_iter().filter(|(_, n)| which != *n) {
        let directory = u64::from(word(b, at)) * 512;
        b.write(directory, &[0; 4]);
    }
}

/// The guest blocks without a place; none of an image that lacks a table: QEMU refuses to write to it there.
pub(in super::super) fn free_blocks(b: &Bytes) -> Vec<u32> {
    if [MAIN_AT, COPY_AT].iter().any(|at| word(b, u64::from(word(b, *at)) * 512) == 0) {
        return Vec::new();
    }
    let grains = word(b, CAPACITY).div_ceil(word(b, GRAIN));
    (0..grains).filter(|i| word(b, entry_of(b, MAIN_AT, *i)) < 2).collect()
}

/// Bytes of a block.
pub(in super::super) fn block_bytes(b: &Bytes) -> u64 {
    u64::from(word(b, GRAIN)) * 512
}

/// Adds `block` with these bytes; `after` sees the file after each write.
pub(in super::super) fn append(
    b: &mut Bytes,
    block: u32,
    data: &[u8],
    order: Order,
    after: &mut dyn FnMut(&Bytes),
) -> bool {
    let place = b.len().next_multiple_of(block_bytes(b));
    let sector = u32::try_from(place / 512).expect("a small file").to_le_bytes();
    let writes = [
        (place, data.to_vec()),
        (entry_of(b, MAIN_AT, block), sector.to_vec()),
        (entry_of(b, COPY_AT, block), sector.to_vec()),
    ];
    let end = place + block_bytes(b);
    carry_out(b, &writes, end, order, after);
    true
}
