//! The clean close: entries in doubt are written again, the file ends behind the last cluster in use, and the mark goes last.

use super::super::blocks::Rest;
use super::Cluster;
use super::map::LevelMap;
use super::writer::Writer;
use crate::map::{HostOffset, MetaKey, MetaOp, Miss, Plan, Step};
use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::Ordering;

/// How far the close has come.
#[derive(Debug, Default)]
pub(super) struct Closing {
    stage: Stage,
    /// Clusters of the disk for which places are kept, to be looked at.
    look: VecDeque<(u64, HostOffset)>,
    /// Clusters of the disk whose entries are in doubt; their pages are still here.
    doubtful: BTreeSet<u64>,
    /// Places that nothing uses, by cluster of the file.
    free: BTreeSet<u32>,
    stretched: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Open,
    Looking,
    Done,
}

impl LevelMap {
    pub(super) fn close_needs(&self) -> Option<MetaKey> {
        let writer = self.writer.as_ref()?;
        self.start_closing(writer);
        self.look_at_entries(writer)
    }

    fn start_closing(&self, writer: &Writer) {
        let mut guard = writer.state();
        let s = &mut *guard;
        if s.closing.stage != Stage::Open {
            return;
        }
        let Some(Rest { doubtful, stretched, kept }) = writer.blocks.finish() else {
            s.closing.stage = Stage::Done;
            return;
        };
        let run = self.geometry.table_clusters();
        s.closing.free = writer.blocks.take_unused().into_iter().collect();
        s.closing.free.extend(s.made.values().flat_map(|t| t.block.0..t.block.0 + run));
        s.closing.look = kept.into_iter().collect();
        s.closing.doubtful = doubtful;
        s.closing.stretched = stretched;
        s.closing.stage = Stage::Looking;
    }

    /// A place that is kept for a cluster is free unless the entry names it. As the entry will have been written by then, that of
    /// memory is the disk's.
    fn look_at_entries(&self, writer: &Writer) -> Option<MetaKey> {
        loop {
            let (block, at) = writer.state().closing.look.pop_front()?;
            match self.cluster(block) {
                Err(Miss::NeedsPage(key)) => {
                    writer.state().closing.look.push_front((block, at));
                    return Some(key);
                }
                Ok(Cluster::At(now)) if now == at => {}
                Err(_) => {}
                Ok(_) => {
                    let place = at.0 / self.geometry.cluster_bytes;
                    writer.state().closing.free.extend(u32::try_from(place));
                }
            }
        }
    }

    pub(super) fn close_plan(&self) -> Plan {
        let Some(writer) = &self.writer else { return Plan::default() };
        self.start_closing(writer);
        let mut guard = writer.state();
        let s = &mut *guard;
        if s.closing.stage != Stage::Looking {
            return Plan::default();
        }
        s.closing.stage = Stage::Done;
        let file = self.file;
        let mut steps: Vec<Step> =
            s.closing.doubtful.iter().filter_map(|block| self.rewritten(*block)).collect();
        steps.extend(s.doubtful_tables.iter().map(|l1| {
            let now = usize::try_from(*l1).ok().and_then(|i| self.l1.get(i));
            self.l1_step(*l1, now.map_or(0, |e| e.load(Ordering::Acquire)))
        }));
        // Before the sync the disk may still name what is cut off, or miss what the mark vouches for.
        steps.push(Step::Sync { file });
        let have = writer.blocks.places_end();
        let mut end = have;
        while end > 0 && s.closing.free.contains(&(end - 1)) {
            end -= 1;
        }
        if end < have || s.closing.stretched {
            steps.extend([Step::Truncate { file, to: HostOffset(self.place_of(end)) }, Step::Barrier]);
        }
        steps.extend(self.mark(false));
        Plan::of(steps)
    }

    fn place_of(&self, cluster: u32) -> u64 {
        u64::from(cluster) * self.geometry.cluster_bytes
    }

    /// The page of an entry in doubt, as it is in memory. It is pinned since the doubt began.
    fn rewritten(&self, block: u64) -> Option<Step> {
        let table = self.table_at(self.l1_of(block)).ok()??;
        let (number, _) = self.page_of(self.word_of(table, block));
        // A mark is no entry: the page is composed without a change.
        let key = MetaKey::Page { table: super::map::L2, number };
        Some(Step::Meta { key, op: MetaOp::InUse(true) })
    }
}
