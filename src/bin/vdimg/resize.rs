//! `vdimg resize`.

use super::args::Resize;
use super::terminal;
use vdblk::Result;
use vdblk::job::{self, resize_image};
use vdblk::vd::OpenDisk;

pub(crate) fn run(args: &Resize) -> Result<u8> {
    terminal::end_in_order();
    let how = job::Resize {
        image: OpenDisk {
            allow_write_to_parent: args.allow_write_to_parent,
            ..args.image.open(&args.file, None, args.lock)?
        },
        size: args.size,
        shrink: args.shrink,
    };
    terminal::watched(|watch| resize_image(&how, watch))?;
    Ok(0)
}
