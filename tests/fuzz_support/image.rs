//! The bytes of a VDI: opened, mapped, changed, closed, checked, repaired.
//!
//! The case is the file itself: any VDI is a case. Its first 64 bytes, which readers ignore, say what is done with it: how
//! it is stacked, then four bytes for each request.

use super::Input;
use super::effort::Effort;
use super::plain::{PlainChain, PlainVdi, Source};
use super::sparse::{SparseFile, SteadyEngine};
use crate::format_support::build::{Form, Spec};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use vdblk::error::{Error, ErrorKind, Result};
use vdblk::format::{CheckReport, Format, OpenHow, open_single, vdi};
use vdblk::io::{BufSlice, HostFile, OsHost};
use vdblk::job::{StepsJob, Survey, Watch};
use vdblk::map::{FileId, GuestOffset, GuestRange, ImageMap};
use vdblk::vd::{BlockDevice, Chain, Channel, Disk, DiskOptions, FileSource, Layer, Outcome, Request};

/// Longer cases are no cases: what may be taken is promised up to here.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// Bytes in front that say what is done.
const SCRIPT_BYTES: usize = 64;
/// Sectors compared in one image at most.
const MAX_SAMPLES: usize = 800;

/// Bytes of whole blocks that a case writes at most, after the first: where nothing is known of a place, the first write to
/// a block writes all of it, and a block may have 256 MiB.
const MAX_WHOLE_BYTES: u64 = 256 << 20;

/// How the image is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stack {
    Alone,
    /// Under a sound differencing image.
    AsParent,
    /// Over a sound parent.
    OverParent,
    /// Over itself.
    OverItself,
}

/// Runs a case.
///
/// # Panics
/// Where a promise is broken.
pub(crate) fn run(case: &[u8]) {
    if case.len() > MAX_BYTES {
        return;
    }
    let effort = Effort::begin();
    let mut script = Input::new(&case[..case.len().min(SCRIPT_BYTES)]);
    let stack = match script.u8() % 4 {
        0 => Stack::Alone,
        1 => Stack::AsParent,
        2 => Stack::OverParent,
        _ => Stack::OverItself,
    };
    let found = judge_opening(case);
    effort.judge("opening and checking");
    if let Some(report) = found {
        serve(case, stack, script, &report);
    }
    effort.judge("serving");
    repair(case);
    effort.judge("repairing");
}

fn assert_one_line(e: &Error) {
    let line = e.to_string();
    assert!(!line.is_empty() && !line.contains('\n'), "not one line: {line:?}");
}

/// Opening in each way and checking agree with each other. The report, if the image can be served.
fn judge_opening(case: &[u8]) -> Option<CheckReport> {
    let how = |read_only, info_only| OpenHow { read_only, info_only };
    let [write, read, info] = [(false, false), (true, false), (true, true)]
        .map(|(read_only, info_only)| open_single(Format::Vdi, &case, FileId(0), how(read_only, info_only)));
    let checked = vdi::check(&case);
    let errors = [write.as_ref().err(), read.as_ref().err(), info.as_ref().err(), checked.as_ref().err()];
    errors.iter().flatten().for_each(|e| assert_one_line(e));
    for e in errors.iter().flatten() {
        use ErrorKind::{Corrupt, Limit, NotThisFormat, Unsupported};
        assert!(matches!(e.kind(), Corrupt | Limit | NotThisFormat | Unsupported), "{e:?}");
    }
    assert_eq!(write.is_ok(), read.is_ok(), "reading and writing disagree about an image");
    assert!(read.is_err() || info.is_ok(), "what can be served can be told of");
    let report = checked.ok()?;
    let opens = write.is_ok();
    // what another program would make of the count is no concern of ours
    let count_alone =
        report.corruptions == 1 && report.findings.iter().any(|f| f.text.contains("the count of"));
    assert_eq!(opens, report.corruptions == 0 || (opens && count_alone), "{report:?} and {:?}", write.err());
    let (map, info) = (write.ok()?, info.ok()?);
    assert_eq!(map.info(), info.info(), "more is told than found");
    let plain = PlainVdi::read(case);
    assert_eq!(map.limits().size_bytes, plain.disk);
    let allocated = plain.entries.iter().filter(|e| **e < super::plain::ZERO).count();
    assert_eq!(map.info().allocated_blocks, u64::try_from(allocated).ok());
    Some(report)
}

