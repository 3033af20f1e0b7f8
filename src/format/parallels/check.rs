//! What is wrong with a Parallels image. Unlike opening, checking goes on behind the first finding.

use super::super::report::{CheckReport, Severity};
use super::header::Header;
use super::layout::Layout;
use super::table::{self, Used};
use crate::error::{ErrorKind, Result};
use crate::map::ByteSource;

/// An image of which the table was found.
pub(super) struct Examined {
    pub(super) header: Header,
    pub(super) layout: Layout,
    pub(super) words: Vec<u32>,
    pub(super) used: Used,
    /// The blocks whose entries cannot stay as they are.
    pub(super) faults: Vec<table::Fault>,
    pub(super) file_bytes: u64,
    pub(super) report: CheckReport,
}

/// Checks an image. Nothing is written.
///
/// # Errors
/// [`ErrorKind::NotThisFormat`], [`ErrorKind::Unsupported`], and errors of reading.
pub(super) fn check(source: &dyn ByteSource) -> Result<CheckReport> {
    Ok(match examine(source)? {
        Ok(examined) => examined.report,
        Err(hopeless) => hopeless,
    })
}

/// The inner error is the report on an image whose table cannot even be found.
pub(super) fn examine(source: &dyn ByteSource) -> Result<std::result::Result<Examined, CheckReport>> {
    let file_bytes = source.len();
    let found = Header::read(source).and_then(|h| h.layout(file_bytes).map(|l| (h, l)));
    let (header, layout) = match found {
        Ok(found) => found,
        Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Limit) => {
            return Ok(Err(CheckReport::hopeless(&e)));
        }
        Err(e) => return Err(e),
    };
    let words = table::words(source, &layout)?;
    let mut report = CheckReport { blocks: u64::from(layout.blocks), ..CheckReport::default() };
    let mut faults = Vec::new();
    let used = table::survey(words.iter().copied(), &layout, file_bytes, |fault| {
        report.add(Severity::Corruption, true, fault.describe(&layout, file_bytes));
        faults.push(fault);
    });
    report.allocated = used.blocks;
    if header.in_use {
        report.add(Severity::Leak, true, "it was not closed, or is open elsewhere".into());
    }
    // Holes in the midst are no finding: the next writer fills them.
    let tail = file_bytes.saturating_sub(used.end.0);
    if tail > 0 {
        report.add(Severity::Leak, true, format!("{tail} bytes at the end of the file belong to no block"));
    }
    Ok(Ok(Examined { header, layout, words, used, faults, file_bytes, report }))
}
