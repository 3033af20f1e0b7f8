//! What changes a VHDX, beyond what all formats with blocks have in common: entries that go through the log, headers, and the
//! plans at both ends of a session. docs/formats/vhdx.md explains the orders.

use super::super::blocks::{Block, BlockFormat, BlockWriter, Rest, Steps};
use super::bat::{Entry, Layout};
use super::header::{Header, Headers, Ids};
use super::journal::Journal;
use super::map::{Parts, VhdxMap};
use super::place::{MIB, Region};
use super::replayed::Patches;
use super::{corrupt, unsupported};
use crate::error::{self, Error, ErrorKind, Failure};
use crate::limits::{POOL_STEP_BYTES, TABLE_PIECE_BYTES};
use crate::map::{
    Change, FileId, GuestRange, HostBlock, HostBlocks, HostOffset, MetaKey, MetaOp, Miss, Plan, PlanToken,
    Settled, Step,
};
use crate::probe::sabotage::{Sabotage, is_broken};
use smallvec::smallvec;
use std::collections::{BTreeMap, HashSet};
use std::sync::Mutex;
use uuid::Uuid;
use zerocopy::IntoBytes;

/// Keys of pages: the table in its place, what a log left by others says, the two headers.
const TABLE: u8 = 2;
const REPLAY: u8 = 3;
const HEADERS: u8 = 4;
/// Entries of the log follow each other, so they are all one page: what comes while one is written rides in the next.
const LOG: MetaKey = MetaKey::Page { table: 5, number: 0 };
/// The token of a checkpoint. The common writer counts its own from 0 on.
const CHECKPOINT: PlanToken = PlanToken(u64::MAX);
/// Numbers that headers may still be given: more than anybody writes.
const SPARE_NUMBERS: u64 = 1 << 32;

/// The part of an open VHDX that is there only if it may be written.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) blocks: BlockWriter,
    journal: Journal,
    /// Plans that hold a reservation in the journal.
    logging: Mutex<HashSet<PlanToken>>,
    headers: Mutex<Written>,
    /// Where place 0 is, or would be.
    base: u64,
    /// End of all that is used, when the image was opened.
    used_end: u64,
    /// Bytes the file had then.
    opened_bytes: u64,
    /// What the log covered then, in pieces of at most [`TABLE_PIECE_BYTES`].
    replay: Vec<(u64, usize)>,
}

/// The headers as far as they were written.
#[derive(Debug)]
struct Written {
    /// The last one that the kernel has accepted.
    current: Header,
    /// Which of the two that is.
    slot: usize,
    /// The one under way.
    next: Option<Header>,
    /// The number of the last one that was tried.
    sequence: u64,
    /// What they shall say in this session.
    ids: Ids,
}

impl Writer {
    /// # Errors
    /// [`ErrorKind::Unsupported`] and [`ErrorKind::Limit`] for what can be read and not written.
    pub(super) fn new(parts: &Parts, table: &[u64], file_bytes: u64) -> error::Result<Self> {
        let (layout, headers) = (&parts.layout, &parts.headers);
        let log = headers.current.log_place(file_bytes)?;
        if headers.current.sequence() > u64::MAX - SPARE_NUMBERS {
            return Err(unsupported("the numbers of its headers have come to their end"));
        }
        let taken = taken(parts, table);
        let used_end = parts.used_end(table);
        let base = used_end % layout.block_bytes;
        let ends = u32::try_from((used_end - base) / layout.block_bytes).ok();
        let most = ends.and_then(|end| end.checked_add(u32::try_from(layout.blocks).ok()?));
        let too_long = || Error::new(ErrorKind::Limit, format!("the file has {used_end} bytes in use"));
        let (end, most) = ends.zip(most).ok_or_else(too_long)?;
        let step = u32::try_from((POOL_STEP_BYTES / layout.block_bytes).max(1)).expect("a few");
        let is_used =
            |place| overlaps(&taken, base + u64::from(place) * layout.block_bytes, layout.block_bytes);
        Ok(Writer {
            blocks: BlockWriter::new(HostBlocks::new(end, most, step, is_used), has_all_blocks(parts, table)),
            journal: Journal::new(log),
            logging: Mutex::default(),
            headers: Mutex::new(Written::of(headers)),
            base,
            used_end,
            opened_bytes: file_bytes,
            replay: pieces(&parts.patches, file_bytes)?,
        })
    }

