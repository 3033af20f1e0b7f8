//! Other programs that write to an image of ours: a model of how QEMU and VirtualBox add a block to a VDI. Both
//! believe the header's count: the new block goes to the place of that number, the count becomes one more.

mod levels;
mod parallels;
mod qcow2;
pub(super) mod vhd;
pub(super) mod vhdx;
pub(super) mod vmdk;

use super::bytes::Bytes;
use super::{Rng, SimFile};
use crate::format::Format;

const TABLE_AT: u64 = 0x154;
const DATA_AT: u64 = 0x158;
const BLOCK_BYTES: u64 = 0x178;
const BLOCKS: u64 = 0x180;
const ALLOCATED: u64 = 0x184;
/// Entries from this one on name no place.
const NO_PLACE: u32 = 0xffff_fffe;

/// In which order the data, the count and the entry are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Data, count, entry: QEMU 10 writes the header and the table behind the data.
    DataFirst,
    /// Entry, count, data: VirtualBox leaves the order to whoever finishes first.
    EntryFirst,
}

/// How other programs add blocks to images of one format.
#[derive(Clone, Copy, Debug)]
pub(super) struct Program {
    /// The guest blocks without a place.
    pub(super) free_blocks: fn(&Bytes) -> Vec<u32>,
    /// Bytes of a block.
    pub(super) block_bytes: fn(&Bytes) -> u64,
    pub(super) append: Append,
}

/// Adds a block with these bytes; the last argument sees the file after each write. False: it refuses the image.
type Append = fn(&mut Bytes, u32, &[u8], Order, &mut dyn FnMut(&Bytes)) -> bool;

/// Those that write this format.
pub(super) fn program(format: Format) -> Option<Program> {
    match format {
        Format::Vdi => Some(Program { free_blocks, block_bytes, append }),
        Format::Vhd => Some(Program {
            free_blocks: vhd::free_blocks,
            block_bytes: vhd::block_bytes,
            append: vhd::append,
        }),
        Format::Vhdx => Some(Program {
            free_blocks: vhdx::free_blocks,
            block_bytes: vhdx::block_bytes,
            append: vhdx::append,
        }),
        Format::Vmdk => Some(Program {
            free_blocks: vmdk::free_blocks,
            block_bytes: vmdk::block_bytes,
            append: vmdk::append,
        }),
        Format::Parallels => Some(Program {
            free_blocks: parallels::free_blocks,
            block_bytes: parallels::block_bytes,
            append: parallels::append,
        }),
        Format::Qcow2 => Some(Program {
            free_blocks: qcow2::free_blocks,
            block_bytes: qcow2::block_bytes,
            append: qcow2::append,
        }),
        Format::Qed | Format::Qcow => Some(Program {
            free_blocks: levels::free_blocks,
            block_bytes: levels::block_bytes,
            append: levels::append,
        }),
        _ => None,
    }
}

fn word(b: &Bytes, at: u64) -> u32 {
    let mut w = [0; 4];
    b.read(at, &mut w);
    u32::from_le_bytes(w)
}

/// The guest blocks without a place.
fn free_blocks(b: &Bytes) -> Vec<u32> {
    let table = u64::from(word(b, TABLE_AT));
    (0..word(b, BLOCKS)).filter(|i| word(b, table + u64::from(*i) * 4) >= NO_PLACE).collect()
}

/// Bytes of a block.
fn block_bytes(b: &Bytes) -> u64 {
    u64::from(word(b, BLOCK_BYTES))
}

/// Takes some blocks away, without a sync: their places become holes, or leaks at the end. Returns the blocks.
pub fn take_away(file: &SimFile, rng: &mut Rng) -> Vec<u32> {
    let b = file.bytes();
    let table = u64::from(word(&b, TABLE_AT));
    let used = (0..word(&b, BLOCKS)).filter(|i| word(&b, table + u64::from(*i) * 4) < NO_PLACE);
    let gone: Vec<_> = used.filter(|_| rng.chance(30)).collect();
    for i in &gone {
        file.change(SimFile::write_of(table + u64::from(*i) * 4, vec![0xff; 4]));
    }
    gone
}

/// Adds `block` with these bytes; `after` sees the file after each write, as long as the
/// place makes it. False: by the count the image is full.
fn append(b: &mut Bytes, block: u32, data: &[u8], order: Order, after: &mut dyn FnMut(&Bytes)) -> bool {
    let (table, at) = (u64::from(word(b, TABLE_AT)), u64::from(word(b, DATA_AT)));
    let count = word(b, ALLOCATED);
    if count >= word(b, BLOCKS) {
        return false;
    }
    let place = at + u64::from(count) * block_bytes(b);
    let writes = [
        (place, data.to_vec()),
        (ALLOCATED, (count + 1).to_le_bytes().to_vec()),
        (table + u64::from(block) * 4, count.to_le_bytes().to_vec()),
    ];
    let end = place + block_bytes(b);
    carry_out(b, &writes, end, order, after);
    true
}

/// Carries out the writes, in this order or from the last to the first; `after` sees the file after each, as long as `end` makes
/// it.
fn carry_out(
    b: &mut Bytes,
    writes: &[(u64, Vec<u8>)],
    end: u64,
    order: Order,
    after: &mut dyn FnMut(&Bytes),
) {
    let mut writes: Vec<_> = writes.iter().collect();
    if order == Order::EntryFirst {
        writes.reverse();
    }
    for (off, bytes) in writes {
        b.write(*off, bytes);
        let mut whole = b.clone();
        whole.set_len(b.len().max(end));
        after(&whole);
    }
}
