//! What changes a VDI, beyond what all formats with blocks have in common: its entries and its count, and the plans at
//! both ends of a session, whose orders docs/formats/vdi.md explains.

use super::super::blocks::{Block, BlockFormat, BlockWriter, Rest, Steps};
use super::dense;
use super::layout::{Entry, FREE, Layout, ZERO, idx};
use super::map::{VdiMap, set_entry, set_header};
use super::table::{Used, survey};
use crate::error::Failure;
use crate::limits::POOL_STEP_BYTES;
use crate::map::{FileId, GuestRange, HostBlock, HostBlocks, HostOffset, MetaOp, Miss, Plan, Step};
use smallvec::smallvec;
use std::sync::atomic::Ordering;
use uuid::Uuid;

/// The part of an open VDI that is there only if it may be written.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) blocks: BlockWriter,
    /// Bytes the file had when it was opened.
    opened_bytes: u64,
}

impl BlockFormat for VdiMap {
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
        Ok(match self.entry(number(block)).ok_or(Miss::Fail(Failure::OutOfRange))? {
            Entry::Free => Block::Free,
            Entry::Zero => Block::Zero,
            Entry::At(place) => Block::At(self.layout.data_of(place)),
        })
    }

    fn data_of(&self, place: HostBlock) -> HostOffset {
        self.layout.data_of(place)
    }

    fn end_of(&self, places: u32) -> HostOffset {
        self.layout.end_of(places)
    }

    fn change(&self, block: u64, now: Block) -> Result<Steps, Miss> {
        let value = match now {
            Block::Free => FREE,
            Block::Zero => ZERO,
            Block::At(at) => self.layout.place_of(at).0,
        };
        Ok(smallvec![set_entry(&self.layout, number(block), value)])
    }

    fn announce(&self, places: u32) -> Steps {
        smallvec![set_header(MetaOp::Count(places))]
    }
}

/// Blocks of a VDI have 32-bit numbers.
fn number(block: u64) -> u32 {
    u32::try_from(block).unwrap_or(u32::MAX)
}

impl Writer {
    pub(super) fn new(layout: &Layout, fixed: bool, used: &Used, opened_bytes: u64) -> Self {
        let end = if fixed { layout.blocks } else { used.high_water };
        let step = (POOL_STEP_BYTES / layout.stride()).max(1);
        let step = u32::try_from(step).expect("64 MiB have fewer blocks than 2^32");
        let places = HostBlocks::new(end, layout.blocks, step, |p| used.places.contains(p));
        Writer { blocks: BlockWriter::new(places, fixed), opened_bytes }
    }

    /// Once, before the first change. The new modification UUID tells children and caches that the contents
    /// are about to differ. The count is above every place in use, so that holes are ours to fill; it does not
    /// fall yet, for what we read may not be durable. The tail nobody names is cut off behind the sync, so that
    /// what an extension adds there reads as zeros.
    pub(super) fn begin(&self, map: &VdiMap, modification: Uuid) -> Plan {
        self.blocks.begin(|| {
            let (file, places) = (map.file, self.blocks.places_end());
            let mut steps: Steps = smallvec![
                set_header(MetaOp::Modification(modification)),
                set_header(MetaOp::Count(places.max(map.header().allocated()))),
                Step::Sync { file },
            ];
            let (have, end) = (HostOffset(self.opened_bytes), map.layout.end_of(places));
            if !self.blocks.is_fixed() && have > end {
                steps.push(Step::Truncate { file, to: end });
            } else if !self.blocks.is_fixed() && have < end {
                steps.push(Step::Extend { file, from: have, to: end });
            }
            steps
        })
    }

    /// At a clean close. Nothing is reused before what named it is durably gone, and the count falls only when
    /// no entry on disk can be above it.
    pub(super) fn end(&self, map: &VdiMap) -> Plan {
        let Some(Rest { doubtful, stretched, .. }) = self.blocks.finish() else { return Plan::default() };
        let mut plan = Plan::default();
        for block in doubtful.into_iter().map(number) {
            let value = map.table[idx(block)].load(Ordering::Acquire);
            plan.steps.push(set_entry(&map.layout, block, value));
        }
        if !self.blocks.is_fixed() {
            self.make_dense(map, stretched, &mut plan);
        }
        plan
    }

    fn make_dense(&self, map: &VdiMap, stretched: bool, plan: &mut Plan) {
        let (file, layout) = (map.file, &map.layout);
        let entries = || map.table.iter().map(|e| e.load(Ordering::Acquire));
        let used = survey(entries(), layout, u64::MAX, |f| debug_assert!(false, "{f:?}"));
        let count = u32::try_from(used.places.count()).expect("places are 32-bit numbers");
        let moves = dense::relocations(entries(), &used);
        let slack = self.blocks.places_end() > count || stretched;
        if moves.is_empty() && !slack && map.header().allocated() == count {
            return;
        }
        plan.steps.push(Step::Sync { file });
        if !moves.is_empty() {
            plan.steps.extend(moves.iter().map(|m| Step::Move {
                file,
                from: layout.start_of(m.from.0),
                to: layout.start_of(m.to.0),
                len: layout.stride(),
            }));
            plan.steps.push(Step::Sync { file });
            plan.steps.extend(moves.iter().map(|m| set_entry(layout, m.block, m.to.0)));
            plan.steps.push(Step::Sync { file });
        }
        plan.steps.push(set_header(MetaOp::Count(count)));
        plan.steps.push(Step::Barrier);
        plan.steps.push(Step::Truncate { file, to: layout.end_of(count) });
    }
}
