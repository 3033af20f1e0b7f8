//! The pre-header and header of a VDI, in the versions 0.x and 1.x. Little endian; offsets in
//! docs/formats/vdi.md. What we do not know in them survives: only the fields we change are patched.

use super::layout::Layout;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_BLOCK_BYTES, MAX_DISK_BYTES, MAX_TABLE_BYTES, MIN_BLOCK_BYTES, SECTOR_BYTES};
use crate::map::{ByteSource, HostOffset};
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The signature at byte 0x40, whatever the text before it says.
pub const SIGNATURE: u32 = 0xbeda_107f;
/// Header size that 7.x writes.
pub(super) const HEADER_SIZE: u32 = 400;
/// Header size of 1.1 before the logical geometry was added; QEMU still writes it.
pub(super) const OLD_HEADER_SIZE: u32 = 384;
/// Bytes of the pre-header.
pub(super) const PRE_BYTES: u32 = 72;
/// Bytes of the header of versions 0.x.
const V0_BYTES: u32 = 348;
const VERSION_1_1: u32 = 0x0001_0001;
/// Flag in [`V1::flags`]: new blocks are filled with zeros when the file grows.
const FLAG_ZERO_EXPAND: u32 = 1;

#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Pre {
    text: [u8; 64],
    signature: U32,
    version: U32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Geometry {
    cylinders: U32,
    heads: U32,
    sectors: U32,
    sector_bytes: U32,
}

#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct V0 {
    kind: U32,
    flags: U32,
    comment: [u8; 256],
    geometry: Geometry,
    disk_bytes: U64,
    block_bytes: U32,
    blocks: U32,
    allocated: U32,
    uuid: [u8; 16],
    modification: [u8; 16],
    parent: [u8; 16],
}

#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct V1 {
    size: U32,
    kind: U32,
    flags: U32,
    comment: [u8; 256],
    table_at: U32,
    data_at: U32,
    geometry: Geometry,
    dummy: U32,
    disk_bytes: U64,
    block_bytes: U32,
    extra_bytes: U32,
    blocks: U32,
    allocated: U32,
    uuid: [u8; 16],
    modification: [u8; 16],
    parent: [u8; 16],
    parent_modification: [u8; 16],
}

#[derive(Clone, Debug)]
enum Body {
    V0(Box<V0>),
    V1(Box<V1>, Option<Geometry>),
}

/// Type of an image, as the header says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Type 1: blocks are added as they are written.
    Dynamic,
    /// Type 2: every block has its place from the start.
    Fixed,
    /// Type 3: a difference that was meant to be thrown away.
    Undo,
    /// Type 4: a difference to a parent.
    Diff,
}

impl Kind {
    fn of(code: u32) -> Option<Self> {
        match code {
            1 => Some(Kind::Dynamic),
            2 => Some(Kind::Fixed),
            3 => Some(Kind::Undo),
            4 => Some(Kind::Diff),
            _ => None,
        }
    }

    fn code(self) -> u32 {
        match self {
            Kind::Dynamic => 1,
            Kind::Fixed => 2,
            Kind::Undo => 3,
            Kind::Diff => 4,
        }
    }
}

/// What a header of a new image says.
#[derive(Clone, Debug)]
pub(super) struct NewHeader<'a> {
    pub(super) kind: Kind,
    pub(super) zero_expand: bool,
    pub(super) comment: &'a str,
    pub(super) table_at: u32,
    pub(super) data_at: u32,
    pub(super) disk_bytes: u64,
    pub(super) block_bytes: u32,
    pub(super) blocks: u32,
    pub(super) allocated: u32,
    pub(super) uuid: Uuid,
    pub(super) modification: Uuid,
    pub(super) parent: Uuid,
    pub(super) parent_modification: Uuid,
    pub(super) geometry: Option<(u32, u32, u32)>,
}

/// The header as it is in the file.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pre: Pre,
    body: Body,
}

/// A rule that a header breaks.
#[derive(Clone, Debug)]
pub(super) struct BrokenRule {
    pub(super) what: String,
    /// Nothing but the count of allocated blocks is wrong, and that can be counted anew.
    pub(super) count_alone: bool,
}