/// A sound image of 64 KiB; places hold bytes of their own.
fn sound(kind: u32) -> Vec<u8> {
    let entries = match kind {
        1 => (0..16).rev().collect(),
        _ => vec![0, u32::MAX, u32::MAX - 1, u32::MAX, 1],
    };
    let count = entries.iter().filter(|e| **e < u32::MAX - 1).count();
    let count = u32::try_from(count).unwrap();
    let spec = Spec {
        form: Form::New,
        kind,
        size: 64 << 10,
        block: 4 << 10,
        extra: 0,
        gaps: (0, 0),
        entries,
        count,
        slack: 0,
    };
    spec.build(|place| 0x80 | place as u8)
}

/// A disk and what is known of it.
struct Served<'a> {
    files: Vec<Arc<SparseFile>>,
    disk: Arc<Disk>,
    channel: Channel,
    plain: PlainChain<'a>,
    /// Sectors that were changed; `None`: discarded, so anything.
    changed: BTreeMap<u64, Option<u8>>,
    /// Bytes of blocks that were written to.
    whole: u64,
}

fn open_map(file: &SparseFile, number: usize, read_only: bool) -> Result<Arc<dyn ImageMap>> {
    let source = FileSource::new(file)?;
    let id = FileId(u16::try_from(number).unwrap());
    Ok(open_single(Format::Vdi, &source, id, OpenHow { read_only, info_only: false })?.into())
}

