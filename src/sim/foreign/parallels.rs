//! Other programs that write to a Parallels image. QEMU puts a new block behind the last one that the table names, VirtualBox
//! at the end of the file, rounded up to a sector.

use super::super::bytes::Bytes;
use super::{Order, carry_out};

const FIRST_ENTRY: u64 = 64;

fn word(b: &Bytes, at: u64) -> u32 {
    let mut w = [0; 4];
    b.read(at, &mut w);
    u32::from_le_bytes(w)
}

pub(in super::super) fn block_bytes(b: &Bytes) -> u64 {
    u64::from(word(b, 28)) * 512
}

fn entries(b: &Bytes) -> u32 {
    word(b, 32)
}

/// The guest blocks without a place.
pub(in super::super) fn free_blocks(b: &Bytes) -> Vec<u32> {
    (0..entries(b)).filter(|i| word(b, FIRST_ENTRY + u64::from(*i) * 4) == 0).collect()
}

fn end_of_blocks(b: &Bytes) -> u64 {
    let used = (0..entries(b)).map(|i| word(b, FIRST_ENTRY + u64::from(i) * 4)).filter(|e| *e != 0).max();
    used.map_or(u64::from(word(b, 48)) * 512, |e| u64::from(e) * 512 + block_bytes(b))
}

/// Adds `block` with these bytes; `after` sees the file after each write.
pub(in super::super) fn append(
    b: &mut Bytes,
    block: u32,
    data: &[u8],
    order: Order,
    after: &mut dyn FnMut(&Bytes),
) -> bool {
    let place = match order {
        Order::DataFirst => end_of_blocks(b),
        Order::EntryFirst => b.len().next_multiple_of(512),
    };
    let entry = u32::try_from(place / 512).expect("a small file");
    let writes = [(place, data.to_vec()), (FIRST_ENTRY + u64::from(block) * 4, entry.to_le_bytes().to_vec())];
    let end = place + block_bytes(b);
    carry_out(b, &writes, end, order, after);
    true
}
