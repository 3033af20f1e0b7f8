//! The images a simulation works on.

use super::bytes::Bytes;
use super::foreign::{vhd, vhdx, vmdk};
use super::forgetful::Forgetful;
use super::past::{Past, fill};
use super::{CacheFile, DATA, Faults, Rng, SimEngine, SimFile, Trace, World};
use crate::filter::Filters;
use crate::format::{
    self, CheckReport, FileStep, Format, ImageFile, NewImage, NewParent, Properties, Repair, Spare,
};
use crate::io::{Host, HostFile};
use crate::map::{ExtentKind, ExtentList, FileId, GuestOffset, GuestRange, ImageInfo, ImageMap};
use crate::probe::paging::with_paged_tables;
use crate::vd::{Chain, Disk, DiskOptions, Lack, Layer, Request, unpack};
use crate::{Error, ErrorKind, Result};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// What is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A raw file.
    Raw,
    /// A VDI without a parent.
    Vdi,
    /// A differencing VDI over a parent full of data; discards are turned off.
    Diff,
    /// The same with discards.
    DiffDiscard,
    /// A VHD without a parent.
    Vhd,
    /// A differencing VHD over a VDI full of data. In both some blocks may be there in parts.
    VhdDiff,
    /// A VHDX without a parent; blocks and log are smaller than anywhere else.
    Vhdx,
    /// A differencing VHDX over a VDI full of data. Some blocks may be there in parts.
    VhdxDiff,
    /// A Parallels image without a parent.
    Parallels,
    /// One over a VDI full of data.
    ParallelsDiff,
    /// A sparse VMDK without a parent.
    Vmdk,
    /// A differencing VMDK over a VDI full of data.
    VmdkDiff,
    /// The same with a word for grains of zeros.
    VmdkZeroed,
    /// A sparse VMDK without a parent that has no grain tables yet, or copies of them.
    VmdkBare,
    /// A VMDK of several extents, each a file.
    VmdkSplit,
    /// A QCOW2 without a parent, of the smallest clusters (or as large as its blocks, if those are below 4 KiB) and the widest
    /// refcounts: its tables grow all the time.
    Qcow2,
    /// A QCOW2 over a parent full of data; with subclusters where its clusters are large enough.
    Qcow2Diff,
    /// A QED without a parent; a table has two clusters.
    Qed,
    /// A QED over a parent full of data; a table has four.
    QedDiff,
    /// A QCOW of the first version without a parent, of the smallest clusters and tables: it has several.
    Qcow,
    /// One over a parent full of data; a table has several clusters.
    QcowDiff,
    /// An image of a format that is registered, without a parent.
    Other(Format),
    /// The same over a VDI full of data.
    OtherDiff(Format),
}

