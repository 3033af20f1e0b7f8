//! What a VDI's bytes mean, read without the code under test (docs/formats/vdi.md).

/// An entry without a place.
pub(crate) const FREE: u32 = u32::MAX;
/// A block of zeros.
pub(crate) const ZERO: u32 = u32::MAX - 1;

/// A VDI whose header makes sense.
#[derive(Clone, Debug)]
pub(crate) struct PlainVdi {
    pub(crate) disk: u64,
    pub(crate) block: u64,
    stride: u64,
    /// Where the data of place 0 begin.
    first: u64,
    pub(crate) entries: Vec<u32>,
}

/// Where a part of the disk comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Bytes of the file; what lies behind its end is missing.
    File(u64),
    Zero,
    Parent,
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
}

impl PlainVdi {
    /// Reads what vdblk has found to be in order: a table that lies in the file.
    pub(crate) fn read(b: &[u8]) -> Self {
        let old = u32_at(b, 0x44) >> 16 == 0;
        let at = |v0: usize, v1: usize| if old { v0 } else { v1 };
        let disk = u64_at(b, at(0x160, 0x170));
        let block = u64::from(u32_at(b, at(0x168, 0x178)));
        let extra = if old { 0 } else { u64::from(u32_at(b, 0x17c)) };
        let blocks = u32_at(b, at(0x16c, 0x180)) as usize;
        let table = if old { 420 } else { u32_at(b, 0x154) as usize };
        let data = if old { table + 4 * blocks } else { u32_at(b, 0x158) as usize };
        let entries = (0..blocks).map(|i| u32_at(b, table + 4 * i)).collect();
        PlainVdi { disk, block, stride: block + extra, first: data as u64 + extra, entries }
    }

    /// What the byte of the disk at `at` is. Behind the image's end is nothing.
    pub(crate) fn source(&self, at: u64) -> Source {
        if at >= self.disk {
            return Source::Zero;
        }
        match self.entries[usize::try_from(at / self.block).unwrap()] {
            FREE => Source::Parent,
            ZERO => Source::Zero,
            place => Source::File(self.first + u64::from(place) * self.stride + at % self.block),
        }
    }
}

/// An image below another: what it holds, and what lies below it.
pub(crate) struct PlainChain<'a> {
    /// Top first.
    pub(crate) images: Vec<(PlainVdi, &'a [u8])>,
}

impl PlainChain<'_> {
    /// The sector as a guest should see it. What the file has lost are zeros, and a place that is lost as a whole leaves
    /// the block free, as the repair has it.
    pub(crate) fn sector(&self, number: u64) -> [u8; 512] {
        let (at, mut out) = (number * 512, [0; 512]);
        for (image, bytes) in &self.images {
            match image.source(at) {
                Source::Zero => return out,
                Source::Parent => {}
                Source::File(off) => {
                    let block_start = off - at % image.block;
                    if block_start >= bytes.len() as u64 {
                        continue;
                    }
                    let there = bytes.get(usize::try_from(off).unwrap()..).unwrap_or(&[]);
                    let n = there.len().min(512);
                    out[..n].copy_from_slice(&there[..n]);
                    return out;
                }
            }
        }
        out
    }
}
