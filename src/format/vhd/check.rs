//! What is wrong with a VHD, as far as it can be told.

use super::super::report::{CheckReport, Severity};
use super::fixed::checked_size;
use super::footer::{FOOTER_BYTES, Footers, Kind};
use super::header::Header;
use super::layout::{FREE, Layout};
use super::table::{self, holes, survey};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::ByteSource;

/// A VHD whose blocks can be found.
#[derive(Debug)]
pub(super) struct Examined {
    pub(super) footers: Footers,
    pub(super) layout: Layout,
    pub(super) table: Vec<u32>,
    pub(super) file_bytes: u64,
}

/// What was found out.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) report: CheckReport,
    /// `None` for fixed images, and for those that nothing can be said of.
    pub(super) image: Option<Examined>,
}

/// Checks an image without its parents.
///
/// # Errors
/// [`ErrorKind::NotThisFormat`], [`ErrorKind::Unsupported`], and those of reading.
pub(super) fn check(source: &dyn ByteSource) -> Result<CheckReport> {
    Ok(examine(source)?.report)
}

pub(super) fn examine(source: &dyn ByteSource) -> Result<Found> {
    let hopeless = |e: Error| match e.kind() {
        ErrorKind::Corrupt | ErrorKind::Limit => Ok(Found { report: CheckReport::hopeless(&e), image: None }),
        _ => Err(e),
    };
    let footers = match Footers::read(source) {
        Ok(footers) => footers,
        Err(e) => return hopeless(e),
    };
    if footers.best.kind()? == Kind::Fixed {
        return match checked_size(&footers.best, source.len()) {
            Ok(_) => Ok(Found { report: CheckReport::default(), image: None }),
            Err(e) => hopeless(e),
        };
    }
    let layout = Header::read(source, footers.best.header_at())
        .and_then(|header| Layout::new(&footers.best, &header, source.len()));
    let layout = match layout {
        Ok(layout) => layout,
        Err(e) => return hopeless(e),
    };
    let table = table::load(source, &layout)?;
    let image = Examined { footers, layout, table, file_bytes: source.len() };
    let report = image.report();
    Ok(Found { report, image: Some(image) })
}

impl Examined {
    fn report(&self) -> CheckReport {
        let mut report = CheckReport { blocks: u64::from(self.layout.blocks), ..CheckReport::default() };
        report.allocated = self.table.iter().filter(|e| **e != FREE).count() as u64;
        if !self.footers.copy_is_good {
            let what = "the copy of the footer at the beginning is missing; only the one at the end tells what this is";
            report.add(Severity::Corruption, true, what.into());
        }
        if !self.footers.end_is_good {
            let what = "the footer at the end is missing or another; the copy at the beginning is good";
            report.add(Severity::Leak, true, what.into());
        }
        let end = survey(&self.table, &self.layout, self.file_bytes, |fault| {
            report.add(Severity::Corruption, true, fault.describe(self.file_bytes));
        });
        let end = end.max(self.layout.metadata_end()).next_multiple_of(SECTOR_BYTES);
        self.judge_slack(end, &mut report);
        report
    }

    fn judge_slack(&self, end: u64, report: &mut CheckReport) {
        for (from, to) in holes(&self.table, &self.layout) {
            report.add(Severity::Leak, true, format!("bytes {from} to {to} of the file belong to no block"));
        }
        let footer = if self.footers.end_is_good { FOOTER_BYTES } else { 0 };
        let slack = self.file_bytes.saturating_sub(footer).saturating_sub(end);
        if slack > 0 {
            let what = format!("{slack} bytes at the end of the file belong to no block");
            report.add(Severity::Leak, true, what);
        }
    }
}
