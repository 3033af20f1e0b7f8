//! `vdimg check` and `vdimg repair`.

use super::args::{Check, Repair};
use super::terminal;
use std::fmt::Write;
use vdblk::Result;
use vdblk::format::Format;
use vdblk::format::vdi::{CheckReport, Severity};
use vdblk::job::{Checked, Repaired, check_image, repair_image};

pub(crate) fn check(args: &Check) -> Result<u8> {
    match check_image(&args.image.spec(&args.file), args.lock.wait())? {
        Checked::NothingToCheck(format) => nothing_to_do(format),
        Checked::Report(report) => {
            terminal::print(&describe(&report))?;
            Ok(report.exit_code())
        }
    }
}

pub(crate) fn repair(args: &Repair) -> Result<u8> {
    terminal::end_in_order();
    let spec = args.image.spec(&args.file);
    let done = terminal::watched(|watch| repair_image(&spec, args.dry_run, args.lock.wait(), watch))?;
    let (before, lines, after) = match done {
        Repaired::NothingToRepair(format) => return nothing_to_do(format),
        Repaired::Report { before, lines, after } => (before, lines, after),
    };
    let mut text = describe(&before);
    // Writing to a String does not fail.
    for line in &lines {
        let _ = writeln!(text, "{}{line}", if args.dry_run { "would repair: " } else { "repaired: " });
    }
    if before.is_clean() {
        text.push_str("Nothing to repair.\n");
    }
    if let (false, Some(after)) = (before.is_clean(), &after) {
        text.push_str("After the repair: ");
        text.push_str(&describe(after));
    }
    terminal::print(&text)?;
    Ok(after.as_ref().unwrap_or(&before).exit_code())
}

fn nothing_to_do(format: Format) -> Result<u8> {
    terminal::print(&format!("A {format} image has nothing to check.\n"))?;
    Ok(0)
}

/// Every finding a line, the sums last.
fn describe(report: &CheckReport) -> String {
    let mut t = String::new();
    for f in &report.findings {
        let name = match f.severity {
            Severity::Corruption => "corrupt",
            Severity::Leak => "leak",
        };
        let hopeless = if f.repairable { "" } else { " (cannot be repaired)" };
        let _ = writeln!(t, "{name}: {}{hopeless}", f.text);
    }
    let all = report.corruptions.saturating_add(report.leaks);
    let more = all.saturating_sub(report.findings.len() as u64);
    if more > 0 {
        let _ = writeln!(t, "… and {more} more");
    }
    if report.is_clean() {
        let _ = writeln!(t, "No errors; {} of {} blocks are allocated.", report.allocated, report.blocks);
    } else {
        let _ = writeln!(t, "{} corruptions, {} leaks.", report.corruptions, report.leaks);
    }
    t
}
