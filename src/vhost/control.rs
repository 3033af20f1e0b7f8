//! Orders to all queues of a disk that is being served, from whichever thread: to pause, and to go on with another disk.

use super::thread::{Order, Pending, Reply, WorkerHandle};
use crate::error::{Error, ErrorKind, Result};
use crate::vd::Disk;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

type Workers = Option<Arc<[WorkerHandle]>>;

/// A hold on the queues of one disk, whether a front-end is there or not. [`super::serve`] fills it in while it serves; before and
/// afterwards there are no queues, and whatever is asked of them is done.
#[derive(Clone, Default)]
pub struct Control(Arc<Mutex<Workers>>);

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

/// All queues are at rest: none begins anything, nothing is in flight. When this is dropped they go on as before.
pub struct Held<'a> {
    workers: MutexGuard<'a, Workers>,
    /// What they go on with.
    with: Option<Arc<Disk>>,
}

impl std::fmt::Debug for Held<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held").field("with", &self.with).finish_non_exhaustive()
    }
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, Workers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These are the queues from now on. Waits for whoever has them at rest.
    pub(super) fn set(&self, workers: Workers) {
        *self.lock() = workers;
    }

    /// Every queue gets ready to go over to `disk`, beside its requests.
    ///
    /// # Errors
    /// If one cannot; all go on as before.
    pub fn prepare(&self, disk: &Arc<Disk>) -> Result<()> {
        let workers = self.lock();
        let asked: Vec<_> = each(&workers, || Order::Prepare(disk.clone())).collect();
        asked.into_iter().map(Pending::wait).try_for_each(done)
    }

    /// Has all queues take nothing new, and waits until what they have taken has ended, for at most this long.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if something takes longer; all have gone on then.
    pub fn hold(&self, at_most: Duration) -> Result<Held<'_>> {
        let end = Instant::now().checked_add(at_most).unwrap_or_else(Instant::now);
        let held = Held { workers: self.lock(), with: None };
        let asked: Vec<_> = each(&held.workers, || Order::Hold).collect();
        let late = || {
            let what = format!("requests of its guest did not end within {} s", at_most.as_secs());
            Error::new(ErrorKind::Io, what).hint("try again when its storage is less busy")
        };
        asked.into_iter().try_for_each(|p| done(p.wait_at_most(end).ok_or_else(late)?))?;
        Ok(held)
    }
}

impl Held<'_> {
    /// All queues go on, with this disk, which they are prepared for.
    pub fn go_on_with(mut self, disk: &Arc<Disk>) {
        self.with = Some(disk.clone());
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(disk) = &self.with {
            // each does it before it takes anything: orders are obeyed in turn
            each(&self.workers, || Order::MoveTo(disk.clone())).for_each(drop);
        }
        let asked: Vec<_> = each(&self.workers, || Order::Release).collect();
        asked.into_iter().for_each(|p| drop(p.wait()));
    }
}

fn each<'a>(workers: &'a Workers, order: impl Fn() -> Order + 'a) -> impl Iterator<Item = Pending> + 'a {
    workers.iter().flat_map(|w| w.iter()).map(move |w| w.send(order()))
}

fn done(reply: Reply) -> Result<()> {
    match reply {
        Reply::Refused(why) => Err(Error::new(ErrorKind::Io, why)),
        Reply::Done | Reply::Stopped(_) => Ok(()),
    }
}