impl Kind {
    /// All of our own formats.
    pub const ALL: [Kind; 21] = [
        Kind::Raw,
        Kind::Vdi,
        Kind::Diff,
        Kind::DiffDiscard,
        Kind::Vhd,
        Kind::VhdDiff,
        Kind::Vhdx,
        Kind::VhdxDiff,
        Kind::Parallels,
        Kind::ParallelsDiff,
        Kind::Vmdk,
        Kind::VmdkDiff,
        Kind::VmdkZeroed,
        Kind::VmdkBare,
        Kind::VmdkSplit,
        Kind::Qcow2,
        Kind::Qcow2Diff,
        Kind::Qed,
        Kind::QedDiff,
        Kind::Qcow,
        Kind::QcowDiff,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Raw => "raw",
            Kind::Vdi => "vdi",
            Kind::Diff => "diff",
            Kind::DiffDiscard => "diff+discard",
            Kind::Vhd => "vhd",
            Kind::VhdDiff => "vhd-diff",
            Kind::Vhdx => "vhdx",
            Kind::VhdxDiff => "vhdx-diff",
            Kind::Parallels => "parallels",
            Kind::ParallelsDiff => "parallels-diff",
            Kind::Vmdk => "vmdk",
            Kind::VmdkDiff => "vmdk-diff",
            Kind::VmdkZeroed => "vmdk-diff+zeroed",
            Kind::VmdkBare => "vmdk-bare",
            Kind::VmdkSplit => "vmdk-split",
            Kind::Qcow2 => "qcow2",
            Kind::Qcow2Diff => "qcow2-diff",
            Kind::Qed => "qed",
            Kind::QedDiff => "qed-diff",
            Kind::Qcow => "qcow",
            Kind::QcowDiff => "qcow-diff",
            Kind::Other(f) | Kind::OtherDiff(f) => f.name(),
        }
    }

    /// It is a differencing image.
    pub fn has_parent(self) -> bool {
        matches!(
            self,
            Kind::Diff
                | Kind::DiffDiscard
                | Kind::VhdDiff
                | Kind::VhdxDiff
                | Kind::ParallelsDiff
                | Kind::VmdkDiff
                | Kind::VmdkZeroed
                | Kind::Qcow2Diff
                | Kind::QedDiff
                | Kind::QcowDiff
                | Kind::OtherDiff(_)
        )
    }

    /// Where its tables are in the file. Of a VHD the first block may lie there as well, the footer behind it.
    pub(super) fn tables(self) -> Range<u64> {
        match self.format() {
            Format::Vhd => 512..4096,
            Format::Parallels => 0..4096,
            // the log, through which all entries go
            Format::Vhdx => 1 << 20..2 << 20,
            // directories and tables of one table's worth of grains
            Format::Vmdk if self == Kind::VmdkSplit => 512..11 * 512,
            Format::Vmdk => 21 * 512..31 * 512,
            // both levels, and data between and behind them
            Format::Qed => 4096..64 << 10,
            Format::Qcow => 512..16 << 10,
            // of the example: the header, and what fits into one page
            Format::Registered(_) => 0..8192,
            _ => 1 << 20..DATA,
        }
    }

    /// What its user has decided.
    pub fn options(self, write_through: bool) -> DiskOptions {
        DiskOptions { write_through, discard: self != Kind::Diff, ..DiskOptions::default() }
    }

    /// The format of the image that is written.
    pub fn format(self) -> Format {
        match self {
            Kind::Raw => Format::Raw,
            Kind::Vdi | Kind::Diff | Kind::DiffDiscard => Format::Vdi,
            Kind::Vhd | Kind::VhdDiff => Format::Vhd,
            Kind::Vhdx | Kind::VhdxDiff => Format::Vhdx,
            Kind::Parallels | Kind::ParallelsDiff => Format::Parallels,
            Kind::Vmdk | Kind::VmdkDiff | Kind::VmdkZeroed | Kind::VmdkBare | Kind::VmdkSplit => Format::Vmdk,
            Kind::Qcow2 | Kind::Qcow2Diff => Format::Qcow2,
            Kind::Qed | Kind::QedDiff => Format::Qed,
            Kind::Qcow | Kind::QcowDiff => Format::Qcow,
            Kind::Other(f) | Kind::OtherDiff(f) => f,
        }
    }
}

/// What an image is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// What it is.
    pub kind: Kind,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a block.
    pub block: u64,
}

/// A chain of images: the one that is written, and those below it.
#[derive(Clone, Debug)]
pub struct Images {
    /// What it is.
    pub shape: Shape,
    /// The file that is written; of an image of several the first, which knows the others.
    pub top: Arc<SimFile>,
    /// The files below, which are not.
    below: Vec<(Arc<SimFile>, Arc<dyn ImageMap>)>,
    /// A cache image between the two.
    pub cache: Option<CacheFile>,
    /// The image that a live snapshot puts above.
    pub(super) living: Option<Living>,
    /// Processes hold the tables only in parts, which they forget by this chance.
    pub forgets: Option<u64>,
    /// Between what processes show and what the images hold.
    pub filters: Filters,
}

/// An image that is put above the one on top while that is served.
#[derive(Clone, Debug)]
pub(super) struct Living {
    pub(super) shape: Shape,
    pub(super) file: Arc<SimFile>,
    pub(super) leaf: Leaf,
}

