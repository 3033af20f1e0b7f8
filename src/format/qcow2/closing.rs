//! The clean close: entries in doubt are written again, places that nothing names are given back, and refcounts become
//! exact; then the space of what is free goes back to the file system. It takes several plans, for pages of tables have to be read for it.

use super::super::blocks::{Block, BlockFormat, Rest};
use super::layout::{Cluster, Layout, OFFSET};
use super::map::{L2, Qcow2Map};
use super::refcounts::{get, set};
use super::writer::{REFCOUNTS, Writer};
use crate::map::{HostOffset, MetaKey, MetaOp, Miss, PagePlace, Plan, Step};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::Ordering;

/// Pages of refcounts corrected by one plan.
const BATCH_PAGES: usize = 64;
/// Pieces of the file given back by one plan.
const MAX_PUNCHES: usize = 256;
/// Entries in doubt that are written again; the places of more are left as leaks.
const MAX_REWRITTEN: usize = 256;

/// How far the close has come.
#[derive(Debug, Default)]
pub(super) struct Closing {
    stage: Stage,
    /// Blocks whose entries are to be looked at, with the place kept for each.
    look: VecDeque<(u64, Option<HostOffset>)>,
    doubtful: BTreeSet<u64>,
    /// Places to be freed, by cluster.
    free: BTreeSet<u32>,
    /// Steps that write entries in doubt.
    rewrite: Vec<Step>,
    stretched: bool,
    /// What is to become of refcounts, by page: cluster, and how many references less (`None`: it has none).
    fixes: BTreeMap<u64, Vec<(u32, Option<u32>)>>,
    /// Pages of refcounts as they are in the file.
    loaded: HashMap<u64, Vec<u8>>,
    /// Clusters that have no reference any more, and a refcount that says so.
    freed: BTreeSet<u32>,
    /// Where the file will end, in clusters.
    end: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Open,
    /// Entries are looked at.
    Looking,
    /// Refcounts are corrected.
    Counting,
    /// Space is given back.
    Giving,
    Done,
}

impl Closing {
    /// A page of refcounts with its corrections, if it is one of those.
    pub(super) fn corrected(&self, page: u64, layout: &Layout) -> Option<Vec<u8>> {
        self.correct(page, layout).map(|(bytes, _)| bytes)
    }

    /// The same, and the clusters that have no reference afterwards.
    fn correct(&self, page: u64, layout: &Layout) -> Option<(Vec<u8>, Vec<u32>)> {
        let (mut bytes, mut freed) = (self.loaded.get(&page)?.clone(), Vec::new());
        let first = page * ((layout.page_bytes() * 8) >> layout.refcount_order);
        for (cluster, less) in self.fixes.get(&page)? {
            let i = usize::try_from(u64::from(*cluster) - first).expect("a refcount of this page");
            let now = get(&bytes, i, layout.refcount_order);
            let new = less.map_or(0, |n| now.saturating_sub(u64::from(n)));
            set(&mut bytes, i, layout.refcount_order, new);
            freed.extend((new == 0).then_some(*cluster));
        }
        Some((bytes, freed))
    }
}

impl Qcow2Map {
    pub(super) fn close_needs(&self) -> Option<MetaKey> {
        let writer = self.writer.as_ref()?;
        let stage = writer.state().closing.stage;
        match stage {
            Stage::Open => {
                self.start_closing(writer);
                self.look_at_entries(writer)
            }
            Stage::Looking => self.look_at_entries(writer),
            Stage::Counting => {
                let s = writer.state();
                let wanted =
                    s.closing.fixes.keys().take(BATCH_PAGES).find(|p| !s.closing.loaded.contains_key(p));
                wanted.map(|number| MetaKey::Page { table: REFCOUNTS, number: *number })
            }
            Stage::Giving | Stage::Done => None,
        }
    }