    fn headers(&self) -> std::sync::MutexGuard<'_, Written> {
        self.headers.lock().expect("headers lock")
    }

    /// What the headers call the file's states by now.
    pub(super) fn ids(&self) -> Ids {
        self.headers().current.ids()
    }

    /// How long the file is durably.
    fn file_bytes(&self, layout: &Layout) -> u64 {
        self.base + u64::from(self.blocks.places_end()) * layout.block_bytes
    }

    pub(super) fn plan(&self, map: &VhdxMap, change: Change) -> Result<Plan, Miss> {
        self.journal.reserve()?;
        let block = |at| map.parts.layout.block_of_offset(at).ok_or(Miss::Fail(Failure::OutOfRange));
        let planned = match change {
            Change::Write { part, beneath_zero } => {
                block(part.start()).and_then(|b| self.blocks.plan_write(map, b, part, beneath_zero))
            }
            Change::Zero { unit } => block(unit.start()).and_then(|b| self.blocks.plan_zero(map, b)),
        };
        let is_logged = |s: &Step| matches!(s, Step::Meta { key: LOG, .. });
        match &planned {
            Ok(Plan { token: Some(token), steps, .. }) if steps.iter().any(is_logged) => {
                self.logging.lock().expect("logging lock").insert(*token);
            }
            _ => self.journal.release(),
        }
        planned
    }

    pub(super) fn room(&self, map: &VhdxMap, urgent: bool) -> Option<Plan> {
        self.blocks.must_be_changing().ok()?;
        let is_due = if urgent { self.journal.is_full() } else { self.journal.is_half_full() };
        if !is_due {
            // Where no more places can be made, it was the log that had no room; it has by now, and is asked again.
            return self.blocks.room(map, urgent).or_else(|| urgent.then(Plan::default));
        }
        let file = map.file;
        let pages = self.journal.checkpoint(urgent, std::iter::empty(), |n| map.page_bytes(n, &[]));
        let mut steps: Steps = smallvec![Step::Sync { file }];
        steps.extend(pages.into_iter().map(table_page));
        if !is_broken(Sabotage::LogBeforeTable) {
            steps.push(Step::Sync { file });
        }
        // Durable before the next entry is written: where the log begins anew, the run before it would count again, cut short, as
        // soon as its second entry is written over.
        if is_broken(Sabotage::LogAnewUnsynced) {
            steps.push(Step::Meta { key: LOG, op: MARK });
        } else {
            steps.extend([Step::HoldSyncs { file }, Step::Through { key: LOG, op: MARK }]);
        }
        Some(Plan { token: Some(CHECKPOINT), ..Plan::of(steps) })
    }

    pub(super) fn settle(&self, map: &VhdxMap, token: PlanToken, how: Settled) {
        if token == CHECKPOINT {
            return self.journal.checkpoint_ended(match how {
                Settled::Done { .. } => Ok(()),
                Settled::Failed { why, .. } => Err(why),
            });
        }
        if self.logging.lock().expect("logging lock").remove(&token) {
            self.journal.release();
        }
        self.blocks.settle(map, token, how);
    }

    /// Once, before the first change: a log that somebody left goes to its places, and only then may ours be written over it; the
    /// tail nobody names is cut; both headers get new GUIDs. A log that a header names has an entry, for some programs call
    /// the file damaged without one.
    pub(super) fn begin(&self, map: &VhdxMap, modification: Uuid) -> Plan {
        self.blocks.begin(|| {
            let (file, end) = (map.file, HostOffset(self.used_end));
            let ids = ids_of(modification);
            let (is_named, mut slot) = {
                let mut h = self.headers();
                h.ids = ids;
                (h.current.ids().log != [0; 16], 1 - h.slot)
            };
            self.journal.start(ids.log);
            let mut steps: Steps = smallvec![Step::Sync { file }];
            if is_named {
                let replay = (0..self.replay.len() as u64).map(|n| page(REPLAY, n, MetaOp::Count(0)));
                steps.extend(replay);
                steps.extend([Step::Sync { file }, header(slot, false), Step::Sync { file }]);
                slot = 1 - slot;
            }
            match self.opened_bytes {
                n if n < end.0 => {
                    steps.extend([Step::Extend { file, from: HostOffset(n), to: end }, Step::Barrier]);
                }
                n if n > end.0 => steps.push(Step::Truncate { file, to: end }),
                _ => {}
            }
            let mark = Step::Meta { key: LOG, op: MARK };
            steps.extend([mark, Step::Sync { file }, header(slot, true)]);
            steps.extend([Step::Sync { file }, header(1 - slot, true)]);
            steps
        })
    }

    /// At a clean close: the table to its place, no log, and nothing behind the last block.
    pub(super) fn end(&self, map: &VhdxMap) -> Plan {
        let Some(Rest { doubtful, .. }) = self.blocks.finish() else { return Plan::default() };
        let (file, layout) = (map.file, &map.parts.layout);
        let doubtful = doubtful.into_iter().map(|b| Layout::page_of(layout.index_of(b)));
        let pages = self.journal.checkpoint(true, doubtful, |n| map.page_bytes(n, &[]));
        let slot = 1 - self.headers().slot;
        let mut steps: Steps = smallvec![Step::Sync { file }];
        steps.extend(pages.into_iter().map(table_page));
        steps.extend([Step::Sync { file }, header(slot, false)]);
        steps.extend([Step::Sync { file }, header(1 - slot, false)]);
        steps.push(Step::Truncate { file, to: HostOffset(map.parts.used_end(&map.entries())) });
        Plan::of(steps)
    }

    /// The bytes of one of our pages, and where they go.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a page that is none of ours.
    pub(super) fn compose(
        &self,
        map: &VhdxMap,
        key: MetaKey,
        ops: &[MetaOp],
    ) -> error::Result<(HostOffset, Vec<u8>)> {
        let layout = &map.parts.layout;
        match key {
            LOG => self.compose_entry(map, ops),
            MetaKey::Page { table: TABLE, number } => {
                let bytes = self.journal.page(number).ok_or_else(|| corrupt("a page that nobody changes"))?;
                Ok((layout.page_at(number), bytes))
            }
            MetaKey::Page { table: REPLAY, number } => {
                let piece = usize::try_from(number).ok().and_then(|n| self.replay.get(n));
                let (at, len) = *piece.ok_or_else(|| corrupt("a log without such a part"))?;
                // all of it is covered by some patch, and this is what the last ones leave
                let mut bytes = vec![0; len];
                map.parts.patches.over(at, &mut bytes);
                Ok((HostOffset(at), bytes))
            }
            MetaKey::Page { table: HEADERS, number } => {
                let keeps_log = ops.last() == Some(&MetaOp::InUse(true));
                Ok((HostOffset(Header::at(slot_of(number))), self.headers().try_next(keeps_log)))
            }
            _ => Err(corrupt("a page of no table")),
        }
    }

    fn compose_entry(&self, map: &VhdxMap, ops: &[MetaOp]) -> error::Result<(HostOffset, Vec<u8>)> {
        let mut pages: BTreeMap<u64, Vec<(u64, u64)>> = BTreeMap::new();
        for (index, value) in ops.iter().filter_map(entry_in) {
            pages.entry(Layout::page_of(index)).or_default().push((index, value));
        }
        let layout = &map.parts.layout;
        let sectors: Vec<_> =
            pages.into_iter().map(|(n, changes)| (layout.page_at(n), map.page_bytes(n, &changes))).collect();
        let ends_checkpoint = ops.iter().any(|op| matches!(op, MetaOp::Count(_)));
        self.journal.compose(&sectors, ends_checkpoint, self.file_bytes(layout))
    }

    pub(super) fn publish(&self, map: &VhdxMap, key: MetaKey, ops: &[MetaOp]) {
        match key {
            LOG => {
                let entries = || ops.iter().filter_map(entry_in);
                entries().for_each(|(index, value)| map.set_entry(index, value));
                self.journal.publish(entries().map(|(index, _)| Layout::page_of(index)));
            }
            MetaKey::Page { table: HEADERS, number } => self.headers().published(slot_of(number)),
            _ => {}
        }
    }
}

