//! The places of a file that formats with a block table allocate from.

use super::Bitmap;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Mutex;

/// The number of a block-sized place in the data area of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostBlock(pub u32);

/// A place taken for use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The place.
    pub block: HostBlock,
    /// It reads as zeros, durably.
    pub clean: bool,
}

/// Free places: the clean ones prepared ahead, the ones with old bytes in them, and how far the file reaches.
///
/// *Clean* means: made by this process by extending the file (or punching it) and synced since. Nothing is clean
/// when an image is opened (rule O2).
#[derive(Debug)]
pub struct HostBlocks {
    state: Mutex<State>,
    /// No place at or behind this number exists: other programs refuse a count above the number of guest blocks.
    max: u32,
    /// Most places prepared at once.
    step_max: u32,
}

#[derive(Debug)]
struct State {
    clean: VecDeque<u32>,
    /// As bits: an image of another program may have as many holes as it has blocks.
    unclean: Bitmap,
    /// Named by a failed write that may have reached the disk: never used again in this session.
    leaked: BTreeSet<u32>,
    /// Places below this number are used, free in one of the sets above, or leaked.
    end: u32,
    /// Extension under way, up to this number.
    extending: Option<u32>,
    step: u32,
    /// An extension by fewer places is of no use.
    least: u32,
}

impl HostBlocks {
    /// `used` says which places below `end` are in use; the others are free but not clean.
    pub fn new(end: u32, max: u32, step_max: u32, used: impl Fn(u32) -> bool) -> Self {
        assert!(end <= max, "more places in use than may exist");
        let mut unclean = Bitmap::new();
        unclean.extend((0..end).filter(|b| !used(*b)));
        let state = State {
            clean: VecDeque::new(),
            unclean,
            leaked: BTreeSet::new(),
            end,
            extending: None,
            step: step_max.clamp(1, 4),
            least: 1,
        };
        HostBlocks { state: Mutex::new(state), max, step_max: step_max.max(1) }
    }

    /// The same where nobody knows, or wants to, which places below `end` are in use: none of them is free.
    pub fn behind(end: u32, max: u32, step_max: u32) -> Self {
        let places = Self::new(0, max, step_max, |_| true);
        places.lock().end = end.min(max);
        places
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("allocator lock")
    }

    /// A clean place.
    pub fn take_clean(&self) -> Option<HostBlock> {
        self.lock().clean.pop_front().map(HostBlock)
    }

    /// The lowest `n` clean places in a row, by the first of them: a table may need several.
    pub fn take_clean_run(&self, n: u32) -> Option<HostBlock> {
        let n = usize::try_from(n).ok().filter(|n| *n > 0)?;
        let mut s = self.lock();
        // They are in order: added behind the others, and taken out without moving any.
        let rows = s.clean.len().checked_sub(n - 1)?;
        let at = (0..rows).find(|i| (s.clean[i + n - 1] - s.clean[*i]) as usize == n - 1)?;
        let first = s.clean[at];
        s.clean.drain(at..at + n);
        Some(HostBlock(first))
    }

    /// `n` places in a row with old bytes in them, of those near the end: what an extension has added there lately.
    pub fn take_unclean_run(&self, n: u32) -> Option<HostBlock> {
        const LOOK_BACK: u32 = 4096;
        let mut s = self.lock();
        let last = s.end.checked_sub(n)?;
        let is_free = |first: &u32| (*first..*first + n).all(|p| s.unclean.contains(p));
        let first = (last.saturating_sub(LOOK_BACK)..=last).rev().find(is_free)?;
        for place in first..first + n {
            s.unclean.remove(place);
        }
        Some(HostBlock(first))
    }

    /// Any place, for a block that is written whole: places with old bytes first, the lowest before the others.
    pub fn take_any(&self) -> Option<Taken> {
        let mut s = self.lock();
        if let Some(b) = s.unclean.pop_first() {
            return Some(Taken { block: HostBlock(b), clean: false });
        }
        s.clean.pop_front().map(|b| Taken { block: HostBlock(b), clean: true })
    }

