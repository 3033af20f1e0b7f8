//! Images stacked on each other, seen as one disk.

use crate::error::Failure;
use crate::io::HostFile;
use crate::map::{
    Extent, ExtentKind, ExtentList, GuestOffset, GuestRange, ImageMap, Intent, MetaKey, Miss, Packed,
};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One image of a chain.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its number in the disk's life: the key of its claims and pages. Never used twice.
    pub number: u32,
    /// The image.
    pub map: Arc<dyn ImageMap>,
}

/// A chain: the image that is written first, the base last.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Layer>,
    /// Where the images end; the top one, which may grow, nowhere: nobody asks beyond the disk.
    sizes: Vec<u64>,
    size_bytes: AtomicU64,
}

/// Why a look-up through a chain gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// It cannot be done.
    Failed(Failure),
    /// A page of a table is not in memory: load it ([`super::Disk`] does), and ask again.
    Page {
        /// The number of the image in the disk's life.
        layer: u32,
        /// The page.
        key: MetaKey,
    },
    /// A packed unit is not in memory: have it unpacked, and ask again.
    Unit(Packed),
}

impl From<Failure> for Lack {
    fn from(f: Failure) -> Self {
        Lack::Failed(f)
    }
}

impl Lack {
    /// What `miss` of the image with this number means for whoever only reads.
    pub(super) fn of(layer: u32, miss: Miss) -> Self {
        match miss {
            Miss::Fail(f) => Lack::Failed(f),
            Miss::NeedsPage(key) => Lack::Page { layer, key },
            Miss::NeedsPlan | Miss::NeedsRoom => unreachable!("a read asked for a plan"),
        }
    }
}

impl Chain {
    /// A chain of these images, top first.
    ///
    /// # Panics
    /// Without an image.
    pub fn new(layers: Vec<Layer>) -> Self {
        let mut sizes: Vec<_> = layers.iter().map(|l| l.map.limits().size_bytes).collect();
        let top = sizes.first_mut().expect("a chain has an image");
        let size_bytes = AtomicU64::new(std::mem::replace(top, u64::MAX));
        Chain { layers, sizes, size_bytes }
    }

    /// Size of the disk in bytes: that of the top image, whatever the others say.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// The file of the top image may have grown: looks at it again. The disk's new size, if it has one.
    ///
    /// # Errors
    /// From the operating system.
    pub(super) fn grow(&self, file: &dyn HostFile) -> io::Result<Option<u64>> {
        let size = self.top().map.grown(file.len()?);
        if let Some(size) = size {
            self.size_bytes.store(size, Ordering::Release);
        }
        Ok(size)
    }

    /// The image that is written.
    pub fn top(&self) -> &Layer {
        &self.layers[0]
    }

    /// The image with this number.
    ///
    /// # Panics
    /// If the chain has none.
    pub(crate) fn layer(&self, number: u32) -> &Layer {
        self.layers.iter().find(|l| l.number == number).expect("an image of the chain")
    }

    /// All images, top first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The extent at the start of `r`, through all images: none of them says `Parent`. `r` has a byte and lies inside the disk.
    ///
    /// # Errors
    /// What a format says of its metadata, or lacks of it.
    #[inline]
    pub fn look(&self, r: GuestRange) -> Result<Extent, Lack> {
        self.look_from(0, r)
    }

    /// The same through the images from the one at `depth` on.
    fn look_from(&self, depth: usize, r: GuestRange) -> Result<Extent, Lack> {
        let mut rest = r;
        for (layer, size) in self.layers.iter().zip(&self.sizes).skip(depth) {
            // what lies behind the end of an image reads as zeros: a diff may be larger than its parent
            let inside = rest.intersect(GuestRange::between(GuestOffset(0), GuestOffset(*size)));
            if inside.is_empty() {
                break;
            }
            let e = layer.map.look(inside, Intent::Read).map_err(|miss| Lack::of(layer.number, miss))?;
            debug_assert!(e.len > 0 && e.len <= inside.len(), "an extent of no use");
            if e.kind != ExtentKind::Parent {
                return Ok(e);
            }
            rest = rest.take(e.len);
        }
        Ok(Extent { len: rest.len(), kind: ExtentKind::Zero })
    }

    /// Where `r` is, through all images. May cover only a prefix (see [`ExtentList`]).
    ///
    /// # Errors
    /// As [`Self::look`], of the first byte.
    pub fn map(&self, r: GuestRange, out: &mut ExtentList) -> Result<(), Lack> {
        out.clear();
        out.fill(r, |rest| self.look(rest))
    }

    /// The same through the images from the one at `depth` on, which is not the top.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub(super) fn map_beneath(&self, depth: usize, r: GuestRange, out: &mut ExtentList) -> Result<(), Lack> {
        out.clear();
        out.fill(r, |rest| self.look_from(depth, rest))
    }
}
