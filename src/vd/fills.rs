//! Reads through a cache image, and the copies of blocks into it.
//!
//! What is not in the cache is read from beneath as if there were none, and wished for; the channel copies what was wished for
//! beside everything else, reading it once more, into memory of its own. So no request waits for a copy, none fails by
//! one, and a guest that changes its memory while it reads changes nothing else.

use super::Outcome;
use super::advance::Next;
use super::cache::{Cache, part_of};
use super::chain::Lack;
use super::channel::Channel;
use super::slot::{Job, Work};
use crate::error::Failure;
use crate::io::{BufSlice, IoKind, IoOp};
use crate::limits::{MAX_CACHE_FILLS, MAX_CACHE_PINS, MAX_CACHE_WISHES};
use crate::map::{Extent, ExtentKind, ExtentList, FileId, GuestRange};
use std::collections::VecDeque;

/// What a channel knows of its disk's cache image.
#[derive(Debug, Default)]
pub(super) struct Fills {
    wishes: VecDeque<u64>,
    /// Copies under way.
    running: u16,
    /// For look-ups.
    list: ExtentList,
    pins: Vec<u64>,
    hit_bytes: u64,
    missed_bytes: u64,
}

/// A block on its way into the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fill {
    block: u64,
    place: u64,
    /// Bytes of it that are in the buffer.
    done: u64,
    is_written: bool,
}

impl Fills {
    fn wish(&mut self, block: u64) {
        if self.wishes.len() < MAX_CACHE_WISHES && !self.wishes.contains(&block) {
            self.wishes.push_back(block);
        }
    }
}

impl Channel {
    /// A read of a disk with a cache, if it is one operation that ends at once.
    #[inline(never)]
    pub(super) fn read_cached_at_once(&mut self, range: GuestRange, bufs: &[BufSlice]) -> Option<Outcome> {
        self.extents.clear();
        self.disk.chain.map(range, &mut self.extents).ok()?;
        let mut extents = std::mem::take(&mut self.extents);
        let mut pins = std::mem::take(&mut self.fills.pins);
        self.through_cache(range, &mut extents, &mut pins);
        let outcome = self.read_extent_at_once(range, bufs, &extents);
        if let (Some(Ok(())), [e]) = (outcome, extents.as_slice()) {
            self.count_read(e.kind, e.len);
        }
        self.unpin(&mut pins);
        (self.extents, self.fills.pins) = (extents, pins);
        outcome
    }

    fn read_extent_at_once(
        &mut self,
        range: GuestRange,
        bufs: &[BufSlice],
        extents: &ExtentList,
    ) -> Option<Outcome> {
        let [e] = extents.as_slice() else { return None };
        let ExtentKind::Data { file, off } = e.kind else { return None };
        if e.len != range.len() {
            return None;
        }
        let moved = self.engine.try_now(&IoOp { kind: IoKind::Read, file, off, len: e.len }, bufs)?;
        (moved == Ok(e.len)).then_some(Ok(()))
    }

    /// Replaces those extents, the first of which begins with `range`, whose blocks are in the cache; their places are
    /// pinned, and go to `pins`. The others are wished for.
    pub(super) fn through_cache(&mut self, range: GuestRange, extents: &mut ExtentList, pins: &mut Vec<u64>) {
        let Some(cache) = self.disk.cache.as_deref().filter(|c| !c.is_off()) else { return };
        let fills = &mut self.fills;
        fills.list.clear();
        let mut rest = range;
        for e in extents.as_slice() {
            let taken = if cache.covers(e.kind) {
                blockwise(cache, rest.take(e.len), *e, pins, fills)
            } else {
                fills.list.push(*e)
            };
            if !taken {
                break; // the list is full
            }
            rest = rest.skip(e.len);
        }
        std::mem::swap(&mut fills.list, extents);
    }

    /// Nothing reads any more in the places of a slot.
    pub(super) fn unpin_slot(&mut self, slot: u16) {
        let mut pins = std::mem::take(&mut self.slot(slot).pins);
        self.unpin(&mut pins);
        self.slot(slot).pins = pins;
    }

    fn unpin(&mut self, pins: &mut Vec<u64>) {
        if let Some(cache) = &self.disk.cache {
            pins.drain(..).for_each(|place| cache.unpin(place));
        }
    }

    /// Bytes were read from there.
    pub(super) fn count_read(&mut self, from: ExtentKind, len: u64) {
        let Some(cache) = &self.disk.cache else { return };
        if matches!(from, ExtentKind::Data { file, .. } if file == cache.id) {
            self.fills.hit_bytes += len;
        } else if cache.covers(from) {
            self.fills.missed_bytes += len;
        }
    }

