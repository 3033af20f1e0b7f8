//! What changes a QCOW2, beyond what all formats with blocks have in common: entries, second-level tables, refcounts.
//! docs/formats/qcow2.md explains the orders.

use super::super::blocks::{Block, BlockFormat, BlockWriter, Steps};
use super::closing::Closing;
use super::header::incompatible::{CORRUPT, DIRTY};
use super::layout::{COPIED, Cluster, OFFSET, Place, Sub, Subclusters, ZERO};
use super::map::{L1, L2, Qcow2Map};
use super::refcounts::Refcounts;
use super::spare::spare_clusters;
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::{MAX_TABLE_BYTES, POOL_STEP_BYTES};
use crate::map::{
    ByteSource, Change, FileId, GuestRange, HostBlock, HostBlocks, HostOffset, MetaKey, MetaOp, Miss, Plan,
    PlanToken, Settled, Step, Taken,
};
use smallvec::{SmallVec, smallvec};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use uuid::Uuid;

/// Pages of refcount blocks.
pub(super) const REFCOUNTS: u8 = 2;
/// Pages of the refcount table.
pub(super) const REFCOUNT_TABLE: u8 = 3;
/// Pages of the refcount table that is to replace it.
const NEW_REFCOUNT_TABLE: u8 = 4;
/// Tokens of the plans that [`BlockWriter`] knows nothing of.
const OWN_TOKENS: u64 = 1 << 63;
/// Places prepared at once at most.
const MAX_STEP: u64 = 4096;
/// Clusters whose references are remembered until the close; what more is dropped stays as a leak.
const MAX_DROPPED: usize = 1 << 20;

/// The part of an open QCOW2 that is there only if it may be written.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) blocks: BlockWriter,
    pub(super) state: Mutex<State>,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) counts: Refcounts,
    /// First-level entries whose changes wait for a table of their own.
    wanted: BTreeSet<u64>,
    /// The table that is being made.
    making: Option<Making>,
    /// Places of tables that could not be made for good: the disk may name them, so they are for nothing else.
    pub(super) made: HashMap<u64, Taken>,
    /// First-level entries that the disk may have otherwise.
    pub(super) doubtful_tables: BTreeSet<u64>,
    /// Why a table could not be made: the answer to the next who wants one.
    refused: Option<Failure>,
    next_token: u64,
    /// References that have gone, by cluster of the file. They are taken off the refcounts at the close.
    pub(super) dropped: BTreeMap<u32, u32>,
    /// Changes of entries under way, the last of each block, and how often its page is pinned: an entry in doubt keeps it.
    changes: HashMap<u64, (EntryChange, u32)>,
    /// Blocks that write to a place their entry reserves: it is theirs whatever happens.
    pub(super) reserved: HashSet<u64>,
    pub(super) closing: Closing,
}

#[derive(Clone, Copy, Debug)]
struct Making {
    token: PlanToken,
    l1: u64,
    place: Taken,
    /// The table that is copied.
    from: Option<HostOffset>,
}

#[derive(Clone, Copy, Debug)]
struct EntryChange {
    page: u64,
    old: Cluster,
    new: u64,
}

impl Writer {
    /// What writing needs, if everything it relies on is in order.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub(super) fn open(source: &dyn ByteSource, map: &Qcow2Map) -> Result<Self> {
        map.check_for_writing()?;
        let least = if map.header().has(DIRTY) { map.named_clusters(source)? } else { 0 };
        let mut counts = Refcounts::load(source, &map.header(), &map.layout, least)?;
        let spare = spare_clusters(source, &map.header(), &map.layout, &map.l1);
        let spare = counts.adopt(source, spare)?;
        let (opened, max) = (counts.opened(), counts.max_clusters());
        let step = (POOL_STEP_BYTES / map.layout.cluster_bytes()).clamp(1, MAX_STEP);
        let step = u32::try_from(step).expect("MAX_STEP");
        let blocks = BlockWriter::new(HostBlocks::new(opened, max, step, |c| !spare.contains(&c)), false);
        let state = State {
            counts,
            wanted: BTreeSet::new(),
            making: None,
            made: HashMap::new(),
            doubtful_tables: BTreeSet::new(),
            refused: None,
            next_token: OWN_TOKENS,
            dropped: BTreeMap::new(),
            changes: HashMap::new(),
            reserved: HashSet::new(),
            closing: Closing::default(),
        };
        Ok(Writer { blocks, state: Mutex::new(state) })
    }

    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("writer lock")
    }
}

