//! One queue's driver: random requests around the places all others work on, and a record of what came of them.

use super::intervals::{Access, NOBODY, What};
use crate::common::guest::{
    GuestQueue, QUEUE_SLOTS, SLOT_DATA, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub const SECTOR: usize = 512;
/// Longer than any request may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Sectors at the start of the disk that are never left alone.
const HOT: u64 = 48;

/// Values, and the clock: a number for each moment.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);
static CLOCK: AtomicU64 = AtomicU64::new(1);

pub fn tick() -> u64 {
    CLOCK.fetch_add(1, Ordering::SeqCst)
}

/// What a sector holds after a write: which one, and the sector's own number.
fn value(id: u64, sector: u64) -> u64 {
    id << 24 | sector
}

/// Bits of a word that say where in its sector it belongs.
const PLACE_BITS: u32 = (SECTOR / 8).ilog2();
/// What was found where another word belongs: no value, so nobody has written it.
const OUT_OF_PLACE: u64 = u64::MAX;

/// Fills a sector with a value; each word says where it belongs, too.
fn fill(sector: &mut [u8], value: u64) {
    for (place, w) in (0u64..).zip(sector.chunks_exact_mut(8)) {
        w.copy_from_slice(&(value << PLACE_BITS | place).to_le_bytes());
    }
}

/// The different values of a sector's words: one, unless it was read while it was written.
///
/// Which word held which is forgotten: what one word went through is a part of what is noted of the sector, so that no
/// order explains the sector's reads where none explains the word's.
pub fn values(sector: &[u8]) -> Vec<u64> {
    let mut of_it: Vec<u64> = Vec::with_capacity(1);
    for (place, w) in (0u64..).zip(sector.chunks_exact(8)) {
        let w = u64::from_le_bytes(w.try_into().unwrap());
        let in_place = w == 0 || w & ((1 << PLACE_BITS) - 1) == place;
        let value = if in_place { w >> PLACE_BITS } else { OUT_OF_PLACE };
        if of_it.last() != Some(&value) && !of_it.contains(&value) {
            of_it.push(value);
        }
    }
    of_it
}

/// Notes what a read has found; returns how many of its sectors were torn.
pub fn note_read(log: &mut Vec<Access>, who: u16, (begin, end): (u64, u64), first: u64, bytes: &[u8]) -> u64 {
    let mut torn = 0;
    for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR)) {
        let found = values(bytes);
        torn += u64::from(found.len() > 1);
        let sector = u32::try_from(sector).unwrap();
        log.extend(found.iter().map(|w| Access { sector, who, begin, end, what: What::Read(*w) }));
    }
    torn
}

/// What the drivers of a round share.
pub struct Round {
    pub sectors: u64,
    /// Sectors of a block of the image.
    pub block: u64,
    pub operations: u64,
    pub begun: AtomicU64,
}

#[derive(Clone, Copy)]
struct Asked {
    kind: u32,
    first: u64,
    count: u64,
    id: u64,
    begin: u64,
}

pub struct Driver<'a> {
    pub queue: GuestQueue,
    who: u16,
    round: &'a Round,
    random: u64,
    asked: [Option<Asked>; QUEUE_SLOTS],
    pub log: Vec<Access>,
    pub torn: u64,
    bytes: Vec<u8>,
}