    /// What an operation that failed means for its slot: the cache's failures are nobody's. It is turned off, and a request
    /// reads again, from beneath.
    pub(super) fn blame_cache(&mut self, slot: u16, file: FileId, why: Failure) -> Result<(), Failure> {
        let Some(cache) = self.disk.cache.as_ref().filter(|c| c.id == file) else { return Err(why) };
        if cache.turn_off() {
            let path = cache.file.path().display();
            tracing::warn!("{path}: {why}: the disk does without this cache from now on");
        }
        let s = self.slot(slot);
        if s.job == Job::Fill {
            return Err(why);
        }
        s.again = true;
        Ok(())
    }

    /// Begins to copy what was wished for, as much at a time as is allowed.
    pub(super) fn start_fills(&mut self) {
        let Some(cache) = &self.disk.cache else { return };
        let (hits, missed) = (&mut self.fills.hit_bytes, &mut self.fills.missed_bytes);
        if *hits + *missed > 0 {
            cache.count(std::mem::take(hits), std::mem::take(missed));
        }
        // As many as may run, even if each of them ends at once: what else waits is as important.
        for _ in 0..MAX_CACHE_FILLS {
            if self.fills.running == MAX_CACHE_FILLS {
                return;
            }
            let Some(block) = self.fills.wishes.pop_front() else { return };
            let place = self.disk.cache.as_ref().and_then(|c| c.begin_fill(block));
            if let Some(place) = place {
                self.start_fill(Fill { block, place, done: 0, is_written: false });
            }
        }
        if self.fills.running == 0 && !self.fills.wishes.is_empty() {
            self.come_back(); // no end of a copy will lead here
        }
    }

    fn start_fill(&mut self, fill: Fill) {
        let slot = self.internal_slot();
        self.fills.running += 1;
        self.busy += 1;
        self.slot(slot).begin(Job::Fill, GuestRange::EMPTY, &[]);
        self.slot(slot).work = Work::Filling(fill);
        self.advance(slot);
    }

    /// Reads the block a piece at a time, writes it in one, and only then shows it.
    pub(super) fn step_filling(&mut self, slot: u16) -> Next {
        let Work::Filling(mut fill) = self.slot(slot).work else { unreachable!() };
        let disk = self.disk.clone();
        let cache = disk.cache.as_ref().expect("a copy into a cache");
        let failed = self.slot(slot).failure.is_some();
        if failed || fill.is_written {
            cache.filled(fill.block, !failed);
            self.fills.running -= 1;
            return Next::Finished;
        }
        if !self.take_buffer(slot) {
            return Next::Wait;
        }
        let range = cache.range_of(fill.block);
        if fill.done == range.len() {
            fill.is_written = true;
            self.slot(slot).work = Work::Filling(fill);
            let (file, off) = (cache.id, cache.place_at(fill.place));
            self.issue_buffer_bytes(slot, IoOp { kind: IoKind::Write, file, off, len: range.len() }, 0);
            return Next::Again;
        }
        match self.read_beneath(slot, cache, range.skip(fill.done), fill.done) {
            Ok(len) => {
                fill.done += len;
                self.slot(slot).work = Work::Filling(fill);
                Next::Again
            }
            Err(Lack::Page { layer, key }) => self.want_page(slot, (layer, key)),
            Err(Lack::Unit(packed)) => self.want_unit(slot, packed),
            Err(Lack::Failed(f)) => {
                self.slot(slot).failure = Some(f);
                Next::Again
            }
        }
    }

    /// What the cached images show from the start of `range` on, into the buffer from `at` on; how many bytes that is.
    fn read_beneath(&mut self, slot: u16, cache: &Cache, range: GuestRange, at: u64) -> Result<u64, Lack> {
        let mut extents = std::mem::take(&mut self.extents);
        let mapped = self.disk.chain.map_beneath(cache.layer(), range, &mut extents);
        let read = mapped.and_then(|()| self.extents_to_buffer(slot, &extents, at));
        self.extents = extents;
        read
    }
}

/// An extent, block by block, to the list: from the cache what is there. False: the list is full.
fn blockwise(cache: &Cache, part: GuestRange, e: Extent, pins: &mut Vec<u64>, fills: &mut Fills) -> bool {
    let mut rest = part;
    while !rest.is_empty() {
        let block = cache.block_of(rest.start());
        let whole = cache.range_of(block);
        let piece = rest.intersect(whole);
        let pinned = if pins.len() < MAX_CACHE_PINS { cache.pin(block) } else { None };
        let found = match pinned {
            Some(place) => {
                pins.push(place);
                let off = cache.place_at(place).plus(rest.start().since(whole.start()));
                Extent { len: piece.len(), kind: ExtentKind::Data { file: cache.id, off } }
            }
            None => {
                fills.wish(block);
                part_of(e, rest.start().since(part.start()), piece.len())
            }
        };
        if !fills.list.push(found) {
            return false;
        }
        rest = rest.skip(piece.len());
    }
    true
}
