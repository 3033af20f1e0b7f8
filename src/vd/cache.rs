//! Which blocks a cache image keeps, and who reads and fills them. The bytes of its file are `format/vci.rs`, its beginning
//! and end `cache_file.rs`, the copies `fills.rs`.
//!
//! A look-up takes no lock. A reader pins the place first and looks at its block again; whoever wants the place for another
//! block takes the block out first and looks at the pins then. One of the two sees the other.

use crate::format::vci::{Header, NO_BLOCK, Shape, WAYS};
use crate::io::{HostFile, ImageLock};
use crate::map::{Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset};
use crate::probe::sabotage::{Sabotage, is_broken};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// A cache image at work beneath the top image of a disk.
#[derive(Debug)]
pub(crate) struct Cache {
    /// Its file, and what engines call it.
    pub(super) file: Arc<dyn HostFile>,
    pub(super) id: FileId,
    pub(super) shape: Shape,
    /// What is written at the end if all goes well.
    pub(super) header: Header,
    scope: Scope,
    /// Whole blocks of the disk; what lies behind them is not cached.
    blocks: u64,
    places: Box<[Place]>,
    state: Mutex<State>,
    /// Nothing is looked up or kept any more.
    off: AtomicBool,
    counts: Counts,
    _lock: Option<ImageLock>,
}

/// Which images of a disk are cached: those that nobody writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scope {
    /// The uppermost of them.
    pub(crate) layer: usize,
    /// Its first file; all of those above have smaller numbers.
    pub(crate) file: FileId,
}

/// Where a block may lie.
#[derive(Debug)]
struct Place {
    block: AtomicU64,
    readers: AtomicU32,
    /// Read since the hand came by.
    touched: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// Blocks on their way, and the places kept for them, which show none.
    filling: HashMap<u64, u64>,
    /// Where the next search in a set begins.
    hand: u64,
}

#[derive(Debug, Default)]
struct Counts {
    hit_bytes: AtomicU64,
    missed_bytes: AtomicU64,
    filled: AtomicU64,
    replaced: AtomicU64,
}

/// What a cache image has been good for since its disk was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Bytes that were read from it.
    pub hit_bytes: u64,
    /// Bytes that came from the images it caches although it was there.
    pub missed_bytes: u64,
    /// Blocks copied into it.
    pub filled: u64,
    /// Blocks that had to go for others.
    pub replaced: u64,
    /// Blocks it holds now.
    pub kept: u64,
}

impl Cache {
    /// A cache with these blocks in its places, of a disk that has `disk_bytes` bytes.
    ///
    /// # Panics
    /// If there are not as many entries as places.
    pub(super) fn new(
        (file, id, lock): (Arc<dyn HostFile>, FileId, Option<ImageLock>),
        header: Header,
        scope: Scope,
        entries: Vec<u64>,
    ) -> Cache {
        let shape = header.shape;
        assert_eq!(entries.len() as u64, shape.places, "an entry for each place");
        let place = |block| Place {
            block: AtomicU64::new(block),
            readers: AtomicU32::new(0),
            touched: AtomicBool::new(false),
        };
        Cache {
            file,
            id,
            shape,
            header,
            scope,
            blocks: header.base.disk_bytes / shape.block_bytes,
            places: entries.into_iter().map(place).collect(),
            state: Mutex::default(),
            off: AtomicBool::new(false),
            counts: Counts::default(),
            _lock: lock,
        }
    }

    fn place(&self, n: u64) -> &Place {
        &self.places[usize::try_from(n).expect("limits::MAX_CACHE_PLACES")]
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("cache lock")
    }

    /// The places of a block's set. Neighbours lie in different sets and, in an empty cache, side by side.
    fn ways(&self, block: u64) -> impl Iterator<Item = u64> + use<> {
        let sets = self.shape.sets();
        (0..WAYS).map(move |way| way * sets + block % sets)
    }

