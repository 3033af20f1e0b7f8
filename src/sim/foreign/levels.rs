//! Other programs that write to a QED or a QCOW of the first version: both QEMU and VirtualBox put what is new at the end of the
//! file, at a whole cluster. QEMU writes the entry's sector behind the data; VirtualBox the whole table each time, and in no
//! order.

use super::super::bytes::Bytes;
use super::{Order, carry_out};

/// What the header says, in bytes.
#[derive(Clone, Copy)]
struct Layout {
    is_qed: bool,
    cluster: u64,
    table: u64,
    l1_at: u64,
    disk: u64,
}

impl Layout {
    fn of(b: &Bytes) -> Layout {
        let mut h = [0; 64];
        b.read(0, &mut h);
        let le = |at: usize| u64::from_le_bytes(h[at..at + 8].try_into().expect("8 bytes"));
        let be = |at: usize| u64::from_be_bytes(h[at..at + 8].try_into().expect("8 bytes"));
        if h.starts_with(b"QED") {
            let cluster = le(4) & 0xffff_ffff;
            let table = (le(8) & 0xffff_ffff) * cluster;
            Layout { is_qed: true, cluster, table, l1_at: le(40), disk: le(48) }
        } else {
            let (cluster, table) = (1 << h[32], 8 << h[33]);
            Layout { is_qed: false, cluster, table, l1_at: be(40), disk: be(24) }
        }
    }

    fn get(self, b: &Bytes, at: u64) -> u64 {
        let mut raw = [0; 8];
        b.read(at, &mut raw);
        if self.is_qed { u64::from_le_bytes(raw) } else { u64::from_be_bytes(raw) }
    }

    fn bytes(self, value: u64) -> [u8; 8] {
        if self.is_qed { value.to_le_bytes() } else { value.to_be_bytes() }
    }

    /// Where the entry of the first level is around a block, and the number of the block's own in its table.
    fn place(self, block: u32) -> (u64, u64) {
        let (l1, l2) = (u64::from(block) / (self.table / 8), u64::from(block) % (self.table / 8));
        (self.l1_at + l1 * 8, l2 * 8)
    }
}

/// Bytes of a block.
pub(in super::super) fn block_bytes(b: &Bytes) -> u64 {
    Layout::of(b).cluster
}

/// The guest blocks without a place; those of zeros are among them.
pub(in super::super) fn free_blocks(b: &Bytes) -> Vec<u32> {
    let l = Layout::of(b);
    let blocks = u32::try_from(l.disk.div_ceil(l.cluster)).expect("a small disk");
    let is_free = |block: &u32| {
        let (l1, into) = l.place(*block);
        let table = l.get(b, l1);
        table == 0 || l.get(b, table + into) < 2
    };
    (0..blocks).filter(is_free).collect()
}

/// Adds `block` with these bytes; `after` sees the file after each write.
pub(in super::super) fn append(
    b: &mut Bytes,
    block: u32,
    data: &[u8],
    order: Order,
    after: &mut dyn FnMut(&Bytes),
) -> bool {
    let l = Layout::of(b);
    let (l1, into) = l.place(block);
    let mut end = b.len().next_multiple_of(l.cluster);
    let mut table = l.get(b, l1);
    if table == 0 {
        // It is there before anything names it.
        table = end;
        end = (end + l.table).next_multiple_of(l.cluster);
        b.write(table, &vec![0; usize::try_from(l.table).expect("a small table")]);
        b.set_len(end);
        after(b);
        b.write(l1, &l.bytes(table));
        after(b);
    }
    let place = end;
    let (from, len) = match order {
        Order::DataFirst => (into / 512 * 512, 512.min(l.table)),
        Order::EntryFirst => (0, l.table),
    };
    let mut entries = vec![0; usize::try_from(len).expect("a small table")];
    b.read(table + from, &mut entries);
    let at = usize::try_from(into - from).expect("a small table");
    entries[at..at + 8].copy_from_slice(&l.bytes(place));
    carry_out(b, &[(place, data.to_vec()), (table + from, entries)], place + l.cluster, order, after);
    true
}
