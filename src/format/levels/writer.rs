//! What changes an image of two levels, beyond what all formats with blocks have in common: entries, second-level tables,
//! and the mark of a writer. docs/formats/README.md explains the orders.
//!
//! A cluster keeps its place once it has one: a discard punches the file there. A table that does not exist yet is made by a
//! plan of its own, while the change that wants it waits as for room: clean places in a row, which the first level names then.

use super::super::blocks::{Block, BlockFormat, BlockWriter, Steps};
use super::closing::Closing;
use super::map::{L1, L2, LevelMap};
use super::{Cluster, Extra, Geometry, Survey};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::{POOL_STEP_BYTES, SECTOR_BYTES};
use crate::map::{
    ByteSource, Change, FileId, GuestRange, HostBlock, HostBlocks, HostOffset, MetaKey, MetaOp, Miss, Plan,
    PlanToken, Settled, Step, Taken,
};
use smallvec::smallvec;
use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

/// Tokens of the plans that [`BlockWriter`] knows nothing of.
const OWN_TOKENS: u64 = 1 << 63;
/// Places more than there are clusters and tables: for those that failed writes keep.
const SPARE_PLACES: u64 = 16;

/// How a writer leaves its mark: the first sector of the file, and what of it changes.
#[derive(Clone, Debug)]
pub(in super::super) struct Marking {
    pub(in super::super) sector: [u8; SECTOR_BYTES as usize],
    pub(in super::super) mark: fn(&mut [u8; SECTOR_BYTES as usize], bool),
}

/// The part of an open image that is there only if it may be written.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) blocks: BlockWriter,
    pub(super) marking: Option<Marking>,
    pub(super) state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// First-level entries whose changes wait for a table.
    wanted: BTreeSet<u64>,
    /// The table that is being made.
    making: Option<Making>,
    /// Places of tables that could not be made for good: the disk may name them, so they are for nothing else.
    pub(super) made: HashMap<u64, Taken>,
    /// First-level entries that the disk may have otherwise.
    pub(super) doubtful_tables: BTreeSet<u64>,
    /// Why a table could not be made: the answer to the next who wants one.
    refused: Option<Failure>,
    tokens: u64,
    pub(super) closing: Closing,
}

#[derive(Clone, Copy, Debug)]
struct Making {
    token: PlanToken,
    l1: u64,
    place: Taken,
}

impl Writer {
    /// What writing needs. All tables are looked at: only then is it certain where nothing lies, and that no entry names what is
    /// behind the file's end and will be another's.
    ///
    /// # Errors
    /// Those of a check; [`ErrorKind::Corrupt`] where it finds a corruption.
    pub(super) fn open(
        source: &dyn ByteSource,
        g: Geometry,
        extra: Extra,
        marking: Option<Marking>,
    ) -> Result<Self> {
        let used = Survey::of(source, g, extra)?.places()?;
        let tables = g.l1_entries() * u64::from(g.table_clusters());
        let max = u64::from(used.end) + g.blocks() + tables + SPARE_PLACES;
        let max = u32::try_from(max).unwrap_or(u32::MAX);
        let step = (POOL_STEP_BYTES / g.cluster_bytes).max(1);
        let step = u32::try_from(step).expect("64 MiB have fewer clusters than 2^32");
        let places = HostBlocks::new(used.end, max, step, |p| used.is_used(p));
        Ok(Writer { blocks: BlockWriter::new(places, true), marking, state: Mutex::default() })
    }

    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("writer lock")
    }
}

/// A change of one 8-byte word.
fn entry_step(table: u8, number: u64, index: u64, value: u64, pointer: bool) -> Step {
    Step::Meta { key: MetaKey::Page { table, number }, op: MetaOp::Entry { index, value, pointer } }
}

/// The entry a change concerns, and its new value.
fn entry_of(op: &MetaOp) -> Option<(u64, u64)> {
    let MetaOp::Entry { index, value, .. } = *op else { return None };
    Some((index, value))
}

impl LevelMap {
    fn writer(&self) -> std::result::Result<&Writer, Miss> {
        self.writer.as_ref().ok_or(Miss::Fail(Failure::ReadOnly))
    }

    /// The second-level table around a cluster; where there is none, it is seen to.
    fn needed_table(&self, block: u64) -> std::result::Result<u64, Miss> {
        let l1 = self.l1_of(block);
        if let Some(at) = self.table_at(l1)? {
            return Ok(at);
        }
        let mut s = self.writer()?.state();
        if let Some(why) = s.refused.take() {
            return Err(Miss::Fail(why));
        }
        s.wanted.insert(l1);
        Err(Miss::NeedsRoom)
    }

