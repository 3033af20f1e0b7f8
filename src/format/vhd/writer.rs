//! What changes a VHD, beyond what all formats with blocks have in common: entries, bitmaps, the footer that moves, and
//! the plans at both ends of a session, whose orders docs/formats/vhd.md explains.

use super::super::blocks::{Block, BlockFormat, BlockWriter, Rest, Steps};
use super::footer::{FOOTER_BYTES, Footers};
use super::layout::{BITMAP_PAGE_BYTES, COPY, END_OF_SECTORS, FREE, Layout, PLACES, idx};
use super::map::VhdMap;
use super::table::{end, entry_of, fillings};
use crate::error::Failure;
use crate::limits::{POOL_STEP_BYTES, SECTOR_BYTES};
use crate::map::{FileId, GuestRange, HostBlock, HostBlocks, HostOffset, MetaKey, MetaOp, Miss, Plan, Step};
use smallvec::smallvec;
use std::sync::atomic::Ordering;

/// The part of an open VHD that is there only if it may be written.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) blocks: BlockWriter,
    /// Where our places begin: behind everything that was there.
    base: HostOffset,
    /// Bytes the file had when it was opened.
    opened_bytes: u64,
    /// What stands at both ends of the file is as it should be.
    end_is_good: bool,
    copy_is_good: bool,
}

impl Writer {
    pub(super) fn new(
        layout: &Layout,
        table: &[u32],
        used_end: u64,
        footers: &Footers,
        opened_bytes: u64,
    ) -> Self {
        let base = used_end.next_multiple_of(SECTOR_BYTES);
        let free = table.iter().filter(|e| **e == FREE).count() as u64;
        let reachable = END_OF_SECTORS.saturating_sub(base) / layout.stride();
        let most = u32::try_from(free.min(reachable)).expect("no more than there are entries");
        let step = u32::try_from((POOL_STEP_BYTES / layout.stride()).max(1)).expect("less than 64 Mi");
        Writer {
            blocks: BlockWriter::new(HostBlocks::new(0, most, step, |_| false), false),
            base: HostOffset(base),
            opened_bytes,
            end_is_good: footers.end_is_good,
            copy_is_good: footers.copy_is_good,
        }
    }

    fn start_of(&self, layout: &Layout, place: u32) -> HostOffset {
        self.base.plus(u64::from(place) * layout.stride())
    }

    /// End of so many places, where the footer goes.
    pub(super) fn end_of(&self, layout: &Layout, places: u32) -> HostOffset {
        self.start_of(layout, places)
    }

    /// Where a page of a place's bitmap is.
    pub(super) fn bitmap_at(&self, layout: &Layout, number: u64) -> HostOffset {
        let place = u32::try_from(number / layout.bitmap_pages()).expect("the number of a place");
        self.start_of(layout, place).plus(number % layout.bitmap_pages() * BITMAP_PAGE_BYTES)
    }

    /// The entry names one of our places.
    pub(super) fn is_prepared(&self, entry: u32) -> bool {
        entry != FREE && Layout::start_of(entry) >= self.base.0
    }

    /// Once, before the first change. What was read may not be durable yet, so a sync comes first; then the tail nobody
    /// names is cut off, so that what an extension adds there reads as zeros. The footer is put behind the last block
    /// before, and the copy at the beginning put right before that: there always is a good one.
    pub(super) fn begin(&self, map: &VhdMap) -> Plan {
        self.blocks.begin(|| {
            let (file, end) = (map.file, self.base.plus(FOOTER_BYTES));
            let mut steps = Steps::new();
            if !self.copy_is_good {
                steps.push(set(MetaKey::Page { table: COPY, number: 0 }, MetaOp::Count(0)));
            }
            steps.push(Step::Sync { file });
            if self.opened_bytes < self.base.0 {
                steps.push(Step::Extend { file, from: HostOffset(self.opened_bytes), to: self.base });
                steps.push(Step::Barrier);
            }
            if self.opened_bytes != end.0 || !self.end_is_good {
                steps.push(footer_at(self.base));
                steps.push(Step::Barrier);
                steps.push(Step::Truncate { file, to: end });
            }
            steps
        })
    }

    /// At a clean close: entries in doubt, blocks moved into holes, the footer behind the last of them.
    pub(super) fn end(&self, map: &VhdMap) -> Plan {
        let Some(Rest { doubtful, stretched }) = self.blocks.finish() else { return Plan::default() };
        let mut plan = Plan::default();
        for block in doubtful.into_iter().map(number) {
            let value = map.table.get(idx(block)).map_or(FREE, |e| e.load(Ordering::Acquire));
            plan.steps.push(set_entry(&map.layout, block, value));
        }
        self.make_dense(map, stretched, &mut plan);
        plan
    }