impl State {
    /// One reference less to each of these clusters, once that is durable.
    fn drop_clusters(&mut self, clusters: impl IntoIterator<Item = u32>) {
        for c in clusters {
            if self.dropped.len() < MAX_DROPPED || self.dropped.contains_key(&c) {
                *self.dropped.entry(c).or_default() += 1;
            }
        }
    }
}

/// A change of one 8-byte word, by the file's order.
fn entry_step(table: u8, number: u64, index: u64, value: u64, pointer: bool) -> Step {
    Step::Meta { key: MetaKey::Page { table, number }, op: MetaOp::Entry { index, value, pointer } }
}

impl Qcow2Map {
    pub(super) fn writer(&self) -> std::result::Result<&Writer, Miss> {
        self.writer.as_ref().ok_or(Miss::Fail(Failure::ReadOnly))
    }

    /// The image may be written, as far as its header and first level tell.
    fn check_for_writing(&self) -> Result<()> {
        let corrupt = |what: String| Err(Error::new(ErrorKind::Corrupt, what).hint("vdimg check tells more"));
        if self.header().has(CORRUPT) {
            return corrupt("it is marked as corrupt, so it is not written".into());
        }
        let mut tables = Vec::new();
        for (n, entry) in self.l1.iter().enumerate() {
            match self.table_of(entry.load(Ordering::Relaxed)) {
                Ok(table) => tables.extend(table.map(|t| t.at)),
                Err(_) => {
                    return corrupt(format!("entry {n} of the first-level table names no place for a table"));
                }
            }
        }
        tables.sort_unstable();
        if let Some(twice) = tables.windows(2).find(|w| w[0] == w[1]) {
            return corrupt(format!("two entries of the first-level table name the place at {}", twice[0]));
        }
        Ok(())
    }

    /// Clusters up to the last one that an entry names, for images whose refcounts do not tell.
    fn named_clusters(&self, source: &dyn ByteSource) -> Result<u64> {
        let tables = self.l1.iter().filter_map(|e| self.table_of(e.load(Ordering::Relaxed)).ok().flatten());
        let tables: Vec<_> = tables.map(|t| t.at).collect();
        if tables.len() as u64 * self.layout.cluster_bytes() > MAX_TABLE_BYTES {
            let what = "its last writer did not close it, and its tables are too large to be looked through";
            return Err(Error::new(ErrorKind::Limit, what).hint("vdimg repair puts it right"));
        }
        let mut bytes = vec![0; usize::try_from(self.layout.cluster_bytes()).expect("2 MiB at most")];
        let step = usize::try_from(self.layout.entry_bytes()).expect("16 at most");
        let mut end = 0;
        for at in tables {
            source.read_at(at, &mut bytes)?;
            for entry in bytes.chunks(step) {
                let word = |i| super::super::bytes::be64(entry, i).unwrap_or(0);
                end = end.max(self.layout.cluster(word(0), word(8)).map_or(0, |c| self.layout.end_of(c)));
            }
        }
        Ok(end.div_ceil(self.layout.cluster_bytes()))
    }

    /// The second-level table around a block, if it is ours alone; otherwise that is seen to.
    fn own_table(&self, block: u64) -> std::result::Result<HostOffset, Miss> {
        let l1 = block >> self.layout.l2_bits();
        match self.table_at(l1)? {
            Some(Place { at, own: true }) => Ok(at),
            _ => {
                let mut s = self.writer()?.state();
                if let Some(why) = s.refused.take() {
                    return Err(Miss::Fail(why));
                }
                s.wanted.insert(l1);
                Err(Miss::NeedsRoom)
            }
        }
    }

    pub(super) fn plan_change(&self, change: Change) -> std::result::Result<Plan, Miss> {
        let blocks = &self.writer()?.blocks;
        let (at, write) = match change {
            Change::Write { part, beneath_zero } => (part.start(), Some((part, beneath_zero))),
            Change::Zero { unit } => (unit.start(), None),
        };
        let block = self.layout.block_at(at);
        blocks.must_be_changing()?;
        self.own_table(block)?;
        let Some((part, beneath_zero)) = write else { return blocks.plan_zero(self, block) };
        match self.cluster(block)? {
            Cluster::Partly(place, sub) if place.own => {
                let missing = self.missing_parts(block, place.at, sub, part);
                blocks.plan_missing(self, block, place.at, missing)
            }
            _ => blocks.plan_write(self, block, part, beneath_zero),
        }
    }

