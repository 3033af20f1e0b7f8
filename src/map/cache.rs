//! Pages of tables that are too large to keep whole.
//!
//! A look-up takes no lock: each frame is guarded by a sequence number that is odd while the frame changes its page, and a
//! reader that met a change finds nothing, as if the page were not here. Pages go when others need their place,
//! the ones not looked at lately first, unless a plan that will change them has pinned them. Where the pinned ones fill every
//! place, pages lie beside them under a lock: slow, and never without end.

use crate::limits::{META_PAGE_BYTES, TABLE_CACHE_BYTES};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Mutex, OnceLock};

/// Frames among which a page can lie.
const WAYS: usize = 8;
/// Frames for each page, where memory allows.
const ROOM: u64 = 4;
/// The number of no page.
const NO_PAGE: u64 = u64::MAX;
/// Bytes of a word.
const WORD: usize = 8;

/// A bounded number of pages, by number. Their bytes are those of the file; who asks knows their order.
#[derive(Debug)]
pub struct PageCache {
    page_bytes: usize,
    sets: Box<[Set]>,
}

#[derive(Debug)]
struct Set {
    frames: [Frame; WAYS],
    /// [`SetState::beside`] is not empty: saves those who miss the lock.
    any_beside: AtomicBool,
    /// Taken by whoever changes a frame.
    state: Mutex<SetState>,
}

#[derive(Debug, Default)]
struct SetState {
    pins: [u32; WAYS],
    /// Where the search for a place goes on.
    hand: usize,
    /// Pages for which the pinned ones left no frame, oldest first.
    beside: Vec<Beside>,
}

/// A page without a frame.
#[derive(Debug)]
struct Beside {
    page: u64,
    pins: u32,
    words: Box<[AtomicU64]>,
}

#[derive(Debug)]
struct Frame {
    /// Odd while page and words change together.
    seq: AtomicU32,
    page: AtomicU64,
    /// Looked at since the hand came by.
    touched: AtomicBool,
    /// Made when the frame is used for the first time: small images stay small.
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Frame {
    fn new() -> Self {
        Frame {
            seq: AtomicU32::new(0),
            page: AtomicU64::new(NO_PAGE),
            touched: AtomicBool::new(false),
            words: OnceLock::new(),
        }
    }

    /// A word of `page`, if it is here for as long as the look takes.
    fn read(&self, page: u64, index: usize) -> Option<u64> {
        if self.page.load(Ordering::Relaxed) != page {
            return None;
        }
        let before = self.seq.load(Ordering::Acquire);
        if !before.is_multiple_of(2) || self.page.load(Ordering::Relaxed) != page {
            return None;
        }
        // Acquire: whoever sees a pointer sees what was written to its place before it was published.
        let word = self.words.get()?.get(index)?.load(Ordering::Acquire);
        // The words are read before the number is looked at again.
        fence(Ordering::Acquire);
        if self.seq.load(Ordering::Relaxed) != before {
            return None;
        }
        if !self.touched.load(Ordering::Relaxed) {
            self.touched.store(true, Ordering::Relaxed);
        }
        Some(word)
    }

    /// Under the set's lock.
    fn replace(&self, page: u64, bytes: &[u8]) {
        let words = self.words.get_or_init(|| words_of(bytes));
        let seq = self.seq.load(Ordering::Relaxed);
        self.seq.store(seq.wrapping_add(1), Ordering::Relaxed);
        // A reader that sees one of the words below sees the odd number as well.
        fence(Ordering::Release);
        self.page.store(page, Ordering::Relaxed);
        for (word, raw) in words.iter().zip(bytes.as_chunks::<WORD>().0) {
            word.store(u64::from_le_bytes(*raw), Ordering::Relaxed);
        }
        // Not touched: a long run over pages that are wanted once does not drive out those in use.
        self.touched.store(false, Ordering::Relaxed);
        self.seq.store(seq.wrapping_add(2), Ordering::Release);
    }
}

fn words_of(bytes: &[u8]) -> Box<[AtomicU64]> {
    bytes.as_chunks::<WORD>().0.iter().map(|raw| AtomicU64::new(u64::from_le_bytes(*raw))).collect()
}

impl Set {
    fn new() -> Self {
        Set {
            frames: std::array::from_fn(|_| Frame::new()),
            any_beside: AtomicBool::new(false),
            state: Mutex::default(),
        }
    }

