//! Overlays: a differencing VDI takes the writes, and the image beneath stays as it is.

use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::job::{create_overlay, inspect_image};
use crate::vd::{DiskOptions, ImageSpec, OpenDisk, OpenImage, OpenedDisk, open_disk};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Opens the image with an overlay on top: a new one, or one that was made over this image before. The image's chain is
/// looked up once more, as the overlay's parents.
pub(super) fn open(how: OpenDisk, overlay: &Path) -> Result<(OpenedDisk, Fresh)> {
    let mut fresh = Fresh(None);
    let parents = {
        let below = open_disk(&how)?;
        let image = &below.images[0];
        let uuid = image.info.uuid.or_else(|| stand_in(image));
        match create_overlay(overlay, &image.info, uuid) {
            Ok(()) => fresh.0 = Some(overlay.to_path_buf()),
            Err(e) if e.kind() == ErrorKind::Exists => {
                refuse_unless_based_on(overlay, image, uuid, how.allow_parent_mismatch)?;
            }
            Err(e) => return Err(e),
        }
        let named = |i: &OpenImage| ImageSpec { path: i.path.clone(), format: Some(i.format) };
        below.images.iter().rev().map(named).collect()
    };
    let opened = open_disk(&OpenDisk {
        image: ImageSpec { path: overlay.to_path_buf(), format: Some(Format::Vdi) },
        parents,
        parent_dirs: Vec::new(),
        options: DiskOptions { read_only: false, ..how.options },
        ..how
    })?;
    if fresh.0.is_none() {
        let (overlay, image) = (overlay.display(), opened.images[1].path.display());
        tracing::info!(
            "{overlay}: is an overlay of {image} already; its contents are kept, writes go into it"
        );
    }
    Ok((opened, fresh))
}

/// An overlay that nobody has been served from yet. A start that fails takes it away again: left behind, it would keep its
/// parent from being written to. Empty for an overlay that was there before.
#[derive(Debug)]
pub(super) struct Fresh(Option<PathBuf>);

impl Fresh {
    /// There is no new overlay.
    pub(super) fn none() -> Self {
        Fresh(None)
    }

    /// Somebody may write to it from now on: it stays.
    pub(super) fn keep(&mut self) {
        self.0 = None;
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // What cannot be removed cannot be helped; the error of the start is told.
            let _ = fs::remove_file(path);
        }
    }
}

/// A file that exists is taken for the overlay of `image` only if it says so itself. `uuid` is what it has to name.
fn refuse_unless_based_on(
    overlay: &Path,
    image: &OpenImage,
    uuid: Option<Uuid>,
    any_parent: bool,
) -> Result<()> {
    let name = image.path.display();
    let refused = |what: String| Error::new(ErrorKind::Exists, what).at(overlay);
    let another = format!("it is left as it is; give --overlay a name that is free, or an overlay of {name}");
    let spec = ImageSpec { path: overlay.to_path_buf(), format: Some(Format::Vdi) };
    let there = match inspect_image(&spec) {
        Ok(there) => there.info,
        Err(e) if matches!(e.kind(), ErrorKind::NotThisFormat | ErrorKind::Corrupt) => {
            return Err(refused("exists and is no overlay: it is no readable VDI".into()).hint(another));
        }
        Err(e) => return Err(e),
    };
    let Some(parent) = there.parent_uuid.filter(|_| there.variant == "diff") else {
        return Err(refused("exists and is no overlay: it is not a differencing image".into()).hint(another));
    };
    if Some(parent) == uuid || any_parent {
        return Ok(());
    }
    Err(match image.info.uuid {
        Some(own) => refused(format!("exists and is based on image {parent}, not on {name}, which is {own}"))
            .hint(another),
        None => refused(format!("exists, and nothing shows that it was made over {name} as it is now")).hint(
            format!("if it was: --blk-file {} --parent {name},format={}", overlay.display(), image.format),
        ),
    })
}

/// What an overlay names as its parent if that is a raw file, which has no UUID of its own: a number made from the file's
/// name, inode and size, so that the same command finds its overlay again and that of another file is refused. `None` for
/// devices: their names and numbers belong to another after the next boot.
fn stand_in(image: &OpenImage) -> Option<Uuid> {
    let path = fs::canonicalize(&image.path).ok()?;
    let meta = fs::metadata(&path).ok()?;
    if !meta.is_file() {
        return None;
    }
    let numbers = [meta.ino(), image.info.virtual_size].into_iter().flat_map(u64::to_le_bytes);
    let bytes = path.as_os_str().as_bytes().iter().copied().chain([0]).chain(numbers);
    Some(uuid::Builder::from_custom_bytes(fnv(bytes).to_be_bytes()).into_uuid())
}

/// FNV-1a of 128 bits: the UUIDs made from it have to be different, not secret.
fn fnv(bytes: impl Iterator<Item = u8>) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.fold(BASIS, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_fnv() {
        // Published test values of FNV-1a with 128 bits.
        assert_eq!(fnv([].into_iter()), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv(b"foobar".iter().copied()), 0x343e1662793c64bf6f0d3597ba446f18);
    }
}