    /// Steps that write the subclusters which are not here, and `part` to those that are.
    fn missing_parts(&self, block: u64, at: HostOffset, sub: Subclusters, part: GuestRange) -> Steps {
        let (unit, bytes, file) = (self.layout.unit(block), self.layout.subcluster_bytes(), self.file);
        let whole = unit.start().0..unit.start().0 + self.layout.cluster_bytes();
        let mut steps = Steps::new();
        let mut n = 0;
        while n * bytes < whole.end - whole.start {
            let here = sub.get(n) == Sub::Here;
            let end = (n + 1..super::layout::SUBCLUSTERS)
                .find(|m| (sub.get(*m) == Sub::Here) != here)
                .unwrap_or(super::layout::SUBCLUSTERS);
            let (into, len) = (n * bytes, (end - n) * bytes);
            let range = unit.skip(into).take(len);
            if !here {
                steps.push(Step::Block { block: range, file, to: at.plus(into), len, clean: false });
            } else if !range.intersect(part).is_empty() {
                let piece = range.intersect(part);
                let to = at.plus(piece.start().since(unit.start()));
                steps.push(Step::Guest { part: piece, file, to });
            }
            n = end;
        }
        steps
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
        let (end, least) = (writer.blocks.places_end(), self.least_extension());
        let fits = end.checked_add(least).is_some_and(|to| to <= writer.state().counts.max_clusters());
        if fits { writer.blocks.room(self, urgent) } else { None }
    }

    /// A second-level table where a change waits for one: a clean place is one already; otherwise it is cleared, or
    /// the one that snapshots share is copied.
    ///
    /// # Errors
    /// Why there is no place for it, and none will be.
    fn plan_table(&self, writer: &Writer) -> std::result::Result<Option<Plan>, Failure> {
        let (l1, from) = loop {
            let Some(l1) = writer.state().wanted.first().copied() else { return Ok(None) };
            match self.table_at(l1) {
                Ok(Some(Place { own: true, .. })) | Err(_) => drop(writer.state().wanted.remove(&l1)),
                Ok(shared) => break (l1, shared.map(|p| p.at)),
            }
        };
        let before = writer.state().made.get(&l1).copied();
        let place = match before {
            Some(place) => place,
            None => match writer.blocks.take(self, from.is_none()) {
                Ok(place) => place,
                Err(Miss::Fail(why)) => return Err(why),
                // The extension comes first.
                Err(_) => return Ok(None),
            },
        };
        let (to, len, file) = (self.data_of(place.block), self.layout.cluster_bytes(), self.file);
        let mut steps: Steps = match from {
            Some(from) => smallvec![Step::Move { file, from, to, len }, Step::Sync { file }],
            None if place.clean => SmallVec::new(),
            None => smallvec![
                Step::Block { block: GuestRange::EMPTY, file, to, len, clean: false },
                Step::Sync { file }
            ],
        };
        steps.push(self.l1_step(l1, to.0 | COPIED));
        let mut s = writer.state();
        let token = PlanToken(s.next_token);
        s.next_token += 1;
        s.making = Some(Making { token, l1, place, from });
        Ok(Some(Plan { token: Some(token), clean: from.is_none() && place.clean, ..Plan::of(steps) }))
    }

    pub(super) fn l1_step(&self, l1: u64, value: u64) -> Step {
        entry_step(L1, l1 * 8 / self.layout.page_bytes(), l1, value, value != 0)
    }

    pub(super) fn settle_plan(&self, token: PlanToken, how: Settled) {
        let Some(writer) = &self.writer else { return };
        if token.0 < OWN_TOKENS {
            return writer.blocks.settle(self, token, how);
        }
        let mut s = writer.state();
        let Some(m) = s.making.take_if(|m| m.token == token) else {
            debug_assert!(false, "{token:?} settled twice");
            return;
        };
        // Whoever still wants it after a failure says so again: others must not wait for a table that nobody wants.
        s.wanted.remove(&m.l1);
        match how {
            Settled::Done { .. } => {
                s.made.remove(&m.l1);
                s.doubtful_tables.remove(&m.l1);
                let old = m.from.map(|at| self.cluster_number(at));
                s.drop_clusters(old);
            }
            Settled::Failed { why, entry_submitted } => {
                s.made.insert(m.l1, m.place);
                if entry_submitted {
                    s.doubtful_tables.insert(m.l1);
                }
                s.refused = Some(why);
            }
        }
    }

