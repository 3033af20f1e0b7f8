//! The bytes of an image of one file (VMDK, QED, QCOW): opened, mapped, changed, closed, checked, repaired.
//!
//! The case is the file itself. Some bytes near its start that readers ignore say what is done with it, four for each
//! request.

use super::Input;
use super::effort::Effort;
use super::sparse::{SparseFile, SteadyEngine};
use std::sync::Arc;
use std::time::Duration;
use vdblk::error::{Error, ErrorKind, Result};
use vdblk::format::{self, CheckReport, Format, ImageFile, OpenHow, open_single};
use vdblk::io::{BufSlice, HostFile, OsHost};
use vdblk::job::{RepairJob, Watch};
use vdblk::map::{ExtentKind, FileId, GuestOffset, GuestRange, Intent};
use vdblk::vd::{BlockDevice, Chain, Channel, Disk, DiskOptions, FileSource, Layer, Outcome, Request};

/// Longer cases are no cases.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// Where the bytes are that say what is done.
const SCRIPT: std::ops::Range<usize> = 448..512;
/// Bytes of the disk that are looked at, from each end.
const LOOK_BYTES: u64 = 256 << 10;
/// Bytes that are looked at at once.
const PIECE_BYTES: u64 = 32 << 10;
/// A first write to a unit writes all of it, and one may have 256 MiB: larger ones are not written to.
const MOST_UNIT_BYTES: u64 = 1 << 20;

/// Runs a case.
///
/// # Panics
/// Where a promise is broken.
pub(crate) fn vmdk(case: &[u8]) {
    run(Format::Vmdk, case);
}

/// The same of a QED or a QCOW, which the case says itself.
///
/// # Panics
/// Where a promise is broken.
pub(crate) fn levels(case: &[u8]) {
    let format = if case.starts_with(b"QFI") { Format::Qcow } else { Format::Qed };
    run(format, case);
}

fn run(format: Format, case: &[u8]) {
    if case.len() > MAX_BYTES {
        return;
    }
    let effort = Effort::begin();
    let served = judge_opening(format, case);
    effort.judge("opening and checking");
    if let Some(report) = served {
        serve(format, case, &report);
    }
    effort.judge("serving");
    repair(format, case);
    effort.judge("repairing");
}

fn check(format: Format, source: &dyn vdblk::map::ByteSource) -> Result<CheckReport> {
    let file = ImageFile { id: FileId(0), source };
    format::check(format, &[file]).map(|r| r.expect("something can be wrong"))
}

fn assert_refusal(e: &Error) {
    use ErrorKind::{Corrupt, Limit, NotThisFormat, Unsupported};
    let line = e.to_string();
    assert!(!line.is_empty() && !line.contains('\n'), "not one line: {line:?}");
    assert!(matches!(e.kind(), Corrupt | Limit | NotThisFormat | Unsupported), "{e:?}");
}

/// Opening in each way and checking agree with each other. The report, if the image can be served for writing.
fn judge_opening(format: Format, case: &[u8]) -> Option<CheckReport> {
    // what names further files is not for this target
    if format::references(format, &case).is_ok_and(|r| !r.is_empty()) {
        return None;
    }
    let open = |read_only, info_only| {
        let opened = open_single(format, &case, FileId(0), OpenHow { read_only, info_only });
        opened.inspect_err(assert_refusal)
    };
    let (write, read, info) = (open(false, false), open(true, false), open(true, true));
    let checked = check(format, &case).inspect_err(assert_refusal);
    assert!(write.is_err() || read.is_ok(), "can be written, but not read");
    assert_eq!(read.is_ok(), info.is_ok(), "what can be served can be told of");
    if let (Ok(a), Ok(b)) = (&read, &info) {
        assert_eq!(a.info(), b.info());
    }
    let map = write.ok()?;
    let report = checked.expect("what can be served can be checked");
    assert_eq!(report.corruptions, 0, "{report:?}");
    // whatever is mapped lies in the file, and where a request would write is no metadata
    let mut list = vdblk::map::ExtentList::new();
    let mut rest = GuestRange::between(GuestOffset(0), GuestOffset(map.limits().size_bytes.min(64 << 20)));
    while !rest.is_empty() {
        list.clear();
        match map.map(rest, Intent::Read, &mut list) {
            Ok(()) => {}
            Err(_) => break, // tables that large are paged
        }
        for e in list.as_slice() {
            if let ExtentKind::Data { off, .. } = e.kind {
                // the last sector may be there in part
                assert!(off.0 >= 512 && off.0 + e.len <= (case.len() as u64).next_multiple_of(512), "{e:?}");
            }
            rest = rest.skip(e.len);
        }
    }
    Some(report)
}

