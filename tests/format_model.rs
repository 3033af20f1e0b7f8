//! VDI against a model: random changes, failures and power cuts at every step, on every form of image.

mod format_support;

use format_support::build::{Form, Spec};
use format_support::mini::{Fault, Medium, Mini, World, content_of};
use format_support::range_of;
use proptest::prelude::*;
use std::collections::BTreeSet;
use uuid::Uuid;
use vdblk::format::{FileStep, vdi};
use vdblk::map::GuestRange;

const SECTOR: usize = 512;

#[derive(Clone, Debug)]
enum Op {
    /// Sectors from .. with this tag in every byte; 0 writes zeros.
    Write(u64, u64, u8),
    /// The block around this sector becomes zeros.
    Zero(u64),
    Flush,
    /// Power cut: unsynced sectors survive or not.
    Crash(u64),
    /// The process is killed and another opens the image; the host lives, and nothing was synced.
    Kill,
    /// Clean close and open.
    Reopen,
    /// The next change fails at this step, its metadata written all the same or not.
    Fail(usize, bool),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        8 => (0..4096u64, 1..24u64, 0..7u8).prop_map(|(s, n, t)| Op::Write(s, n, t * 30)),
        2 => (0..4096u64).prop_map(Op::Zero),
        2 => Just(Op::Flush),
        1 => any::<u64>().prop_map(Op::Crash),
        1 => Just(Op::Kill),
        1 => Just(Op::Reopen),
        1 => (0..3usize, any::<bool>()).prop_map(|(s, w)| Op::Fail(s, w)),
    ];
    proptest::collection::vec(op, 1..30)
}

/// Images with blocks in random places, holes between them, and a tail.
fn specs() -> impl Strategy<Value = Spec> {
    let form = prop_oneof![Just(Form::V0), Just(Form::Old), Just(Form::New)];
    let kind = prop_oneof![3 => Just(1u32), 1 => Just(2), 1 => Just(3), 3 => Just(4)];
    let extra = prop_oneof![Just(0u64), Just(512), Just(64)];
    let gaps = (0..3u64, 0..3u64).prop_map(|(a, b)| (a * 40, b * 1000));
    let shape = (form, kind, 12..14u32, extra, gaps, 1..200u64);
    (shape, proptest::collection::vec(0..6u32, 0..40), any::<u64>(), 0..3u64, 0..3u32).prop_map(
        |((form, kind, shift, extra, gaps, sectors), picks, seed, slack, over)| {
            let (size, block) = (sectors * 512, 1u64 << shift);
            let mut s =
                Spec { form, kind, size, block, extra, gaps, entries: vec![], count: 0, slack: slack * 700 };
            s.entries = entries(kind, s.blocks() as u32, &picks, seed);
            let high = s.entries.iter().filter(|e| **e < u32::MAX - 1).max().map_or(0, |m| m + 1);
            s.count = if kind == 2 { s.blocks() as u32 } else { (high + over).min(s.blocks() as u32) };
            s
        },
    )
}

fn entries(kind: u32, blocks: u32, picks: &[u32], seed: u64) -> Vec<u32> {
    if kind == 2 {
        return (0..blocks).collect();
    }
    let mut rng = Rng(seed);
    let mut free: BTreeSet<u32> = (0..blocks).collect();
    let entry = |pick: &u32| match pick {
        0 | 1 => u32::MAX,
        2 => u32::MAX - 1,
        _ => {
            let near =
                free.iter().copied().nth((rng.next() % 3) as usize % free.len()).expect("a free place");
            free.remove(&near);
            near
        }
    };
    picks.iter().take(blocks as usize).map(entry).collect()
}

struct Rng(u64);

impl Rng {
    fn coin(&mut self) -> bool {
        self.next().is_multiple_of(2)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}

/// What the guest may find: the content as the process must show it, and per sector what a power cut may leave.
struct Model {
    now: Vec<u8>,
    allowed: Vec<BTreeSet<u8>>,
    /// Left by changes that failed: nobody knows, whatever is flushed.
    doubt: Vec<BTreeSet<u8>>,
}

impl Model {
    fn new(content: Vec<u8>) -> Self {
        let n = content.len() / SECTOR;
        let mut m =
            Model { now: content, allowed: vec![BTreeSet::new(); n], doubt: vec![BTreeSet::new(); n] };
        m.flush();
        m
    }