/// Which image the record names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leaf {
    Old,
    New,
}

/// Time goes on by some microseconds whenever somebody looks, and UUIDs come in order: from another one on in each process, as far as
/// the headers of its image (which is where a VHDX has them) have changed since the last.
#[derive(Debug)]
pub(super) struct SimHost {
    start: Instant,
    looks: AtomicU64,
    uuids: AtomicU64,
}

impl SimHost {
    pub(super) fn of(image: &Bytes) -> Self {
        let mut headers = vec![0; 72 << 10];
        image.read(64 << 10, &mut headers);
        let hash = headers
            .iter()
            .fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
        SimHost { start: Instant::now(), looks: AtomicU64::new(0), uuids: AtomicU64::new(hash << 16) }
    }
}

impl Host for SimHost {
    fn now(&self) -> Instant {
        let n = self.looks.fetch_add(1, Ordering::Relaxed);
        self.start + Duration::from_micros(n * 17 + n % 7)
    }

    fn new_uuid(&self) -> Uuid {
        Uuid::from_u128(0x5eed << 64 | u128::from(self.uuids.fetch_add(1, Ordering::Relaxed)))
    }
}

/// A new image.
fn new_image(kind: Kind, size: u64, block: u64, uuid: u128, parent: Option<u128>) -> Bytes {
    let parent = parent.map(Uuid::from_u128).map(|p| NewParent {
        info: ImageInfo { uuid: Some(p), modification_uuid: Some(p), ..ImageInfo::default() },
        path: Some("parent".into()),
    });
    new_image_over(Shape { kind, size, block }, uuid, parent)
}

/// A new image over the one that `parent` describes.
pub(super) fn bytes_of_new(shape: Shape, parent: ImageInfo) -> Bytes {
    new_image_over(shape, 0xabcd, Some(NewParent { info: parent, path: Some("parent".into()) }))
}

fn new_image_over(shape: Shape, uuid: u128, parent: Option<NewParent>) -> Bytes {
    let Shape { kind, size, block } = shape;
    let format = kind.format();
    let id = Uuid::from_u128(uuid);
    let option = |key: &str, value: &str| (key.to_string(), value.to_string());
    let mut options = match format {
        Format::Vdi => vec![option("AllocationBlockSize", &block.to_string())],
        Format::Vhd => vec![option("block_size", &block.to_string())],
        Format::Vhdx => vec![option("block_size", &block.to_string()), option("log_size", "65536")],
        Format::Parallels => vec![option("cluster_size", &block.to_string())],
        Format::Vmdk => vec![option("grain_size", &block.to_string())],
        Format::Qcow2 if parent.is_none() => {
            let cluster = if block < 4096 { block } else { 512 };
            vec![option("cluster_size", &cluster.to_string()), option("refcount_bits", "64")]
        }
        Format::Qcow2 => {
            let extended = if block >= 16 << 10 { "on" } else { "off" };
            vec![option("cluster_size", &block.to_string()), option("extended_l2", extended)]
        }
        Format::Qed => {
            let table = if parent.is_none() { "2" } else { "4" };
            vec![option("cluster_size", &block.min(16 << 10).to_string()), option("table_size", table)]
        }
        Format::Qcow if parent.is_none() => {
            vec![option("cluster_size", "512"), option("table_entries", "64")]
        }
        Format::Qcow => {
            let cluster = block.min(16 << 10);
            vec![option("cluster_size", &cluster.to_string()), option("table_entries", "8192")]
        }
        Format::Registered(_) => vec![option("block_size", &block.to_string())],
        _ => Vec::new(),
    };
    options.extend((kind == Kind::VmdkZeroed).then(|| option("zeroed_grain", "on")));
    let extent = (size / 3).next_multiple_of(block);
    options.extend((kind == Kind::VmdkSplit).then(|| option("extent_size", &extent.to_string())));
    let has_uuid = matches!(format, Format::Vdi | Format::Vhd | Format::Vmdk | Format::Registered(_));
    let blueprint = format::blueprint(
        format,
        &NewImage {
            file_name: "top".into(),
            size_bytes: size,
            variant: (kind == Kind::VmdkSplit).then(|| "split2g".to_string()),
            uuid: has_uuid.then_some(id),
            modification: id,
            parent,
            comment: None,
            geometry: None,
            options,
        },
    );
    let (mut first, mut further) = (Bytes::default(), Vec::new());
    for file in blueprint.expect("a shape the format can have").files {
        let mut b = Bytes::default();
        b.set_len(file.len);
        for (off, bytes) in file.pieces {
            b.write(off.0, &bytes);
        }
        match file.name {
            None => first = b,
            Some(_) => further.push(b),
        }
    }
    first.with(further)
}

