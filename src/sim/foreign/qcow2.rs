//! QEMU writing to a QCOW2: a new cluster goes to the first one whose refcount is 0, which is believed. A second-level table that is
//! not there, or that a snapshot shares, is made the same way. Refcounts are written before what they count is named.
//!
//! Refcount blocks that would be needed behind the last one are not made: the program refuses then.

use super::super::bytes::Bytes;
use super::{Order, carry_out};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

fn word(b: &Bytes, at: u64) -> u64 {
    let mut w = [0; 8];
    b.read(at, &mut w);
    u64::from_be_bytes(w)
}

fn half(b: &Bytes, at: u64) -> u64 {
    word(b, at) >> 32
}

/// Bytes of a block.
pub(in super::super) fn block_bytes(b: &Bytes) -> u64 {
    1 << half(b, 20)
}

fn is_extended(b: &Bytes) -> bool {
    word(b, 72) & 1 << 4 != 0
}

fn entry_bytes(b: &Bytes) -> u64 {
    if is_extended(b) { 16 } else { 8 }
}

/// Where the entry of the first level is that a block belongs to, and where in its table the block's own.
fn places(b: &Bytes, block: u32) -> (u64, u64) {
    let per_table = block_bytes(b) / entry_bytes(b);
    let (table, entry) = (u64::from(block) / per_table, u64::from(block) % per_table);
    (word(b, 40) + table * 8, entry * entry_bytes(b))
}

/// The guest blocks of which nothing is there.
pub(in super::super) fn free_blocks(b: &Bytes) -> Vec<u32> {
    let blocks = u32::try_from(word(b, 24).div_ceil(block_bytes(b))).expect("a small disk");
    let is_free = |block: &u32| {
        let (l1, entry) = places(b, *block);
        let table = word(b, l1) & OFFSET;
        table == 0 || (word(b, table + entry) == 0 && (!is_extended(b) || word(b, table + entry + 8) == 0))
    };
    (0..blocks).filter(is_free).collect()
}

/// Where the refcount of a cluster is, of whole bytes, and how many; `None` without a block for it.
fn refcount(b: &Bytes, cluster: u64) -> Option<(u64, u64)> {
    let width = 1 << (half(b, 96) - 3);
    let per_block = block_bytes(b) / width;
    let entry = cluster / per_block;
    if entry >= half(b, 56) * block_bytes(b) / 8 {
        return None;
    }
    let block = word(b, word(b, 48) + entry * 8) & OFFSET;
    (block != 0).then_some((block + cluster % per_block * width, width))
}

/// Bytes to be written, and where.
type Write = (u64, Vec<u8>);

/// The first clusters that nothing is said to use, each with the write that says that something does.
fn take(b: &Bytes, count: usize) -> Option<Vec<(u64, Write)>> {
    let mut taken = Vec::new();
    for cluster in 0.. {
        if taken.len() == count {
            break;
        }
        let (at, width) = refcount(b, cluster)?;
        let width = usize::try_from(width).expect("8 at most");
        let mut now = vec![0; width];
        b.read(at, &mut now);
        if now.iter().all(|n| *n == 0) {
            now[width - 1] = 1;
            taken.push((cluster * block_bytes(b), (at, now)));
        }
    }
    Some(taken)
}

/// Adds `block` with these bytes; `after` sees the file after each write. Refcounts come first and the first level last, as QEMU
/// orders its caches; whether the entry or the data is on the disk before the other is left to a crash.
pub(in super::super) fn append(
    b: &mut Bytes,
    block: u32,
    data: &[u8],
    order: Order,
    after: &mut dyn FnMut(&Bytes),
) -> bool {
    let (l1, into) = places(b, block);
    let (old, bytes) = (word(b, l1), block_bytes(b));
    let own = old & COPIED != 0;
    let Some(taken) = take(b, if own { 1 } else { 2 }) else { return false };
    let at = taken[0].0;
    let mut entry = (at | COPIED).to_be_bytes().to_vec();
    if is_extended(b) {
        entry.extend(u64::from(u32::MAX).to_be_bytes());
    }
    let mut naming = Vec::new();
    if own {
        naming.push(((old & OFFSET) + into, entry));
    } else {
        let place = taken[1].0;
        let mut table = vec![0; usize::try_from(bytes).expect("a small block")];
        if old != 0 {
            b.read(old & OFFSET, &mut table);
        }
        let from = usize::try_from(into).expect("a small block");
        table[from..from + entry.len()].copy_from_slice(&entry);
        naming.extend([(place, table), (l1, (place | COPIED).to_be_bytes().to_vec())]);
    }
    let data = (at, data.to_vec());
    let place = naming.len() * usize::from(order == Order::EntryFirst);
    naming.insert(place, data);
    let writes: Vec<_> = taken.iter().map(|(_, counted)| counted.clone()).chain(naming).collect();
    let end = taken.iter().map(|(at, _)| at + bytes).max().unwrap_or(0);
    carry_out(b, &writes, end, Order::DataFirst, after);
    true
}