    fn flush(&mut self) {
        for (i, s) in self.allowed.iter_mut().enumerate() {
            *s = self.doubt[i].iter().copied().chain([self.now[i * SECTOR]]).collect();
        }
    }

    /// Before a change is tried: it may be found after a cut from now on.
    fn intend(&mut self, r: GuestRange, tag: u8) {
        for i in sectors(r) {
            self.allowed[i].insert(tag);
        }
    }

    fn done(&mut self, r: GuestRange, tag: u8) {
        self.now[r.start().0 as usize..r.end().0 as usize].fill(tag);
        sectors(r).for_each(|i| self.doubt[i].clear());
    }

    fn failed(&mut self, r: GuestRange, tag: u8) {
        for i in sectors(r) {
            self.doubt[i].insert(tag);
        }
    }

    /// Another process sees what the kernel has: all that was done, and of what failed the one or the other.
    fn killed(&mut self, content: Vec<u8>) {
        for (i, (now, was)) in content.chunks(SECTOR).zip(self.now.chunks(SECTOR)).enumerate() {
            assert!(now == was || self.doubt[i].contains(&now[0]), "sector {i} after a kill: {}", now[0]);
        }
        self.now = content;
    }

    fn assert_possible(&self, content: &[u8]) {
        for (i, sector) in content.chunks(SECTOR).enumerate() {
            let whole = sector.iter().all(|b| *b == sector[0]);
            assert!(
                whole && self.allowed[i].contains(&sector[0]),
                "sector {i}: {} of {:?}",
                sector[0],
                self.allowed[i]
            );
        }
    }
}

fn sectors(r: GuestRange) -> std::ops::Range<usize> {
    r.start().0 as usize / SECTOR..r.end().0 as usize / SECTOR
}

/// A power cut now, in several ways: the image opens, holds nothing it may not hold, and no program that
/// trusts the count would write over a block.
fn assert_survives(mini: &Mini, model: &Model, parent: &[u8], seed: u64) {
    for way in 0..4 {
        let mut rng = Rng(seed ^ way);
        let file = mini.medium.crash(|| match way {
            0 => true,
            1 => false,
            _ => rng.coin(),
        });
        model.assert_possible(&content_of(&file, parent));
        let report = vdi::check(&file).expect("a report");
        assert_eq!(report.corruptions, 0, "{report:?}");
    }
}

struct Run {
    mini: Mini,
    model: Model,
    parent: Vec<u8>,
    begun: bool,
    fault: Option<Fault>,
    seed: u64,
}

impl Run {
    fn start(spec: &Spec, parent: Vec<u8>, world: World) -> Self {
        let file = spec.build(|p| (p % 50) as u8 + 1);
        let mini = Mini::open(file, parent.clone(), world);
        let model = Model::new(mini.content());
        Run { mini, model, parent, begun: false, fault: None, seed: 7 }
    }

    /// Tries a change of one unit; `act` is told how to look at every step.
    fn change(
        &mut self,
        r: GuestRange,
        tag: u8,
        act: impl FnOnce(&mut Mini, Option<Fault>, &mut dyn FnMut(&Mini)) -> bool,
    ) {
        self.begin();
        self.model.intend(r, tag);
        self.seed += 1;
        let (fault, model, parent, seed) = (self.fault.take(), &self.model, &self.parent, self.seed);
        let ok = act(&mut self.mini, fault, &mut |m| assert_survives(m, model, parent, seed));
        let may_fail = fault.is_some() || self.mini.world.capacity < u64::MAX;
        assert!(ok || may_fail, "failed for no reason: {r} = {tag}");
        if ok {
            self.model.done(r, tag)
        } else {
            self.model.failed(r, tag)
        }
        assert!(self.mini.content() == self.model.now, "content differs after {r} = {tag} ({ok})");
    }

    fn begin(&mut self) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let plan = self.mini.map.begin(Uuid::from_u128(u128::from(self.seed)));
        self.run_whole(&plan);
    }

    fn run_whole(&mut self, plan: &vdblk::map::Plan) {
        let (model, parent, seed) = (&self.model, &self.parent, self.seed);
        let seen = &mut |m: &Mini| assert_survives(m, model, parent, seed);
        self.mini.run(plan, (GuestRange::EMPTY, &[]), None, seen).expect("no failure was asked for");
    }