    /// The number of the cluster of the file around `at`.
    pub(super) fn cluster_number(&self, at: HostOffset) -> u32 {
        u32::try_from(at.0 >> self.layout.cluster_bits)
            .expect("clusters of a file that is written have 32-bit numbers")
    }

    pub(super) fn begin_plan(&self, modification: Uuid) -> Plan {
        let Some(writer) = &self.writer else { return Plan::default() };
        writer.blocks.begin(|| {
            let (file, to) = (self.file, self.end_of(writer.blocks.places_end()));
            let from = HostOffset(self.layout.file_bytes);
            let mut steps = Steps::new();
            if from < to {
                steps.extend([Step::Extend { file, from, to }, Step::Sync { file }]);
            }
            // Before anything comes to lie in clusters that are used again.
            let adopted: Vec<_> = writer.state().counts.adopted_pages().collect();
            steps.extend(adopted.into_iter().map(|page| entry_step(REFCOUNTS, page, 0, 0, false)));
            let op = MetaOp::Modification(modification);
            steps.extend([Step::Meta { key: MetaKey::Header, op }, Step::Sync { file }]);
            steps
        })
    }

    /// The two words of an entry that says `value`.
    fn words(&self, value: u64) -> (u64, u64) {
        match (self.layout.extended, value & OFFSET) {
            (false, _) => (value, 0),
            (true, 0) => (0, u64::from(u32::MAX) << 32),
            (true, _) => (value, u64::from(u32::MAX)),
        }
    }

    pub(super) fn compose_l2(&self, page: u64, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<HostOffset> {
        let (base, bytes) = (out.len(), self.layout.page_bytes());
        if !self.pages.copy_to(page, out) {
            return Err(Error::new(ErrorKind::Corrupt, format!("page {page} of a table is not in memory")));
        }
        for (word, value) in ops.iter().filter_map(|op| self.word_in(page, op)) {
            let (entry, bitmap) = self.words(value);
            super::super::bytes::put_be64(out, base + word * 8, entry);
            if self.layout.extended {
                super::super::bytes::put_be64(out, base + word * 8 + 8, bitmap);
            }
        }
        Ok(HostOffset(page * bytes))
    }

    /// The word of a page that a change concerns, and its value.
    fn word_in(&self, page: u64, op: &MetaOp) -> Option<(usize, u64)> {
        let MetaOp::Entry { index, value, .. } = *op else { return None };
        let first = page * self.layout.page_bytes() / 8;
        Some((usize::try_from(index.checked_sub(first)?).ok()?, value))
    }

    pub(super) fn publish_l2(&self, page: u64, ops: &[MetaOp]) {
        for (word, value) in ops.iter().filter_map(|op| self.word_in(page, op)) {
            let (entry, bitmap) = self.words(value);
            let set = |word, value: u64| self.pages.set8(page, word, value.to_be_bytes());
            // A reader takes the entry first: it never sees subclusters without their place.
            match (self.layout.extended, entry) {
                (false, _) => set(word, entry),
                (true, 0) => {
                    set(word + 1, bitmap);
                    set(word, entry);
                }
                (true, _) => {
                    set(word, entry);
                    set(word + 1, bitmap);
                }
            }
        }
    }
}

impl BlockFormat for Qcow2Map {
    fn file(&self) -> FileId {
        self.file
    }

    fn block_bytes(&self) -> u64 {
        self.layout.cluster_bytes()
    }

    fn unit(&self, block: u64) -> GuestRange {
        self.layout.unit(block)
    }

    /// Only what is ours alone is at a place; all else is as if it lay beneath: it is copied, never written.
    fn block(&self, block: u64) -> std::result::Result<Block, Miss> {
        Ok(match self.cluster(block)? {
            Cluster::Data(place) if place.own => Block::At(place.at),
            Cluster::Zero(_) => Block::Zero,
            _ => Block::Free,
        })
    }

    fn data_of(&self, place: HostBlock) -> HostOffset {
        HostOffset(u64::from(place.0) << self.layout.cluster_bits)
    }

    fn end_of(&self, places: u32) -> HostOffset {
        HostOffset(u64::from(places) << self.layout.cluster_bits)
    }

