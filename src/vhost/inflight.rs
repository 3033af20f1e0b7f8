//! What is in flight, in memory that outlives us: the region of VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, for split rings.
//!
//! The front-end keeps the region while we are away. Who comes back after a crash finds there which requests had been
//! taken and not answered, and in which order. The layout is the specification's (`QueueRegionSplit`):
//!
//! | bytes | header of a queue | bytes | one per descriptor |
//! |---|---|---|---|
//! | 8 | `features`, 0 | 1 | `inflight` |
//! | 2 | `version`: 1, 0 before the first use | 5 | padding |
//! | 2 | `desc_num` | 2 | `next`, in the list of the last batch |
//! | 2 | `last_batch_head` | 8 | `counter` |
//! | 2 | `used_idx` | | |
//!
//! Each half of 8 bytes is written by one store, and every store is a release: what is in the region at any moment is
//! what the program had written up to some point of its order. That is all a crash of the process asks for; nobody reads
//! the region while we live.
//!
//! A request is marked before it is started. A batch of answers becomes visible in the order: link the heads through `next`
//! and set `last_batch_head`; the ring's own index; clear the marks; `used_idx`. Who comes back and finds the ring's
//! index ahead of `used_idx` knows that the last batch was visible and its marks are not to be believed.

use super::shared::SharedFile;
use crate::limits;
use crate::probe::sabotage::{Sabotage, is_broken};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The version of the layout.
const VERSION: u16 = 1;
/// Words of a queue's header, and of one descriptor's entry.
const HEADER_WORDS: usize = 2;
const ENTRY_WORDS: usize = 2;
/// Regions of queues start at a cache line.
const ALIGN_WORDS: usize = 8;
const WORD_BYTES: usize = 8;
/// Why a region that was shortened is of no use.
pub(super) const GONE: &str = "its file was shortened";

/// The second word of a header. Numbers are in the host's order, as the specification's C structure has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    version: u16,
    desc_num: u16,
    last_batch_head: u16,
    used_idx: u16,
}

impl Header {
    fn decode(word: u64) -> Self {
        let [v0, v1, d0, d1, h0, h1, u0, u1] = word.to_ne_bytes();
        Header {
            version: u16::from_ne_bytes([v0, v1]),
            desc_num: u16::from_ne_bytes([d0, d1]),
            last_batch_head: u16::from_ne_bytes([h0, h1]),
            used_idx: u16::from_ne_bytes([u0, u1]),
        }
    }

    fn encode(self) -> u64 {
        let [v0, v1] = self.version.to_ne_bytes();
        let [d0, d1] = self.desc_num.to_ne_bytes();
        let [h0, h1] = self.last_batch_head.to_ne_bytes();
        let [u0, u1] = self.used_idx.to_ne_bytes();
        u64::from_ne_bytes([v0, v1, d0, d1, h0, h1, u0, u1])
    }
}

/// The first word of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    in_flight: bool,
    next: u16,
}

impl Mark {
    fn decode(word: u64) -> Self {
        let [in_flight, _, _, _, _, _, n0, n1] = word.to_ne_bytes();
        Mark { in_flight: in_flight != 0, next: u16::from_ne_bytes([n0, n1]) }
    }

    fn encode(self) -> u64 {
        let [n0, n1] = self.next.to_ne_bytes();
        u64::from_ne_bytes([u8::from(self.in_flight), 0, 0, 0, 0, 0, n0, n1])
    }
}

/// The region of a device, as one front-end keeps it.
#[derive(Debug)]
pub struct InflightRegion {
    shared: SharedFile,
    num_queues: u16,
    queue_size: u16,
}

/// Words that a queue's part takes.
fn queue_words(queue_size: u16) -> usize {
    (HEADER_WORDS + ENTRY_WORDS * usize::from(queue_size)).next_multiple_of(ALIGN_WORDS)
}

