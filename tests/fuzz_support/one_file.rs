//! The bytes of an image of one file, of any format but VDI: opened, mapped, changed, closed, checked, repaired.
//!
//! The case is the file, and what is done with it, four bytes for each request: behind the file, or in bytes near its start that readers
//! of the format ignore.

use super::Input;
use super::effort::Effort;
use super::sparse::{SparseFile, SteadyEngine};
use std::sync::Arc;
use std::time::Duration;
use vdblk::error::{Error, ErrorKind, Result};
use vdblk::format::{self, CheckReport, Format, ImageFile, OpenHow, open_single};
use vdblk::io::{BufSlice, HostFile, OsHost};
use vdblk::job::{StepsJob, Watch};
use vdblk::map::{ByteSource, ExtentKind, FileId, GuestOffset, GuestRange, ImageInfo, ImageMap, Intent};
use vdblk::vd::{BlockDevice, Chain, Channel, Disk, DiskOptions, FileSource, Layer, Outcome, Request};

/// Longer cases are no cases.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// Where the bytes are that say what is done, in files whose readers ignore them.
const SCRIPT: std::ops::Range<usize> = 448..512;
/// So many behind the others.
const SCRIPT_BYTES: usize = SCRIPT.end - SCRIPT.start;
/// Bytes of the disk that are looked at, from each end.
const LOOK_BYTES: u64 = 256 << 10;
/// Bytes that are looked at at once.
const PIECE_BYTES: u64 = 32 << 10;
/// Larger blocks are not written to: the first write to one writes all of it.
const MAX_BLOCK_BYTES: u64 = 1 << 20;

/// An image, and what is done with it.
#[derive(Clone, Copy)]
struct Case<'a> {
    format: Format,
    file: &'a [u8],
    script: &'a [u8],
}

/// Runs a case.
///
/// # Panics
/// Where a promise is broken.
pub(crate) fn run(format: Format, case: &[u8]) {
    if case.len() > MAX_BYTES {
        return;
    }
    let case = Case::new(format, case);
    let effort = Effort::begin();
    let served = case.judge_opening();
    effort.judge("opening and checking");
    if let Some(report) = served {
        case.serve(&report);
    }
    effort.judge("serving");
    case.repair();
    effort.judge("repairing");
}

/// The same of a QED or a QCOW, which the case says itself.
///
/// # Panics
/// Where a promise is broken.
pub(crate) fn run_levels(case: &[u8]) {
    run(if case.starts_with(b"QFI") { Format::Qcow } else { Format::Qed }, case);
}

/// A cue sheet, whose files are all of 40 blocks.
pub(crate) fn run_cue(sheet: &[u8]) {
    let bin = vec![0x5a; 40 * 2352];
    let effort = Effort::begin();
    let Ok(named) = format::references(Format::Cue, &sheet).inspect_err(assert_refusal) else { return };
    let sources = std::iter::once(sheet).chain(std::iter::repeat_n(&bin[..], named.len()));
    let files: Vec<_> = (0..).zip(sources).map(|(id, source)| (FileId(id), source)).collect();
    let files: Vec<_> = files.iter().map(|(id, source)| ImageFile { id: *id, source }).collect();
    let how = OpenHow { read_only: true, info_only: false };
    if let Ok(map) = format::open(Format::Cue, &files, how).inspect_err(assert_refusal) {
        let regions = map.info().regions;
        let bytes = regions.iter().map(|r| r.blocks * u64::from(r.data_bytes)).sum::<u64>();
        assert_eq!(bytes.next_multiple_of(512), map.limits().size_bytes);
        walk(&*map, |file, off, len| assert!(file.0 > 0 && off + len <= bin.len() as u64));
    }
    effort.judge("opening a sheet");
}

