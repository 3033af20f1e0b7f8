//! A VHDX that is open: look-ups on a table of atomics and on the bitmaps of blocks that are there in parts.

use super::super::OpenHow;
use super::super::sector_bits::run;
use super::bat::{CHUNK_SECTORS, Entry, Layout, Place};
use super::header::Headers;
use super::log;
use super::metadata::Metadata;
use super::place::{BLOCK_UNIT, MIB, Region};
use super::region::Regions;
use super::replayed::{Patches, Replayed};
use super::writer::Writer;
use super::{corrupt, unsupported};
use crate::error::{Failure, Result};
use crate::limits::{MAX_PAGE_CACHE_BYTES, META_PAGE_BYTES};
use crate::map::{
    BlockIndex, ByteSource, Change, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset,
    ImageInfo, ImageMap, Intent, Limits, MetaKey, MetaOp, Miss, PageCache, PagePlace, Plan, PlanToken,
    Settled,
};
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

/// The table of the keys of bitmap pages.
const BITMAPS: u8 = 1;
/// Sectors that one page of a bitmap speaks of.
const PAGE_SECTORS: u64 = META_PAGE_BYTES * 8;
/// Pages of one bitmap.
const BITMAP_PAGES: u64 = CHUNK_SECTORS / PAGE_SECTORS;

/// Everything about an image but its blocks.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) headers: Headers,
    pub(super) regions: Regions,
    pub(super) metadata: Metadata,
    pub(super) layout: Layout,
    pub(super) patches: Patches,
}

impl Parts {
    /// Reads what the image is, as its log leaves it.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub(super) fn read(source: &dyn ByteSource) -> Result<Self> {
        let headers = Headers::read(source)?;
        let patches = match headers.current.log()? {
            Some((id, at, bytes)) => log::read(source, id, at, bytes)?,
            None => Patches::default(),
        };
        let replayed = Replayed { file: source, patches: &patches };
        let regions = Regions::read(&replayed)?;
        let (log_at, log_bytes) = headers.current.log_extent();
        // also of a log that is not in use: what is behind it would count as free
        if log_at.checked_add(log_bytes).is_none_or(|end| end > source.len()) {
            return Err(corrupt(format!("the log's {log_bytes} bytes at {log_at} are not in the file")));
        }
        if regions.all().iter().any(|r| r.overlaps(log_at, log_bytes)) {
            return Err(corrupt("the log lies in another region"));
        }
        let metadata = Metadata::read(&replayed, regions.metadata)?;
        let layout = Layout::new(&metadata, regions.table)?;
        Ok(Parts { headers, regions, metadata, layout, patches })
    }

    pub(super) fn table(&self, source: &dyn ByteSource) -> Result<Vec<u64>> {
        self.layout.load(&Replayed { file: source, patches: &self.patches })
    }

    /// End of all that is used: of the regions, the log, and what the table names.
    pub(super) fn used_end(&self, table: &[u64]) -> u64 {
        let places = self.layout.places(table).map(|p| p.end());
        let ends = self.taken().into_iter().map(Region::end).chain(places);
        ends.fold(MIB, u64::max).checked_next_multiple_of(BLOCK_UNIT).unwrap_or(u64::MAX)
    }

    /// Where no block can be.
    pub(super) fn taken(&self) -> Vec<Region> {
        let (at, len) = self.headers.current.log_extent();
        let log = Region { at, len };
        self.regions.all().into_iter().chain([log].into_iter().filter(|r| r.len > 0)).collect()
    }
}

/// A VHDX that is open.
#[derive(Debug)]
pub(super) struct VhdxMap {
    pub(super) file: FileId,
    pub(super) parts: Parts,
    /// As the kernel has accepted it, in whole pages. Empty after an open for information only.
    table: Box<[AtomicU64]>,
    /// Blocks that have a place, when the image was opened.
    allocated: u64,
    bitmaps: PageCache,
    /// `None` if opened for reading only.
    pub(super) writer: Option<Writer>,
}

