//! What tells the images beneath a cache from others, and from themselves before somebody changed them.

use super::open::OpenImage;
use super::stand_in::fnv;
use crate::error::{Error, ErrorKind, Result};
use crate::format::vci::Base;
use crate::io::HostFile;
use std::fs::File;
use std::os::unix::fs::MetadataExt;

/// Of `images`, the uppermost first, as they show at `snapshot` through a disk of `disk_bytes`.
///
/// What an image says of itself is not enough: a raw one says nothing, and other programs write to a VDI without a new
/// modification UUID. So the files are asked as well: inode, length, and the times of the last change of contents and inode, of which nobody
/// can set the latter.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a device, which is asked in vain; from the operating system.
pub(super) fn base_of(images: &[OpenImage], snapshot: Option<&str>, disk_bytes: u64) -> Result<Base> {
    let top = &images.first().expect("a cached image").info;
    let mut said = Vec::new();
    put(&mut said, snapshot.unwrap_or_default().as_bytes());
    said.push(u8::from(snapshot.is_some()));
    for image in images {
        let info = &image.info;
        put(&mut said, image.format.name().as_bytes());
        put(&mut said, &image.size_bytes().to_le_bytes());
        for uuid in [info.uuid, info.modification_uuid] {
            put(&mut said, uuid.map(uuid::Uuid::into_bytes).as_ref().map_or(&[], |u| &u[..]));
        }
        put(&mut said, info.content_id.map(u32::to_le_bytes).as_ref().map_or(&[], |c| &c[..]));
        for file in image.files() {
            file_facts(&**file, &mut said)?;
        }
    }
    Ok(Base {
        uuid: top.uuid.unwrap_or_default(),
        modification: top.modification_uuid.unwrap_or_default(),
        disk_bytes,
        identity: fnv(said.into_iter()),
    })
}

/// With its length, so that no two lists look the same.
fn put(said: &mut Vec<u8>, bytes: &[u8]) {
    said.extend((bytes.len() as u64).to_le_bytes());
    said.extend(bytes);
}

fn file_facts(file: &dyn HostFile, said: &mut Vec<u8>) -> Result<()> {
    if file.traits().is_device {
        let what = "is a device, of which nothing tells whether it was changed: it cannot be cached";
        return Err(Error::new(ErrorKind::Unsupported, what).at(file.path()).hint("leave --cache-image out"));
    }
    let fd = file
        .fd()
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, "is no file of this host").at(file.path()))?;
    let looked = fd.try_clone_to_owned().map(File::from).and_then(|f| f.metadata());
    let meta = looked.map_err(|e| Error::io("look at it", e).at(file.path()))?;
    let times = [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()];
    [meta.ino(), meta.len()].into_iter().for_each(|n| said.extend(n.to_le_bytes()));
    times.into_iter().for_each(|n| said.extend(n.to_le_bytes()));
    Ok(())
}