    fn word(&self, page: u64, index: usize) -> Option<u64> {
        let framed = self.frames.iter().find_map(|f| f.read(page, index));
        if framed.is_some() || !self.any_beside.load(Ordering::Acquire) {
            return framed;
        }
        let state = self.lock();
        let words = self.words(&state, page)?;
        Some(words.get(index)?.load(Ordering::Acquire))
    }

    /// The page's words, wherever it is.
    fn words<'a>(&'a self, state: &'a SetState, page: u64) -> Option<&'a [AtomicU64]> {
        match self.find(page) {
            Some(i) => self.frames[i].words.get().map(|w| &**w),
            None => state.beside.iter().find(|b| b.page == page).map(|b| &*b.words),
        }
    }

    /// How often the page is pinned; `None` if it is not here.
    fn pins<'a>(&self, state: &'a mut SetState, page: u64) -> Option<&'a mut u32> {
        match self.find(page) {
            Some(i) => Some(&mut state.pins[i]),
            None => state.beside.iter_mut().find(|b| b.page == page).map(|b| &mut b.pins),
        }
    }

    /// Under the lock: puts a page that is not here where it can be found.
    fn take_in(&self, state: &mut SetState, page: u64, bytes: &[u8]) {
        if let Some(i) = state.victim(&self.frames) {
            return self.frames[i].replace(page, bytes);
        }
        let unpinned = state.beside.iter().filter(|b| b.pins == 0).count();
        if unpinned >= WAYS {
            let oldest = state.beside.iter().position(|b| b.pins == 0).expect("some are not pinned");
            state.beside.remove(oldest);
        }
        state.beside.push(Beside { page, pins: 0, words: words_of(bytes) });
        self.any_beside.store(true, Ordering::Release);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, SetState> {
        self.state.lock().expect("page cache lock")
    }

    /// Under the lock.
    fn find(&self, page: u64) -> Option<usize> {
        self.frames.iter().position(|f| f.page.load(Ordering::Relaxed) == page)
    }
}

impl SetState {
    /// A frame whose page may go: one without pins, not looked at since the hand came by last.
    fn victim(&mut self, frames: &[Frame; WAYS]) -> Option<usize> {
        for _ in 0..2 * WAYS {
            let i = self.hand;
            self.hand = (self.hand + 1) % WAYS;
            let spared = frames[i].touched.swap(false, Ordering::Relaxed);
            if self.pins[i] == 0 && !spared {
                return Some(i);
            }
        }
        // Readers may have touched all of them meanwhile.
        (0..WAYS).find(|i| self.pins[*i] == 0)
    }
}

impl PageCache {
    /// For second-level tables whose first level is kept whole and takes `first` bytes: together they have a bound, but pages
    /// a quarter of it at least.
    pub fn second_level(page_bytes: u64, pages: u64, first: u64) -> Self {
        let most = TABLE_CACHE_BYTES.saturating_sub(first).max(TABLE_CACHE_BYTES / 4);
        Self::new(page_bytes, pages, most)
    }

