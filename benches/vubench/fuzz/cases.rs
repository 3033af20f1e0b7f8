//! The chains, and what a device that does it right makes of each.
use super::chain::{Cx, D0, DATA, Post, TABLE, d, link};
use crate::dev::Info;
use crate::features::*;
use crate::mem::GPA_BASE;
use crate::ring::{F_INDIRECT, F_NEXT, F_WRITE};

/// The right answer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Expect {
    /// legal: status OK and exactly this used length
    Ok(u32),
    /// status IOERR or UNSUPP
    Refuse,
    /// status UNSUPP, as the specification demands by name
    Unsupp,
    /// no status byte can be reached: used with length 0
    Unused,
    /// whether there is a status byte is a matter of taste, but it must be no OK
    RefuseOrUnused,
    /// outside the specification, yet harmless: any answer
    Any,
    /// the ring itself is broken: the device may stop this queue
    MayStop,
}
use Expect::{Any, MayStop, Refuse, RefuseOrUnused, Unsupp, Unused};

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) build: fn(&Cx) -> Post,
    expect: Expect,
    /// feature without which a device refuses this
    needs: u64,
}

impl Case {
    /// Makes no sense without the feature, not even as something to refuse.
    pub(super) fn skipped(&self, i: &Info) -> bool {
        self.needs & F_INDIRECT_DESC != 0 && !i.has(F_INDIRECT_DESC)
    }

    /// The right answer of this very device.
    pub(super) fn expect(&self, i: &Info) -> Expect {
        let writes = self.needs & WRITES != 0;
        if writes && i.has(BLK_F_RO) {
            return Refuse;
        }
        if !i.has(self.needs & !WRITES) && self.needs & !WRITES != 0 {
            return Refuse;
        }
        if self.name == TWO_SEGMENTS && i.max_discard_seg() < 2 {
            return Refuse;
        }
        self.expect
    }
}

/// In `needs`: changes the disk. No virtio-blk feature has this bit.
const WRITES: u64 = 1 << 63;
const DISCARD: u64 = BLK_F_DISCARD | WRITES;
const ZEROES: u64 = BLK_F_WRITE_ZEROES | WRITES;
const INDIRECT: u64 = F_INDIRECT_DESC;
const TWO_SEGMENTS: &str = "discard: two segments";

const fn ok(name: &'static str, used: u32, needs: u64, build: fn(&Cx) -> Post) -> Case {
    bad(name, Expect::Ok(used), needs, build)
}

const fn bad(name: &'static str, expect: Expect, needs: u64, build: fn(&Cx) -> Post) -> Case {
    Case { name, build, expect, needs }
}

pub(super) fn all() -> impl Iterator<Item = &'static Case> {
    let lists = [LEGAL, ADDRESSES, LOOPS, LENGTHS, DIRECTIONS, REQUESTS, DISCARDS, INDIRECTS, RINGS];
    lists.into_iter().flatten()
}

const LEGAL: &[Case] = &[
    ok("legal: read 4k", 4097, 0, |c| c.chain(vec![c.hdr(T_IN, 0), c.data(4096, F_WRITE), c.st()])),
    ok("legal: write 4k", 1, WRITES, |c| c.chain(vec![c.hdr(T_OUT, 8), c.data(4096, 0), c.st()])),
    ok("legal: header in two descriptors", 513, 0, |c| {
        let h = c.hdr(T_IN, 0);
        let halves = [d(h.addr, 8, 0), d(h.addr + 8, 8, 0)];
        c.chain(vec![halves[0], halves[1], c.data(512, F_WRITE), c.st()])
    }),
    ok("legal: header and write data in one descriptor", 1, WRITES, |c| {
        let h = c.hdr(T_OUT, 8);
        c.chain(vec![d(h.addr, 16 + 512, 0), c.st()])
    }),
    ok("legal: read data and status in one descriptor", 513, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), c.data(513, F_WRITE)])
    }),
    ok("legal: data split 512+100+412+512", 1537, 0, |c| {
        let part = |at, len| d(c.gpa(DATA + at), len, F_WRITE);
        let parts = [part(0, 512), part(512, 100), part(612, 412), part(1024, 512)];
        c.chain([&[c.hdr(T_IN, 0)], &parts[..], &[c.st()]].concat())
    }),
    ok("legal: 1-byte-aligned data buffer", 513, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), d(c.gpa(DATA + 1), 512, F_WRITE), c.st()])
    }),
    ok("legal: flush", 1, BLK_F_FLUSH, |c| c.chain(vec![c.hdr(T_FLUSH, 0), c.st()])),
    ok("legal: GET_ID 20 bytes", 21, 0, |c| c.chain(vec![c.hdr(T_GET_ID, 0), c.data(20, F_WRITE), c.st()])),
    ok("legal: last sector", 513, 0, |c| {
        c.chain(vec![c.hdr(T_IN, c.sectors - 1), c.data(512, F_WRITE), c.st()])
    }),
    ok("legal: long chain of 64 x 512", 32769, 0, |c| {
        let mut v = vec![c.hdr(T_IN, 0)];
        v.extend((0..64).map(|i| d(c.gpa(DATA + 512 * i), 512, F_WRITE)));
        v.push(c.st());
        c.chain(v)
    }),
    // A driver's breach of its own rule: whether the first has ended when the second is looked at is a matter of time.
    bad("same head announced twice", Any, 0, |c| Post { times: 2, ..c.chain(c.read()) }),
];

