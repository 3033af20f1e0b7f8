//! What is wrong with a VDI. Unlike opening, checking goes on behind the first finding, and takes everything
//! from which the table can still be found.

use super::super::report::{CheckReport, Severity};
use super::header::{Header, Kind};
use super::layout::{Entry, Layout};
use super::table::{self, Used, survey};
use crate::error::{ErrorKind, Result};
use crate::map::{ByteSource, HostOffset};

/// A VDI of which the table was found.
pub(super) struct Examined {
    pub(super) header: Header,
    pub(super) layout: Layout,
    pub(super) table: Vec<u32>,
    pub(super) file_bytes: u64,
    pub(super) report: CheckReport,
}

/// Checks an image. Nothing is written, and nothing is locked in memory but the table.
///
/// # Errors
/// [`ErrorKind::NotThisFormat`], [`ErrorKind::Unsupported`], and errors of reading. A VDI that cannot be used
/// is no error but a report with a corruption.
pub fn check(source: &dyn ByteSource) -> Result<CheckReport> {
    match examine(source)? {
        Ok(examined) => Ok(examined.report),
        Err(hopeless) => Ok(hopeless),
    }
}

/// The inner error is the report on an image whose table cannot even be found.
pub(super) fn examine(source: &dyn ByteSource) -> Result<std::result::Result<Examined, CheckReport>> {
    let found = Header::read(source).and_then(|h| h.layout(source.len()).map(|l| (h, l)));
    let (header, layout) = match found {
        Ok(found) => found,
        Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Limit) => {
            return Ok(Err(CheckReport::hopeless(&e)));
        }
        Err(e) => return Err(e),
    };
    let mut table = Vec::new();
    table::for_each(source, &layout, |_, value| table.push(value))?;
    let mut e = Examined { header, layout, table, file_bytes: source.len(), report: CheckReport::default() };
    e.judge();
    Ok(Ok(e))
}

impl Examined {
    pub(super) fn is_fixed(&self) -> bool {
        self.header.kind() == Kind::Fixed
    }

    fn judge(&mut self) {
        let mut report = CheckReport { blocks: u64::from(self.layout.blocks), ..CheckReport::default() };
        for broken in self.header.broken_rules(&self.layout) {
            report.add(Severity::Corruption, broken.count_alone, broken.what);
        }
        let used = survey(self.table.iter().copied(), &self.layout, self.file_bytes, |fault| {
            report.add(Severity::Corruption, true, fault.describe(&self.layout, self.file_bytes));
        });
        let named = self.table.iter().filter(|v| matches!(Entry::of(**v), Entry::At(_)));
        report.allocated = u64::try_from(named.count()).expect("a table has less than 2^32 entries");
        self.judge_count(&used, &mut report);
        if !self.is_fixed() {
            self.judge_slack(&used, &mut report);
        }
        self.report = report;
    }

    fn judge_count(&self, used: &Used, report: &mut CheckReport) {
        let count = self.header.allocated();
        let right = if self.is_fixed() { self.layout.blocks } else { used.high_water };
        if count < used.high_water {
            let what = format!(
                "the count of allocated blocks is {count} but place {} is in use; the next block another \
                 program adds would overwrite one",
                used.high_water - 1
            );
            report.add(Severity::Corruption, true, what);
        } else if count != right && count <= self.layout.blocks {
            let what = format!("the count of allocated blocks is {count}; {right} are in use");
            report.add(Severity::Leak, true, what);
        }
    }

    fn judge_slack(&self, used: &Used, report: &mut CheckReport) {
        let holes = u64::from(used.high_water) - u64::try_from(used.places.count()).expect("fits");
        if holes > 0 {
            let what = format!("{holes} places of {} belong to no block", used.high_water);
            report.add(Severity::Leak, true, what);
        }
        let end = self.layout.end_of(used.high_water);
        if HostOffset(self.file_bytes) > end {
            let what = format!("{} bytes at the end of the file belong to no block", self.file_bytes - end.0);
            report.add(Severity::Leak, true, what);
        }
    }
}
