//! `vdimg create` and `vdimg convert`.

use super::args::{Convert, Create};
use super::terminal;
use vdblk::format::NewParent;
use vdblk::job::{self, CreateImage, RawDiskWish, create_image, look_at_raw_disk, named_from};
use vdblk::vd::{OpenDisk, OpenedDisk, open_disk};
use vdblk::{Error, ErrorKind, Result};

pub(crate) fn create(args: &Create) -> Result<u8> {
    // Open until the image is made: nobody may change the parent meanwhile.
    let parent = open_parent(args)?;
    let parent_info = parent.as_ref().map(|p| p.images[0].info.clone());
    let wish = args.raw_device.as_ref().map(|device| RawDiskWish {
        device: device.clone(),
        partitions: args.partitions.clone(),
        relative: args.relative,
        read_only: args.raw_read_only,
    });
    let raw_disk = wish.as_ref().map(look_at_raw_disk).transpose()?;
    let (raw_disk, raw_size) = raw_disk.unzip();
    let size = args.size.or(raw_size).or(parent_info.as_ref().map(|p| p.virtual_size));
    let Some(size_bytes) = size else {
        return Err(Error::new(ErrorKind::InvalidArgument, "no size: give --size or --parent"));
    };
    // The geometry belongs to a size.
    let of_parent = parent_info.as_ref().filter(|p| p.virtual_size == size_bytes).and_then(|p| p.geometry);
    let geometry = args.format.geometry_from(of_parent);
    let parent = args.parents.parents.last().zip(parent_info);
    let parent = parent.map(|(spec, info)| NewParent { info, path: named_from(&args.file, &spec.path) });
    create_image(&CreateImage {
        variant: args.variant.clone(),
        uuid: args.uuid,
        parent,
        comment: args.comment.clone(),
        geometry,
        options: args.options.clone(),
        raw_disk,
        ..CreateImage::new(&args.file, args.format, size_bytes)
    })?;
    Ok(0)
}

/// The last parent that was named, on top of those before.
fn open_parent(args: &Create) -> Result<Option<OpenedDisk>> {
    let Some((last, before)) = args.parents.parents.split_last() else { return Ok(None) };
    let how = args.parents.open(last.clone(), args.lock);
    open_disk(&OpenDisk { parents: before.to_vec(), ..how }).map(Some)
}

pub(crate) fn convert(args: &Convert) -> Result<u8> {
    terminal::end_in_order();
    let how = job::Convert {
        source: args.image.open(&args.source, args.snapshot.snapshot.as_ref(), args.lock)?,
        target: args.target.clone(),
        format: args.output_format,
        variant: args.variant.clone(),
        options: args.options.clone(),
    };
    terminal::watched(|watch| job::convert(&how, watch))?;
    Ok(0)
}