/// The files of an image as formats take them, the first of this number.
fn image_files(bytes: &Bytes, first: FileId) -> Vec<ImageFile<'_>> {
    let all = std::iter::once(bytes).chain(bytes.further());
    (first.0..).zip(all).map(|(id, source)| ImageFile { id: FileId(id), source }).collect()
}

pub(super) fn open_map(
    bytes: &Bytes,
    format: Format,
    id: FileId,
    read_only: bool,
) -> Result<Arc<dyn ImageMap>> {
    let how = format::OpenHow { read_only, info_only: false };
    Ok(format::open(format, &image_files(bytes, id), how)?.into())
}

/// What a check finds in an image; `None` where nothing can be wrong.
pub(super) fn check(format: Format, bytes: &Bytes) -> Result<Option<CheckReport>> {
    format::check(format, &image_files(bytes, FileId(0)))
}

/// The repair of an image.
pub(super) fn repair(format: Format, bytes: &Bytes) -> Result<Option<Repair>> {
    format::repair(format, &image_files(bytes, FileId(0)))
}

/// Taking `spare` from an image of one file.
pub(super) fn compact(format: Format, bytes: &Bytes, spare: &Spare) -> Result<Vec<FileStep>> {
    format::compact(format, &[ImageFile { id: FileId(0), source: bytes }], spare)
}

/// Another parent for an image of one file.
pub(super) fn relink(format: Format, bytes: &Bytes, parent: Option<&NewParent>) -> Result<Vec<FileStep>> {
    format::relink(format, &[ImageFile { id: FileId(0), source: bytes }], parent)
}

/// A change of what an image of one file says of itself.
pub(super) fn set_properties(format: Format, bytes: &Bytes, new: &Properties) -> Result<Vec<FileStep>> {
    format::set_properties(format, &[ImageFile { id: FileId(0), source: bytes }], new)
}

/// What an image of one file says of itself.
pub(super) fn info_of(format: Format, bytes: &Bytes) -> Result<ImageInfo> {
    Ok(open_map(bytes, format, FileId(0), true)?.info())
}

/// The change of size of an image of one file.
pub(super) fn resize(format: Format, bytes: &Bytes, size: u64) -> Result<Vec<FileStep>> {
    format::resize(format, &[ImageFile { id: FileId(0), source: bytes }], size)
}

impl Images {
    /// New images, and what the guest sees in them: nothing, or what the parent has.
    pub fn new(shape: Shape, rng: &mut Rng) -> (Images, Vec<Past>) {
        Self::with_parents(shape, usize::from(shape.kind.has_parent()), rng)
    }

    /// The same over so many parents.
    pub fn with_parents(shape: Shape, parents: usize, rng: &mut Rng) -> (Images, Vec<Past>) {
        Self::filtered(shape, parents, &Filters::default(), rng)
    }

