//! What changes a VDI: the places it allocates from, and the plans, whose orders docs/formats/vdi.md explains.

use super::dense;
use super::layout::{Entry, Layout, ZERO, idx};
use super::map::{VdiMap, set_entry, set_header};
use super::table::{Used, survey};
use crate::error::Failure;
use crate::limits::POOL_STEP_BYTES;
use crate::map::sabotage::{Sabotage, is_broken};
use crate::map::{
    GuestRange, HostBlock, HostBlocks, HostOffset, MetaOp, Miss, Plan, PlanToken, Settled, Step, Taken,
};
use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// The part of an open image that is there only if it may be written.
#[derive(Debug)]
pub(super) struct Writer {
    fixed: bool,
    places: HostBlocks,
    /// Bytes the file had when it was opened.
    opened_bytes: u64,
    /// [`State::doubtful`] is not empty: saves the hot path the lock.
    any_doubt: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    next_token: u64,
    pending: HashMap<PlanToken, Pending>,
    /// Guest blocks whose entry on disk may not be the one in memory: a write of it failed half-way. The next
    /// change of such a block writes the entry again, even where only bytes in place change.
    doubtful: BTreeSet<u32>,
    /// Places of blocks that have none in memory while the disk, or a request under way, may still name them:
    /// dropped by zeros, or named by an entry whose write failed. Each is kept for its own block, for which any
    /// of its old bytes is a possible outcome; for another it would be a reuse before its time (rule O2).
    kept: HashMap<u32, HostBlock>,
    /// Why the last urgent extension failed for good: the next plan makes do without, or answers with it.
    refused: Option<Failure>,
    /// The last extension made places with old bytes in them: asking for more brings no clean ones.
    grows_unclean: bool,
    /// A failed extension may have lengthened the file all the same.
    stretched: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Nothing was changed yet.
    #[default]
    Untouched,
    /// [`Writer::begin`] was carried out.
    Changing,
    /// [`Writer::end`] was asked for.
    Ended,
}

/// What a plan under way has reserved.
#[derive(Clone, Copy, Debug)]
enum Pending {
    Begin,
    Room {
        urgent: bool,
    },
    /// `kept`: the place was the block's own before.
    Write {
        block: u32,
        place: HostBlock,
        kept: bool,
    },
    /// The block's entry, which names `drops` before and nothing afterwards.
    Entry {
        block: u32,
        drops: Option<HostBlock>,
    },
}

