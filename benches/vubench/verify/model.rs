//! What every unit of the disk may contain, given what was posted, completed and flushed.
use super::Cfg;
use super::pattern::{Content, SECTOR, judge, words};
use crate::features::*;
use crate::queue::Req;

/// after a crash anything between `durable` and `posted` is right
const FUZZY: u8 = 1;
/// zeroes were written or posted since the last flush
const ZERO_SINCE: u8 = 2;
/// discarded: old data and zeroes are both right
const DISCARDED: u8 = 4;
/// content never learnt
const UNKNOWN: u8 = 8;

/// How many things that went wrong are told in full.
const TOLD: usize = 40;

/// One unit. Contents are named by the generation of the write, 0 being zeroes.
#[derive(Clone, Copy, Default)]
pub(super) struct Unit {
    pub(super) latest: u64,
    pub(super) durable: u64,
    pub(super) posted: u64,
    pub(super) flags: u8,
    pub(super) dirty: bool,
    busy: bool,
    done_at: u64,
}

impl Unit {
    fn unsure(&self) -> bool {
        self.flags & (FUZZY | DISCARDED | UNKNOWN) != 0
    }

    /// Is this content right for a sector of the unit?
    fn allows(&self, got: Content) -> bool {
        let exact = got == Content::of_generation(self.latest);
        let discarded = self.flags & DISCARDED != 0;
        if exact || self.flags & UNKNOWN != 0 || (discarded && got == Content::Zero) {
            return true;
        }
        self.flags & FUZZY != 0
            && match got {
                Content::Zero => self.durable == 0 || self.flags & ZERO_SINCE != 0,
                Content::Written(g) => g >= self.durable && g <= self.posted,
                Content::Bad => false,
            }
    }
}

/// A posted request in units; the sequence number is that of the last completion before it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub(super) typ: u32,
    pub(super) first: usize,
    pub(super) n: usize,
    pub(super) generation: u64,
    pub(super) seq: u64,
    /// belongs to the sweep at the end
    pub(super) sweep: bool,
}

#[derive(Default)]
pub(crate) struct Stats {
    pub(crate) writes: u64,
    pub(crate) reads: u64,
    pub(crate) write_zeroes: u64,
    pub(crate) discards: u64,
    pub(crate) flushes: u64,
    pub(crate) errors: u64,
    pub(crate) unsupp: u64,
    pub(crate) bad_len: u64,
    pub(crate) mismatches: u64,
    pub(crate) discard_zero: u64,
    pub(crate) discard_old: u64,
    pub(crate) stale_after_crash: u64,
    pub(crate) duplicates: u64,
    pub(crate) lost: u64,
    pub(crate) kills: u32,
    pub(crate) in_flight_at_kills: u64,
    /// from the end of each killed server to the first answer of the next one
    pub(crate) resume_ms: Vec<f64>,
    pub(crate) server_gone: bool,
    pub(crate) told: Vec<String>,
}

pub(super) struct Model {
    pub(super) c: Cfg,
    pub(super) units: Vec<Unit>,
    pub(super) dirty: Vec<usize>,
    pub(super) st: Stats,
    pub(super) generation: u64,
    pub(super) seq: u64,
}

impl Model {
    pub(super) fn new(c: Cfg, units: usize) -> Model {
        let blank = Unit { flags: if c.assume_zero { 0 } else { UNKNOWN }, ..Unit::default() };
        Model { units: vec![blank; units], dirty: Vec::new(), st: Stats::default(), generation: 0, seq: 0, c }
    }

    /// Place of a unit on the disk.
    pub(super) fn offset(&self, unit: usize) -> u64 {
        self.c.offset + (unit * self.c.unit) as u64
    }

    pub(super) fn request(&self, op: &Op) -> Req {
        Req {
            typ: op.typ,
            off: self.offset(op.first),
            len: (op.n * self.c.unit) as u32,
            // every other write-zeroes may give the space back
            flags: u32::from(op.typ == T_WRITE_ZEROES && op.generation & 1 == 0),
        }
    }

    pub(super) fn busy(&self, first: usize, n: usize) -> bool {
        self.units[first..first + n].iter().any(|b| b.busy)
    }

    pub(super) fn posted(&mut self, op: &Op) {
        for i in op.first..op.first + op.n {
            let b = &mut self.units[i];
            b.busy = true;
            match op.typ {
                T_OUT => b.posted = op.generation,
                T_WRITE_ZEROES | T_DISCARD => b.flags |= ZERO_SINCE,
                _ => {}
            }
            if op.typ != T_IN && !b.dirty {
                b.dirty = true;
                self.dirty.push(i);
            }
        }
    }

