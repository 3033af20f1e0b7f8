//! An image that is open: look-ups in the first level, which is kept whole, and in pages of the second.

use super::super::OpenHow;
use super::writer::{Marking, Writer};
use super::{Cluster, Extra, Geometry};
use crate::error::{Failure, Result};
use crate::limits::{META_PAGE_BYTES, SECTOR_BYTES};
use crate::map::{
    BlockIndex, ByteSource, Change, Codec, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset,
    ImageInfo, ImageMap, Intent, Limits, MetaKey, MetaOp, Miss, Packed, PageCache, PagePlace, Plan,
    PlanToken, Settled,
};
use crate::probe::paging::are_all_paged;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

/// The number by which keys of pages call second-level tables.
pub(super) const L2: u8 = 0;
/// And the first-level one, whose pages are those of the file.
pub(super) const L1: u8 = 1;

/// What the header of an image tells.
#[derive(Clone, Debug)]
pub(in super::super) struct Header {
    pub(in super::super) geometry: Geometry,
    pub(in super::super) extra: Extra,
    pub(in super::super) info: ImageInfo,
    /// The entry of a cluster that reads as zeros whatever lies beneath, if there is one that all know who write to the image.
    pub(in super::super) zeros: Option<u64>,
    /// Where a writer leaves a mark.
    pub(in super::super) marking: Option<Marking>,
}

/// A QED or a QCOW of the first version that is open.
#[derive(Debug)]
pub(in super::super) struct LevelMap {
    pub(super) file: FileId,
    pub(super) geometry: Geometry,
    /// As the kernel has accepted it. Empty after an open for information only.
    pub(super) l1: Box<[AtomicU64]>,
    /// Pages of second-level tables, by their place in the file.
    pub(super) pages: PageCache,
    /// Bytes the file is known to have.
    end: AtomicU64,
    info: ImageInfo,
    /// What is written for a cluster of zeros.
    pub(super) zeros: Option<u64>,
    /// `None` if opened for reading only.
    pub(super) writer: Option<Writer>,
}

