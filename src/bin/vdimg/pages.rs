//! `vdimg completions` and `vdimg manpages`: from the same definitions as the command line.

use super::args::{Cli, Completions, ManPages};
use super::terminal::print;
use clap::CommandFactory;
use vdblk::{Error, Result};

pub(crate) fn completions(args: &Completions) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "vdimg", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}

pub(crate) fn man_pages(args: &ManPages) -> Result<u8> {
    clap_mangen::generate_to(Cli::command(), &args.dir)
        .map_err(|e| Error::io("write the man pages", e).at(&args.dir))?;
    Ok(0)
}
