//! What all disks share that stand on the same images: a disk that is being served, and those that take its place when its chain
//! changes.
//!
//! Whatever belongs to an image or a file, whichever disk looks at it, is here or with the file ([`super::disk::DiskFile`]): pages on
//! their way, claims, syncs, locks. Numbers of images and channels are never those of another image or channel of the same family.

use super::loads::Loads;
use super::mailbox::Mailboxes;
use super::own::Own;
use super::pages::Pages;
use super::units::Units;
use crate::error::Result;
use crate::io::{BouncePool, ImageLock, LockMode};
use crate::map::{Claims, Waiter};
use std::collections::{BTreeSet, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// Told once, when the first sync fails.
pub(crate) type OnSyncFailure = Box<dyn Fn() + Send + Sync>;

/// See the module.
#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) claims: Claims,
    pub(crate) pages: Pages,
    pub(crate) loads: Loads,
    pub(crate) units: Units,
    pub(crate) mailboxes: Mailboxes,
    pub(super) bounce: Bounces,
    /// Of requests on their way through the filters. A pool of its own: whoever holds one of these may need one of the other.
    pub(super) filter_bounce: Bounces,
    /// The locks on the images, by the images' numbers: they go when the last channel has gone, and its I/O with it.
    locks: Mutex<Vec<(u32, ImageLock)>>,
    /// Images that a disk may write.
    writers: Mutex<BTreeSet<u32>>,
    next_image: AtomicU32,
    sync_failed: AtomicBool,
    on_sync_failure: Mutex<Vec<OnSyncFailure>>,
}

/// A bounded number of bounce buffers, and who waits for one.
#[derive(Debug, Default)]
pub(crate) struct Bounces {
    pool: Arc<BouncePool>,
    waiters: Mutex<VecDeque<Waiter>>,
}

impl Bounces {
    /// A buffer of `len` bytes; `None`: `who` waits for one.
    pub(super) fn take(&self, len: usize, who: Waiter) -> Option<Own> {
        let mut waiters = self.waiters.lock().expect("bounce lock");
        let buf = self.pool.take(len).map(Own::Pooled);
        if buf.is_none() {
            waiters.push_back(who);
        }
        buf
    }

    /// A buffer back; the one who has waited longest is to be told.
    pub(super) fn give(&self, buf: Own) -> Option<Waiter> {
        let mut waiters = self.waiters.lock().expect("bounce lock");
        drop(buf);
        waiters.pop_front()
    }

    /// Buffers in use, and those who wait for one.
    #[cfg(any(test, feature = "sim"))]
    fn held(&self) -> usize {
        self.pool.in_use() + self.waiters.lock().expect("bounce lock").len()
    }
}

impl Shared {
    /// Whose images have numbers below `next_image`.
    pub(super) fn new(next_image: u32, on_sync_failure: OnSyncFailure) -> Arc<Shared> {
        let shared = Shared { next_image: AtomicU32::new(next_image), ..Shared::default() };
        shared.tell_of_sync_failure(on_sync_failure);
        Arc::new(shared)
    }

    /// A number that no image has had.
    pub(super) fn new_image(&self) -> u32 {
        self.next_image.fetch_add(1, Ordering::Relaxed)
    }

    /// A disk begins to write the image.
    ///
    /// # Panics
    /// If another disk does: each has its own idea of where the file ends and what is prepared there.
    pub(super) fn begin_writing(&self, image: u32) {
        let is_first = self.writers.lock().expect("writers lock").insert(image);
        assert!(is_first, "image {image} has a writer already");
    }

    /// The disk that wrote the image is gone.
    pub(super) fn end_writing(&self, image: u32) {
        self.writers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&image);
    }

    /// Keeps an image's locks.
    pub(super) fn hold(&self, image: u32, locks: impl IntoIterator<Item = ImageLock>) {
        self.locks.lock().expect("locks lock").extend(locks.into_iter().map(|l| (image, l)));
    }

    /// Gives an image's locks up.
    pub(super) fn forget(&self, image: u32) {
        self.locks.lock().expect("locks lock").retain(|(n, _)| *n != image);
    }

    /// Gives all locks up.
    pub(super) fn forget_all(&self) {
        self.locks.lock().expect("locks lock").clear();
    }

    /// Nobody here writes the image any more: others may read it. `path` is for the message.
    pub(super) fn share_locks(&self, image: u32, path: &Path) -> Result<()> {
        let mut locks = self.locks.lock().expect("locks lock");
        let own = locks.iter_mut().filter(|(n, _)| *n == image).map(|(_, l)| l);
        own.filter(|l| l.mode() == LockMode::Exclusive).try_for_each(|l| l.change(LockMode::Shared, path))
    }

    /// Who is to be told, too, when a sync fails; at once if one has.
    pub(super) fn tell_of_sync_failure(&self, told: OnSyncFailure) {
        let mut all = self.on_sync_failure.lock().expect("failure lock");
        if self.has_sync_failed() {
            told();
        }
        all.push(told);
    }

    /// A sync of one of the images has failed: nothing is known of what any disk over them holds (rule O4).
    pub(super) fn has_sync_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }

    /// One has just failed.
    pub(super) fn sync_has_failed(&self) {
        let all = self.on_sync_failure.lock().expect("failure lock");
        if !self.sync_failed.swap(true, Ordering::AcqRel) {
            all.iter().for_each(|tell| tell());
        }
    }

    /// Claims, bounce buffers, page writes and waiting slots that are still held.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn held(&self) -> usize {
        self.claims.held()
            + self.bounce.held()
            + self.filter_bounce.held()
            + self.pages.in_flight_count()
            + self.loads.in_flight_count()
            + self.units.in_flight_count()
    }
}
