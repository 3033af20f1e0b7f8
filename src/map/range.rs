//! Offsets that cannot be mixed up.

use std::fmt;

/// A byte offset on the virtual disk, as the guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A byte offset in a file of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

/// The number of a block of the virtual disk (of an image's own block size).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

/// A file of the container: the index under which every engine knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u16);

impl GuestOffset {
    /// The offset `bytes` further on; `None` past 2^64.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(GuestOffset)
    }

    /// Bytes from `earlier` to here.
    ///
    /// # Panics
    /// If `earlier` lies behind: ranges are ordered by their makers.
    pub fn since(self, earlier: GuestOffset) -> u64 {
        self.0.checked_sub(earlier.0).expect("offsets are ordered")
    }
}

impl HostOffset {
    /// The offset `bytes` further on; `None` past 2^63-1, the largest a file has.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).filter(|o| i64::try_from(*o).is_ok()).map(HostOffset)
    }

    /// The offset `bytes` further on, inside an extent that was checked when it was made.
    ///
    /// # Panics
    /// Past 2^63-1.
    #[must_use]
    pub fn plus(self, bytes: u64) -> Self {
        self.checked_add(bytes).expect("inside a checked extent")
    }
}

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest offset {}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file offset {}", self.0)
    }
}

/// A range of the virtual disk, in bytes. Its end never passes 2^64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct GuestRange {
    start: GuestOffset,
    len: u64,
}

impl GuestRange {
    /// No byte, at the start of the disk.
    pub const EMPTY: GuestRange = GuestRange { start: GuestOffset(0), len: 0 };

    /// `len` bytes from `start`; `None` where the end would pass 2^64.
    pub fn new(start: GuestOffset, len: u64) -> Option<Self> {
        start.0.checked_add(len).map(|_| GuestRange { start, len })
    }

    /// From `start` up to, not including, `end`.
    ///
    /// # Panics
    /// If `end` lies before `start`.
    pub fn between(start: GuestOffset, end: GuestOffset) -> Self {
        GuestRange { start, len: end.since(start) }
    }

    /// First byte.
    pub fn start(self) -> GuestOffset {
        self.start
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(self) -> u64 {
        self.len
    }

    /// True without any byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// First byte behind the range.
    pub fn end(self) -> GuestOffset {
        GuestOffset(self.start.0 + self.len)
    }

    /// The range without its first `bytes` bytes (or an empty one at its end).
    #[must_use]
    pub fn skip(self, bytes: u64) -> Self {
        let n = bytes.min(self.len);
        GuestRange { start: GuestOffset(self.start.0 + n), len: self.len - n }
    }

    /// At most the first `bytes` bytes.
    #[must_use]
    pub fn take(self, bytes: u64) -> Self {
        GuestRange { start: self.start, len: self.len.min(bytes) }
    }

    /// What both ranges have in common (possibly empty).
    #[must_use]
    pub fn intersect(self, other: GuestRange) -> Self {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        if end <= start { GuestRange { start, len: 0 } } else { GuestRange::between(start, end) }
    }

    /// True if every byte of `other` is in here.
    pub fn contains(self, other: GuestRange) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }
}

impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest bytes {}..{}", self.start.0, self.end().0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset(start), len).unwrap()
    }

    #[test]
    fn ranges_cannot_wrap() {
        assert!(GuestRange::new(GuestOffset(u64::MAX), 1).is_none());
        assert_eq!(r(u64::MAX, 0).end(), GuestOffset(u64::MAX));
        assert!(HostOffset(i64::MAX as u64).checked_add(1).is_none());
    }

    #[test]
    fn parts_of_a_range() {
        assert_eq!(r(10, 20).skip(5), r(15, 15));
        assert_eq!(r(10, 20).skip(50), r(30, 0));
        assert_eq!(r(10, 20).take(7), r(10, 7));
        assert_eq!(r(10, 20).intersect(r(25, 100)), r(25, 5));
        assert!(r(10, 20).intersect(r(40, 1)).is_empty());
        assert!(r(10, 20).contains(r(10, 20)) && !r(10, 20).contains(r(9, 2)));
    }
}