/// Reads a structure of fixed size.
fn read<T: FromZeros + FromBytes + IntoBytes>(source: &dyn ByteSource, at: u32) -> Result<T> {
    let mut value = T::new_zeroed();
    source.read_at(HostOffset(u64::from(at)), value.as_mut_bytes()).map_err(|e| match e.kind() {
        ErrorKind::Corrupt => {
            corrupt(format!("the file ends inside the VDI header, at {} bytes", source.len()))
        }
        _ => e,
    })?;
    Ok(value)
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

impl Header {
    /// Reads a header whose fields are yet to be judged.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] without the signature, [`ErrorKind::Unsupported`] for another version,
    /// [`ErrorKind::Corrupt`] where file or header are too short to hold the fields.
    pub(super) fn read(source: &dyn ByteSource) -> Result<Self> {
        let pre: Pre = read(source, 0)?;
        if pre.signature.get() != SIGNATURE {
            let what = format!("not a VDI: the signature at byte 64 is {:#010x}", pre.signature.get());
            return Err(Error::new(ErrorKind::NotThisFormat, what));
        }
        let body = match pre.version.get() >> 16 {
            0 => Body::V0(Box::new(read(source, PRE_BYTES)?)),
            1 => Self::read_v1(source)?,
            major => {
                let what = format!("VDI version {major}.{} is not supported", pre.version.get() & 0xffff);
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
        };
        Ok(Header { pre, body })
    }

    fn read_v1(source: &dyn ByteSource) -> Result<Body> {
        let v1: V1 = read(source, PRE_BYTES)?;
        let geometry = match v1.size.get() {
            OLD_HEADER_SIZE => None,
            HEADER_SIZE.. => Some(read(source, PRE_BYTES + OLD_HEADER_SIZE)?),
            other => {
                return Err(corrupt(format!("the header says it has {other} bytes; 384 or 400 are right")));
            }
        };
        Ok(Body::V1(Box::new(v1), geometry))
    }

    /// A header in the form VirtualBox 7 writes.
    pub(super) fn new(n: &NewHeader<'_>) -> Self {
        let mut pre = Pre::new_zeroed();
        let text = b"<<< Oracle VirtualBox Disk Image >>>\n";
        pre.text[..text.len()].copy_from_slice(text);
        pre.signature = SIGNATURE.into();
        pre.version = VERSION_1_1.into();
        let mut v1 = V1::new_zeroed();
        v1.size = HEADER_SIZE.into();
        v1.kind = n.kind.code().into();
        v1.flags = if n.zero_expand { FLAG_ZERO_EXPAND } else { 0 }.into();
        v1.comment[..n.comment.len()].copy_from_slice(n.comment.as_bytes());
        v1.table_at = n.table_at.into();
        v1.data_at = n.data_at.into();
        v1.geometry = Geometry::of(None);
        v1.disk_bytes = n.disk_bytes.into();
        v1.block_bytes = n.block_bytes.into();
        v1.blocks = n.blocks.into();
        v1.allocated = n.allocated.into();
        v1.uuid = n.uuid.to_bytes_le();
        v1.modification = n.modification.to_bytes_le();
        v1.parent = n.parent.to_bytes_le();
        v1.parent_modification = n.parent_modification.to_bytes_le();
        Header { pre, body: Body::V1(Box::new(v1), Some(Geometry::of(n.geometry))) }
    }

    /// The bytes from the start of the file on that hold fields we know.
    pub(super) fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.pre.as_bytes());
        match &self.body {
            Body::V0(v0) => out.extend_from_slice(v0.as_bytes()),
            Body::V1(v1, geometry) => {
                out.extend_from_slice(v1.as_bytes());
                out.extend_from_slice(geometry.as_ref().map_or(&[], |g| g.as_bytes()));
            }
        }
    }

    /// The count of allocated blocks: where VirtualBox and QEMU put the next one.
    pub(super) fn allocated(&self) -> u32 {
        match &self.body {
            Body::V0(h) => h.allocated.get(),
            Body::V1(h, _) => h.allocated.get(),
        }
    }

    pub(super) fn set_allocated(&mut self, count: u32) {
        match &mut self.body {
            Body::V0(h) => h.allocated = count.into(),
            Body::V1(h, _) => h.allocated = count.into(),
        }
    }

    pub(super) fn set_disk_bytes(&mut self, bytes: u64) {
        match &mut self.body {
            Body::V0(h) => h.disk_bytes = bytes.into(),
            Body::V1(h, _) => h.disk_bytes = bytes.into(),
        }
    }

    /// The header says where table and blocks begin; otherwise they follow each other, and the table keeps its size.
    pub(super) fn has_offsets(&self) -> bool {
        matches!(self.body, Body::V1(..))
    }

    /// Where table and blocks are, and how many entries there are.
    ///
    /// # Panics
    /// Where [`Self::has_offsets`] is false.
    pub(super) fn set_places(&mut self, table_at: u32, data_at: u32, blocks: u32) {
        let Body::V1(h, _) = &mut self.body else { unreachable!("a header without offsets") };
        (h.table_at, h.data_at, h.blocks) = (table_at.into(), data_at.into(), blocks.into());
    }

    pub(super) fn set_modification(&mut self, uuid: Uuid) {
        match &mut self.body {
            Body::V0(h) => h.modification = uuid.to_bytes_le(),
            Body::V1(h, _) => h.modification = uuid.to_bytes_le(),
        }
    }

    /// Another parent; the nil UUID: none any more, and what is not allocated reads as zeros.
    pub(super) fn set_parent(&mut self, parent: Uuid, modification: Uuid) {
        let base = parent.is_nil() && self.is_diff();
        match &mut self.body {
            Body::V0(h) => {
                h.parent = parent.to_bytes_le();
                h.kind = if base { Kind::Dynamic.code().into() } else { h.kind };
            }
            Body::V1(h, _) => {
                (h.parent, h.parent_modification) = (parent.to_bytes_le(), modification.to_bytes_le());
                h.kind = if base { Kind::Dynamic.code().into() } else { h.kind };
            }
        }
    }

    pub(super) fn set_uuid(&mut self, uuid: Uuid) {
        match &mut self.body {
            Body::V0(h) => h.uuid = uuid.to_bytes_le(),
            Body::V1(h, _) => h.uuid = uuid.to_bytes_le(),
        }
    }

    /// What a differencing image says of its parent.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`]: versions 0.x do not know modification UUIDs of parents.
    pub(super) fn set_parent_uuids(&mut self, parent: Uuid, modification: Uuid) -> Result<()> {
        match &mut self.body {
            Body::V0(_) if !modification.is_nil() => {
                let what = "VDIs of versions 0.x have no place for a parent modification UUID";
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            Body::V0(h) => h.parent = parent.to_bytes_le(),
            Body::V1(h, _) => {
                (h.parent, h.parent_modification) = (parent.to_bytes_le(), modification.to_bytes_le());
            }
        }
        Ok(())
    }

    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for one that is too long.
    pub(super) fn set_comment(&mut self, comment: &str) -> Result<()> {
        let place = match &mut self.body {
            Body::V0(h) => &mut h.comment,
            Body::V1(h, _) => &mut h.comment,
        };
        if comment.len() >= place.len() {
            let what = format!("the comment has {} bytes; 255 are the limit", comment.len());
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        place.fill(0);
        place[..comment.len()].copy_from_slice(comment.as_bytes());
        Ok(())
    }

    /// The logical geometry; where there is no field for it, the older one has it, which says nothing otherwise.
    pub(super) fn set_geometry(&mut self, chs: (u32, u32, u32)) {
        let new = Geometry::of(Some(chs));
        match &mut self.body {
            Body::V0(h) => h.geometry = new,
            Body::V1(h, None) => h.geometry = new,
            Body::V1(h, Some(logical)) => (h.geometry, *logical) = (Geometry::of(None), new),
        }
    }

    fn kind_code(&self) -> u32 {
        match &self.body {
            Body::V0(h) => h.kind.get(),
            Body::V1(h, _) => h.kind.get(),
        }
    }

    /// The type; dynamic where the code is none (and [`Self::broken_rules`] says so).
    pub(super) fn kind(&self) -> Kind {
        Kind::of(self.kind_code()).unwrap_or(Kind::Dynamic)
    }

    /// What is not allocated here is looked for in a parent.
    pub(super) fn is_diff(&self) -> bool {
        matches!(self.kind(), Kind::Diff | Kind::Undo)
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        match &self.body {
            Body::V0(h) => h.disk_bytes.get(),
            Body::V1(h, _) => h.disk_bytes.get(),
        }
    }

    pub(super) fn uuid(&self) -> Uuid {
        match &self.body {
            Body::V0(h) => Uuid::from_bytes_le(h.uuid),
            Body::V1(h, _) => Uuid::from_bytes_le(h.uuid),
        }
    }

    pub(super) fn modification(&self) -> Uuid {
        match &self.body {
            Body::V0(h) => Uuid::from_bytes_le(h.modification),
            Body::V1(h, _) => Uuid::from_bytes_le(h.modification),
        }
    }

    /// The parent's UUID; nil for a base.
    pub(super) fn parent(&self) -> Uuid {
        match &self.body {
            Body::V0(h) => Uuid::from_bytes_le(h.parent),
            Body::V1(h, _) => Uuid::from_bytes_le(h.parent),
        }
    }

    /// The parent's modification UUID when the diff was made; nil where the version has none.
    pub(super) fn parent_modification(&self) -> Uuid {
        match &self.body {
            Body::V0(_) => Uuid::nil(),
            Body::V1(h, _) => Uuid::from_bytes_le(h.parent_modification),
        }
    }

    /// The comment up to its NUL; what is not UTF-8 in it is replaced.
    pub(super) fn comment(&self) -> String {
        let raw = match &self.body {
            Body::V0(h) => &h.comment,
            Body::V1(h, _) => &h.comment,
        };
        let end = raw.iter().position(|b| *b == 0).unwrap_or(raw.len());
        String::from_utf8_lossy(&raw[..end]).into_owned()
    }

    /// The logical geometry, or the older field where that one says nothing. VirtualBox leaves garbage here
    /// (seen after a resize), so only values a BIOS could have are told.
    pub(super) fn geometry(&self) -> Option<(u32, u32, u32)> {
        match &self.body {
            Body::V0(h) => h.geometry.sane(),
            Body::V1(h, logical) => logical.and_then(Geometry::sane).or(h.geometry.sane()),
        }
    }

    /// Version as people write it.
    pub(super) fn version(&self) -> String {
        let v = self.pre.version.get();
        format!("{}.{}", v >> 16, v & 0xffff)
    }

    pub(super) fn zero_expand(&self) -> bool {
        matches!(&self.body, Body::V1(h, _) if h.flags.get() & FLAG_ZERO_EXPAND != 0)
    }

    /// Where things are, if the fields that say so make sense together and with a file of `file_bytes` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Limit`], naming the field. What follows from them is unusable,
    /// so a check cannot go on either.
    pub(super) fn layout(&self, file_bytes: u64) -> Result<Layout> {
        let layout = self.raw_layout()?;
        let disk = self.disk_bytes();
        if disk > MAX_DISK_BYTES {
            return Err(corrupt(format!(
                "the disk size is {disk} bytes; at most {MAX_DISK_BYTES} are possible"
            )));
        }
        let room = u64::from(layout.blocks) * layout.block_bytes;
        if room < disk {
            let what = format!("the disk has {disk} bytes but its {} blocks hold only {room}", layout.blocks);
            return Err(corrupt(what));
        }
        if layout.table_bytes() > MAX_TABLE_BYTES {
            let what = format!(
                "the block table has {} bytes; {MAX_TABLE_BYTES} are the limit",
                layout.table_bytes()
            );
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let table_end = layout.table_at.plus(layout.table_bytes()).0;
        if table_end > file_bytes {
            let what =
                format!("the block table ends at byte {table_end}, behind the file's end at {file_bytes}");
            return Err(corrupt(what));
        }
        if layout.data_at.0 < table_end {
            let what = format!(
                "the data begins at byte {}, inside the block table that ends at {table_end}",
                layout.data_at.0
            );
            return Err(corrupt(what));
        }
        Ok(layout)
    }

    fn raw_layout(&self) -> Result<Layout> {
        let (block_bytes, extra_bytes, blocks, table_at, data_at) = match &self.body {
            Body::V0(h) => {
                let table_at = u64::from(PRE_BYTES + V0_BYTES);
                let data_at = table_at + 4 * u64::from(h.blocks.get());
                (h.block_bytes.get(), 0, h.blocks.get(), table_at, data_at)
            }
            Body::V1(h, _) => {
                let header_end = u64::from(PRE_BYTES) + u64::from(h.size.get());
                let table_at = u64::from(h.table_at.get());
                if table_at < header_end {
                    let what = format!(
                        "the block table begins at byte {table_at}, inside the header that ends at {header_end}"
                    );
                    return Err(corrupt(what));
                }
                (
                    h.block_bytes.get(),
                    h.extra_bytes.get(),
                    h.blocks.get(),
                    table_at,
                    u64::from(h.data_at.get()),
                )
            }
        };
        check_block_size(u64::from(block_bytes), u64::from(extra_bytes))?;
        Ok(Layout {
            disk_bytes: self.disk_bytes(),
            block_shift: block_bytes.trailing_zeros(),
            block_bytes: u64::from(block_bytes),
            extra_bytes: u64::from(extra_bytes),
            blocks,
            table_at: HostOffset(table_at),
            data_at: HostOffset(data_at),
        })
    }

    /// The rules a header breaks although everything can be found, one line each. An image that breaks one
    /// is not opened: whoever wrote that field did not write a VDI we understand.
    pub(super) fn broken_rules(&self, layout: &Layout) -> Vec<BrokenRule> {
        let mut broken = Vec::new();
        let mut rule = |holds: bool, what: String| {
            if !holds {
                broken.push(BrokenRule { what, count_alone: false })
            }
        };
        let (code, disk) = (self.kind_code(), self.disk_bytes());
        rule(Kind::of(code).is_some(), format!("the image type is {code}; 1 to 4 exist"));
        rule(disk != 0, "the disk size is 0".into());
        rule(disk.is_multiple_of(SECTOR_BYTES), format!("the disk size {disk} is no multiple of 512"));
        for (name, geometry) in self.geometries() {
            let bytes = geometry.sector_bytes.get();
            rule(
                bytes == 0 || bytes == 512,
                format!("the {name} has sectors of {bytes} bytes; 512 are right"),
            );
        }
        rule(!self.uuid().is_nil(), "the image UUID is nil".into());
        rule(!self.modification().is_nil(), "the modification UUID is nil".into());
        let parent = self.parent();
        rule(
            self.is_diff() || parent.is_nil(),
            format!("a base image (type {code}) names a parent, {parent}"),
        );
        let (allocated, blocks) = (self.allocated(), layout.blocks);
        if allocated > blocks {
            let what = format!("{allocated} blocks are said to be allocated; the image has only {blocks}");
            broken.push(BrokenRule { what, count_alone: true });
        }
        broken
    }

    fn geometries(&self) -> Vec<(&'static str, Geometry)> {
        match &self.body {
            Body::V0(h) => vec![("geometry", h.geometry)],
            Body::V1(h, logical) => {
                let old = ("geometry", h.geometry);
                std::iter::once(old).chain(logical.map(|g| ("logical geometry", g))).collect()
            }
        }
    }
}

/// Block size and extra bytes must be powers of two within bounds (no extra bytes at all are fine).
fn check_block_size(block: u64, extra: u64) -> Result<()> {
    if !block.is_power_of_two() {
        return Err(corrupt(format!("the block size {block} is no power of two")));
    }
    if !(MIN_BLOCK_BYTES..=MAX_BLOCK_BYTES).contains(&block) {
        let what = format!("the block size {block} is outside {MIN_BLOCK_BYTES}..={MAX_BLOCK_BYTES} bytes");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    if extra != 0 && (!extra.is_power_of_two() || extra > block) {
        return Err(corrupt(format!(
            "the {extra} extra bytes of a block are no power of two up to its size"
        )));
    }
    Ok(())
}

impl Geometry {
    fn of(chs: Option<(u32, u32, u32)>) -> Self {
        let (c, h, s) = chs.unwrap_or((0, 0, 0));
        Geometry { cylinders: c.into(), heads: h.into(), sectors: s.into(), sector_bytes: 512.into() }
    }

    fn sane(self) -> Option<(u32, u32, u32)> {
        let (c, h, s) = (self.cylinders.get(), self.heads.get(), self.sectors.get());
        (c > 0 && (1..=255).contains(&h) && (1..=63).contains(&s)).then_some((c, h, s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_sizes_of_the_format() {
        assert_eq!(size_of::<Pre>(), 72);
        assert_eq!(size_of::<V0>(), 348);
        assert_eq!(size_of::<V1>(), 384);
        assert_eq!(size_of::<V1>() + size_of::<Geometry>(), 400);
        assert_eq!(std::mem::offset_of!(V1, table_at) + 72, 0x154);
        assert_eq!(std::mem::offset_of!(V1, disk_bytes) + 72, 0x170);
        assert_eq!(std::mem::offset_of!(V1, uuid) + 72, 0x188);
        assert_eq!(std::mem::offset_of!(V1, parent_modification) + 72, 0x1b8);
    }
}
