//! `vdimg move`.

use super::args::Move;
use super::terminal;
use vdblk::Result;
use vdblk::job::{self, move_image};

pub(crate) fn run(args: &Move) -> Result<u8> {
    terminal::end_in_order();
    let how =
        job::MoveImage { image: args.image.open(&args.file, None, args.lock)?, target: args.target.clone() };
    terminal::watched(|watch| move_image(&how, watch))?;
    Ok(0)
}
