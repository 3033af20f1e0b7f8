//! `vdimg io`.

use super::args::Io;
use super::terminal::print;
use std::io::BufRead;
use vdblk::job::{Command, Script};
use vdblk::vd::{DiskOptions, OpenDisk, open_disk};
use vdblk::{Error, Result};

pub(crate) fn run(args: &Io) -> Result<u8> {
    let read_only = args.read_only || args.snapshot.snapshot.is_some();
    let opened = open_disk(&OpenDisk {
        allow_write_to_parent: args.allow_write_to_parent,
        options: DiskOptions { read_only, ..DiskOptions::default() },
        ..args.image.open(&args.file, args.snapshot.snapshot.as_ref(), args.lock)?
    })?;
    let mut script = Script::new(&opened.disk)?;
    let ran = if args.commands.is_empty() { run_input(&mut script) } else { run_all(&mut script, args) };
    // Closed cleanly whatever came of the commands; the first error is the one to tell.
    let closed = script.close().map_err(|e| e.at(&args.file));
    ran.map_err(|e| e.at(&args.file)).and(closed)?;
    Ok(0)
}

fn run_all(script: &mut Script, args: &Io) -> Result<()> {
    args.commands.iter().try_for_each(|c| run_one(script, *c))
}

/// One command a line; empty lines and those that begin with # are passed over.
fn run_input(script: &mut Script) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::io("read standard input", e))?;
        let line = line.trim();
        if !line.is_empty() && !line.starts_with('#') {
            run_one(script, line.parse()?)?;
        }
    }
    Ok(())
}

fn run_one(script: &mut Script, command: Command) -> Result<()> {
    let mut out = String::new();
    let ran = script.run(command, &mut out);
    print(&out)?;
    ran
}