    fn make_dense(&self, map: &VhdMap, stretched: bool, plan: &mut Plan) {
        let (file, layout) = (map.file, &map.layout);
        let mut table: Vec<u32> = map.table.iter().map(|e| e.load(Ordering::Acquire)).collect();
        let moves = fillings(&table, layout);
        let is_at = self.end_of(layout, self.blocks.places_end());
        if moves.is_empty() && is_at.0 == end(&table, layout) && !stretched {
            return;
        }
        plan.steps.push(Step::Sync { file });
        if !moves.is_empty() {
            plan.steps.extend(moves.iter().map(|(p, to)| Step::Move {
                file,
                from: HostOffset(p.start),
                to: HostOffset(*to),
                len: layout.stride(),
            }));
            plan.steps.push(Step::Sync { file });
            for (p, to) in moves {
                table[idx(p.block)] = entry_of(to);
                plan.steps.push(set_entry(layout, p.block, entry_of(to)));
            }
            plan.steps.push(Step::Sync { file });
        }
        let end = HostOffset(end(&table, layout));
        plan.steps.extend([footer_at(end), Step::Barrier]);
        plan.steps.push(Step::Truncate { file, to: end.plus(FOOTER_BYTES) });
    }
}

impl BlockFormat for VhdMap {
    fn file(&self) -> FileId {
        self.file
    }

    fn block_bytes(&self) -> u64 {
        self.layout.block_bytes
    }

    fn unit(&self, block: u64) -> GuestRange {
        self.layout.unit(number(block))
    }

    fn block(&self, block: u64) -> Result<Block, Miss> {
        Ok(self.as_block(number(block)))
    }

    fn is_partly(&self, block: u64) -> Result<bool, Miss> {
        let (block, len) = (number(block), self.layout.block_bytes);
        for page in 0..self.layout.bitmap_pages() {
            let key = self.bitmap_key(block, page);
            let MetaKey::Page { number, .. } = key else { unreachable!("a page") };
            if self.bitmaps.is_whole(number) {
                continue;
            }
            // known not to be whole, or not known
            return match self.bitmaps.run(number, 0, len) {
                Some(_) => Ok(!self.bitmaps.is_whole(number)),
                None => Err(Miss::NeedsPage(key)),
            };
        }
        Ok(false)
    }

    fn data_of(&self, place: HostBlock) -> HostOffset {
        let writer = self.writer.as_ref().expect("only writers have places");
        writer.start_of(&self.layout, place.0).plus(self.layout.bitmap_bytes)
    }

    fn end_of(&self, places: u32) -> HostOffset {
        self.writer.as_ref().expect("only writers have places").end_of(&self.layout, places)
    }

    fn change(&self, block: u64, now: Block) -> Result<Steps, Miss> {
        let block = number(block);
        let Block::At(data) = now else { return Err(Miss::Fail(Failure::Unsupported)) };
        let start = HostOffset(data.0 - self.layout.bitmap_bytes);
        let mut steps = Steps::new();
        if !self.writer.as_ref().is_some_and(|w| w.is_prepared(entry_of(start.0))) {
            for page in 0..self.layout.bitmap_pages() {
                let key = self.bitmap_key(block, page);
                if matches!(key, MetaKey::Page { number, .. } if !self.bitmaps.is_whole(number)) {
                    steps.push(set(key, MetaOp::Entry { index: 0, value: u64::MAX, pointer: true }));
                }
            }
        }
        steps.push(set_entry(&self.layout, block, entry_of(start.0)));
        Ok(steps)
    }

    /// The bitmaps of the new places say that all is there, and the footer stands behind them: over the bitmap of the first
    /// stood the footer before.
    fn announce(&self, places: u32) -> Steps {
        let from = self.writer.as_ref().map_or(places, |w| w.blocks.places_end());
        let pages = self.layout.bitmap_pages();
        let mut steps: Steps = smallvec![Step::Barrier, footer_at(BlockFormat::end_of(self, places))];
        steps.extend((u64::from(from) * pages..u64::from(places) * pages).map(|number| {
            let key = MetaKey::Page { table: PLACES, number };
            set(key, MetaOp::Entry { index: number, value: u64::MAX, pointer: false })
        }));
        steps
    }
}

/// Blocks of a VHD have 32-bit numbers.
fn number(block: u64) -> u32 {
    u32::try_from(block).unwrap_or(u32::MAX)
}

/// The footer at the end of the file. What counts here are the sectors before it.
fn footer_at(at: HostOffset) -> Step {
    set(MetaKey::Header, MetaOp::Count(entry_of(at.0)))
}

fn set_entry(layout: &Layout, block: u32, value: u32) -> Step {
    let op = MetaOp::Entry { index: u64::from(block), value: u64::from(value), pointer: value != FREE };
    set(layout.page_of(block), op)
}

fn set(key: MetaKey, op: MetaOp) -> Step {
    Step::Meta { key, op }
}