    fn change(&self, block: u64, now: Block) -> std::result::Result<Steps, Miss> {
        let value = match now {
            Block::At(at) => at.0 | COPIED,
            Block::Zero if self.layout.extended => 0,
            Block::Zero if self.layout.zero_flag => ZERO,
            // In a base what is nowhere reads as zeros.
            Block::Zero if !self.is_diff() => 0,
            Block::Zero => return Err(Miss::Fail(Failure::Unsupported)),
            Block::Free => return Err(Miss::Fail(Failure::Unsupported)),
        };
        let table = self.own_table(block)?;
        let old = self.cluster(block)?;
        let (page, word) = self.entry_place(table, block);
        if !self.pages.pin(page) {
            return Err(Miss::NeedsPage(MetaKey::Page { table: L2, number: page }));
        }
        let change = EntryChange { page, old, new: value };
        let mut s = self.writer()?.state();
        let pins = s.changes.get(&block).map_or(0, |(_, pins)| *pins);
        s.changes.insert(block, (change, pins + 1));
        let index = page * self.layout.page_bytes() / 8 + word as u64;
        Ok(smallvec![entry_step(L2, page, index, value, matches!(now, Block::At(_)))])
    }

    fn settled(&self, block: u64) {
        let Some(writer) = &self.writer else { return };
        let mut s = writer.state();
        let Some((change, pins)) = s.changes.remove(&block) else { return };
        let is_done = self.entry(block).is_ok_and(|now| now == self.words(change.new));
        if is_done {
            s.reserved.remove(&block);
            s.drop_clusters(self.given_up(change));
        }
        if pins > 1 {
            // What it gave up is given up once.
            let left = if is_done { EntryChange { old: Cluster::Free, ..change } } else { change };
            s.changes.insert(block, (left, pins - 1));
        }
        drop(s);
        self.pages.unpin(change.page);
    }

    fn reserved_for(&self, block: u64) -> Option<HostOffset> {
        let Ok(Cluster::Zero(Some(place))) = self.cluster(block) else { return None };
        if place.own {
            self.writer.as_ref()?.state().reserved.insert(block);
        }
        place.own.then_some(place.at)
    }

    fn is_table(&self, place: HostBlock) -> bool {
        self.writer.as_ref().is_some_and(|w| w.state().counts.is_own(place.0))
    }

    fn is_soiled(&self, place: HostBlock) -> bool {
        self.writer.as_ref().is_some_and(|w| w.state().counts.is_soiled(place.0))
    }

    fn least_extension(&self) -> u32 {
        self.writer.as_ref().map_or(1, |w| w.state().counts.least_extension(w.blocks.places_end()))
    }

    fn announce(&self, to: u32) -> Steps {
        let Some(writer) = &self.writer else { return Steps::new() };
        let (from, file, mut s) = (writer.blocks.places_end(), self.file, writer.state());
        let growth = s.counts.begin_extension(from, to);
        let counts = &s.counts;
        let page = |number| entry_step(REFCOUNTS, number, u64::from(from), u64::from(to), false);
        // Where there is no space for them, nothing is written behind the file's end.
        let mut steps: Steps = smallvec![Step::Barrier];
        steps.extend(counts.pages_for(from, to).into_iter().map(page));
        if let Some((_, clusters)) = growth.table {
            let pages = u64::from(clusters) * self.layout.cluster_bytes() / self.layout.page_bytes();
            steps.extend((0..pages).map(|n| entry_step(NEW_REFCOUNT_TABLE, n, 0, 0, false)));
        }
        let entries = counts.entries_to_write();
        if growth.table.is_some() || counts.header_is_doubtful() {
            let op = MetaOp::Entry { index: 0, value: counts.new_table().0, pointer: true };
            steps.extend([Step::Sync { file }, Step::Meta { key: MetaKey::Header, op }]);
        }
        if growth.table.is_none() && !entries.is_empty() {
            steps.extend(self.entries_in_order(entries));
        }
        steps
    }
}

impl Qcow2Map {
    pub(super) fn refcount_table_step(&self, n: usize, at: u64) -> Step {
        let n = n as u64;
        entry_step(REFCOUNT_TABLE, n * 8 / self.layout.page_bytes(), n, at, at != 0)
    }

    /// Entries of the refcount table, the lowest first: what counts a block's own cluster is the block itself, or one before it.
    fn entries_in_order(&self, entries: Vec<(usize, u64)>) -> Steps {
        let (mut steps, mut last) = (Steps::new(), None);
        for (n, at) in entries {
            let step = self.refcount_table_step(n, at);
            let Step::Meta { key, .. } = step else { unreachable!("a change of an entry") };
            // Entries of one page are durable together.
            let is_same_page = last.replace(key) == Some(key);
            steps.extend([if is_same_page { Step::Barrier } else { Step::Sync { file: self.file } }, step]);
        }
        steps
    }