    /// A place back that nothing names and nothing ever named since it was taken.
    pub fn give_back(&self, block: HostBlock) {
        let fresh = self.lock().unclean.insert(block.0);
        assert!(fresh, "place {} given back twice", block.0);
    }

    /// A place that something on disk may name.
    pub fn leak(&self, block: HostBlock) {
        self.lock().leaked.insert(block.0);
    }

    /// From now on an extension has at least so many places: some of them are for the tables that go with it.
    pub fn extend_by_at_least(&self, places: u32) {
        let mut s = self.lock();
        s.least = places.max(1);
        s.step = s.step.max(s.least);
    }

    /// The next extension, as places from .. to, if more are wanted (`urgent`: although some may be left) and
    /// none is under way. At most one runs; [`Self::extended`] ends it.
    pub fn begin_extension(&self, urgent: bool) -> Option<(u32, u32)> {
        let mut s = self.lock();
        // Places prepared and not used are lost to other programs if we are killed: they append behind them, and a table
        // of `max` entries knows no place from there on. So never more than a part of what is left.
        let step = s.step.min(((self.max - s.end) / 8).max(s.least)).min(self.max - s.end);
        let enough = u32::try_from(s.clean.len()).unwrap_or(u32::MAX) > step / 4;
        if s.extending.is_some() || s.end >= self.max || (enough && !urgent) {
            return None;
        }
        let to = s.end + step;
        s.extending = Some(to);
        Some((s.end, to))
    }

    /// The extension has ended: the file reaches `to` and reads as zeros there (`clean`), or as anything; or it
    /// failed, and the next try asks for less.
    pub fn extended(&self, done: Option<bool>) {
        let mut s = self.lock();
        let to = s.extending.take().expect("an extension is under way");
        let from = s.end;
        match done {
            Some(clean) => {
                s.end = to;
                if clean {
                    s.clean.extend(from..to)
                } else {
                    s.unclean.extend(from..to)
                }
                s.step = s.step.saturating_mul(2).min(self.step_max);
            }
            None => s.step = (s.step / 2).max(s.least),
        }
    }

    /// True while an extension is under way.
    pub fn is_extending(&self) -> bool {
        self.lock().extending.is_some()
    }

    /// True if neither a place is left nor one can be made.
    pub fn is_exhausted(&self) -> bool {
        let s = self.lock();
        s.clean.is_empty() && s.unclean.is_empty() && s.extending.is_none() && s.end >= self.max
    }

    /// True if the file may still be extended by so many places.
    pub fn can_grow_by(&self, n: u32) -> bool {
        self.max - self.lock().end >= n
    }

    /// Size of the next extension is down to the smallest: a failure now is the final word.
    pub fn is_at_smallest_step(&self) -> bool {
        let s = self.lock();
        s.step <= s.least
    }

    /// The places that nothing uses, in order: free ones, and those that a failed write may name. None is left to be
    /// taken afterwards.
    pub fn take_unused(&self) -> Vec<u32> {
        let mut s = self.lock();
        let mut all: Vec<_> = s.clean.iter().chain(&s.leaked).copied().collect();
        while let Some(n) = s.unclean.pop_first() {
            all.push(n);
        }
        s.clean.clear();
        all.sort_unstable();
        all
    }

