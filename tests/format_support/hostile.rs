//! Images that were changed here and there: opened, read, checked and repaired, whatever they say.

use super::range_of;
use vdblk::error::{Error, ErrorKind};
use vdblk::format::{self, FileStep, Format, ImageFile, OpenHow, open_single};
use vdblk::map::{ByteSource, ExtentKind, ExtentList, FileId, ImageMap, Intent, Miss};

/// Most bytes of a disk that are read of one image.
const MOST: u64 = 1 << 20;

/// Numbers that follow from a seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn one_line(e: &Error) {
    let line = e.to_string();
    assert!(!line.is_empty() && !line.contains('\n'), "not one line: {line:?}");
}

fn files(case: &dyn ByteSource) -> [ImageFile<'_>; 1] {
    [ImageFile { id: FileId(0), source: case }]
}

/// The first bytes of the disk as `file` holds them: what is the parent's is 0xee.
fn beginning(map: &dyn ImageMap, file: &Vec<u8>) -> Vec<u8> {
    let size = map.limits().size_bytes.min(MOST);
    let (mut all, mut rest) = (vec![0xee; size as usize], range_of(0, size));
    while !rest.is_empty() {
        let mut list = ExtentList::new();
        match map.map(rest, Intent::Read, &mut list) {
            Ok(()) => assert!(list.covered() > 0, "no progress at {rest}"),
            Err(Miss::NeedsPage(key)) => {
                let place = map.page_place(key).expect("a page of the image");
                let mut page = vec![0; place.len];
                file.read_at(place.off, &mut page).expect("a page inside the file");
                map.page_read(key, &page).expect("a page");
            }
            Err(other) => panic!("{rest}: {other:?}"),
        }
        for e in list.as_slice() {
            let at = rest.start().0 as usize;
            let out = &mut all[at..at + e.len as usize];
            match e.kind {
                ExtentKind::Data { off, .. } => file.read_at(off, out).expect("data inside the file"),
                ExtentKind::Zero => out.fill(0),
                _ => {}
            }
            rest = rest.skip(e.len);
        }
    }
    all
}

/// What a repair does.
pub(crate) fn carry_out(steps: Vec<FileStep>, file: &mut Vec<u8>) {
    for step in steps {
        match step {
            FileStep::Write { at, bytes, .. } => {
                let at = at.0 as usize;
                file.resize(file.len().max(at + bytes.len()), 0);
                file[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            FileStep::Copy { from, to, len, .. } => {
                let (from, to, len) = (from.0 as usize, to.0 as usize, len as usize);
                file.resize(file.len().max(from.max(to) + len), 0);
                file.copy_within(from..from + len, to);
            }
            FileStep::Fill { at, len, byte, .. } => {
                file[at.0 as usize..(at.0 + len) as usize].fill(byte);
            }
            FileStep::SetLen { to, .. } | FileStep::Reserve { to, .. } => file.resize(to.0 as usize, 0),
            FileStep::Sync { .. } => {}
        }
    }
}

/// What may be said of a case: opening in each way and checking agree; what opens can be read; what is repaired opens, is
/// clean, and reads what it read before. True if it opened.
///
/// # Panics
/// Where that is not so.
pub(crate) fn judge(format: Format, case: &Vec<u8>) -> bool {
    let how = |read_only, info_only| OpenHow { read_only, info_only };
    let opened = open_single(format, case as &dyn ByteSource, FileId(0), how(true, false));
    let told = open_single(format, case as &dyn ByteSource, FileId(0), how(true, true));
    let _ =
        open_single(format, case as &dyn ByteSource, FileId(0), how(false, false)).map_err(|e| one_line(&e));
    assert!(opened.is_err() || told.is_ok(), "opens, but tells nothing of itself");
    let report = format::check(format, &files(case));
    let before = match (&opened, &report) {
        (Err(e), Ok(Some(report))) => {
            one_line(e);
            assert!(
                report.exit_code() == 2 || e.kind() == ErrorKind::Unsupported,
                "does not open, but is fine: {e}"
            );
            None
        }
        (Err(e), _) => {
            one_line(e);
            None
        }
        (Ok(map), Ok(Some(_))) => Some(beginning(&**map, case)),
        (Ok(_), other) => panic!("opens, but cannot be checked: {other:?}"),
    };
    match format::repair(format, &files(case)) {
        Err(e) => one_line(&e),
        Ok(None) => panic!("nothing can be wrong"),
        Ok(Some(plan)) => {
            let mut mended = case.clone();
            carry_out(plan.steps, &mut mended);
            let report = format::check(format, &files(&mended)).expect("a report").expect("a report");
            assert!(report.is_clean(), "not clean after a repair: {report:?}");
            let map = open_single(format, &mended as &dyn ByteSource, FileId(0), how(true, false))
                .unwrap_or_else(|e| panic!("does not open after a repair: {e}"));
            let after = beginning(&*map, &mended);
            assert!(before.is_none_or(|b| b == after), "reads otherwise after a repair");
        }
    }
    opened.is_ok()
}
