//! `vdimg check` and `vdimg repair`.

use super::args::{Check, Output, Repair};
use super::terminal;
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;
use vdblk::Result;
use vdblk::format::{CheckReport, Format, Severity};
use vdblk::job::{Checked, Repaired, check_cache, check_image_with, repair_image_with};

pub(crate) fn check(args: &Check) -> Result<u8> {
    let named = args.image.format.is_some();
    if let (false, Some(report)) = (named, check_cache(&args.file, args.lock.wait())?) {
        let text = match args.output {
            Output::Human => describe(&report),
            Output::Json => json(&args.file, "vci", Some(&report)),
        };
        terminal::print(&text)?;
        return Ok(report.exit_code());
    }
    let Checked { format, report } = {
        let allow_raw_device = args.image.parents.allow_raw_device;
        check_image_with(&args.image.spec(&args.file), args.lock.wait(), allow_raw_device)?
    };
    if report.is_none() && args.output == Output::Human {
        return nothing_to_do(format);
    }
    let status = report.as_ref().map_or(0, CheckReport::exit_code);
    let text = match (args.output, &report) {
        (Output::Human, Some(report)) => describe(report),
        _ => json(&args.file, format.name(), report.as_ref()),
    };
    terminal::print(&text)?;
    Ok(status)
}

/// What `--output json` prints. The names are a promise.
#[derive(Serialize)]
struct Json<'a> {
    file: String,
    format: &'a str,
    /// `clean`, `leaks`, `corrupt`, or `nothing-to-check`.
    result: &'a str,
    corruptions: u64,
    leaks: u64,
    /// Corruptions that repair cannot put right.
    unrepairable: u64,
    blocks: Option<u64>,
    allocated_blocks: Option<u64>,
    /// The first ones; the counts are of all.
    findings: Vec<JsonFinding<'a>>,
}

#[derive(Serialize)]
struct JsonFinding<'a> {
    /// `corruption` or `leak`.
    severity: &'a str,
    text: &'a str,
    repairable: bool,
}

fn json(file: &Path, format: &str, report: Option<&CheckReport>) -> String {
    let none = CheckReport::default();
    let r = report.unwrap_or(&none);
    let findings = r.findings.iter().map(|f| JsonFinding {
        severity: match f.severity {
            Severity::Corruption => "corruption",
            Severity::Leak => "leak",
        },
        text: &f.text,
        repairable: f.repairable,
    });
    let json = Json {
        file: file.display().to_string(),
        format,
        result: match (report, r.corruptions, r.leaks) {
            (None, ..) => "nothing-to-check",
            (_, 0, 0) => "clean",
            (_, 0, _) => "leaks",
            _ => "corrupt",
        },
        corruptions: r.corruptions,
        leaks: r.leaks,
        unrepairable: r.unrepairable,
        blocks: report.map(|r| r.blocks),
        allocated_blocks: report.map(|r| r.allocated),
        findings: findings.collect(),
    };
    serde_json::to_string_pretty(&json).expect("numbers and texts") + "\n"
}

pub(crate) fn repair(args: &Repair) -> Result<u8> {
    terminal::end_in_order();
    let spec = args.image.spec(&args.file);
    let (wait, allow) = (args.lock.wait(), args.image.parents.allow_raw_device);
    let done = terminal::watched(|watch| repair_image_with(&spec, args.dry_run, wait, allow, watch))?;
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
        let s = |n: u64| if n == 1 { "" } else { "s" };
        let (c, l) = (report.corruptions, report.leaks);
        let _ = writeln!(t, "{c} corruption{}, {l} leak{}.", s(c), s(l));
    }
    t
}