impl Writer {
    pub(super) fn new(layout: &Layout, fixed: bool, used: &Used, opened_bytes: u64) -> Self {
        let end = if fixed { layout.blocks } else { used.high_water };
        let step = (POOL_STEP_BYTES / layout.stride()).max(1);
        let step = u32::try_from(step).expect("64 MiB have fewer blocks than 2^32");
        let places = HostBlocks::new(end, layout.blocks, step, |p| used.places.contains(p));
        Writer { fixed, places, opened_bytes, any_doubt: AtomicBool::new(false), state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("writer lock")
    }

    /// Fails before [`Self::begin`] and after [`Self::end`]: what is on disk is not ready for changes then.
    fn must_be_changing(&self) -> Result<(), Miss> {
        match self.state().phase {
            Phase::Changing => Ok(()),
            Phase::Untouched | Phase::Ended => Err(Miss::Fail(Failure::ReadOnly)),
        }
    }

    /// Bytes for a part of one block. See [`Change::Write`].
    pub(super) fn plan_write(
        &self,
        map: &VdiMap,
        block: u32,
        part: GuestRange,
        beneath_zero: bool,
    ) -> Result<Plan, Miss> {
        self.must_be_changing()?;
        let (file, layout) = (map.file, &map.layout);
        let unit = layout.unit(block);
        if !unit.contains(part) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        let into = part.start().since(unit.start());
        if let Some(Entry::At(place)) = map.entry(block) {
            let to = layout.data_of(place).plus(into);
            let guest = Step::Guest { part, file, to };
            if !self.doubts(block) {
                return Ok(Plan::of([guest]));
            }
            let token = Some(self.pend(Pending::Entry { block, drops: None }));
            return Ok(Plan { token, ..Plan::of([set_entry(layout, block, place.0), guest]) });
        }
        let own = self.state().kept.remove(&block);
        let Taken { block: place, clean } = match own {
            Some(block) => Taken { block, clean: false },
            None => self.take(beneath_zero)?,
        };
        let to = layout.data_of(place);
        let pointer = set_entry(layout, block, place.0);
        let mut plan = if beneath_zero && clean {
            let guest = Step::Guest { part, file, to: to.plus(into) };
            Plan { clean: true, ..Plan::of([guest, pointer]) }
        } else {
            let whole = Step::Block { block: unit, file, to, len: layout.block_bytes, clean };
            Plan::of([whole, Step::Sync { file }, pointer])
        };
        plan.token = Some(self.pend(Pending::Write { block, place, kept: own.is_some() }));
        Ok(plan)
    }

    /// The whole block as zeros, without a place. A place it had is kept for it until [`Self::end`]: only there
    /// is it certain that no request still maps to it and that the drop is durable (rule O2). In a fixed image
    /// every block keeps its place: zeros are written there.
    pub(super) fn plan_zero(&self, map: &VdiMap, block: u32) -> Result<Plan, Miss> {
        self.must_be_changing()?;
        let drops = match map.entry(block) {
            Some(Entry::Zero) if !self.doubts(block) => return Ok(Plan::default()),
            Some(Entry::At(_)) if self.fixed => return Err(Miss::Fail(Failure::Unsupported)),
            Some(Entry::At(place)) => Some(place),
            _ => None,
        };
        let token = Some(self.pend(Pending::Entry { block, drops }));
        Ok(Plan { token, ..Plan::of([set_entry(&map.layout, block, ZERO)]) })
    }

    /// A place for a block. Where zeros are beneath, a clean one saves a sync and the rest of the block, so room
    /// is asked for rather than a hole filled.
    fn take(&self, beneath_zero: bool) -> Result<Taken, Miss> {
        if beneath_zero && let Some(block) = self.places.take_clean() {
            return Ok(Taken { block, clean: true });
        }
        let (refused, grows_clean) = {
            let mut s = self.state();
            (s.refused.take(), !s.grows_unclean)
        };
        let may_grow = refused.is_none() && self.places.can_grow();
        if beneath_zero && may_grow && grows_clean {
            return Err(Miss::NeedsRoom);
        }
        if let Some(taken) = self.places.take_any() {
            return Ok(taken);
        }
        if may_grow {
            return Err(Miss::NeedsRoom);
        }
        Err(Miss::Fail(refused.unwrap_or(Failure::Os(libc::ENOSPC))))
    }

    fn pend(&self, what: Pending) -> PlanToken {
        let mut s = self.state();
        let token = PlanToken(s.next_token);
        s.next_token += 1;
        s.pending.insert(token, what);
        token
    }

    /// More clean places. The count on disk rises, durably, before any of them is used: another program that
    /// opens the image after a crash allocates from that count on (rule O3).
    pub(super) fn room(&self, map: &VdiMap, urgent: bool) -> Option<Plan> {
        self.must_be_changing().ok()?;
        if !urgent && self.state().grows_unclean {
            return None; // nothing is gained ahead of need, and the count would run up to the end of the disk
        }
        let (from, to) = self.places.begin_extension(urgent)?;
        let file = map.file;
        let (layout, count) = (&map.layout, set_header(MetaOp::Count(to)));
        let extend = Step::Extend { file, from: layout.end_of(from), to: layout.end_of(to) };
        let token = Some(self.pend(Pending::Room { urgent }));
        Some(Plan { token, ..Plan::of([extend, count, Step::Sync { file }]) })
    }

    pub(super) fn settle(&self, token: PlanToken, how: Settled) {
        let Some(what) = self.state().pending.remove(&token) else {
            debug_assert!(false, "{token:?} settled twice");
            return;
        };
        match (what, how) {
            (Pending::Begin, Settled::Done { .. }) => self.state().phase = Phase::Changing,
            (Pending::Begin, Settled::Failed { .. }) => {}
            (Pending::Room { .. }, Settled::Done { clean }) => {
                self.places.extended(Some(clean));
                let mut s = self.state();
                s.refused = None;
                s.grows_unclean = !clean;
            }
            (Pending::Room { urgent }, Settled::Failed { why, .. }) => self.room_failed(urgent, why),
            (Pending::Write { block, .. }, Settled::Done { .. }) => self.doubt(block, false),
            (Pending::Entry { block, drops }, Settled::Done { .. }) => {
                self.doubt(block, false);
                self.keep(block, drops);
            }
            (Pending::Write { block, place, kept }, Settled::Failed { entry_submitted, .. }) => {
                if entry_submitted {
                    self.doubt(block, true);
                }
                if (entry_submitted || kept) && !is_broken(Sabotage::EarlyReuse) {
                    self.keep(block, Some(place));
                } else {
                    self.places.give_back(place);
                }
            }
            (Pending::Entry { block, .. }, Settled::Failed { .. }) => self.doubt(block, true),
        }
    }

    fn keep(&self, block: u32, place: Option<HostBlock>) {
        if let Some(place) = place {
            let before = self.state().kept.insert(block, place);
            // The same place twice: its entry was written and published, only the data beside it failed.
            debug_assert!(before.is_none_or(|b| b == place), "block {block} has two places");
        }
    }

    /// The entry of the block on disk may not be the one in memory.
    pub(super) fn doubts(&self, block: u32) -> bool {
        self.any_doubt.load(Ordering::Acquire) && self.state().doubtful.contains(&block)
    }

    fn doubt(&self, block: u32, doubtful: bool) {
        if !doubtful && !self.any_doubt.load(Ordering::Acquire) {
            return;
        }
        let mut s = self.state();
        if doubtful {
            s.doubtful.insert(block);
        } else {
            s.doubtful.remove(&block);
        }
        self.any_doubt.store(!s.doubtful.is_empty(), Ordering::Release);
    }

    /// Less is tried as long as less may help; then the request that waits gets the reason.
    fn room_failed(&self, urgent: bool, why: Failure) {
        let lacks_space = matches!(why, Failure::Os(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
        let hopeless = !lacks_space || self.places.is_at_smallest_step();
        self.places.extended(None);
        let mut s = self.state();
        s.stretched = true;
        if urgent && hopeless {
            s.refused = Some(why);
        }
    }

    /// Once, before the first change. The new modification UUID tells children and caches that the contents
    /// are about to differ. The count is above every place in use, so that holes are ours to fill; it does not
    /// fall yet, for what we read may not be durable. The tail nobody names is cut off behind the sync, so that
    /// what an extension adds there reads as zeros.
    pub(super) fn begin(&self, map: &VdiMap, modification: Uuid) -> Plan {
        if self.state().phase != Phase::Untouched {
            return Plan::default();
        }
        let file = map.file;
        let count = self.places.end().max(map.header().allocated());
        let mut plan = Plan::of([
            set_header(MetaOp::Modification(modification)),
            set_header(MetaOp::Count(count)),
            Step::Sync { file },
        ]);
        let (have, end) = (HostOffset(self.opened_bytes), map.layout.end_of(self.places.end()));
        if !self.fixed && have > end {
            plan.steps.push(Step::Truncate { file, to: end });
        } else if !self.fixed && have < end {
            plan.steps.push(Step::Extend { file, from: have, to: end });
        }
        plan.token = Some(self.pend(Pending::Begin));
        plan
    }

    /// At a clean close. Nothing is reused before what named it is durably gone, and the count falls only when
    /// no entry on disk can be above it.
    pub(super) fn end(&self, map: &VdiMap) -> Plan {
        let (doubtful, stretched) = {
            let mut s = self.state();
            let phase = std::mem::replace(&mut s.phase, Phase::Ended);
            if phase != Phase::Changing {
                return Plan::default();
            }
            (std::mem::take(&mut s.doubtful), s.stretched)
        };
        let mut plan = Plan::default();
        for block in doubtful {
            let value = map.table[idx(block)].load(Ordering::Acquire);
            plan.steps.push(set_entry(&map.layout, block, value));
        }
        if self.fixed {
            return plan;
        }
        self.make_dense(map, stretched, &mut plan);
        plan
    }

    fn make_dense(&self, map: &VdiMap, stretched: bool, plan: &mut Plan) {
        let (file, layout) = (map.file, &map.layout);
        let entries = || map.table.iter().map(|e| e.load(Ordering::Acquire));
        let used = survey(entries(), layout, u64::MAX, |f| debug_assert!(false, "{f:?}"));
        let count = u32::try_from(used.places.count()).expect("places are 32-bit numbers");
        let moves = dense::relocations(entries(), &used);
        let slack = self.places.end() > count || stretched;
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