impl VhdxMap {
    /// Opens the image. Its log is replayed in memory; it goes to the file before the first change, not before.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub(super) fn open(source: &dyn ByteSource, file: FileId, how: OpenHow) -> Result<Self> {
        let parts = Parts::read(source)?;
        let table = parts.table(source)?;
        let has_place =
            |raw: &&u64| matches!(parts.layout.entry(**raw), Some(Entry::At(_) | Entry::Partly(_)));
        let in_table = |block| usize::try_from(parts.layout.index_of(block)).ok().and_then(|i| table.get(i));
        let allocated = (0..parts.layout.blocks).filter_map(in_table).filter(has_place).count() as u64;
        let mut writer = None;
        if !how.info_only {
            verify(&parts, &table, source.len())?;
            if !how.read_only {
                writer = Some(Writer::new(&parts, &table, source.len())?);
            }
        }
        let pages = parts.layout.blocks.div_ceil(2).saturating_mul(BITMAP_PAGES);
        let table = if how.info_only { Vec::new() } else { table };
        let table = table.into_iter().map(AtomicU64::new).collect();
        let bitmaps = PageCache::new(META_PAGE_BYTES, pages, MAX_PAGE_CACHE_BYTES);
        Ok(VhdxMap { file, parts, table, allocated, bitmaps, writer })
    }

    fn raw(&self, index: u64) -> Option<u64> {
        usize::try_from(index).ok().and_then(|i| self.table.get(i)).map(|e| e.load(Ordering::Acquire))
    }

    /// What the table says of a block, as it is published.
    pub(super) fn entry_of(&self, block: u64) -> std::result::Result<Entry, Miss> {
        let layout = &self.parts.layout;
        let raw = self.raw(layout.index_of(block)).ok_or(Miss::Fail(Failure::Unsupported))?;
        layout.entry(raw).ok_or(Miss::Fail(Failure::Corrupt))
    }

    /// The kernel has accepted it.
    pub(super) fn set_entry(&self, index: u64, raw: u64) {
        if let Some(entry) = usize::try_from(index).ok().and_then(|i| self.table.get(i)) {
            entry.store(raw, Ordering::Release);
        }
    }

    /// The table as it is published.
    pub(super) fn entries(&self) -> Vec<u64> {
        self.table.iter().map(|e| e.load(Ordering::Acquire)).collect()
    }

    /// The bytes of a page of the table, with these entries over what is published.
    pub(super) fn page_bytes(&self, page: u64, changes: &[(u64, u64)]) -> Vec<u8> {
        let changed = |index| changes.iter().rev().find(|(i, _)| *i == index).map(|(_, raw)| *raw);
        let entries = Layout::entries_of(page);
        entries.flat_map(|i| changed(i).or(self.raw(i)).unwrap_or(0).to_le_bytes()).collect()
    }

    fn block_or_end(&self, at: GuestOffset) -> u64 {
        let layout = &self.parts.layout;
        (at.0 >> layout.block_shift).min(layout.blocks)
    }

    /// What the part of one block at the start of `r` is.
    fn extent_at(&self, r: GuestRange) -> std::result::Result<Extent, Miss> {
        let layout = &self.parts.layout;
        let block = self.block_or_end(r.start());
        let into = r.start().0 & (layout.block_bytes - 1);
        let len = r.len().min(layout.block_bytes - into);
        let data = |at: u64| ExtentKind::Data { file: self.file, off: HostOffset(at).plus(into) };
        Ok(match self.entry_of(block)? {
            Entry::Free => Extent { len, kind: ExtentKind::Parent },
            Entry::Zero => Extent { len, kind: ExtentKind::Zero },
            Entry::At(at) => Extent { len, kind: data(at) },
            Entry::Partly(at) => {
                let (there, len) = self.run(block, r.take(len))?;
                Extent { len, kind: if there { data(at) } else { ExtentKind::Parent } }
            }
        })
    }

    /// Whether the first sector of `r` is there, and how many bytes are as it is.
    fn run(&self, block: u64, r: GuestRange) -> std::result::Result<(bool, u64), Miss> {
        let layout = &self.parts.layout;
        let first = layout.bit_of(r.start());
        let page = layout.chunk_of(block) * BITMAP_PAGES + first / PAGE_SECTORS;
        let from = first % PAGE_SECTORS;
        let before = r.start().0 % layout.sector_bytes;
        let end = (from + (before + r.len()).div_ceil(layout.sector_bytes)).min(PAGE_SECTORS);
        let word = |n: u64| {
            let bytes = self.bitmaps.bytes8(page, usize::try_from(n).ok()?)?;
            Some(u64::from_le_bytes(bytes).reverse_bits())
        };
        let key = MetaKey::Page { table: BITMAPS, number: page };
        let (there, known) = run(from, end, word).ok_or(Miss::NeedsPage(key))?;
        Ok((there, ((known - from) * layout.sector_bytes - before).min(r.len())))
    }
}

/// Refuses what the table cannot say, and blocks that only the log has.
fn verify(parts: &Parts, table: &[u64], file_bytes: u64) -> Result<()> {
    let mut first = None;
    if !parts.layout.is_sound(table, &parts.taken(), file_bytes) {
        parts.layout.survey(table, &parts.taken(), file_bytes, |fault| {
            first.get_or_insert_with(|| fault.describe(file_bytes));
        });
    }
    if let Some(what) = first {
        return Err(corrupt(what).hint("vdimg check tells everything that is wrong"));
    }
    if parts.patches.0.is_empty() {
        return Ok(());
    }
    let mut payload = parts.layout.places(table).filter(Place::is_block);
    match payload.find_map(|p| parts.patches.touching(p.at, p.len)) {
        None => Ok(()),
        Some(p) => {
            let what = format!("its log holds data of the disk itself, for byte {} of the file", p.at);
            Err(unsupported(what).hint("let Hyper-V, or qemu-img check -r all, write its log first"))
        }
    }
}