    pub(super) fn done(&mut self, op: &Op, status: u8, used_len: u32, data: &[u8]) {
        self.seq += 1;
        let st = &mut self.st;
        *match op.typ {
            T_OUT => &mut st.writes,
            T_IN => &mut st.reads,
            T_WRITE_ZEROES => &mut st.write_zeroes,
            T_DISCARD => &mut st.discards,
            _ => &mut st.flushes,
        } += 1;
        match status {
            S_OK => {
                let should = self.request(op).used_len();
                if used_len != should {
                    self.st.bad_len += 1;
                    self.tell(format!("BAD USED LENGTH {used_len}, not {should}: {op:?}"));
                }
            }
            S_UNSUPP => st.unsupp += 1,
            _ => {
                st.errors += 1;
                self.tell(format!("ERROR status {status}: {op:?}"));
            }
        }
        match op.typ {
            T_FLUSH if status == S_OK => self.flushed(op.seq),
            T_FLUSH => {}
            T_IN => self.was_read(op, status, data),
            _ => self.was_changed(op, status),
        }
    }

    /// What was complete before the flush was posted is durable now.
    fn flushed(&mut self, posted_at: u64) {
        let mut keep = Vec::new();
        for i in std::mem::take(&mut self.dirty) {
            let b = &mut self.units[i];
            if b.done_at <= posted_at && !b.busy && b.flags & (FUZZY | DISCARDED) == 0 {
                b.durable = b.latest;
                b.flags &= !ZERO_SINCE;
                b.dirty = false;
            } else {
                keep.push(i);
            }
        }
        self.dirty = keep;
    }

    fn was_read(&mut self, op: &Op, status: u8, data: &[u8]) {
        for (k, unit) in data.chunks(self.c.unit).enumerate() {
            self.units[op.first + k].busy = false;
            if status == S_OK {
                self.check(op.first + k, unit);
            }
        }
    }

    fn was_changed(&mut self, op: &Op, status: u8) {
        for b in &mut self.units[op.first..op.first + op.n] {
            b.busy = false;
            b.done_at = self.seq;
            match (status, op.typ) {
                (S_UNSUPP, _) => {}
                (S_OK, T_DISCARD) => b.flags |= DISCARDED,
                (S_OK, _) => {
                    b.latest = op.generation * u64::from(op.typ == T_OUT);
                    b.flags &= !(FUZZY | DISCARDED | UNKNOWN);
                }
                _ => b.flags |= FUZZY,
            }
        }
    }

    fn check(&mut self, i: usize, data: &[u8]) {
        let b = self.units[i];
        if b.flags & UNKNOWN != 0 {
            return;
        }
        let off = self.offset(i);
        for (k, s) in data.chunks(SECTOR).enumerate() {
            let o = off + (SECTOR * k) as u64;
            let got = judge(s, self.c.seed, o);
            if !b.allows(got) {
                self.st.mismatches += 1;
                self.tell_mismatch(&b, o, got, s);
            } else if b.flags & DISCARDED != 0 {
                self.st.discard_zero += u64::from(got == Content::Zero);
                self.st.discard_old += u64::from(got != Content::Zero);
            } else if b.flags & FUZZY != 0 {
                let exact = got == Content::of_generation(b.latest);
                self.st.stale_after_crash += u64::from(!exact);
            }
        }
    }

    fn tell_mismatch(&mut self, b: &Unit, off: u64, got: Content, sector: &[u8]) {
        let head: Vec<u64> = words(sector).take(4).collect();
        self.tell(format!(
            "MISMATCH offset {off}: got {got:?}, expected generation {} (durable {}, posted {}, flags {}), words {head:x?}",
            b.latest, b.durable, b.posted, b.flags
        ));
    }

    pub(super) fn tell(&mut self, what: String) {
        if self.st.told.len() < TOLD {
            self.st.told.push(format!("after {} kills: {what}", self.st.kills));
        }
    }

    /// The server was killed: everything not flushed since may or may not be there.
    pub(super) fn crash(&mut self) {
        for i in &self.dirty {
            self.units[*i].flags |= FUZZY;
        }
    }

    /// The bytes this unit must have: by the model where it is sure, else as they were read.
    pub(super) fn expected(&self, unit: usize, seen: &[u8]) -> Vec<u8> {
        let b = &self.units[unit];
        if b.unsure() {
            return seen.to_vec();
        }
        let mut v = vec![0; self.c.unit];
        if b.latest != 0 {
            super::pattern::fill(&mut v, self.c.seed, self.offset(unit), b.latest);
        }
        v
    }
}
