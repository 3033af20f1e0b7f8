//! vdimg: makes, converts, compares, checks, repairs, resizes, merges, rebases and looks at disk images. Arguments in, library calls out.

#[path = "vdimg/args.rs"]
mod args;
#[path = "vdimg/bytes.rs"]
mod bytes;
#[path = "vdimg/cache.rs"]
mod cache;
#[path = "vdimg/check.rs"]
mod check;
#[path = "vdimg/compact.rs"]
mod compact;
#[path = "vdimg/compare.rs"]
mod compare;
#[path = "vdimg/crypt.rs"]
mod crypt;
#[path = "vdimg/formats.rs"]
mod formats;
#[path = "vdimg/info.rs"]
mod info;
#[path = "vdimg/io.rs"]
mod io;
#[path = "common/keys.rs"]
mod keys;
#[path = "vdimg/make.rs"]
mod make;
#[path = "vdimg/map.rs"]
mod map;
#[path = "vdimg/medium.rs"]
mod medium;
#[path = "vdimg/merge.rs"]
mod merge;
#[path = "vdimg/mount.rs"]
mod mount;
#[path = "vdimg/pages.rs"]
mod pages;
#[path = "vdimg/properties.rs"]
mod properties;
#[path = "vdimg/rebase.rs"]
mod rebase;
#[path = "vdimg/relocate.rs"]
mod relocate;
#[path = "vdimg/resize.rs"]
mod resize;
#[path = "vdimg/terminal.rs"]
mod terminal;
#[path = "common/usage.rs"]
mod usage;

use args::{Cli, Command};
use clap::Parser;
use std::process::ExitCode;
use vdblk::Result;

/// The name in messages.
const PROGRAM: &str = "vdimg";

fn main() -> ExitCode {
    terminal::show_warnings();
    terminal::survive_file_size_limits();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage::refuse(PROGRAM, &e),
    };
    terminal::show_progress(cli.progress);
    let trouble = cli.command.trouble_status();
    match run(cli.command) {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            usage::tell(PROGRAM, &e.to_string());
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
        Command::Clone(a) => make::clone(&a),
        Command::Compare(a) => compare::run(&a),
        Command::Diff(a) => compare::diff(&a),
        Command::Check(a) => check::check(&a),
        Command::Repair(a) => check::repair(&a),
        Command::Resize(a) => resize::run(&a),
        Command::Compact(a) => compact::run(&a),
        Command::Merge(a) => merge::run(&a),
        Command::Encrypt(a) => crypt::encrypt(&a),
        Command::Decrypt(a) => crypt::decrypt(&a),
        Command::Rekey(a) => crypt::rekey(&a),
        Command::Move(a) => relocate::run(&a),
        Command::Rebase(a) => rebase::run(&a),
        Command::SetUuid(a) => properties::set_uuid(&a),
        Command::Comment(a) => properties::comment(&a),
        Command::Geometry(a) => properties::geometry(&a),
        Command::CreateCache(a) => cache::create(&a),
        Command::Map(a) => map::run(&a),
        Command::Io(a) => io::run(&a),
        Command::Mount(a) => mount::run(&a),
        Command::Medium(a) => medium::run(&a),
        Command::Cat(a) => bytes::cat(&a),
        Command::Dd(a) => bytes::dd(&a),
        Command::Bench(a) => bytes::bench(&a),
        Command::Formats(a) => formats::run(&a),
        Command::Completions(a) => pages::completions(&a),
        Command::ManPages(a) => pages::man_pages(&a),
    }
}