impl ImageMap for VhdxMap {
    fn limits(&self) -> Limits {
        let Layout { disk_bytes, block_bytes, is_diff, .. } = self.parts.layout;
        Limits { size_bytes: disk_bytes, block_bytes, is_diff, data_alignment: BLOCK_UNIT }
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        if !self.parts.layout.disk().contains(r) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        if why == Intent::Read {
            return self.extent_at(r);
        }
        if self.writer.is_none() {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        // A block of which a part is missing is changed by a plan, which makes it whole.
        match self.entry_of(self.block_or_end(r.start()))? {
            Entry::At(_) if !self.must_write(r.start()) => self.extent_at(r),
            _ => Err(Miss::NeedsPlan),
        }
    }

    fn unit(&self, at: GuestOffset) -> GuestRange {
        self.parts.layout.unit(self.block_or_end(at))
    }

    fn claim_of(&self, at: GuestOffset) -> BlockIndex {
        BlockIndex(self.block_or_end(at))
    }

    fn plan(&self, change: Change) -> std::result::Result<Plan, Miss> {
        let writer = self.writer.as_ref().ok_or(Miss::Fail(Failure::ReadOnly))?;
        let plan = writer.plan(self, change)?;
        plan.assert_ordered();
        Ok(plan)
    }

    fn room(&self, urgent: bool) -> Option<Plan> {
        self.writer.as_ref()?.room(self, urgent)
    }

    fn settle(&self, token: PlanToken, how: Settled) {
        if let Some(writer) = &self.writer {
            writer.settle(self, token, how);
        }
    }

    fn must_write(&self, at: GuestOffset) -> bool {
        self.writer.as_ref().is_some_and(|w| w.blocks.doubts(self.block_or_end(at)))
    }

    fn has_page(&self, key: MetaKey) -> bool {
        matches!(key, MetaKey::Page { table: BITMAPS, number } if self.bitmaps.contains(number))
    }

    fn compose(&self, key: MetaKey, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        let writer = self.writer.as_ref().ok_or_else(|| unsupported("it is not written"))?;
        let (at, bytes) = writer.compose(self, key, ops)?;
        out.extend(bytes);
        Ok((self.file, at))
    }

    fn publish(&self, key: MetaKey, ops: &[MetaOp]) {
        if let Some(writer) = &self.writer {
            writer.publish(self, key, ops);
        }
    }

    fn begin(&self, modification: Uuid) -> Plan {
        self.writer.as_ref().map_or_else(Plan::default, |w| w.begin(self, modification))
    }

    fn end(&self) -> Plan {
        let plan = self.writer.as_ref().map_or_else(Plan::default, |w| w.end(self));
        plan.assert_ordered();
        plan
    }

    fn page_place(&self, key: MetaKey) -> std::result::Result<PagePlace, Failure> {
        let MetaKey::Page { table: BITMAPS, number } = key else { return Err(Failure::Corrupt) };
        let layout = &self.parts.layout;
        let chunk = number / BITMAP_PAGES;
        let raw = self.raw(layout.bitmap_index(chunk)).ok_or(Failure::Corrupt)?;
        let at = HostOffset(layout.bitmap(raw).ok_or(Failure::Corrupt)?);
        let len = usize::try_from(META_PAGE_BYTES).expect("small");
        Ok(PagePlace {
            file: self.file,
            off: at.plus((number - chunk * BITMAP_PAGES) * META_PAGE_BYTES),
            len,
        })
    }

    fn page_read(&self, key: MetaKey, bytes: &[u8]) -> std::result::Result<(), Failure> {
        let MetaKey::Page { number, .. } = key else { return Err(Failure::Corrupt) };
        let mut page = bytes.to_vec();
        self.parts.patches.over(self.page_place(key)?.off.0, &mut page);
        self.bitmaps.insert(number, &page);
        Ok(())
    }

    fn info(&self) -> ImageInfo {
        let metadata = &self.parts.metadata;
        let ids = self.writer.as_ref().map_or_else(|| self.parts.headers.current.ids(), Writer::ids);
        let has_place = |block: &u64| matches!(self.entry_of(*block), Ok(Entry::At(_) | Entry::Partly(_)));
        let allocated = match &self.writer {
            Some(_) => (0..self.parts.layout.blocks).filter(has_place).count() as u64,
            None => self.allocated,
        };
        let some = |u: Uuid| (!u.is_nil()).then_some(u);
        ImageInfo {
            format: "vhdx",
            variant: match (metadata.is_diff, metadata.is_fixed) {
                (true, _) => "diff",
                (false, true) => "fixed",
                (false, false) => "dynamic",
            },
            virtual_size: metadata.disk_bytes,
            block_size: Some(metadata.block_bytes),
            allocated_blocks: Some(allocated),
            uuid: some(ids.data_write),
            modification_uuid: some(ids.file_write),
            parent_uuid: metadata.parent.filter(|u| !u.is_nil()),
            parent_names: metadata.parent_names.clone(),
            version: Some("1".into()),
            ..ImageInfo::default()
        }
    }
}
