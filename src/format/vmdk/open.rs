//! Opening a VMDK: the descriptor, and the extents it lists.

use super::super::{ImageFile, OpenHow, Reference};
use super::descriptor::{Access, Descriptor, ExtentLine, Keep, MAX_BYTES};
use super::header::{COWD, KDMV, SparseHeader};
use super::layout::Layout;
use super::map::{Body, Part, Session, VmdkMap};
use super::sesparse::{self, SeSparse};
use super::sparse::{CACHE_BYTES, Sparse, Wanted, layout_of, whole_bytes};
use super::text::Text;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_DISK_BYTES, SECTOR_BYTES};
use crate::map::{ByteSource, GuestOffset, GuestRange, HostOffset, ImageInfo};
use std::sync::Mutex;
use std::sync::atomic::AtomicU32;

/// A descriptor, and where its bytes are.
pub(super) struct Found {
    pub(super) descriptor: Descriptor,
    pub(super) at: HostOffset,
    pub(super) bytes: Vec<u8>,
    /// It is a part of the one extent it lists.
    pub(super) embedded: bool,
}

/// An extent with its file and its place on the disk.
pub(super) struct Placed<'a> {
    pub(super) line: ExtentLine,
    pub(super) file: Option<ImageFile<'a>>,
    pub(super) range: GuestRange,
}

/// Finds the descriptor in an image's first file.
///
/// # Errors
/// As [`super::super::open`].
pub(super) fn find_descriptor(source: &dyn ByteSource) -> Result<Found> {
    let mut magic = [0; 4];
    if source.len() >= magic.len() as u64 {
        source.read_at(HostOffset(0), &mut magic)?;
    }
    let (at, len, embedded) = match magic {
        KDMV => {
            let header = SparseHeader::read(source)?;
            let (at, len) = header.descriptor.ok_or_else(alone)?;
            (at, len, true)
        }
        COWD => return Err(alone()),
        _ => (HostOffset(0), source.len(), false),
    };
    let len = usize::try_from(len).ok().filter(|n| *n <= MAX_BYTES);
    let Some(len) = len else {
        return Err(Error::new(ErrorKind::NotThisFormat, "the file is no VMDK: too large for a descriptor"));
    };
    let mut bytes = vec![0; len];
    source.read_at(at, &mut bytes)?;
    if embedded && bytes.first().is_none_or(|b| *b == 0) {
        return Err(alone()); // QEMU leaves the room for it empty
    }
    let descriptor = Descriptor::parse(&bytes).map_err(|e| match (e.kind(), embedded) {
        (ErrorKind::NotThisFormat, true) => Error::new(ErrorKind::Corrupt, "its descriptor is damaged"),
        _ => e,
    })?;
    refuse_raw_maps(&descriptor)?;
    if embedded && descriptor.extents().len() != 1 {
        let what =
            format!("its descriptor lists {} extents, but is a part of one", descriptor.extents().len());
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    Ok(Found { descriptor, at, bytes, embedded })
}

/// An extent in itself is no image.
fn alone() -> Error {
    Error::new(ErrorKind::NotThisFormat, "this is one extent of a VMDK, without its descriptor")
        .hint("name the file that lists the extents")
}

/// The image describes a disk of the host: extents may be devices.
pub(super) fn is_raw_disk(d: &Descriptor) -> bool {
    let kind = d.get("createType").unwrap_or_default();
    ["fullDevice", "partitionedDevice"].iter().any(|k| k.eq_ignore_ascii_case(kind))
}

/// What ESX calls a raw disk is one of ESX.
fn refuse_raw_maps(d: &Descriptor) -> Result<()> {
    let kind = d.get("createType").unwrap_or_default();
    let raw = ["vmfsRaw", "vmfsRawDeviceMap", "vmfsPassthroughRawDeviceMap"];
    if raw.iter().any(|k| k.eq_ignore_ascii_case(kind)) {
        let what = format!("VMDKs of raw disks ({kind}) are not supported");
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    Ok(())
}

/// The names of an image's further files, each once.
fn names(found: &Found) -> Vec<&str> {
    let mut names = Vec::new();
    if !found.embedded {
        for name in found.descriptor.extents().iter().filter_map(|e| e.file.as_deref()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names
}

/// The further files of an image.
///
/// # Errors
/// As [`super::super::open`].
pub(super) fn references(source: &dyn ByteSource) -> Result<Vec<Reference>> {
    let found = find_descriptor(source)?;
    let lines = found.descriptor.extents();
    let writable =
        |name: &str| lines.iter().any(|l| l.file.as_deref() == Some(name) && l.access == Access::ReadWrite);
    // The table of partitions lies beside the image, the disk elsewhere.
    let is_device = |name: &str| is_raw_disk(&found.descriptor) && name.starts_with('/');
    let one = |name: &str| Reference {
        name: name.to_string(),
        writable: writable(name),
        is_device: is_device(name),
    };
    Ok(names(&found).into_iter().map(one).collect())
}

/// The extents of an image in the order of the disk, each with its file.
///
/// # Errors
/// [`ErrorKind::Limit`] for a disk that is too large; [`ErrorKind::Unsupported`] for kinds of extents.
pub(super) fn placed<'a>(found: &Found, files: &[ImageFile<'a>]) -> Result<Vec<Placed<'a>>> {
    let (first, further) = files.split_first().expect("an image has a file");
    let names = names(found);
    let mut at = 0;
    let mut all = Vec::new();
    for line in found.descriptor.extents() {
        let len = line.sectors * SECTOR_BYTES; // at most 2^54 sectors
        let start = at;
        at = u64::checked_add(at, len).filter(|end| *end <= MAX_DISK_BYTES).ok_or_else(|| {
            let what = format!("its extents hold more than {MAX_DISK_BYTES} bytes");
            Error::new(ErrorKind::Limit, what)
        })?;
        if line.access == Access::None && line.keep != Keep::Zero {
            let what = "an extent that may not even be read (NOACCESS) is not supported";
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let file = match &line.file {
            None => None,
            Some(_) if found.embedded => Some(*first),
            Some(name) => {
                let i = names.iter().position(|n| n == name).expect("every name is listed");
                Some(
                    *further
                        .get(i)
                        .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("'{name}' was not opened")))?,
                )
            }
        };
        let range = GuestRange::between(GuestOffset(start), GuestOffset(at));
        all.push(Placed { line: line.clone(), file, range });
    }
    Ok(all)
}

