//! What is wrong with a VHDX, as far as it can be told.

use super::super::report::{CheckReport, Severity};
use super::bat::{Fault, Place};
use super::map::Parts;
use crate::error::{ErrorKind, Result};
use crate::map::ByteSource;

/// A VHDX whose blocks can be found, as its log leaves it.
#[derive(Debug)]
pub(super) struct Examined {
    pub(super) parts: Parts,
    pub(super) table: Vec<u64>,
    pub(super) faults: Vec<Fault>,
    pub(super) file_bytes: u64,
    pub(super) report: CheckReport,
}

/// Checks an image without its parents, as its log leaves it.
///
/// # Errors
/// [`ErrorKind::NotThisFormat`], [`ErrorKind::Unsupported`], and those of reading.
pub(super) fn check(source: &dyn ByteSource) -> Result<CheckReport> {
    Ok(match examine(source)? {
        Ok(examined) => examined.report,
        Err(hopeless) => hopeless,
    })
}

/// The inner error is the report on an image whose table cannot even be found.
pub(super) fn examine(source: &dyn ByteSource) -> Result<std::result::Result<Examined, CheckReport>> {
    let parts = match Parts::read(source) {
        Ok(parts) => parts,
        Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Limit) => {
            return Ok(Err(CheckReport::hopeless(&e)));
        }
        Err(e) => return Err(e),
    };
    let (table, file_bytes) = (parts.table(source)?, source.len());
    let mut report = CheckReport { blocks: parts.layout.blocks, ..CheckReport::default() };
    let mut faults = Vec::new();
    let is_sound = parts.layout.is_sound(&table, &parts.taken(), file_bytes);
    // the tests hold one against the other
    if !is_sound || cfg!(debug_assertions) {
        parts.layout.survey(&table, &parts.taken(), file_bytes, |fault| {
            debug_assert!(!is_sound, "a table that was said to be sound: {}", fault.describe(file_bytes));
            report.add(Severity::Corruption, fault.is_repairable(), fault.describe(file_bytes));
            faults.push(fault);
        });
    }
    report.allocated = parts.layout.places(&table).filter(Place::is_block).count() as u64;
    if !parts.regions.both_are_good {
        report.add(Severity::Corruption, true, "one of the two tables of regions is damaged".into());
    }
    judge_log(&parts, &mut report)?;
    let tail = file_bytes.saturating_sub(parts.used_end(&table));
    if tail > 0 {
        report.add(Severity::Leak, true, format!("{tail} bytes at the end of the file belong to no block"));
    }
    Ok(Ok(Examined { parts, table, faults, file_bytes, report }))
}

/// Writers change one header after the other, and a log waits for its replay: what a killed one leaves is in no danger.
fn judge_log(parts: &Parts, report: &mut CheckReport) -> Result<()> {
    if !parts.headers.both_are_good {
        report.add(Severity::Leak, true, "one of the two headers is not good; the other is used".into());
    }
    if !parts.patches.0.is_empty() {
        let what = format!("the log has {} sectors that are not in their places yet", parts.patches.0.len());
        report.add(Severity::Leak, true, what);
    } else if parts.headers.current.log()?.is_some() {
        // QEMU opens such an image for writing only.
        let what =
            "it was not closed, or is open elsewhere: its headers name a log, in which nothing is left";
        report.add(Severity::Leak, true, what.into());
    }
    Ok(())
}