    fn start_closing(&self, writer: &Writer) {
        let Some(Rest { doubtful, stretched, kept }) = writer.blocks.finish() else {
            writer.state().closing.stage = Stage::Done;
            return;
        };
        let unused = writer.blocks.take_unused();
        let mut s = writer.state();
        let s = &mut *s;
        let blocks: BTreeSet<u64> = kept.keys().chain(&doubtful).copied().collect();
        let reserved = &s.reserved;
        let place = |b: &u64| kept.get(b).copied().filter(|_| !reserved.contains(b));
        s.closing.look = blocks.iter().map(|b| (*b, place(b))).collect();
        s.closing.free = unused.into_iter().filter(|c| !s.counts.is_own(*c)).collect();
        s.closing.free.extend(s.made.values().map(|t| t.block.0));
        s.closing.doubtful = doubtful;
        s.closing.stretched = stretched;
        s.closing.stage = Stage::Looking;
    }

    /// Looks at the entries of blocks for which places are kept: one that its entry names is not given back, nor is one that
    /// the disk may name.
    fn look_at_entries(&self, writer: &Writer) -> Option<MetaKey> {
        loop {
            let (block, place) = writer.state().closing.look.pop_front()?;
            let doubtful = writer.state().closing.doubtful.contains(&block);
            let entry = match self.entry(block) {
                Ok((entry, _)) => entry,
                Err(Miss::NeedsPage(key)) => {
                    writer.state().closing.look.push_front((block, place));
                    return Some(key);
                }
                Err(_) => continue,
            };
            if doubtful && !self.rewrite(writer, block) {
                continue;
            }
            if let Some(at) = place.filter(|at| entry & OFFSET != at.0) {
                let cluster = self.cluster_number(at);
                writer.state().closing.free.insert(cluster);
            }
        }
    }

    /// Has the entry of a block written as it is in memory. False if that is too much.
    fn rewrite(&self, writer: &Writer, block: u64) -> bool {
        if writer.state().closing.rewrite.len() >= MAX_REWRITTEN {
            return false;
        }
        let now = match self.cluster(block) {
            Ok(Cluster::Data(place)) if place.own => Block::At(place.at),
            Ok(Cluster::Zero(None)) => Block::Zero,
            // Another entry than we write: it is as it was before, and so it stays.
            _ => return self.rewrite_raw(writer, block),
        };
        match self.change(block, now) {
            Ok(steps) => {
                writer.state().closing.rewrite.extend(steps);
                true
            }
            Err(_) => false,
        }
    }

    /// The same for an entry that a change has left as it found it: its page is written as it is.
    fn rewrite_raw(&self, writer: &Writer, block: u64) -> bool {
        let Ok(Some(table)) = self.table_at(block >> self.layout.l2_bits()) else { return false };
        let (page, _) = self.entry_place(table.at, block);
        if !table.own || !self.pages.pin(page) {
            return false;
        }
        // A modification is no entry: the page is composed without a change.
        let op = MetaOp::Modification(uuid::Uuid::nil());
        writer
            .state()
            .closing
            .rewrite
            .push(Step::Meta { key: MetaKey::Page { table: L2, number: page }, op });
        true
    }

    pub(super) fn close_plan(&self) -> Plan {
        let Some(writer) = &self.writer else { return Plan::default() };
        if writer.state().closing.stage == Stage::Open {
            self.start_closing(writer);
        }
        let stage = writer.state().closing.stage;
        match stage {
            Stage::Looking => self.plan_entries(writer),
            Stage::Counting => self.plan_counts(writer),
            Stage::Giving => self.plan_giving(&mut writer.state().closing, None),
            Stage::Open | Stage::Done => Plan::default(),
        }
    }

