//! Overlays: a differencing VDI takes the writes, and the image beneath stays as it is.

use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::job::{create_overlay, inspect_image};
use crate::vd::{DiskOptions, ImageSpec, OpenDisk, OpenImage, OpenedDisk, open_disk};
use std::fs;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Opens the image with an overlay on top: a new one, or one that was made over this image before. The image's chain is
/// looked up once more, as the overlay's parents.
pub(super) fn open(how: OpenDisk, overlay: &Path) -> Result<(OpenedDisk, Fresh)> {
    let mut fresh = Fresh(None);
    let parents = {
        let below = open_disk(&OpenDisk { cache_image: None, ..how.clone() })?;
        let image = &below.images[0];
        let uuid = image.uuid();
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
    });
    let opened = opened.inspect_err(|e| {
        if e.kind() == ErrorKind::Locked {
            fresh.keep(); // another process has found it and serves it
        }
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
    let (then, now) = (there.parent_modification_uuid, image.info.modification_uuid);
    if any_parent || (Some(parent) == uuid && (then == now || then.is_none() || now.is_none())) {
        return Ok(());
    }
    if Some(parent) == uuid {
        let what = format!(
            "is an overlay of {name}, which was written to since; both together are no disk any more"
        );
        let hint =
            "give --overlay a name that is free, or pass --allow-parent-mismatch if the changes do no harm";
        return Err(refused(what).hint(hint));
    }
    Err(match image.info.uuid {
        Some(own) => refused(format!("exists and is based on image {parent}, not on {name}, which is {own}"))
            .hint(another),
        None => refused(format!("exists, and nothing shows that it was made over {name} as it is now")).hint(
            format!("if it was: --blk-file {} --parent {name},format={}", overlay.display(), image.format),
        ),
    })
}
