//! The images that are measured: made in a folder that goes away with everything in it.

use crate::cases::Image;
use crate::drive::{Load, fill};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vdblk::format::{Format, NewParent};
use vdblk::job::{CreateImage, create_image};
use vdblk::map::ImageInfo;
use vdblk::vd::{Disk, DiskOptions, ImageSpec, OpenDisk, open_disk};

/// Bytes of a disk: a base and what is written over it stay well below 2 GB.
pub(crate) const DISK_BYTES: u64 = 512 << 20;
/// Bytes of a block: a write of 64 KiB fills one.
pub(crate) const BLOCK_BYTES: u64 = 64 << 10;
/// What statfs calls file systems in memory.
const IN_MEMORY: [i64; 2] = [libc::TMPFS_MAGIC, 0x8584_58f6];

/// The folder, and the base of the diffs.
pub(crate) struct Disks {
    dir: PathBuf,
    base: ImageInfo,
}

/// A new image.
pub(crate) struct Fresh {
    path: PathBuf,
    format: Format,
}

impl Disks {
    pub(crate) fn in_folder(of: &Path) -> io::Result<Disks> {
        refuse_memory(of)?;
        let dir = of.join(format!("rules.{}", std::process::id()));
        std::fs::create_dir(&dir)?;
        // from here on it goes away, whatever happens
        let made = Self::with_base(dir.clone());
        made.inspect_err(|_| drop(std::fs::remove_dir_all(&dir)))
    }

    fn with_base(dir: PathBuf) -> io::Result<Disks> {
        let base = Fresh { path: dir.join("base.vdi"), format: Format::Vdi };
        create(&base.path, Format::Vdi, None)?;
        let everything =
            Load { bytes: 64 << 10, sequential: true, journals: 0, flush_every: 1, seconds: 60.0 };
        fill(&base, &everything)?;
        // a sync of a diff waits for nothing of the base
        std::fs::File::open(&base.path)?.sync_all()?;
        let opened = open_disk(&OpenDisk::new(&base.path)).map_err(io::Error::other)?;
        let info = opened.images[0].info.clone();
        Ok(Disks { dir, base: info })
    }

    /// An image nobody has written to; the one before it goes away.
    pub(crate) fn fresh(&self, image: Image) -> io::Result<Fresh> {
        let (name, format) = match image {
            Image::Raw => ("disk.raw", Format::Raw),
            Image::Vdi | Image::Diff => ("disk.vdi", Format::Vdi),
        };
        let fresh = Fresh { path: self.dir.join(name), format };
        match std::fs::remove_file(&fresh.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        create(&fresh.path, format, (image == Image::Diff).then(|| self.base.clone()))?;
        Ok(fresh)
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.dir) {
            eprintln!("rules: {} is left: {e}", self.dir.display());
        }
    }
}

impl Fresh {
    pub(crate) fn open(&self, skip_syncs: bool) -> io::Result<Arc<Disk>> {
        let how = OpenDisk {
            image: ImageSpec { path: self.path.clone(), format: Some(self.format) },
            lock_wait: Some(Duration::from_secs(10)),
            options: DiskOptions { skip_syncs, ..DiskOptions::default() },
            ..OpenDisk::new(&self.path)
        };
        Ok(open_disk(&how).map_err(io::Error::other)?.disk)
    }
}

fn create(path: &Path, format: Format, parent: Option<ImageInfo>) -> io::Result<()> {
    let mut new = CreateImage::new(path, format, DISK_BYTES);
    if format == Format::Vdi {
        new.options = vec![("AllocationBlockSize".to_string(), BLOCK_BYTES.to_string())];
        new.parent = parent.map(|info| NewParent { info, path: None });
    }
    create_image(&new).map_err(io::Error::other)
}

/// In memory a sync costs nothing, and so does every rule.
fn refuse_memory(dir: &Path) -> io::Result<()> {
    let path = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes()).map_err(io::Error::other)?;
    // SAFETY: statfs is a plain structure; zeros are one.
    let mut fs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends in a 0 and the structure may be written.
    if unsafe { libc::statfs(path.as_ptr(), &raw mut fs) } != 0 {
        let e = io::Error::last_os_error();
        return Err(io::Error::new(e.kind(), format!("{}: {e}", dir.display())));
    }
    if IN_MEMORY.contains(&fs.f_type) {
        return Err(io::Error::other(format!(
            "{} is in memory, where a sync is free: name a folder on a disk",
            dir.display()
        )));
    }
    Ok(())
}