    /// The same, all of them behind these filters.
    pub fn filtered(shape: Shape, parents: usize, filters: &Filters, rng: &mut Rng) -> (Images, Vec<Past>) {
        let Shape { kind, size, block } = shape;
        let mut past = vec![Past::known(0); usize::try_from(size / 512).expect("a small disk")];
        let mut below = Vec::new();
        let mut parent = None;
        for uuid in (1..).take(parents) {
            let own = Shape { kind: Kind::Vdi, size, block: 4096 << rng.below(4) };
            let bytes = new_image(Kind::Vdi, size, own.block, uuid, parent);
            let images = Images {
                shape: own,
                top: SimFile::new("parent.vdi", bytes),
                below: sealed(&of_vdi(&below), 1),
                cache: None,
                living: None,
                forgets: None,
                filters: filters.clone(),
            };
            past = written_full(&images, past, rng);
            below.insert(0, images.top.bytes());
            parent = Some(uuid);
        }
        let mut bytes = new_image(kind, size, block, 100, parent);
        if kind == Kind::VmdkBare {
            vmdk::take_tables(&mut bytes, rng);
        }
        // What is put there past the filters would be read through them.
        let plain = filters.is_empty();
        if plain && kind.format() == Format::Vhd && rng.chance(50) {
            vhd::add_parts(&mut bytes, &mut past, rng);
        }
        if plain && kind == Kind::VhdxDiff && rng.chance(50) {
            vhdx::add_parts(&mut bytes, &mut past, rng);
        }
        let first = 1 + bytes.further().len();
        let below = sealed(&of_vdi(&below), first);
        let (top, filters) = (SimFile::new("top", bytes), filters.clone());
        (Images { shape, top, below, cache: None, living: None, forgets: None, filters }, past)
    }

    /// A new image over these, the nearest first, one file each.
    pub(super) fn over(shape: Shape, uuid: u128, below: &[(Bytes, Format)]) -> Images {
        let parent = (!below.is_empty()).then(|| uuid - 1);
        let bytes = new_image(shape.kind, shape.size, shape.block, uuid, parent);
        Self::of(shape, bytes, below)
    }

    /// Images of one file each.
    pub(super) fn of(shape: Shape, top: Bytes, below: &[(Bytes, Format)]) -> Images {
        let (top, below) = (SimFile::new("top", top), sealed(below, 1));
        Images { shape, top, below, cache: None, living: None, forgets: None, filters: Filters::default() }
    }

    /// A copy whose top file is its own.
    pub fn copy(&self) -> Images {
        Images { top: SimFile::new("top", self.top.bytes()), ..self.clone() }
    }

    /// Nobody writes to the files below the top.
    pub(super) fn parents_are_untouched(&self) -> bool {
        self.below.iter().all(|(f, _)| !f.was_touched())
    }

    /// The files that processes write.
    pub(super) fn written(&self) -> impl Iterator<Item = &Arc<SimFile>> {
        std::iter::once(&self.top).chain(self.cache.as_ref().map(|c| &c.file))
    }

    /// The files of the images.
    pub fn files(&self) -> Vec<Arc<SimFile>> {
        self.top.all().into_iter().chain(self.below.iter().map(|(f, _)| f.clone())).collect()
    }

    /// Opens the disk. `marks` counts the syncs that failed for good.
    ///
    /// # Errors
    /// What the format says of the top image.
    pub fn open(&self, options: DiskOptions, marks: &Arc<AtomicU32>) -> Result<Arc<Disk>> {
        let format = self.shape.kind.format();
        let open = || open_map(&self.top.bytes(), format, FileId(0), false);
        let is_paged = matches!(format, Format::Vmdk | Format::Qed | Format::Qcow | Format::Qcow2);
        let paged = self.forgets.is_some() && is_paged;
        let map = if paged { with_paged_tables(open)? } else { open()? };
        let mut layers = self.layers(map);
        if let Some(seed) = self.forgets.filter(|_| format == Format::Vdi) {
            layers.iter_mut().for_each(|l| l.map = Arc::new(Forgetful::over(l.map.clone(), seed, marks)));
        }
        let chain = Chain::new(layers);
        let files = self.files().into_iter().map(|f| f as Arc<dyn HostFile>).collect();
        let marks = marks.clone();
        let on_failure = Box::new(move || {
            marks.fetch_add(1, Ordering::SeqCst);
        });
        let cache = self.cache.as_ref().map(|c| c.begin(self)).transpose()?.flatten();
        let host = Arc::new(SimHost::of(&self.top.bytes()));
        let disk = Disk::with_cache(chain, (files, cache), options, host, on_failure);
        disk.change_filters(|filters| filters.clone_from(&self.filters));
        Ok(disk)
    }

