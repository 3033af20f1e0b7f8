//! Images whose tables have two levels and know nothing but offsets: QED and the first QCOW. Entries have 64 bits; one of 0 says
//! *nothing here*. The first level is kept whole, the second in pages.

mod closing;
pub(super) mod create;
mod map;
mod survey;
mod writer;

pub(super) use map::{Header, LevelMap};
pub(super) use survey::{Extra, Survey};
pub(super) use writer::Marking;

use super::report::{CheckReport, Repair};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::{META_PAGE_BYTES, TABLE_PIECE_BYTES};
use crate::map::{ByteSource, GuestOffset, GuestRange, HostOffset};

/// Where everything is, by a header that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) disk_bytes: u64,
    /// A power of two.
    pub(super) cluster_bytes: u64,
    /// Bytes of a second-level table, a power of two from 512 on.
    pub(super) table_bytes: u64,
    pub(super) l1_at: u64,
    /// Bytes of the header: nothing else lies before this.
    pub(super) header_bytes: u64,
    /// Length of the file when it was opened.
    pub(super) file_bytes: u64,
    pub(super) dialect: Dialect,
}

/// How a format writes entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Little endian; 1 says zeros.
    Qed,
    /// Big endian; the highest bit says packed.
    Qcow,
}

/// What a second-level entry says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    Free,
    Zero,
    At(HostOffset),
    Packed {
        at: HostOffset,
        /// Bytes.
        len: u32,
    },
}

impl Dialect {
    fn number(self, raw: [u8; 8]) -> u64 {
        match self {
            Dialect::Qed => u64::from_le_bytes(raw),
            Dialect::Qcow => u64::from_be_bytes(raw),
        }
    }

    fn bytes(self, number: u64) -> [u8; 8] {
        match self {
            Dialect::Qed => number.to_le_bytes(),
            Dialect::Qcow => number.to_be_bytes(),
        }
    }
}

impl Geometry {
    /// Guest bytes that one first-level entry covers.
    pub(super) fn span(&self) -> u64 {
        (self.table_bytes / 8).saturating_mul(self.cluster_bytes)
    }

    /// Entries of the first level that the disk needs.
    pub(super) fn l1_entries(&self) -> u64 {
        self.disk_bytes.div_ceil(self.span())
    }

    /// Clusters that a second-level table takes.
    fn table_clusters(&self) -> u32 {
        let n = self.table_bytes.div_ceil(self.cluster_bytes);
        u32::try_from(n).expect("tables have 16 clusters at most, or 64 KiB")
    }

    /// Clusters of the disk.
    fn blocks(&self) -> u64 {
        self.disk_bytes.div_ceil(self.cluster_bytes)
    }

    fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.disk_bytes))
    }

    /// Bytes of a page of a second-level table.
    fn page_bytes(&self) -> u64 {
        self.cluster_bytes.min(self.table_bytes).min(META_PAGE_BYTES)
    }

    /// The cluster around `at`; behind the last one for an offset behind the disk.
    fn block_at(&self, at: GuestOffset) -> u64 {
        (at.0 / self.cluster_bytes).min(self.blocks())
    }

    /// The guest range of a cluster, clipped to the disk.
    fn unit(&self, block: u64) -> GuestRange {
        let start = block.saturating_mul(self.cluster_bytes).min(self.disk_bytes);
        let end = (start + self.cluster_bytes).min(self.disk_bytes);
        GuestRange::between(GuestOffset(start), GuestOffset(end))
    }

    /// Where a run of `bytes` bytes may be: at a cluster's beginning, behind the header, not over the first level.
    fn is_free_for(&self, at: u64, bytes: u64) -> bool {
        let Some(end) = at.checked_add(bytes) else { return false };
        let l1_end = self.l1_at + self.l1_entries() * 8;
        at.is_multiple_of(self.cluster_bytes)
            && at >= self.header_bytes
            && (end <= self.l1_at || at >= l1_end)
    }

    /// Where the second-level table is that a first-level entry names; `None`: there is none.
    ///
    /// # Errors
    /// [`Failure::Corrupt`] where no table can be.
    pub(super) fn table_named(
        &self,
        entry: u64,
        file_bytes: u64,
    ) -> std::result::Result<Option<u64>, Failure> {
        if entry == 0 {
            return Ok(None);
        }
        let inside = entry.checked_add(self.table_bytes).is_some_and(|end| end <= file_bytes);
        if inside && self.is_free_for(entry, self.table_bytes) {
            Ok(Some(entry))
        } else {
            Err(Failure::Corrupt)
        }
    }

    /// What a second-level entry says.
    ///
    /// # Errors
    /// [`Failure::Corrupt`] for what cannot be.
    pub(super) fn cluster(&self, entry: u64, file_bytes: u64) -> std::result::Result<Cluster, Failure> {
        match (self.dialect, entry) {
            (_, 0) => return Ok(Cluster::Free),
            (Dialect::Qed, 1) => return Ok(Cluster::Zero),
            (Dialect::Qcow, e) if e >> 63 != 0 => return self.packed(e, file_bytes),
            _ => {}
        }
        if entry >= file_bytes || !self.is_free_for(entry, self.cluster_bytes) {
            return Err(Failure::Corrupt);
        }
        Ok(Cluster::At(HostOffset(entry)))
    }

    /// The lower bits are the place, to the byte; above them is the length.
    fn packed(&self, entry: u64, file_bytes: u64) -> std::result::Result<Cluster, Failure> {
        let shift = 63 - self.cluster_bytes.trailing_zeros();
        let at = entry & ((1 << shift) - 1);
        let len = entry >> shift & (self.cluster_bytes - 1);
        let end = at + len;
        let l1_end = self.l1_at + self.l1_entries() * 8;
        if len == 0 || at < self.header_bytes || end > file_bytes || (at < l1_end && end > self.l1_at) {
            return Err(Failure::Corrupt);
        }
        let len = u32::try_from(len).map_err(|_| Failure::Corrupt)?;
        Ok(Cluster::Packed { at: HostOffset(at), len })
    }

    /// The first level, in the machine's byte order.
    ///
    /// # Errors
    /// Those of reading.
    fn load_l1(&self, source: &dyn ByteSource) -> Result<Vec<u64>> {
        let (mut at, end) = (self.l1_at, self.l1_at + self.l1_entries() * 8);
        let (mut table, mut piece) = (Vec::new(), vec![0; TABLE_PIECE_BYTES]);
        while at < end {
            let len = usize::try_from(end - at).map_or(piece.len(), |left| left.min(piece.len()));
            source.read_at(HostOffset(at), &mut piece[..len])?;
            table.extend(piece[..len].as_chunks::<8>().0.iter().map(|raw| self.dialect.number(*raw)));
            at += len as u64;
        }
        Ok(table)
    }

    /// The first level lies behind the header's fields and inside the file, and is not larger than `most` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] or [`ErrorKind::Limit`].
    pub(super) fn check_l1(&self, most: u64) -> Result<()> {
        let bytes = self.l1_entries().saturating_mul(8);
        if bytes > most {
            let what = format!("the first-level table has {bytes} bytes; {most} are the limit");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let at = self.l1_at;
        let how = match at.checked_add(bytes) {
            _ if at < self.header_bytes => "lies in the header".to_string(),
            Some(end) if end <= self.file_bytes => return Ok(()),
            _ => format!("reaches behind the file's end at {}", self.file_bytes),
        };
        Err(Error::new(ErrorKind::Corrupt, format!("the first-level table at byte {at} {how}")))
    }
}

/// The check of an image whose header `read` reads.
///
/// # Errors
/// [`ErrorKind::NotThisFormat`], [`ErrorKind::Unsupported`], [`ErrorKind::Limit`] for tables or files too large to be looked
/// through, and those of reading.
pub(super) fn check(source: &dyn ByteSource, read: ReadHeader) -> Result<CheckReport> {
    let examined = read(source).map_err(|e| match e.kind() {
        // a header that asks for too much is a wrong one
        ErrorKind::Limit => Error::new(ErrorKind::Corrupt, e.to_string()),
        _ => e,
    });
    match examined.and_then(|(geometry, extra)| Survey::of(source, geometry, extra)) {
        Ok(survey) => Ok(survey.report),
        Err(e) if e.kind() == ErrorKind::Corrupt => Ok(CheckReport::hopeless(&e)),
        Err(e) => Err(e),
    }
}

/// The repair of such an image. Nothing is written.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where the header is wrong, [`ErrorKind::Unsupported`] for what is not repaired; otherwise as [`check`].
pub(super) fn repair(source: &dyn ByteSource, read: ReadHeader) -> Result<Repair> {
    let (geometry, extra) = read(source).map_err(|e| match e.kind() {
        ErrorKind::Corrupt => Error::new(ErrorKind::Corrupt, format!("cannot be repaired: {e}")),
        _ => e,
    })?;
    Survey::of(source, geometry, extra)?.repair()
}

/// Where everything is, and what a check has to know besides.
pub(super) type ReadHeader = fn(&dyn ByteSource) -> Result<(Geometry, Extra)>;

/// A parent's name of `len` bytes at `at`.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if it is not there or no text.
pub(super) fn read_name(source: &dyn ByteSource, at: u64, len: u32) -> Result<String> {
    const MAX_NAME_BYTES: u32 = 1023;
    let fits = at.checked_add(u64::from(len)).is_some_and(|end| end <= source.len());
    if len > MAX_NAME_BYTES || !fits {
        let what = format!("the backing file's name of {len} bytes at byte {at} cannot be");
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    let mut name = vec![0; usize::try_from(len).expect("MAX_NAME_BYTES")];
    source.read_at(HostOffset(at), &mut name)?;
    // VirtualBox counts the zero behind the name.
    while name.last() == Some(&0) {
        name.pop();
    }
    String::from_utf8(name)
        .map_err(|_| Error::new(ErrorKind::Corrupt, "the backing file's name is not UTF-8"))
}
