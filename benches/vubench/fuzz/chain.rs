//! Building blocks for chains of any shape in the scratch area of one case.
use crate::features::*;
use crate::mem::GPA_BASE;
use crate::queue::Queue;
use crate::ring::{Desc, F_INDIRECT, F_NEXT, F_WRITE};

// Scratch area of one case.
const HDR: usize = 0;
const SEGMENT: usize = 64;
const STATUS: usize = 256;
pub(super) const TABLE: usize = 0x1000;
pub(super) const DATA: usize = 0x8000;
pub(super) const SCRATCH: usize = 0x20000;

/// Descriptors from here on belong to the cases, those below to the health check.
pub(super) const D0: u16 = 16;

/// What the status byte holds before the device has written it.
pub(super) const UNTOUCHED: u8 = 0xee;

/// What a case knows of its surroundings.
pub(super) struct Cx<'a> {
    pub(super) q: &'a Queue,
    /// offset of the scratch area
    pub(super) s: usize,
    /// number of descriptors in the ring
    pub(super) qsz: u16,
    /// number of sectors of the disk
    pub(super) sectors: u64,
    /// guest physical address of the end of memory
    pub(super) end: u64,
}

/// What to post: descriptors from D0 on, and the head to announce.
pub(super) struct Post {
    pub(super) v: Vec<Desc>,
    pub(super) head: u16,
    /// offset of the status byte in the scratch area: the last writable byte of the chain
    pub(super) status: usize,
    /// number of bytes the device may write
    pub(super) writable: u64,
    /// number of times the head is announced
    pub(super) times: usize,
}

pub(super) fn d(addr: u64, len: u32, flags: u16) -> Desc {
    Desc { addr, len, flags, next: 0 }
}

/// Links descriptors by NEXT in place: entry i gets next = first + i + 1.
pub(super) fn link(mut v: Vec<Desc>, first: u16) -> Vec<Desc> {
    let more = v.len().saturating_sub(1);
    for (i, x) in v.iter_mut().take(more).enumerate() {
        x.flags |= F_NEXT;
        x.next = first + i as u16 + 1;
    }
    v
}

impl Cx<'_> {
    pub(super) fn gpa(&self, o: usize) -> u64 {
        self.q.mem.gpa(self.s + o)
    }

    pub(super) fn put<T: crate::mem::Pod>(&self, o: usize, v: T) {
        self.q.mem.write(self.s + o, v);
    }

    pub(super) fn hdr(&self, typ: u32, sector: u64) -> Desc {
        self.put(HDR, typ);
        self.put(HDR + 4, 0u32);
        self.put(HDR + 8, sector);
        d(self.gpa(HDR), 16, 0)
    }

    pub(super) fn st(&self) -> Desc {
        d(self.gpa(STATUS), 1, F_WRITE)
    }

    pub(super) fn data(&self, len: u32, flags: u16) -> Desc {
        d(self.gpa(DATA), len, flags)
    }

    pub(super) fn read(&self) -> Vec<Desc> {
        vec![self.hdr(T_IN, 0), self.data(512, F_WRITE), self.st()]
    }

    /// Writes an indirect table as it is.
    pub(super) fn table(&self, v: &[Desc]) {
        for (i, x) in v.iter().enumerate() {
            self.put(TABLE + 16 * i, *x);
        }
    }

    /// Descriptors as they are, not linked.
    pub(super) fn raw(&self, v: Vec<Desc>) -> Post {
        self.post(v.clone(), &v)
    }

    /// A well linked chain.
    pub(super) fn chain(&self, v: Vec<Desc>) -> Post {
        self.raw(link(v, D0))
    }

    /// One indirect descriptor over a well linked table.
    pub(super) fn indirect(&self, v: Vec<Desc>) -> Post {
        self.table(&link(v.clone(), 0));
        let table = d(self.gpa(TABLE), 16 * v.len() as u32, F_INDIRECT);
        self.post(vec![table], &v)
    }

    /// A discard or write-zeroes of `segs` (sector, sectors, flags), `len` bytes of them announced.
    pub(super) fn ranged(&self, typ: u32, segs: &[(u64, u32, u32)], len: u32) -> Post {
        let h = self.hdr(typ, 0);
        for (i, s) in segs.iter().enumerate() {
            let o = SEGMENT + 16 * i;
            self.put(o, s.0);
            self.put(o + 8, s.1);
            self.put(o + 12, s.2);
        }
        self.chain(vec![h, d(self.gpa(SEGMENT), len, 0), self.st()])
    }

    /// `flat`: the descriptors that count, be they in `v` or in a table.
    pub(super) fn post(&self, v: Vec<Desc>, flat: &[Desc]) -> Post {
        let w = || flat.iter().filter(|x| x.flags & F_WRITE != 0);
        let last = w().rfind(|x| x.len > 0);
        let at = last.map(|x| {
            let end = x.addr.wrapping_add(u64::from(x.len) - 1);
            end.wrapping_sub(GPA_BASE + self.s as u64) as usize
        });
        Post {
            v,
            head: D0,
            status: at.filter(|o| *o < SCRATCH).unwrap_or(STATUS),
            writable: w().map(|x| u64::from(x.len)).sum(),
            times: 1,
        }
    }
}
