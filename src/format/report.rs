//! What checks find and what repairs do, for all formats.

use super::FileStep;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::MAX_CHECK_LINES;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Data is lost or will be once somebody writes.
    Corruption,
    /// Space nobody uses; no data is in danger.
    Leak,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// One line.
    pub text: String,
    /// [`super::repair`] can put it right.
    pub repairable: bool,
}

/// Everything a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// The first [`MAX_CHECK_LINES`] findings; the counts below are of all.
    pub findings: Vec<Finding>,
    /// Findings that are corruptions.
    pub corruptions: u64,
    /// Findings that are leaks.
    pub leaks: u64,
    /// Corruptions that cannot be repaired.
    pub unrepairable: u64,
    /// Blocks of the disk; 0 where the header does not let them be found.
    pub blocks: u64,
    /// Blocks that have a place.
    pub allocated: u64,
}

impl CheckReport {
    /// Nothing was found.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }

    /// Exit status of a check: 0 clean, 2 corrupt, 3 leaks only (qemu-img's numbers).
    pub fn exit_code(&self) -> u8 {
        match (self.corruptions, self.leaks) {
            (0, 0) => 0,
            (0, _) => 3,
            _ => 2,
        }
    }

    /// # Errors
    /// [`ErrorKind::Corrupt`] for a damaged image: what changes all of it relies on all of it.
    pub(super) fn refuse_damage(&self) -> Result<()> {
        let Some(first) = self.findings.iter().find(|f| f.severity == Severity::Corruption) else {
            return Ok(());
        };
        let hint =
            if self.unrepairable > 0 { "take another copy of the image" } else { "run vdimg repair first" };
        Err(Error::new(ErrorKind::Corrupt, format!("is damaged: {}", first.text)).hint(hint))
    }

    /// One more finding.
    pub(crate) fn add(&mut self, severity: Severity, repairable: bool, text: String) {
        match severity {
            Severity::Corruption => self.corruptions += 1,
            Severity::Leak => self.leaks += 1,
        }
        self.unrepairable += u64::from(!repairable);
        if self.findings.len() < MAX_CHECK_LINES {
            self.findings.push(Finding { severity, text, repairable });
        }
    }

    /// The report on an image of which nothing more can be said than why it does not open.
    pub(crate) fn hopeless(why: &Error) -> Self {
        let mut report = CheckReport::default();
        report.add(Severity::Corruption, false, why.to_string());
        report
    }
}

/// What a repair will do.
#[derive(Clone, Debug, Default)]
pub struct Repair {
    /// What was found.
    pub report: CheckReport,
    /// What will be done about it, a line each: [`MAX_CHECK_LINES`] at most, and two with sums.
    pub lines: Vec<String>,
    /// The steps; empty for a clean image.
    pub steps: Vec<FileStep>,
}