const ADDRESSES: &[Case] = &[
    bad("header GPA unmapped (0)", Refuse, 0, |c| c.chain(vec![d(0, 16, 0), c.data(512, F_WRITE), c.st()])),
    bad("read data GPA below the region", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), d(GPA_BASE - 512, 512, F_WRITE), c.st()])
    }),
    bad("write data GPA past the region", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_OUT, 0), d(c.end + 0x1000, 512, 0), c.st()])
    }),
    bad("read data crosses the region end", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), d(c.end - 512, 4096, F_WRITE), c.st()])
    }),
    bad("data GPA + len wraps 2^64", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), d(u64::MAX - 511, 4096, F_WRITE), c.st()])
    }),
    bad("status GPA unmapped", Unused, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), c.data(512, F_WRITE), d(8, 1, F_WRITE)])
    }),
];

const LOOPS: &[Case] = &[
    bad("two-descriptor loop", Unused, 0, |c| {
        let mut v = link(vec![c.hdr(T_IN, 0), c.data(512, F_WRITE)], D0);
        (v[1].flags, v[1].next) = (F_NEXT | F_WRITE, D0);
        c.raw(v)
    }),
    bad("self loop", Unused, 0, |c| {
        let mut h = c.hdr(T_IN, 0);
        (h.flags, h.next) = (F_NEXT, D0);
        c.raw(vec![h])
    }),
    bad("loop in writable tail", Unused, 0, |c| {
        let mut v = link(vec![c.hdr(T_IN, 0), c.data(512, F_WRITE)], D0);
        (v[1].flags, v[1].next) = (F_NEXT | F_WRITE, D0 + 1);
        c.raw(v)
    }),
    bad("next index out of table", Unused, 0, |c| {
        let mut h = c.hdr(T_IN, 0);
        (h.flags, h.next) = (F_NEXT, c.qsz + 5);
        c.raw(vec![h])
    }),
];

const LENGTHS: &[Case] = &[
    bad("zero-length data descriptor", Any, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), c.data(0, F_WRITE), c.data(512, F_WRITE), c.st()])
    }),
    bad("zero-length header descriptor", Any, 0, |c| {
        let h = c.hdr(T_IN, 0);
        c.chain(vec![d(h.addr, 0, 0), h, c.data(512, F_WRITE), c.st()])
    }),
    bad("all descriptors zero length", Unused, 0, |c| {
        let none = |x: crate::ring::Desc| d(x.addr, 0, x.flags);
        c.chain(c.read().into_iter().map(none).collect())
    }),
    bad("short header (8 bytes)", Refuse, 0, |c| {
        let h = c.hdr(T_IN, 0);
        c.chain(vec![d(h.addr, 8, 0), c.data(512, F_WRITE), c.st()])
    }),
    bad("data length 100", Refuse, 0, |c| c.chain(vec![c.hdr(T_IN, 0), c.data(100, F_WRITE), c.st()])),
    bad("GET_ID 4 bytes", Any, 0, |c| c.chain(vec![c.hdr(T_GET_ID, 0), c.data(4, F_WRITE), c.st()])),
    bad("read without data", Any, 0, |c| c.chain(vec![c.hdr(T_IN, 0), c.st()])),
    bad("write without data", Any, 0, |c| c.chain(vec![c.hdr(T_OUT, 0), c.st()])),
    bad("data length 0xffffffff", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), c.data(u32::MAX, F_WRITE), c.st()])
    }),
    bad("data length 0xfffffe00, several", Refuse, 0, |c| {
        let huge = c.data(0xffff_fe00, F_WRITE);
        c.chain(vec![c.hdr(T_IN, 0), huge, huge, c.st()])
    }),
];

