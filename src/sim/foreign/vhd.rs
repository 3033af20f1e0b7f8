//! Other programs that write to a VHD. QEMU puts a new block behind the last one that the table names, VirtualBox where
//! the footer stands at the end of the file; both put the footer behind it. Hyper-V leaves blocks in which only some
//! sectors are there.

use super::super::Rng;
use super::super::bytes::Bytes;
use super::super::past::{Past, fill};
use super::Order;

const HEADER: u64 = 512;
const FREE: u32 = u32::MAX;

fn word(b: &Bytes, at: u64) -> u32 {
    let mut w = [0; 4];
    b.read(at, &mut w);
    u32::from_be_bytes(w)
}

fn table_at(b: &Bytes) -> u64 {
    u64::from(word(b, HEADER + 20))
}

fn entries(b: &Bytes) -> u32 {
    word(b, HEADER + 28)
}

fn entry_at(b: &Bytes, block: u32) -> u64 {
    table_at(b) + u64::from(block) * 4
}

pub(in super::super) fn block_bytes(b: &Bytes) -> u64 {
    u64::from(word(b, HEADER + 32))
}

fn bitmap_bytes(b: &Bytes) -> u64 {
    (block_bytes(b) / 4096).next_multiple_of(512)
}

pub(in super::super) fn free_blocks(b: &Bytes) -> Vec<u32> {
    (0..entries(b)).filter(|i| word(b, entry_at(b, *i)) == FREE).collect()
}

/// Behind the last block that the table names.
fn end_of_blocks(b: &Bytes) -> u64 {
    let used = (0..entries(b)).map(|i| word(b, entry_at(b, i))).filter(|e| *e != FREE).max();
    let stride = bitmap_bytes(b) + block_bytes(b);
    let table_end = (table_at(b) + u64::from(entries(b)) * 4).next_multiple_of(512);
    used.map_or(table_end, |e| u64::from(e) * 512 + stride)
}

/// Where the footer stands at the end of the file.
fn footer_at(b: &Bytes) -> Option<u64> {
    let at = b.len().checked_sub(512)?;
    let (mut end, mut copy) = (vec![0; 512], vec![0; 512]);
    b.read(at, &mut end);
    b.read(0, &mut copy);
    (end == copy).then_some(at)
}

/// Adds `block` with these bytes; `after` sees the file after each write. Data first: as QEMU does it; entry first: as
/// VirtualBox may, which opens no image for writing whose footer is missing. False then.
pub(in super::super) fn append(
    b: &mut Bytes,
    block: u32,
    data: &[u8],
    order: Order,
    after: &mut dyn FnMut(&Bytes),
) -> bool {
    let place = match order {
        Order::DataFirst => end_of_blocks(b),
        Order::EntryFirst => match footer_at(b) {
            Some(at) => at,
            None => return false,
        },
    };
    let mut footer = vec![0; 512];
    b.read(0, &mut footer);
    let entry = u32::try_from(place / 512).expect("a small file");
    let bitmap = bitmap_bytes(b);
    let writes = [
        (place, vec![0xff; usize::try_from(bitmap).expect("small")]),
        (place + bitmap, data.to_vec()),
        (place + bitmap + block_bytes(b), footer),
        (entry_at(b, block), entry.to_be_bytes().to_vec()),
    ];
    let order = if order == Order::DataFirst { [0, 1, 2, 3] } else { [3, 2, 1, 0] };
    let whole = b.len().max(place + bitmap + block_bytes(b) + 512);
    for i in order {
        let (off, bytes) = &writes[i];
        b.write(*off, bytes);
        let mut seen = b.clone();
        seen.set_len(whole);
        after(&seen);
    }
    true
}

/// Blocks in which some sectors are there and others are not, as Hyper-V leaves them; under those that are not lies what
/// nobody wrote.
pub(in super::super) fn add_parts(b: &mut Bytes, past: &mut [Past], rng: &mut Rng) {
    let (stride, bitmap, sectors) = (bitmap_bytes(b) + block_bytes(b), bitmap_bytes(b), block_bytes(b) / 512);
    let mut footer = vec![0; 512];
    b.read(0, &mut footer);
    for block in free_blocks(b) {
        if !rng.chance(40) {
            continue;
        }
        let place = end_of_blocks(b);
        let mut bits = vec![0u8; usize::try_from(bitmap).expect("small")];
        let mut data = vec![0xd1; usize::try_from(block_bytes(b)).expect("small")];
        let first = u64::from(block) * sectors;
        for i in 0..sectors {
            let Some(p) = past.get_mut(usize::try_from(first + i).expect("small")) else { break };
            if rng.chance(50) {
                let at = usize::try_from(i).expect("small");
                bits[at / 8] |= 0x80 >> (at % 8);
                let value = 1 + rng.below(1000);
                fill(&mut data[at * 512..(at + 1) * 512], first + i, value);
                *p = Past::known(value);
            }
        }
        b.write(place, &bits);
        b.write(place + bitmap, &data);
        b.write(place + stride, &footer);
        let entry = u32::try_from(place / 512).expect("a small file");
        b.write(entry_at(b, block), &entry.to_be_bytes());
    }
}