impl<'a> Driver<'a> {
    pub fn new(queue: GuestQueue, who: u16, round: &'a Round, seed: u64) -> Self {
        let random = (seed << 8 | u64::from(who)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Driver {
            queue,
            who,
            round,
            random,
            asked: [None; QUEUE_SLOTS],
            log: Vec::new(),
            torn: 0,
            bytes: vec![0; SLOT_DATA as usize],
        }
    }

    fn below(&mut self, n: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % n
    }

    /// Keeps all slots busy until the round's operations are used up and answered.
    pub fn run(&mut self) {
        loop {
            let since = self.queue.avail_index();
            while let Some(slot) = self.asked.iter().position(Option::is_none)
                && self.round.begun.fetch_add(1, Ordering::Relaxed) < self.round.operations
            {
                self.post(slot);
            }
            if self.queue.avail_index() != since {
                self.queue.kick_if_asked(since);
            }
            if self.asked.iter().all(Option::is_none) {
                return;
            }
            let first = self.queue.wait_for_signal(PATIENCE);
            let mut ended = Some(first.unwrap_or_else(|| panic!("queue {}: no answer", self.who)));
            while let Some((head, written)) = ended {
                self.ended(usize::from(head / 4), written);
                ended = self.queue.wait(Duration::ZERO);
            }
        }
    }

    /// Where everybody works now: two blocks that move on with the round, so that all meet at blocks nobody has written.
    fn place(&mut self) -> (u64, u64) {
        let Round { sectors, block, operations, .. } = *self.round;
        let longest = (SLOT_DATA / SECTOR as u64).min(2 * block);
        let count = match self.below(32) {
            0 => 1 + self.below(longest),
            1 => return (self.whole_block(), block.min(longest)),
            _ => 1 + self.below(8),
        };
        let begun = self.round.begun.load(Ordering::Relaxed).min(operations);
        let (from, width) = match self.below(16) {
            0 => (0, sectors),
            1..4 => (0, HOT),
            _ => (sectors / block * begun / operations * block, 2 * block),
        };
        let first = from + self.below(width);
        (first.min(sectors - count), count)
    }

    fn whole_block(&mut self) -> u64 {
        let Round { sectors, block, operations, .. } = *self.round;
        let begun = self.round.begun.load(Ordering::Relaxed).min(operations);
        ((sectors / block * begun / operations + self.below(2)) * block).min(sectors - block)
    }

    fn post(&mut self, slot: usize) {
        let (first, count) = self.place();
        let len = count as usize * SECTOR;
        let (kind, id) = match self.below(256) {
            0 => (T_FLUSH, 0),
            1..16 => (T_DISCARD, 0),
            16..32 => (T_WRITE_ZEROES, 0),
            32..144 => (T_OUT, NEXT_ID.fetch_add(1, Ordering::Relaxed)),
            _ => (T_IN, 0),
        };
        let unmap = u32::from(kind == T_WRITE_ZEROES && self.below(2) == 0);
        let out = match kind {
            T_OUT => {
                for (sector, bytes) in (first..).zip(self.bytes[..len].chunks_exact_mut(SECTOR)) {
                    fill(bytes, value(id, sector));
                }
                &self.bytes[..len]
            }
            T_DISCARD | T_WRITE_ZEROES => {
                self.bytes[..8].copy_from_slice(&first.to_le_bytes());
                self.bytes[8..12].copy_from_slice(&u32::try_from(count).unwrap().to_le_bytes());
                self.bytes[12..16].copy_from_slice(&unmap.to_le_bytes());
                &self.bytes[..16]
            }
            _ => &[],
        };
        let inward = if kind == T_IN { u32::try_from(len).unwrap() } else { 0 };
        let sector = if matches!(kind, T_IN | T_OUT) { first } else { 0 };
        self.asked[slot] = Some(Asked { kind, first, count, id, begin: tick() });
        self.queue.post_in_place(slot as u64, kind, sector, out, inward);
    }

    fn ended(&mut self, slot: usize, written: u32) {
        let end = tick();
        let a =
            self.asked[slot].take().unwrap_or_else(|| panic!("queue {}: {slot} answered twice", self.who));
        let len = a.count as usize * SECTOR;
        let want = if a.kind == T_IN { len + 1 } else { 1 };
        let status = self.queue.status(slot as u64);
        assert_eq!((status, written as usize), (0, want), "request {} of sector {}", a.kind, a.first);
        let what = |sector| match a.kind {
            T_OUT => What::Write(value(a.id, sector)),
            T_DISCARD => What::Discard,
            _ => What::Zero,
        };
        match a.kind {
            T_FLUSH => {}
            T_IN => {
                self.queue.data_into(slot as u64, &mut self.bytes[..len]);
                let at = (a.begin, end);
                self.torn += note_read(&mut self.log, self.who, at, a.first, &self.bytes[..len]);
            }
            _ => self.log.extend((a.first..a.first + a.count).map(|s| {
                let sector = u32::try_from(s).unwrap();
                Access { sector, who: self.who, begin: a.begin, end, what: what(s) }
            })),
        }
    }

    /// Reads the whole disk.
    pub fn sweep(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let piece = SLOT_DATA / SECTOR as u64;
        for first in (0..self.round.sectors).step_by(piece as usize) {
            let count = piece.min(self.round.sectors - first);
            let begin = tick();
            let head =
                self.queue.post_in_place(0, T_IN, first, &[], u32::try_from(count).unwrap() * SECTOR as u32);
            self.queue.kick();
            assert_eq!(self.queue.wait_for_signal(PATIENCE).map(|e| e.0), Some(head));
            assert_eq!(self.queue.status(0), 0);
            let bytes = &mut self.bytes[..count as usize * SECTOR];
            self.queue.data_into(0, bytes);
            self.torn += note_read(&mut self.log, NOBODY, (begin, tick()), first, bytes);
            all.extend_from_slice(bytes);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_sector_have_their_places() {
        let (mut sector, mut other) = ([0; SECTOR], [0; SECTOR]);
        assert_eq!(values(&sector), [0]);
        fill(&mut sector, value(3, 7));
        assert_eq!(values(&sector), [value(3, 7)]);
        sector.rotate_left(8);
        assert_eq!(values(&sector), [OUT_OF_PLACE]);
        sector.rotate_right(8);
        fill(&mut other, value(4, 7));
        sector[256..].copy_from_slice(&other[256..]);
        assert_eq!(values(&sector), [value(3, 7), value(4, 7)]);
        sector[..256].copy_from_slice(&other[256..]);
        assert_eq!(values(&sector), [OUT_OF_PLACE, value(4, 7)]);
        sector[..256].fill(0);
        assert_eq!(values(&sector), [0, value(4, 7)]);
    }
}
