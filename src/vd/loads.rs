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
use std::collections::{HashMap, hash_map::Entry};
use std::sync::Mutex;

/// Who waits for which page.
#[derive(Debug, Default)]
pub(crate) struct Loads(Mutex<HashMap<PageId, SmallVec<[Waiter; 4]>>>);

impl Loads {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PageId, SmallVec<[Waiter; 4]>>> {
        self.0.lock().expect("loads lock")
    }

    /// `who` waits for the page. True: nobody reads it yet, so read it now.
    pub(crate) fn join(&self, id: PageId, who: Waiter) -> bool {
        match self.lock().entry(id) {
            Entry::Occupied(mut o) => {
                o.get_mut().push(who);
                false
            }
            Entry::Vacant(v) => {
                v.insert(SmallVec::from_slice(&[who]));
                true
            }
        }
    }

    /// The read has ended, and its page was taken in: who is to be told.
    pub(crate) fn ended(&self, id: PageId) -> SmallVec<[Waiter; 4]> {
        self.lock().remove(&id).expect("a page being read")
    }

    /// Pages being read.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn in_flight_count(&self) -> usize {
        self.lock().len()
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
        if self.disk.loads.join(id, me) {
            self.submit_load(id);
        }
        // it may have ended at once
        if self.slot(slot).pending > 0 { Next::Wait } else { Next::Again }
    }

    fn submit_load(&mut self, id: PageId) {
        let place = match self.disk.page_place(id) {
            Ok(place) => place,
            Err(f) => return self.tell_loaded(id, Err(f)),
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
        let taken = result.and_then(|()| {
            let place = self.disk.page_place(id)?;
            let window = Window::around(place, self.disk.file(place.file).traits.alignment.offset);
            let own = own.expect("a load has memory");
            self.disk.page_read(id, &own.as_slice()[window.skip..window.skip + place.len])
        });
        self.tell_loaded(id, taken);
    }

    fn tell_loaded(&mut self, id: PageId, taken: Result<(), Failure>) {
        if let Err(f) = taken {
            tracing::error!("cannot load {:?} of image {}: {f}", id.1, id.0);
        }
        for w in self.disk.loads.ended(id) {
            self.wake(w, taken);
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
        let place = self.page_place(id).map_err(Error::from)?;
        let file = &self.file(place.file).file;
        let window = Window::around(place, file.traits().alignment.offset);
        let mut own = AlignedBuf::new(window.len);
        let mut have = 0;
        while have < window.skip + place.len {
            let n = file.read_at(window.off.0 + have as u64, &mut own.as_mut_slice()[have..]);
            match n.map_err(|e| Error::io("read a table", e).at(file.path()))? {
                0 => return Err(Error::from(Failure::Corrupt).at(file.path())),
                n => have += n,
            }
        }
        self.page_read(id, &own.as_slice()[window.skip..window.skip + place.len])
            .map_err(|f| Error::from(f).at(file.path()))?;
        Ok(())
    }
}
