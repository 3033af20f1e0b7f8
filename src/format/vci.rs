//! Cache images (VCI): blocks of what the images beneath the top of a chain show, kept in a file of their own. Here is what
//! its bytes mean; docs/formats/vci.md tells the facts and orders, `vd/cache.rs` decides what is kept.
//!
//! A place belongs to a set by its number, and a block of the disk to the set its own number says. So the table only tells
//! which block of its set lies in a place: whatever its bytes are, none of them leads out of the file.

use super::crc32c::checksum;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{BOUNCE_BYTES, MAX_CACHE_PLACES, MIN_BLOCK_BYTES, SECTOR_BYTES};
use crate::map::HostOffset;
use uuid::Uuid;

/// `VCI` and a zero.
pub const SIGNATURE: u32 = 0x0049_4356;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 1024;
/// Of the header only these can be anything but zeros: a sector is written whole or not at all.
const USED_BYTES: usize = 512;
/// VirtualBox's unfinished format is version 1.
const VERSION: u32 = 2;
/// The file grows as it is filled.
const TYPE_DYNAMIC: u32 = 1;
/// Where the table begins.
pub const TABLE_AT: u64 = 4096;
/// Bytes of a page of the table.
pub const PAGE_BYTES: usize = 4096;
/// Entries of a page.
pub const PAGE_ENTRIES: u64 = 508;
/// Where a page's entries begin.
const ENTRIES_AT: usize = 32;
/// `VCIP`.
const PAGE_SIGNATURE: u32 = 0x5049_4356;
/// Places among which a block can lie.
pub const WAYS: u64 = 8;
/// An entry without a block.
pub const NO_BLOCK: u64 = u64::MAX;
/// Block sizes: powers of two up to what a bounce buffer holds.
pub const MAX_CACHE_BLOCK_BYTES: u64 = BOUNCE_BYTES as u64;

/// What the cached blocks were read from: what is cached of one base is never shown for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Of the uppermost image that is cached; nil where it has none.
    pub uuid: Uuid,
    /// Its modification UUID; nil where it has none.
    pub modification: Uuid,
    /// Bytes of the disk; 0: nothing has been cached yet.
    pub disk_bytes: u64,
    /// A hash of all that tells the images and their files from what they were before and from others.
    pub identity: u128,
}

impl Base {
    /// Of no disk.
    pub const NONE: Base = Base { uuid: Uuid::nil(), modification: Uuid::nil(), disk_bytes: 0, identity: 0 };
}

/// How a cache image is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of a block: a power of two.
    pub block_bytes: u64,
    /// Places for blocks, a multiple of [`WAYS`].
    pub places: u64,
}

impl Shape {
    /// As many places as fit in a file of `most_bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for blocks that are no power of two from 4 KiB to 256 KiB, and for files too small for
    /// one set or too large for the table's bound.
    pub fn within(most_bytes: u64, block_bytes: u64) -> Result<Shape> {
        let refused = |what: String| Err(Error::new(ErrorKind::InvalidArgument, what));
        if !is_block_size(block_bytes) {
            return refused(format!(
                "blocks of {block_bytes} bytes: a power of two from {MIN_BLOCK_BYTES} to {MAX_CACHE_BLOCK_BYTES} is wanted"
            ));
        }
        let mut shape = Shape { block_bytes, places: most_bytes / block_bytes / WAYS * WAYS };
        if shape.places > MAX_CACHE_PLACES {
            let what = format!("more than {MAX_CACHE_PLACES} blocks of {block_bytes} bytes");
            return Err(
                Error::new(ErrorKind::InvalidArgument, what).hint("larger blocks, or a smaller cache")
            );
        }
        while shape.places > 0 && shape.file_bytes() > most_bytes {
            shape.places -= WAYS;
        }
        if shape.places == 0 {
            let least = Shape { block_bytes, places: WAYS }.file_bytes();
            return refused(format!("a cache of {most_bytes} bytes: at least {least} are needed"));
        }
        Ok(shape)
    }

    /// Sets of [`WAYS`] places.
    pub fn sets(self) -> u64 {
        self.places / WAYS
    }

    /// Pages of the table.
    pub fn pages(self) -> u64 {
        self.places.div_ceil(PAGE_ENTRIES)
    }

    /// Where the first place begins.
    pub fn data_at(self) -> u64 {
        (TABLE_AT + self.pages() * PAGE_BYTES as u64).next_multiple_of(self.block_bytes)
    }

    /// Where a place begins.
    pub fn place_at(self, place: u64) -> HostOffset {
        debug_assert!(place < self.places, "a place of the file");
        HostOffset(self.data_at() + place * self.block_bytes)
    }

    /// Length of the file.
    pub fn file_bytes(self) -> u64 {
        self.data_at() + self.places * self.block_bytes
    }
}

