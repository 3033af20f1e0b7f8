//! Pages of tables on their way into memory: read once, whoever misses them.

use super::advance::Next;
use super::channel::Channel;
use super::disk::Disk;
use super::own::Own;
use super::pages::PageId;
use super::slot::Owner;
use crate::error::{Error, Failure};
use crate::io::{AlignedBuf, IoKind, IoOp};
use crate::map::{HostOffset, MetaKey, PagePlace, Waiter};
use smallvec::SmallVec;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

/// Who reads and waits for which page.
#[derive(Debug, Default)]
pub(crate) struct Loads(Mutex<HashMap<PageId, Load>>);

/// A page that somebody reads. What one reader has read may be older than what another took in meanwhile, was changed, and has
/// gone again: so a page is only taken in if no other was since its read began.
#[derive(Debug, Default)]
struct Load {
    waiters: SmallVec<[Waiter; 4]>,
    /// How often a page was taken in since the first of the present readers began.
    taken: u64,
    /// `taken` when a channel began to read it.
    by_channel: Option<u64>,
    /// Readers without a channel.
    direct: u32,
}

impl Loads {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PageId, Load>> {
        self.0.lock().expect("loads lock")
    }

    /// `who` waits for the page. True: no channel reads it yet, so read it now.
    fn join(&self, id: PageId, who: Waiter) -> bool {
        let mut all = self.lock();
        let load = all.entry(id).or_default();
        load.waiters.push(who);
        let first = load.by_channel.is_none();
        if first {
            load.by_channel = Some(load.taken);
        }
        first
    }

    /// The channel's read has ended. `take` takes the page in; it is not called if that would be wrong by now, and whoever waits looks
    /// again. Who is to be told, and what.
    fn ended(
        &self,
        id: PageId,
        take: impl FnOnce() -> Result<(), Failure>,
    ) -> (SmallVec<[Waiter; 4]>, Result<(), Failure>) {
        let mut all = self.lock();
        let load = all.get_mut(&id).expect("a page being read");
        let since = load.by_channel.take().expect("read by a channel");
        let result = load.take(since, take).map(drop);
        let waiters = std::mem::take(&mut load.waiters);
        if load.direct == 0 {
            all.remove(&id);
        }
        (waiters, result)
    }

    /// The calling thread reads the page itself; the number is for [`Self::direct_ended`].
    fn begin_direct(&self, id: PageId) -> u64 {
        let mut all = self.lock();
        let load = all.entry(id).or_default();
        load.direct += 1;
        load.taken
    }

    /// It has ended. False: the page was not taken in, look again.
    fn direct_ended(
        &self,
        id: PageId,
        since: u64,
        take: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<bool, Failure> {
        let mut all = self.lock();
        let load = all.get_mut(&id).expect("a page being read");
        load.direct -= 1;
        let result = load.take(since, take);
        if load.direct == 0 && load.by_channel.is_none() {
            all.remove(&id);
        }
        result
    }

    /// Pages being read.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn in_flight_count(&self) -> usize {
        self.lock().len()
    }
}

impl Load {
    fn take(&mut self, since: u64, take: impl FnOnce() -> Result<(), Failure>) -> Result<bool, Failure> {
        if self.taken != since {
            return Ok(false);
        }
        take()?;
        self.taken += 1;
        Ok(true)
    }
}

/// Where to read so that a page lies inside, whole units of the file's alignment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) off: HostOffset,
    /// Bytes before the page.
    pub(super) skip: usize,
    pub(super) len: usize,
}

impl Window {
    pub(super) fn around(place: PagePlace, unit: u32) -> Window {
        let unit = u64::from(unit);
        let skip = usize::try_from(place.off.0 % unit).expect("less than an alignment unit");
        let unit = usize::try_from(unit).expect("an alignment unit is small");
        let len = (skip + place.len).next_multiple_of(unit);
        Window { off: HostOffset(place.off.0 - skip as u64), skip, len }
    }
}

impl Channel {
    /// Waits until the page is in memory; then the slot does again what it was about to do.
    pub(super) fn want_page(&mut self, slot: u16, id: PageId) -> Next {
        if self.slot(slot).pending > 0 {
            return Next::Wait; // our own operations first: an answer to any of them looks again
        }
        let me = self.me(slot);
        self.slot(slot).pending += 1;
        if self.disk.shared.loads.join(id, me) {
            self.submit_load(id);
        }
        // it may have ended at once
        if self.slot(slot).pending > 0 { Next::Wait } else { Next::Again }
    }

    fn submit_load(&mut self, id: PageId) {
        // Only now, as its reader: another channel's read may have ended between the miss and here.
        if self.disk.chain.layer(id.0).map.has_page(id.1) {
            return self.tell_loaded(id, || Ok(()));
        }
        let place = match self.disk.page_place(id) {
            Ok(place) => place,
            Err(f) => return self.tell_loaded(id, || Err(f)),
        };
        let window = Window::around(place, self.disk.file(place.file).traits.alignment.offset);
        let own = Own::Made(AlignedBuf::new(window.len));
        let io = IoOp { kind: IoKind::Read, file: place.file, off: window.off, len: window.len as u64 };
        let i = self.ops.take(Owner::Load(id), io);
        let op = self.ops.get(i);
        op.bufs.push(own.slice());
        op.own = Some(own);
        self.start_op(i);
    }

