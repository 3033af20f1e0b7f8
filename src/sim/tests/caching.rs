//! Cache images in simulation: sessions that end in order, are killed or cut off anywhere, failing operations. No read shows a
//! wrong byte, no failure of the cache is a request's, and at no moment does its file hold what the next session must not trust.

use crate::io::IoKind;
use crate::map::{FileId, GuestOffset, GuestRange};
use crate::sim::{
    CacheFile, Failing, Fault, Faults, Images, Kind, Landing, Left, Rng, Sabotage, Shape, Through, Trace,
    World, sabotage,
};
use crate::vd::{CacheCounts, DiskOptions, Request};

/// States looked at for each moment at which the power could go.
const STATES: u32 = 4;

/// A diff over one or two parents with a cache that is too small for them.
struct Setting {
    images: Images,
    cache: CacheFile,
    beneath: Vec<u8>,
    left: Option<Left>,
    /// How the last session ended.
    last: End,
    rng: Rng,
    /// What the caches of all sessions have done.
    seen: CacheCounts,
    /// Sessions that began with something.
    kept: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Close,
    Kill,
    PowerCut,
}

impl Setting {
    fn new(seed: u64) -> Setting {
        let mut rng = Rng(seed);
        let kinds = [Kind::DiffDiscard, Kind::Diff, Kind::Qcow2Diff, Kind::VmdkZeroed];
        let kind = kinds[rng.index(kinds.len())];
        let size = (256 << 10) + rng.below(8) * 512;
        let shape = Shape { kind, size, block: 4096 << rng.below(3) };
        let (mut images, past) = Images::with_parents(shape, 1 + rng.index(2), &mut rng);
        let cache = CacheFile::new(size, 8 * (1 + rng.below(3)));
        cache.file.keep_cuts();
        images.cache = Some(cache.clone());
        let beneath = images.beneath().expect("parents that open");
        let (left, seen) = (Some(Left::new(past)), CacheCounts::default());
        Setting { images, cache, beneath, left, last: End::Close, rng, seen, kept: 0 }
    }

    /// Reads of single blocks and of several, more than all else.
    fn load(&mut self, w: &mut World, rounds: u64) {
        let blocks = self.images.shape.size / 4096;
        for _ in 0..rounds {
            w.steps(2);
            for _ in 0..3 {
                let n = 1 + self.rng.below(4);
                // often the same few
                let among = if self.rng.chance(60) { 20 } else { blocks - n };
                let r = GuestRange::new(GuestOffset(self.rng.below(among) * 4096), n * 4096).unwrap();
                let queue = self.rng.index(w.queues());
                if !w.life.is_dead() {
                    w.post(queue, Request::Read(r), 0);
                    w.poll(queue);
                }
            }
        }
    }

    /// One process; what is wrong then.
    fn session(&mut self, faults: &Faults, end: End, may_die: bool) -> Option<String> {
        let setup = (DiskOptions::default(), faults.clone(), Trace::default());
        let left = self.left.take().expect("what the last one left");
        let seed = self.rng.draw();
        let mut w = World::after(&self.images, setup, left, Through::Channels, seed)
            .unwrap_or_else(|e| panic!("does not open: {e}"));
        let begun = w.disk.cache_counts().unwrap_or_default();
        self.kept += u32::from(begun.kept > 0);
        if self.last != End::Close {
            w.look_again(self.last == End::PowerCut);
        }
        self.last = end;
        if may_die {
            let events = self.rng.below(600);
            w.life.die_after(Some(events));
        }
        w.landing = Landing::EACH[self.rng.index(3)];
        let rounds = 10 + self.rng.below(40);
        self.load(&mut w, rounds);
        let ended = if end == End::Close && !w.life.is_dead() { w.close().err() } else { None };
        let died = w.life.is_dead();
        let counts = w.disk.cache_counts().unwrap_or_default();
        self.seen.hit_bytes += counts.hit_bytes;
        self.seen.filled += counts.filled;
        self.seen.replaced += counts.replaced;
        let mut wrong = w.wrong.take().or_else(|| ended.filter(|_| !died).map(|e| format!("close: {e}")));
        if let Some(f) = w.failures.first() {
            wrong.get_or_insert(format!("a request failed: {f:?}"));
        }
        let gone = (self.images.top.cut_now(), self.cache.file.cut_now());
        w.kill();
        wrong = wrong.or_else(|| w.wrong.take());
        let left = w.afterwards(end == End::PowerCut);
        if end == End::PowerCut {
            self.images.top.restart_with(gone.0.random_state(&mut self.rng));
            self.cache.file.restart_with(gone.1.random_state(&mut self.rng));
        }
        self.left = Some(left);
        wrong.or_else(|| self.judge())
    }

