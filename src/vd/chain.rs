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

/// Lists for the levels of a look-up, kept by the caller so that a look-up allocates nothing.
#[derive(Debug)]
pub struct Scratch(Vec<ExtentList>);

impl Scratch {
    /// Room for look-ups in `chain`.
    pub fn for_chain(chain: &Chain) -> Self {
        Scratch((0..chain.layers.len()).map(|_| ExtentList::new()).collect())
    }
}

impl Chain {
    /// A chain of these images, top first.
    ///
    /// # Panics
    /// Without an image.
    pub fn new(layers: Vec<Layer>) -> Self {
        let size_bytes = layers.first().expect("a chain has an image").map.limits().size_bytes;
        Chain { layers, size_bytes: AtomicU64::new(size_bytes) }
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

    /// Where `r` is, through all images: `Data` and `Zero` only. May cover only a prefix (see [`ExtentList`]).
    ///
    /// # Errors
    /// What a format says of its metadata, or lacks of it for the first byte.
    pub fn map(&self, r: GuestRange, out: &mut ExtentList, scratch: &mut Scratch) -> Result<(), Lack> {
        out.clear();
        // Most look-ups end in the top image: no copy between lists.
        read_map(&self.layers[0], r, out)?;
        if out.as_slice().iter().any(|e| e.kind == ExtentKind::Parent) {
            out.clear();
            self.map_through(0, r, out, &mut scratch.0)?;
        }
        debug_assert!(r.is_empty() || out.covered() > 0, "a look-up that covers nothing");
        Ok(())
    }

    /// The same through the images from the one at `depth` on, which is not the top.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub(super) fn map_beneath(
        &self,
        depth: usize,
        r: GuestRange,
        out: &mut ExtentList,
        scratch: &mut Scratch,
    ) -> Result<(), Lack> {
        out.clear();
        self.map_through(depth, r, out, &mut scratch.0)
    }

    fn map_through(
        &self,
        depth: usize,
        r: GuestRange,
        out: &mut ExtentList,
        scratch: &mut [ExtentList],
    ) -> Result<(), Lack> {
        let Some(layer) = self.layers.get(depth) else {
            out.push(Extent { len: r.len(), kind: ExtentKind::Zero });
            return Ok(());
        };
        let (mine, deeper) = scratch.split_first_mut().expect("scratch for every image");
        mine.clear();
        match read_map(layer, r, mine) {
            // what has been found so far is an answer
            Err(Lack::Page { .. }) if out.covered() > 0 => return Ok(()),
            other => other?,
        }
        let mut at = r.start();
        for e in mine.as_slice() {
            let part = GuestRange::new(at, e.len).expect("inside a range");
            if e.kind == ExtentKind::Parent {
                let before = out.covered();
                self.map_through(depth + 1, part, out, deeper)?;
                if out.covered() - before < e.len {
                    return Ok(()); // the list is full
                }
            } else if !out.push(*e) {
                return Ok(());
            }
            at = part.end();
        }
        Ok(())
    }
}

/// A look-up in one image; what lies behind its end reads as zeros (a diff may be larger than its parent).
fn read_map(layer: &Layer, r: GuestRange, out: &mut ExtentList) -> Result<(), Lack> {
    let disk = GuestRange::between(GuestOffset(0), GuestOffset(layer.map.limits().size_bytes));
    let inside = r.intersect(disk);
    if !inside.is_empty() {
        layer.map.map(inside, Intent::Read, out).map_err(|miss| Lack::of(layer.number, miss))?;
    }
    let beyond = r.len() - inside.len();
    if beyond > 0 && out.covered() == inside.len() {
        out.push(Extent { len: beyond, kind: ExtentKind::Zero });
    }
    Ok(())
}