impl LevelMap {
    /// Opens an image whose header was read.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub(in super::super) fn open(
        source: &dyn ByteSource,
        file: FileId,
        how: OpenHow,
        header: Header,
    ) -> Result<Self> {
        let Header { geometry, extra, info, zeros, marking } = header;
        let l1 = if how.info_only { Vec::new() } else { geometry.load_l1(source)? };
        let page_bytes = geometry.page_bytes();
        let l2_pages = geometry.l1_entries().saturating_mul(geometry.table_bytes / page_bytes);
        let pages = match are_all_paged() {
            true => PageCache::new(page_bytes, l2_pages, 0),
            false => PageCache::second_level(page_bytes, l2_pages, l1.len() as u64 * 8),
        };
        let writable = !how.read_only && !how.info_only;
        Ok(LevelMap {
            file,
            geometry,
            l1: l1.into_iter().map(AtomicU64::new).collect(),
            pages,
            end: AtomicU64::new(geometry.file_bytes),
            // What is nowhere reads as zeros where nothing is beneath.
            zeros: if info.parent_names.is_empty() { Some(0) } else { zeros },
            info,
            writer: if writable { Some(Writer::open(source, geometry, extra, marking)?) } else { None },
        })
    }

    fn known_end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// The file is at least so long now.
    pub(super) fn reaches(&self, end: HostOffset) {
        self.end.fetch_max(end.0, Ordering::AcqRel);
    }

    /// The number of the first-level entry around a cluster of the disk.
    pub(super) fn l1_of(&self, block: u64) -> u64 {
        block / (self.geometry.table_bytes / 8)
    }

    /// Where the second-level table is that an entry of the first level names.
    pub(super) fn table_at(&self, l1: u64) -> std::result::Result<Option<u64>, Miss> {
        let entry = usize::try_from(l1).ok().and_then(|i| self.l1.get(i));
        let entry = entry.ok_or(Miss::Fail(Failure::OutOfRange))?.load(Ordering::Acquire);
        self.geometry.table_named(entry, self.known_end()).map_err(Miss::Fail)
    }

    /// Where the entry of a cluster is, as a number of 8-byte words from the start of the file.
    pub(super) fn word_of(&self, table: u64, block: u64) -> u64 {
        let entries = self.geometry.table_bytes / 8;
        table / 8 + block % entries
    }

    /// The page a word is in, and its number there.
    pub(super) fn page_of(&self, word: u64) -> (u64, usize) {
        let words = self.geometry.page_bytes() / 8;
        (word / words, usize::try_from(word % words).expect("inside a page"))
    }

    /// What the tables say of a cluster.
    pub(super) fn cluster(&self, block: u64) -> std::result::Result<Cluster, Miss> {
        let Some(table) = self.table_at(self.l1_of(block))? else { return Ok(Cluster::Free) };
        let (page, into) = self.page_of(self.word_of(table, block));
        let raw = self.pages.bytes8(page, into);
        let raw = raw.ok_or(Miss::NeedsPage(MetaKey::Page { table: L2, number: page }))?;
        let entry = self.geometry.dialect.number(raw);
        self.geometry.cluster(entry, self.known_end()).map_err(Miss::Fail)
    }

    /// What the part of one cluster at the start of `r` is.
    fn extent_at(&self, r: GuestRange) -> std::result::Result<Extent, Miss> {
        let (into, len) = self.part_of_cluster(r);
        let (kind, len) = match self.cluster(self.geometry.block_at(r.start()))? {
            Cluster::Free => return Ok(self.nothing_at(r, len)),
            Cluster::Zero => (ExtentKind::Zero, len),
            Cluster::At(at) => self.data(at.plus(into), len),
            Cluster::Packed { at, len: bytes } => (self.packed(at, bytes, into), len),
        };
        Ok(Extent { len, kind })
    }

    /// The same, if it may be written in place.
    fn own_at(&self, r: GuestRange) -> std::result::Result<Extent, Miss> {
        let (into, len) = self.part_of_cluster(r);
        match self.cluster(self.geometry.block_at(r.start()))? {
            Cluster::At(at) if !self.must_write(r.start()) => {
                let kind = ExtentKind::Data { file: self.file, off: at.plus(into) };
                Ok(Extent { len, kind })
            }
            _ => Err(Miss::NeedsPlan),
        }
    }

    /// Where `r` begins in its cluster, and how much of it lies there.
    fn part_of_cluster(&self, r: GuestRange) -> (u64, u64) {
        let into = r.start().0 & (self.geometry.cluster_bytes - 1);
        (into, r.len().min(self.geometry.cluster_bytes - into))
    }

    /// Nothing is here; where there is no table there is nothing as far as it would reach.
    fn nothing_at(&self, r: GuestRange, len: u64) -> Extent {
        let span = self.geometry.span();
        let index = usize::try_from(r.start().0 / span).unwrap_or(usize::MAX);
        let no_table = self.l1.get(index).is_some_and(|e| e.load(Ordering::Acquire) == 0);
        let len = if no_table { r.len().min(span - r.start().0 % span) } else { len };
        Extent { len, kind: ExtentKind::Parent }
    }

    /// A file may end inside its last cluster; what is missing reads as zeros.
    fn data(&self, off: HostOffset, len: u64) -> (ExtentKind, u64) {
        match self.known_end().next_multiple_of(SECTOR_BYTES).saturating_sub(off.0) {
            0 => (ExtentKind::Zero, len),
            there => (ExtentKind::Data { file: self.file, off }, len.min(there)),
        }
    }

    fn packed(&self, off: HostOffset, len: u32, into: u64) -> ExtentKind {
        let small = |n: u64| u32::try_from(n).expect("clusters that can be packed are small");
        let unit = small(self.geometry.cluster_bytes);
        let packed = Packed { off, len, unit, file: self.file, codec: Codec::Deflate };
        ExtentKind::Packed { packed, into: small(into) }
    }

    /// The first entry of the first level in a page of the file, and the one behind its last.
    pub(super) fn l1_entries_of(&self, page: u64) -> (u64, u64) {
        let entry = |at: u64| at.saturating_sub(self.geometry.l1_at).div_ceil(8).min(self.l1.len() as u64);
        (entry(page * META_PAGE_BYTES), entry((page + 1) * META_PAGE_BYTES))
    }

    /// The page of the file in which an entry of the first level is.
    pub(super) fn l1_page(&self, l1: u64) -> u64 {
        (self.geometry.l1_at + l1 * 8) / META_PAGE_BYTES
    }
}