    /// Looked at by whoever reads; the block that lies around an offset.
    pub(super) fn block_of(&self, at: GuestOffset) -> u64 {
        at.0 / self.shape.block_bytes
    }

    /// The bytes of a block.
    pub(super) fn range_of(&self, block: u64) -> GuestRange {
        let start = GuestOffset(block * self.shape.block_bytes);
        GuestRange::new(start, self.shape.block_bytes).expect("a block of the disk")
    }

    /// The extent lies in a file of the images that are cached. Zeros are had for nothing.
    pub(super) fn covers(&self, kind: ExtentKind) -> bool {
        match kind {
            ExtentKind::Data { file, .. } => file >= self.scope.file,
            ExtentKind::Packed { packed, .. } => packed.file >= self.scope.file,
            ExtentKind::Zero | ExtentKind::Parent => false,
        }
    }

    /// The uppermost image that is cached, by its place in the chain.
    pub(super) fn layer(&self) -> usize {
        self.scope.layer
    }

    /// Where the block's bytes lie, which stay there until [`Self::unpin`].
    pub(super) fn pin(&self, block: u64) -> Option<u64> {
        if self.is_off() {
            return None;
        }
        self.ways(block).find(|n| {
            let place = self.place(*n);
            if place.block.load(Ordering::Relaxed) != block {
                return false;
            }
            place.readers.fetch_add(1, Ordering::SeqCst);
            // Whoever takes the block out does so before he looks at the pins; see `evict`. Acquire: the block's bytes were
            // in the file before it was named here.
            if place.block.load(Ordering::SeqCst) != block {
                place.readers.fetch_sub(1, Ordering::SeqCst);
                return false;
            }
            if !place.touched.load(Ordering::Relaxed) {
                place.touched.store(true, Ordering::Relaxed);
            }
            true
        })
    }

