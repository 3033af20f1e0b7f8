//! A virtqueue with request slots: each slot owns a control block and a data buffer.
use crate::dev::{Info, Opts};
use crate::features::*;
use crate::mem::Mem;
use crate::ring::{Desc, F_INDIRECT, F_NEXT, F_WRITE, Ring};
use crate::sys::poll_fd;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Clone, Copy)]
pub(crate) struct Req {
    pub(crate) typ: u32,
    pub(crate) off: u64,
    pub(crate) len: u32,
    /// flags of the discard/write-zeroes segment (bit 0: unmap)
    pub(crate) flags: u32,
}

impl Req {
    fn ranged(self) -> bool {
        self.typ == T_DISCARD || self.typ == T_WRITE_ZEROES
    }

    /// The used length that says the whole truth about this request done with status OK.
    pub(crate) fn used_len(self) -> u32 {
        if self.typ == T_IN { self.len + 1 } else { 1 }
    }
}

// The control block of a slot; the data buffer lies elsewhere.
const CTL_SEGMENT: usize = 16;
const CTL_STATUS: usize = 32;
const CTL_TABLE: usize = 64;

/// Offsets of a queue's parts in shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    ring: usize,
    ctl: usize,
    data: usize,
    data_len: usize,
}

pub(crate) struct Queue {
    pub(crate) mem: Arc<Mem>,
    pub(crate) ring: Ring,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) wakes: u64,
    indirect: bool,
    segs: usize,
    ctl_len: usize,
    l: Layout,
}

fn ctl_len(segs: usize) -> usize {
    (CTL_TABLE + 16 * (segs + 2)).next_multiple_of(64)
}

fn whole_pages(bs: usize) -> usize {
    bs.next_multiple_of(0x1000)
}

impl Queue {
    pub(crate) fn bytes(o: &Opts, depth: usize, bs: usize) -> usize {
        Ring::bytes(o.vring) + depth * (ctl_len(o.segs) + whole_pages(bs)) + 0x3000
    }

    /// Carves a queue out of `mem` (while it is still exclusively owned).
    pub(crate) fn layout(mem: &mut Mem, o: &Opts, depth: usize, bs: usize) -> Layout {
        let data_len = whole_pages(bs);
        Layout {
            ring: mem.alloc(Ring::bytes(o.vring), 0x1000),
            ctl: mem.alloc(depth * ctl_len(o.segs), 0x1000),
            data: mem.alloc(depth * data_len, 0x1000),
            data_len,
        }
    }

    pub(crate) fn new(mem: Arc<Mem>, l: Layout, o: &Opts, info: &Info, depth: usize) -> io::Result<Queue> {
        let indirect = info.has(F_INDIRECT_DESC);
        let need = if indirect { depth } else { depth * (o.segs + 2) };
        if need > usize::from(o.vring) {
            return Err(io::Error::other(format!("iodepth needs {need} descriptors, vring has {}", o.vring)));
        }
        Ok(Queue {
            ring: Ring::new(mem.clone(), l.ring, o.vring, info.has(F_EVENT_IDX)),
            kick: EventFd::new(EFD_NONBLOCK)?,
            call: EventFd::new(EFD_NONBLOCK)?,
            wakes: 0,
            indirect,
            segs: o.segs,
            ctl_len: ctl_len(o.segs),
            l,
            mem,
        })
    }

    /// New eventfds, as a VMM makes them for a back-end that came back.
    pub(crate) fn renew_events(&mut self) -> io::Result<()> {
        self.kick = EventFd::new(EFD_NONBLOCK)?;
        self.call = EventFd::new(EFD_NONBLOCK)?;
        Ok(())
    }

    pub(crate) fn head(&self, slot: usize) -> u16 {
        if self.indirect { slot as u16 } else { (slot * (self.segs + 2)) as u16 }
    }

    pub(crate) fn slot(&self, head: u32) -> usize {
        if self.indirect { head as usize } else { head as usize / (self.segs + 2) }
    }

    /// Offset of the slot's data buffer.
    pub(crate) fn buf(&self, slot: usize) -> usize {
        self.l.data + slot * self.l.data_len
    }

    /// The slot's data, while the device does not have it.
    pub(crate) fn data(&self, slot: usize, len: usize) -> &mut [u8] {
        self.mem.bytes(self.buf(slot), len)
    }

