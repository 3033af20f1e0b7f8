//! Packed units on their way into memory: read and unpacked once, whoever misses them; the last few are kept.

use super::advance::Next;
use super::channel::Channel;
use super::loads::Window;
use super::own::Own;
use super::slot::Owner;
use super::unpack::unpack;
use crate::error::Failure;
use crate::io::{AlignedBuf, IoKind, IoOp, scatter, sub_slices};
use crate::limits::{MAX_PACKED_BYTES, MAX_UNIT_BYTES, MAX_UNITS_LOADING, UNIT_CACHE_BYTES};
use crate::map::{Packed, PagePlace, Waiter};
use smallvec::SmallVec;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

type Waiters = SmallVec<[Waiter; 4]>;

/// The packed units of a disk: those unpacked lately, and who waits for which.
#[derive(Debug, Default)]
pub(crate) struct Units(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The last used behind the others.
    kept: VecDeque<(Packed, Arc<[u8]>)>,
    kept_bytes: usize,
    loading: HashMap<Packed, Waiters>,
    /// They ask again when a unit on its way has come.
    queue: Waiters,
}

impl Units {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().expect("units lock")
    }

    fn find(&self, wanted: Packed) -> Option<Arc<[u8]>> {
        let mut s = self.lock();
        let i = s.kept.iter().rposition(|(p, _)| *p == wanted)?;
        let found = s.kept.remove(i)?;
        let bytes = found.1.clone();
        s.kept.push_back(found);
        Some(bytes)
    }

    /// `who` waits for the unit, or for others to have come. True: nobody loads it yet, so do it now.
    fn join(&self, wanted: Packed, who: Waiter) -> bool {
        let mut s = self.lock();
        if let Some(waiters) = s.loading.get_mut(&wanted) {
            waiters.push(who);
            return false;
        }
        if s.loading.len() >= MAX_UNITS_LOADING {
            s.queue.push(who);
            return false;
        }
        s.loading.insert(wanted, SmallVec::from_slice(&[who]));
        true
    }

    /// The unit has come, or it has failed: those who wait for it, and those who wait for their turn.
    fn ended(&self, packed: Packed, bytes: Option<&Arc<[u8]>>) -> (Waiters, Waiters) {
        let mut s = self.lock();
        if let Some(bytes) = bytes {
            s.kept_bytes += bytes.len();
            s.kept.push_back((packed, bytes.clone()));
            while s.kept_bytes > UNIT_CACHE_BYTES {
                let (_, gone) = s.kept.pop_front().expect("bytes are kept in units");
                s.kept_bytes -= gone.len();
            }
        }
        let waiters = s.loading.remove(&packed).expect("a unit on its way");
        (waiters, std::mem::take(&mut s.queue))
    }

    /// Units on their way, and those who wait for their turn.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn in_flight_count(&self) -> usize {
        let s = self.lock();
        s.loading.len() + s.queue.len()
    }
}

impl Channel {
    /// The unit, if it is in memory.
    pub(super) fn unit_of(&mut self, slot: u16, packed: Packed) -> Option<Arc<[u8]>> {
        match self.slot(slot).unit.take() {
            Some((p, bytes)) if p == packed => Some(bytes),
            _ => self.disk.shared.units.find(packed),
        }
    }

    /// Copies a part of a unit to the request's memory from `at` on.
    pub(super) fn copy_of_unit(&mut self, slot: u16, unit: &[u8], at: u64, (into, len): (u32, u64)) {
        let mut parts = Vec::new();
        sub_slices(&self.slot(slot).bufs, at, len, &mut parts);
        scatter(part(unit, into, len), &parts);
    }

    /// The same to the slot's buffer.
    pub(super) fn unit_to_buffer(&mut self, slot: u16, unit: &[u8], at: u64, (into, len): (u32, u64)) {
        let buf = self.slot(slot).buf.as_ref().expect("a slot that copies has a buffer").slice();
        let at = usize::try_from(at).expect("inside the buffer");
        let part = part(unit, into, len);
        buf.part(at, part.len()).write(part);
    }

    /// Waits until the unit is in memory; then the slot does again what it was about to do.
    pub(super) fn want_unit(&mut self, slot: u16, packed: Packed) -> Next {
        if self.slot(slot).pending > 0 {
            return Next::Wait; // our own operations first: an answer to any of them looks again
        }
        let me = self.me(slot);
        self.slot(slot).pending += 1;
        if self.disk.shared.units.join(packed, me) {
            self.submit_unit(packed);
        }
        // it may have ended at once
        if self.slot(slot).pending > 0 { Next::Wait } else { Next::Again }
    }

    fn submit_unit(&mut self, packed: Packed) {
        let Packed { file, off, len, unit, .. } = packed;
        let sane = (1..=MAX_PACKED_BYTES).contains(&len) && (1..=MAX_UNIT_BYTES).contains(&unit);
        if !sane {
            return self.tell_unpacked(packed, Err(Failure::Corrupt));
        }
        let window = self.packed_window(packed);
        let own = Own::Made(AlignedBuf::new(window.len));
        let io = IoOp { kind: IoKind::Read, file, off: window.off, len: window.len as u64 };
        debug_assert!(off >= window.off);
        let i = self.ops.take(Owner::Unit(packed), io);
        let op = self.ops.get(i);
        op.bufs.push(own.slice());
        op.own = Some(own);
        self.start_op(i);
    }

    fn packed_window(&self, p: Packed) -> Window {
        let len = usize::try_from(p.len).expect("limits::MAX_PACKED_BYTES");
        let place = PagePlace { file: p.file, off: p.off, len };
        Window::around(place, self.disk.file(p.file).traits.alignment.offset)
    }

    /// The packed bytes have been read into `own`.
    pub(super) fn unit_ended(&mut self, packed: Packed, own: Option<Own>, result: Result<(), Failure>) {
        let unpacked = result.and_then(|()| {
            let window = self.packed_window(packed);
            let own = own.expect("a unit's read has memory");
            let len = usize::try_from(packed.len).expect("limits::MAX_PACKED_BYTES");
            let mut bytes = vec![0; usize::try_from(packed.unit).expect("limits::MAX_UNIT_BYTES")];
            unpack(packed.codec, &own.as_slice()[window.skip..window.skip + len], &mut bytes)?;
            Ok(Arc::from(bytes))
        });
        self.tell_unpacked(packed, unpacked);
    }

    fn tell_unpacked(&mut self, packed: Packed, unpacked: Result<Arc<[u8]>, Failure>) {
        if let Err(f) = unpacked {
            let path = self.disk.file(packed.file).file.path().display();
            tracing::error!("{path}: cannot read the packed unit at {}: {f}", packed.off);
        }
        let (waiters, queue) = self.disk.shared.units.ended(packed, unpacked.as_ref().ok());
        for w in waiters {
            if let Ok(bytes) = &unpacked
                && w.channel == self.id
            {
                // It has it for certain, however many others come and go meanwhile.
                self.slot(w.slot).unit = Some((packed, bytes.clone()));
            }
            self.wake(w, unpacked.as_ref().map(drop).map_err(|f| *f));
        }
        for w in queue {
            self.wake(w, Ok(()));
        }
    }
}

fn part(unit: &[u8], into: u32, len: u64) -> &[u8] {
    let from = usize::try_from(into).expect("inside a unit");
    &unit[from..from + usize::try_from(len).expect("inside a unit")]
}