fn assert_refusal(e: &Error) {
    use ErrorKind::{Corrupt, Limit, NotThisFormat, Unsupported};
    let line = e.to_string();
    assert!(!line.is_empty() && !line.contains('\n'), "not one line: {line:?}");
    assert!(matches!(e.kind(), Corrupt | Limit | NotThisFormat | Unsupported), "{e:?}");
}

/// Looks at the data of the first part of a disk, as far as tables are in memory.
fn walk(map: &dyn ImageMap, mut data: impl FnMut(FileId, u64, u64)) {
    let mut list = vdblk::map::ExtentList::new();
    let mut rest = GuestRange::between(GuestOffset(0), GuestOffset(map.limits().size_bytes.min(64 << 20)));
    while !rest.is_empty() {
        list.clear();
        if map.map(rest, Intent::Read, &mut list).is_err() {
            return; // tables that large are paged
        }
        for e in list.as_slice() {
            if let ExtentKind::Data { file, off } = e.kind {
                data(file, off.0, e.len);
            }
            rest = rest.skip(e.len);
        }
    }
}

impl<'a> Case<'a> {
    fn new(format: Format, case: &'a [u8]) -> Self {
        let (file, script) = match format {
            Format::Vmdk | Format::Qed | Format::Qcow => {
                (case, &case[SCRIPT.start.min(case.len())..SCRIPT.end.min(case.len())])
            }
            _ => case.split_at(case.len().saturating_sub(SCRIPT_BYTES)),
        };
        Case { format, file, script }
    }

    /// Whoever opens one of these has looked at all of its tables, or at none.
    fn is_verified_at_open(&self) -> bool {
        matches!(self.format, Format::Vmdk | Format::Qed | Format::Qcow)
    }

    fn check(&self, source: &dyn ByteSource) -> Result<Option<CheckReport>> {
        format::check(self.format, &[ImageFile { id: FileId(0), source }])
    }

    /// Opening in each way and checking agree with each other. The report, if the image can be served for writing.
    fn judge_opening(&self) -> Option<CheckReport> {
        // what names further files is not for this target
        if format::references(self.format, &self.file).is_ok_and(|r| !r.is_empty()) {
            return None;
        }
        let open = |read_only, info_only| {
            let opened = open_single(self.format, &self.file, FileId(0), OpenHow { read_only, info_only });
            opened.inspect_err(assert_refusal)
        };
        let (write, read, info) = (open(false, false), open(true, false), open(true, true));
        let checked = self.check(&self.file).inspect_err(assert_refusal);
        assert!(write.is_err() || read.is_ok(), "can be written, but not read");
        if self.is_verified_at_open() {
            assert_eq!(read.is_ok(), info.is_ok(), "what can be served can be told of");
        }
        if let (Ok(a), Ok(b)) = (&read, &info) {
            // who only asks has it counted
            let told = |info: ImageInfo| match self.is_verified_at_open() {
                true => info,
                false => ImageInfo { allocated_blocks: None, ..info },
            };
            assert_eq!(told(a.info()), told(b.info()));
        }
        if let Ok(map) = &read {
            walk(&**map, |_, off, len| self.assert_data_lies_well(off, len));
            self.serve_read_only();
        }
        let map = write.ok()?;
        walk(&*map, |_, off, len| self.assert_data_lies_well(off, len));
        let report = checked.expect("what can be served can be checked")?;
        // Where tables are paged, an entry that cannot be is met when it is used. A VHD lives with one footer of two.
        let may_be_corrupt = matches!(self.format, Format::Qcow2 | Format::Vhd);
        assert!(report.corruptions == 0 || may_be_corrupt, "{report:?}");
        Some(report)
    }

    /// Data lie in the file. Of these formats they never lie where the header is, and the last sector may be there in part.
    fn assert_data_lies_well(&self, off: u64, len: u64) {
        let (first, end) = match self.is_verified_at_open() {
            true => (512, (self.file.len() as u64).next_multiple_of(512)),
            false => (0, self.file.len() as u64),
        };
        assert!(off >= first && off + len <= end, "{len} bytes at {off} of {end}");
    }

