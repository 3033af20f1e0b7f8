//! Changes of a disk's chain while it is being served. `docs/live.md` has the order of each, and what a crash leaves.
//!
//! [`LiveDisk`] is what others hold: it can be used from any thread but those of the queues. One change is made at a time; whoever
//! comes second waits.

mod order;
pub mod record;
mod snapshot;
#[cfg(test)]
mod tests;

#[cfg(any(test, feature = "sim"))]
pub(crate) use order::{SnapshotSteps, snapshot as snapshot_in_order};
pub use snapshot::{Snapped, Snapshot};

use crate::error::Result;
use crate::format::Format;
use crate::vd::{Disk, ImageSpec, OpenImage, OpenedDisk};
use crate::vhost::Control;
use record::Recorded;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

/// An image of a served disk's chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainImage {
    /// Its first file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its UUID, where it has one.
    pub uuid: Option<Uuid>,
}

impl ChainImage {
    fn of(image: &OpenImage) -> ChainImage {
        ChainImage { path: image.path.clone(), format: image.format, uuid: image.info.uuid }
    }

    fn spec(&self) -> ImageSpec {
        ImageSpec { path: self.path.clone(), format: Some(self.format) }
    }
}

/// A chain at one time.
#[derive(Debug)]
struct Chain {
    disk: Arc<Disk>,
    /// Top first.
    images: Vec<ChainImage>,
}

/// Where it is written down which image a disk is served from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordFile {
    /// The record.
    pub path: PathBuf,
    /// The image the disk was first served from.
    pub began: PathBuf,
}

/// A disk whose chain changes while it is served.
#[derive(Debug)]
pub struct LiveDisk {
    current: Mutex<Arc<Chain>>,
    /// True: it is closed.
    changing: Mutex<bool>,
    control: Control,
    /// Images are used past the page cache.
    direct: bool,
    record: Option<RecordFile>,
}

impl LiveDisk {
    /// The disk that `opened` is, whose new images are used past the page cache if it is (`direct`). Without a record a daemon that is
    /// started again has to be told by its user which image to serve. [`Self::control`] has to be given to whoever serves it
    /// ([`crate::vhost::Device::control`]), and every channel made over [`Self::disk`] as it is then.
    ///
    /// # Errors
    /// If the record cannot be written.
    pub fn new(opened: &OpenedDisk, direct: bool, record: Option<RecordFile>) -> Result<LiveDisk> {
        let images = opened.images.iter().map(ChainImage::of).collect();
        let current = Arc::new(Chain { disk: opened.disk.clone(), images });
        let (control, changing) = (Control::default(), Mutex::default());
        let live = LiveDisk { current: Mutex::new(current), changing, control, direct, record };
        live.record(&live.current(), None)?;
        Ok(live)
    }

    /// The disk as it is now. A live change puts another in its place: it is not to be kept for long.
    pub fn disk(&self) -> Arc<Disk> {
        self.current().disk.clone()
    }

    /// The images, top first.
    pub fn chain(&self) -> Vec<ChainImage> {
        self.current().images.clone()
    }

    /// Waits for a change that is under way, and closes the disk, whose locks go, whoever still has this; no change is made afterwards.
    ///
    /// # Errors
    /// Those of `close`.
    pub fn end(&self, close: impl FnOnce(&Arc<Disk>) -> Result<()>) -> Result<()> {
        let mut ended = self.one_change();
        *ended = true;
        let closed = close(&self.disk());
        self.disk().forget_images();
        closed
    }

    /// For whoever serves it.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// True if its images are used past the page cache.
    fn is_direct(&self) -> bool {
        self.direct
    }

    fn current(&self) -> Arc<Chain> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_current(&self, chain: Arc<Chain>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = chain;
    }

    /// No other change is made as long as this is held.
    fn one_change(&self) -> MutexGuard<'_, bool> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down which images the disk is served from, and which one is being made, durably.
    fn record(&self, chain: &Chain, making: Option<&Path>) -> Result<()> {
        let Some(RecordFile { path, began }) = &self.record else { return Ok(()) };
        let chain = chain.images.iter().map(ChainImage::spec).collect();
        record::store(path, &Recorded { began: began.clone(), chain, making: making.map(Into::into) })
    }
}