impl<'a> Served<'a> {
    /// Images that can be opened, top first.
    fn open(images: &[&'a [u8]], read_only: bool) -> Self {
        let files: Vec<_> = images.iter().map(|i| SparseFile::new("case.vdi", i)).collect();
        Self::over(files, images, read_only).expect("images that were opened before")
    }

    /// Files that hold what these images should hold by now.
    fn over(files: Vec<Arc<SparseFile>>, images: &[&'a [u8]], read_only: bool) -> Result<Self> {
        let mut layers = Vec::new();
        for (i, file) in files.iter().enumerate() {
            let map = open_map(file, i, read_only || i > 0)?;
            layers.push(Layer { number: u32::try_from(i).unwrap(), map });
        }
        let hosts = files.iter().map(|f| f.clone() as Arc<dyn HostFile>).collect();
        let options = DiskOptions { read_only, ..DiskOptions::default() };
        let no_failure = Box::new(|| panic!("no sync fails here"));
        let disk = Disk::new(Chain::new(layers), hosts, options, Arc::new(OsHost), no_failure);
        let channel = Channel::new(disk.clone(), Box::new(SteadyEngine::new(files.clone())), 1)?;
        let plain = PlainChain { images: images.iter().map(|i| (PlainVdi::read(i), *i)).collect() };
        Ok(Served { files, disk, channel, plain, changed: BTreeMap::new(), whole: 0 })
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

    /// Sectors in which something could be wrong.
    fn samples(&self) -> Vec<u64> {
        let size = self.disk.size_bytes() / 512;
        let mut all = vec![0, size - 1];
        for (image, bytes) in &self.plain.images {
            let per_block = image.block / 512;
            for (b, _) in (0u64..).zip(&image.entries).filter(|(_, e)| **e != super::plain::FREE) {
                let first = b * per_block;
                all.extend([first, first + per_block / 2, first + per_block - 1]);
                // where the file ends within the block
                if let Source::File(off) = image.source(first * 512)
                    && let Some(there) = (bytes.len() as u64).checked_sub(off).filter(|n| *n < image.block)
                {
                    all.extend([first + there / 512, (first + there / 512).saturating_sub(1)]);
                }
            }
        }
        let step = all.len().div_ceil(MAX_SAMPLES);
        let mut chosen: Vec<u64> = all.into_iter().step_by(step).collect();
        chosen.extend(self.changed.keys().flat_map(|s| [s.saturating_sub(1), *s, s + 1]));
        chosen.retain(|s| *s < size);
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    }

    /// Everything reads as it should.
    fn compare(&mut self) {
        for sector in self.samples() {
            let expected = match self.changed.get(&sector) {
                None => self.plain.sector(sector),
                Some(Some(stamp)) => [*stamp; 512],
                Some(None) => continue,
            };
            let range = GuestRange::new(GuestOffset(sector * 512), 512).unwrap();
            let mut got = [0xa5; 512];
            assert_eq!(self.request(Request::Read(range), &mut got), Ok(()), "sector {sector}");
            assert!(got == expected, "sector {sector} holds {:x?}, not {:x?}", &got[..8], &expected[..8]);
        }
    }

    /// The whole disk is accounted for.
    fn survey(&self) {
        let mut survey = Survey::new(self.disk.clone());
        let mut at = 0;
        while let Some(piece) = survey.next_piece().expect("a disk whose images are open") {
            assert_eq!(piece.range.start().0, at);
            assert!(!piece.range.is_empty());
            at = piece.range.end().0;
        }
        assert_eq!(at, self.disk.size_bytes());
    }

    /// A range of the disk from a few bytes.
    fn range(&self, script: &mut Input<'_>, sectors: u64) -> GuestRange {
        let (size, block) = (self.disk.size_bytes(), self.plain.images[0].0.block);
        let blocks = size.div_ceil(block);
        let (number, within) = (u64::from(script.u16()), u64::from(script.u8()));
        let number = if within >= 128 { blocks - 1 - number % blocks } else { number % blocks };
        let per_block = block / 512;
        let within = within % 128;
        let sector = if within < 64 { within % per_block } else { per_block - 1 - (within - 64) % per_block };
        let start = (number * block + sector * 512).min(size - 512);
        GuestRange::new(GuestOffset(start), (sectors * 512).min(size - start)).unwrap()
    }

    /// One request; true if it has changed something for certain.
    fn step(&mut self, script: &mut Input<'_>) -> bool {
        let what = script.u8();
        let range = self.range(script, 1 + u64::from(what >> 3));
        let sectors = range.start().0 / 512..range.end().0 / 512;
        let stamp = what | 1;
        if !matches!(what & 7, 0 | 7) {
            if self.whole > MAX_WHOLE_BYTES {
                return false;
            }
            self.whole += 2 * self.plain.images[0].0.block;
        }
        let (request, mut bytes, leaves) = match what & 7 {
            1 | 2 => (Request::Write(range), vec![stamp; range.len() as usize], Some(Some(stamp))),
            3 => (Request::Discard(range), vec![], Some(None)),
            4 => (Request::WriteZeroes { range, unmap: true }, vec![], Some(Some(0))),
            5 => (Request::WriteZeroes { range, unmap: false }, vec![], Some(Some(0))),
            6 => (Request::Write(range), vec![0; range.len() as usize], Some(Some(0))),
            7 => (Request::Flush, vec![], None),
            _ => (Request::Read(range), vec![0; range.len() as usize], None),
        };
        assert_eq!(self.request(request, &mut bytes), Ok(()), "{request:?}");
        if let Some(value) = leaves {
            self.changed.extend(sectors.map(|s| (s, value)));
        }
        matches!(what & 7, 1 | 2)
    }
}

/// Serves an image that opens, and closes it.
fn serve(case: &[u8], stack: Stack, mut script: Input<'_>, before: &CheckReport) {
    let (diff, base) = (sound(4), sound(1));
    let images: Vec<&[u8]> = match stack {
        Stack::Alone => vec![case],
        Stack::AsParent => vec![&diff, case],
        Stack::OverParent => vec![case, &base],
        Stack::OverItself => vec![case, case],
    };
    let mut served = Served::open(&images, false);
    served.survey();
    served.compare();
    let mut wrote = false;
    while !script.is_empty() {
        wrote |= served.step(&mut script);
    }
    served.compare();
    served.channel.close_disk(true).expect("a disk that took every request");
    for (file, image) in served.files.iter().zip(&images).skip(1) {
        let mut now = vec![0; image.len() + 1];
        assert_eq!(file.read_at(0, &mut now).unwrap(), image.len());
        assert!(now[..image.len()] == **image, "a parent was changed");
    }
    let after = vdi::check(&FileSource::new(&*served.files[0]).unwrap()).unwrap();
    let was_clean = stack == Stack::AsParent || before.is_clean();
    assert!(after.is_clean() || !(wrote || was_clean), "after a clean close: {after:?}");
    let Served { files, changed, channel, disk, .. } = served;
    drop((channel, disk));
    let mut again = Served::over(files, &images, true).expect("an image that was closed");
    again.changed = changed;
    again.survey();
    again.compare();
}

/// Repairs a file as `vdimg repair` does.
fn repair_file(file: &SparseFile) -> Result<bool> {
    let plan = vdi::repair(&FileSource::new(file)?)?;
    plan.lines.iter().for_each(|l| assert!(!l.is_empty() && !l.contains('\n'), "{l:?}"));
    assert_eq!(plan.steps.is_empty(), plan.report.is_clean());
    let changes = !plan.steps.is_empty();
    let mut watch = Watch { cancelled: &|| false, progress: &mut |_| () };
    watch.run(&mut StepsJob::new(vec![file], plan.steps))?;
    Ok(changes)
}

/// A repair leaves an image clean that shows what it showed, or is refused with nothing changed.
fn repair(case: &[u8]) {
    let file = SparseFile::new("case.vdi", case);
    if let Err(e) = repair_file(&file) {
        assert_one_line(&e);
        let mut now = vec![0; case.len() + 1];
        assert_eq!(file.read_at(0, &mut now).unwrap(), case.len(), "{e}");
        assert!(now[..case.len()] == *case, "refused, and changed: {e}");
        return;
    }
    let after = vdi::check(&FileSource::new(&*file).unwrap()).unwrap();
    assert!(after.is_clean(), "after a repair: {after:?}");
    assert!(!repair_file(&file).unwrap(), "a second repair finds something to do");
    let mut served = Served::over(vec![file], &[case], true).expect("a repaired image opens");
    served.survey();
    served.compare();
}

/// Images of 1 MiB that ask for as much as they can: all of their tables are full.
pub(crate) fn dear() -> Vec<(&'static str, Vec<u8>)> {
    const SMALL: u64 = 4 << 10;
    const LARGE: u64 = 256 << 20;
    let of = |kind, block: u64, extra, data: usize, entry: &dyn Fn(u32) -> u32| {
        let blocks = u32::try_from((MAX_BYTES - 512 - data) / 4).unwrap();
        let spec = Spec {
            form: Form::New,
            kind,
            size: u64::from(blocks) * block,
            block,
            extra,
            gaps: (40, 0),
            entries: Vec::new(),
            count: 0,
            slack: data as u64,
        };
        let mut image = spec.build(|_| 0);
        for b in 0..blocks {
            let at = spec.table_at() as usize + 4 * b as usize;
            image[at..at + 4].copy_from_slice(&entry(b).to_le_bytes());
        }
        // reads and writes here and there
        for (i, b) in image[..SCRIPT_BYTES].iter_mut().enumerate().skip(1) {
            *b = (i * 37) as u8;
        }
        image[0] = 0;
        image
    };
    vec![
        ("nothing allocated, small blocks", of(1, SMALL, 0, 0, &|_| u32::MAX)),
        ("nothing allocated, large blocks", of(1, LARGE, LARGE, 0, &|_| u32::MAX)),
        ("nothing allocated, over a parent", of(4, LARGE, 0, 0, &|_| u32::MAX)),
        ("zeros and nothing by turns", of(4, SMALL, 0, 0, &|b| u32::MAX - b % 2)),
        ("fixed, and nothing is there", of(2, LARGE, LARGE, 0, &|_| u32::MAX)),
        ("one small place for all", of(1, SMALL, 0, 4096, &|_| 0)),
        (
            "one small place for as many as a repair copies",
            of(1, SMALL, 0, 4096, &|b| if b < 16_000 { 0 } else { u32::MAX }),
        ),
        ("one small place for all, a byte of it", of(1, SMALL, 0, 1, &|_| 0)),
        ("one large place for all", of(1, LARGE, 0, 4096, &|_| 0)),
        ("one large place for all, a byte of it", of(1, LARGE, LARGE, (256 << 10) + 1, &|_| 0)),
        ("one large place for two", of(1, LARGE, 0, 4096, &|b| if b < 2 { 0 } else { u32::MAX })),
        ("the last place first", of(1, LARGE, 0, 4096, &|b| if b == 9 { 0 } else { u32::MAX })),
        ("no place is there", of(1, LARGE, LARGE, 0, &|b| b)),
        ("no place can be", of(1, SMALL, 0, 0, &|b| u32::MAX - 2 - b)),
        (
            "every third of half of the places",
            of(1, SMALL, 0, 512 << 10, &|b| if b < 40 { b * 3 } else { u32::MAX }),
        ),
        ("places backwards", of(1, SMALL, 0, 512 << 10, &|b| if b < 128 { 127 - b } else { u32::MAX })),
    ]
}
