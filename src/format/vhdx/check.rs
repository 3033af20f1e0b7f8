//! What is wrong with a VHDX, as far as it can be told.

use super::super::report::{CheckReport, Severity};
use super::map::Parts;
use crate::error::{ErrorKind, Result};
use crate::map::ByteSource;

/// Checks an image without its parents, as its log leaves it. What is wrong with the table of blocks is not repaired.
///
/// # Errors
/// [`ErrorKind::NotThisFormat`], [`ErrorKind::Unsupported`], and those of reading.
pub(super) fn check(source: &dyn ByteSource) -> Result<CheckReport> {
    let parts = match Parts::read(source) {
        Ok(parts) => parts,
        Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Limit) => {
            return Ok(CheckReport::hopeless(&e));
        }
        Err(e) => return Err(e),
    };
    let table = parts.table(source)?;
    let mut report = CheckReport { blocks: parts.layout.blocks, ..CheckReport::default() };
    let places = parts.layout.survey(&table, &parts.taken(), source.len(), |what| {
        report.add(Severity::Corruption, false, what);
    });
    report.allocated = places.iter().filter(|p| p.block.is_some()).count() as u64;
    if !parts.regions.both_are_good {
        report.add(Severity::Corruption, true, "one of the two tables of regions is damaged".into());
    }
    // Writers change one header after the other, and a log waits for its replay: what a killed one leaves is in no danger.
    if !parts.headers.both_are_good {
        report.add(Severity::Leak, true, "one of the two headers is not good; the other is used".into());
    }
    if !parts.patches.0.is_empty() {
        let what = format!("the log has {} sectors that are not in their places yet", parts.patches.0.len());
        report.add(Severity::Leak, true, what);
    }
    Ok(report)
}