const DIRECTIONS: &[Case] = &[
    bad("read into a device-readable buffer", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), c.data(512, 0), c.st()])
    }),
    bad("write from a device-writable buffer", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_OUT, 0), c.data(512, F_WRITE), c.st()])
    }),
    bad("header device-writable", Refuse, 0, |c| {
        let mut v = c.read();
        v[0].flags |= F_WRITE;
        c.chain(v)
    }),
    bad("status device-readable", RefuseOrUnused, 0, |c| {
        let mut v = c.read();
        v[2].flags = 0;
        c.chain(v)
    }),
    bad("readable after writable", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), c.st(), c.data(512, 0), c.st()])
    }),
    bad("no status byte (read, 512 writable)", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_IN, 0), c.data(512, F_WRITE)])
    }),
    bad("no status byte (write)", Unused, 0, |c| c.chain(vec![c.hdr(T_OUT, 0), c.data(512, 0)])),
    bad("header only", Unused, 0, |c| c.chain(vec![c.hdr(T_IN, 0)])),
    bad("status only", Refuse, 0, |c| c.chain(vec![c.st()])),
];

const REQUESTS: &[Case] = &[
    bad("sector = capacity", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_IN, c.sectors), c.data(512, F_WRITE), c.st()])
    }),
    bad("read crosses the capacity", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_IN, c.sectors - 1), c.data(4096, F_WRITE), c.st()])
    }),
    bad("write crosses the capacity", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_OUT, c.sectors - 1), c.data(4096, 0), c.st()])
    }),
    bad("sector 2^64-1", Refuse, 0, |c| c.chain(vec![c.hdr(T_IN, u64::MAX), c.data(512, F_WRITE), c.st()])),
    bad("sector*512 wraps (2^55)", Refuse, 0, |c| {
        c.chain(vec![c.hdr(T_OUT, 1 << 55), c.data(512, 0), c.st()])
    }),
    bad("unknown request type 0x77", Unsupp, 0, |c| {
        c.chain(vec![c.hdr(0x77, 0), c.data(512, F_WRITE), c.st()])
    }),
    bad("type SCSI_CMD 2", Unsupp, 0, |c| c.chain(vec![c.hdr(T_SCSI_CMD, 0), c.data(512, 0), c.st()])),
    bad("flush with data", Any, 0, |c| c.chain(vec![c.hdr(T_FLUSH, 0), c.data(512, 0), c.st()])),
    bad("flush with sector != 0", Any, 0, |c| c.chain(vec![c.hdr(T_FLUSH, 7), c.st()])),
];

const DISCARDS: &[Case] = &[
    ok("discard: one valid segment", 1, DISCARD, |c| c.ranged(T_DISCARD, &[(2048, 64, 0)], 16)),
    ok(TWO_SEGMENTS, 1, DISCARD, |c| c.ranged(T_DISCARD, &[(2048, 8, 0), (4096, 8, 0)], 32)),
    bad("discard: segment of 8 bytes", Refuse, 0, |c| c.ranged(T_DISCARD, &[(2048, 8, 0)], 8)),
    bad("discard: segment of 24 bytes", Refuse, 0, |c| {
        c.ranged(T_DISCARD, &[(2048, 8, 0), (4096, 8, 0)], 24)
    }),
    bad("discard: no segment", Refuse, 0, |c| c.chain(vec![c.hdr(T_DISCARD, 0), c.st()])),
    bad("discard: 0 sectors", Any, 0, |c| c.ranged(T_DISCARD, &[(2048, 0, 0)], 16)),
    bad("discard: beyond the end", Refuse, 0, |c| c.ranged(T_DISCARD, &[(c.sectors, 8, 0)], 16)),
    bad("discard: sector+n wraps", Refuse, 0, |c| c.ranged(T_DISCARD, &[(u64::MAX, 8, 0)], 16)),
    bad("discard: 0xffffffff sectors", Refuse, 0, |c| c.ranged(T_DISCARD, &[(0, u32::MAX, 0)], 16)),
    bad("discard: unmap flag set", Unsupp, DISCARD, |c| c.ranged(T_DISCARD, &[(2048, 8, 1)], 16)),
    bad("discard: reserved flag bit", Unsupp, DISCARD, |c| c.ranged(T_DISCARD, &[(2048, 8, 0x80)], 16)),
    bad("discard: 600 segments", Refuse, 0, |c| {
        for i in 0..600 {
            c.put(DATA + 16 * i, 4096u64);
            c.put(DATA + 16 * i + 8, 8u64);
        }
        c.chain(vec![c.hdr(T_DISCARD, 0), c.data(9600, 0), c.st()])
    }),
    ok("write_zeroes: valid, unmap", 1, ZEROES, |c| c.ranged(T_WRITE_ZEROES, &[(2048, 64, 1)], 16)),
    ok("write_zeroes: valid, keep", 1, ZEROES, |c| c.ranged(T_WRITE_ZEROES, &[(2048, 64, 0)], 16)),
    bad("write_zeroes: reserved flag bit", Unsupp, ZEROES, |c| {
        c.ranged(T_WRITE_ZEROES, &[(2048, 8, 0x80)], 16)
    }),
    bad("write_zeroes: beyond the end", Refuse, 0, |c| {
        c.ranged(T_WRITE_ZEROES, &[(c.sectors - 1, 8, 0)], 16)
    }),
    bad("write_zeroes: 0xffffffff sectors", Refuse, 0, |c| c.ranged(T_WRITE_ZEROES, &[(0, u32::MAX, 0)], 16)),
];