impl ImageMap for LevelMap {
    fn limits(&self) -> Limits {
        Limits {
            size_bytes: self.geometry.disk_bytes,
            block_bytes: self.geometry.cluster_bytes,
            is_diff: !self.info.parent_names.is_empty(),
            data_alignment: 1 << (self.geometry.cluster_bytes | self.geometry.l1_at).trailing_zeros(),
        }
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        if !self.geometry.disk().contains(r) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        if why == Intent::Overwrite && self.writer.is_none() {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        match why {
            Intent::Read => self.extent_at(r),
            Intent::Overwrite => self.own_at(r),
        }
    }

    fn unit(&self, at: GuestOffset) -> GuestRange {
        self.geometry.unit(self.geometry.block_at(at))
    }

    fn claim_of(&self, at: GuestOffset) -> BlockIndex {
        BlockIndex(self.geometry.block_at(at))
    }

    fn plan(&self, change: Change) -> std::result::Result<Plan, Miss> {
        let plan = self.plan_change(change)?;
        plan.assert_ordered();
        Ok(plan)
    }

    fn room(&self, urgent: bool) -> Option<Plan> {
        let plan = self.plan_room(urgent)?;
        plan.assert_ordered();
        Some(plan)
    }

    fn settle(&self, token: PlanToken, how: Settled) {
        self.settle_plan(token, how);
    }

    fn must_write(&self, at: GuestOffset) -> bool {
        self.writer.as_ref().is_some_and(|w| w.blocks.doubts(self.geometry.block_at(at)))
    }

    fn has_page(&self, key: MetaKey) -> bool {
        matches!(key, MetaKey::Page { table: L2, number } if self.pages.contains(number))
    }

    fn page_place(&self, key: MetaKey) -> std::result::Result<PagePlace, Failure> {
        let MetaKey::Page { table: L2, number } = key else { return Err(Failure::Corrupt) };
        let bytes = self.geometry.page_bytes();
        let off = number.checked_mul(bytes).filter(|off| off + bytes <= self.known_end());
        let off = HostOffset(off.ok_or(Failure::Corrupt)?);
        Ok(PagePlace { file: self.file, off, len: self.pages.page_bytes() })
    }

    fn page_read(&self, key: MetaKey, bytes: &[u8]) -> std::result::Result<(), Failure> {
        let MetaKey::Page { table: L2, number } = key else { return Err(Failure::Corrupt) };
        self.pages.insert(number, bytes);
        Ok(())
    }

    fn compose(&self, key: MetaKey, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        Ok((self.file, self.compose_page(key, ops, out)?))
    }

    fn publish(&self, key: MetaKey, ops: &[MetaOp]) {
        self.publish_page(key, ops);
    }

    fn begin(&self, _modification: Uuid) -> Plan {
        self.begin_plan()
    }

    fn end_needs(&self) -> Option<MetaKey> {
        self.close_needs()
    }

    fn end(&self) -> Plan {
        let plan = self.close_plan();
        plan.assert_ordered();
        plan
    }

    fn info(&self) -> ImageInfo {
        self.info.clone()
    }
}