    pub(super) fn plan_change(&self, change: Change) -> std::result::Result<Plan, Miss> {
        let blocks = &self.writer()?.blocks;
        blocks.must_be_changing()?;
        match change {
            Change::Write { part, beneath_zero } => {
                let block = self.geometry.block_at(part.start());
                // before a place is taken that would wait with it
                self.needed_table(block)?;
                blocks.plan_write(self, block, part, beneath_zero)
            }
            Change::Zero { unit } => blocks.plan_zero(self, self.geometry.block_at(unit.start())),
        }
    }

    pub(super) fn plan_room(&self, urgent: bool) -> Option<Plan> {
        let writer = self.writer.as_ref()?;
        writer.blocks.must_be_changing().ok()?;
        if urgent {
            match self.plan_table(writer) {
                Ok(None) => {}
                Ok(plan) => return plan,
                Err(_) => return None,
            }
        }
        writer.blocks.room(self, urgent)
    }

    /// A second-level table where a change waits for one: clean places are one already, others are cleared.
    ///
    /// # Errors
    /// Why there is no place for it, and none will be.
    fn plan_table(&self, writer: &Writer) -> std::result::Result<Option<Plan>, Failure> {
        let l1 = loop {
            let Some(l1) = writer.state().wanted.first().copied() else { return Ok(None) };
            match self.table_at(l1) {
                Ok(None) => break l1,
                Ok(Some(_)) | Err(_) => drop(writer.state().wanted.remove(&l1)),
            }
        };
        let before = writer.state().made.get(&l1).copied();
        let place = match before {
            Some(place) => place,
            None => match writer.blocks.take_run(self.geometry.table_clusters()) {
                Ok(place) => place,
                Err(Miss::Fail(why)) => return Err(why),
                // The extension comes first.
                Err(_) => return Ok(None),
            },
        };
        let (to, len, file) = (self.data_of(place.block), self.geometry.table_bytes, self.file);
        let mut steps = Steps::new();
        if !place.clean {
            let zeros = Step::Block { block: GuestRange::EMPTY, file, to, len, clean: false };
            steps.extend([zeros, Step::Sync { file }]);
        }
        steps.push(self.l1_step(l1, to.0));
        let mut s = writer.state();
        let token = PlanToken(OWN_TOKENS + s.tokens);
        s.tokens += 1;
        s.making = Some(Making { token, l1, place });
        Ok(Some(Plan { token: Some(token), clean: place.clean, ..Plan::of(steps) }))
    }

    pub(super) fn l1_step(&self, l1: u64, value: u64) -> Step {
        entry_step(L1, self.l1_page(l1), l1, value, value != 0)
    }

    pub(super) fn settle_plan(&self, token: PlanToken, how: Settled) {
        let Some(writer) = &self.writer else { return };
        if token.0 >= OWN_TOKENS {
            return writer.state().table_ended(token, how);
        }
        writer.blocks.settle(self, token, how);
        if writer.blocks.must_be_changing().is_ok() {
            // by the plan of the beginning, or by one that made room
            self.reaches(self.end_of(writer.blocks.places_end()));
        }
    }

    /// The mark first; behind its sync the tail that nothing names is cut off, so that what an extension adds there reads as
    /// zeros, or the last cluster becomes whole.
    pub(super) fn begin_plan(&self) -> Plan {
        let Some(writer) = &self.writer else { return Plan::default() };
        writer.blocks.begin(|| {
            let file = self.file;
            let mut steps: Steps = self.mark(true).into_iter().chain([Step::Sync { file }]).collect();
            let (have, end) = (HostOffset(self.geometry.file_bytes), self.end_of(writer.blocks.places_end()));
            if have > end {
                steps.push(Step::Truncate { file, to: end });
            } else if have < end {
                steps.push(Step::Extend { file, from: have, to: end });
            }
            steps
        })
    }

    /// The mark that somebody writes, or no longer does.
    pub(super) fn mark(&self, in_use: bool) -> Option<Step> {
        self.writer.as_ref()?.marking.as_ref()?;
        Some(Step::Meta { key: MetaKey::Header, op: MetaOp::InUse(in_use) })
    }

