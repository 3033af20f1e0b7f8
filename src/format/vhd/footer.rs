//! The footer: 512 bytes at the end, and in images that grow a copy of them at the beginning. Big endian.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, HostOffset};
use uuid::Uuid;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a footer.
pub(super) const FOOTER_BYTES: u64 = 512;
/// What a footer begins with.
const COOKIE: [u8; 8] = *b"conectix";
/// What an offset says that is none.
pub(super) const NOWHERE: u64 = u64::MAX;
/// The only version there is.
const VERSION: u32 = 0x0001_0000;
/// A bit that has to be set, and means nothing.
const FEATURES: u32 = 2;
/// Cylinders, heads and sectors of a disk that is too large for them.
const LARGEST: (u32, u32, u32) = (65535, 16, 255);
/// Programs whose images have the size of their geometry: the size in the footer was rounded up by them, and what lies
/// behind the last cylinder was never a part of the disk.
const BY_GEOMETRY: [[u8; 4]; 3] = [*b"vpc ", *b"vs  ", *b"qemu"];
/// A creator whose size every reader believes, whatever the geometry.
const CREATOR: [u8; 4] = *b"win ";
const CREATOR_VERSION: u32 = 0x000a_0000;
const CREATOR_HOST: [u8; 4] = *b"Wi2k";

/// How an image takes its space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fixed,
    Dynamic,
    Diff,
}

/// A footer as it is in the file.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Footer {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    data_offset: U64,
    time: U32,
    creator: [u8; 4],
    creator_version: U32,
    creator_host: [u8; 4],
    original_bytes: U64,
    current_bytes: U64,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    kind: U32,
    checksum: U32,
    id: [u8; 16],
    saved: u8,
    reserved: [u8; 427],
}

/// What the footer of a new image says.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewFooter {
    pub(super) kind: Kind,
    pub(super) size_bytes: u64,
    pub(super) geometry: Option<(u32, u32, u32)>,
    pub(super) id: Uuid,
    pub(super) header_at: Option<HostOffset>,
}

/// The complement of the sum of all bytes, those of the sum itself not counted.
pub(super) fn checksum(bytes: &[u8], own: std::ops::Range<usize>) -> u32 {
    let all: u32 = bytes.iter().map(|b| u32::from(*b)).sum();
    let own: u32 = bytes[own].iter().map(|b| u32::from(*b)).sum();
    !(all - own)
}

pub(super) fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

impl Footer {
    pub(super) fn new(n: NewFooter) -> Self {
        let mut f = Footer::new_zeroed();
        let (c, h, s) = n.geometry.unwrap_or_else(|| geometry_of(n.size_bytes));
        f.cookie = COOKIE;
        f.features = FEATURES.into();
        f.version = VERSION.into();
        f.data_offset = n.header_at.map_or(NOWHERE, |at| at.0).into();
        f.creator = CREATOR;
        f.creator_version = CREATOR_VERSION.into();
        f.creator_host = CREATOR_HOST;
        f.original_bytes = n.size_bytes.into();
        f.current_bytes = n.size_bytes.into();
        f.cylinders = u16::try_from(c).unwrap_or(u16::MAX).into();
        f.heads = u8::try_from(h).unwrap_or(u8::MAX);
        f.sectors = u8::try_from(s).unwrap_or(u8::MAX);
        f.kind = match n.kind {
            Kind::Fixed => 2,
            Kind::Dynamic => 3,
            Kind::Diff => 4,
        }
        .into();
        f.id = n.id.to_bytes_le();
        f.checksum = f.sum().into();
        f
    }

    fn sum(&self) -> u32 {
        let at = std::mem::offset_of!(Footer, checksum);
        checksum(self.as_bytes(), at..at + 4)
    }

    /// A footer at `at`: cookie and checksum are right.
    fn read(source: &dyn ByteSource, at: u64) -> Result<Found> {
        let mut f = Footer::new_zeroed();
        if source.len() < FOOTER_BYTES {
            return Ok(Found::None);
        }
        source.read_at(HostOffset(at), f.as_mut_bytes())?;
        Ok(match f.cookie == COOKIE {
            false => Found::None,
            true if f.checksum.get() == f.sum() => Found::Good(Box::new(f)),
            true => Found::Bad,
        })
    }

    /// # Errors
    /// [`ErrorKind::Unsupported`] for kinds nobody has seen.
    pub(super) fn kind(&self) -> Result<Kind> {
        match self.kind.get() {
            2 => Ok(Kind::Fixed),
            3 => Ok(Kind::Dynamic),
            4 => Ok(Kind::Diff),
            other => {
                Err(Error::new(ErrorKind::Unsupported, format!("the disk type is {other}; 2 to 4 exist")))
            }
        }
    }

