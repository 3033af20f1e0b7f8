//! What commands have in common: images, their parents, locks, output.

use super::super::keys::Keys;
use super::super::usage::existing_dir;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::time::Duration;
use vdblk::format::Format;
use vdblk::vd::{DiskOptions, ImageSpec, OpenDisk};

/// Where the parents of an image are.
#[derive(Debug, Args)]
pub(crate) struct Parents {
    /// A parent, base first (repeatable). Those that are not named are searched by UUID: in the folders of --parent-dir,
    /// then, if none was named, in the image's own; each with the folders below it, and of one called Snapshots the one
    /// above too.
    #[arg(long = "parent", value_name = "FILE[,format=F]", value_parser = ImageSpec::parse)]
    pub(crate) parents: Vec<ImageSpec>,
    /// A folder to search parents in that are not named; see --parent (repeatable).
    #[arg(long = "parent-dir", value_name = "DIR", value_parser = existing_dir)]
    pub(crate) parent_dirs: Vec<PathBuf>,
    /// Take parents although their UUID is not the one the child names.
    #[arg(long)]
    pub(crate) allow_parent_mismatch: bool,
    /// Open images that describe disks of this host (VMDK: full and partitioned devices).
    #[arg(long)]
    pub(crate) allow_raw_device: bool,
}

/// An existing image.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// Format of the image: raw, vdi, vmdk, vhd, vhdx, qcow2, qcow, qed, parallels, dmg or cue [default: what extension and contents agree on; the extension .raw says raw].
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub(crate) format: Option<Format>,
    #[command(flatten)]
    pub(crate) parents: Parents,
    #[command(flatten)]
    pub(crate) keys: Keys,
}

/// Which state of an image.
#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// The image as it was at this internal snapshot (its name, else its number; info lists them), for reading only.
    #[arg(long, value_name = "NAME|ID")]
    pub(crate) snapshot: Option<String>,
}

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Lock {
    /// Seconds to wait for an image another process has locked, 0 or more.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    lock_wait: u32,
}

impl Lock {
    pub(crate) fn wait(self) -> Duration {
        Duration::from_secs(self.lock_wait.into())
    }
}

impl Image {
    /// The file with the format that was said.
    pub(crate) fn spec(&self, file: &Path) -> ImageSpec {
        ImageSpec { path: file.into(), format: self.format }
    }

    /// How to open the disk, or what it was at a snapshot: read-only, locked.
    ///
    /// # Errors
    /// If the key of an encrypted disk cannot be had.
    pub(crate) fn open(&self, file: &Path, snapshot: Option<&String>, lock: Lock) -> vdblk::Result<OpenDisk> {
        let filters = self.keys.files().unlock()?;
        Ok(OpenDisk { snapshot: snapshot.cloned(), filters, ..self.parents.open(self.spec(file), lock) })
    }
}

impl Parents {
    /// How to open `image` with these parents: read-only, locked.
    pub(crate) fn open(&self, image: ImageSpec, lock: Lock) -> OpenDisk {
        OpenDisk {
            image,
            parents: self.parents.clone(),
            parent_dirs: self.parent_dirs.clone(),
            lock_wait: Some(lock.wait()),
            allow_parent_mismatch: self.allow_parent_mismatch,
            allow_raw_device: self.allow_raw_device,
            options: DiskOptions { read_only: true, ..DiskOptions::default() },
            ..OpenDisk::new("")
        }
    }
}

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}