    fn layers(&self, top: Arc<dyn ImageMap>) -> Vec<Layer> {
        let below = self.below.iter().map(|(_, map)| map.clone());
        let layers = std::iter::once(top).chain(below).zip(0..);
        layers.map(|(map, number)| Layer { number, map }).collect()
    }

    /// What a guest sees if `top` are the bytes of the file on top.
    ///
    /// # Errors
    /// What the format says of them.
    pub fn view(&self, top: &Bytes) -> Result<Vec<u8>> {
        if let Some(living) = &self.living {
            return self.view_living(living, top);
        }
        let map = open_map(top, self.shape.kind.format(), FileId(0), false)?;
        self.show(self.layers(map), self.all_bytes(top))
    }

    /// The files of the chain, by number.
    fn all_bytes(&self, top: &Bytes) -> Vec<Bytes> {
        let below = self.below.iter().map(|(f, _)| f.bytes());
        std::iter::once(top.clone()).chain(top.further().iter().cloned()).chain(below).collect()
    }

    /// The same where the record says which of two images is on top; also that neither is damaged.
    fn view_living(&self, living: &Living, state: &Bytes) -> Result<Vec<u8>> {
        let (old, above) = state.clone().apart();
        let is_old = living.leaf == Leaf::Old;
        let map = open_map(&old, self.shape.kind.format(), FileId(0), !is_old)?;
        let mut sound = vec![(self.shape.kind.format(), &old)];
        let (mut layers, mut files) = (self.layers(map), self.all_bytes(&old));
        if !is_old {
            let id = FileId(u16::try_from(files.len()).expect("few"));
            let map = open_map(&above[0], living.shape.kind.format(), id, false)?;
            files.push(above[0].clone());
            sound.push((living.shape.kind.format(), &above[0]));
            layers.insert(0, Layer { number: u32::MAX, map });
        }
        for (format, bytes) in sound {
            if let Some(report) = check(format, bytes)?.filter(|r| r.corruptions > 0) {
                let what = format!("{format} is corrupt: {:?}", report.findings);
                return Err(Error::new(ErrorKind::Corrupt, what));
            }
        }
        self.show(layers, files)
    }

    /// The images below the top one.
    pub(super) fn below_bytes(&self) -> impl Iterator<Item = (Bytes, Format)> + '_ {
        self.below.iter().map(|(f, _)| (f.bytes(), Format::Vdi))
    }

    /// What shows through where the top image says nothing.
    ///
    /// # Errors
    /// None of the images here.
    pub fn beneath(&self) -> Result<Vec<u8>> {
        let below = (0u32..).zip(&self.below).map(|(number, (_, map))| Layer { number, map: map.clone() });
        let below: Vec<_> = below.collect();
        let size = usize::try_from(self.shape.size).expect("a small disk");
        let mut all =
            if below.is_empty() { Vec::new() } else { self.show(below, self.all_bytes(&Bytes::default()))? };
        all.resize(size, 0);
        Ok(all)
    }

    fn show(&self, layers: Vec<Layer>, files: Vec<Bytes>) -> Result<Vec<u8>> {
        let chain = Chain::new(layers);
        let mut list = ExtentList::new();
        let mut all = vec![0; usize::try_from(chain.size_bytes()).expect("a small disk")];
        let mut rest = GuestRange::between(GuestOffset(0), GuestOffset(chain.size_bytes()));
        while !rest.is_empty() {
            let bytes_of = |file: FileId| &files[usize::from(file.0)];
            match chain.map(rest, &mut list) {
                Ok(()) => {}
                Err(Lack::Failed(f)) => return Err(f.into()),
                Err(Lack::Unit(_)) => unreachable!("a look-up in tables alone"),
                Err(Lack::Page { layer, key }) => {
                    let map = &chain.layer(layer).map;
                    let place = map.page_place(key)?;
                    let mut page = vec![0; place.len];
                    bytes_of(place.file).read(place.off.0, &mut page);
                    map.page_read(key, &page)?;
                    continue;
                }
            }
            for e in list.as_slice() {
                let at = usize::try_from(rest.start().0).expect("a small disk");
                let out = &mut all[at..at + usize::try_from(e.len).expect("a small disk")];
                match e.kind {
                    ExtentKind::Data { file, off } if bytes_of(file).read(off.0, out) < out.len() => {
                        return Err(Error::new(ErrorKind::Corrupt, "data behind the end of the file"));
                    }
                    ExtentKind::Packed { packed, into } => {
                        let (mut from, mut unit) =
                            (vec![0; packed.len as usize], vec![0; packed.unit as usize]);
                        bytes_of(packed.file).read(packed.off.0, &mut from);
                        unpack(packed.codec, &from, &mut unit)?;
                        out.copy_from_slice(&unit[into as usize..][..out.len()]);
                    }
                    ExtentKind::Data { .. } | ExtentKind::Zero | ExtentKind::Parent => {}
                }
                rest = rest.skip(e.len);
            }
        }
        self.filters.on_read(GuestOffset(0), &mut all);
        Ok(all)
    }
}