    fn apply(&mut self, op: &Op) {
        let size = self.model.now.len() as u64;
        match *op {
            Op::Write(sector, n, tag) => {
                let start = sector * 512 % size;
                let mut rest = range_of(start, (n * 512).min(size - start));
                while !rest.is_empty() {
                    let part = rest.intersect(self.mini.map.unit(rest.start()));
                    let data = vec![tag; part.len() as usize];
                    self.change(part, tag, |m, fault, seen| m.write(part, &data, fault, seen).is_ok());
                    rest = rest.skip(part.len());
                }
            }
            Op::Zero(sector) => {
                let unit = self.mini.map.unit(range_of(sector * 512 % size, 0).start());
                self.change(unit, 0, |m, fault, seen| m.zero(unit, fault, seen).is_ok());
            }
            Op::Flush => {
                self.mini.medium.sync();
                self.model.flush();
            }
            Op::Crash(seed) => {
                let mut rng = Rng(seed);
                let file = self.mini.medium.crash(|| rng.coin());
                self.reopen(file);
            }
            Op::Kill => self.kill(),
            Op::Reopen => self.close_and_open(),
            Op::Fail(step, but_written) => self.fault = Some(Fault { step, but_written }),
        }
    }

    fn reopen(&mut self, file: Vec<u8>) {
        self.mini = Mini::open(file, self.parent.clone(), self.mini.world);
        let content = self.mini.content();
        self.model.assert_possible(&content);
        self.model = Model::new(content);
        self.begun = false;
    }

    fn kill(&mut self) {
        self.mini.open_again();
        self.model.killed(self.mini.content());
        self.begun = false;
    }

    fn close_and_open(&mut self) {
        let plan = self.mini.map.end();
        assert!(self.begun || plan.steps.is_empty(), "an image nobody changed was written: {plan:?}");
        self.run_whole(&plan);
        assert!(self.mini.content() == self.model.now, "content differs after the close");
        if self.begun {
            let report = vdi::check(&self.mini.medium.file).expect("a report");
            assert!(report.is_clean(), "{report:?}");
        }
        self.mini.medium.sync();
        let file = self.mini.medium.file.clone();
        assert!(content_of(&file, &self.parent) == self.model.now, "content differs after opening again");
        self.reopen(file);
    }
}

fn parent_of(spec: &Spec, sectors: u64) -> Vec<u8> {
    let sectors = if spec.kind >= 3 { sectors } else { 0 };
    (0..sectors).flat_map(|s| [if s % 9 < 4 { 0 } else { 200 + (s % 20) as u8 }; SECTOR]).collect()
}

fn check_run(spec: &Spec, parent: u64, world: World, ops: &[Op]) {
    let mut run = Run::start(spec, parent_of(spec, parent), world);
    ops.iter().for_each(|op| run.apply(op));
    run.close_and_open();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn content_survives_every_change_failure_and_power_cut(
        spec in specs(), parent in 0..220u64, clean in any::<bool>(), reverse in any::<bool>(), ops in ops(),
    ) {
        check_run(&spec, parent, World { capacity: u64::MAX, clean, reverse }, &ops);
    }

    /// A full disk fails the write and nothing else; free places inside the file are still used.
    #[test]
    fn a_full_disk_fails_the_write_alone(
        spec in specs(), parent in 0..220u64, more in 0..20_000u64, ops in ops(),
    ) {
        let capacity = spec.build(|_| 0).len() as u64 + more;
        check_run(&spec, parent, World { capacity, clean: true, reverse: false }, &ops);
    }

    /// Whatever the bytes are: an error or a map, a report or an error, never a panic; and what is repaired
    /// is clean and opens.
    #[test]
    fn broken_bytes_never_panic(
        spec in specs(), flips in proptest::collection::vec((any::<u32>(), any::<u8>()), 1..6), cut in any::<u16>(),
    ) {
        let mut file = spec.build(|p| p as u8);
        for (at, xor) in flips {
            let meta = spec.data_at() as usize;
            file[at as usize % meta] ^= xor;
        }
        if cut.is_multiple_of(4) {
            file.truncate(cut as usize * 7 % (file.len() + 1));
        }
        check_bytes(file);
    }

    /// Tables with wrong entries are repaired without changing a block that only one entry names.
    #[test]
    fn repair_loses_nothing(
        mut spec in specs(), wrong in proptest::collection::vec((0..40usize, 0..60u32), 0..6),
        count in 0..60u32, cuts in 0..9000u64,
    ) {
        for (i, place) in wrong {
            if let Some(e) = spec.entries.get_mut(i) {
                *e = place;
            }
        }
        spec.count = count;
        let places: Vec<_> = spec.entries.iter().filter(|e| **e < 60).copied().collect();
        let top = u64::from(places.iter().copied().max().unwrap_or(0));
        let mut file = spec.build(|p| p as u8 + 1);
        file.truncate(file.len() - (cuts.min(top * 300)) as usize);
        let before = file.clone();
        let repaired = check_bytes(file);
        if let Some(after) = repaired {
            assert_kept(&spec, &before, &after, |_| true);
            assert_repair_survives(&spec, &before);
        }
    }
}

