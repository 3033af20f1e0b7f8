//! A VHD that grows, open: look-ups on a table of atomics and on sector bitmaps, and the metadata pages it is made of.

use super::super::blocks::{Block, BlockFormat};
use super::super::{ImageFile, OpenHow};
use super::bitmaps::Bitmaps;
use super::footer::{FOOTER_BYTES, Footer, Footers, Kind};
use super::header::Header;
use super::layout::{BITMAP_PAGE_BYTES, BITMAP_PAGE_SPAN, BITMAPS, COPY, FREE, Layout, PLACES, TABLE, idx};
use super::locator;
use super::table;
use super::writer::Writer;
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::map::{
    BlockIndex, Change, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset, ImageInfo, ImageMap,
    Intent, Limits, MetaKey, MetaOp, Miss, PagePlace, Plan, PlanToken, Settled,
};
use std::sync::atomic::{AtomicU32, Ordering};
use uuid::Uuid;
use zerocopy::IntoBytes;

/// A dynamic or differencing VHD that is open.
#[derive(Debug)]
pub(super) struct VhdMap {
    pub(super) file: FileId,
    pub(super) layout: Layout,
    pub(super) is_diff: bool,
    footer: Footer,
    parent: Option<Uuid>,
    parent_names: Vec<String>,
    /// As the kernel has accepted it. Empty after an open for information only.
    pub(super) table: Box<[AtomicU32]>,
    pub(super) bitmaps: Bitmaps,
    /// Entries that name a place; kept only after an open for information only.
    counted: Option<u64>,
    /// `None` if opened for reading only.
    pub(super) writer: Option<Writer>,
    note: Option<&'static str>,
}

