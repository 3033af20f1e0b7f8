//! New VMDKs, laid out as VirtualBox and QEMU do: descriptor at sector 1, the redundant directory and its tables, then the
//! other, then grains from a whole grain on.

use super::super::blueprint::{Sequential, refused};
use super::super::{Blueprint, NewFile, NewImage, NewOption, RawArea, RawAreaKind, RawDisk};
use super::header::{FLAG_NEWLINE, FLAG_REDUNDANT, FLAG_ZEROED, KDMV, RawKdmv};
use super::stream::Stream;
use super::table::ENTRY_BYTES;
use super::text::cid_of;
use crate::error::{Error, Result};
use crate::limits::{MAX_BLOCK_BYTES, MIN_BLOCK_BYTES, SECTOR_BYTES, TABLE_PIECE_BYTES};
use crate::map::HostOffset;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, IntoBytes};

/// Sectors of an extent of a split disk.
const SPLIT_SECTORS: u64 = 4_192_256;
/// Sectors of room for an embedded descriptor.
const TEXT_SECTORS: u64 = 20;
/// Entries of a grain table.
const TABLE_ENTRIES: u64 = 512;
/// Grains of 64 KiB: what VirtualBox and QEMU make.
const GRAIN_BYTES: u64 = 64 << 10;
/// A comment has at most so many bytes, its escapes included.
const MAX_COMMENT: usize = 1024;

/// The options that are known.
pub(super) const OPTIONS: [NewOption; 3] = [
    NewOption::number("grain_size", Some("65536")),
    NewOption::word("zeroed_grain", Some("off")),
    NewOption::number("extent_size", None),
];

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Variant {
    #[default]
    Sparse,
    Flat,
    Split,
    SplitFlat,
    Esx,
    Stream,
    RawDisk,
}

impl std::str::FromStr for Variant {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "sparse" | "dynamic" => Ok(Variant::Sparse),
            "flat" | "fixed" => Ok(Variant::Flat),
            "split2g" => Ok(Variant::Split),
            "split2g-flat" => Ok(Variant::SplitFlat),
            "esx" => Ok(Variant::Esx),
            "stream" => Ok(Variant::Stream),
            "rawdisk" => Ok(Variant::RawDisk),
            _ => Err(refused(format!("unknown variant '{name}' of VMDK"))
                .hint("sparse, flat, split2g, split2g-flat, stream, rawdisk or esx")),
        }
    }
}

impl Variant {
    fn of(new: &NewImage) -> Result<Self> {
        new.variant.as_deref().map_or(Ok(Variant::default()), str::parse)
    }

    fn create_type(self) -> &'static str {
        match self {
            Variant::Sparse => "monolithicSparse",
            Variant::Flat => "monolithicFlat",
            Variant::Split => "twoGbMaxExtentSparse",
            Variant::SplitFlat => "twoGbMaxExtentFlat",
            Variant::Esx => "vmfs",
            Variant::Stream => "streamOptimized",
            Variant::RawDisk => "partitionedDevice",
        }
    }

    fn is_sparse(self) -> bool {
        matches!(self, Variant::Sparse | Variant::Split)
    }

    /// The word and the end of an extent's line.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Variant::Sparse | Variant::Split | Variant::Stream => ("SPARSE", ""),
            Variant::Flat | Variant::SplitFlat | Variant::RawDisk => ("FLAT", " 0"),
            Variant::Esx => ("VMFS", ""),
        }
    }

    fn lines(self, extents: &[NewExtent]) -> Vec<String> {
        let (word, end) = self.words();
        extents.iter().map(|e| format!("RW {} {word} \"{}\"{end}", e.sectors, e.name)).collect()
    }
}

/// An extent to be made.
struct NewExtent {
    sectors: u64,
    name: String,
}

