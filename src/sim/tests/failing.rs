//! Failing disks: a fault at operation k of a scripted workload, for every k. Exactly the requests it hits fail, nothing
//! is forgotten, nothing hangs, the image opens afterwards, and what was flushed is there.

use crate::error::Failure;
use crate::io::{IoKind, IoOp};
use crate::map::{FileId, GuestOffset, GuestRange};
use crate::sim::{
    DATA, Failing, Fault, Faults, Images, Judge, Kind, Past, Rng, Shape, Through, Trace, World,
};
use crate::vd::{DiskOptions, Request};

const SIZE: u64 = (64 << 10) - 512;

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len).unwrap()
}

/// Every kind of request, on all sorts of blocks.
fn script() -> Vec<Request> {
    let zeros = |start, len, unmap| Request::WriteZeroes { range: range(start, len), unmap };
    vec![
        Request::Write(range(0, 4096)),
        Request::Write(range(8192 + 512, 1024)),
        Request::Flush,
        Request::Read(range(0, 16384)),
        Request::Write(range(512, 512)),
        zeros(4096, 4096, true),
        zeros(512, 1024, false),
        Request::Discard(range(8192, 4096)),
        Request::Discard(range(16384, 4096)),
        Request::Write(range(20480, 12288)),
        Request::Flush,
        Request::Write(range(4096, 4096)),
        Request::Write(range(SIZE - 2048, 2048)),
        zeros(20480, 12288, true),
        Request::Read(range(0, SIZE)),
        Request::Flush,
        Request::Write(range(40960, 4096)),
    ]
}

/// Its failure leaves nothing to go on with.
fn is_sync(kind: IoKind) -> bool {
    matches!(kind, IoKind::Sync | IoKind::WriteThrough)
}

/// A request and the operations that were hit while it ran.
struct Ran {
    request: Option<Request>,
    hits: Vec<(IoOp, bool)>,
    outcome: Result<(), Failure>,
}

struct Case<'a> {
    disk: &'a (Images, Vec<Past>),
    seed: u64,
    name: String,
}

