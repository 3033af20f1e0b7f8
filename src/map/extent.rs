//! Where a guest range is.

use super::{FileId, GuestRange, HostOffset};
use crate::limits::MAX_EXTENTS;

/// How a packed unit was packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Raw deflate (RFC 1951), without a header.
    Deflate,
    /// Deflate with zlib's header and checksum (RFC 1950).
    Zlib,
    /// The same, of a unit that may be filled up behind what is wanted of it.
    ZlibPadded,
    /// Zstandard frames (RFC 8878).
    Zstd,
    /// Apple Data Compression.
    Adc,
    /// A bzip2 stream.
    Bzip2,
    /// Apple's LZFSE, LZVN blocks included.
    Lzfse,
    /// LZMA2 in an xz stream.
    Xz,
}

/// A unit of the disk that lies packed in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packed {
    /// Where the packed bytes begin.
    pub off: HostOffset,
    /// Packed bytes, at most [`crate::limits::MAX_PACKED_BYTES`]. There may be more than the codec needs.
    pub len: u32,
    /// Bytes when unpacked, at most [`crate::limits::MAX_UNIT_BYTES`].
    pub unit: u32,
    /// The file.
    pub file: FileId,
    /// How it is packed.
    pub codec: Codec,
}

/// What one piece of a guest range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes in a file.
    Data {
        /// The file.
        file: FileId,
        /// Where the piece begins in it.
        off: HostOffset,
    },
    /// Bytes of a packed unit, from `into` on (of the unpacked ones). Read only: writing to it is a change.
    Packed {
        /// The unit.
        packed: Packed,
        /// Where the piece begins in it.
        into: u32,
    },
    /// Reads as zeros, and hides what a parent holds.
    Zero,
    /// This image says nothing: ask the parent; without one it reads as zeros.
    Parent,
}

/// A piece of a guest range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; never 0.
    pub len: u64,
    /// What they are.
    pub kind: ExtentKind,
}

/// The extents of a range from its start on. A look-up may stop early when the list is full:
/// what it covers is a prefix of the range, and the caller asks again for the rest.
#[derive(Debug, Default)]
pub struct ExtentList {
    list: Vec<Extent>,
    covered: u64,
}

impl ExtentList {
    /// An empty list with all the room it will need.
    pub fn new() -> Self {
        ExtentList { list: Vec::with_capacity(MAX_EXTENTS), covered: 0 }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.list.clear();
        self.covered = 0;
    }

    /// Appends an extent, joined to the last where both continue each other. False if the list is full.
    pub fn push(&mut self, e: Extent) -> bool {
        debug_assert!(e.len > 0, "empty extent");
        let is_full = self.is_full();
        match self.list.last_mut() {
            Some(last) if continues(last, &e) => last.len += e.len,
            _ if is_full => return false,
            _ => self.list.push(e),
        }
        self.covered += e.len;
        true
    }

    /// Appends what `look` finds at the start of each rest of `r`, as far as it finds something and the list has room.
    ///
    /// # Errors
    /// What `look` lacks for the first byte. If it lacks something further on, what was found so far is an answer.
    #[inline]
    pub fn fill<E>(
        &mut self,
        r: GuestRange,
        mut look: impl FnMut(GuestRange) -> Result<Extent, E>,
    ) -> Result<(), E> {
        let mut rest = r;
        while !rest.is_empty() {
            match look(rest) {
                Err(miss) if rest.len() == r.len() => return Err(miss),
                Err(_) => return Ok(()),
                Ok(e) if !self.push(e) => return Ok(()),
                Ok(e) => rest = rest.skip(e.len),
            }
        }
        Ok(())
    }

    /// Bytes the extents cover.
    pub fn covered(&self) -> u64 {
        self.covered
    }

    /// True if no extent is in the list.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// True if no further, separate extent fits.
    pub fn is_full(&self) -> bool {
        self.list.len() == MAX_EXTENTS
    }

    /// The extents, in guest order.
    pub fn as_slice(&self) -> &[Extent] {
        &self.list
    }

    /// True if every byte covered reads as zero without a look at a file. Without a parent
    /// beneath, `Parent` counts as zero as well.
    pub fn all_zero(&self) -> bool {
        self.list.iter().all(|e| matches!(e.kind, ExtentKind::Zero))
    }
}

fn continues(a: &Extent, b: &Extent) -> bool {
    match (a.kind, b.kind) {
        (ExtentKind::Zero, ExtentKind::Zero) | (ExtentKind::Parent, ExtentKind::Parent) => true,
        (ExtentKind::Data { file: f, off: o }, ExtentKind::Data { file, off }) => {
            f == file && o.checked_add(a.len) == Some(off)
        }
        (ExtentKind::Packed { packed: p, into: i }, ExtentKind::Packed { packed, into }) => {
            p == packed && u64::from(i).checked_add(a.len) == Some(u64::from(into))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(off: u64, len: u64) -> Extent {
        Extent { len, kind: ExtentKind::Data { file: FileId(0), off: HostOffset(off) } }
    }

    #[test]
    fn neighbours_join_and_the_list_is_bounded() {
        let mut l = ExtentList::new();
        assert!(l.push(data(0, 10)) && l.push(data(10, 10)));
        assert_eq!(l.as_slice(), [data(0, 20)]);
        for i in 0..MAX_EXTENTS as u64 * 2 {
            let fits = l.push(data(1000 + 100 * i, 1));
            assert_eq!(fits, (i as usize) < MAX_EXTENTS - 1);
        }
        assert_eq!(l.covered(), 20 + MAX_EXTENTS as u64 - 1);
    }
}
