//! Writes of metadata pages: one in flight per page, everything that comes meanwhile goes into the next.

use crate::map::{MetaKey, MetaOp, Waiter};
use smallvec::SmallVec;
use std::collections::{HashMap, hash_map::Entry};
use std::sync::Mutex;

/// A page of an image: the image's number and the page's key.
pub(crate) type PageId = (u32, MetaKey);

/// Changes that ride in one write, and who waits for it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Batch {
    pub(crate) ops: SmallVec<[MetaOp; 4]>,
    pub(crate) waiters: SmallVec<[Waiter; 4]>,
    /// One of them has to be durable when the write has ended.
    through: bool,
}

impl Batch {
    fn add(&mut self, op: MetaOp, who: Waiter, through: bool) {
        self.ops.push(op);
        self.waiters.push(who);
        self.through |= through;
    }
}

/// The pages being written.
#[derive(Debug, Default)]
pub(crate) struct Pages(Mutex<HashMap<PageId, Page>>);

#[derive(Debug, Default)]
struct Page {
    in_flight: Batch,
    next: Batch,
}

impl Pages {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PageId, Page>> {
        self.0.lock().expect("pages lock")
    }

    /// Adds a change to the page's next write, which is to be durable when it ends if `through`. True: none is in flight, so submit one now (with
    /// [`Self::in_flight`]'s changes).
    pub(crate) fn stage(&self, id: PageId, op: MetaOp, who: Waiter, through: bool) -> bool {
        match self.lock().entry(id) {
            Entry::Occupied(mut o) => {
                o.get_mut().next.add(op, who, through);
                false
            }
            Entry::Vacant(v) => {
                v.insert(Page::default()).in_flight.add(op, who, through);
                true
            }
        }
    }

    /// The changes of the write in flight, and whether it has to be durable when it ends.
    pub(crate) fn in_flight(&self, id: PageId) -> (SmallVec<[MetaOp; 4]>, bool) {
        let pages = self.lock();
        let batch = &pages.get(&id).expect("a page with a write in flight").in_flight;
        (batch.ops.clone(), batch.through)
    }

    /// Pages being written.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn in_flight_count(&self) -> usize {
        self.lock().len()
    }

    /// The write in flight has ended, and `publish` makes its changes visible if it went well: before another write
    /// of the page can be composed, and before those who wait are told. Returns whom to tell, and whether another
    /// write is to be submitted.
    pub(crate) fn ended(&self, id: PageId, publish: impl FnOnce(&[MetaOp])) -> (SmallVec<[Waiter; 4]>, bool) {
        let mut pages = self.lock();
        let page = pages.get_mut(&id).expect("a page with a write in flight");
        let done = std::mem::take(&mut page.in_flight);
        publish(&done.ops);
        if page.next.ops.is_empty() {
            pages.remove(&id);
            return (done.waiters, false);
        }
        page.in_flight = std::mem::take(&mut page.next);
        (done.waiters, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smallvec::smallvec;

    #[test]
    fn changes_during_a_write_ride_in_the_next() {
        let p = Pages::default();
        let id = (0, MetaKey::Header);
        let w = |slot| Waiter { channel: 0, slot };
        assert!(p.stage(id, MetaOp::Count(1), w(1), false));
        assert!(!p.stage(id, MetaOp::Count(2), w(2), true));
        assert!(!p.stage(id, MetaOp::Count(3), w(3), false));
        assert_eq!(p.in_flight(id), (smallvec![MetaOp::Count(1)], false));
        let (told, again) = p.ended(id, |ops| assert_eq!(ops, [MetaOp::Count(1)]));
        assert_eq!((told.as_slice(), again), ([w(1)].as_slice(), true));
        assert_eq!(p.in_flight(id), (smallvec![MetaOp::Count(2), MetaOp::Count(3)], true));
        let (told, again) = p.ended(id, |_| ());
        assert_eq!((told.as_slice(), again), ([w(2), w(3)].as_slice(), false));
        assert!(p.stage(id, MetaOp::Count(4), w(1), false));
    }
}