impl VhdMap {
    /// Opens the image. The table is verified whole; bitmaps are read when they are needed.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub(super) fn open(file: ImageFile<'_>, footers: Footers, how: OpenHow) -> Result<Self> {
        let ImageFile { id, source } = file;
        let header = Header::read(source, footers.best.header_at())?;
        let layout = Layout::new(&footers.best, &header, source.len())?;
        let is_diff = footers.best.kind()? == Kind::Diff;
        let names = locator::names(&header.locators, source)?.into_iter().chain(header.parent_name());
        let mut map = VhdMap {
            file: id,
            is_diff,
            parent: header.parent().filter(|_| is_diff),
            parent_names: if is_diff { names.collect() } else { Vec::new() },
            table: Box::default(),
            bitmaps: Bitmaps::new(&layout),
            counted: None,
            writer: None,
            note: footers.note(),
            footer: footers.best.clone(),
            layout,
        };
        if how.info_only {
            let mut counted = 0;
            table::for_each(source, &map.layout, |entry| counted += u64::from(entry != FREE))?;
            map.counted = Some(counted);
            return Ok(map);
        }
        let table = table::load(source, &map.layout)?;
        let used_end = table::used_end(&table, &map.layout, source.len())?;
        if !how.read_only {
            map.writer = Some(Writer::new(&map.layout, &table, used_end, &footers, source.len()));
        }
        map.table = table.into_iter().map(AtomicU32::new).collect();
        Ok(map)
    }

    /// Where the block's bitmap begins, its data behind it.
    pub(super) fn start_of(&self, block: u32) -> Option<u64> {
        let entry = self.table.get(idx(block))?.load(Ordering::Acquire);
        (entry != FREE).then(|| Layout::start_of(entry))
    }

    pub(super) fn bitmap_key(&self, block: u32, page: u64) -> MetaKey {
        let number = u64::from(block) * self.layout.bitmap_pages() + page;
        MetaKey::Page { table: BITMAPS, number }
    }

    /// What the part of one block at the start of `r` is, as far as one page of its bitmap tells.
    fn extent_at(&self, r: GuestRange) -> std::result::Result<Extent, Miss> {
        let block = self.layout.block_at(r.start()).ok_or(Miss::Fail(Failure::OutOfRange))?;
        if self.table.is_empty() {
            return Err(Miss::Fail(Failure::Unsupported));
        }
        let into = r.start().0 & (self.layout.block_bytes - 1);
        let len = r.len().min(self.layout.block_bytes - into);
        let Some(start) = self.start_of(block) else { return Ok(Extent { len, kind: ExtentKind::Parent }) };
        let key = self.bitmap_key(block, into / BITMAP_PAGE_SPAN);
        let MetaKey::Page { number, .. } = key else { unreachable!("a page") };
        let run = self.bitmaps.run(number, into % BITMAP_PAGE_SPAN, len).ok_or(Miss::NeedsPage(key))?;
        let data = HostOffset(start).plus(self.layout.bitmap_bytes + into);
        let kind =
            if run.there { ExtentKind::Data { file: self.file, off: data } } else { ExtentKind::Parent };
        Ok(Extent { len: run.len, kind })
    }

    /// The writer, its block and what becomes of it.
    fn planned(&self, change: Change) -> std::result::Result<Plan, Miss> {
        let writer = self.writer.as_ref().ok_or(Miss::Fail(Failure::ReadOnly))?;
        match change {
            Change::Write { part, beneath_zero } => {
                let block = self.layout.block_at(part.start()).ok_or(Miss::Fail(Failure::OutOfRange))?;
                writer.blocks.plan_write(self, u64::from(block), part, beneath_zero)
            }
            // There is no word for it: zeros are written.
            Change::Zero { .. } => Err(Miss::Fail(Failure::Unsupported)),
        }
    }

    fn compose_table(&self, number: u64, ops: &[MetaOp], out: &mut Vec<u8>) -> HostOffset {
        let page = u32::try_from(number).expect("a page of this table");
        let (first, end) = self.layout.entries_of(page);
        let base = out.len();
        let published = self.table.get(idx(first)..idx(end)).unwrap_or_default();
        out.extend(published.iter().flat_map(|e| e.load(Ordering::Acquire).to_be_bytes()));
        for op in ops {
            let Some((index, value)) = entry_in(op) else {
                debug_assert!(false, "not an entry: {op:?}");
                continue;
            };
            let at = base + idx(index.checked_sub(first).expect("the entry is of this page")) * 4;
            out[at..at + 4].copy_from_slice(&value.to_be_bytes());
        }
        self.layout.entry_at(first)
    }

    /// Where the page of a block's bitmap lies.
    fn bitmap_at(&self, number: u64) -> Option<HostOffset> {
        let pages = self.layout.bitmap_pages();
        let start = self.start_of(u32::try_from(number / pages).ok()?)?;
        HostOffset(start).checked_add(number % pages * BITMAP_PAGE_BYTES)
    }

    fn compose_page(&self, table: u8, number: u64, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<HostOffset> {
        if table == TABLE {
            return Ok(self.compose_table(number, ops, out));
        }
        if table == COPY {
            out.extend_from_slice(self.footer.as_bytes());
            return Ok(HostOffset(0));
        }
        // bitmaps only ever become whole
        out.resize(out.len() + idx(BITMAP_PAGE_BYTES as u32), 0xff);
        let at = match (table, &self.writer) {
            (PLACES, Some(writer)) => Some(writer.bitmap_at(&self.layout, number)),
            (BITMAPS, _) => self.bitmap_at(number),
            _ => None,
        };
        at.ok_or_else(|| Error::new(ErrorKind::Corrupt, "a bitmap of no block"))
    }
}