    /// The end of one [`Self::pin`]: nothing reads there any more.
    pub(super) fn unpin(&self, place: u64) {
        let before = self.place(place).readers.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before > 0, "an unpin for each pin");
    }

    /// Where a place begins in the file.
    pub(crate) fn place_at(&self, place: u64) -> HostOffset {
        self.shape.place_at(place)
    }

    /// Keeps a place for a block that is about to be copied there; [`Self::filled`] must follow. `None`: it is there or on its
    /// way, no whole block of the disk, or all its places are being read.
    pub(super) fn begin_fill(&self, block: u64) -> Option<u64> {
        if self.is_off() || block >= self.blocks {
            return None;
        }
        let mut state = self.lock();
        let here = self.ways(block).any(|n| self.place(n).block.load(Ordering::Relaxed) == block);
        if here || state.filling.contains_key(&block) {
            return None;
        }
        let place = self.victim(&mut state, block)?;
        state.filling.insert(block, place);
        if is_broken(Sabotage::CachedBeforeData) {
            self.place(place).block.store(block, Ordering::SeqCst);
        }
        Some(place)
    }

    /// Under the lock: a place of the block's set that shows none from now on, an unused one first. Of the others goes one that
    /// was not read since the hand came by.
    fn victim(&self, state: &mut State, block: u64) -> Option<u64> {
        let is_kept = |state: &State, n: u64| state.filling.values().any(|p| *p == n);
        let is_empty = |n: &u64| self.place(*n).block.load(Ordering::Relaxed) == NO_BLOCK;
        if let Some(n) = self.ways(block).find(|n| is_empty(n) && !is_kept(state, *n)) {
            return Some(n);
        }
        for _ in 0..2 * WAYS {
            let way = state.hand % WAYS;
            state.hand = state.hand.wrapping_add(1);
            let n = way * self.shape.sets() + block % self.shape.sets();
            let spared = self.place(n).touched.swap(false, Ordering::Relaxed);
            if !spared && !is_kept(state, n) && self.evict(n) {
                self.counts.replaced.fetch_add(1, Ordering::Relaxed);
                return Some(n);
            }
        }
        None
    }

    /// Under the lock: takes the block out of its place, unless somebody reads there.
    fn evict(&self, n: u64) -> bool {
        let place = self.place(n);
        let block = place.block.swap(NO_BLOCK, Ordering::SeqCst);
        let is_read = place.readers.load(Ordering::SeqCst) > 0;
        if is_read {
            place.block.store(block, Ordering::SeqCst);
        }
        !is_read
    }

    /// The copy has ended. `good`: all of the block is in its place, and may be read from there.
    pub(super) fn filled(&self, block: u64, good: bool) {
        let mut state = self.lock();
        let n = state.filling.remove(&block).expect("a block on its way");
        let place = self.place(n);
        place.touched.store(false, Ordering::Relaxed);
        place.block.store(if good { block } else { NO_BLOCK }, Ordering::SeqCst);
        self.counts.filled.fetch_add(u64::from(good), Ordering::Relaxed);
    }

    /// Nothing is read from it any more.
    pub(super) fn is_off(&self) -> bool {
        self.off.load(Ordering::Relaxed)
    }

    /// Turns it off for the rest of the session: what it could give the base gives as well. True the first time.
    pub(super) fn turn_off(&self) -> bool {
        !self.off.swap(true, Ordering::SeqCst)
    }

    /// The blocks by place, with nothing on its way.
    pub(crate) fn entries(&self) -> impl Iterator<Item = u64> + '_ {
        self.places.iter().map(|p| p.block.load(Ordering::SeqCst))
    }

    /// Bytes that reads took from here, and from beneath.
    pub(super) fn count(&self, hit_bytes: u64, missed_bytes: u64) {
        self.counts.hit_bytes.fetch_add(hit_bytes, Ordering::Relaxed);
        self.counts.missed_bytes.fetch_add(missed_bytes, Ordering::Relaxed);
    }

    pub(super) fn counts(&self) -> CacheCounts {
        CacheCounts {
            hit_bytes: self.counts.hit_bytes.load(Ordering::Relaxed),
            missed_bytes: self.counts.missed_bytes.load(Ordering::Relaxed),
            filled: self.counts.filled.load(Ordering::Relaxed),
            replaced: self.counts.replaced.load(Ordering::Relaxed),
            kept: self.entries().filter(|b| *b != NO_BLOCK).count() as u64,
        }
    }

    /// Blocks on their way and pins: 0 at rest.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn held(&self) -> usize {
        let readers: u32 = self.places.iter().map(|p| p.readers.load(Ordering::SeqCst)).sum();
        self.lock().filling.len() + readers as usize
    }
}

impl Scope {
    /// The images that nobody writes in a chain of `layers`, whose files are as many as `files` says of each, top first; `None`
    /// where the only one is written.
    pub(crate) fn of(files: impl ExactSizeIterator<Item = usize>, read_only: bool) -> Option<Scope> {
        let layer = usize::from(!read_only);
        if layer >= files.len() {
            return None;
        }
        let before: usize = files.take(layer).sum();
        Some(Scope { layer, file: FileId(u16::try_from(before).expect("limits::MAX_FILES")) })
    }
}

