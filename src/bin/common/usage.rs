//! What both programs do with a command line: errors in one line, which ends up in logs, and values they both take.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// The exit status of a command line that makes no sense.
pub(crate) const WRONG_USAGE: u8 = 2;

/// One line for people. Where nobody can read it, the exit status has to do: `eprintln` would panic.
pub(crate) fn tell(program: &str, what: &str) {
    let _ = writeln!(std::io::stderr(), "{program}: {what}");
}

/// Help and version as they come, anything else as one line.
pub(crate) fn refuse(program: &str, e: &clap::Error) -> ExitCode {
    if !e.use_stderr() {
        // Whoever does not read it to its end has read enough.
        let _ = e.print();
        return ExitCode::SUCCESS;
    }
    let what = if e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        "no command was given".to_string()
    } else {
        one_line(&e.render().to_string())
    };
    tell(program, &format!("{what} (see {program} --help)"));
    ExitCode::from(WRONG_USAGE)
}

/// The message without the usage, which --help shows, its tips behind semicolons.
fn one_line(rendered: &str) -> String {
    let said = rendered.split("\nUsage:").next().unwrap_or(rendered);
    let said = said.split("\nFor more information").next().unwrap_or(said);
    let mut line = String::new();
    for part in said.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let (between, part) = match part.strip_prefix("tip:") {
            Some(tip) => ("; ", tip.trim()),
            None => (" ", part),
        };
        line.push_str(if line.is_empty() { "" } else { between });
        line.push_str(part);
    }
    line.strip_prefix("error: ").unwrap_or(&line).to_string()
}

/// A folder that has to be there.
pub(crate) fn existing_dir(path: &str) -> Result<PathBuf, String> {
    match std::fs::metadata(path) {
        Ok(m) if m.is_dir() => Ok(path.into()),
        Ok(_) => Err("it is not a folder".to_string()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err("there is no such folder".to_string()),
        Err(e) => Err(e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tips_do_not_run_into_the_message() {
        let rendered = "error: unexpected argument '--siez' found\n\n  tip: a similar argument exists: '--size'\n\n\
                        Usage: x create\n\nFor more information, try '--help'.\n";
        assert_eq!(
            one_line(rendered),
            "unexpected argument '--siez' found; a similar argument exists: '--size'"
        );
        let missing = "error: the following required arguments were not provided:\n  --format <FORMAT>\n  <FILE>\n\nUsage: x";
        assert_eq!(
            one_line(missing),
            "the following required arguments were not provided: --format <FORMAT> <FILE>"
        );
    }
}
