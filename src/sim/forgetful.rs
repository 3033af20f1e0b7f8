//! A VDI that pretends not to hold its table: pages of four entries are missing until they are read, and forgotten at
//! any time. What a format with large tables does to the data path, and a look at each page that is read: it has to
//! be as it was published.

use super::Rng;
use crate::error::{Failure, Result};
use crate::map::{
    BlockIndex, Change, Extent, FileId, GuestOffset, GuestRange, HostOffset, ImageInfo, ImageMap, Intent,
    Limits, MetaKey, MetaOp, Miss, PagePlace, Plan, PlanToken, Settled,
};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use uuid::Uuid;

/// Entries of a page, and its bytes.
const ENTRIES: u64 = 4;
const BYTES: usize = 16;
/// Entries of a page of the VDI's own.
const TRUE_ENTRIES: u64 = 1024;
/// The number of our table; the VDI's is 0.
const TABLE: u8 = 7;

thread_local! {
    static LOADS: Cell<u64> = const { Cell::new(0) };
}

/// Pages that were read on this thread so far.
#[cfg(test)]
pub(super) fn loads() -> u64 {
    LOADS.get()
}

#[derive(Debug)]
pub(super) struct Forgetful {
    inner: Arc<dyn ImageMap>,
    /// Syncs that failed. Whatever was not durable by then may be gone from the files, tables like data.
    failed_syncs: Arc<AtomicU32>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rng: Rng,
    known: BTreeSet<u64>,
    /// Plans under way by page.
    pins: BTreeMap<u64, u32>,
    /// The page and the unit of each plan.
    plans: HashMap<PlanToken, (u64, GuestOffset)>,
    /// Units whose entry on disk may not be the one in memory.
    doubtful: BTreeSet<GuestOffset>,
}

impl Forgetful {
    pub(super) fn over(inner: Arc<dyn ImageMap>, seed: u64, failed_syncs: &Arc<AtomicU32>) -> Self {
        let state = State {
            rng: Rng(seed),
            known: BTreeSet::new(),
            pins: BTreeMap::new(),
            plans: HashMap::new(),
            doubtful: BTreeSet::new(),
        };
        Forgetful { inner, failed_syncs: failed_syncs.clone(), state: Mutex::new(state) }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("one thread")
    }

    fn page_of(&self, at: GuestOffset) -> u64 {
        self.inner.claim_of(at).0 / ENTRIES
    }

    /// The page's bytes as they are published, and where they lie.
    fn published(&self, page: u64) -> (PagePlace, Vec<u8>) {
        let (number, first) = (page * ENTRIES / TRUE_ENTRIES, page * ENTRIES % TRUE_ENTRIES);
        let mut all = Vec::new();
        let key = MetaKey::Page { table: 0, number };
        let (file, off) = self.inner.compose(key, &[], &mut all).expect("a VDI composes");
        let from = usize::try_from(first * 4).expect("a page");
        let bytes = all[from..all.len().min(from + BYTES)].to_vec();
        (PagePlace { file, off: off.plus(first * 4), len: bytes.len() }, bytes)
    }

    /// Now and then a page is forgotten that nobody needs to be here.
    fn forget(&self) {
        let mut s = self.state();
        if !s.rng.chance(20) || s.known.is_empty() {
            return;
        }
        let known = s.known.len();
        let nth = s.rng.index(known);
        let page = *s.known.iter().nth(nth).expect("one of them");
        let doubted = s.doubtful.iter().any(|at| self.page_of(*at) == page);
        if !s.pins.contains_key(&page) && !doubted {
            s.known.remove(&page);
        }
    }

    fn need(&self, at: GuestOffset) -> std::result::Result<u64, Miss> {
        let page = self.page_of(at);
        if self.state().known.contains(&page) {
            return Ok(page);
        }
        Err(Miss::NeedsPage(MetaKey::Page { table: TABLE, number: page }))
    }