    pub(super) fn compose_page(&self, key: MetaKey, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<HostOffset> {
        let lost = || Error::new(ErrorKind::Corrupt, format!("{key:?} has no place"));
        let base = out.len();
        let put = |out: &mut Vec<u8>, n: usize, value: u64| {
            let raw = self.geometry.dialect.bytes(value);
            out[base + n * 8..base + n * 8 + 8].copy_from_slice(&raw);
        };
        match key {
            MetaKey::Header => {
                let marking = self.writer.as_ref().and_then(|w| w.marking.as_ref()).ok_or_else(lost)?;
                let mut sector = marking.sector;
                (marking.mark)(&mut sector, !ops.ends_with(&[MetaOp::InUse(false)]));
                out.extend(sector);
                Ok(HostOffset(0))
            }
            MetaKey::Page { table: L1, number } => {
                let (first, end) = self.l1_entries_of(number);
                let index = |n: u64| usize::try_from(n).expect("an entry of a table in memory");
                let entries = self.l1.get(index(first)..index(end)).ok_or_else(lost)?;
                let dialect = self.geometry.dialect;
                out.extend(entries.iter().flat_map(|e| dialect.bytes(e.load(Ordering::Acquire))));
                for (n, value) in ops.iter().filter_map(entry_of) {
                    put(out, index(n - first), value);
                }
                Ok(HostOffset(self.geometry.l1_at + first * 8))
            }
            MetaKey::Page { number, .. } => {
                if !self.pages.copy_to(number, out) {
                    return Err(lost());
                }
                for (word, value) in ops.iter().filter_map(entry_of) {
                    put(out, self.page_of(word).1, value);
                }
                Ok(HostOffset(number * self.geometry.page_bytes()))
            }
        }
    }

    pub(super) fn publish_page(&self, key: MetaKey, ops: &[MetaOp]) {
        let MetaKey::Page { table, .. } = key else { return };
        for (index, value) in ops.iter().filter_map(entry_of) {
            if table == L1 {
                if let Some(entry) = usize::try_from(index).ok().and_then(|i| self.l1.get(i)) {
                    entry.store(value, Ordering::Release);
                }
            } else {
                let (page, into) = self.page_of(index);
                self.pages.set8(page, into, self.geometry.dialect.bytes(value));
            }
        }
    }
}

impl State {
    fn table_ended(&mut self, token: PlanToken, how: Settled) {
        let Some(m) = self.making.take_if(|m| m.token == token) else {
            debug_assert!(false, "{token:?} settled twice");
            return;
        };
        // Whoever still wants it after a failure says so again: others must not wait for a table that nobody wants.
        self.wanted.remove(&m.l1);
        match how {
            Settled::Done { .. } => {
                self.made.remove(&m.l1);
                self.doubtful_tables.remove(&m.l1);
            }
            Settled::Failed { why, entry_submitted } => {
                self.made.insert(m.l1, m.place);
                if entry_submitted {
                    self.doubtful_tables.insert(m.l1);
                }
                self.refused = Some(why);
            }
        }
    }
}

impl BlockFormat for LevelMap {
    fn file(&self) -> FileId {
        self.file
    }

    fn block_bytes(&self) -> u64 {
        self.geometry.cluster_bytes
    }

    fn unit(&self, block: u64) -> GuestRange {
        self.geometry.unit(block)
    }

    /// What is packed is as if it lay beneath: it is copied, never written.
    fn block(&self, block: u64) -> std::result::Result<Block, Miss> {
        Ok(match self.cluster(block)? {
            Cluster::Free | Cluster::Packed { .. } => Block::Free,
            Cluster::Zero => Block::Zero,
            Cluster::At(at) => Block::At(at),
        })
    }

    fn data_of(&self, place: HostBlock) -> HostOffset {
        self.end_of(place.0)
    }

    fn end_of(&self, places: u32) -> HostOffset {
        HostOffset(u64::from(places) * self.geometry.cluster_bytes)
    }

    fn change(&self, block: u64, now: Block) -> std::result::Result<Steps, Miss> {
        let (value, pointer) = match now {
            Block::At(at) => (at.0, true),
            Block::Free => (0, false),
            Block::Zero => (self.zeros.ok_or(Miss::Fail(Failure::Unsupported))?, false),
        };
        let word = self.word_of(self.needed_table(block)?, block);
        let (page, _) = self.page_of(word);
        if !self.pages.pin(page) {
            return Err(Miss::NeedsPage(MetaKey::Page { table: L2, number: page }));
        }
        Ok(smallvec![entry_step(L2, page, word, value, pointer)])
    }

    fn settled(&self, block: u64) {
        // A table stays where it is, so this is the page that was pinned.
        if let Ok(Some(table)) = self.table_at(self.l1_of(block)) {
            self.pages.unpin(self.page_of(self.word_of(table, block)).0);
        }
    }

    fn least_extension(&self) -> u32 {
        let wanted = self.writer.as_ref().is_some_and(|w| !w.state().wanted.is_empty());
        if wanted { self.geometry.table_clusters() } else { 1 }
    }

    fn announce(&self, _places: u32) -> Steps {
        Steps::new()
    }
}
