//! A VDI that is open: look-ups on a table of atomics, and the metadata pages it is made of.

use super::super::OpenHow;
use super::header::{Header, Kind};
use super::layout::{Entry, Layout, idx};
use super::table;
use super::writer::Writer;
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::map::{
    BlockIndex, ByteSource, Change, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset,
    ImageInfo, ImageMap, Intent, Limits, MetaKey, MetaOp, Miss, Plan, PlanToken, Settled, Step,
};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use uuid::Uuid;

/// A VDI that is open.
#[derive(Debug)]
pub struct VdiMap {
    pub(super) file: FileId,
    pub(super) layout: Layout,
    is_diff: bool,
    /// As the kernel has accepted it.
    header: Mutex<Header>,
    /// As the kernel has accepted it. Empty after an open for information only.
    pub(super) table: Box<[AtomicU32]>,
    /// Entries that name a place; kept only after an open for information only.
    counted: Option<u64>,
    /// `None` if opened for reading only.
    writer: Option<Writer>,
}

impl VdiMap {
    /// Opens the image. Everything that reading and writing rely on is verified; the count of allocated blocks
    /// is not relied on (rule O3), but a count no image can have is refused.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub fn open(source: &dyn ByteSource, file: FileId, how: OpenHow) -> Result<Self> {
        let header = Header::read(source)?;
        let layout = header.layout(source.len())?;
        if let Some(first) = header.broken_rules(&layout).into_iter().next() {
            return Err(Error::new(ErrorKind::Corrupt, first.what));
        }
        if how.info_only {
            return Self::open_for_info(source, file, header, layout);
        }
        let table = table::load(source, &layout)?;
        let used = table::used_places(&table, &layout, source.len())?;
        let fixed = header.kind() == Kind::Fixed;
        let is_diff = header.is_diff();
        let writer = (!how.read_only).then(|| Writer::new(&layout, fixed, &used, source.len()));
        Ok(VdiMap { file, layout, is_diff, header: Mutex::new(header), table, counted: None, writer })
    }

    /// Opens it for reading, whatever its table says of places that are shared, or lie behind the file's end.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(in super::super) fn open_unchecked(source: &dyn ByteSource, file: FileId) -> Result<Self> {
        let header = Header::read(source)?;
        let layout = header.layout(source.len())?;
        if let Some(first) = header.broken_rules(&layout).into_iter().next() {
            return Err(Error::new(ErrorKind::Corrupt, first.what));
        }
        let table = table::load(source, &layout)?;
        let is_diff = header.is_diff();
        let header = Mutex::new(header);
        Ok(VdiMap { file, layout, is_diff, header, table, counted: None, writer: None })
    }

    fn open_for_info(source: &dyn ByteSource, file: FileId, header: Header, layout: Layout) -> Result<Self> {
        let mut counted = 0;
        table::for_each(source, &layout, |_, value| {
            counted += u64::from(matches!(Entry::of(value), Entry::At(_)));
        })?;
        let (is_diff, header) = (header.is_diff(), Mutex::new(header));
        Ok(VdiMap {
            file,
            layout,
            is_diff,
            header,
            table: Box::default(),
            counted: Some(counted),
            writer: None,
        })
    }

    pub(super) fn header(&self) -> std::sync::MutexGuard<'_, Header> {
        self.header.lock().expect("header lock")
    }

    pub(super) fn entry(&self, block: u32) -> Option<Entry> {
        self.table.get(idx(block)).map(|e| Entry::of(e.load(Ordering::Acquire)))
    }

    /// What the part of one block at the start of `r` is.
    fn extent_at(&self, r: GuestRange) -> std::result::Result<Extent, Miss> {
        let block = self.layout.block_at(r.start()).ok_or(Miss::Fail(Failure::OutOfRange))?;
        let entry = self.entry(block).ok_or(Miss::Fail(Failure::Unsupported))?;
        let into = r.start().0 & (self.layout.block_bytes - 1);
        let len = r.len().min(self.layout.block_bytes - into);
        let kind = match entry {
            Entry::Free => ExtentKind::Parent,
            Entry::Zero => ExtentKind::Zero,
            Entry::At(place) => {
                ExtentKind::Data { file: self.file, off: self.layout.data_of(place).plus(into) }
            }
        };
        Ok(Extent { len, kind })
    }

    fn variant(header: &Header) -> &'static str {
        match header.kind() {
            Kind::Dynamic if header.zero_expand() => "zero-expand",
            Kind::Dynamic => "dynamic",
            Kind::Fixed => "fixed",
            Kind::Undo => "undo",
            Kind::Diff => "diff",
        }
    }

    fn apply_to_header(header: &mut Header, ops: &[MetaOp]) {
        for op in ops {
            match *op {
                MetaOp::Count(count) => header.set_allocated(count),
                MetaOp::Modification(uuid) => header.set_modification(uuid),
                MetaOp::Entry { .. } | MetaOp::InUse(_) => {
                    debug_assert!(false, "no change of a VDI's header: {op:?}");
                }
            }
        }
    }

    fn compose_page(&self, page: u32, ops: &[MetaOp], out: &mut Vec<u8>) -> HostOffset {
        let (first, end) = self.layout.entries_of(page);
        let base = out.len();
        let published = self.table.get(idx(first)..idx(end)).unwrap_or_default();
        out.extend(published.iter().flat_map(|e| e.load(Ordering::Acquire).to_le_bytes()));
        for op in ops {
            let Some((index, value)) = entry_in(op) else {
                debug_assert!(false, "not an entry: {op:?}");
                continue;
            };
            let at = base + idx(index.checked_sub(first).expect("the entry is of this page")) * 4;
            out[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        self.layout.entry_at(first)
    }

    /// Entries that name a place, counted from the table itself.
    fn allocated_blocks(&self) -> u64 {
        let at = |e: &&AtomicU32| matches!(Entry::of(e.load(Ordering::Relaxed)), Entry::At(_));
        let in_memory = self.table.iter().filter(at).count();
        self.counted.unwrap_or(u64::try_from(in_memory).expect("a count of memory fits"))
    }
}

impl ImageMap for VdiMap {
    fn limits(&self) -> Limits {
        let Layout { disk_bytes: size_bytes, block_bytes, .. } = self.layout;
        Limits { size_bytes, block_bytes, is_diff: self.is_diff, data_alignment: self.layout.alignment() }
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        if !self.layout.disk().contains(r) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        if why == Intent::Overwrite && self.writer.is_none() {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        let extent = self.extent_at(r)?;
        let allocated = matches!(extent.kind, ExtentKind::Data { .. });
        if why == Intent::Overwrite && (!allocated || self.must_write(r.start())) {
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
        let writer = self.writer.as_ref().ok_or(Miss::Fail(Failure::ReadOnly))?;
        let at = match change {
            Change::Write { part, .. } => part.start(),
            Change::Zero { unit } => unit.start(),
        };
        let block = self.layout.block_at(at).ok_or(Miss::Fail(Failure::OutOfRange))?;
        let plan = match change {
            Change::Write { part, beneath_zero } => {
                writer.blocks.plan_write(self, u64::from(block), part, beneath_zero)?
            }
            Change::Zero { .. } => writer.blocks.plan_zero(self, u64::from(block))?,
        };
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

    fn compose(&self, key: MetaKey, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        let at = match key {
            MetaKey::Header => {
                let mut header = self.header().clone();
                Self::apply_to_header(&mut header, ops);
                header.write_to(out);
                HostOffset(0)
            }
            MetaKey::Page { number, .. } => {
                let page = u32::try_from(number).expect("a page of this table");
                self.compose_page(page, ops, out)
            }
        };
        Ok((self.file, at))
    }

    fn publish(&self, key: MetaKey, ops: &[MetaOp]) {
        if key == MetaKey::Header {
            return Self::apply_to_header(&mut self.header(), ops);
        }
        for op in ops {
            if let Some((index, value)) = entry_in(op)
                && let Some(entry) = self.table.get(idx(index))
            {
                entry.store(value, Ordering::Release);
            }
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

    fn info(&self) -> ImageInfo {
        let header = self.header();
        let some = |u: Uuid| (!u.is_nil()).then_some(u);
        let comment = Some(header.comment()).filter(|c| !c.is_empty());
        ImageInfo {
            format: "vdi",
            variant: Self::variant(&header),
            virtual_size: self.layout.disk_bytes,
            block_size: Some(self.layout.block_bytes),
            allocated_blocks: Some(self.allocated_blocks()),
            uuid: some(header.uuid()),
            modification_uuid: some(header.modification()),
            parent_uuid: some(header.parent()),
            parent_modification_uuid: some(header.parent_modification()),
            comment,
            geometry: header.geometry(),
            logical_geometry: header.geometry(),
            version: Some(header.version()),
            ..ImageInfo::default()
        }
    }
}

/// A change of one entry.
pub(super) fn set_entry(layout: &Layout, block: u32, value: u32) -> Step {
    let pointer = matches!(Entry::of(value), Entry::At(_));
    let op = MetaOp::Entry { index: u64::from(block), value: u64::from(value), pointer };
    Step::Meta { key: layout.page_of(block), op }
}

/// The entry a change made by [`set_entry`] concerns, and its new value.
fn entry_in(op: &MetaOp) -> Option<(u32, u32)> {
    let MetaOp::Entry { index, value, .. } = *op else { return None };
    Some((u32::try_from(index).ok()?, u32::try_from(value).ok()?))
}

/// A change of the header.
pub(super) fn set_header(op: MetaOp) -> Step {
    Step::Meta { key: MetaKey::Header, op }
}