    /// The part of `r` whose pages are here.
    fn known_part(&self, r: GuestRange) -> std::result::Result<GuestRange, Miss> {
        let mut rest = r;
        while !rest.is_empty() {
            match self.need(rest.start()) {
                Ok(_) => rest = rest.skip(self.inner.unit(rest.start()).end().since(rest.start())),
                Err(miss) if rest.len() == r.len() => return Err(miss),
                Err(_) => break,
            }
        }
        Ok(r.take(r.len() - rest.len()))
    }
}

impl ImageMap for Forgetful {
    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        let known = self.known_part(r)?;
        self.forget();
        self.inner.look(known, why)
    }

    fn unit(&self, at: GuestOffset) -> GuestRange {
        self.inner.unit(at)
    }

    fn claim_of(&self, at: GuestOffset) -> BlockIndex {
        self.inner.claim_of(at)
    }

    fn plan(&self, change: Change) -> std::result::Result<Plan, Miss> {
        let at = match change {
            Change::Write { part, .. } => part.start(),
            Change::Zero { unit } => unit.start(),
        };
        let page = self.need(at)?;
        let plan = self.inner.plan(change)?;
        if let Some(token) = plan.token {
            let mut s = self.state();
            *s.pins.entry(page).or_default() += 1;
            s.plans.insert(token, (page, self.inner.unit(at).start()));
        }
        Ok(plan)
    }

    fn room(&self, urgent: bool) -> Option<Plan> {
        self.inner.room(urgent)
    }

    fn settle(&self, token: PlanToken, how: Settled) {
        self.inner.settle(token, how);
        let mut s = self.state();
        let Some((page, unit)) = s.plans.remove(&token) else { return };
        if self.inner.must_write(unit) {
            s.doubtful.insert(unit);
        } else {
            s.doubtful.remove(&unit);
        }
        let pins = s.pins.get_mut(&page).expect("pinned by its plan");
        *pins -= 1;
        if *pins == 0 {
            s.pins.remove(&page);
        }
        drop(s);
        self.forget();
    }

    fn must_write(&self, at: GuestOffset) -> bool {
        self.inner.must_write(at)
    }

    fn has_page(&self, key: MetaKey) -> bool {
        matches!(key, MetaKey::Page { table: TABLE, number } if self.state().known.contains(&number))
    }

    fn page_place(&self, key: MetaKey) -> std::result::Result<PagePlace, Failure> {
        match key {
            MetaKey::Page { table: TABLE, number } => Ok(self.published(number).0),
            _ => Err(Failure::Corrupt),
        }
    }

    fn page_read(&self, key: MetaKey, bytes: &[u8]) -> std::result::Result<(), Failure> {
        let MetaKey::Page { table: TABLE, number } = key else { return Err(Failure::Corrupt) };
        let as_published = bytes == self.published(number).1 || self.failed_syncs.load(Ordering::Relaxed) > 0;
        assert!(as_published, "page {number} was read before what is published was written");
        self.state().known.insert(number);
        LOADS.set(LOADS.get() + 1);
        Ok(())
    }

    fn compose(&self, key: MetaKey, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        self.inner.compose(key, ops, out)
    }

    fn publish(&self, key: MetaKey, ops: &[MetaOp]) {
        for op in ops {
            if let MetaOp::Entry { index, .. } = op {
                let s = self.state();
                assert!(
                    s.pins.contains_key(&(index / ENTRIES)) || s.plans.is_empty(),
                    "changed, and not pinned"
                );
            }
        }
        self.inner.publish(key, ops);
    }

    fn begin(&self, modification: Uuid) -> Plan {
        self.inner.begin(modification)
    }

    fn end(&self) -> Plan {
        self.inner.end()
    }

    fn grown(&self, file_bytes: u64) -> Option<u64> {
        self.inner.grown(file_bytes)
    }

    fn info(&self) -> ImageInfo {
        self.inner.info()
    }
}
