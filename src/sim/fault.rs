//! Operations that fail, by plan.

use super::{DATA, Rng};
use crate::io::{IoKind, IoOp};
use crate::map::FileId;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failing {
    /// With this error number.
    Error(i32),
    /// With this error number although it has happened (a write; the others just fail).
    ErrorAfterEffect(i32),
    /// Not at all: a read or write moves fewer bytes than asked.
    Short,
    /// Not at all: it has to be tried again (EINTR). Sticky: every operation once.
    Interrupted,
}

/// Which operation fails, and how.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Only these kinds are counted; empty: all.
    pub kinds: Vec<IoKind>,
    /// Only operations on the file with this number.
    pub file: FileId,
    /// Only operations that begin there.
    pub place: Range<u64>,
    /// How many of them pass first.
    pub after: u64,
    /// All further ones fail as well.
    pub sticky: bool,
    /// How.
    pub how: Failing,
}

impl Fault {
    /// The `after`-th operation (from 0) of these kinds on the first file fails, once.
    pub fn of(kinds: &[IoKind], after: u64, how: Failing) -> Fault {
        let kinds = kinds.to_vec();
        Fault { kinds, file: FileId(0), place: 0..u64::MAX, after, sticky: false, how }
    }
}

/// What faults by chance are like.
#[derive(Clone, Copy, Debug)]
pub struct FaultMix {
    /// Kinds of operations, one set of which fails; empty: all. What is named twice comes twice as often.
    pub kinds: &'static [&'static [IoKind]],
    /// Error numbers.
    pub errnos: &'static [i32],
    /// What becomes of an operation that fails with this error number.
    pub how: fn(&mut Rng, i32) -> Failing,
    /// Faults of a hundred that last.
    pub sticky: u64,
    /// Of a hundred on writes, those of the metadata of a small VDI only.
    pub metadata: u64,
}

impl Fault {
    /// A fault by chance, on one of the first 30 operations.
    pub fn by_chance(mix: &FaultMix, rng: &mut Rng) -> Fault {
        let errno = mix.errnos[rng.index(mix.errnos.len())];
        let how = (mix.how)(rng, errno);
        let mut f = Fault::of(mix.kinds[rng.index(mix.kinds.len())], rng.below(30), how);
        f.sticky = rng.chance(mix.sticky);
        if rng.chance(mix.metadata) && f.kinds == [IoKind::Write] {
            f.place = 0..DATA;
        }
        f
    }
}

#[derive(Debug, Default)]
struct State {
    plan: Vec<Fault>,
    hits: Vec<(IoOp, bool)>,
    /// Operations looked at so far, by file.
    seen: HashMap<FileId, u64>,
    /// The last one was interrupted: this one is it again.
    interrupted: bool,
}

/// The faults of all engines of a simulation.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<State>>);

impl Faults {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("faults lock")
    }

    /// Plans one.
    pub fn add(&self, f: Fault) {
        self.lock().plan.push(f);
    }

    /// Plans none any more.
    pub fn clear(&self) {
        *self.lock() = State::default();
    }

    /// The operations that were hit since the last [`Self::clear`].
    pub fn hits(&self) -> Vec<IoOp> {
        self.lock().hits.iter().map(|(op, _)| *op).collect()
    }

    /// The same, and whether each was hit inside [`crate::io::IoEngine::try_now`], behind which the channel tries once
    /// more.
    pub fn hits_and_inline(&self) -> Vec<(IoOp, bool)> {
        self.lock().hits.clone()
    }

    /// Operations on a file since the last [`Self::clear`].
    pub fn seen(&self, file: FileId) -> u64 {
        self.lock().seen.get(&file).copied().unwrap_or(0)
    }

    pub(super) fn hit(&self, op: &IoOp, inline: bool) -> Option<Failing> {
        let s = &mut *self.lock();
        *s.seen.entry(op.file).or_default() += 1;
        let i = s.plan.iter().position(|f| {
            (f.kinds.is_empty() || f.kinds.contains(&op.kind))
                && f.file == op.file
                && f.place.contains(&op.off.0)
        })?;
        let f = &mut s.plan[i];
        if f.after > 0 {
            f.after -= 1;
            return None;
        }
        let (how, sticky) = (f.how, f.sticky);
        if sticky && how == Failing::Interrupted {
            s.interrupted = !s.interrupted;
            if !s.interrupted {
                return None;
            }
        }
        if !sticky {
            s.plan.remove(i);
        }
        s.hits.push((*op, inline));
        Some(how)
    }
}