/// A part of the disk and its bytes, if they can be read.
type Piece = (GuestRange, Option<Vec<u8>>);

struct Served {
    channel: Channel,
    disk: Arc<Disk>,
    unit_bytes: u64,
}

impl Served {
    fn over(format: Format, file: &Arc<SparseFile>, read_only: bool) -> Result<Self> {
        let how = OpenHow { read_only, info_only: false };
        let map = open_single(format, &FileSource::new(&**file)?, FileId(0), how)?;
        let unit_bytes = map.limits().block_bytes;
        let hosts = vec![file.clone() as Arc<dyn HostFile>];
        let options = DiskOptions { read_only, ..DiskOptions::default() };
        let chain = Chain::new(vec![Layer { number: 0, map: map.into() }]);
        let no_failure = Box::new(|| panic!("no sync fails here"));
        let disk = Disk::new(chain, hosts, options, Arc::new(OsHost), no_failure);
        let channel = Channel::new(disk.clone(), Box::new(SteadyEngine::new(vec![file.clone()])), 1)?;
        Ok(Served { channel, disk, unit_bytes })
    }

    fn request(&mut self, request: Request, bytes: &mut [u8]) -> Outcome {
        // SAFETY: `bytes` outlives the request, which has ended when this returns, and nobody else uses it.
        let buf = unsafe { BufSlice::new(bytes.as_mut_ptr(), bytes.len()) };
        let bufs = if bytes.is_empty() { vec![] } else { vec![buf] };
        if let Some(outcome) = self.channel.submit(0, request, &bufs) {
            return outcome;
        }
        let mut done = Vec::new();
        for _ in 0..1_000_000 {
            self.channel.drive(Duration::ZERO, &mut done).unwrap();
            if let Some(d) = done.pop() {
                return d.outcome;
            }
        }
        panic!("{request:?} does not end");
    }

    /// What is looked at: both ends of the disk, in pieces. Those that cannot be read are `None`.
    fn look(&mut self) -> Vec<Piece> {
        let size = self.disk.size_bytes();
        let tail = size.saturating_sub(LOOK_BYTES) / 512 * 512;
        let ends = [(0, size.min(LOOK_BYTES)), (tail, size - tail)];
        let mut all = Vec::new();
        for mut rest in ends.map(|(start, len)| GuestRange::new(GuestOffset(start), len).unwrap()) {
            while !rest.is_empty() {
                let piece = rest.take(PIECE_BYTES);
                all.push((piece, self.bytes(piece)));
                rest = rest.skip(piece.len());
            }
        }
        all
    }

    fn bytes(&mut self, r: GuestRange) -> Option<Vec<u8>> {
        let mut bytes = vec![0xa5; r.len() as usize];
        self.request(Request::Read(r), &mut bytes).is_ok().then_some(bytes)
    }
}

