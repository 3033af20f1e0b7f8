//! What formats with a table of blocks have in common when they are written: places to allocate from, plans in the
//! orders of the crash rules (docs/crash-model.md), and doubt after failures.
//!
//! A format says what its table says and which steps change it ([`BlockFormat`]); everything else lives here, once.

use crate::error::Failure;
use crate::map::{
    FileId, GuestRange, HostBlock, HostBlocks, HostOffset, Miss, Plan, PlanToken, Settled, Step, Taken,
};
use crate::probe::sabotage::{Sabotage, is_broken};
use smallvec::{SmallVec, smallvec};
use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Steps of a plan, or a part of them.
pub(super) type Steps = SmallVec<[Step; 6]>;

/// What a table says of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// Nothing: the parent's bytes are seen, in a base zeros.
    Free,
    /// Zeros.
    Zero,
    /// The block's data begins here.
    At(HostOffset),
}

/// What [`BlockWriter`] has to know of a format. Blocks are numbered as they lie on the disk.
pub(super) trait BlockFormat {
    /// The file that blocks are in.
    fn file(&self) -> FileId;

    /// Bytes of a block in the file.
    fn block_bytes(&self) -> u64;

    /// The guest range of a block, clipped to the disk.
    fn unit(&self, block: u64) -> GuestRange;

    /// What the table says, as it is published.
    ///
    /// # Errors
    /// [`Miss::NeedsPage`], or [`Miss::Fail`] for an entry that cannot be.
    fn block(&self, block: u64) -> Result<Block, Miss>;

    /// The block has a place, and only a part of what it shows is there (sector bitmaps). Its first change makes it whole:
    /// [`Self::change`] to the place it has says so behind the data.
    ///
    /// # Errors
    /// As [`Self::block`].
    fn is_partly(&self, _block: u64) -> Result<bool, Miss> {
        Ok(false)
    }

    /// Where a block's data begins at a place.
    fn data_of(&self, place: HostBlock) -> HostOffset;

    /// End of a file that has this many places.
    fn end_of(&self, places: u32) -> HostOffset;

    /// The changes that make the table say `now` of the block. What they need in memory stays there until
    /// [`Self::settled`].
    ///
    /// # Errors
    /// [`Miss::NeedsPage`]; [`Failure::Unsupported`] where the format has no word for zeros.
    fn change(&self, block: u64, now: Block) -> Result<Steps, Miss>;

    /// The plan with the steps of one [`Self::change`] of this block has ended, and what it needed in memory may go. While the entry
    /// is in doubt (its write failed) one such call is owed: memory alone knows what it should be.
    fn settled(&self, _block: u64) {}

    /// A place that the format's own entry names for the block although nothing is there: it takes the block's data.
    fn reserved_for(&self, _block: u64) -> Option<HostOffset> {
        None
    }

    /// The place is one of the format's own tables, and no block's.
    fn is_table(&self, _place: HostBlock) -> bool {
        false
    }

    /// The place may hold what an extension that failed wrote for the format's own tables: it is not clean, whatever the file
    /// system says of the space that was added there since.
    fn is_soiled(&self, _place: HostBlock) -> bool {
        false
    }

    /// Fewest places that an extension now is of use with: where tables grow along with the file, they are among them.
    fn least_extension(&self) -> u32 {
        1
    }

    /// What has to be durable, besides the file's length, before places below `places` are used.
    fn announce(&self, places: u32) -> Steps;
}

/// The part of an open image that is there only if it may be written.
#[derive(Debug)]
pub(super) struct BlockWriter {
    /// Every block has its place and keeps it.
    fixed: bool,
    places: HostBlocks,
    /// [`State::doubtful`] is not empty: saves the hot path the lock.
    any_doubt: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    next_token: u64,
    pending: HashMap<PlanToken, Pending>,
    /// Blocks whose entry on disk may not be the one in memory: a write of it failed half-way. The next change of such a
    /// block writes the entry again, even where only bytes in place change.
    doubtful: BTreeSet<u64>,
    /// Places of blocks that have none in memory while the disk, or a request under way, may still name them:
    /// dropped by zeros, or named by an entry whose write failed. Each is kept for its own block, for which any
    /// of its old bytes is a possible outcome; for another it would be a reuse before its time (rule O2).
    kept: HashMap<u64, HostOffset>,
    /// Why the last urgent extension failed for good: the next plan makes do without, or answers with it.
    refused: Option<Failure>,
    /// The last extension made places with old bytes in them: asking for more brings no clean ones.
    grows_unclean: bool,
    /// A failed extension may have lengthened the file all the same.
    stretched: bool,
    /// Since [`BlockWriter::begin`], or since an extension failed, a whole sync has followed: behind the file's end is nothing that
    /// lengthening alone would show again.
    end_is_durable: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Nothing was changed yet.
    #[default]
    Untouched,
    /// [`BlockWriter::begin`] was carried out.
    Changing,
    /// [`BlockWriter::finish`] was called.
    Ended,
}