    /// What is broken fails and harms nobody.
    fn serve_read_only(&self) {
        let file = SparseFile::new("case", self.file);
        let mut served = Served::over(self.format, &file, true).expect("an image that was opened before");
        served.look();
        assert!(self.is_still(&file), "reading has changed it");
    }

    fn is_still(&self, file: &SparseFile) -> bool {
        let mut now = vec![0; self.file.len() + 1];
        file.read_at(0, &mut now).expect("a file in memory") == self.file.len()
            && now[..self.file.len()] == *self.file
    }

    /// Serves an image that opens, and closes it: what it shows is what it showed, with the requests over it. An image that is
    /// corrupt somewhere may refuse what concerns that.
    fn serve(&self, before: &CheckReport) {
        let mut is_sound = before.corruptions == 0;
        let file = SparseFile::new("case", self.file);
        let mut served = Served::over(self.format, &file, false).expect("an image that was opened before");
        let mut model = served.look();
        let size = served.disk.size_bytes();
        let mut script = Input::new(self.script);
        let mut wrote = false;
        while served.block_bytes <= MAX_BLOCK_BYTES && size > 0 && !script.is_empty() {
            let (what, at) = (script.u8(), u64::from(script.u16()) * 512 % size);
            let len = (u64::from(script.u8() % 24 + 1) * 512).min(size - at);
            let range = GuestRange::new(GuestOffset(at), len).expect("inside the disk");
            let stamp = what | 1;
            let (request, mut bytes, value) = match what % 4 {
                0 => (Request::Flush, vec![], None),
                1 => (Request::WriteZeroes { range, unmap: what > 128 }, vec![], Some(0)),
                _ => (Request::Write(range), vec![stamp; len as usize], Some(stamp)),
            };
            let around = served.around(range).expect("inside the disk");
            let is_readable = served.bytes(around).is_some();
            let outcome = served.request(request, &mut bytes);
            let may_fail = value.is_some() && (!is_sound || !is_readable);
            assert!(outcome.is_ok() || may_fail, "{request:?}: {outcome:?}");
            // Packed bytes that are broken are found when they are wanted.
            is_sound &= outcome.is_ok() || self.is_verified_at_open();
            wrote |= value.is_some_and(|v| v > 0);
            if let Some(value) = value {
                note(
                    &mut model,
                    if outcome.is_ok() { range } else { around },
                    outcome.is_ok().then_some(value),
                );
            }
        }
        if is_sound {
            assert_shown(&model, &served.look(), "while it is served");
        }
        let closed = served.channel.close_disk(true);
        drop(served);
        if !is_sound {
            return;
        }
        closed.expect("a disk that took every request");
        let source = FileSource::new(&*file).expect("a file in memory");
        let after = self.check(&source).expect("it is closed").expect("it can be wrong");
        assert_eq!(after.corruptions, 0, "after a close: {after:?}");
        assert!(after.is_clean() || !(wrote && before.is_clean()), "after a clean close: {after:?}");
        let mut again = Served::over(self.format, &file, true).expect("an image that was closed");
        assert_shown(&model, &again.look(), "after a close");
    }

    fn repair_file(&self, file: &Arc<SparseFile>) -> Result<()> {
        let source = FileSource::new(&**file)?;
        let image = [ImageFile { id: FileId(0), source: &source }];
        let Some(plan) = format::repair(self.format, &image)? else { return Ok(()) };
        plan.lines.iter().for_each(|l| assert!(!l.is_empty() && !l.contains('\n'), "{l:?}"));
        let mut watch = Watch { cancelled: &|| false, progress: &mut |_| () };
        watch.run(&mut StepsJob::new(vec![&**file], plan.steps))
    }