/// Opens, checks and repairs; the repaired file if there was something to repair.
fn check_bytes(file: Vec<u8>) -> Option<Vec<u8>> {
    use vdblk::format::{Format, OpenHow, open_single};
    use vdblk::map::FileId;
    let opened = open_single(Format::Vdi, &file, FileId(0), OpenHow::default());
    let Ok(report) = vdi::check(&file) else {
        assert!(opened.is_err());
        return None;
    };
    assert!(opened.is_err() || report.unrepairable == 0, "{report:?}");
    let Ok(repair) = vdi::repair(&file) else {
        assert!(report.unrepairable > 0 && opened.is_err());
        return None;
    };
    let too_long = |s: &FileStep| matches!(s, FileStep::SetLen { to, .. } if to.0 > 8 << 20);
    if repair.steps.iter().any(too_long) {
        return None; // a sparse file on a disk, too much for memory
    }
    let mut medium = Medium::new(file);
    repair.steps.iter().for_each(|step| apply(&mut medium, step));
    let fixed = medium.file;
    let after = vdi::check(&fixed).expect("a report");
    assert!(after.is_clean(), "{after:?}\n{repair:?}");
    open_single(Format::Vdi, &fixed, FileId(0), OpenHow::default()).expect("repaired");
    assert!(vdi::repair(&fixed).expect("clean").steps.is_empty());
    Some(fixed)
}

fn apply(medium: &mut Medium, step: &FileStep) {
    match step {
        FileStep::Write { at, bytes, .. } => medium.write(*at, bytes.clone()),
        FileStep::Copy { from, to, len, .. } => medium.copy(*from, *to, *len),
        FileStep::SetLen { to, .. } => medium.set_len(*to),
        FileStep::Fill { .. } | FileStep::Reserve { .. } => unreachable!("no step of a repair"),
        FileStep::Sync { .. } => medium.sync(),
    }
}

/// A power cut at any moment of a repair leaves every block that one entry names as it was.
fn assert_repair_survives(spec: &Spec, before: &[u8]) {
    let names = |place: u32| spec.entries.iter().filter(|e| **e == place).count();
    let mut medium = Medium::new(before.to_vec());
    for (i, step) in vdi::repair(&before.to_vec()).expect("a plan").steps.iter().enumerate() {
        apply(&mut medium, step);
        let mut rng = Rng(i as u64);
        let file = medium.crash(|| rng.coin());
        assert_kept(spec, before, &file, |place| names(place) == 1);
    }
}

/// Every block whose place was inside the file and is one of `which` reads as before, zeros where the file had
/// been cut off. Looks at the table alone, for in the middle of a repair an image need not open.
fn assert_kept(spec: &Spec, before: &[u8], after: &[u8], which: impl Fn(u32) -> bool) {
    for (i, entry) in spec.entries.iter().enumerate() {
        let at = if *entry < 0xffff_fffe { spec.place_at(*entry) as usize } else { continue };
        if at >= before.len() || !which(*entry) {
            continue;
        }
        let len = spec.block.min(spec.size - i as u64 * spec.block) as usize;
        let was = padded(before, at, len);
        let raw = &after[spec.table_at() as usize + 4 * i..][..4];
        let now_at = spec.place_at(u32::from_le_bytes(raw.try_into().expect("4 bytes"))) as usize;
        assert!(padded(after, now_at, len) == was, "block {i} at place {entry}");
    }
}

fn padded(file: &[u8], at: usize, len: usize) -> Vec<u8> {
    let mut bytes = file[at.min(file.len())..file.len().min(at + len)].to_vec();
    bytes.resize(len, 0);
    bytes
}