/// A new image.
///
/// # Errors
/// As [`super::super::blueprint`].
pub(super) fn blueprint(new: &NewImage) -> Result<Blueprint> {
    new.only_options(&OPTIONS)?;
    let variant = Variant::of(new)?;
    if variant == Variant::Stream {
        return Err(refused("a streamOptimized VMDK is written once, with all its disk holds")
            .hint("vdimg convert --output-format vmdk --variant stream makes one"));
    }
    if variant == Variant::RawDisk {
        return Err(refused("no raw disk was named").hint("--raw-device DEV"));
    }
    if new.parent.is_some() && !variant.is_sparse() {
        return Err(refused("a differencing image cannot be flat").hint("sparse or split2g"));
    }
    let sparse = SparseKind::of(new)?;
    if !variant.is_sparse() && (new.option("grain_size").is_some() || sparse.zeroed) {
        return Err(refused("a flat VMDK has no grains"));
    }
    if new.option("extent_size").is_some() && !matches!(variant, Variant::Split | Variant::SplitFlat) {
        return Err(refused("only a split disk has extents of a size"));
    }
    let extents = extents(new, variant)?;
    let text = descriptor(new, variant, variant.create_type(), &variant.lines(&extents))?;
    if variant == Variant::Sparse {
        let file = sparse.file(None, extents[0].sectors, Some(&text))?;
        return Ok(Blueprint { files: vec![file] });
    }
    let mut files = Vec::new();
    for e in &extents {
        let (name, len) = (Some(e.name.clone()), e.sectors * SECTOR_BYTES);
        files.push(if variant.is_sparse() {
            sparse.file(name, e.sectors, None)?
        } else {
            let pieces = Box::new(std::iter::empty());
            NewFile { name, len, preallocate: Some((HostOffset(0), len)), pieces }
        });
    }
    let len = text.len() as u64;
    files.extend(Blueprint::single(len, None, pieces_of(HostOffset(0), text.into_bytes())).files);
    Ok(Blueprint { files })
}

/// A new stream; `None` for the variants that are made empty.
///
/// # Errors
/// As [`super::super::sequential`].
pub(in super::super) fn sequential(new: &NewImage) -> Result<Option<Box<dyn Sequential>>> {
    if Variant::of(new)? != Variant::Stream {
        return Ok(None);
    }
    new.only_options(&[])?;
    if new.parent.is_some() {
        return Err(refused("a differencing image cannot be a stream").hint("sparse or split2g"));
    }
    let extents = extents(new, Variant::Stream)?;
    let kind = Variant::Stream;
    let text = descriptor(new, kind, kind.create_type(), &kind.lines(&extents))?;
    Ok(Some(Box::new(Stream::new(extents[0].sectors, text)?)))
}

/// Bytes in pieces of bounded size.
fn pieces_of(at: HostOffset, bytes: Vec<u8>) -> Vec<(HostOffset, Vec<u8>)> {
    let offsets = (0u64..).step_by(TABLE_PIECE_BYTES);
    offsets.zip(bytes.chunks(TABLE_PIECE_BYTES)).map(|(off, piece)| (at.plus(off), piece.to_vec())).collect()
}

/// A new image of a disk of the host: the areas as extents, the copies of its partition table in a file of their own.
///
/// # Errors
/// As [`super::super::raw_disk`].
pub(in super::super) fn raw_disk(new: &NewImage, disk: &RawDisk) -> Result<Blueprint> {
    new.only_options(&[])?;
    if new.variant.is_some() && Variant::of(new)? != Variant::RawDisk {
        return Err(refused("a raw disk was named, but another variant").hint("--variant rawdisk"));
    }
    if new.parent.is_some() {
        return Err(refused("a differencing image cannot be of a raw disk").hint("make one over it"));
    }
    let table = format!("{}-pt.vmdk", stem(&new.file_name)?);
    let (mut lines, mut copied) = (Vec::new(), Vec::new());
    for RawArea { sectors, kind } in &disk.areas {
        lines.push(match kind {
            RawAreaKind::Device { name, .. } if is_unspeakable(name) => {
                return Err(refused("a descriptor cannot hold the device's name"));
            }
            RawAreaKind::Device { name, offset, read_only } => {
                let access = if *read_only { "RDONLY" } else { "RW" };
                format!("{access} {sectors} FLAT \"{name}\" {offset}")
            }
            RawAreaKind::Copy(bytes) => {
                let at = copied.len() as u64 / SECTOR_BYTES;
                copied.extend(bytes);
                format!("RW {sectors} FLAT \"{table}\" {at}")
            }
            RawAreaKind::Hidden => format!("RW {sectors} ZERO"),
        });
    }
    let kind = if disk.is_whole { "fullDevice" } else { Variant::RawDisk.create_type() };
    let text = descriptor(new, Variant::RawDisk, kind, &lines)?;
    let mut files = Vec::new();
    if !copied.is_empty() {
        let len = copied.len() as u64;
        let pieces = Box::new(pieces_of(HostOffset(0), copied).into_iter());
        files.push(NewFile { name: Some(table), len, preallocate: None, pieces });
    }
    let len = text.len() as u64;
    files.extend(Blueprint::single(len, None, pieces_of(HostOffset(0), text.into_bytes())).files);
    Ok(Blueprint { files })
}

/// A name that cannot stand in a descriptor.
pub(super) fn is_unspeakable(name: &str) -> bool {
    name.chars().any(|c| c.is_control() || matches!(c, '"' | '\u{fffd}'))
}

/// The image's name without its extension.
fn stem(name: &str) -> Result<&str> {
    if is_unspeakable(name) {
        return Err(refused("a descriptor cannot hold that file name").hint("choose a name without quotes"));
    }
    let cut = name
        .len()
        .checked_sub(5)
        .filter(|n| name.is_char_boundary(*n) && name[*n..].eq_ignore_ascii_case(".vmdk"));
    Ok(&name[..cut.unwrap_or(name.len())])
}