impl Case<'_> {
    fn world(&self, images: &Images, faults: &Faults, past: Vec<Past>) -> World {
        let setup = (DiskOptions::default(), faults.clone(), Trace::default());
        World::new(images, setup, past, self.seed).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// Runs the script and the close; what each request met.
    fn run(&self, images: &Images, faults: &Faults) -> (World, Vec<Ran>) {
        let mut w = self.world(images, faults, self.disk.1.clone());
        w.judge_with(Judge::new(2, 2, self.seed));
        let mut ran = Vec::new();
        for (value, request) in (1000..).zip(script()) {
            let before = faults.hits_and_inline().len();
            let outcome = w.finish(request, value);
            ran.push(Ran {
                request: Some(request),
                hits: faults.hits_and_inline()[before..].to_vec(),
                outcome,
            });
        }
        let before = faults.hits_and_inline().len();
        let outcome = w.close().map_err(|_| Failure::Os(libc::EIO));
        ran.push(Ran { request: None, hits: faults.hits_and_inline()[before..].to_vec(), outcome });
        (w, ran)
    }

    fn check(&self, fault: Fault) {
        let images = self.disk.0.copy();
        let faults = Faults::default();
        let how = fault.how;
        let sticky = fault.sticky;
        faults.add(fault);
        let (mut w, ran) = self.run(&images, &faults);
        let harmless = matches!(how, Failing::Short | Failing::Interrupted);
        let mut sync_failed = false;
        for r in &ran {
            let own = |(op, inline): &(IoOp, bool)| (sticky || !inline) && self.belongs_to_request(op);
            let must_fail = !harmless && r.hits.iter().any(own);
            // A block without a place keeps its place for good once its entry is in doubt: a small image can run out.
            let may_fail = !harmless && (!r.hits.is_empty() || sync_failed || sticky);
            let what = || format!("{}: {:?}: {:?} after {:?}", self.name, r.request, r.outcome, r.hits);
            assert!(r.outcome.is_err() || !must_fail, "swallowed: {}", what());
            assert!(r.outcome.is_ok() || may_fail, "failed without a reason: {}", what());
            let reads = matches!(r.request, Some(Request::Read(_)));
            assert!(
                !(sync_failed && r.outcome.is_ok() && !reads),
                "went on behind a failed sync: {}",
                what()
            );
            sync_failed |= !harmless && r.hits.iter().any(|(op, _)| is_sync(op.kind));
        }
        assert_eq!(w.wrong.take(), None, "{}", self.name);
        assert_eq!(w.judge.take().unwrap().violation, None, "{}", self.name);
        self.open_again(&images, w, sync_failed);
    }

    /// The operation moves the guest's bytes: nobody else can answer for it.
    fn belongs_to_request(&self, op: &IoOp) -> bool {
        let data = match self.disk.0.shape.kind {
            Kind::Raw => true,
            // a bitmap before each block, and the footer where the next bitmap would be
            Kind::Vhd => (op.off.0 - 2048.min(op.off.0)) % 4608 >= 512,
            Kind::VhdDiff => (op.off.0 - 2560.min(op.off.0)) % 4608 >= 512,
            Kind::Parallels | Kind::ParallelsDiff => op.off.0 >= 4096,
            // one table and its copy before grains of 4 KiB
            Kind::Vmdk | Kind::VmdkDiff | Kind::VmdkZeroed => op.off.0 >= 16 << 10,
            Kind::Vhdx | Kind::VhdxDiff => op.off.0 >= 4 << 20,
            // tables lie between the data, and the offset does not tell
            Kind::Qcow2 | Kind::Qcow2Diff | Kind::Qcow | Kind::QcowDiff => false,
            Kind::Qed | Kind::QedDiff | Kind::VmdkBare | Kind::VmdkSplit => false,
            _ => op.off.0 >= DATA,
        };
        let moves = matches!(op.kind, IoKind::Read | IoKind::Write | IoKind::Punch | IoKind::ZeroRange);
        moves && op.file.0 == 0 && data
    }

    fn open_again(&self, images: &Images, mut w: World, cut: bool) {
        let power_gone = images.top.cut_now();
        w.kill();
        let left = w.afterwards(cut);
        if cut {
            images.top.restart_with(power_gone.random_state(&mut Rng(self.seed)));
        }
        let setup = (DiskOptions::default(), Faults::default(), Trace::default());
        let mut w = World::after(images, setup, left, Through::Channels, self.seed)
            .unwrap_or_else(|e| panic!("{}: {e}", self.name));
        w.look_again(cut);
        w.steps(30);
        w.close().unwrap_or_else(|e| panic!("{}: {e}", self.name));
        assert_eq!(w.wrong.take(), None, "{}: opened again", self.name);
        assert!(w.failures.is_empty(), "{}: opened again: {:?}", self.name, w.failures);
    }
}

fn every_fault(kind: Kind) {
    let mut cases = 0;
    let shape = Shape { kind, size: SIZE, block: 4096 };
    let disk = Images::new(shape, &mut Rng(3));
    let hows = [
        Failing::Error(libc::EIO),
        Failing::Error(libc::ENOSPC),
        Failing::Error(libc::EDQUOT),
        Failing::ErrorAfterEffect(libc::EIO),
        Failing::Short,
        Failing::Interrupted,
    ];
    for seed in 0..2 {
        let case = |name| Case { disk: &disk, seed, name };
        let clean = Faults::default();
        case(format!("{kind:?} {seed} without faults")).run(&disk.0.copy(), &clean);
        // the first of a split image's files has only the descriptor
        let file = FileId(u16::from(kind == Kind::VmdkSplit));
        let operations = clean.seen(file);
        assert!(operations > 10, "{operations}");
        for how in hows {
            for sticky in [false, true] {
                for k in 0..operations {
                    let fault = Fault { file, sticky, ..Fault::of(&[], k, how) };
                    case(format!("{kind:?} seed {seed}, {how:?} at {k}, sticky {sticky}")).check(fault);
                    cases += 1;
                }
            }
        }
        for k in 0..20 {
            let parent = Fault { file: FileId(1), ..Fault::of(&[IoKind::Read], k, hows[0]) };
            case(format!("{kind:?} seed {seed}, read {k} of the parent")).check(parent);
            let syncs = [IoKind::Sync, IoKind::WriteThrough];
            let fault = Fault { file, ..Fault::of(&syncs, k, Failing::Error(libc::EIO)) };
            case(format!("{kind:?} seed {seed}, failing fsync {k}")).check(fault);
            cases += 2;
        }
    }
    println!("{}: {cases} faults", kind.name());
}