impl Written {
    fn of(headers: &Headers) -> Self {
        let current = headers.current.clone();
        Written { slot: headers.slot, next: None, sequence: current.sequence(), ids: current.ids(), current }
    }

    /// The next header. A number that was tried is not tried again: the header may be there.
    fn try_next(&mut self, keeps_log: bool) -> Vec<u8> {
        let log = if keeps_log { self.ids.log } else { [0; 16] };
        self.sequence += 1;
        let ahead = self.sequence - self.current.sequence();
        let next = self.current.renewed(Ids { log, ..self.ids }, ahead);
        let bytes = next.as_bytes().to_vec();
        self.next = Some(next);
        bytes
    }

    fn published(&mut self, slot: usize) {
        if let Some(next) = self.next.take() {
            (self.current, self.slot) = (next, slot);
        }
    }
}

impl BlockFormat for VhdxMap {
    fn file(&self) -> FileId {
        self.file
    }

    fn block_bytes(&self) -> u64 {
        self.parts.layout.block_bytes
    }

    fn unit(&self, block: u64) -> GuestRange {
        self.parts.layout.unit(block)
    }

    fn block(&self, block: u64) -> Result<Block, Miss> {
        Ok(match self.entry_of(block)? {
            Entry::Free => Block::Free,
            Entry::Zero => Block::Zero,
            Entry::At(at) | Entry::Partly(at) => Block::At(HostOffset(at)),
        })
    }

