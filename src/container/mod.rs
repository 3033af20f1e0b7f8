//! The container: a chain of images as one object with VirtualBox's life cycle, over [`crate::vd`] and [`crate::job`].
//! `docs/container.md` tells how it is built, `docs/vd-api.md` what of VirtualBox's header is where.
//!
//! ```
//! use vdblk::container::{Container, CreateBase, OpenFlags};
//! use vdblk::map::DeviceType;
//!
//! # fn main() -> vdblk::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let (base, diff) = (folder.path().join("base.vdi"), folder.path().join("diff.vdi"));
//! let mut disk = Container::new(DeviceType::HardDisk);
//! disk.create_base("VDI", &base, 64 << 20, &CreateBase::default(), OpenFlags::NONE)?;
//! disk.write(0, &[7; 512])?;
//! disk.create_diff("VDI", &diff, &CreateBase::default(), OpenFlags::NONE)?;
//! disk.write(512, &[8; 512])?;
//! let mut sectors = [0; 1024];
//! disk.read(0, &mut sectors)?;
//! assert_eq!((sectors[0], sectors[1023]), (7, 8));
//! disk.close_all()
//! # }
//! ```

mod asynchronous;
mod backends;
mod buffers;
mod cache;
mod chain;
mod copy;
mod create;
mod data;
mod disk_file;
mod dispatch;
mod filters;
mod flags;
mod image;
mod iter;
mod live;
mod properties;
mod query;
mod queue;
#[cfg(test)]
mod tests;
mod types;
mod work;

pub use asynchronous::{Completion, completion};
pub use backends::{
    BackendInfo, CACHE_BACKENDS, ConfigKey, ConfigValueType, FileExtension, backend_info, backend_info_one,
    cache_backend,
};
pub use buffers::{BufferCallbacks, CopyError, IoBuffer, IoBufferManager};
pub use chain::get_format;
pub use copy::CopyImage;
pub use create::CreateBase;
pub use data::ReadStatus;
pub use disk_file::DiskFile;
pub use filters::{CryptInterface, FilterConfig, FilterInfo, filter_info, filter_info_one};
pub use flags::{
    BackendCaps, BufferFlags, ConfigKeyFlags, DiskFileFlags, FilterFlags, ImageFlags, IterFlags, OpenFlags,
    RawDiskFlags, RegionListFlags, RepairFlags, SegmentFlags,
};
pub use iter::{IoIter, IterSegment};
pub use queue::{IoQueue, IoRequest, IoRequestState, IoRequestType, OnComplete};
pub use types::{
    Geometry, IMAGE_CONTENT_UNKNOWN, LAST_IMAGE, RegionDesc, RegionList, VDI_IMAGE_VERSION,
    VDI_IMAGE_VERSION_MAJOR, VDI_IMAGE_VERSION_MINOR, VMDK_IMAGE_VERSION, data_form_number, device_number,
    metadata_form_number, vdi_version_major, vdi_version_minor,
};

pub use work::repair;

use crate::error::{Error, Result, Status};
use crate::job::StreamWriter;
use crate::map::DeviceType;
use dispatch::Dispatcher;
use filters::Added;
use image::Image;
use live::Live;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What holds for all images of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerOptions {
    /// How long to wait for an image that another process holds. VirtualBox takes no locks on Linux.
    pub lock_wait: Duration,
    /// An image that cannot be opened for writing is opened for reading instead, as VirtualBox does without being asked.
    pub read_only_fallback: bool,
    /// Any image may lie over any other, as in VirtualBox. Otherwise it has to name the one beneath it.
    pub allow_parent_mismatch: bool,
    /// Images may describe disks of this host.
    pub allow_raw_device: bool,
}

impl Default for ContainerOptions {
    /// No waiting, no fall-back, parents have to be the right ones, no disks of the host.
    fn default() -> Self {
        ContainerOptions {
            lock_wait: Duration::ZERO,
            read_only_fallback: false,
            allow_parent_mismatch: false,
            allow_raw_device: false,
        }
    }
}

/// A container of images (`VDISK`), for one type of device. Images are numbered from the base, 0, to the last, which alone is written.
///
/// Reading, writing and asking take `&self`, and may be done by many threads at a time. What changes the chain takes `&mut self`: requests
/// in flight end before, those that come meanwhile wait.
#[derive(Debug)]
pub struct Container {
    device: DeviceType,
    options: ContainerOptions,
    /// Base first.
    images: Vec<Image>,
    cache: Option<PathBuf>,
    /// Between what the disk shows and what its images hold; of the container, not of an image.
    filters: Added,
    /// The disk of the images; none without one, or if one of them is only to be asked about.
    live: Option<Live>,
    /// The only image, while it is made from its start to its end; there is no disk then.
    stream: Option<Mutex<StreamWriter>>,
    /// Requests that end later.
    dispatcher: Arc<Dispatcher>,
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live").field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl Container {
    /// An empty container for a device of this type (`VDCreate`).
    pub fn new(device: DeviceType) -> Self {
        Self::with_options(device, ContainerOptions::default())
    }

    /// The same with options.
    pub fn with_options(device: DeviceType, options: ContainerOptions) -> Self {
        Container {
            device,
            options,
            images: Vec::new(),
            cache: None,
            filters: Added::default(),
            live: None,
            stream: None,
            dispatcher: Dispatcher::new(),
        }
    }

    /// The type of its device.
    pub fn device(&self) -> DeviceType {
        self.device
    }

    /// Closes everything (`VDDestroy`). Dropping a container does the same, and keeps to itself what went wrong.
    ///
    /// # Errors
    /// As [`Self::close_all`].
    pub fn destroy(mut self) -> Result<()> {
        self.close_all()
    }

    /// The place of an image in the list.
    fn index(&self, image: u32) -> Result<usize> {
        let count = self.images.len();
        let last = count.checked_sub(1);
        let index = if image == LAST_IMAGE { last } else { usize::try_from(image).ok() };
        index.filter(|i| *i < count).ok_or_else(|| {
            let what = format!("the container has no image {image}: it has {count}");
            Error::of(Status::ImageNotFound, what)
        })
    }

    fn image(&self, image: u32) -> Result<&Image> {
        Ok(&self.images[self.index(image)?])
    }

    /// The open disk.
    fn live(&self) -> Result<&Live> {
        let why = || match self.images.is_empty() {
            true => Error::of(Status::NotOpened, "no image is open in the container"),
            false if self.stream.is_some() => {
                let what = "the image is being written from its start to its end, and no disk before that";
                Error::of(Status::InvalidState, what).hint("close it, and open it with READONLY")
            }
            false => {
                let what = "an image of the container was opened to be asked about only";
                Error::of(Status::InvalidState, what).hint("open it without INFO")
            }
        };
        self.live.as_ref().ok_or_else(why)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Err(e) = self.close_all() {
            tracing::error!("{e}");
        }
    }
}