    /// Clusters that the old entry named and the new one does not, and that nothing else keeps.
    fn given_up(&self, change: EntryChange) -> Vec<u32> {
        match change.old {
            // What was ours alone and at its place is kept for its block until the close (`BlockWriter`).
            Cluster::Free | Cluster::Unplaced(_) | Cluster::Zero(None) => Vec::new(),
            Cluster::Data(place) if place.own => Vec::new(),
            Cluster::Data(place) | Cluster::Partly(place, _) | Cluster::Zero(Some(place)) => {
                let stays = change.new & OFFSET == place.at.0;
                (!stays).then(|| self.cluster_number(place.at)).into_iter().collect()
            }
            Cluster::Packed { at, len } => {
                let last = at.plus(u64::from(len) - 1);
                (self.cluster_number(at)..=self.cluster_number(last)).collect()
            }
        }
    }

    /// Metadata besides second-level tables.
    pub(super) fn compose_other(
        &self,
        key: MetaKey,
        ops: &[MetaOp],
        out: &mut Vec<u8>,
    ) -> Result<HostOffset> {
        let lost = || Error::new(ErrorKind::Corrupt, format!("{key:?} has no place"));
        let s = self.writer.as_ref().ok_or_else(lost)?.state();
        let entries = || ops.iter().filter_map(entry_of);
        match key {
            MetaKey::Header => {
                let mut header = self.header().clone();
                let table = entries().any(|(_, at)| at == s.counts.new_table().0);
                Self::apply_to_header(&mut header, table.then(|| s.counts.new_table()));
                header.write_to(out);
                Ok(HostOffset(0))
            }
            MetaKey::Page { table: L1, number } => Ok(self.compose_l1(number, entries(), out)),
            MetaKey::Page { table: REFCOUNTS, number } => {
                let at = s.counts.page_at(number).ok_or_else(lost)?;
                if let Some(bytes) = s.closing.corrected(number, &self.layout) {
                    out.extend_from_slice(&bytes);
                } else {
                    let to = entries().map(|(_, to)| to).max().unwrap_or(0);
                    s.counts.compose_page(number, u32::try_from(to).unwrap_or(0), out);
                }
                Ok(at)
            }
            MetaKey::Page { table: REFCOUNT_TABLE, number } => {
                let list: Vec<_> = entries().map(|(n, at)| (usize::try_from(n).unwrap_or(0), at)).collect();
                Ok(s.counts.compose_table(number, &list, out).0)
            }
            MetaKey::Page { table: NEW_REFCOUNT_TABLE, number } => {
                s.counts.compose_new_table(number, out).ok_or_else(lost)
            }
            MetaKey::Page { .. } => Err(lost()),
        }
    }

    pub(super) fn publish_other(&self, key: MetaKey, ops: &[MetaOp]) {
        let Some(writer) = &self.writer else { return };
        let mut s = writer.state();
        for op in ops {
            match (key, *op) {
                (MetaKey::Header, MetaOp::Entry { value, .. }) => {
                    let table = s.counts.new_table();
                    if table.0 == value {
                        Self::apply_to_header(&mut self.header(), Some(table));
                    }
                    if let Some((first, n)) = s.counts.moved(value) {
                        s.drop_clusters(first..first + n);
                    }
                }
                (MetaKey::Header, _) => {
                    Self::apply_to_header(&mut self.header(), None);
                    self.reaches(self.end_of(writer.blocks.places_end()));
                }
                (MetaKey::Page { table: L1, .. }, MetaOp::Entry { index, value, .. }) => {
                    self.set_l1(index, value);
                }
                (MetaKey::Page { table: REFCOUNTS, .. }, MetaOp::Entry { value, .. }) => {
                    let to = u32::try_from(value).unwrap_or(0);
                    s.counts.announce(to);
                    self.reaches(self.end_of(to));
                }
                (MetaKey::Page { table: REFCOUNT_TABLE, .. }, MetaOp::Entry { index, value, .. }) => {
                    s.counts.set_entry(usize::try_from(index).unwrap_or(0), value);
                }
                _ => {}
            }
        }
    }
}

/// The entry a change concerns, and its new value.
fn entry_of(op: &MetaOp) -> Option<(u64, u64)> {
    let MetaOp::Entry { index, value, .. } = *op else { return None };
    Some((index, value))
}