/// A part of an extent, from `skip` on.
pub(super) fn part_of(e: Extent, skip: u64, len: u64) -> Extent {
    let kind = match e.kind {
        ExtentKind::Data { file, off } => ExtentKind::Data { file, off: off.plus(skip) },
        ExtentKind::Packed { packed, into } => {
            let skip = u32::try_from(skip).expect("limits::MAX_UNIT_BYTES");
            ExtentKind::Packed { packed, into: into + skip }
        }
        other => other,
    };
    Extent { len, kind }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::vci::Base;
    use crate::io::MemFile;

    fn cache(places: u64, blocks: u64) -> Cache {
        let shape = Shape { block_bytes: 4096, places };
        let base = Base { disk_bytes: blocks * 4096, ..Base::NONE };
        let header = Header { base, ..Header::new(shape) };
        let file = Arc::new(MemFile::new("cache", Vec::new()));
        let scope = Scope { layer: 0, file: FileId(0) };
        Cache::new((file, FileId(1), None), header, scope, vec![NO_BLOCK; places as usize])
    }

    /// Fills a block whatever else goes on; true if it was wanted.
    fn fill(c: &Cache, block: u64) -> Option<u64> {
        let place = c.begin_fill(block)?;
        c.filled(block, true);
        Some(place)
    }

    #[test]
    fn a_block_on_its_way_is_seen_by_nobody_and_kept_a_place_once() {
        let c = cache(8, 20);
        let place = c.begin_fill(3).unwrap();
        assert_eq!((c.pin(3), c.begin_fill(3), c.held()), (None, None, 1));
        assert_ne!(c.begin_fill(4), Some(place));
        c.filled(3, true);
        c.filled(4, false);
        assert_eq!((c.pin(3), c.pin(4), c.counts().kept), (Some(place), None, 1));
        c.unpin(place);
        assert_eq!((c.begin_fill(20), c.held()), (None, 0), "behind the last whole block");
    }

    #[test]
    fn what_is_read_stays_and_what_is_read_again_outlives_a_long_run() {
        let c = cache(8, 1000);
        let places: Vec<_> = (0..8).map(|b| fill(&c, b).unwrap()).collect();
        assert_eq!(c.pin(5), Some(places[5]));
        for b in 100..200 {
            fill(&c, b);
            // looked at between two comings of the hand
            c.pin(2).map(|p| c.unpin(p)).expect("a block in use");
        }
        assert!(c.pin(0).is_none() && c.counts().replaced == 100);
        c.unpin(places[5]);
        assert_eq!(c.pin(5), Some(places[5]), "nobody takes a place that is being read");
    }

    #[test]
    fn neighbours_lie_side_by_side_and_nothing_is_found_once_it_is_off() {
        let c = cache(64, 1000);
        assert_eq!((16..24).map(|b| fill(&c, b).unwrap()).collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
        let way = c.begin_fill(30).unwrap();
        assert!(c.turn_off() && !c.turn_off());
        c.filled(30, true);
        assert_eq!((c.pin(16), c.begin_fill(40), way), (None, None, 14));
    }

    /// Threads that read blocks while others take their places: what is read is always the block's.
    #[test]
    fn no_reader_meets_a_place_that_is_being_filled() {
        const BLOCKS: u64 = 24;
        let c = cache(8, BLOCKS);
        let bytes: Vec<_> = (0..8).map(|_| AtomicU64::new(u64::MAX)).collect();
        let reads = AtomicU64::new(0);
        let reader = |seed: u64| {
            let mut n = seed;
            for _ in 0..60_000 {
                n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed | 1);
                let block = (n >> 33) % BLOCKS;
                if let Some(place) = c.pin(block) {
                    let at = &bytes[place as usize];
                    let before = at.load(Ordering::Relaxed);
                    std::thread::yield_now(); // others have their chance to take the place
                    assert_eq!([before, at.load(Ordering::Relaxed)], [block; 2]);
                    reads.fetch_add(1, Ordering::Relaxed);
                    c.unpin(place);
                } else if let Some(place) = c.begin_fill(block) {
                    bytes[place as usize].store(u64::MAX, Ordering::Relaxed);
                    bytes[place as usize].store(block, Ordering::Relaxed);
                    c.filled(block, true);
                }
            }
        };
        let reader = &reader;
        std::thread::scope(|s| (1..5).for_each(|seed| drop(s.spawn(move || reader(seed)))));
        assert!(reads.load(Ordering::Relaxed) > 1000 && c.counts().replaced > 1000 && c.held() == 0);
    }
}