    /// Entries in doubt, and then everything that was dropped is dropped for good. What is to be freed is decided here.
    fn plan_entries(&self, writer: &Writer) -> Plan {
        let mut s = writer.state();
        let s = &mut *s;
        let mut steps = std::mem::take(&mut s.closing.rewrite);
        let tables = std::mem::take(&mut s.doubtful_tables);
        steps.extend(tables.into_iter().map(|l1| {
            let now = usize::try_from(l1).ok().and_then(|i| self.l1.get(i));
            self.l1_step(l1, now.map_or(0, |e| e.load(Ordering::Acquire)))
        }));
        s.counts.abandon();
        let entries = s.counts.entries_to_write();
        steps.extend(entries.into_iter().map(|(n, at)| self.refcount_table_step(n, at)));
        if s.counts.header_is_doubtful() {
            let op = MetaOp::Entry { index: 0, value: s.counts.new_table().0, pointer: true };
            steps.push(Step::Meta { key: MetaKey::Header, op });
        }
        let freed = std::mem::take(&mut s.closing.free);
        let mut end = writer.blocks.places_end().max(s.counts.announced());
        let mut free: BTreeMap<u32, Option<u32>> = freed.into_iter().map(|c| (c, None)).collect();
        // What an extension announced that failed.
        free.extend((writer.blocks.places_end()..end).filter(|c| !s.counts.is_own(*c)).map(|c| (c, None)));
        while end > s.counts.opened() && free.contains_key(&(end - 1)) {
            end -= 1;
        }
        if !self.header().has(super::header::incompatible::DIRTY) {
            for (cluster, n) in std::mem::take(&mut s.dropped) {
                free.entry(cluster).or_insert(Some(n));
            }
        }
        for (cluster, less) in free {
            let page = s.counts.page_of(cluster);
            if s.counts.page_at(page).is_some() {
                s.closing.fixes.entry(page).or_default().push((cluster, less));
            }
        }
        s.closing.end = end;
        let cut = end < writer.blocks.places_end() || s.closing.stretched;
        s.closing.stage = if s.closing.fixes.is_empty() && !cut { Stage::Done } else { Stage::Counting };
        if steps.is_empty() && s.closing.stage == Stage::Done {
            return Plan::default();
        }
        steps.push(Step::Sync { file: self.file });
        Plan { clean: true, ..Plan::of(steps) }
    }

    /// The next pages of refcounts; behind the last the file is cut.
    fn plan_counts(&self, writer: &Writer) -> Plan {
        let mut s = writer.state();
        let pages: Vec<u64> =
            s.closing.fixes.keys().copied().filter(|p| s.closing.loaded.contains_key(p)).collect();
        // Those of the plan before are done.
        if pages.is_empty() {
            s.closing.stage = Stage::Giving;
            return self.plan_giving(&mut s.closing, Some(Step::Sync { file: self.file }));
        }
        let step = |number: u64| Step::Meta {
            key: MetaKey::Page { table: REFCOUNTS, number },
            op: MetaOp::Entry { index: number, value: 0, pointer: false },
        };
        Plan::of(pages.into_iter().map(step))
    }

    /// Behind `first`: space goes back that nothing names, so many pieces at a time; behind the last the file is cut.
    fn plan_giving(&self, closing: &mut Closing, first: Option<Step>) -> Plan {
        let mut steps = Vec::from_iter(first);
        let end = closing.end;
        while let Some(from) = closing.freed.first().copied().filter(|c| *c < end) {
            if steps.len() > MAX_PUNCHES {
                return Plan::of(steps);
            }
            let to = (from..end).find(|c| !closing.freed.remove(c)).unwrap_or(end);
            steps.push(Step::Punch { file: self.file, from: self.end_of(from), to: self.end_of(to) });
        }
        closing.stage = Stage::Done;
        steps.push(Step::Truncate { file: self.file, to: self.end_of(end) });
        Plan::of(steps)
    }

    /// A page of refcounts was written for good.
    pub(super) fn page_closed(&self, number: u64) {
        if let Some(writer) = &self.writer {
            let mut s = writer.state();
            let freed = s.closing.correct(number, &self.layout).map(|(_, freed)| freed);
            s.closing.freed.extend(freed.into_iter().flatten());
            if s.closing.loaded.remove(&number).is_some() {
                s.closing.fixes.remove(&number);
            }
        }
    }

    pub(super) fn refcount_page_place(&self, number: u64) -> Option<PagePlace> {
        let off = self.writer.as_ref()?.state().counts.page_at(number)?;
        Some(PagePlace { file: self.file, off, len: self.pages.page_bytes() })
    }

    pub(super) fn refcount_page_read(&self, number: u64, bytes: &[u8]) {
        if let Some(writer) = &self.writer {
            writer.state().closing.loaded.insert(number, bytes.to_vec());
        }
    }
}
