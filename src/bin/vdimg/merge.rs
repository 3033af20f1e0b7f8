//! `vdimg merge`.

use super::args::Merge;
use super::terminal;
use vdblk::Result;
use vdblk::job::{self, merge_images};
use vdblk::vd::OpenDisk;

pub(crate) fn run(args: &Merge) -> Result<u8> {
    terminal::end_in_order();
    let how = job::Merge {
        chain: OpenDisk {
            allow_write_to_parent: args.allow_write_to_parent,
            ..args.image.open(&args.top, None, args.lock)?
        },
        from: args.from.clone(),
        into: args.into.clone(),
        keep: args.keep,
    };
    let done = terminal::watched(|watch| merge_images(&how, watch))?;
    for path in &done.spent {
        let what = if done.removed.contains(path) { "removed" } else { "not needed any more" };
        terminal::print(&format!("{}: merged into {}, {what}\n", path.display(), done.into.display()))?;
    }
    for path in done.removed.iter().filter(|p| !done.spent.contains(p)) {
        terminal::print(&format!("{}: removed\n", path.display()))?;
    }
    for (path, why) in &done.left {
        terminal::print(&format!("{}: not removed: {why}\n", path.display()))?;
    }
    Ok(0)
}