    /// The read of a page has ended: its bytes are in `own`.
    pub(super) fn load_ended(&mut self, id: PageId, own: Option<Own>, result: Result<(), Failure>) {
        let disk = self.disk.clone();
        self.tell_loaded(id, || {
            result?;
            let place = disk.page_place(id)?;
            let window = Window::around(place, disk.file(place.file).traits.alignment.offset);
            let own = own.expect("a load has memory");
            disk.page_read(id, &own.as_slice()[window.skip..window.skip + place.len])
        });
    }

    fn tell_loaded(&mut self, id: PageId, take: impl FnOnce() -> Result<(), Failure>) {
        let (waiters, result) = self.disk.shared.loads.ended(id, take);
        if let Err(f) = result {
            tracing::error!("cannot load {:?} of image {}: {f}", id.1, id.0);
        }
        for w in waiters {
            self.wake(w, result);
        }
    }
}

impl Disk {
    fn page_place(&self, (layer, key): PageId) -> Result<PagePlace, Failure> {
        self.chain.layer(layer).map.page_place(key)
    }

    fn page_read(&self, (layer, key): PageId, bytes: &[u8]) -> Result<(), Failure> {
        self.chain.layer(layer).map.page_read(key, bytes)
    }

    /// Loads a page on the calling thread, for jobs that look things up without a channel.
    ///
    /// # Errors
    /// From the operating system; [`crate::error::ErrorKind::Corrupt`] if the page cannot be right.
    pub fn load_page(&self, layer: u32, key: MetaKey) -> crate::error::Result<()> {
        let id = (layer, key);
        loop {
            let since = self.shared.loads.begin_direct(id);
            let read = if self.chain.layer(layer).map.has_page(key) {
                Ok(None)
            } else {
                self.read_page(id).map(Some)
            };
            let taken = self.shared.loads.direct_ended(id, since, || match &read {
                Ok(Some((own, part))) => self.page_read(id, &own.as_slice()[part.clone()]),
                Ok(None) | Err(_) => Ok(()),
            });
            let here = read?.is_none();
            if here || taken.map_err(Error::from)? {
                return Ok(());
            }
        }
    }

    /// The bytes around a page, and which of them it is.
    fn read_page(&self, id: PageId) -> crate::error::Result<(AlignedBuf, Range<usize>)> {
        let place = self.page_place(id).map_err(Error::from)?;
        let file = &self.file(place.file).file;
        let window = Window::around(place, file.traits().alignment.offset);
        let part = window.skip..window.skip + place.len;
        let mut own = AlignedBuf::new(window.len);
        let mut have = 0;
        while have < part.end {
            let n = file.read_at(window.off.0 + have as u64, &mut own.as_mut_slice()[have..]);
            match n.map_err(|e| Error::io("read a table", e).at(file.path()))? {
                0 => return Err(Error::from(Failure::Corrupt).at(file.path())),
                n => have += n,
            }
        }
        Ok((own, part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: PageId = (0, MetaKey::Header);

    #[test]
    fn what_was_read_before_another_took_the_page_in_is_not_taken_in() {
        let loads = Loads::default();
        assert!(loads.join(ID, Waiter { channel: 0, slot: 1 }), "a channel reads it");
        assert!(!loads.join(ID, Waiter { channel: 1, slot: 2 }), "once");
        let since = loads.begin_direct(ID);
        assert_eq!(loads.direct_ended(ID, since, || Ok(())), Ok(true), "the calling thread was quicker");
        // The page may have been changed and have gone by now.
        let (waiters, result) = loads.ended(ID, || panic!("older bytes are taken in"));
        assert_eq!((waiters.len(), result), (2, Ok(())));
        let late = loads.begin_direct(ID);
        assert!(loads.join(ID, Waiter { channel: 0, slot: 1 }));
        assert_eq!(loads.ended(ID, || Ok(())).1, Ok(()));
        assert_eq!(loads.direct_ended(ID, late, || panic!("older bytes are taken in")), Ok(false));
        assert_eq!(loads.in_flight_count(), 0);
    }

    #[test]
    fn a_read_that_failed_is_told_and_takes_nothing_in() {
        let loads = Loads::default();
        assert!(loads.join(ID, Waiter { channel: 0, slot: 1 }));
        let since = loads.begin_direct(ID);
        assert_eq!(loads.ended(ID, || Err(Failure::Corrupt)).1, Err(Failure::Corrupt));
        assert_eq!(loads.direct_ended(ID, since, || Ok(())), Ok(true));
        assert_eq!(loads.in_flight_count(), 0);
    }
}
