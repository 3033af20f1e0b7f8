//! `vdimg compact`.

use super::args::Compact;
use super::terminal;
use vdblk::Result;
use vdblk::job::{compact_image, human_bytes};

pub(crate) fn run(args: &Compact) -> Result<u8> {
    terminal::end_in_order();
    for file in &args.files {
        let how = args.image.open(file, None, args.lock)?;
        let done = terminal::watched(|watch| compact_image(&how, watch))?;
        let (before, after) = (human_bytes(done.before), human_bytes(done.after));
        terminal::print(&format!("{}: {before} before, {after} now\n", file.display()))?;
    }
    Ok(0)
}
