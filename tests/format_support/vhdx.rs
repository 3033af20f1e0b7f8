//! VHDX files made by hand, after the specification and not by the product: differencing images, logs, 4 KiB sectors.

use uuid::{Uuid, uuid};

pub(crate) const MIB: usize = 1 << 20;
const LOG_AT: usize = MIB;
const METADATA_AT: usize = 2 * MIB;
const TABLE_AT: usize = 3 * MIB;
/// Where the first block may be.
pub(crate) const BLOCKS_AT: usize = 4 * MIB;
const LOG_ID: Uuid = uuid!("01020304-0506-0708-090a-0b0c0d0e0f10");
const BLOCK_TABLE: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");
const ITEMS: [Uuid; 6] = [
    uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b"),
    uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8"),
    uuid!("beca12ab-b2e6-4523-93ef-c309e000c746"),
    uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f"),
    uuid!("cda348c7-445d-4471-9cc9-e9885251c556"),
    uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c"),
];

/// What an image is like.
#[derive(Clone)]
pub(crate) struct Spec {
    pub(crate) size: u64,
    pub(crate) block: u32,
    pub(crate) sector: u32,
    pub(crate) data_write: Uuid,
    /// The parent's GUID and its relative name.
    pub(crate) parent: Option<(Uuid, &'static str)>,
    /// A region, and an item of the metadata, that nobody knows; and whether they have to be known.
    pub(crate) strange: Option<(bool, bool)>,
    /// The table: entries by their place in it.
    pub(crate) table: Vec<(usize, u64)>,
    /// Length of the file in MiB.
    pub(crate) mib: usize,
}

impl Default for Spec {
    fn default() -> Self {
        Spec {
            size: 4 << 20,
            block: 1 << 20,
            sector: 512,
            data_write: Uuid::from_u128(0xda7a),
            parent: None,
            strange: None,
            table: Vec::new(),
            mib: 8,
        }
    }
}

/// The checksum bit by bit, with the four bytes at 4 as zeros.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for (i, b) in bytes.iter().enumerate() {
        crc ^= u32::from(if (4..8).contains(&i) { 0 } else { *b });
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

fn put(f: &mut [u8], at: usize, bytes: &[u8]) {
    f[at..at + bytes.len()].copy_from_slice(bytes);
}

fn seal(f: &mut [u8], at: usize, len: usize) {
    let sum = crc32c(&f[at..at + len]);
    put(f, at + 4, &sum.to_le_bytes());
}

impl Spec {
    pub(crate) fn build(&self) -> Vec<u8> {
        let mut f = vec![0; self.mib * MIB];
        put(&mut f, 0, b"vhdxfile");
        for (at, sequence) in [(64 << 10, 6u64), (128 << 10, 7)] {
            put(&mut f, at, b"head");
            put(&mut f, at + 8, &sequence.to_le_bytes());
            put(&mut f, at + 16, &Uuid::from_u128(0xf11e).to_bytes_le());
            put(&mut f, at + 32, &self.data_write.to_bytes_le());
            put(&mut f, at + 66, &1u16.to_le_bytes());
            put(&mut f, at + 68, &(MIB as u32).to_le_bytes());
            put(&mut f, at + 72, &(LOG_AT as u64).to_le_bytes());
            seal(&mut f, at, 4096);
        }
        for at in [192 << 10, 256 << 10] {
            self.put_regions(&mut f, at);
        }
        self.put_metadata(&mut f);
        for (index, entry) in &self.table {
            put(&mut f, TABLE_AT + index * 8, &entry.to_le_bytes());
        }
        f
    }

    fn put_regions(&self, f: &mut [u8], at: usize) {
        let mut regions = vec![(BLOCK_TABLE, TABLE_AT, 1u32), (METADATA, METADATA_AT, 1)];
        if let Some((required, _)) = self.strange {
            regions.push((Uuid::from_u128(0x57a6), (self.mib - 1) * MIB, required.into()));
        }
        put(f, at, b"regi");
        put(f, at + 8, &(regions.len() as u32).to_le_bytes());
        for (i, (id, begin, required)) in regions.into_iter().enumerate() {
            let e = at + 16 + i * 32;
            put(f, e, &id.to_bytes_le());
            put(f, e + 16, &(begin as u64).to_le_bytes());
            put(f, e + 24, &(MIB as u32).to_le_bytes());
            put(f, e + 28, &required.to_le_bytes());
        }
        seal(f, at, 64 << 10);
    }