/// What a plan under way has reserved.
#[derive(Clone, Copy, Debug)]
enum Pending {
    Begin,
    Room {
        urgent: bool,
    },
    /// `place`: the one taken for it; `None`: the block's own from before.
    Write {
        block: u64,
        at: HostOffset,
        place: Option<HostBlock>,
    },
    /// The block's entry, which names `drops` before and nothing afterwards.
    Entry {
        block: u64,
        drops: Option<HostOffset>,
    },
}

/// What is left to do at a clean close.
#[derive(Debug)]
pub(super) struct Rest {
    /// Blocks whose entry has to be written again.
    pub(super) doubtful: BTreeSet<u64>,
    /// The file may be longer than its places need.
    pub(super) stretched: bool,
    /// Places kept for their blocks, which may name them or not.
    pub(super) kept: HashMap<u64, HostOffset>,
}

impl BlockWriter {
    pub(super) fn new(places: HostBlocks, fixed: bool) -> Self {
        BlockWriter { fixed, places, any_doubt: AtomicBool::new(false), state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("writer lock")
    }

    pub(super) fn is_fixed(&self) -> bool {
        self.fixed
    }

    /// The places that no block has, at the close.
    pub(super) fn take_unused(&self) -> Vec<u32> {
        self.places.take_unused()
    }

    /// Places the file has, free ones included.
    pub(super) fn places_end(&self) -> u32 {
        self.places.end()
    }

    /// Fails before [`Self::begin`] and after [`Self::finish`]: what is on disk is not ready for changes then.
    pub(super) fn must_be_changing(&self) -> Result<(), Miss> {
        match self.state().phase {
            Phase::Changing => Ok(()),
            Phase::Untouched | Phase::Ended => Err(Miss::Fail(Failure::ReadOnly)),
        }
    }

    /// Bytes for a part of one block. See [`crate::map::Change::Write`].
    pub(super) fn plan_write(
        &self,
        f: &dyn BlockFormat,
        block: u64,
        part: GuestRange,
        beneath_zero: bool,
    ) -> Result<Plan, Miss> {
        self.must_be_changing()?;
        let (file, unit) = (f.file(), f.unit(block));
        if !unit.contains(part) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        let into = part.start().since(unit.start());
        if let now @ Block::At(at) = f.block(block)? {
            if f.is_partly(block)? {
                let whole = Step::Block { block: unit, file, to: at, len: f.block_bytes(), clean: false };
                return self.plan_missing(f, block, at, smallvec![whole]);
            }
            return self.plan_in_place(f, block, now, Step::Guest { part, file, to: at.plus(into) });
        }
        let own = self.state().kept.get(&block).copied().or_else(|| f.reserved_for(block));
        let (at, place, clean) = match own {
            Some(at) => (at, None, false),
            None => {
                let Taken { block: place, clean } = self.take(f, beneath_zero)?;
                (f.data_of(place), Some(place), clean)
            }
        };
        let entry = f.change(block, Block::At(at)).inspect_err(|_| {
            // nothing names it, so it is as free as it was, though no longer known to be clean
            place.into_iter().for_each(|p| self.places.give_back(p));
        })?;
        let mut plan = if beneath_zero && clean {
            let guest = Step::Guest { part, file, to: at.plus(into) };
            Plan { clean: true, ..Plan::of(std::iter::once(guest).chain(entry)) }
        } else {
            let whole = Step::Block { block: unit, file, to: at, len: f.block_bytes(), clean };
            Plan::of([whole, Step::Sync { file }].into_iter().chain(entry))
        };
        if own.is_some() {
            self.state().kept.remove(&block);
        }
        plan.token = Some(self.pend(Pending::Write { block, at, place }));
        Ok(plan)
    }

    /// The block has its place: only its entry may be in doubt.
    fn plan_in_place(&self, f: &dyn BlockFormat, block: u64, now: Block, guest: Step) -> Result<Plan, Miss> {
        if !self.doubts(block) {
            return Ok(Plan::of([guest]));
        }
        let mut steps = f.change(block, now)?;
        steps.push(guest);
        let token = Some(self.pend(Pending::Entry { block, drops: None }));
        Ok(Plan { token, ..Plan::of(steps) })
    }

    /// The whole block as zeros, without a place. A place it had is kept for it until the close: only there is it certain
    /// that no request still maps to it and that the drop is durable (rule O2). In a fixed image every block keeps
    /// its place: zeros are written there.
    pub(super) fn plan_zero(&self, f: &dyn BlockFormat, block: u64) -> Result<Plan, Miss> {
        self.must_be_changing()?;
        let drops = match f.block(block)? {
            Block::Zero if !self.doubts(block) => return Ok(Plan::default()),
            Block::At(_) if self.fixed => return Err(Miss::Fail(Failure::Unsupported)),
            Block::At(at) => Some(at),
            _ => None,
        };
        let steps = f.change(block, Block::Zero)?;
        let token = Some(self.pend(Pending::Entry { block, drops }));
        Ok(Plan { token, ..Plan::of(steps) })
    }

    /// A place for a block. Where zeros are beneath, a clean one saves a sync and the rest of the block, so room
    /// is asked for rather than a hole filled.
    pub(super) fn take(&self, f: &dyn BlockFormat, beneath_zero: bool) -> Result<Taken, Miss> {
        if beneath_zero && let Some(block) = self.take_clean(f) {
            return Ok(Taken { block, clean: true });
        }
        let growth = self.growth(1);
        if beneath_zero && growth == Growth::Clean {
            return Err(Miss::NeedsRoom);
        }
        while let Some(taken) = self.places.take_any() {
            if !f.is_table(taken.block) {
                return Ok(Taken { clean: taken.clean && !f.is_soiled(taken.block), ..taken });
            }
        }
        Err(growth.otherwise())
    }

    /// How the file may grow by `n` places. A refusal is told once.
    fn growth(&self, n: u32) -> Growth {
        let mut s = self.state();
        match s.refused.take() {
            Some(why) => Growth::None(why),
            None if !self.places.can_grow_by(n) => Growth::None(Failure::Os(libc::ENOSPC)),
            None if s.grows_unclean => Growth::Unclean,
            None => Growth::Clean,
        }
    }

    /// `n` places in a row for a table, by the first of them. As [`Self::take`] where zeros are beneath.
    pub(super) fn take_run(&self, n: u32) -> Result<Taken, Miss> {
        if let Some(block) = self.places.take_clean_run(n) {
            return Ok(Taken { block, clean: true });
        }
        let growth = self.growth(n);
        if growth == Growth::Clean {
            return Err(Miss::NeedsRoom);
        }
        if let Some(block) = self.places.take_unclean_run(n) {
            return Ok(Taken { block, clean: false });
        }
        Err(growth.otherwise())
    }

    fn take_clean(&self, f: &dyn BlockFormat) -> Option<HostBlock> {
        loop {
            let block = self.places.take_clean()?;
            if f.is_soiled(block) {
                self.places.give_back(block);
            } else if !f.is_table(block) {
                return Some(block);
            }
        }
    }

    /// The block has its place, but not all of it is there: `missing` writes that, from what shows through, and what of the request
    /// goes to the parts that are.
    pub(super) fn plan_missing(
        &self,
        f: &dyn BlockFormat,
        block: u64,
        at: HostOffset,
        missing: Steps,
    ) -> Result<Plan, Miss> {
        self.must_be_changing()?;
        let entry = f.change(block, Block::At(at))?;
        let sync = Step::Sync { file: f.file() };
        let token = Some(self.pend(Pending::Entry { block, drops: None }));
        Ok(Plan { token, ..Plan::of(missing.into_iter().chain([sync]).chain(entry)) })
    }

    fn pend(&self, what: Pending) -> PlanToken {
        let mut s = self.state();
        let token = PlanToken(s.next_token);
        s.next_token += 1;
        s.pending.insert(token, what);
        token
    }

    /// More clean places. What other programs allocate from says so on disk, durably, before any of them is used
    /// (rule O3).
    pub(super) fn room(&self, f: &dyn BlockFormat, urgent: bool) -> Option<Plan> {
        self.must_be_changing().ok()?;
        if !urgent && self.state().grows_unclean {
            return None; // nothing is gained ahead of need, and the file would run up to the end of the disk
        }
        self.places.extend_by_at_least(f.least_extension());
        let (from, to) = self.places.begin_extension(urgent)?;
        let file = f.file();
        let whole = {
            let s = self.state();
            !s.end_is_durable || s.grows_unclean
        };
        let steps = durably(file, (f.end_of(from), f.end_of(to)), f.announce(to), whole);
        let token = Some(self.pend(Pending::Room { urgent }));
        Some(Plan { token, ..Plan::of(steps) })
    }

    pub(super) fn settle(&self, f: &dyn BlockFormat, token: PlanToken, how: Settled) {
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
                s.end_is_durable = true;
            }
            (Pending::Room { urgent }, Settled::Failed { why, .. }) => self.room_failed(urgent, why),
            (Pending::Write { block, at, place }, how) => {
                let ended = self.write_ended(block, at, place, how);
                (0..ended).for_each(|_| f.settled(block));
            }
            (Pending::Entry { block, drops }, how) => {
                let ended = self.doubt(block, matches!(how, Settled::Failed { .. }));
                if matches!(how, Settled::Done { .. }) {
                    self.keep(block, drops);
                }
                (0..ended).for_each(|_| f.settled(block));
            }
        }
    }

    /// Says how many [`BlockFormat::settled`] are due.
    fn write_ended(&self, block: u64, at: HostOffset, place: Option<HostBlock>, how: Settled) -> u32 {
        let Settled::Failed { entry_submitted, .. } = how else { return self.doubt(block, false) };
        let due = if entry_submitted { self.doubt(block, true) } else { 1 };
        match place {
            Some(place) if !entry_submitted || is_broken(Sabotage::EarlyReuse) => {
                self.places.give_back(place)
            }
            _ => self.keep(block, Some(at)),
        }
        due
    }

    fn keep(&self, block: u64, at: Option<HostOffset>) {
        if let Some(at) = at {
            let before = self.state().kept.insert(block, at);
            // The same place twice: its entry was written and published, only the data beside it failed.
            debug_assert!(before.is_none_or(|b| b == at), "block {block} has two places");
        }
    }

    /// The entry of the block on disk may not be the one in memory.
    pub(super) fn doubts(&self, block: u64) -> bool {
        self.any_doubt.load(Ordering::Acquire) && self.state().doubtful.contains(&block)
    }

    /// A plan for the block has ended, with or without doubt. Says how many [`BlockFormat::settled`] are due: that of the plan
    /// itself, and once there is no doubt any more, the one owed since it began.
    fn doubt(&self, block: u64, doubtful: bool) -> u32 {
        if !doubtful && !self.any_doubt.load(Ordering::Acquire) {
            return 1;
        }
        let mut s = self.state();
        let due = if doubtful {
            u32::from(!s.doubtful.insert(block))
        } else {
            1 + u32::from(s.doubtful.remove(&block))
        };
        self.any_doubt.store(!s.doubtful.is_empty(), Ordering::Release);
        due
    }

    /// Less is tried as long as less may help; then the request that waits gets the reason.
    fn room_failed(&self, urgent: bool, why: Failure) {
        let lacks_space = matches!(why, Failure::Os(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
        let hopeless = !lacks_space || self.places.is_at_smallest_step();
        self.places.extended(None);
        let mut s = self.state();
        s.stretched = true;
        s.end_is_durable = false;
        if urgent && hopeless {
            s.refused = Some(why);
        }
    }

    /// Once, before the first change: `steps` with a token. Empty afterwards.
    pub(super) fn begin(&self, steps: impl FnOnce() -> Steps) -> Plan {
        if self.state().phase != Phase::Untouched {
            return Plan::default();
        }
        Plan { token: Some(self.pend(Pending::Begin)), ..Plan::of(steps()) }
    }

    /// At a clean close: what is to be put right. `None` where nothing was changed. No plan is made afterwards.
    pub(super) fn finish(&self) -> Option<Rest> {
        let mut s = self.state();
        let phase = std::mem::replace(&mut s.phase, Phase::Ended);
        let rest = Rest {
            doubtful: std::mem::take(&mut s.doubtful),
            stretched: s.stretched,
            kept: std::mem::take(&mut s.kept),
        };
        (phase == Phase::Changing).then_some(rest)
    }
}

/// Whether a file may grow, and what by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Growth {
    /// By clean places.
    Clean,
    /// By places with old bytes in them.
    Unclean,
    /// Not at all, and why.
    None(Failure),
}

