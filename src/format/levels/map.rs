//! An image that is open: look-ups in the first level, which is kept whole, and in pages of the second.

use super::super::OpenHow;
use super::{Cluster, Geometry};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::{SECTOR_BYTES, TABLE_CACHE_BYTES};
use crate::map::{
    BlockIndex, ByteSource, Codec, Extent, ExtentKind, ExtentList, FileId, GuestOffset, GuestRange,
    HostOffset, ImageInfo, ImageMap, Intent, Limits, MetaKey, Miss, Packed, PageCache, PagePlace,
};
use std::sync::atomic::{AtomicU64, Ordering};

/// The number by which keys of pages call second-level tables.
const L2: u8 = 0;

/// A QED or a QCOW of the first version that is open.
#[derive(Debug)]
pub(in super::super) struct LevelMap {
    file: FileId,
    geometry: Geometry,
    /// As the kernel has accepted it. Empty after an open for information only.
    l1: Box<[AtomicU64]>,
    /// Pages of second-level tables, by their place in the file.
    pages: PageCache,
    info: ImageInfo,
}

impl LevelMap {
    /// Opens an image whose header was read: `info` is what it tells.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub(in super::super) fn open(
        source: &dyn ByteSource,
        file: FileId,
        how: OpenHow,
        geometry: Geometry,
        info: ImageInfo,
    ) -> Result<Self> {
        if !how.read_only && !how.info_only {
            let what = format!("{} images cannot be written yet", info.format.to_uppercase());
            return Err(Error::new(ErrorKind::Unsupported, what).hint("open it read-only, or use --overlay"));
        }
        let l1 = if how.info_only { Vec::new() } else { geometry.load_l1(source)? };
        let page_bytes = geometry.page_bytes();
        let l2_pages = geometry.l1_entries().saturating_mul(geometry.table_bytes / page_bytes);
        let pages = PageCache::new(page_bytes, l2_pages, TABLE_CACHE_BYTES);
        Ok(LevelMap { file, geometry, l1: l1.into_iter().map(AtomicU64::new).collect(), pages, info })
    }

    fn known_end(&self) -> u64 {
        self.geometry.file_bytes
    }

    /// What the tables say of a cluster.
    fn cluster(&self, block: u64) -> std::result::Result<Cluster, Miss> {
        let entries = self.geometry.table_bytes / 8;
        let index = usize::try_from(block / entries).map_err(|_| Miss::Fail(Failure::OutOfRange))?;
        let entry = self.l1.get(index).ok_or(Miss::Fail(Failure::OutOfRange))?.load(Ordering::Acquire);
        let table = self.geometry.table_named(entry, self.known_end()).map_err(Miss::Fail)?;
        let Some(table) = table else { return Ok(Cluster::Free) };
        let at = table + block % entries * 8;
        let (page, into) = (at / self.geometry.page_bytes(), at % self.geometry.page_bytes() / 8);
        let word = self.pages.bytes8(page, usize::try_from(into).expect("inside a page"));
        let raw = word.ok_or(Miss::NeedsPage(MetaKey::Page { table: L2, number: page }))?;
        let entry = self.geometry.dialect.number(raw);
        self.geometry.cluster(entry, self.known_end()).map_err(Miss::Fail)
    }

    /// What the part of one cluster at the start of `r` is.
    fn extent_at(&self, r: GuestRange) -> std::result::Result<Extent, Miss> {
        let into = r.start().0 & (self.geometry.cluster_bytes - 1);
        let len = r.len().min(self.geometry.cluster_bytes - into);
        let (kind, len) = match self.cluster(self.geometry.block_at(r.start()))? {
            Cluster::Free => return Ok(self.nothing_at(r, len)),
            Cluster::Zero => (ExtentKind::Zero, len),
            Cluster::At(at) => self.data(at.plus(into), len),
            Cluster::Packed { at, len: bytes } => (self.packed(at, bytes, into), len),
        };
        Ok(Extent { len, kind })
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

    fn map(&self, r: GuestRange, why: Intent, out: &mut ExtentList) -> std::result::Result<(), Miss> {
        if !self.geometry.disk().contains(r) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        if why == Intent::Overwrite {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        out.fill(r, |rest| self.extent_at(rest))
    }

    fn unit(&self, at: GuestOffset) -> GuestRange {
        self.geometry.unit(self.geometry.block_at(at))
    }

    fn claim_of(&self, at: GuestOffset) -> BlockIndex {
        BlockIndex(self.geometry.block_at(at))
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

    fn info(&self) -> ImageInfo {
        self.info.clone()
    }
}
