//! `vdimg create`, `vdimg convert` and `vdimg clone`.

use super::args::{Clone, Convert, Create, TargetCache};
use super::terminal;
use std::path::Path;
use vdblk::filter::Filters;
use vdblk::format::{Format, NewParent, extension_format};
use vdblk::job::{
    self, CreateImage, Inspected, RawDiskWish, create_image, inspect_image_with, look_at_raw_disk, named_from,
};
use vdblk::vd::{CacheMode, OpenDisk, OpenedDisk, open_disk};
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
    let mut how = job::Convert {
        source: args.image.open(&args.source, args.snapshot.snapshot.as_ref(), args.lock)?,
        target: args.target.clone(),
        format: args.output_format.map_or_else(|| format_of_name(&args.target), Ok)?,
        filters: Filters::default(),
        variant: args.variant.clone(),
        options: args.options.clone(),
        cache: match args.target_cache {
            TargetCache::None => CacheMode::None,
            TargetCache::Writeback => CacheMode::Writeback,
            TargetCache::Unsafe => CacheMode::Unsafe,
        },
    };
    args.new_keys.with_filters(|filters| {
        how.filters = filters;
        terminal::watched(|watch| job::convert(&how, watch))
    })?;
    Ok(0)
}

pub(crate) fn clone(args: &Clone) -> Result<u8> {
    terminal::end_in_order();
    let source = args.image.open(&args.source, args.snapshot.snapshot.as_ref(), args.lock)?;
    let own = inspect_image_with(&source.image, args.image.parents.allow_raw_device)?;
    if !own.format.can_be_created() {
        let what = format!("{} images are not made", own.format);
        let e = Error::new(ErrorKind::Unsupported, what).at(&args.source);
        return Err(e.hint("vdimg convert makes one of another format"));
    }
    let mut how = job::Convert {
        source,
        target: args.target.clone(),
        format: own.format,
        filters: Filters::default(),
        variant: variant_of(&own),
        options: options_of(&own),
        cache: CacheMode::Writeback,
    };
    args.new_keys.with_filters(|filters| {
        how.filters = filters;
        terminal::watched(|watch| job::convert(&how, watch))
    })?;
    Ok(0)
}

/// The format that a new file's name says.
fn format_of_name(target: &Path) -> Result<Format> {
    extension_format(target).ok_or_else(|| {
        let e = Error::new(ErrorKind::InvalidArgument, "its name does not say in which format it is to be");
        e.at(target).hint("say so with --output-format")
    })
}

/// The variant of a new image that is like this one; `None`: the one that is made if nothing is said.
fn variant_of(image: &Inspected) -> Option<String> {
    let known = ["fixed", "split2g", "split2g-flat", "esx", "stream"];
    let name = if image.info.variant == "flat" { "fixed" } else { image.info.variant };
    known.contains(&name).then(|| name.to_string())
}

/// Its size of blocks, where that can be said.
fn options_of(image: &Inspected) -> Vec<(String, String)> {
    let key = match image.format {
        Format::Vdi => "AllocationBlockSize",
        Format::Qcow2 | Format::Qed | Format::Qcow => "cluster_size",
        _ => return Vec::new(),
    };
    let block = image.info.block_size.map(|b| (key.to_string(), b.to_string()));
    let compat = (image.format == Format::Qcow2 && image.info.version.as_deref() == Some("2"))
        .then(|| ("compat".to_string(), "0.10".to_string()));
    block.into_iter().chain(compat).collect()
}