impl Growth {
    /// The answer where no place is left.
    fn otherwise(self) -> Miss {
        match self {
            Growth::Clean | Growth::Unclean => Miss::NeedsRoom,
            Growth::None(why) => Miss::Fail(why),
        }
    }
}

/// Most writes of metadata that are made durable one by one rather than by a sync of the whole file.
const MAX_THROUGH: usize = 4;

/// The file grows and says so, for good when the steps have ended. `whole`: by a sync of all there is. Otherwise, where that is possible, by
/// writing through what matters: a sync would write back all that guests have written meanwhile, and they would wait for it.
fn durably(file: FileId, (from, to): (HostOffset, HostOffset), announced: Steps, whole: bool) -> Steps {
    let few = announced.iter().filter(|s| matches!(s, Step::Meta { .. })).count() <= MAX_THROUGH;
    let plain = announced.iter().all(|s| matches!(s, Step::Meta { .. } | Step::Barrier));
    let extend = Step::Extend { file, from, to };
    if whole || !(few && plain) {
        return std::iter::once(extend).chain(announced).chain([Step::Sync { file }]).collect();
    }
    let through = announced.into_iter().map(|s| match s {
        Step::Meta { key, op } => Step::Through { key, op },
        other => other,
    });
    let length = Step::SyncLength { file, from, to };
    [extend, Step::Barrier, Step::HoldSyncs { file }].into_iter().chain(through).chain([length]).collect()
}