/// Serves an image that opens, and closes it: what it shows is what it showed, with the requests over it.
fn serve(format: Format, case: &[u8], before: &CheckReport) {
    let file = SparseFile::new("case", case);
    let mut served = Served::over(format, &file, false).expect("an image that was opened before");
    let mut model = served.look();
    let size = served.disk.size_bytes();
    let small = served.unit_bytes <= MOST_UNIT_BYTES;
    let mut script = Input::new(&case[SCRIPT.start.min(case.len())..SCRIPT.end.min(case.len())]);
    let mut wrote = false;
    while small && size > 0 && !script.is_empty() {
        let (what, at) = (script.u8(), u64::from(script.u16()) * 512 % size);
        let len = (u64::from(script.u8() % 24 + 1) * 512).min(size - at);
        let range = GuestRange::new(GuestOffset(at), len).unwrap();
        let stamp = what | 1;
        let (request, mut bytes, value) = match what % 4 {
            0 => (Request::Flush, vec![], None),
            1 => (Request::WriteZeroes { range, unmap: what > 128 }, vec![], Some(0)),
            _ => (Request::Write(range), vec![stamp; len as usize], Some(stamp)),
        };
        let outcome = served.request(request, &mut bytes);
        wrote |= value.is_some_and(|v| v > 0);
        let Some(value) = value else {
            assert_eq!(outcome, Ok(()), "{request:?}");
            continue;
        };
        let touched = || model.iter().filter(|(r, _)| !r.intersect(range).is_empty());
        let unreadable = touched().any(|(_, known)| known.is_none());
        assert!(outcome.is_ok() || unreadable, "{request:?}: {outcome:?}");
        for (r, known) in model.iter_mut().filter(|(r, _)| !r.intersect(range).is_empty()) {
            let part = range.intersect(*r);
            let from = part.start().since(r.start()) as usize;
            match known {
                Some(known) if outcome.is_ok() => known[from..from + part.len() as usize].fill(value),
                // it may have got so far
                _ => *known = None,
            }
        }
    }
    assert_shown(&model, &served.look(), "while it is served");
    served.channel.close_disk(true).expect("a disk that took every request");
    drop(served);
    let after = check(format, &FileSource::new(&*file).unwrap()).unwrap();
    assert_eq!(after.corruptions, 0, "after a close: {after:?}");
    assert!(after.is_clean() || !(wrote && before.is_clean()), "after a clean close: {after:?}");
    let mut again = Served::over(format, &file, true).expect("an image that was closed");
    assert_shown(&model, &again.look(), "after a close");
}

/// What is known is shown. What could not be read before may be: some changes mend it.
fn assert_shown(known: &[Piece], shown: &[Piece], when: &str) {
    for ((r, known), (_, shown)) in known.iter().zip(shown) {
        assert!(known.is_none() || shown == known, "{when} it shows something else at {r:?}");
    }
}

fn repair_file(format: Format, file: &Arc<SparseFile>) -> Result<bool> {
    let source = FileSource::new(&**file)?;
    let plan = format::repair(format, &[ImageFile { id: FileId(0), source: &source }])?.expect("a plan");
    plan.lines.iter().for_each(|l| assert!(!l.is_empty() && !l.contains('\n'), "{l:?}"));
    let changes = !plan.steps.is_empty();
    let mut watch = Watch { cancelled: &|| false, progress: &mut |_| () };
    watch.run(&mut RepairJob::new(vec![&**file], plan.steps))?;
    Ok(changes)
}

/// A repair leaves an image clean that shows what it showed, or is refused with nothing changed.
fn repair(format: Format, case: &[u8]) {
    let file = SparseFile::new("case", case);
    let shown = Served::over(format, &file, true).ok().map(|mut s| s.look());
    match repair_file(format, &file) {
        Ok(_) => {}
        Err(e) => {
            assert_refusal(&e);
            let mut now = vec![0; case.len() + 1];
            assert_eq!(file.read_at(0, &mut now).unwrap(), case.len(), "{e}");
            assert!(now[..case.len()] == *case, "refused, and changed: {e}");
            return;
        }
    }
    let source = FileSource::new(&*file).unwrap();
    let after = check(format, &source).unwrap();
    assert_eq!(after.corruptions, 0, "after a repair: {after:?}");
    let Some(shown) = shown else { return };
    let mut served = Served::over(format, &file, true).expect("a repaired image opens");
    assert_shown(&shown, &served.look(), "after a repair");
}