/// Says which extent an error is about.
pub(super) fn of_extent(e: Error, placed: &Placed<'_>) -> Error {
    match &placed.line.file {
        Some(name) => Error::new(e.kind(), format!("extent '{}': {e}", name.escape_debug())),
        None => e,
    }
}

/// Opens an image.
///
/// # Errors
/// As [`super::super::open`].
pub(super) fn open(files: &[ImageFile<'_>], how: OpenHow) -> Result<VmdkMap> {
    let found = find_descriptor(files[0].source)?;
    let placed = placed(&found, files)?;
    let is_base = !is_diff(&found.descriptor);
    let write = !how.read_only && !how.info_only;
    if write && placed.iter().all(|p| p.line.access != Access::ReadWrite) {
        let what = "all extents of this VMDK are only to be read";
        return Err(Error::new(ErrorKind::Unsupported, what).hint("pass --read-only, or convert it"));
    }
    let layouts =
        placed.iter().map(|p| layout(p).map_err(|e| of_extent(e, p))).collect::<Result<Vec<_>>>()?;
    let mut budget = whole_bytes();
    let (mut parts, mut first_unit) = (Vec::new(), 0);
    let se_sparse = placed.iter().filter(|p| p.line.keep == Keep::SeSparse).count() as u64;
    let large = (paged(&layouts, budget) + se_sparse).max(1);
    for ((extent, p), layout) in (0u16..).zip(&placed).zip(layouts) {
        let grains = layout.as_ref().map_or(1, Layout::grains);
        let cache = layout.as_ref().and_then(|l| match budget.checked_sub(l.tables_bytes()) {
            Some(left) => {
                budget = left;
                None
            }
            None => Some(CACHE_BYTES / large),
        });
        let writable = p.line.access == Access::ReadWrite;
        let body = match (layout, p.file) {
            (Some(layout), Some(ImageFile { id, source })) => {
                let write = write && writable;
                let wanted = Wanted { file: id, extent, range: p.range, is_base, write, cache };
                let sparse = Sparse::open(source, layout, &wanted).map_err(|e| of_extent(e, p))?;
                Body::Sparse(Box::new(sparse))
            }
            (None, Some(ImageFile { id, source })) if p.line.keep == Keep::SeSparse => {
                if write && writable {
                    let what = "seSparse VMDKs of ESX are only read";
                    return Err(
                        Error::new(ErrorKind::Unsupported, what).hint("pass --read-only, or convert it")
                    );
                }
                let pages = CACHE_BYTES / large;
                let extent =
                    SeSparse::open(source, id, extent, p.range, pages).map_err(|e| of_extent(e, p))?;
                Body::SeSparse(Box::new(extent))
            }
            (None, Some(ImageFile { id, source })) => flat(p, id, source)?,
            (_, None) => Body::Zero,
        };
        let ignores = writable && p.line.keep == Keep::Zero && is_raw_disk(&found.descriptor);
        parts.push(Part { range: p.range, first_unit, writable, ignores, body });
        first_unit += grains;
    }
    let info = info(&found.descriptor, &parts);
    Ok(VmdkMap {
        parts: parts.into_boxed_slice(),
        read_only: !write,
        text: Text::new(files[0].id, found.at, found.bytes),
        info: Mutex::new(info),
        session: Mutex::new(Session::default()),
        active: AtomicU32::new(u32::MAX),
    })
}

/// Extents of which the tables are not kept whole.
fn paged(layouts: &[Option<Layout>], mut budget: u64) -> u64 {
    let mut count = 0;
    for l in layouts.iter().flatten() {
        match budget.checked_sub(l.tables_bytes()) {
            Some(left) => budget = left,
            None => count += 1,
        }
    }
    count
}

/// The layout of a sparse extent; `None` for the other kinds.
fn layout(p: &Placed<'_>) -> Result<Option<Layout>> {
    match (p.line.keep, p.file) {
        (Keep::Sparse, Some(f)) => layout_of(f.source).map(Some),
        _ => Ok(None),
    }
}

fn flat(p: &Placed<'_>, id: crate::map::FileId, source: &dyn ByteSource) -> Result<Body> {
    let off = HostOffset(p.line.offset * SECTOR_BYTES); // at most 2^54 sectors
    let end = off.checked_add(p.range.len());
    if end.is_none_or(|end| end.0 > source.len()) {
        let what = format!(
            "the file has {} bytes, but holds {} bytes of the disk from byte {} on",
            source.len(),
            p.range.len(),
            off.0
        );
        return Err(of_extent(Error::new(ErrorKind::Corrupt, what), p));
    }
    Ok(Body::Flat { file: id, off })
}

/// VirtualBox says whose child an image is by UUID alone, the others by content id and name.
pub(super) fn is_diff(d: &Descriptor) -> bool {
    d.parent_cid().is_some() || d.uuid("ddb.uuid.parent").is_some()
}

fn info(d: &Descriptor, parts: &[Part]) -> ImageInfo {
    let create_type = d.get("createType").unwrap_or_default();
    let variants = [
        ("monolithicSparse", "sparse"),
        ("monolithicFlat", "flat"),
        ("twoGbMaxExtentSparse", "split2g"),
        ("twoGbMaxExtentFlat", "split2g-flat"),
        ("streamOptimized", "stream"),
        ("vmfs", "esx"),
        ("fullDevice", "rawdisk"),
        ("partitionedDevice", "rawdisk"),
        ("vmfsSparse", "vmfs-sparse"),
        ("seSparse", "se-sparse"),
    ];
    let known = variants.iter().find(|(name, _)| name.eq_ignore_ascii_case(create_type));
    let header = parts.iter().find_map(|p| match &p.body {
        Body::Sparse(s) => Some(&s.layout.header),
        _ => None,
    });
    let is_diff = is_diff(d);
    let se_sparse = parts.iter().any(|p| matches!(p.body, Body::SeSparse(_)));
    let kind = |h: &SparseHeader| h.kdmv_version.map_or("COWD".to_string(), |v| v.to_string());
    ImageInfo {
        format: "vmdk",
        variant: if is_diff { "diff" } else { known.map_or("other", |(_, v)| v) },
        virtual_size: parts.last().map_or(0, |p| p.range.end().0),
        block_size: header.map(|h| h.grain_bytes).or(se_sparse.then_some(sesparse::GRAIN_BYTES)),
        allocated_blocks: None,
        uuid: d.uuid("ddb.uuid.image"),
        modification_uuid: d.uuid("ddb.uuid.modification"),
        parent_uuid: d.uuid("ddb.uuid.parent"),
        parent_modification_uuid: d.uuid("ddb.uuid.parentmodification"),
        content_id: d.cid(),
        parent_content_id: d.parent_cid(),
        parent_names: d.parent_hint().filter(|_| is_diff).map(str::to_string).into_iter().collect(),
        parent_format: None,
        comment: d.comment(),
        geometry: d.geometry(""),
        logical_geometry: d.geometry("bios"),
        version: header.map(kind).or(se_sparse.then(|| "seSparse 2.1".to_string())),
        ..ImageInfo::default()
    }
}