    /// The size of the disk: what the footer says, or for some programs what the geometry says.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for sizes no disk has, [`ErrorKind::Unsupported`] for another version.
    pub(super) fn size_bytes(&self) -> Result<u64> {
        if self.version.get() >> 16 != VERSION >> 16 {
            let what = format!("VHD version {} is not supported", self.version());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let stated = self.current_bytes.get();
        if stated == 0 || !stated.is_multiple_of(SECTOR_BYTES) {
            return Err(corrupt(format!("the disk size {stated} is no multiple of 512 above 0")));
        }
        let (c, h, s) = self.chs();
        let by_geometry = u64::from(c) * u64::from(h) * u64::from(s) * SECTOR_BYTES;
        let rounded_up = BY_GEOMETRY.contains(&self.creator) && (c, h, s) != LARGEST;
        Ok(if rounded_up && (1..stated).contains(&by_geometry) { by_geometry } else { stated })
    }

    /// The disk has another size, which every reader believes, and the geometry that goes with it.
    pub(super) fn set_size(&mut self, bytes: u64) {
        let (c, h, s) = geometry_of(bytes);
        self.current_bytes = bytes.into();
        self.cylinders = u16::try_from(c).unwrap_or(u16::MAX).into();
        self.heads = u8::try_from(h).unwrap_or(u8::MAX);
        self.sectors = u8::try_from(s).unwrap_or(u8::MAX);
        if BY_GEOMETRY.contains(&self.creator) {
            self.creator = CREATOR;
        }
        self.checksum = self.sum().into();
    }

    pub(super) fn is_diff(&self) -> bool {
        self.kind.get() == 4
    }

    /// The image has a parent, or none.
    pub(super) fn set_parent(&mut self, has_one: bool) {
        self.kind = if has_one { 4 } else { 3 }.into();
        self.checksum = self.sum().into();
    }

    pub(super) fn set_id(&mut self, id: Uuid) {
        self.id = id.to_bytes_le();
        self.checksum = self.sum().into();
    }

    /// Another geometry. The disk keeps its size for every reader: some believe the geometry of most creators' images.
    ///
    /// # Errors
    /// As [`Self::size_bytes`].
    pub(super) fn set_geometry(&mut self, (c, h, s): (u32, u32, u32)) -> Result<()> {
        self.current_bytes = self.size_bytes()?.into();
        self.creator = CREATOR;
        self.cylinders = u16::try_from(c).unwrap_or(u16::MAX).into();
        self.heads = u8::try_from(h).unwrap_or(u8::MAX);
        self.sectors = u8::try_from(s).unwrap_or(u8::MAX);
        self.checksum = self.sum().into();
        Ok(())
    }

    /// The header is elsewhere.
    pub(super) fn set_header_at(&mut self, at: u64) {
        self.data_offset = at.into();
        self.checksum = self.sum().into();
    }

    fn chs(&self) -> (u32, u32, u32) {
        (self.cylinders.get().into(), self.heads.into(), self.sectors.into())
    }

    pub(super) fn geometry(&self) -> Option<(u32, u32, u32)> {
        let (c, h, s) = self.chs();
        (c > 0 && h > 0 && s > 0).then_some((c, h, s))
    }

    pub(super) fn id(&self) -> Option<Uuid> {
        Some(Uuid::from_bytes_le(self.id)).filter(|u| !u.is_nil())
    }

    pub(super) fn header_at(&self) -> u64 {
        self.data_offset.get()
    }

    pub(super) fn version(&self) -> String {
        format!("{}.{}", self.version.get() >> 16, self.version.get() & 0xffff)
    }
}

enum Found {
    Good(Box<Footer>),
    /// Its checksum is wrong.
    Bad,
    None,
}

/// What both ends of a file say.
#[derive(Clone, Debug)]
pub(super) struct Footers {
    /// The one that is believed.
    pub(super) best: Footer,
    /// It stands at the end.
    pub(super) end_is_good: bool,
    /// It stands at the beginning, where an image that grows has a copy.
    pub(super) copy_is_good: bool,
}

impl Footers {
    /// Looks at both. A fixed image has one at the end alone: its first sector belongs to the guest, who may write
    /// whatever looks like a footer. Otherwise the copy decides, which never moves, and where no guest's bytes can be.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] without a footer, [`ErrorKind::Corrupt`] without a good one, those of reading.
    pub(super) fn read(source: &dyn ByteSource) -> Result<Footers> {
        let end_at = source.len().saturating_sub(FOOTER_BYTES);
        let (copy, end) = (Footer::read(source, 0)?, Footer::read(source, end_at)?);
        let (copy, end) = match (copy, end) {
            (_, Found::Good(end)) if end.kind.get() == 2 => {
                return Ok(Footers { best: *end, end_is_good: true, copy_is_good: false });
            }
            (Found::Good(copy), end) if copy.kind.get() != 2 => (Some(copy), end),
            (Found::None, Found::None) => {
                return Err(Error::new(
                    ErrorKind::NotThisFormat,
                    "not a VHD: there is no footer at either end",
                ));
            }
            (_, end) => (None, end),
        };
        match (copy, end) {
            (Some(copy), end) => {
                let same = matches!(&end, Found::Good(e) if **e == *copy);
                Ok(Footers { best: *copy, end_is_good: same, copy_is_good: true })
            }
            (None, Found::Good(end)) => Ok(Footers { best: *end, end_is_good: true, copy_is_good: false }),
            (None, _) => Err(corrupt("the checksum of the footer is wrong, and there is no good copy of it")),
        }
    }