    /// A repair leaves an image clean that shows what it showed, or is refused with nothing changed.
    fn repair(&self) {
        let file = SparseFile::new("case", self.file);
        let shown = Served::over(self.format, &file, true).ok().map(|mut s| s.look());
        if let Err(e) = self.repair_file(&file) {
            assert_refusal(&e);
            assert!(self.is_still(&file), "refused, and changed: {e}");
            return;
        }
        let source = FileSource::new(&*file).expect("a file in memory");
        if let Some(after) = self.check(&source).inspect_err(assert_refusal).ok().flatten() {
            assert_eq!(after.corruptions, 0, "after a repair: {after:?}");
        }
        let Some(shown) = shown else { return };
        let mut served = Served::over(self.format, &file, true).expect("a repaired image opens");
        assert_shown(&shown, &served.look(), "after a repair");
    }
}

/// A part of the disk and its bytes, if they can be read.
type Piece = (GuestRange, Option<Vec<u8>>);

/// What is known is shown. What could not be read before may be anything now.
fn assert_shown(known: &[Piece], shown: &[Piece], when: &str) {
    assert_eq!(known.len(), shown.len());
    for ((r, known), (_, shown)) in known.iter().zip(shown) {
        assert!(known.is_none() || shown == known, "{when} it shows something else at {r:?}");
    }
}

/// The range holds nothing but `value`; `None`: nobody knows.
fn note(model: &mut [Piece], range: GuestRange, value: Option<u8>) {
    for (r, known) in model.iter_mut().filter(|(r, _)| !r.intersect(range).is_empty()) {
        let part = range.intersect(*r);
        let from = part.start().since(r.start()) as usize;
        match (&mut *known, value) {
            (Some(known), Some(value)) => known[from..from + part.len() as usize].fill(value),
            _ => *known = None,
        }
    }
}

struct Served {
    channel: Channel,
    disk: Arc<Disk>,
    block_bytes: u64,
}

impl Served {
    fn over(format: Format, file: &Arc<SparseFile>, read_only: bool) -> Result<Self> {
        let how = OpenHow { read_only, info_only: false };
        let map = open_single(format, &FileSource::new(&**file)?, FileId(0), how)?;
        let block_bytes = map.limits().block_bytes;
        let hosts = vec![file.clone() as Arc<dyn HostFile>];
        let options = DiskOptions { read_only, ..DiskOptions::default() };
        let chain = Chain::new(vec![Layer { number: 0, map: map.into() }]);
        let no_failure = Box::new(|| panic!("no sync fails here"));
        let disk = Disk::new(chain, hosts, options, Arc::new(OsHost), no_failure);
        let channel = Channel::new(disk.clone(), Box::new(SteadyEngine::new(vec![file.clone()])), 1)?;
        Ok(Served { channel, disk, block_bytes })
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
            self.channel.drive(Duration::ZERO, &mut done).expect("an engine without a thread");
            if let Some(d) = done.pop() {
                return d.outcome;
            }
        }
        panic!("{request:?} does not end");
    }

    /// The whole blocks around a range.
    fn around(&self, r: GuestRange) -> Option<GuestRange> {
        let block = self.block_bytes.max(512);
        let (start, end) = (r.start().0 / block * block, r.end().0.next_multiple_of(block));
        GuestRange::new(GuestOffset(start), end.min(self.disk.size_bytes()) - start)
    }

    /// What is looked at: both ends of the disk, in pieces. What cannot be read (entries of tables too large to be verified at open,
    /// packed bytes that are broken) is `None`.
    fn look(&mut self) -> Vec<Piece> {
        let size = self.disk.size_bytes();
        let tail = size.saturating_sub(LOOK_BYTES) / 512 * 512;
        let ends = [(0, size.min(LOOK_BYTES)), (tail, size - tail)];
        let mut all = Vec::new();
        for (start, len) in ends {
            let mut rest = GuestRange::new(GuestOffset(start), len).expect("inside the disk");
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