fn is_block_size(bytes: u64) -> bool {
    bytes.is_power_of_two() && (MIN_BLOCK_BYTES..=MAX_CACHE_BLOCK_BYTES).contains(&bytes)
}

/// The header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Places and their size.
    pub shape: Shape,
    /// What is cached.
    pub base: Base,
    /// A session has begun and not ended: the table says nothing.
    pub unclean: bool,
    /// Sessions so far; each page of the table bears that of the session that wrote it.
    pub generation: u64,
}

impl Header {
    /// Of a cache that holds nothing.
    pub fn new(shape: Shape) -> Header {
        Header { shape, base: Base::NONE, unclean: false, generation: 0 }
    }

    /// The first bytes are a cache image's, whatever else is wrong with it.
    pub fn is_signed(head: &[u8]) -> bool {
        head.get(..4) == Some(&SIGNATURE.to_le_bytes())
    }

    /// As it stands in the file.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        let Shape { block_bytes, places } = self.shape;
        put(0, &SIGNATURE.to_le_bytes());
        put(4, &VERSION.to_le_bytes());
        put(8, &(places * block_bytes / SECTOR_BYTES).to_le_bytes());
        put(16, &[u8::from(self.unclean)]);
        put(17, &TYPE_DYNAMIC.to_le_bytes());
        put(29, &TABLE_AT.to_le_bytes());
        put(37, &low32(self.shape.pages() * PAGE_BYTES as u64 / SECTOR_BYTES).to_le_bytes());
        put(41, &self.base.uuid.to_bytes_le());
        put(57, &self.base.modification.to_bytes_le());
        put(80, &low32(block_bytes).to_le_bytes());
        put(84, &low32(places).to_le_bytes());
        put(88, &self.generation.to_le_bytes());
        put(96, &self.base.disk_bytes.to_le_bytes());
        put(104, &self.base.identity.to_le_bytes());
        put(120, &self.shape.data_at().to_le_bytes());
        let sum = checksum(&b[..USED_BYTES], USED_BYTES - 4);
        b[USED_BYTES - 4..USED_BYTES].copy_from_slice(&sum.to_le_bytes());
        b
    }

    /// Reads it from the beginning of a file.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] without the signature, [`ErrorKind::Unsupported`] for another version,
    /// [`ErrorKind::Corrupt`] for anything that cannot be.
    pub fn parse(b: &[u8; HEADER_BYTES]) -> Result<Header> {
        if !Self::is_signed(b) {
            return Err(Error::new(ErrorKind::NotThisFormat, "is no cache image")
                .hint("vdimg create-cache makes one"));
        }
        let version = u32_at(b, 4);
        if version != VERSION {
            let what =
                format!("is a cache image of version {version}, and {VERSION} is the one that is known");
            return Err(Error::new(ErrorKind::Unsupported, what).hint(ANEW));
        }
        if u32_at(b, USED_BYTES - 4) != checksum(&b[..USED_BYTES], USED_BYTES - 4) {
            return corrupt("its header has another checksum than it says");
        }
        let shape = Shape { block_bytes: u64::from(u32_at(b, 80)), places: u64::from(u32_at(b, 84)) };
        let places_are_good =
            (WAYS..=MAX_CACHE_PLACES).contains(&shape.places) && shape.places.is_multiple_of(WAYS);
        if !is_block_size(shape.block_bytes) || !places_are_good {
            return corrupt("its header tells of blocks that cannot be");
        }
        let base = Base {
            uuid: Uuid::from_bytes_le(array_at(b, 41)),
            modification: Uuid::from_bytes_le(array_at(b, 57)),
            disk_bytes: u64_at(b, 96),
            identity: u128::from_le_bytes(array_at(b, 104)),
        };
        let header = Header { shape, base, unclean: b[16] != 0, generation: u64_at(b, 88) };
        // The places follow from the two numbers: that those beside them say the same shows that the bytes are our own.
        let says = (u64_at(b, 8), u32_at(b, 17), u64_at(b, 29), u64_at(b, 120));
        let blocks = shape.places * shape.block_bytes / SECTOR_BYTES;
        if says != (blocks, TYPE_DYNAMIC, TABLE_AT, shape.data_at()) {
            return corrupt("its header contradicts itself");
        }
        Ok(header)
    }
}

const ANEW: &str =
    "it holds nothing that cannot be read again: remove it, and make a new one with vdimg create-cache";

fn corrupt<T>(what: &str) -> Result<T> {
    Err(Error::new(ErrorKind::Corrupt, what).hint(ANEW))
}

