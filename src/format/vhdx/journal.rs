//! The log as it is written: one entry at a time, each behind the last. What is written and has not been published yet may have
//! failed, and the next entry takes its place: a hole would be the end of all that follows.
//!
//! A checkpoint makes durable in its place what entries say, then an entry says that the run begins with it. Where nothing was
//! logged meanwhile, that entry may be the first of the ring again, and is durable before another follows. So no run that counts ever
//! goes over the ring's end: QEMU looks for runs from the ring's beginning on, and does not believe what entries say of where they
//! begin.

use super::corrupt;
use super::log::{NewEntry, SECTOR};
use super::place::Region;
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::map::{HostOffset, Miss};
use crate::probe::sabotage::{Sabotage, is_broken};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

/// Most changes that are under way at a time. An entry has at most a sector for each, and one before.
const MOST_CHANGES: u64 = 62;
const SECTOR_BYTES: u64 = SECTOR as u64;

#[derive(Debug)]
pub(super) struct Journal {
    place: Region,
    /// Sectors of the ring.
    ring: u64,
    most_changes: u64,
    state: Mutex<State>,
}

/// Sectors are counted from the ring's beginning.
#[derive(Debug, Default)]
struct State {
    id: [u8; 16],
    /// Where the next entry goes.
    head: u64,
    /// Its number.
    sequence: u64,
    /// Where new entries say that the run begins.
    tail: u64,
    /// An entry was composed and not published yet, it is under way or has failed: its sectors and numbers.
    flight: Option<(u64, u64)>,
    /// It is the one with which the log begins anew. If that has failed, nobody knows whether it is durable, and no other may follow.
    begins_anew: bool,
    /// Changes that will come, or are on their way.
    reserved: u64,
    /// Pages of the table that are newer in the log than in their places.
    dirty: BTreeSet<u64>,
    checkpoint: Option<Checkpoint>,
    /// Why the last checkpoint that somebody waited for has failed.
    refused: Option<Failure>,
}

/// What is on its way to its place.
#[derive(Debug)]
struct Checkpoint {
    /// The first entry that says more.
    upto: u64,
    /// Pages as the entries before leave them.
    pages: BTreeMap<u64, Vec<u8>>,
    /// Somebody waits for it.
    urgent: bool,
}