fn extents(new: &NewImage, variant: Variant) -> Result<Vec<NewExtent>> {
    let name = &new.file_name;
    let stem = stem(name)?;
    let all = new.size_bytes / SECTOR_BYTES;
    let letter = match variant {
        Variant::Sparse | Variant::Stream => return Ok(vec![NewExtent { sectors: all, name: name.clone() }]),
        Variant::Flat | Variant::Esx | Variant::RawDisk => {
            return Ok(vec![NewExtent { sectors: all, name: format!("{stem}-flat.vmdk") }]);
        }
        Variant::Split => 's',
        Variant::SplitFlat => 'f',
    };
    let most = extent_sectors(new)?;
    let count = all.div_ceil(most);
    if count > 999 {
        return Err(refused(format!("a disk of {count} extents")).hint("at most 999: choose sparse or flat"));
    }
    Ok((0..count)
        .map(|i| NewExtent {
            sectors: most.min(all - i * most),
            name: format!("{stem}-{letter}{:03}.vmdk", i + 1),
        })
        .collect())
}

/// Sectors of an extent of a split disk. Smaller ones are for tests: no other program makes any.
fn extent_sectors(new: &NewImage) -> Result<u64> {
    let Some(bytes) = new.option_size("extent_size")? else { return Ok(SPLIT_SECTORS) };
    let most = SPLIT_SECTORS * SECTOR_BYTES;
    if bytes == 0 || bytes > most || !bytes.is_multiple_of(MIN_BLOCK_BYTES) {
        let what = format!("extents of {bytes} bytes: no multiple of {MIN_BLOCK_BYTES} up to {most}");
        return Err(refused(what));
    }
    Ok(bytes / SECTOR_BYTES)
}

/// What all sparse extents of an image have in common.
#[derive(Clone, Copy)]
struct SparseKind {
    grain_bytes: u64,
    zeroed: bool,
}

impl SparseKind {
    fn of(new: &NewImage) -> Result<Self> {
        let grain_bytes = new.option_size("grain_size")?.unwrap_or(GRAIN_BYTES);
        if !grain_bytes.is_power_of_two() || !(MIN_BLOCK_BYTES..=MAX_BLOCK_BYTES).contains(&grain_bytes) {
            let what = format!(
                "grains of {grain_bytes} bytes: no power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}"
            );
            return Err(refused(what).hint("64K is what VirtualBox and QEMU make"));
        }
        let zeroed = match new.option("zeroed_grain").map(str::to_ascii_lowercase).as_deref() {
            None | Some("off") => false,
            Some("on") => true,
            Some(other) => return Err(refused(format!("zeroed_grain={other}")).hint("on or off")),
        };
        Ok(SparseKind { grain_bytes, zeroed })
    }

    /// The file of an extent.
    fn file(self, name: Option<String>, sectors: u64, text: Option<&str>) -> Result<NewFile> {
        let grain = self.grain_bytes / SECTOR_BYTES;
        let tables = sectors.div_ceil(grain * TABLE_ENTRIES);
        let directory = (tables * ENTRY_BYTES).div_ceil(SECTOR_BYTES);
        let table = TABLE_ENTRIES * ENTRY_BYTES / SECTOR_BYTES;
        let redundant_at = 1 + text.map_or(0, |_| TEXT_SECTORS);
        let main_at = redundant_at + directory + tables * table;
        let overhead = (main_at + directory + tables * table).next_multiple_of(grain);
        if overhead + sectors.next_multiple_of(grain) > 1 << 32 {
            let what = format!(
                "a sparse extent of {} bytes: its entries reach 2 TiB of the file",
                sectors * SECTOR_BYTES
            );
            return Err(refused(what).hint("choose split2g or flat"));
        }
        let mut head = RawKdmv::new_zeroed();
        head.magic = KDMV;
        head.version = U32::new(if self.zeroed { 2 } else { 1 });
        let zeroed = if self.zeroed { FLAG_ZEROED } else { 0 };
        head.flags = U32::new(FLAG_NEWLINE | FLAG_REDUNDANT | zeroed);
        head.capacity = U64::new(sectors);
        head.grain = U64::new(grain);
        if text.is_some() {
            (head.descriptor_at, head.descriptor_len) = (U64::new(1), U64::new(TEXT_SECTORS));
        }
        head.entries = U32::new(u32::try_from(TABLE_ENTRIES).expect("a small constant"));
        (head.redundant_at, head.directory_at) = (U64::new(redundant_at), U64::new(main_at));
        head.overhead = U64::new(overhead);
        head.newlines = *b"\n \r\n";
        head.compression = U16::new(0);
        let mut start = head.as_bytes().to_vec();
        if let Some(text) = text {
            let room = usize::try_from(TEXT_SECTORS * SECTOR_BYTES).expect("a small constant");
            if text.len() >= room {
                return Err(refused(format!("a descriptor of {} bytes; {room} are there", text.len())));
            }
            start.extend(text.as_bytes());
        }
        let entries = move |at: u64| {
            let first = at + directory;
            let bytes = (0..tables).flat_map(move |i| {
                u32::try_from(first + i * table).expect("below the overhead, which was checked").to_le_bytes()
            });
            pieces_of(HostOffset(at * SECTOR_BYTES), bytes.collect())
        };
        // the header last: a file that was begun and not finished is no VMDK
        let pieces = entries(redundant_at)
            .into_iter()
            .chain(entries(main_at))
            .chain(std::iter::once((HostOffset(0), start)));
        Ok(NewFile { name, len: overhead * SECTOR_BYTES, preallocate: None, pieces: Box::new(pieces) })
    }
}