    fn is_partly(&self, block: u64) -> Result<bool, Miss> {
        Ok(matches!(self.entry_of(block)?, Entry::Partly(_)))
    }

    fn data_of(&self, place: HostBlock) -> HostOffset {
        BlockFormat::end_of(self, place.0)
    }

    fn end_of(&self, places: u32) -> HostOffset {
        let writer = self.writer.as_ref().expect("only writers have places");
        HostOffset(writer.base).plus(u64::from(places) * self.parts.layout.block_bytes)
    }

    fn change(&self, block: u64, now: Block) -> Result<Steps, Miss> {
        let (entry, pointer) = match now {
            Block::Free => (Entry::Free, false),
            Block::Zero => (Entry::Zero, false),
            Block::At(at) => (Entry::At(at.0), true),
        };
        let op =
            MetaOp::Entry { index: self.parts.layout.index_of(block), value: Layout::raw_of(entry), pointer };
        Ok(smallvec![Step::Meta { key: LOG, op }])
    }

    /// Other programs put a new block behind the end of the file.
    fn announce(&self, _places: u32) -> Steps {
        Steps::new()
    }
}

/// The run begins where the checkpoint says: an entry of the log without a sector, if no others ride along.
const MARK: MetaOp = MetaOp::Count(0);

fn page(table: u8, number: u64, op: MetaOp) -> Step {
    Step::Meta { key: MetaKey::Page { table, number }, op }
}

fn table_page(number: u64) -> Step {
    page(TABLE, number, MetaOp::Count(0))
}

fn header(slot: usize, keeps_log: bool) -> Step {
    page(HEADERS, slot as u64, MetaOp::InUse(keeps_log))
}

fn slot_of(number: u64) -> usize {
    usize::from(number != 0)
}

/// The entry that a change of the log concerns, and its new value.
fn entry_in(op: &MetaOp) -> Option<(u64, u64)> {
    let MetaOp::Entry { index, value, .. } = *op else { return None };
    Some((index, value))
}

/// Three GUIDs out of one that is by chance.
fn ids_of(modification: Uuid) -> Ids {
    let other = |n: u128| Uuid::from_u128(modification.as_u128() ^ n);
    Ids { file_write: other(1), data_write: modification, log: other(2).to_bytes_le() }
}

/// All that is used of the file, in its order.
fn taken(parts: &Parts, table: &[u64]) -> Vec<Region> {
    let head = Region { at: 0, len: MIB };
    let mut taken = parts.taken();
    taken.extend(parts.layout.places(table).map(|p| Region { at: p.at, len: p.len }));
    taken.push(head);
    taken.sort_unstable();
    taken
}

/// Something of `taken`, whose parts do not overlap, lies there.
fn overlaps(taken: &[Region], at: u64, len: u64) -> bool {
    let first = taken.partition_point(|r| r.end() <= at);
    taken.get(first).is_some_and(|r| r.overlaps(at, len))
}

/// Nothing has to be allocated any more, and nothing is given back.
fn has_all_blocks(parts: &Parts, table: &[u64]) -> bool {
    let layout = &parts.layout;
    let is_there = |block| {
        let raw = usize::try_from(layout.index_of(block)).ok().and_then(|i| table.get(i));
        matches!(raw.and_then(|raw| layout.entry(*raw)), Some(Entry::At(_)))
    };
    parts.metadata.is_fixed && (0..layout.blocks).all(is_there)
}

/// Where the log says something, in pieces that are written in any order.
fn pieces(patches: &Patches, file_bytes: u64) -> error::Result<Vec<(u64, usize)>> {
    let mut pieces = Vec::new();
    for p in &patches.0 {
        if p.at.saturating_add(p.len()) > file_bytes {
            let what = format!("its log would write at byte {}, behind the file's end", p.at);
            return Err(unsupported(what).hint("let Hyper-V, or qemu-img check -r all, write its log first"));
        }
        let end = p.at + p.len();
        let len = |at| usize::try_from(end - at).unwrap_or(usize::MAX).min(TABLE_PIECE_BYTES);
        pieces.extend((p.at..end).step_by(TABLE_PIECE_BYTES).map(|at| (at, len(at))));
    }
    pieces.sort_unstable();
    pieces.dedup();
    Ok(pieces)
}