/// Bytes of a region; an error if a front-end asks for queues that cannot be.
fn region_bytes(num_queues: u16, queue_size: u16) -> io::Result<u64> {
    let possible =
        (1..=limits::MAX_QUEUES).contains(&num_queues) && (1..=limits::MAX_QUEUE_SIZE).contains(&queue_size);
    if !possible {
        let what = format!("nothing can be in flight in {num_queues} queues of {queue_size} entries");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let words = queue_words(queue_size) * usize::from(num_queues);
    u64::try_from(words * WORD_BYTES).map_err(io::Error::other)
}

impl InflightRegion {
    /// A new region, unused, and its size.
    ///
    /// # Errors
    /// If there can be no such queues; from the operating system.
    pub fn create(num_queues: u16, queue_size: u16) -> io::Result<(u64, File)> {
        let bytes = region_bytes(num_queues, queue_size)?;
        Ok((bytes, SharedFile::create(c"vdblk-inflight", bytes)?))
    }

    /// Takes a region up that lies at `offset` of `file` and is said to be `bytes` long.
    ///
    /// # Errors
    /// If it is shorter than such queues need, by what is said or by what the file has.
    pub fn open(file: File, offset: u64, bytes: u64, num_queues: u16, queue_size: u16) -> io::Result<Self> {
        let needed = region_bytes(num_queues, queue_size)?;
        if bytes < needed {
            let what = format!("{bytes} bytes do not hold what is in flight; {needed} are needed");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let shared = SharedFile::map(file, offset, needed)?;
        Ok(InflightRegion { shared, num_queues, queue_size })
    }

    /// A queue's part; `None` if the region has none for it.
    pub fn tracker(self: &Arc<Self>, queue: u16) -> Option<Tracker> {
        (queue < self.num_queues).then(|| Tracker {
            region: Arc::clone(self),
            first: queue_words(self.queue_size) * usize::from(queue),
            counter: 0,
            header: Header { version: 0, desc_num: 0, last_batch_head: 0, used_idx: 0 },
            batch: Vec::with_capacity(usize::from(limits::PUBLISH_COMPLETIONS[1])),
        })
    }
}

/// What a region and its ring say about each other cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contradiction(pub &'static str);

/// What is in flight on one queue. One thread uses it.
#[derive(Debug)]
pub struct Tracker {
    region: Arc<InflightRegion>,
    /// The queue's first word.
    first: usize,
    /// Of the next request.
    counter: u64,
    /// What we have written: never read back.
    header: Header,
    /// Heads answered and not visible yet.
    batch: Vec<u16>,
}

impl Tracker {
    /// The front-end has taken a part of the region away: nobody will know what is noted there.
    pub(super) fn is_lost(&self) -> bool {
        self.region.shared.is_lost()
    }

    fn word(&self, n: usize) -> &AtomicU64 {
        &self.region.shared.words()[self.first + n]
    }

    fn mark(&self, head: u16) -> &AtomicU64 {
        self.word(HEADER_WORDS + ENTRY_WORDS * usize::from(head))
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        self.word(HEADER_WORDS + ENTRY_WORDS * usize::from(head) + 1)
    }

    fn heads(&self) -> impl Iterator<Item = u16> + use<> {
        0..self.region.queue_size
    }

    fn put_header(&self) {
        self.word(1).store(self.header.encode(), Ordering::Release);
    }

    /// Takes the queue's part up where the last user left it, for a ring of `ring_size` entries whose used index is
    /// `ring_used`. Returns the heads to execute again, in order; `None` if the part had not been in use.
    ///
    /// # Errors
    /// If region and ring contradict each other. Nothing may then be taken from the ring.
    pub fn resume(&mut self, ring_size: u16, ring_used: u16) -> Result<Option<Vec<u16>>, Contradiction> {
        if ring_size > self.region.queue_size {
            return Err(Contradiction("the ring has more entries than the region"));
        }
        let found = Header::decode(self.word(1).load(Ordering::Acquire));
        self.header = Header {
            version: VERSION,
            desc_num: self.region.queue_size,
            last_batch_head: 0,
            used_idx: ring_used,
        };
        self.batch.clear();
        self.counter = 0;
        if self.is_lost() {
            // a region of zeros says that nothing was ever in flight
            return Err(Contradiction(GONE));
        }
        if found.version == 0 {
            self.clear_all();
            self.put_header();
            return Ok(None);
        }
        if found.version != VERSION || self.word(0).load(Ordering::Relaxed) != 0 {
            return Err(Contradiction("the region's layout is not known"));
        }
        if found.desc_num != self.region.queue_size {
            return Err(Contradiction("the region is that of another queue"));
        }
        let heads = self.in_flight(&found, ring_size, ring_used)?;
        if self.is_lost() {
            return Err(Contradiction(GONE));
        }
        // the last batch is known by now; the header forgets it before anything new can be linked
        self.put_header();
        Ok(Some(heads))
    }

    fn clear_all(&self) {
        self.word(0).store(0, Ordering::Release);
        let none = Mark { in_flight: false, next: 0 };
        self.heads().for_each(|h| self.mark(h).store(none.encode(), Ordering::Release));
    }

    /// Clears the marks of a batch that had become visible, and returns the heads of the others by age.
    fn in_flight(
        &mut self,
        found: &Header,
        ring_size: u16,
        ring_used: u16,
    ) -> Result<Vec<u16>, Contradiction> {
        let marked = |t: &Self| -> Vec<u16> {
            t.heads().filter(|h| Mark::decode(t.mark(*h).load(Ordering::Relaxed)).in_flight).collect()
        };
        if marked(self).is_empty() {
            // ended in order, and the ring may be another one since
            return Ok(Vec::new());
        }
        self.clear_last_batch(found, ring_used.wrapping_sub(found.used_idx))?;
        let heads = marked(self);
        if heads.iter().any(|h| *h >= ring_size) {
            return Err(Contradiction("something is in flight that the ring has no place for"));
        }
        // counters are copied once: whoever shares the region cannot make the order change while it is sorted
        let mut aged: Vec<(u64, u16)> =
            heads.iter().map(|h| (self.counter_of(*h).load(Ordering::Relaxed), *h)).collect();
        aged.sort_unstable();
        self.counter = aged.last().map_or(0, |(c, _)| c.wrapping_add(1));
        Ok(aged.into_iter().map(|(_, h)| h).collect())
    }

    /// `len` entries of the list from `last_batch_head` on were visible when the last user ended.
    fn clear_last_batch(&self, found: &Header, len: u16) -> Result<(), Contradiction> {
        if len > self.region.queue_size {
            return Err(Contradiction("the ring's used index is not one the region has been at"));
        }
        let mut head = found.last_batch_head;
        // as many steps as there were answers: a loop in the list cannot hold us up
        for _ in 0..len {
            if head >= self.region.queue_size {
                return Err(Contradiction("the list of the last batch leads out of the region"));
            }
            let mark = Mark::decode(self.mark(head).load(Ordering::Relaxed));
            self.mark(head).store(Mark { in_flight: false, ..mark }.encode(), Ordering::Release);
            head = mark.next;
        }
        Ok(())
    }

    /// A chain was taken and is about to be started.
    pub fn begin(&mut self, head: u16) {
        if is_broken(Sabotage::UnmarkedChain) {
            return;
        }
        self.counter_of(head).store(self.counter, Ordering::Release);
        self.mark(head).store(Mark { in_flight: true, next: 0 }.encode(), Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// A chain was answered; the driver cannot see it yet.
    pub fn answered(&mut self, head: u16) {
        if is_broken(Sabotage::ClearedTooEarly) {
            self.mark(head).store(0, Ordering::Release);
            return;
        }
        self.batch.push(head);
    }

    /// The answers are about to become visible.
    pub fn before_publish(&mut self) {
        for i in 0..self.batch.len() {
            let head = self.batch[i];
            let next = self.header.last_batch_head;
            self.mark(head).store(Mark { in_flight: true, next }.encode(), Ordering::Release);
            self.header.last_batch_head = head;
        }
        self.put_header();
    }

    /// They are visible: the ring's used index is `used` now.
    pub fn after_publish(&mut self, used: u16) {
        // the list's links stay until `used_idx` says that it is done with
        for i in 0..self.batch.len() {
            let next = i.checked_sub(1).map_or(0, |before| self.batch[before]);
            let in_flight = is_broken(Sabotage::MarkKept);
            self.mark(self.batch[i]).store(Mark { in_flight, next }.encode(), Ordering::Release);
        }
        self.batch.clear();
        self.header.used_idx = used;
        self.put_header();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const QUEUES: u16 = 3;
    const SIZE: u16 = 16;

    fn region() -> (u64, File, Arc<InflightRegion>) {
        let (bytes, file) = InflightRegion::create(QUEUES, SIZE).unwrap();
        let region = open(&file, bytes).unwrap();
        (bytes, file, region)
    }

    fn open(file: &File, bytes: u64) -> io::Result<Arc<InflightRegion>> {
        InflightRegion::open(file.try_clone().unwrap(), 0, bytes, QUEUES, SIZE).map(Arc::new)
    }

    fn fresh(region: &Arc<InflightRegion>) -> Tracker {
        let mut t = region.tracker(1).unwrap();
        assert_eq!(t.resume(SIZE, 7), Ok(None));
        t
    }

    /// Overwrites bytes of the second queue's part.
    fn put(region: &InflightRegion, at: usize, data: &[u8]) {
        let from = queue_words(SIZE) * WORD_BYTES + at;
        for (place, b) in region.shared.bytes()[from..].iter().zip(data) {
            place.store(*b, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_layout_is_the_specifications() {
        let (bytes, _file, region) = region();
        assert_eq!(bytes, 3 * 320);
        let mut t = fresh(&region);
        t.begin(2);
        t.begin(5);
        t.answered(2);
        t.before_publish();
        let part = || -> Vec<u8> {
            region.shared.bytes()[320..640].iter().map(|b| b.load(Ordering::SeqCst)).collect()
        };
        let p = part();
        assert_eq!(p[..16], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 16, 0, 2, 0, 7, 0]);
        assert_eq!(p[48..64], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(p[96..112], [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        t.after_publish(8);
        assert_eq!((part()[48], part()[96], &part()[8..16]), (0, 1, &[1, 0, 16, 0, 2, 0, 8, 0][..]));
    }

    #[test]
    fn numbers_of_the_front_end_are_checked() {
        for (queues, size) in [(0, 16), (65, 16), (1, 0), (1, 1025), (u16::MAX, u16::MAX)] {
            assert!(InflightRegion::create(queues, size).is_err(), "{queues} × {size}");
        }
        let (bytes, file, region) = region();
        assert!(open(&file, bytes - 1).is_err());
        assert!(open(&file, u64::MAX).is_ok());
        let more = InflightRegion::open(file.try_clone().unwrap(), 0, u64::MAX, QUEUES, SIZE * 2);
        assert!(more.unwrap_err().to_string().contains("in a file of"));
        assert!(region.tracker(3).is_none());
        let mut t = region.tracker(0).unwrap();
        assert!(t.resume(SIZE * 2, 0).is_err());
    }

    #[test]
    fn a_region_that_contradicts_itself_is_refused() {
        /// Where, and what is written there.
        type Change = (usize, &'static [u8]);
        let cases: [(&[Change], bool); 8] = [
            // version, features, desc_num
            (&[(8, &[2])], false),
            (&[(0, &[1])], false),
            (&[(10, &[15])], false),
            // the list's head out of the region, and an entry's next
            (&[(12, &[16]), (14, &[6])], false),
            (&[(12, &[2]), (14, &[5]), (54, &[0xff, 0xff])], false),
            // used_idx further back than there are entries
            (&[(14, &[200])], false),
            // a loop in the list
            (&[(12, &[2]), (14, &[1]), (54, &[2, 0])], true),
            (&[], true),
        ];
        for (changes, good) in cases {
            let (_, _file, region) = region();
            let mut t = fresh(&region);
            t.begin(2);
            t.begin(3);
            changes.iter().for_each(|(at, data)| put(&region, *at, data));
            let mut again = region.tracker(1).unwrap();
            assert_eq!(again.resume(SIZE, 7).is_ok(), good, "{changes:?}");
        }
        let (_, _file, region) = region();
        fresh(&region).begin(12);
        assert!(region.tracker(1).unwrap().resume(8, 7).is_err(), "no such head in a ring of 8");
        // nothing is in flight: another ring may have been set up since
        let mut t = region.tracker(1).unwrap();
        put(&region, 16 + 12 * 16, &[0]);
        assert_eq!(t.resume(8, 40_000), Ok(Some(Vec::new())));
    }

    /// Where in a batch's publication the process ends.
    #[derive(Clone, Copy, Debug)]
    enum End {
        BeforeLinks,
        BeforeIndex,
        BeforeClear,
        /// After some of the marks were cleared.
        Within(usize),
        After,
    }

    fn ends() -> impl Strategy<Value = End> {
        prop_oneof![
            Just(End::BeforeLinks),
            Just(End::BeforeIndex),
            Just(End::BeforeClear),
            (0usize..16).prop_map(End::Within),
            Just(End::After)
        ]
    }

    proptest! {
        /// Against a model: who comes back finds exactly what was taken and is not visible as answered, oldest first.
        #[test]
        fn nothing_is_lost_or_found_twice(
            lives in prop::collection::vec((prop::collection::vec((any::<bool>(), 0u16..SIZE), 0..60), ends()), 1..6),
            start: u16,
        ) {
            let (_, _file, region) = region();
            let mut used = start;
            // taken and not visibly answered, by age
            let mut model: Vec<u16> = Vec::new();
            for (life, (steps, end)) in lives.into_iter().enumerate() {
                let mut t = region.tracker(1).unwrap();
                let found = t.resume(SIZE, used).unwrap();
                prop_assert_eq!(found, (life > 0).then(|| model.clone()));
                let mut batch: Vec<u16> = Vec::new();
                for (take, head) in steps {
                    let busy = model.contains(&head);
                    if take && !busy {
                        t.begin(head);
                        model.push(head);
                    } else if !take && busy && !batch.contains(&head) {
                        t.answered(head);
                        batch.push(head);
                    }
                    if batch.len() == 5 {
                        t.before_publish();
                        used = used.wrapping_add(5);
                        t.after_publish(used);
                        model.retain(|h| !batch.contains(h));
                        batch.clear();
                    }
                }
                if matches!(end, End::BeforeLinks) {
                    continue;
                }
                t.before_publish();
                if matches!(end, End::BeforeIndex) {
                    continue;
                }
                used = used.wrapping_add(u16::try_from(batch.len()).unwrap());
                model.retain(|h| !batch.contains(h));
                match end {
                    End::Within(n) => {
                        for h in batch.iter().take(n) {
                            let mark = Mark::decode(t.mark(*h).load(Ordering::Relaxed));
                            t.mark(*h).store(Mark { in_flight: false, ..mark }.encode(), Ordering::Relaxed);
                        }
                    }
                    End::After => t.after_publish(used),
                    _ => {}
                }
            }
        }
    }
}
