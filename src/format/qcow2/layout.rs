//! Arithmetic of a checked header, and what entries of tables say.

use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::META_PAGE_BYTES;
use crate::map::{GuestOffset, GuestRange, HostOffset};

/// The cluster has one owner, so it may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
/// The cluster is packed.
const PACKED: u64 = 1 << 62;
/// The cluster reads as zeros (not with subclusters, which have bits of their own).
pub(super) const ZERO: u64 = 1;
/// Bits of an entry that are an offset.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Subclusters of a cluster.
pub(super) const SUBCLUSTERS: u64 = 32;

/// Where everything is. Made by [`super::header::Header::layout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) disk_bytes: u64,
    pub(super) cluster_bits: u32,
    /// Entries of second-level tables have bitmaps of subclusters.
    pub(super) extended: bool,
    /// Entries can say zeros.
    pub(super) zero_flag: bool,
    pub(super) refcount_order: u32,
    pub(super) l1_entries: u32,
    pub(super) l1_at: HostOffset,
    /// Length of the file when it was opened.
    pub(super) file_bytes: u64,
}

/// What a second-level entry says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Nothing.
    Free,
    /// Zeros; there may be a place for it all the same.
    Zero(Option<Place>),
    /// All of it is at a place.
    Data(Place),
    /// Some of it is, by subcluster.
    Partly(Place, Subclusters),
    /// No subcluster is at a place; some read as zeros.
    Unplaced(Subclusters),
    /// It is packed.
    Packed {
        at: HostOffset,
        /// Bytes, in whole sectors.
        len: u32,
    },
}

/// A cluster of the file that an entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) at: HostOffset,
    /// Nothing else names it.
    pub(super) own: bool,
}

/// Bitmaps of subclusters: the first one is bit 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Subclusters {
    pub(super) here: u32,
    pub(super) zero: u32,
}

/// What a subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sub {
    Free,
    Zero,
    Here,
}

impl Subclusters {
    fn of(bitmap: u64) -> Self {
        Subclusters { here: bitmap as u32, zero: (bitmap >> 32) as u32 }
    }

    pub(super) fn get(self, n: u64) -> Sub {
        match (self.here >> n & 1, self.zero >> n & 1) {
            (1, _) => Sub::Here,
            (_, 1) => Sub::Zero,
            _ => Sub::Free,
        }
    }
}

impl Layout {
    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn subcluster_bytes(&self) -> u64 {
        self.cluster_bytes() / SUBCLUSTERS
    }

    /// Bytes of a second-level entry.
    pub(super) fn entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// log2 of the entries of a second-level table.
    pub(super) fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended { 4 } else { 3 }
    }

    /// Guest bytes that one first-level entry covers.
    pub(super) fn l1_span(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// Entries the first-level table must have.
    pub(super) fn l1_needed(&self) -> u64 {
        self.disk_bytes.div_ceil(self.l1_span())
    }

    /// Clusters of the disk.
    pub(super) fn blocks(&self) -> u64 {
        self.disk_bytes.div_ceil(self.cluster_bytes())
    }

    pub(super) fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.disk_bytes))
    }

    /// Bytes of a page of metadata.
    pub(super) fn page_bytes(&self) -> u64 {
        self.cluster_bytes().min(META_PAGE_BYTES)
    }

    /// The guest range of a cluster, clipped to the disk (empty for clusters wholly behind its end).
    pub(super) fn unit(&self, block: u64) -> GuestRange {
        let start = block.saturating_mul(self.cluster_bytes()).min(self.disk_bytes);
        let end = (start + self.cluster_bytes()).min(self.disk_bytes);
        GuestRange::between(GuestOffset(start), GuestOffset(end))
    }

    /// The cluster around `at`; behind the last one for an offset behind the disk.
    pub(super) fn block_at(&self, at: GuestOffset) -> u64 {
        (at.0 >> self.cluster_bits).min(self.blocks())
    }

    /// A table of `bytes` bytes at `at` begins at a cluster and lies inside the file, behind the header.
    pub(super) fn check_table(&self, what: &str, at: u64, bytes: u64) -> Result<()> {
        let wrong =
            |how: String| Err(Error::new(ErrorKind::Corrupt, format!("the {what} at byte {at} {how}")));
        if bytes == 0 {
            return Ok(());
        }
        if !at.is_multiple_of(self.cluster_bytes()) {
            return wrong("does not begin with a cluster".into());
        }
        if at == 0 {
            return wrong("lies in the header".into());
        }
        match at.checked_add(bytes) {
            Some(end) if end <= self.file_bytes => Ok(()),
            _ => wrong(format!("reaches behind the file's end at {}", self.file_bytes)),
        }
    }

    /// What a second-level entry says, judged by itself alone.
    ///
    /// # Errors
    /// [`Failure::Corrupt`] for what no writer writes.
    pub(super) fn cluster(&self, entry: u64, bitmap: u64) -> std::result::Result<Cluster, Failure> {
        if entry & PACKED != 0 {
            return self.packed(entry);
        }
        let known = OFFSET | COPIED | if self.extended { 0 } else { ZERO };
        if entry & !known != 0 {
            return Err(Failure::Corrupt);
        }
        let at = entry & OFFSET;
        if !at.is_multiple_of(self.cluster_bytes()) {
            return Err(Failure::Corrupt);
        }
        let place = (at != 0).then_some(Place { at: HostOffset(at), own: entry & COPIED != 0 });
        if self.extended {
            return Self::with_subclusters(place, Subclusters::of(bitmap));
        }
        match (entry & ZERO != 0, place) {
            (true, _) if !self.zero_flag => Err(Failure::Corrupt),
            (true, place) => Ok(Cluster::Zero(place)),
            (false, Some(place)) => Ok(Cluster::Data(place)),
            (false, None) => Ok(Cluster::Free),
        }
    }

    fn with_subclusters(place: Option<Place>, sub: Subclusters) -> std::result::Result<Cluster, Failure> {
        if sub.here & sub.zero != 0 || (place.is_none() && sub.here != 0) {
            return Err(Failure::Corrupt);
        }
        Ok(match (place, sub) {
            (None, Subclusters { zero: 0, .. }) => Cluster::Free,
            (place, Subclusters { zero: u32::MAX, .. }) => Cluster::Zero(place),
            (None, sub) => Cluster::Unplaced(sub),
            (Some(place), Subclusters { here: u32::MAX, .. }) => Cluster::Data(place),
            (Some(place), sub) => Cluster::Partly(place, sub),
        })
    }

    fn packed(&self, entry: u64) -> std::result::Result<Cluster, Failure> {
        if entry & COPIED != 0 {
            return Err(Failure::Corrupt);
        }
        let shift = 62 - (self.cluster_bits - 8);
        let at = entry & ((1 << shift) - 1);
        let sectors = (entry & (PACKED - 1)) >> shift;
        let len = (sectors + 1) * 512 - at % 512;
        let len = u32::try_from(len).map_err(|_| Failure::Corrupt)?;
        Ok(Cluster::Packed { at: HostOffset(at), len })
    }
}