/// The comment as it stands in a descriptor.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] where it is too long.
pub(super) fn escaped(comment: &str) -> Result<String> {
    let escaped = comment.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
    if escaped.len() > MAX_COMMENT || escaped.contains('\0') {
        let what =
            format!("the comment has {} bytes; {MAX_COMMENT} without NUL are the limit", escaped.len());
        return Err(refused(what));
    }
    Ok(escaped)
}

fn descriptor(new: &NewImage, variant: Variant, kind: &str, extents: &[String]) -> Result<String> {
    let nil = Uuid::nil();
    let parent = new.parent.as_ref();
    let uuid = new.uuid.unwrap_or_else(Uuid::new_v4);
    if uuid.is_nil() || new.modification.is_nil() {
        return Err(refused("a nil UUID names nothing"));
    }
    let mut t = String::from("# Disk DescriptorFile\nversion=1\n");
    t += &format!("CID={:08x}\n", cid_of(new.modification));
    let parent_cid = parent.and_then(|p| p.info.content_id).unwrap_or(u32::MAX);
    t += &format!("parentCID={parent_cid:08x}\ncreateType=\"{kind}\"\n");
    if let Some(path) = parent.and_then(|p| p.path.as_deref()) {
        if path.chars().any(|c| c.is_control() || c == '"') {
            return Err(refused("a descriptor cannot hold the parent's file name"));
        }
        t += &format!("parentFileNameHint=\"{path}\"\n");
    }
    t += "\n# Extent description\n";
    extents.iter().for_each(|line| t += &format!("{line}\n"));
    let adapter = if variant == Variant::Esx { "lsilogic" } else { "ide" };
    t += "\n# The disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\n";
    t += &format!("ddb.adapterType=\"{adapter}\"\n");
    let (c, h, s) = geometry(new)?;
    t += &format!(
        "ddb.geometry.cylinders=\"{c}\"\nddb.geometry.heads=\"{h}\"\nddb.geometry.sectors=\"{s}\"\n"
    );
    // Without a content ID only the parent's UUID says that there is a parent; one of a format that has no UUIDs gets one
    // that nobody has, and is found by its name.
    let unnamed = parent.filter(|_| parent_cid == u32::MAX).map(|_| Uuid::new_v4());
    let of_parent = parent.and_then(|p| p.info.uuid).or(unnamed).unwrap_or(nil);
    t += &format!("ddb.uuid.image=\"{uuid}\"\n");
    t += &format!("ddb.uuid.parent=\"{of_parent}\"\n");
    t += &format!("ddb.uuid.modification=\"{}\"\n", new.modification);
    let modification = parent.and_then(|p| p.info.modification_uuid).unwrap_or(nil);
    t += &format!("ddb.uuid.parentmodification=\"{modification}\"\n");
    if let Some(comment) = new.comment.as_deref().filter(|c| !c.is_empty()) {
        t += &format!("ddb.comment=\"{}\"\n", escaped(comment)?);
    }
    Ok(t)
}

/// What was asked for, or what VirtualBox and QEMU take.
fn geometry(new: &NewImage) -> Result<(u32, u32, u32)> {
    let Some((c, h, s)) = new.geometry else {
        let cylinders = (new.size_bytes / SECTOR_BYTES / (16 * 63)).clamp(1, 16383);
        return Ok((u32::try_from(cylinders).expect("clamped"), 16, 63));
    };
    if c == 0 || !(1..=255).contains(&h) || !(1..=63).contains(&s) {
        return Err(
            refused(format!("the geometry {c}/{h}/{s} is not possible")).hint("heads to 255, sectors to 63")
        );
    }
    Ok((c, h, s))
}
