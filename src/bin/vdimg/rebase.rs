//! `vdimg rebase`.

use super::args::Rebase;
use super::terminal;
use vdblk::Result;
use vdblk::job::{self, rebase_image};
use vdblk::vd::{ImageSpec, OpenDisk};

pub(crate) fn run(args: &Rebase) -> Result<u8> {
    terminal::end_in_order();
    let is_one = !args.onto.is_empty();
    let onto = is_one.then(|| OpenDisk {
        parents: args.onto_parents.clone(),
        ..args
            .image
            .parents
            .open(ImageSpec { path: args.onto.clone().into(), format: args.onto_format }, args.lock)
    });
    let how = job::Rebase {
        image: OpenDisk {
            allow_write_to_parent: args.allow_write_to_parent,
            ..args.image.open(&args.file, None, args.lock)?
        },
        onto,
        only_name: args.only_name,
    };
    terminal::watched(|watch| rebase_image(&how, watch))?;
    Ok(0)
}
