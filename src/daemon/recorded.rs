//! Disks with a record of their chain: which image is opened, and what a crash has left beside it.

use super::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::format::extension_format;
use crate::job::inspect_image;
use crate::limits::MAX_PARENT_SEARCH_FILES;
use crate::live::RecordFile;
use crate::live::record::{self, Recorded};
use crate::vd::{ImageSpec, OpenDisk};
use std::fs;
use std::path::Path;

/// The record of the disk, if it has one.
pub(super) fn record_of(config: &Config) -> Option<RecordFile> {
    let path = config.record.clone()?;
    Some(RecordFile { path, began: config.image.path.clone() })
}

/// What is to be opened in place of the image that was named, if a record says so.
///
/// # Errors
/// If the record is of another disk, or no record.
pub(super) fn follow(config: &Config, how: OpenDisk) -> Result<OpenDisk> {
    let Some(path) = &config.record else { return Ok(how) };
    let Some(recorded) = record::load(path)? else { return Ok(how) };
    if !is_same(&recorded.began, &config.image.path) {
        let what =
            format!("is the record of {}, not of {}", recorded.began.display(), config.image.path.display());
        return Err(Error::new(ErrorKind::InvalidArgument, what).at(path).hint("name a record that is free"));
    }
    remove_unserved(&recorded);
    let (top, below) = recorded.chain.split_first().expect("a record names an image");
    if !is_same(&top.path, &config.image.path) {
        tracing::info!("{}: the disk is served from {} by now", path.display(), top.path.display());
    }
    let mut how = OpenDisk { image: top.clone(), ..how };
    // Where images are missing somebody has changed the chain since; then the images say what their parents are.
    if how.parents.is_empty() || below.iter().all(|i| i.path.exists()) {
        how.parents = below.iter().rev().filter(|_| below.iter().all(|i| i.path.exists())).cloned().collect();
    }
    Ok(how)
}

/// Longest file that is looked at to see whether it is a record.
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// A record in the folder of an image that is to be written has it beneath another one: writing to it would change that one's disk.
///
/// # Errors
/// [`ErrorKind::ReadOnly`], naming both.
pub(super) fn refuse_parent_in_record(image: &Path) -> Result<()> {
    let folder = image.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let files = fs::read_dir(folder).into_iter().flatten().flatten().take(MAX_PARENT_SEARCH_FILES);
    for file in files.map(|e| e.path()).filter(|p| may_be_record(p)) {
        let Ok(Some(recorded)) = record::load(&file) else { continue };
        if recorded.chain.iter().skip(1).any(|i| is_same(&i.path, image)) {
            let (record, top) = (file.display(), recorded.chain[0].path.display());
            let what =
                format!("is beneath {top} by the record {record}: writing to it would change that disk");
            return Err(Error::new(ErrorKind::ReadOnly, what).at(image).hint(
                "serve it with --record, use --overlay or --read-only, or pass --allow-write-to-parent",
            ));
        }
    }
    Ok(())
}

fn may_be_record(path: &Path) -> bool {
    let is_small = |m: fs::Metadata| m.is_file() && m.len() <= MAX_RECORD_BYTES;
    extension_format(path).is_none()
        && !record::is_unfinished(path)
        && fs::symlink_metadata(path).is_ok_and(is_small)
}

/// The same file, or, if one of them has gone, the same name.
fn is_same(a: &Path, b: &Path) -> bool {
    match (fs::canonicalize(a), fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => std::path::absolute(a).ok() == std::path::absolute(b).ok(),
    }
}

/// A snapshot was being made when the daemon ended: its image has never been served, and would keep the one beneath from being
/// written to. Only an image that says to be above that one is removed; any other file is not ours.
fn remove_unserved(recorded: &Recorded) {
    let Some(making) = recorded.making.as_deref().filter(|p| p.exists()) else { return };
    let above = |file: &Path| -> Result<bool> {
        let top = inspect_image(&recorded.chain[0])?;
        let new = inspect_image(&ImageSpec { path: file.to_path_buf(), format: None })?.info;
        let by_name =
            new.parent_names.iter().any(|n| Path::new(n).file_name() == recorded.chain[0].path.file_name());
        Ok(new.parent_uuid.map_or(by_name, |parent| Some(parent) == top.info.uuid || by_name))
    };
    let name = making.display();
    match above(making) {
        Ok(true) => match fs::remove_file(making) {
            Ok(()) => tracing::info!("{name}: was being made when the daemon ended, and is removed"),
            Err(e) => tracing::warn!("{name}: was being made when the daemon ended: {e}"),
        },
        Ok(false) => tracing::warn!(
            "{name}: is left; a snapshot of that name was being made, but this is no child of the disk's image"
        ),
        Err(e) => tracing::warn!("{name}: is left; a snapshot of that name was being made: {e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    #[test]
    fn a_record_that_was_never_finished_keeps_nobody_from_writing() {
        let dir = tempfile::tempdir().unwrap();
        let images = ["top.vdi", "below.vdi"].map(|n| dir.path().join(n));
        images.iter().for_each(|p| fs::write(p, "x").unwrap());
        let chain = images.iter().map(|p| ImageSpec { path: p.clone(), format: Some(Format::Vdi) }).collect();
        let path = dir.path().join("record");
        record::store(&path, &Recorded { began: images[1].clone(), chain, making: None }).unwrap();
        assert_eq!(refuse_parent_in_record(&images[1]).unwrap_err().kind(), ErrorKind::ReadOnly);
        refuse_parent_in_record(&images[0]).unwrap();
        // killed before it had its name: the disk is served from the image that was on top before
        fs::rename(&path, dir.path().join(".record.new")).unwrap();
        refuse_parent_in_record(&images[1]).unwrap();
    }
}
