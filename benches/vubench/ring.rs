//! Driver side of a split virtqueue (virtio 1.x, section 2.7).
use crate::mem::{Mem, Pod};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

pub(crate) const F_NEXT: u16 = 1;
pub(crate) const F_WRITE: u16 = 2;
pub(crate) const F_INDIRECT: u16 = 4;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

// SAFETY: `repr(C)`, its fields 8 + 4 + 2 + 2 bytes leave no padding, and all are integers.
unsafe impl Pod for Desc {}

pub(crate) struct Ring {
    mem: Arc<Mem>,
    pub(crate) size: u16,
    pub(crate) desc: usize,
    pub(crate) avail: usize,
    pub(crate) used: usize,
    event_idx: bool,
    avail_idx: u16,
    published: u16,
    last_used: u16,
    pub(crate) kicks: u64,
}

/// Bytes of the descriptor table and available ring, and of the used ring, in whole pages.
fn parts(size: u16) -> (usize, usize) {
    let n = usize::from(size);
    let driver = (16 * n + 6 + 2 * n).next_multiple_of(0x1000);
    (driver, (6 + 8 * n).next_multiple_of(0x1000))
}

impl Ring {
    pub(crate) fn bytes(size: u16) -> usize {
        let (driver, device) = parts(size);
        driver + device
    }

    /// `off`: page aligned, `Ring::bytes` long area.
    pub(crate) fn new(mem: Arc<Mem>, off: usize, size: u16, event_idx: bool) -> Ring {
        Ring {
            desc: off,
            avail: off + 16 * usize::from(size),
            used: off + parts(size).0,
            mem,
            size,
            event_idx,
            avail_idx: 0,
            published: 0,
            last_used: 0,
            kicks: 0,
        }
    }

    fn avail_event(&self) -> usize {
        self.used + 4 + 8 * usize::from(self.size)
    }

    fn used_event(&self) -> usize {
        self.avail + 4 + 2 * usize::from(self.size)
    }

    pub(crate) fn set_desc(&self, i: u16, d: Desc) {
        self.mem.write(self.desc + 16 * usize::from(i), d);
    }

    /// Adds a chain head; not visible to the device before `publish`.
    pub(crate) fn push(&mut self, head: u16) {
        let slot = usize::from(self.avail_idx % self.size);
        self.mem.write(self.avail + 4 + 2 * slot, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Makes pushed chains visible; true when the device wants a kick.
    pub(crate) fn publish(&mut self) -> bool {
        let old = self.published;
        if old == self.avail_idx {
            return false;
        }
        self.mem.atomic(self.avail + 2).store(self.avail_idx, Release);
        self.published = self.avail_idx;
        // the index must be out before we look whether the device sleeps
        fence(SeqCst);
        let want = if self.event_idx {
            let ev = self.mem.atomic(self.avail_event()).load(Relaxed);
            self.published.wrapping_sub(ev).wrapping_sub(1) < self.published.wrapping_sub(old)
        } else {
            self.mem.atomic(self.used).load(Relaxed) & 1 == 0
        };
        self.kicks += u64::from(want);
        want
    }

    /// The next completion: head and used length.
    pub(crate) fn pop(&mut self) -> Option<(u32, u32)> {
        if !self.pending() {
            return None;
        }
        let o = self.used + 4 + 8 * usize::from(self.last_used % self.size);
        self.last_used = self.last_used.wrapping_add(1);
        Some((self.mem.read(o), self.mem.read(o + 4)))
    }

    pub(crate) fn pending(&self) -> bool {
        self.used_idx() != self.last_used
    }

    /// Asks for an interrupt at the next completion; true when one is already there.
    pub(crate) fn enable_irq(&mut self) -> bool {
        if self.event_idx {
            self.mem.atomic(self.used_event()).store(self.last_used, Relaxed);
        } else {
            self.mem.atomic(self.avail).store(0, Relaxed);
        }
        // the wish must be out before we look a last time
        fence(SeqCst);
        self.pending()
    }

    pub(crate) fn disable_irq(&mut self) {
        // with EVENT_IDX a stale used_event already means "no interrupt"
        if self.event_idx {
            let stale = self.last_used.wrapping_sub(1);
            self.mem.atomic(self.used_event()).store(stale, Relaxed);
        } else {
            self.mem.atomic(self.avail).store(1, Relaxed);
        }
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.mem.atomic(self.used + 2).load(Acquire)
    }
}
