//! Syncs, shared by all who wait for one. One runs per file, one waits, all join the one that waits: a flush is
//! satisfied only by a sync that was submitted after it came (rule O6).

use crate::error::Failure;
use crate::map::Waiter;
use crate::probe::sabotage::{Sabotage, is_broken};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// The syncs of one file.
#[derive(Debug)]
pub(crate) struct SyncGroup {
    /// Writes have completed that no finished sync covers. True from the start for a file opened for writing: what
    /// earlier processes wrote may still be in the page cache.
    unsynced: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    /// One has failed. Another could succeed and say nothing of what the kernel dropped with the first (rule O4).
    failed: bool,
    /// Those whose sync runs.
    current: Vec<Waiter>,
    /// Those who came since.
    waiting: Vec<Waiter>,
    /// Writes through are under way: no sync begins.
    held: bool,
    /// Those who want to begin writes through, once the sync has ended that runs.
    holders: Vec<Waiter>,
}

/// What to do after [`SyncGroup::join`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Joined {
    /// Submit a sync; its end goes to [`SyncGroup::ended`].
    Start,
    /// Someone else's sync will tell.
    Wait,
    /// Nothing is unsynced.
    Clean,
    /// A sync has failed before: there is no other.
    Failed,
}

impl SyncGroup {
    pub(crate) fn new(unsynced: bool) -> Self {
        SyncGroup { unsynced: AtomicBool::new(unsynced), state: Mutex::default() }
    }

    /// Writes have completed that no finished sync covers.
    #[cfg(test)]
    pub(crate) fn is_unsynced(&self) -> bool {
        self.unsynced.load(Ordering::Acquire)
    }

    /// A write has completed. To be called before anyone is told of it.
    pub(crate) fn wrote(&self) {
        if !self.unsynced.load(Ordering::Relaxed) && !is_broken(Sabotage::ForgottenWrite) {
            self.unsynced.store(true, Ordering::Release);
        }
    }

    /// Joins the next sync to be submitted. `even_if_clean`: a plan's own sync, whose writes went past
    /// [`Self::wrote`] in this very channel, never takes the short cut.
    pub(crate) fn join(&self, who: Waiter, even_if_clean: bool) -> Joined {
        let mut s = self.state.lock().expect("sync lock");
        if s.failed {
            return Joined::Failed;
        }
        if s.held {
            s.waiting.push(who);
            return Joined::Wait;
        }
        if s.running {
            let late = is_broken(Sabotage::LateJoin);
            if late { &mut s.current } else { &mut s.waiting }.push(who);
            return Joined::Wait;
        }
        if !even_if_clean && !self.unsynced.load(Ordering::Acquire) {
            return Joined::Clean;
        }
        s.running = true;
        s.current.push(who);
        self.unsynced.store(false, Ordering::Release);
        Joined::Start
    }

    /// No sync runs from now on, or, if one does, from its end on, when `who` is told; until [`Self::let_go`]. True: from now on.
    /// After a failure nothing is held, and nobody is told later.
    pub(crate) fn hold(&self, who: Waiter) -> Result<bool, Failure> {
        let mut s = self.state.lock().expect("sync lock");
        if s.failed {
            return Err(Failure::SyncFailed);
        }
        if s.running || s.held {
            s.holders.push(who);
            return Ok(false);
        }
        s.held = true;
        Ok(true)
    }

    /// The end of what [`Self::hold`] began: the next holder goes into `out`. True: submit the sync that others wait for.
    pub(crate) fn let_go(&self, out: &mut Vec<Waiter>) -> bool {
        let mut s = self.state.lock().expect("sync lock");
        s.held = false;
        if s.failed {
            return false;
        }
        if !s.holders.is_empty() {
            out.push(s.holders.remove(0));
            s.held = true;
            return false;
        }
        self.begin_next(&mut s)
    }

    /// A write through has failed, which is as bad as a failed sync: none is begun any more, and all who wait go into `out`.
    pub(crate) fn failed(&self, out: &mut Vec<Waiter>) {
        let mut s = self.state.lock().expect("sync lock");
        s.failed = true;
        s.give_up(out);
    }

    /// The sync that others wait for begins, if there are any.
    fn begin_next(&self, s: &mut State) -> bool {
        s.running = !s.waiting.is_empty();
        if s.running {
            std::mem::swap(&mut s.current, &mut s.waiting);
            self.unsynced.store(false, Ordering::Release);
        }
        s.running
    }

    /// The sync has ended: moves those it satisfies into `out`. True: submit another, for those who came since. After
    /// a failure there is none: those who came since are in `out` as well.
    pub(crate) fn ended(&self, ok: bool, out: &mut Vec<Waiter>) -> bool {
        let mut s = self.state.lock().expect("sync lock");
        assert!(s.running, "a sync ended that nobody started");
        out.append(&mut s.current);
        if !ok {
            s.failed = true;
            s.give_up(out);
        }
        if !s.holders.is_empty() {
            out.push(s.holders.remove(0));
            (s.held, s.running) = (true, false);
            return false;
        }
        self.begin_next(&mut s)
    }
}

impl State {
    fn give_up(&mut self, out: &mut Vec<Waiter>) {
        out.append(&mut self.waiting);
        out.append(&mut self.holders);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_comers_wait_for_the_next_sync() {
        let g = SyncGroup::new(true);
        let w = |slot| Waiter { channel: 0, slot };
        let mut done = Vec::new();
        assert_eq!(g.join(w(1), false), Joined::Start);
        assert_eq!(g.join(w(2), false), Joined::Wait);
        assert_eq!(g.join(w(3), true), Joined::Wait);
        assert!(g.ended(true, &mut done));
        assert_eq!(done, [w(1)]);
        done.clear();
        assert!(!g.ended(true, &mut done));
        assert_eq!(done, [w(2), w(3)]);
        assert_eq!(g.join(w(4), false), Joined::Clean);
        g.wrote();
        assert_eq!(g.join(w(4), false), Joined::Start);
    }

    #[test]
    fn syncs_and_writes_through_take_turns() {
        let g = SyncGroup::new(true);
        let w = |slot| Waiter { channel: 0, slot };
        let mut done = Vec::new();
        assert_eq!(g.hold(w(1)), Ok(true));
        assert_eq!(g.join(w(2), false), Joined::Wait);
        assert_eq!(g.hold(w(3)), Ok(false));
        assert!(!g.let_go(&mut done));
        assert_eq!(done, [w(3)], "holds now");
        done.clear();
        assert!(g.let_go(&mut done), "the sync begins");
        assert_eq!(done, []);
        assert_eq!(g.hold(w(4)), Ok(false));
        assert_eq!(g.join(w(5), false), Joined::Wait);
        assert!(!g.ended(true, &mut done), "the holder has its turn first");
        assert_eq!(done, [w(2), w(4)]);
        done.clear();
        g.failed(&mut done);
        assert_eq!(done, [w(5)]);
        assert!(!g.let_go(&mut done));
        assert_eq!(g.hold(w(1)), Err(Failure::SyncFailed));
    }

    #[test]
    fn a_failed_sync_is_the_last_one() {
        let g = SyncGroup::new(true);
        let w = |slot| Waiter { channel: 0, slot };
        let mut done = Vec::new();
        assert_eq!(g.join(w(1), false), Joined::Start);
        assert_eq!(g.join(w(2), false), Joined::Wait);
        assert!(!g.ended(false, &mut done));
        assert_eq!(done, [w(1), w(2)]);
        assert_eq!(g.join(w(3), true), Joined::Failed);
        assert_eq!(g.join(w(3), false), Joined::Failed);
    }
}