impl ImageMap for VhdMap {
    fn limits(&self) -> Limits {
        let Layout { disk_bytes: size_bytes, block_bytes, .. } = self.layout;
        Limits { size_bytes, block_bytes, is_diff: self.is_diff, data_alignment: 512 }
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        if !self.layout.disk().contains(r) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        if why == Intent::Overwrite && self.writer.is_none() {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        let extent = self.extent_at(r)?;
        if why == Intent::Overwrite && !self.may_overwrite(r.start(), &extent)? {
            return Err(Miss::NeedsPlan);
        }
        Ok(extent)
    }

    fn unit(&self, at: GuestOffset) -> GuestRange {
        self.layout.unit(self.layout.block_or_end(at))
    }

    fn claim_of(&self, at: GuestOffset) -> BlockIndex {
        self.layout.claim(at)
    }

    fn plan(&self, change: Change) -> std::result::Result<Plan, Miss> {
        let plan = self.planned(change)?;
        plan.assert_ordered();
        Ok(plan)
    }

    fn room(&self, urgent: bool) -> Option<Plan> {
        self.writer.as_ref()?.blocks.room(self, urgent)
    }

    fn settle(&self, token: PlanToken, how: Settled) {
        if let Some(writer) = &self.writer {
            writer.blocks.settle(self, token, how);
        }
    }

    fn must_write(&self, at: GuestOffset) -> bool {
        self.writer.as_ref().is_some_and(|w| w.blocks.doubts(u64::from(self.layout.block_or_end(at))))
    }

    fn has_page(&self, key: MetaKey) -> bool {
        matches!(key, MetaKey::Page { table: BITMAPS, number } if self.bitmaps.contains(number))
    }

    fn page_place(&self, key: MetaKey) -> std::result::Result<PagePlace, Failure> {
        let MetaKey::Page { table: BITMAPS, number } = key else { return Err(Failure::Corrupt) };
        let off = self.bitmap_at(number).ok_or(Failure::Corrupt)?;
        Ok(PagePlace { file: self.file, off, len: idx(BITMAP_PAGE_BYTES as u32) })
    }

    fn page_read(&self, key: MetaKey, bytes: &[u8]) -> std::result::Result<(), Failure> {
        let MetaKey::Page { table: BITMAPS, number } = key else { return Err(Failure::Corrupt) };
        self.bitmaps.take_in(number, bytes);
        Ok(())
    }

    fn compose(&self, key: MetaKey, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        let at = match (key, ops.last()) {
            (MetaKey::Page { table, number }, _) => self.compose_page(table, number, ops, out)?,
            (MetaKey::Header, Some(MetaOp::Count(sectors))) => {
                out.extend_from_slice(self.footer.as_bytes());
                HostOffset(Layout::start_of(*sectors))
            }
            _ => return Err(Error::new(ErrorKind::Corrupt, "a footer that is nowhere")),
        };
        Ok((self.file, at))
    }

    fn publish(&self, key: MetaKey, ops: &[MetaOp]) {
        match key {
            MetaKey::Page { table: TABLE, .. } => {
                for (block, value) in ops.iter().filter_map(entry_in) {
                    self.publish_entry(block, value);
                }
            }
            MetaKey::Page { table: BITMAPS, number } => self.bitmaps.set_whole(number),
            _ => {}
        }
    }

    fn begin(&self, _modification: Uuid) -> Plan {
        self.writer.as_ref().map_or_else(Plan::default, |w| w.begin(self))
    }

    fn end(&self) -> Plan {
        let plan = self.writer.as_ref().map_or_else(Plan::default, |w| w.end(self));
        plan.assert_ordered();
        plan
    }

    fn info(&self) -> ImageInfo {
        let used = self.table.iter().filter(|e| e.load(Ordering::Relaxed) != FREE).count();
        ImageInfo {
            format: "vhd",
            variant: if self.is_diff { "diff" } else { "dynamic" },
            virtual_size: self.layout.disk_bytes,
            block_size: Some(self.layout.block_bytes),
            allocated_blocks: Some(self.counted.unwrap_or(used as u64)),
            uuid: self.footer.id(),
            parent_uuid: self.parent,
            parent_names: self.parent_names.clone(),
            geometry: self.footer.geometry(),
            version: Some(self.footer.version()),
            notes: self.note.map(str::to_string).into_iter().collect(),
            ..ImageInfo::default()
        }
    }
}

impl VhdMap {
    /// Bytes can be changed in place only where the whole block is there: another's bits must not have to be set.
    fn may_overwrite(&self, at: GuestOffset, extent: &Extent) -> std::result::Result<bool, Miss> {
        if !matches!(extent.kind, ExtentKind::Data { .. }) || self.must_write(at) {
            return Ok(false);
        }
        Ok(!self.is_partly(u64::from(self.layout.block_or_end(at)))?)
    }

    /// A place we have prepared has a bitmap that says all is there.
    fn publish_entry(&self, block: u32, value: u32) {
        let prepared = self.writer.as_ref().is_some_and(|w| w.is_prepared(value));
        if value != FREE && prepared {
            for page in 0..self.layout.bitmap_pages() {
                self.bitmaps.set_whole(u64::from(block) * self.layout.bitmap_pages() + page);
            }
        }
        if let Some(entry) = self.table.get(idx(block)) {
            entry.store(value, Ordering::Release);
        }
    }

    /// The image's blocks as their common writer sees them.
    pub(super) fn as_block(&self, block: u32) -> Block {
        let at = |start| Block::At(HostOffset(start).plus(self.layout.bitmap_bytes));
        self.start_of(block).map_or(Block::Free, at)
    }
}

/// The entry that a change of the table concerns, and its new value.
fn entry_in(op: &MetaOp) -> Option<(u32, u32)> {
    let MetaOp::Entry { index, value, .. } = *op else { return None };
    Some((u32::try_from(index).ok()?, u32::try_from(value).ok()?))
}

const _: () = assert!(FOOTER_BYTES == BITMAP_PAGE_BYTES, "a footer is overwritten by one page of a bitmap");