/// Images as parents, the nearest first, their files from this number on.
fn sealed(images: &[(Bytes, Format)], first: usize) -> Vec<(Arc<SimFile>, Arc<dyn ImageMap>)> {
    let one = |(id, (bytes, format)): (u16, &(Bytes, Format))| {
        let map = open_map(bytes, *format, FileId(id), true).expect("a good parent");
        (SimFile::sealed("parent", bytes.clone()), map)
    };
    let first = u16::try_from(first).expect("few");
    (first..).zip(images).map(one).collect()
}

fn of_vdi(images: &[Bytes]) -> Vec<(Bytes, Format)> {
    images.iter().map(|b| (b.clone(), Format::Vdi)).collect()
}

/// Writes data all over, and here and there zeros; what the sectors hold then.
fn written_full(images: &Images, past: Vec<Past>, rng: &mut Rng) -> Vec<Past> {
    let (sectors, block) = (past.len() as u64, images.shape.block);
    let setup = (DiskOptions::default(), Faults::default(), Trace::default());
    let mut w = World::new(images, setup, past, 1).expect("a new image");
    let (mut at, often) = (0, if images.below.is_empty() { 70 } else { 30 });
    while at < sectors {
        let n = (1 + rng.below(block / 512 * 2)).min(sectors - at);
        if rng.chance(often) {
            let range = GuestRange::new(GuestOffset(at * 512), n * 512).expect("inside the disk");
            let zeros = !images.below.is_empty() && rng.chance(20);
            let request =
                if zeros { Request::WriteZeroes { range, unmap: true } } else { Request::Write(range) };
            w.finish(request, 1 + rng.below(1000)).expect("nothing fails");
        }
        at += n;
    }
    w.close().expect("nothing fails");
    w.past.iter().map(|p| Past::known(p.may[0])).collect()
}

/// A disk of zeros in a VDI of its own, for copies.
pub(super) fn copy_target(size: u64) -> Images {
    let shape = Shape { kind: Kind::Vdi, size, block: 8192 };
    Images {
        shape,
        top: SimFile::new("copy.vdi", new_image(Kind::Vdi, size, 8192, 3, None)),
        below: vec![],
        cache: None,
        living: None,
        forgets: None,
        filters: Filters::default(),
    }
}

/// An engine with habits of its own.
pub(super) fn engine_for(images: &Images, faults: &Faults, trace: &Trace, rng: &mut Rng) -> SimEngine {
    let cache = images.cache.iter().map(|c| c.file.clone());
    let above = images.top.above().cloned();
    let files: Vec<_> = images.files().into_iter().chain(cache).chain(above).collect();
    SimEngine::over(&files, faults, trace, rng.draw())
}

/// The bytes of a request that writes `value`.
pub(super) fn bytes_for(range: GuestRange, value: u64) -> Vec<u8> {
    let mut b = vec![0; usize::try_from(range.len()).expect("a small request")];
    fill(&mut b, range.start().0 / 512, value);
    b
}