    fn judge(&mut self) -> Option<String> {
        let Setting { images, cache, beneath, rng, .. } = self;
        let now = cache.wrong(cache.file.bytes(), images, beneath);
        now.or_else(|| cache.wrong_after_cuts(images, beneath, STATES, rng))
    }

    /// Several processes, one after the other.
    fn life(&mut self) -> Option<String> {
        (0..5).find_map(|_| {
            let ends = [End::Close, End::Close, End::Kill, End::PowerCut];
            let end = ends[self.rng.index(ends.len())];
            let may_die = end == End::Kill;
            self.session(&Faults::default(), end, may_die).map(|what| format!("{end:?}: {what}"))
        })
    }
}

#[test]
fn no_end_of_a_process_leaves_a_wrong_byte_in_a_cache() {
    let (mut kept, mut seen) = (0, CacheCounts::default());
    for seed in 0..150 {
        let mut s = Setting::new(seed);
        assert_eq!(s.life(), None, "seed {seed}");
        kept += s.kept;
        seen.hit_bytes += s.seen.hit_bytes;
        seen.replaced += s.seen.replaced;
    }
    assert!(
        kept > 50 && seen.hit_bytes > 1 << 20 && seen.replaced > 1000,
        "{kept} {seen:?}: too little to prove"
    );
}

#[test]
fn no_failing_operation_of_a_cache_is_a_requests() {
    let hows = [
        Failing::Error(libc::EIO),
        Failing::Error(libc::ENOSPC),
        Failing::ErrorAfterEffect(libc::EIO),
        Failing::Short,
        Failing::Interrupted,
    ];
    let mut off = 0;
    for (seed, how) in (0..).zip(hows) {
        for k in 0..40 {
            for kind in [IoKind::Read, IoKind::Write] {
                let mut s = Setting::new(seed);
                assert_eq!(s.session(&Faults::default(), End::Close, false), None);
                let file = FileId(u16::try_from(s.images.files().len()).unwrap());
                let faults = Faults::default();
                faults.add(Fault { file, sticky: k % 2 == 1, ..Fault::of(&[kind], k / 2, how) });
                let name = format!("seed {seed}, {how:?} at {kind:?} {k}");
                assert_eq!(s.session(&faults, End::Close, false), None, "{name}");
                off += usize::from(!faults.hits().is_empty());
                assert_eq!(s.session(&Faults::default(), End::Close, false), None, "{name}, opened again");
            }
        }
    }
    assert!(off > 200, "{off} faults: too little to prove");
}

#[test]
fn a_cache_that_cannot_begin_or_end_its_session_is_done_without() {
    for seed in 0..10 {
        let mut s = Setting::new(seed);
        assert_eq!(s.session(&Faults::default(), End::Close, false), None);
        s.cache.file.fail_direct_syncs(true);
        assert_eq!(s.session(&Faults::default(), End::Close, false), None, "seed {seed}");
        s.cache.file.fail_direct_syncs(false);
        assert_eq!(s.session(&Faults::default(), End::Close, false), None, "seed {seed}");
    }
}

#[test]
fn broken_rules_of_caches_are_noticed() {
    for what in Sabotage::CACHE {
        sabotage(Some(what));
        let noticed = (0..200).find_map(|seed| Setting::new(seed).life());
        sabotage(None);
        let noticed = noticed.unwrap_or_else(|| panic!("nobody notices {what:?}"));
        let shows = noticed.contains(" reads ") || noticed.contains("holds other bytes");
        assert!(shows, "{what:?} shows as: {noticed}");
    }
}