const INDIRECTS: &[Case] = &[
    ok("legal: indirect read", 513, INDIRECT, |c| c.indirect(c.read())),
    ok("legal: direct header, then indirect rest", 513, INDIRECT, |c| {
        let v = c.read();
        c.table(&link(v[1..].to_vec(), 0));
        let direct = vec![v[0], d(c.gpa(TABLE), 32, F_INDIRECT)];
        c.post(link(direct, D0), &v)
    }),
    // "the device MUST ignore the write-only flag" of the descriptor that refers to a table
    ok("legal: indirect, with WRITE", 513, INDIRECT, |c| {
        let mut p = c.indirect(c.read());
        p.v[0].flags |= F_WRITE;
        p
    }),
    bad("indirect: nested", RefuseOrUnused, INDIRECT, |c| {
        let inner = d(c.gpa(TABLE + 0x800), 32, F_INDIRECT);
        c.indirect(vec![c.hdr(T_IN, 0), inner, c.st()])
    }),
    bad("indirect: table length 0", Unused, INDIRECT, |c| c.raw(vec![d(c.gpa(TABLE), 0, F_INDIRECT)])),
    bad("indirect: table length 40", RefuseOrUnused, INDIRECT, |c| {
        let mut p = c.indirect(c.read());
        p.v[0].len = 40;
        p
    }),
    bad("indirect: table GPA unmapped", Unused, INDIRECT, |c| c.raw(vec![d(16, 48, F_INDIRECT)])),
    bad("indirect: with NEXT", Any, INDIRECT, |c| {
        let mut p = c.indirect(c.read());
        p.v.push(c.st());
        p.v = link(p.v, D0);
        p
    }),
    bad("indirect: loop in the table", Unused, INDIRECT, |c| {
        let mut v = link(vec![c.hdr(T_IN, 0), c.data(512, F_WRITE)], 0);
        (v[1].flags, v[1].next) = (F_NEXT | F_WRITE, 0);
        c.table(&v);
        c.raw(vec![d(c.gpa(TABLE), 32, F_INDIRECT)])
    }),
    bad("indirect: next outside the table", Unused, INDIRECT, |c| {
        let mut h = c.hdr(T_IN, 0);
        (h.flags, h.next) = (F_NEXT, 900);
        c.table(&[h]);
        c.raw(vec![d(c.gpa(TABLE), 16, F_INDIRECT)])
    }),
    bad("indirect: table larger than the queue", Any, INDIRECT, |c| {
        let mut v = vec![c.hdr(T_IN, 0)];
        v.extend((0..1000).map(|_| c.data(512, F_WRITE)));
        v.push(c.st());
        c.indirect(v)
    }),
];

const RINGS: &[Case] = &[
    bad("head index out of table", MayStop, 0, |c| Post { head: c.qsz + 5, ..c.raw(vec![c.hdr(T_IN, 0)]) }),
    bad("avail index jumps", MayStop, 0, |c| Post { times: 2 * usize::from(c.qsz), ..c.chain(c.read()) }),
];
