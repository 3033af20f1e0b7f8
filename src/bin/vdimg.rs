//! vdimg: makes, converts, compares, checks, repairs and looks at disk images. Arguments in, library calls out.

#[path = "vdimg/args.rs"]
mod args;
#[path = "vdimg/check.rs"]
mod check;
#[path = "vdimg/compare.rs"]
mod compare;
#[path = "vdimg/info.rs"]
mod info;
#[path = "vdimg/io.rs"]
mod io;
#[path = "vdimg/make.rs"]
mod make;
#[path = "vdimg/map.rs"]
mod map;
#[path = "vdimg/terminal.rs"]
mod terminal;

use args::{Cli, Command};
use clap::Parser;
use clap::error::ErrorKind;
use std::process::ExitCode;
use vdblk::Result;

/// Exit status where the command line makes no sense.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    terminal::show_warnings();
    terminal::survive_file_size_limits();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return refuse_usage(&e),
    };
    let trouble = cli.command.trouble_status();
    match run(cli.command) {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            eprintln!("vdimg: {e}");
            ExitCode::from(trouble)
        }
    }
}

/// Carries out the command; the answer is the exit status.
fn run(command: Command) -> Result<u8> {
    match command {
        Command::Info(a) => info::run(&a),
        Command::Create(a) => make::create(&a),
        Command::Convert(a) => make::convert(&a),
        Command::Compare(a) => compare::run(&a),
        Command::Check(a) => check::check(&a),
        Command::Repair(a) => check::repair(&a),
        Command::Map(a) => map::run(&a),
        Command::Io(a) => io::run(&a),
    }
}

/// Help and version as clap prints them; anything else as one line.
fn refuse_usage(e: &clap::Error) -> ExitCode {
    if !e.use_stderr() {
        let _ = e.print();
        return ExitCode::SUCCESS;
    }
    if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        eprintln!("vdimg: no command was given (see vdimg --help)");
    } else {
        eprintln!("vdimg: {}", one_line(&e.render().to_string()));
    }
    ExitCode::from(USAGE)
}

/// clap's message without the usage, which --help shows.
fn one_line(rendered: &str) -> String {
    let said = rendered.split("\nUsage:").next().unwrap_or(rendered);
    let said = said.split("\nFor more information").next().unwrap_or(said);
    let words: Vec<_> = said.split_whitespace().collect();
    let line = words.join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    format!("{line} (see vdimg --help)")
}
