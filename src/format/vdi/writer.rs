//! What changes a VDI: the places it allocates from, and the plans, whose orders docs/formats/vdi.md explains.

use super::dense;
use super::layout::{Entry, Layout, ZERO, idx};
use super::map::{VdiMap, set_entry, set_header};
use super::table::{Used, survey};
use crate::error::Failure;
use crate::limits::POOL_STEP_BYTES;
use crate::map::{
    GuestRange, HostBlock, HostBlocks, HostOffset, MetaOp, Miss, Plan, PlanToken, Settled, Step, Taken,
};
use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use uuid::Uuid;

/// The part of an open image that is there only if it may be written.
#[derive(Debug)]
pub(super) struct Writer {
    fixed: bool,
    places: HostBlocks,
    /// Bytes the file had when it was opened.
    opened_bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    next_token: u64,
    pending: HashMap<PlanToken, Pending>,
    /// Guest blocks whose entry on disk may not be the one in memory: a write of it failed half-way.
    doubtful: BTreeSet<u32>,
    /// Why the last request for room could not be met; the next plan that finds no place answers with it.
    refused: Option<Failure>,
    /// The one that asked for that room has found a place all the same: whoever finds none has to ask anew.
    refusal_is_old: bool,
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
    Room { urgent: bool },
    Write { block: u32, place: HostBlock },
    Zero { block: u32 },
}

impl Writer {
    pub(super) fn new(layout: &Layout, fixed: bool, used: &Used, opened_bytes: u64) -> Self {
        let end = if fixed { layout.blocks } else { used.high_water };
        let step = (POOL_STEP_BYTES / layout.stride()).max(1);
        let step = u32::try_from(step).expect("64 MiB have fewer blocks than 2^32");
        let places = HostBlocks::new(end, layout.blocks, step, |p| used.places.contains(p));
        Writer { fixed, places, opened_bytes, state: Mutex::default() }
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
            return Ok(Plan::of([Step::Guest { part, file, to }]));
        }
        let Taken { block: place, clean } = self.take(beneath_zero)?;
        let to = layout.data_of(place);
        let pointer = set_entry(layout, block, place.0);
        let mut plan = if beneath_zero && clean {
            let guest = Step::Guest { part, file, to: to.plus(into) };
            Plan { clean: true, ..Plan::of([guest, pointer]) }
        } else {
            let whole = Step::Block { block: unit, file, to, len: layout.block_bytes, clean };
            Plan::of([whole, Step::Sync { file }, pointer])
        };
        plan.token = Some(self.pend(Pending::Write { block, place }));
        Ok(plan)
    }

    /// The whole block as zeros, without a place. A place it had is leaked until [`Self::end`]: only there is it
    /// certain that no request still maps to it and that the drop is durable (rule O2).
    pub(super) fn plan_zero(&self, map: &VdiMap, block: u32) -> Result<Plan, Miss> {
        self.must_be_changing()?;
        if map.entry(block) == Some(Entry::Zero) && !self.in_doubt(block) {
            return Ok(Plan::default());
        }
        let token = Some(self.pend(Pending::Zero { block }));
        Ok(Plan { token, ..Plan::of([set_entry(&map.layout, block, ZERO)]) })
    }

    /// A place for a block. Where zeros are beneath, a clean one saves a sync and the rest of the block, so room
    /// is asked for rather than a hole filled.
    fn take(&self, beneath_zero: bool) -> Result<Taken, Miss> {
        if beneath_zero && let Some(block) = self.places.take_clean() {
            return Ok(Taken { block, clean: true });
        }
        let (may_grow, grows_clean) = {
            let s = self.state();
            (s.refused.is_none() && self.places.can_grow(), !s.grows_unclean)
        };
        if beneath_zero && may_grow && grows_clean {
            return Err(Miss::NeedsRoom);
        }
        if let Some(taken) = self.places.take_any() {
            self.state().refusal_is_old = true;
            return Ok(taken);
        }
        let mut s = self.state();
        let why = s.refused.take();
        if may_grow || (why.is_some() && s.refusal_is_old && self.places.can_grow()) {
            return Err(Miss::NeedsRoom);
        }
        Err(Miss::Fail(why.unwrap_or(Failure::Os(libc::ENOSPC))))
    }

    /// The entry on disk may not be the one in memory.
    pub(super) fn in_doubt(&self, block: u32) -> bool {
        self.state().doubtful.contains(&block)
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
            (Pending::Write { block, .. } | Pending::Zero { block }, Settled::Done { .. }) => {
                self.state().doubtful.remove(&block);
            }
            (Pending::Write { block, place }, Settled::Failed { entry_submitted: true, .. }) => {
                self.places.leak(place);
                self.state().doubtful.insert(block);
            }
            (Pending::Write { place, .. }, Settled::Failed { .. }) => self.places.give_back(place),
            (Pending::Zero { block }, Settled::Failed { .. }) => {
                self.state().doubtful.insert(block);
            }
        }
    }

    /// Less is tried as long as less may help; then the request that waits gets the reason.
    fn room_failed(&self, urgent: bool, why: Failure) {
        let lacks_space = matches!(why, Failure::Os(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
        let hopeless = !lacks_space || self.places.is_at_smallest_step();
        self.places.extended(None);
        let mut s = self.state();
        s.stretched = true;
        if urgent && hopeless {
            (s.refused, s.refusal_is_old) = (Some(why), false);
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
        for block in &doubtful {
            let value = map.table[idx(*block)].load(Ordering::Acquire);
            plan.steps.push(set_entry(&map.layout, *block, value));
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