    /// The image is good, but not as whole as it should be.
    pub(super) fn note(&self) -> Option<&'static str> {
        let grows = !matches!(self.best.kind(), Ok(Kind::Fixed));
        if !self.end_is_good {
            Some("has no good footer at its end: the copy at the beginning is used")
        } else if grows && !self.copy_is_good {
            Some("has no good copy of its footer: the one at the end is used")
        } else {
            None
        }
    }
}

/// The geometry that the specification's appendix gives a disk of this size.
pub(super) fn geometry_of(size_bytes: u64) -> (u32, u32, u32) {
    let (most_c, most_h, most_s) = (65535u64, 16u64, 255u64);
    let total = (size_bytes / SECTOR_BYTES).min(most_c * most_h * most_s);
    let (heads, sectors, cylinders_heads);
    if total >= most_c * 16 * 63 {
        (heads, sectors, cylinders_heads) = (16, 255, total / 255);
    } else {
        let (mut s, mut ch) = (17, total / 17);
        let mut h = ch.div_ceil(1024).max(4);
        if ch >= h * 1024 || h > 16 {
            (s, h, ch) = (31, 16, total / 31);
        }
        if ch >= h * 1024 {
            (s, h, ch) = (63, 16, total / 63);
        }
        (heads, sectors, cylinders_heads) = (h, s, ch);
    }
    let small = |n: u64| u32::try_from(n).expect("at most 65535");
    (small(cylinders_heads / heads), small(heads), small(sectors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_footer_has_the_layout_of_the_format() {
        assert_eq!(size_of::<Footer>(), 512);
        assert_eq!(std::mem::offset_of!(Footer, current_bytes), 48);
        assert_eq!(std::mem::offset_of!(Footer, kind), 60);
        assert_eq!(std::mem::offset_of!(Footer, id), 68);
    }

    #[test]
    fn geometries_are_those_other_programs_write() {
        // measured on images of VirtualBox and QEMU
        assert_eq!(geometry_of(12_582_912), (361, 4, 17));
        assert_eq!(geometry_of(4 << 20), (120, 4, 17));
        assert_eq!(geometry_of(u64::MAX), (65535, 16, 255));
        for size in (512..200 << 20).step_by(512 * 1001) {
            let (c, h, s) = geometry_of(size);
            assert!(u64::from(c) * u64::from(h) * u64::from(s) * 512 <= size && h <= 16 && s <= 63);
        }
    }

    fn new(creator: [u8; 4], size: u64, geometry: (u32, u32, u32)) -> Footer {
        let n = NewFooter {
            kind: Kind::Fixed,
            size_bytes: size,
            geometry: Some(geometry),
            id: Uuid::from_u128(1),
            header_at: None,
        };
        let mut f = Footer::new(n);
        f.creator = creator;
        f
    }

    /// Virtual PC's images end with their last cylinder; those of everybody else where their footer says.
    #[test]
    fn old_creators_are_measured_by_their_geometry() {
        let by = |creator, geometry| new(creator, 1 << 20, geometry).size_bytes().unwrap();
        assert_eq!(by(*b"vpc ", (30, 4, 17)), 30 * 4 * 17 * 512);
        assert_eq!(by(*b"win ", (30, 4, 17)), 1 << 20);
        assert_eq!(by(*b"vbox", (30, 4, 17)), 1 << 20);
        assert_eq!(by(*b"vpc ", LARGEST), 1 << 20);
        assert_eq!(by(*b"vpc ", (0, 4, 17)), 1 << 20);
        assert_eq!(by(*b"vpc ", (60, 16, 63)), 1 << 20, "never more than the footer says");
    }
}
