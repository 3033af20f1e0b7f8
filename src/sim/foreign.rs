//! Other programs that write to an image of ours: a model of how QEMU and VirtualBox add a block to a VDI or a VMDK. In a VDI both
//! believe the header's count: the new block goes to the place of that number, the count becomes one more. In a VMDK both
//! put it at the end of the file, at a whole grain.

use super::bytes::Bytes;
use super::{Rng, SimFile};

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

fn word(b: &Bytes, at: u64) -> u32 {
    let mut w = [0; 4];
    b.read(at, &mut w);
    u32::from_le_bytes(w)
}

/// Where a VMDK says how large grains are, and where the directories lie; in sectors.
const GRAIN: u64 = 20;
const CAPACITY: u64 = 12;
const COPY_AT: u64 = 48;
const MAIN_AT: u64 = 56;

fn is_vmdk(b: &Bytes) -> bool {
    word(b, 0) == u32::from_le_bytes(*b"KDMV")
}

/// Where the entry of a block is in a VMDK that has one table and its copy.
fn entry_of(b: &Bytes, directory: u64, block: u32) -> u64 {
    let table = u64::from(word(b, u64::from(word(b, directory)) * 512)) * 512;
    table + u64::from(block) * 4
}

/// The guest blocks without a place.
pub(super) fn free_blocks(b: &Bytes) -> Vec<u32> {
    if is_vmdk(b) {
        let grains = word(b, CAPACITY).div_ceil(word(b, GRAIN));
        return (0..grains).filter(|i| word(b, entry_of(b, MAIN_AT, *i)) < 2).collect();
    }
    let table = u64::from(word(b, TABLE_AT));
    (0..word(b, BLOCKS)).filter(|i| word(b, table + u64::from(*i) * 4) >= NO_PLACE).collect()
}

/// Bytes of a block.
pub(super) fn block_bytes(b: &Bytes) -> u64 {
    if is_vmdk(b) {
        return u64::from(word(b, GRAIN)) * 512;
    }
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
pub(super) fn append(
    b: &mut Bytes,
    block: u32,
    data: &[u8],
    order: Order,
    after: &mut dyn FnMut(&Bytes),
) -> bool {
    if is_vmdk(b) {
        let place = b.len().next_multiple_of(block_bytes(b));
        let sector = u32::try_from(place / 512).expect("a small file").to_le_bytes();
        let writes = [
            (place, data.to_vec()),
            (entry_of(b, MAIN_AT, block), sector.to_vec()),
            (entry_of(b, COPY_AT, block), sector.to_vec()),
        ];
        carry_out(b, &writes, place, order, after);
        return true;
    }
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
    carry_out(b, &writes, place, order, after);
    true
}

fn carry_out(
    b: &mut Bytes,
    writes: &[(u64, Vec<u8>); 3],
    place: u64,
    order: Order,
    after: &mut dyn FnMut(&Bytes),
) {
    let order = if order == Order::DataFirst { [0, 1, 2] } else { [2, 1, 0] };
    for i in order {
        let (off, bytes) = &writes[i];
        b.write(*off, bytes);
        let mut whole = b.clone();
        whole.set_len(b.len().max(place + block_bytes(b)));
        after(&whole);
    }
}