    fn put_metadata(&self, f: &mut [u8]) {
        let flags: u32 = if self.parent.is_some() { 2 } else { 0 };
        let mut values = vec![
            (ITEMS[0], [self.block.to_le_bytes(), flags.to_le_bytes()].concat(), 4u32),
            (ITEMS[1], self.size.to_le_bytes().to_vec(), 6),
            (ITEMS[2], vec![9; 16], 6),
            (ITEMS[3], self.sector.to_le_bytes().to_vec(), 6),
            (ITEMS[4], 4096u32.to_le_bytes().to_vec(), 6),
        ];
        if let Some((id, name)) = self.parent {
            values.push((ITEMS[5], locator(id, name), 4));
        }
        if let Some((_, required)) = self.strange {
            values.push((Uuid::from_u128(0x17e3), vec![1; 4], if required { 4 } else { 0 }));
        }
        put(f, METADATA_AT, b"metadata");
        put(f, METADATA_AT + 10, &(values.len() as u16).to_le_bytes());
        let mut at = 64 << 10;
        for (i, (id, value, flags)) in values.into_iter().enumerate() {
            let e = METADATA_AT + 32 + i * 32;
            put(f, e, &id.to_bytes_le());
            put(f, e + 16, &(at as u32).to_le_bytes());
            put(f, e + 20, &(value.len() as u32).to_le_bytes());
            put(f, e + 24, &flags.to_le_bytes());
            put(f, METADATA_AT + at, &value);
            at += value.len().next_multiple_of(8);
        }
    }
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn locator(id: Uuid, name: &str) -> Vec<u8> {
    let texts = [("parent_linkage", format!("{{{id}}}")), ("relative_path", name.to_string())];
    let mut raw = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913").to_bytes_le().to_vec();
    raw.extend([0, 0, 2, 0]);
    let (mut entries, mut pool) = (Vec::new(), Vec::new());
    for (key, value) in texts {
        let (key, value) = (utf16(key), utf16(&value));
        let at = 20 + 2 * 12 + pool.len();
        entries.extend((at as u32).to_le_bytes());
        entries.extend(((at + key.len()) as u32).to_le_bytes());
        entries.extend((key.len() as u16).to_le_bytes());
        entries.extend((value.len() as u16).to_le_bytes());
        pool.extend([key, value].concat());
    }
    [raw, entries, pool].concat()
}

/// An entry of the log.
pub(crate) struct Logged<'a> {
    pub(crate) sequence: u64,
    /// Where the run begins that it is the last of.
    pub(crate) tail: usize,
    pub(crate) file_bytes: u64,
    /// Sectors of 4 KiB and where they go.
    pub(crate) sectors: &'a [(u64, Vec<u8>)],
    /// Ranges of zeros.
    pub(crate) zeros: &'a [(u64, u64)],
}

/// Puts an entry into the log, at `at` of the ring. Where the next one goes.
pub(crate) fn log(f: &mut [u8], at: usize, e: &Logged<'_>) -> usize {
    let count = e.sectors.len() + e.zeros.len();
    let described = (64 + 32 * count).next_multiple_of(4096);
    let mut raw = vec![0; described + 4096 * e.sectors.len()];
    put(&mut raw, 0, b"loge");
    let len = raw.len();
    put(&mut raw, 8, &(len as u32).to_le_bytes());
    put(&mut raw, 12, &(e.tail as u32).to_le_bytes());
    put(&mut raw, 16, &e.sequence.to_le_bytes());
    put(&mut raw, 24, &(count as u32).to_le_bytes());
    put(&mut raw, 32, &LOG_ID.to_bytes_le());
    put(&mut raw, 48, &e.file_bytes.to_le_bytes());
    put(&mut raw, 56, &e.file_bytes.to_le_bytes());
    for (i, (to, bytes)) in e.sectors.iter().enumerate() {
        let d = 64 + 32 * i;
        put(&mut raw, d, b"desc");
        put(&mut raw, d + 4, &bytes[4092..]);
        put(&mut raw, d + 8, &bytes[..8]);
        put(&mut raw, d + 16, &to.to_le_bytes());
        put(&mut raw, d + 24, &e.sequence.to_le_bytes());
        let s = described + 4096 * i;
        put(&mut raw, s, bytes);
        put(&mut raw, s, b"data");
        put(&mut raw, s + 4, &((e.sequence >> 32) as u32).to_le_bytes());
        put(&mut raw, s + 4092, &(e.sequence as u32).to_le_bytes());
    }
    for (i, (to, n)) in e.zeros.iter().enumerate() {
        let d = 64 + 32 * (e.sectors.len() + i);
        put(&mut raw, d, b"zero");
        put(&mut raw, d + 8, &n.to_le_bytes());
        put(&mut raw, d + 16, &to.to_le_bytes());
        put(&mut raw, d + 24, &e.sequence.to_le_bytes());
    }
    seal(&mut raw, 0, len);
    for (i, b) in raw.iter().enumerate() {
        f[LOG_AT + (at + i) % MIB] = *b;
    }
    (at + len) % MIB
}

/// Makes the checksums of headers and of the first table of regions right.
pub(crate) fn reseal(f: &mut [u8]) {
    seal(f, 64 << 10, 4096);
    seal(f, 128 << 10, 4096);
    seal(f, 192 << 10, 64 << 10);
}

/// Says in both headers that the log counts.
pub(crate) fn use_log(f: &mut [u8]) {
    for at in [64 << 10, 128 << 10] {
        put(f, at + 48, &LOG_ID.to_bytes_le());
        seal(f, at, 4096);
    }
}

/// The sector of the table with its first entries, some of them others than `f` has.
pub(crate) fn table_sector(f: &[u8], changes: &[(usize, u64)]) -> (u64, Vec<u8>) {
    let mut bytes = f[TABLE_AT..TABLE_AT + 4096].to_vec();
    for (index, entry) in changes {
        put(&mut bytes, index * 8, &entry.to_le_bytes());
    }
    (TABLE_AT as u64, bytes)
}

/// The entry of a block in a state, at so many MiB.
pub(crate) fn entry(state: u64, mib: usize) -> u64 {
    (mib as u64) << 20 | state
}