    /// A cache for `pages` pages of `page_bytes` bytes (a power of two from 512 to 4096), of which it keeps as many
    /// as `most_bytes` allow.
    ///
    /// # Panics
    /// With another size of a page.
    pub fn new(page_bytes: u64, pages: u64, most_bytes: u64) -> Self {
        assert!(page_bytes.is_power_of_two() && (512..=META_PAGE_BYTES).contains(&page_bytes), "page size");
        // Where all fit, they must not drive each other out of a few crowded sets. A frame takes memory once it is used.
        let most = (most_bytes / page_bytes).min(pages.max(1).saturating_mul(ROOM)).div_ceil(WAYS as u64);
        let sets = usize::try_from(most.max(1)).expect("bounded by memory");
        let page_bytes = usize::try_from(page_bytes).expect("at most META_PAGE_BYTES");
        PageCache { page_bytes, sets: (0..sets).map(|_| Set::new()).collect() }
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Spread by Fibonacci hashing: tables lie as far apart as the data between them, at distances that share factors with any number of
    /// sets.
    fn set(&self, page: u64) -> &Set {
        let spread = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let n = (spread * self.sets.len() as u64) >> 32;
        &self.sets[usize::try_from(n).expect("less than a length")]
    }

    fn word(&self, page: u64, index: usize) -> Option<u64> {
        self.set(page).word(page, index)
    }

    /// Bytes `8 * index ..` of the page; `None` if it is not here.
    pub fn bytes8(&self, page: u64, index: usize) -> Option<[u8; 8]> {
        self.word(page, index).map(u64::to_le_bytes)
    }

    /// Bytes `4 * index ..` of the page; `None` if it is not here.
    pub fn bytes4(&self, page: u64, index: usize) -> Option<[u8; 4]> {
        let [a, b, c, d, e, f, g, h] = self.word(page, index / 2)?.to_le_bytes();
        Some(if index.is_multiple_of(2) { [a, b, c, d] } else { [e, f, g, h] })
    }

    /// Takes a page in. If it is here already, it stays as it is: what is here may be newer than what was read.
    ///
    /// # Panics
    /// If `bytes` are not one page.
    pub fn insert(&self, page: u64, bytes: &[u8]) {
        assert!(bytes.len() == self.page_bytes && page != NO_PAGE, "one page");
        let set = self.set(page);
        let mut state = set.lock();
        if set.words(&state, page).is_none() {
            set.take_in(&mut state, page, bytes);
        }
    }

    /// The page is here. Unlike a look-up this is never wrong about it, and takes the lock.
    pub fn contains(&self, page: u64) -> bool {
        let set = self.set(page);
        let state = set.lock();
        set.words(&state, page).is_some()
    }

    /// Keeps the page here until [`Self::unpin`], so that it can be changed. False if it is not here.
    pub fn pin(&self, page: u64) -> bool {
        let set = self.set(page);
        let mut state = set.lock();
        let Some(pins) = set.pins(&mut state, page) else { return false };
        *pins = pins.checked_add(1).expect("fewer plans than that");
        true
    }

    /// The end of one [`Self::pin`].
    ///
    /// # Panics
    /// Without one.
    pub fn unpin(&self, page: u64) {
        let set = self.set(page);
        let mut state = set.lock();
        let pins = set.pins(&mut state, page).expect("a pinned page is here");
        *pins = pins.checked_sub(1).expect("an unpin for each pin");
    }

    fn update(&self, page: u64, index: usize, change: impl FnOnce([u8; 8]) -> [u8; 8]) {
        let set = self.set(page);
        let mut state = set.lock();
        assert!(set.pins(&mut state, page).is_some_and(|pins| *pins > 0), "only pinned pages are changed");
        let words = set.words(&state, page).expect("a pinned page is here");
        let old = words[index].load(Ordering::Relaxed).to_le_bytes();
        words[index].store(u64::from_le_bytes(change(old)), Ordering::Release);
    }

    /// Changes bytes `8 * index ..` of a pinned page.
    ///
    /// # Panics
    /// If it is not pinned.
    pub fn set8(&self, page: u64, index: usize, bytes: [u8; 8]) {
        self.update(page, index, |_| bytes);
    }

    /// Changes bytes `4 * index ..` of a pinned page.
    ///
    /// # Panics
    /// If it is not pinned.
    pub fn set4(&self, page: u64, index: usize, bytes: [u8; 4]) {
        self.update(page, index / 2, |mut word| {
            let at = index % 2 * 4;
            word[at..at + 4].copy_from_slice(&bytes);
            word
        });
    }

    /// Appends the page's bytes. False if it is not here.
    pub fn copy_to(&self, page: u64, out: &mut Vec<u8>) -> bool {
        let set = self.set(page);
        // The lock keeps the frame from being replaced, and whoever changes words from doing so half-way.
        let state = set.lock();
        let Some(words) = set.words(&state, page) else { return false };
        out.extend(words.iter().flat_map(|w| w.load(Ordering::Acquire).to_le_bytes()));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn page_of(word: u64) -> Vec<u8> {
        word.to_le_bytes().repeat(64)
    }

    #[test]
    fn bytes_keep_the_files_order() {
        let c = PageCache::new(512, 4, 1 << 20);
        let bytes: Vec<u8> = (0..512u32).map(|i| (i % 251) as u8).collect();
        assert_eq!(c.bytes8(3, 0), None);
        c.insert(3, &bytes);
        assert!(c.pin(3));
        assert_eq!(c.bytes8(3, 2), Some([16, 17, 18, 19, 20, 21, 22, 23]));
        assert_eq!(c.bytes4(3, 5), Some([20, 21, 22, 23]));
        c.set4(3, 5, [1, 2, 3, 4]);
        c.set4(3, 4, [9, 9, 9, 9]);
        assert_eq!(c.bytes8(3, 2), Some([9, 9, 9, 9, 1, 2, 3, 4]));
        c.set8(3, 0, [7; 8]);
        let mut out = Vec::new();
        assert!(c.copy_to(3, &mut out) && !c.copy_to(2, &mut out));
        assert_eq!(
            (out.len(), &out[..9], &out[16..25]),
            (512, &[7, 7, 7, 7, 7, 7, 7, 7, 8][..], &[9, 9, 9, 9, 1, 2, 3, 4, 24][..])
        );
        assert_eq!(c.bytes8(3, 64), None, "behind the page");
    }

    #[test]
    fn what_is_here_is_not_replaced_by_what_was_read_before() {
        let c = PageCache::new(512, 1, 512);
        c.insert(0, &page_of(1));
        assert!(c.pin(0));
        c.set8(0, 0, 2u64.to_le_bytes());
        c.insert(0, &page_of(1));
        assert_eq!(c.bytes8(0, 0), Some(2u64.to_le_bytes()));
    }

    #[test]
    fn pinned_pages_stay_and_the_others_go() {
        let c = PageCache::new(512, 1000, 8 * 512);
        for p in 0..20 {
            c.insert(p, &page_of(p));
            assert!(c.pin(p));
        }
        for p in 100..200 {
            c.insert(p, &page_of(p));
            assert_eq!(c.bytes8(p, 0), Some(p.to_le_bytes()), "whoever missed it finds it");
        }
        assert!((0..20).all(|p| c.bytes8(p, 0) == Some(p.to_le_bytes())));
        assert!((100..200).filter(|p| c.bytes8(*p, 0).is_some()).count() <= 8, "bounded");
        c.set8(15, 3, [7; 8]);
        assert_eq!(c.bytes8(15, 3), Some([7; 8]));
        c.unpin(5);
        c.insert(300, &page_of(300));
        assert_eq!((c.bytes8(5, 0), c.bytes8(300, 0)), (None, Some(300u64.to_le_bytes())));
    }

    /// Pages at any distance from each other stay, if there is memory for them all.
    #[test]
    fn all_pages_stay_where_there_is_room() {
        for distance in [1, 2, 7, 8, 64, 512, 513, 4096, 8193] {
            for pages in [5, 32, 100, 1000] {
                let c = PageCache::new(512, pages, 1 << 30);
                let all = || (0..pages).map(|n| 3 + n * distance);
                all().for_each(|p| c.insert(p, &page_of(p)));
                let gone = all().filter(|p| c.bytes8(*p, 0).is_none()).count();
                assert_eq!(gone, 0, "of {pages} pages at a distance of {distance}");
            }
        }
    }

    #[test]
    fn pages_looked_at_are_kept() {
        let c = PageCache::new(512, 1000, 8 * 512);
        (0..8).for_each(|p| c.insert(p, &page_of(p)));
        let mut kept = 0;
        for p in 8..200 {
            kept += u32::from(c.bytes8(0, 0).is_some());
            c.insert(p, &page_of(p));
        }
        assert!(kept > 150, "a page in use went {} times out of 192", 192 - kept);
    }

    #[test]
    #[should_panic(expected = "only pinned pages are changed")]
    fn a_page_that_could_go_is_not_changed() {
        let c = PageCache::new(512, 1, 512);
        c.insert(0, &page_of(1));
        c.set8(0, 0, [0; 8]);
    }

    proptest! {
        /// Whatever is found is what was put there last; what is pinned is found.
        #[test]
        fn behaves_like_a_map_that_forgets(
            ops in proptest::collection::vec((0u8..5, 0u64..40), 1..600),
            frames in 1u64..32,
        ) {
            let c = PageCache::new(512, 40, frames * 512);
            // what the file holds, and how often a page is pinned
            let mut file: BTreeMap<u64, u64> = (0..40).map(|p| (p, p * 3)).collect();
            let mut pins: BTreeMap<u64, u32> = BTreeMap::new();
            for (n, (op, page)) in (1000u64..).zip(ops) {
                match op {
                    0 => if let Some(found) = c.bytes8(page, 7) {
                        prop_assert_eq!(u64::from_le_bytes(found), file[&page]);
                    },
                    1 => { c.insert(page, &page_of(file[&page])); }
                    2 => if c.pin(page) { *pins.entry(page).or_default() += 1; },
                    3 => if pins.get(&page).is_some_and(|n| *n > 0) {
                        (0..64).for_each(|i| c.set8(page, i, n.to_le_bytes()));
                        file.insert(page, n);
                    },
                    _ => if let Some(n) = pins.get_mut(&page).filter(|n| **n > 0) {
                        *n -= 1;
                        c.unpin(page);
                    },
                }
                for (p, _) in pins.iter().filter(|(_, n)| **n > 0) {
                    prop_assert_eq!(c.bytes8(*p, 63), Some(file[p].to_le_bytes()));
                }
            }
        }
    }

    /// Readers beside replacements and changes: a word found is always one its page has had.
    #[test]
    fn readers_never_see_another_pages_words() {
        const HITS: u32 = 20_000;
        let c = PageCache::new(512, 64, 16 * 512);
        let reading = AtomicU32::new(2);
        let step = |n: &mut u64| {
            *n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*n >> 58, usize::try_from(*n >> 20 & 63).expect("6 bits"))
        };
        std::thread::scope(|s| {
            for mut n in 0..2u64 {
                let (c, reading) = (&c, &reading);
                s.spawn(move || {
                    let mut hits = 0;
                    while hits < HITS {
                        let (page, index) = step(&mut n);
                        if let Some(w) = c.bytes8(page, index) {
                            assert_eq!(u64::from_le_bytes(w) & 63, page);
                            hits += 1;
                        }
                    }
                    reading.fetch_sub(1, Ordering::Relaxed);
                });
            }
            let (mut n, mut round) = (7u64, 0u64);
            while reading.load(Ordering::Relaxed) > 0 {
                let (page, index) = step(&mut n);
                round += 1;
                c.insert(page, &page_of(round << 6 | page));
                assert!(c.pin(page), "nobody else inserts");
                c.set8(page, index, (round << 6 | page).to_le_bytes());
                c.unpin(page);
            }
        });
    }
}