#[test]
fn every_operation_may_fail_raw() {
    every_fault(Kind::Raw);
}

#[test]
fn every_operation_may_fail_vdi() {
    every_fault(Kind::Vdi);
}

#[test]
fn every_operation_may_fail_vmdk() {
    every_fault(Kind::Vmdk);
}

#[test]
fn every_operation_may_fail_vmdk_diff() {
    every_fault(Kind::VmdkZeroed);
}

#[test]
fn every_operation_may_fail_vmdk_bare() {
    every_fault(Kind::VmdkBare);
}

#[test]
fn every_operation_may_fail_vmdk_split() {
    every_fault(Kind::VmdkSplit);
}

#[test]
fn every_operation_may_fail_diff() {
    every_fault(Kind::DiffDiscard);
}

#[test]
fn every_operation_of_a_vhd_fails_once() {
    every_fault(Kind::Vhd);
}

#[test]
fn every_operation_of_a_vhd_diff_fails_once() {
    every_fault(Kind::VhdDiff);
}

#[test]
fn every_operation_of_a_parallels_image_fails_once() {
    every_fault(Kind::Parallels);
    every_fault(Kind::ParallelsDiff);
}

#[test]
fn every_operation_may_fail_qcow2() {
    every_fault(Kind::Qcow2);
}

#[test]
fn every_operation_may_fail_qcow2_diff() {
    every_fault(Kind::Qcow2Diff);
}

#[test]
fn every_operation_may_fail_vhdx() {
    every_fault(Kind::Vhdx);
}

#[test]
fn every_operation_may_fail_vhdx_diff() {
    every_fault(Kind::VhdxDiff);
}

#[test]
fn every_operation_may_fail_qed() {
    every_fault(Kind::Qed);
    every_fault(Kind::QedDiff);
}

#[test]
fn every_operation_may_fail_qcow() {
    every_fault(Kind::Qcow);
    every_fault(Kind::QcowDiff);
}

/// Where flushes are ignored (VirtualBox's IGNORE_FLUSH, `--cache unsafe`) no sync reaches the files: not for a flush, a first write, a discard, the plan of a
/// format, or the close.
#[test]
fn ignored_flushes_sync_nothing() {
    for kind in [Kind::Raw, Kind::DiffDiscard, Kind::Vhd, Kind::Qcow2] {
        let (images, past) = Images::new(Shape { kind, size: SIZE, block: 4096 }, &mut Rng(1));
        let synced = |skip_syncs| {
            let (images, faults) = (images.copy(), Faults::default());
            let counted = Fault::of(&[IoKind::Sync, IoKind::WriteThrough], 0, Failing::Interrupted);
            faults.add(Fault { sticky: true, ..counted });
            let options = DiskOptions { skip_syncs, ..DiskOptions::default() };
            let mut w =
                World::new(&images, (options, faults.clone(), Trace::default()), past.clone(), 1).unwrap();
            for (value, request) in (1000..).zip(script()) {
                w.finish(request, value).unwrap();
            }
            w.close().unwrap();
            faults.hits().into_iter().filter(|op| is_sync(op.kind)).count()
        };
        assert_eq!(synced(true), 0, "{kind:?}");
        assert!(synced(false) >= 3, "{kind:?}: a sync for each flush, at least");
    }
}