/// A page of the table: which blocks the places from `number * PAGE_ENTRIES` on hold.
///
/// # Panics
/// With more entries than a page has.
pub fn page_to_bytes(number: u64, generation: u64, entries: impl Iterator<Item = u64>) -> [u8; PAGE_BYTES] {
    let mut b = [0xff; PAGE_BYTES];
    b[..ENTRIES_AT].fill(0);
    b[..4].copy_from_slice(&PAGE_SIGNATURE.to_le_bytes());
    b[8..16].copy_from_slice(&generation.to_le_bytes());
    b[16..24].copy_from_slice(&number.to_le_bytes());
    let mut at = ENTRIES_AT;
    for entry in entries {
        b[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        at += 8;
    }
    let sum = checksum(&b, 4);
    b[4..8].copy_from_slice(&sum.to_le_bytes());
    b
}

/// The entries of a page; `None` if it is not the page with this number that this session wrote. `generation`: `None`
/// takes any session's.
pub fn page_of_bytes(
    b: &[u8; PAGE_BYTES],
    number: u64,
    generation: Option<u64>,
) -> Option<impl Iterator<Item = u64> + '_> {
    let good = u32_at(b, 0) == PAGE_SIGNATURE
        && u32_at(b, 4) == checksum(b, 4)
        && generation.is_none_or(|g| u64_at(b, 8) == g)
        && u64_at(b, 16) == number;
    let entries = b[ENTRIES_AT..].as_chunks::<8>().0;
    good.then(|| entries.iter().map(|e| u64::from_le_bytes(*e)))
}

/// What is wrong with an entry: block `block` in place `place` of a cache of a disk with `blocks` whole blocks.
pub fn wrong_entry(shape: Shape, blocks: u64, place: u64, block: u64) -> Option<String> {
    let sets = shape.sets();
    if block >= blocks {
        return Some(format!("place {place} holds block {block} of a disk of {blocks}"));
    }
    (block % sets != place % sets)
        .then(|| format!("place {place} holds block {block}, which belongs to another set"))
}

fn array_at<const N: usize>(b: &[u8], at: usize) -> [u8; N] {
    b[at..at + N].try_into().expect("so many bytes")
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(b, at))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(b, at))
}

/// Of a number that a shape keeps small.
fn low32(n: u64) -> u32 {
    u32::try_from(n).expect("limits::MAX_CACHE_PLACES")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let base = Base {
            uuid: Uuid::from_u128(7),
            modification: Uuid::from_u128(8),
            disk_bytes: 1 << 30,
            identity: 0x1234 << 100,
        };
        let shape = Shape::within(1 << 20, 4096).unwrap();
        Header { shape, base, unclean: true, generation: 5 }
    }

    #[test]
    fn a_header_reads_as_it_was_written_and_no_byte_of_it_may_change() {
        let bytes = header().to_bytes();
        assert_eq!(Header::parse(&bytes).unwrap(), header());
        assert_eq!((&bytes[..4], bytes[16]), (&b"VCI\0"[..], 1));
        for at in 0..USED_BYTES {
            let mut wrong = bytes;
            wrong[at] ^= 0x10;
            assert!(Header::parse(&wrong).is_err(), "byte {at}");
        }
    }

    #[test]
    fn sizes_that_cannot_be_are_refused_and_others_stay_within_the_file() {
        for (size, block) in
            [(1 << 20, 4095), (1 << 20, 512), (1 << 30, 512 << 10), (40_000, 4096), (1 << 50, 4096)]
        {
            assert!(Shape::within(size, block).is_err(), "{size} {block}");
        }
        for size in (41 << 10..3 << 20).step_by(777) {
            let shape = Shape::within(size, 4096).unwrap();
            assert!(shape.file_bytes() <= size && shape.places.is_multiple_of(WAYS));
            assert!(
                Shape { places: shape.places + WAYS, ..shape }.file_bytes() > size,
                "{size}: room is left"
            );
            assert_eq!(shape.place_at(shape.places - 1).0 + 4096, shape.file_bytes());
        }
    }

    #[test]
    fn a_page_is_taken_only_whole_in_its_place_and_of_its_session() {
        let bytes = page_to_bytes(3, 9, [1, NO_BLOCK, 77].into_iter());
        let entries: Vec<_> = page_of_bytes(&bytes, 3, Some(9)).unwrap().collect();
        assert_eq!((entries.len() as u64, &entries[..4]), (PAGE_ENTRIES, &[1, NO_BLOCK, 77, NO_BLOCK][..]));
        assert!(page_of_bytes(&bytes, 2, Some(9)).is_none() && page_of_bytes(&bytes, 3, Some(8)).is_none());
        for at in 0..PAGE_BYTES {
            let mut wrong = bytes;
            wrong[at] ^= 1;
            assert!(page_of_bytes(&wrong, 3, Some(9)).is_none(), "byte {at}");
        }
    }
}