    /// Number behind the last place the file has, free ones included.
    pub fn end(&self) -> u32 {
        self.lock().end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn holes_first_then_clean_ones() {
        let a = HostBlocks::new(4, 100, 8, |b| b != 1 && b != 2);
        assert_eq!(a.take_clean(), None);
        assert_eq!(a.take_any(), Some(Taken { block: HostBlock(1), clean: false }));
        assert_eq!(a.begin_extension(false), Some((4, 8)));
        assert_eq!(a.begin_extension(true), None);
        a.extended(Some(true));
        assert_eq!(a.take_clean(), Some(HostBlock(4)));
        assert_eq!(a.take_any(), Some(Taken { block: HostBlock(2), clean: false }));
        assert_eq!(a.take_any(), Some(Taken { block: HostBlock(5), clean: true }));
        a.give_back(HostBlock(5));
        assert_eq!(a.take_any(), Some(Taken { block: HostBlock(5), clean: false }));
    }

    #[test]
    fn a_failed_extension_asks_for_less_until_one() {
        let a = HostBlocks::new(0, 100, 64, |_| true);
        for want in [4, 2, 1, 1] {
            assert_eq!(a.begin_extension(true), Some((0, want)));
            a.extended(None);
        }
        assert!(a.is_at_smallest_step());
    }

    /// Near the end of an image few places are prepared at once; as few are enough to wait for the next need.
    #[test]
    fn no_more_is_prepared_near_the_end_than_is_needed() {
        let a = HostBlocks::new(0, 100, 64, |_| true);
        while a.end() < 92 {
            assert!(a.begin_extension(true).is_some());
            a.extended(Some(true));
            while a.take_clean().is_some() {}
        }
        let (from, to) = a.begin_extension(false).expect("nothing is prepared");
        assert_eq!(to - from, 1);
        a.extended(Some(true));
        assert_eq!(a.begin_extension(false), None, "one is left, and one is what a step prepares");
        assert!(a.take_clean().is_some());
        assert_eq!(a.begin_extension(false), Some((to, to + 1)));
    }

    #[test]
    fn rows_of_places_are_taken_whole() {
        let a = HostBlocks::new(0, 100, 64, |_| true);
        a.extend_by_at_least(8);
        assert_eq!(a.begin_extension(true), Some((0, 8)));
        a.extended(Some(true));
        assert_eq!(a.take_clean(), Some(HostBlock(0)));
        assert_eq!(a.take_clean_run(4), Some(HostBlock(1)));
        assert_eq!((a.take_clean_run(4), a.take_unclean_run(1)), (None, None));
        assert_eq!(a.take_clean_run(2), Some(HostBlock(5)));
        a.give_back(HostBlock(2));
        a.give_back(HostBlock(4));
        assert_eq!(a.begin_extension(true), Some((8, 19)));
        a.extended(Some(false));
        assert_eq!(a.take_clean_run(2), None);
        assert_eq!(a.take_unclean_run(3), Some(HostBlock(16)));
        assert_eq!(a.take_unclean_run(9), None);
        assert_eq!(a.take_any(), Some(Taken { block: HostBlock(2), clean: false }));
        assert!(a.can_grow_by(81) && !a.can_grow_by(82));
    }

    proptest! {
        /// No place is ever handed out twice, none past the maximum.
        #[test]
        fn places_are_unique(ops in proptest::collection::vec(0u8..9, 1..400), max in 1u32..60) {
            let a = HostBlocks::new(0, max, 16, |_| true);
            let mut held = std::collections::BTreeSet::new();
            let mut gone = std::collections::BTreeSet::new();
            for op in ops {
                match op {
                    0 => if let Some(b) = a.take_clean() { prop_assert!(held.insert(b)); },
                    1 => if let Some(t) = a.take_any() { prop_assert!(held.insert(t.block)); },
                    2 => if let Some(b) = held.pop_first() { a.give_back(b) },
                    3 => if let Some(b) = held.pop_first() { a.leak(b); gone.insert(b); },
                    4 | 5 => if a.begin_extension(op == 5).is_some() { a.extended(Some(true)) },
                    6 => if a.begin_extension(true).is_some() { a.extended(Some(false)) },
                    _ => {
                        let run = if op == 7 { a.take_clean_run(3) } else { a.take_unclean_run(3) };
                        for b in run.into_iter().flat_map(|b| b.0..b.0 + 3) {
                            prop_assert!(held.insert(HostBlock(b)));
                        }
                    }
                }
                prop_assert!(held.iter().all(|b| b.0 < max && !gone.contains(b)));
            }
        }
    }
}