    pub(crate) fn status(&self, slot: usize) -> u8 {
        self.mem.read(self.ctl(slot) + CTL_STATUS)
    }

    fn ctl(&self, slot: usize) -> usize {
        self.l.ctl + slot * self.ctl_len
    }

    /// Builds the chain for `slot` and pushes it (unpublished).
    pub(crate) fn submit(&mut self, slot: usize, r: Req) {
        let c = self.ctl(slot);
        let sector = if r.typ == T_IN || r.typ == T_OUT { r.off / 512 } else { 0 };
        self.mem.write(c, r.typ);
        self.mem.write(c + 4, 0u32);
        self.mem.write(c + 8, sector);
        self.mem.write(c + CTL_STATUS, 0xffu8);
        let chain = self.parts(slot, r);
        let head = self.head(slot);
        if self.indirect {
            self.put_chain(c + CTL_TABLE, 0, &chain);
            let table = Desc {
                addr: self.mem.gpa(c + CTL_TABLE),
                len: 16 * chain.len() as u32,
                flags: F_INDIRECT,
                next: 0,
            };
            self.ring.set_desc(head, table);
        } else {
            self.put_chain(self.ring.desc + 16 * usize::from(head), head, &chain);
        }
        self.ring.push(head);
    }

    /// Address, length and direction of each descriptor of the request.
    fn parts(&self, slot: usize, r: Req) -> Vec<(u64, u32, u16)> {
        let (c, m) = (self.ctl(slot), &self.mem);
        let mut v = vec![(m.gpa(c), 16, 0)];
        if r.ranged() {
            m.write(c + CTL_SEGMENT, r.off / 512);
            m.write(c + CTL_SEGMENT + 8, r.len / 512);
            m.write(c + CTL_SEGMENT + 12, r.flags);
            v.push((m.gpa(c + CTL_SEGMENT), 16, 0));
        } else if r.typ != T_FLUSH {
            let dir = if r.typ == T_IN { F_WRITE } else { 0 };
            let b = m.gpa(self.buf(slot));
            let segs = self.segs.min((r.len / 512) as usize).max(1) as u32;
            let part = r.len / 512 / segs * 512;
            for i in 0..segs {
                let len = if i + 1 == segs { r.len - part * i } else { part };
                v.push((b + u64::from(part * i), len, dir));
            }
        }
        v.push((m.gpa(c + CTL_STATUS), 1, F_WRITE));
        v
    }

    /// Writes a chain at offset `at`, where descriptor numbers start from `base`.
    fn put_chain(&self, at: usize, base: u16, chain: &[(u64, u32, u16)]) {
        for (i, &(addr, len, dir)) in chain.iter().enumerate() {
            let more = i + 1 < chain.len();
            let d = Desc {
                addr,
                len,
                flags: dir | if more { F_NEXT } else { 0 },
                next: if more { base + i as u16 + 1 } else { 0 },
            };
            self.mem.write(at + 16 * i, d);
        }
    }

    pub(crate) fn flush_kick(&mut self) {
        if self.ring.publish() {
            let _ = self.kick.write(1);
        }
    }

    /// Waits for a completion; false on time-out.
    pub(crate) fn wait(&mut self, poll: bool, timeout: Duration) -> bool {
        if self.ring.pending() {
            true
        } else if poll {
            self.spin(timeout)
        } else {
            self.sleep(timeout)
        }
    }

    fn spin(&self, timeout: Duration) -> bool {
        let t0 = Instant::now();
        loop {
            for _ in 0..256 {
                if self.ring.pending() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if t0.elapsed() > timeout {
                return false;
            }
        }
    }

    fn sleep(&mut self, timeout: Duration) -> bool {
        let t0 = Instant::now();
        while !self.ring.enable_irq() {
            let left = timeout.saturating_sub(t0.elapsed()).as_millis() as i32;
            if left == 0 || !self.called(left) {
                return self.ring.pending();
            }
            let _ = self.call.read();
            self.wakes += 1;
            if self.ring.pending() {
                break;
            }
        }
        self.ring.disable_irq();
        true
    }

    fn called(&self, ms: i32) -> bool {
        poll_fd(&self.call, libc::POLLIN, ms) != 0
    }
}