impl Journal {
    /// For a log at `place`, of [`super::header::MIN_LOG_BYTES`] at least.
    pub(super) fn new(place: Region) -> Self {
        let ring = place.len / SECTOR_BYTES;
        let most_changes = (ring / 4).saturating_sub(2).clamp(1, MOST_CHANGES);
        Journal { place, ring, most_changes, state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("journal lock")
    }

    /// The log begins anew, with entries that bear `id`.
    pub(super) fn start(&self, id: [u8; 16]) {
        *self.state() = State { id, sequence: 1, ..State::default() };
    }

    /// Whether there is room for this many changes in entries of their own, each with the end of a checkpoint behind it that cannot
    /// begin anew because of it, and for one that can. An entry that has failed is written over by one that is as long.
    fn fits(&self, s: &State, changes: u64) -> bool {
        let used = s.head + s.flight.map_or(0, |(len, _)| len);
        changes <= self.most_changes && used + 3 * changes < self.ring
    }

    /// Room for one change; [`Self::release`] gives it back.
    ///
    /// # Errors
    /// [`Miss::NeedsRoom`]: a checkpoint makes some. [`Miss::Fail`] where the last one has failed.
    pub(super) fn reserve(&self) -> std::result::Result<(), Miss> {
        let mut s = self.state();
        if !self.fits(&s, s.reserved + 1) {
            return Err(s.refused.take().map_or(Miss::NeedsRoom, Miss::Fail));
        }
        s.reserved += 1;
        s.refused = None;
        Ok(())
    }

    pub(super) fn release(&self) {
        let mut s = self.state();
        s.reserved = s.reserved.checked_sub(1).expect("a release for each reservation");
    }

    /// There is no room for another change: who waits for some needs a checkpoint.
    pub(super) fn is_full(&self) -> bool {
        let s = self.state();
        !self.fits(&s, s.reserved + 1)
    }

    /// A checkpoint is due ahead of need.
    pub(super) fn is_half_full(&self) -> bool {
        let s = self.state();
        s.head * 2 > self.ring && (s.head - s.tail) * 4 > self.ring
    }

    /// Composes the next entry, with these sectors; where it goes, and its bytes. One that ends a checkpoint says that what comes
    /// before is in its place.
    ///
    /// # Errors
    /// [`ErrorKind::SyncFailed`] once the log could not begin anew, for the rest of the session. None else, as long as each change has
    /// its reservation.
    pub(super) fn compose(
        &self,
        sectors: &[(HostOffset, Vec<u8>)],
        ends_checkpoint: bool,
        file_bytes: u64,
    ) -> Result<(HostOffset, Vec<u8>)> {
        let mut s = self.state();
        if s.begins_anew {
            let what = "the entry with which its log begins anew could not be written";
            return Err(
                Error::new(ErrorKind::SyncFailed, what).hint("check the disk, then open the image again")
            );
        }
        if let Some(upto) = s.checkpoint.as_ref().filter(|_| ends_checkpoint).map(|c| c.upto) {
            s.tail = upto;
            let since = upto != s.head && !is_broken(Sabotage::LogReused);
            if s.flight.is_none() && !since && s.head * 2 > self.ring {
                (s.head, s.tail) = (0, 0);
                s.begins_anew = true;
            }
        }
        let tail = s.tail * SECTOR_BYTES;
        let new = NewEntry { id: s.id, sequence: s.sequence, tail, file_bytes, sectors };
        let mut bytes = new.bytes();
        let mut len = (bytes.len() / SECTOR) as u64;
        if s.head + len > self.ring {
            return Err(corrupt("an entry longer than its log"));
        }
        // What is left of an entry that has failed may be there, and must not come to stand where its number is the next.
        let fill = s.flight.map_or(0, |(failed, _)| failed.saturating_sub(len));
        for n in 1..=fill {
            bytes.extend(NewEntry { sequence: s.sequence + n, sectors: &[], ..new }.bytes());
        }
        len += fill;
        s.flight = Some((len, 1 + fill));
        Ok((HostOffset(self.place.at).plus(s.head * SECTOR_BYTES), bytes))
    }

    /// The kernel has accepted the entry that was composed last, which changes these pages.
    pub(super) fn publish(&self, pages: impl Iterator<Item = u64>) {
        let mut s = self.state();
        s.begins_anew = false;
        if let Some((len, count)) = s.flight.take() {
            s.head += len;
            s.sequence += count;
        }
        s.dirty.extend(pages);
    }

    /// Takes the pages that have to go to their places, and these, as `page` has them; their numbers.
    pub(super) fn checkpoint(
        &self,
        urgent: bool,
        more: impl Iterator<Item = u64>,
        page: impl Fn(u64) -> Vec<u8>,
    ) -> Vec<u64> {
        let mut s = self.state();
        let mut dirty = std::mem::take(&mut s.dirty);
        dirty.extend(more);
        let pages: BTreeMap<_, _> = dirty.into_iter().map(|n| (n, page(n))).collect();
        let numbers = pages.keys().copied().collect();
        s.checkpoint = Some(Checkpoint { upto: s.head, pages, urgent });
        numbers
    }

    /// A page that goes to its place.
    pub(super) fn page(&self, number: u64) -> Option<Vec<u8>> {
        self.state().checkpoint.as_ref()?.pages.get(&number).cloned()
    }

    /// The checkpoint has ended. Or it has failed, and all is as it was.
    pub(super) fn checkpoint_ended(&self, how: std::result::Result<(), Failure>) {
        let mut s = self.state();
        let Some(c) = s.checkpoint.take() else { return };
        match how {
            Ok(()) => s.refused = None,
            Err(why) => {
                s.dirty.extend(c.pages.into_keys());
                s.refused = c.urgent.then_some(why);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::header::MIN_LOG_BYTES;
    use super::super::place::MIB;
    use super::*;

    /// The log has begun anew, and the entry that says so may not be durable: what follows could revive the entries before.
    #[test]
    fn nothing_follows_where_beginning_anew_has_failed() {
        let journal = Journal::new(Region { at: MIB, len: MIN_LOG_BYTES });
        journal.start([7; 16]);
        let change = [(HostOffset(3 * MIB), vec![1; SECTOR])];
        while !journal.is_half_full() {
            journal.compose(&change, false, 4 * MIB).expect("room");
            journal.publish([0].into_iter());
        }
        journal.checkpoint(true, std::iter::empty(), |_| vec![0; SECTOR]);
        let (at, _) = journal.compose(&[], true, 4 * MIB).expect("room");
        assert_eq!(at, HostOffset(MIB), "the first of the ring again");
        // it was not published: it has failed
        let next = journal.compose(&change, false, 4 * MIB);
        assert_eq!(next.map_err(|e| e.kind()), Err(ErrorKind::SyncFailed));
    }

    /// Each change alone in its entry, and a checkpoint that ends right behind it: the most of the ring that changes can take.
    #[test]
    fn changes_that_have_room_are_logged_whatever_checkpoints_come_between() {
        let journal = Journal::new(Region { at: MIB, len: MIN_LOG_BYTES });
        journal.start([7; 16]);
        let log = |sectors: &[(HostOffset, Vec<u8>)], ends_checkpoint| {
            journal.compose(sectors, ends_checkpoint, 4 * MIB).expect("room");
            journal.publish(sectors.iter().map(|_| 0));
        };
        let begin = || journal.checkpoint(false, std::iter::empty(), |_| vec![0; SECTOR]);
        let mut logged = 0;
        for _ in 0..100 {
            let reserved = (0..).take_while(|_| journal.reserve().is_ok()).count();
            for _ in 0..reserved {
                begin();
                log(&[(HostOffset(3 * MIB), vec![1; SECTOR])], false);
                log(&[], true);
                journal.checkpoint_ended(Ok(()));
                journal.release();
                logged += 1;
            }
            if reserved == 0 {
                assert!(journal.is_full());
                begin();
                log(&[], true);
                journal.checkpoint_ended(Ok(()));
            }
        }
        assert!(logged > 50, "{logged}");
    }
}
