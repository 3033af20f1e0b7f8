//! An image that is open: look-ups on header and table held as atomics, and the pages they are made of.

use super::super::OpenHow;
use super::super::blocks::{Block, BlockFormat, BlockWriter, Rest, Steps};
use super::header::{Header, IN_USE, IN_USE_WORD};
use super::layout::{Layout, idx};
use super::table::{self, Used};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::{META_PAGE_BYTES, POOL_STEP_BYTES};
use crate::map::{
    BlockIndex, ByteSource, Change, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostBlock,
    HostBlocks, HostOffset, ImageInfo, ImageMap, Intent, Limits, MetaKey, MetaOp, Miss, Plan, PlanToken,
    Settled, Step,
};
use smallvec::smallvec;
use std::sync::atomic::{AtomicU32, Ordering};
use uuid::Uuid;

/// A Parallels image that is open.
#[derive(Debug)]
pub struct ParallelsMap {
    file: FileId,
    layout: Layout,
    extended: bool,
    /// Header and table as the kernel has accepted them; without the table after an open for information only.
    words: Box<[AtomicU32]>,
    allocated: u64,
    /// `None` if opened for reading only.
    writer: Option<BlockWriter>,
    /// Bytes the file had when it was opened.
    opened_bytes: u64,
}

impl ParallelsMap {
    /// Opens the image. Everything that reading and writing rely on is verified.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub fn open(source: &dyn ByteSource, file: FileId, how: OpenHow) -> Result<Self> {
        let header = Header::read(source)?;
        let layout = header.layout(source.len())?;
        let writable = !how.read_only && !how.info_only;
        if writable && header.has_extension {
            let what = "has a format extension (dirty bitmaps), which a change would make wrong";
            return Err(Error::new(ErrorKind::Unsupported, what).hint("open it read-only"));
        }
        let words = table::words(source, &layout)?;
        let used = table::used_places(&words, &layout, source.len())?;
        let writer = writable.then(|| BlockWriter::new(places(&layout, &used), false));
        let allocated = used.blocks;
        let words =
            if how.info_only { Box::default() } else { words.into_iter().map(AtomicU32::new).collect() };
        let opened_bytes = source.len();
        Ok(ParallelsMap { file, layout, extended: header.extended, words, allocated, writer, opened_bytes })
    }

    fn word(&self, n: u32) -> Option<u32> {
        self.words.get(idx(n)).map(|w| w.load(Ordering::Acquire))
    }

    fn place(&self, block: u64) -> std::result::Result<Option<HostOffset>, Miss> {
        let block = u32::try_from(block).ok().filter(|b| *b < self.layout.blocks);
        let block = block.ok_or(Miss::Fail(Failure::OutOfRange))?;
        let value = self.word(self.layout.word_of(block)).ok_or(Miss::Fail(Failure::Unsupported))?;
        Ok(self.layout.place_named(value))
    }

    /// What the part of one block at the start of `r` is.
    fn extent_at(&self, r: GuestRange) -> std::result::Result<Extent, Miss> {
        let into = r.start().0 % self.layout.cluster_bytes;
        let len = r.len().min(self.layout.cluster_bytes - into);
        let kind = match self.place(r.start().0 / self.layout.cluster_bytes)? {
            None => ExtentKind::Parent,
            Some(at) => ExtentKind::Data { file: self.file, off: at.plus(into) },
        };
        Ok(Extent { len, kind })
    }

    /// A change of one word.
    fn set(word: u32, value: u32, pointer: bool) -> Step {
        let op = MetaOp::Entry { index: u64::from(word), value: u64::from(value), pointer };
        Step::Meta { key: Layout::page_of(word), op }
    }

    fn compose_page(&self, page: u32, ops: &[MetaOp], out: &mut Vec<u8>) -> HostOffset {
        let (first, end) = self.layout.words_of(page);
        let base = out.len();
        let published = self.words.get(idx(first)..idx(end)).unwrap_or_default();
        out.extend(published.iter().flat_map(|w| w.load(Ordering::Acquire).to_le_bytes()));
        for op in ops {
            let (word, value) = word_in(op);
            let at = base + idx(word.checked_sub(first).expect("the word is of this page")) * 4;
            out[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        HostOffset(u64::from(page) * META_PAGE_BYTES)
    }
}

/// The word a change made by [`ParallelsMap::set`] concerns, and its new value.
fn word_in(op: &MetaOp) -> (u32, u32) {
    let MetaOp::Entry { index, value, .. } = *op else { unreachable!("all changes are of words: {op:?}") };
    let fits = |n: u64| u32::try_from(n).expect("words have 32 bits");
    (fits(index), fits(value))
}

/// Where new blocks can go. Holes are filled where the image is not far larger than its table: what a stranger's file has between its
/// blocks is not worth the memory.
fn places(layout: &Layout, used: &Used) -> HostBlocks {
    let end = used.high_water;
    let max = end.saturating_add(layout.blocks).min(layout.most_places()).max(end);
    let step = (POOL_STEP_BYTES / layout.cluster_bytes).max(1);
    let step = u32::try_from(step).expect("64 MiB have fewer clusters than 2^32");
    let few_holes = u64::from(end) <= 4 * u64::from(layout.blocks) + 1024;
    if few_holes {
        HostBlocks::new(end, max, step, |p| used.places.contains(&p))
    } else {
        HostBlocks::behind(end, max, step)
    }
}

impl BlockFormat for ParallelsMap {
    fn file(&self) -> FileId {
        self.file
    }

    fn block_bytes(&self) -> u64 {
        self.layout.cluster_bytes
    }

    fn unit(&self, block: u64) -> GuestRange {
        self.layout.unit(block)
    }

    fn block(&self, block: u64) -> std::result::Result<Block, Miss> {
        Ok(self.place(block)?.map_or(Block::Free, Block::At))
    }

    fn data_of(&self, place: HostBlock) -> HostOffset {
        self.layout.place_at(place)
    }

    fn end_of(&self, places: u32) -> HostOffset {
        self.layout.end_of(places)
    }

    fn change(&self, block: u64, now: Block) -> std::result::Result<Steps, Miss> {
        let block = u32::try_from(block).map_err(|_| Miss::Fail(Failure::OutOfRange))?;
        let (value, pointer) = match now {
            Block::Free => (0, false),
            Block::Zero => return Err(Miss::Fail(Failure::Unsupported)),
            Block::At(at) => (self.layout.value_for(at), true),
        };
        Ok(smallvec![Self::set(self.layout.word_of(block), value, pointer)])
    }

    fn announce(&self, _places: u32) -> Steps {
        Steps::new()
    }
}

impl ImageMap for ParallelsMap {
    fn limits(&self) -> Limits {
        let Layout { disk_bytes: size_bytes, cluster_bytes: block_bytes, .. } = self.layout;
        // The format has no word for it: whoever names a parent gets a diff.
        Limits { size_bytes, block_bytes, is_diff: true, data_alignment: self.layout.alignment() }
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
        self.layout.unit(u64::from(self.layout.block_at(at)))
    }

    fn claim_of(&self, at: GuestOffset) -> BlockIndex {
        self.layout.claim(at)
    }

    fn plan(&self, change: Change) -> std::result::Result<Plan, Miss> {
        let writer = self.writer.as_ref().ok_or(Miss::Fail(Failure::ReadOnly))?;
        let plan = match change {
            Change::Write { part, beneath_zero } => {
                let block = u64::from(self.layout.block_at(part.start()));
                writer.plan_write(self, block, part, beneath_zero)?
            }
            Change::Zero { unit } => writer.plan_zero(self, u64::from(self.layout.block_at(unit.start())))?,
        };
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
        self.writer.as_ref().is_some_and(|w| w.doubts(u64::from(self.layout.block_at(at))))
    }

    fn compose(&self, key: MetaKey, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        let MetaKey::Page { number, .. } = key else { unreachable!("the header is in the first page") };
        let page = u32::try_from(number).expect("a page of this table");
        Ok((self.file, self.compose_page(page, ops, out)))
    }

    fn publish(&self, _key: MetaKey, ops: &[MetaOp]) {
        for op in ops {
            let (word, value) = word_in(op);
            if let Some(w) = self.words.get(idx(word)) {
                w.store(value, Ordering::Release);
            }
        }
    }

    /// The mark first, and behind its sync the tail that no entry names is cut off, so that what an extension adds there reads
    /// as zeros.
    fn begin(&self, _modification: Uuid) -> Plan {
        let Some(writer) = &self.writer else { return Plan::default() };
        writer.begin(|| {
            let file = self.file;
            let mut steps: Steps = smallvec![Self::set(IN_USE_WORD, IN_USE, false), Step::Sync { file }];
            let (have, end) = (HostOffset(self.opened_bytes), self.layout.end_of(writer.places_end()));
            if have > end {
                steps.push(Step::Truncate { file, to: end });
            } else if have < end {
                steps.push(Step::Extend { file, from: have, to: end });
            }
            steps
        })
    }

    /// What is in doubt is written again, the file is cut behind the last block, and the mark is taken off.
    fn end(&self) -> Plan {
        let Some(Rest { doubtful, stretched, .. }) = self.writer.as_ref().and_then(BlockWriter::finish)
        else {
            return Plan::default();
        };
        let (file, layout) = (self.file, &self.layout);
        let words = || self.words.iter().map(|w| w.load(Ordering::Acquire));
        let used = table::survey(words(), layout, u64::MAX, |f| debug_assert!(false, "{f:?}"));
        let mut plan = Plan::default();
        for block in doubtful {
            let word = layout.word_of(u32::try_from(block).expect("a block of this disk"));
            let value = self.word(word).expect("a word of the table");
            plan.steps.push(Self::set(word, value, value != 0));
        }
        // Before the sync the disk may still name what is cut off, or miss what the mark vouches for.
        plan.steps.push(Step::Sync { file });
        let slack = self.writer.as_ref().is_some_and(|w| w.places_end() > used.high_water) || stretched;
        if slack {
            plan.steps.push(Step::Truncate { file, to: layout.end_of(used.high_water) });
        }
        plan.steps.push(Self::set(IN_USE_WORD, 0, false));
        plan.assert_ordered();
        plan
    }

    fn info(&self) -> ImageInfo {
        ImageInfo {
            format: "parallels",
            variant: "dynamic",
            virtual_size: self.layout.disk_bytes,
            block_size: Some(self.layout.cluster_bytes),
            allocated_blocks: Some(self.allocated_now()),
            version: Some(if self.extended { "2 (extended)" } else { "2" }.to_string()),
            ..ImageInfo::default()
        }
    }
}

impl ParallelsMap {
    /// Entries that name a place.
    fn allocated_now(&self) -> u64 {
        if self.words.is_empty() {
            return self.allocated;
        }
        let first = self.layout.word_of(0);
        let entries = self.words.iter().skip(idx(first)).take(idx(self.layout.blocks));
        entries.filter(|w| w.load(Ordering::Relaxed) != 0).map(|_| 1).sum()
    }
}
