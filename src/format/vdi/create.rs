//! New VDIs, laid out as VirtualBox does: header of 400 bytes, table at 1 MiB, data at the next boundary of 1 MiB.

use super::super::blueprint::refused;
use super::super::{Blueprint, NewImage, NewOption};
use super::header::{Header, Kind, NewHeader};
use super::layout::FREE;
use crate::error::{Error, Result};
use crate::limits::{
    MAX_BLOCK_BYTES, MAX_DISK_BYTES, MAX_TABLE_BYTES, MIN_BLOCK_BYTES, SECTOR_BYTES, TABLE_PIECE_BYTES,
};
use crate::map::HostOffset;
use uuid::Uuid;

const MIB: u64 = 1 << 20;
/// Where VirtualBox puts the table.
const TABLE_AT: u32 = 1 << 20;
/// Bytes of the comment field, the closing NUL included.
const COMMENT_BYTES: usize = 256;

/// The options that are known.
pub(super) const OPTIONS: [NewOption; 1] = [NewOption::number("AllocationBlockSize", Some("1048576"))];

/// How a new image takes its space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Variant {
    /// Blocks are added as they are written.
    #[default]
    Dynamic,
    /// All blocks are there from the start.
    Fixed,
    /// Dynamic, with VirtualBox's flag that new blocks are to be filled with zeros.
    ZeroExpand,
}

impl std::str::FromStr for Variant {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "dynamic" => Ok(Variant::Dynamic),
            "fixed" => Ok(Variant::Fixed),
            "zero-expand" => Ok(Variant::ZeroExpand),
            _ => {
                Err(refused(format!("unknown variant '{name}' of VDI")).hint("dynamic, fixed or zero-expand"))
            }
        }
    }
}

/// What a differencing image names as its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The parent's UUID; never nil.
    pub uuid: Uuid,
    /// The parent's modification UUID at this moment; nil where its format has none.
    pub modification: Uuid,
}

/// A VDI to be made.
#[derive(Clone, Debug)]
pub struct VdiCreate {
    /// Size of the disk in bytes: a multiple of 512 from 512 up to [`MAX_DISK_BYTES`]. VirtualBox itself creates
    /// none below 1 MiB, but opens them.
    pub size_bytes: u64,
    /// How it takes its space.
    pub variant: Variant,
    /// A power of two from 4 KiB to 256 MiB. 1 MiB is the default and all that QEMU reads; VirtualBox creates
    /// 512 KiB to 8 MiB and opens any power of two.
    pub block_bytes: u64,
    /// Its UUID; not nil.
    pub uuid: Uuid,
    /// Its first modification UUID; not nil.
    pub modification: Uuid,
    /// The parent: makes a differencing image.
    pub parent: Option<Parent>,
    /// A text for people, at most 255 bytes of UTF-8 without NUL.
    pub comment: String,
    /// Logical geometry: cylinders, heads (≤ 255), sectors (≤ 63); `None` leaves it to whoever asks.
    pub geometry: Option<(u32, u32, u32)>,
}

impl VdiCreate {
    /// The default block size: the only one QEMU reads.
    pub const DEFAULT_BLOCK_BYTES: u64 = MIB;

    /// A dynamic base of this size, everything else at its default.
    pub fn new(size_bytes: u64, uuid: Uuid, modification: Uuid) -> Self {
        VdiCreate {
            size_bytes,
            variant: Variant::Dynamic,
            block_bytes: Self::DEFAULT_BLOCK_BYTES,
            uuid,
            modification,
            parent: None,
            comment: String::new(),
            geometry: None,
        }
    }

    /// What to write.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`] naming the value that is not possible.
    pub fn blueprint(&self) -> Result<VdiBlueprint> {
        let blocks = self.checked_blocks()?;
        self.check_texts()?;
        let fixed = self.variant == Variant::Fixed;
        let table_bytes = u64::from(blocks) * 4;
        let data_at = (u64::from(TABLE_AT) + table_bytes).next_multiple_of(MIB);
        let allocated = if fixed { blocks } else { 0 };
        let header = Header::new(&NewHeader {
            kind: self.kind(),
            zero_expand: self.variant == Variant::ZeroExpand,
            comment: &self.comment,
            table_at: TABLE_AT,
            data_at: u32::try_from(data_at).expect("a table has at most 1 GiB"),
            disk_bytes: self.size_bytes,
            block_bytes: u32::try_from(self.block_bytes).expect("checked"),
            blocks,
            allocated,
            uuid: self.uuid,
            modification: self.modification,
            parent: self.parent.map_or(Uuid::nil(), |p| p.uuid),
            parent_modification: self.parent.map_or(Uuid::nil(), |p| p.modification),
            geometry: self.geometry,
        });
        let mut head = Vec::new();
        header.write_to(&mut head);
        let file_len = data_at + u64::from(allocated) * self.block_bytes;
        Ok(VdiBlueprint { head, blocks, fixed, file_len, data_at: HostOffset(data_at) })
    }

    fn kind(&self) -> Kind {
        match (self.parent, self.variant) {
            (Some(_), _) => Kind::Diff,
            (None, Variant::Fixed) => Kind::Fixed,
            (None, Variant::Dynamic | Variant::ZeroExpand) => Kind::Dynamic,
        }
    }

    fn checked_blocks(&self) -> Result<u32> {
        let (size, block) = (self.size_bytes, self.block_bytes);
        if size == 0 || !size.is_multiple_of(SECTOR_BYTES) {
            return Err(refused(format!("the size {size} is no multiple of 512 bytes above 0")));
        }
        if size > MAX_DISK_BYTES {
            return Err(refused(format!(
                "the size {size} is above {MAX_DISK_BYTES} bytes, the most a VDI can have"
            )));
        }
        if !block.is_power_of_two() || !(MIN_BLOCK_BYTES..=MAX_BLOCK_BYTES).contains(&block) {
            let what = format!(
                "the block size {block} is no power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}"
            );
            return Err(refused(what).hint("1M is what QEMU needs; VirtualBox makes 512K to 8M"));
        }
        let blocks = size.div_ceil(block);
        if blocks * 4 > MAX_TABLE_BYTES {
            let what = format!("{blocks} blocks of {block} bytes are too many for one table");
            return Err(refused(what).hint("choose a larger block size"));
        }
        u32::try_from(blocks).map_err(|_| refused(format!("{blocks} blocks are too many")))
    }

    fn check_texts(&self) -> Result<()> {
        if self.comment.len() >= COMMENT_BYTES || self.comment.contains('\0') {
            let what = format!("the comment has {} bytes; 255 without NUL are the limit", self.comment.len());
            return Err(refused(what));
        }
        if self.uuid.is_nil() || self.modification.is_nil() {
            return Err(refused("a nil UUID names nothing"));
        }
        if let Some((c, h, s)) = self.geometry
            && (c == 0 || !(1..=255).contains(&h) || !(1..=63).contains(&s))
        {
            return Err(refused(format!("the geometry {c}/{h}/{s} is not possible"))
                .hint("heads to 255, sectors to 63"));
        }
        match self.parent {
            Some(p) if p.uuid.is_nil() => Err(refused("the parent has no UUID, so no VDI can name it")),
            Some(_) if self.variant == Variant::Fixed => Err(refused("a differencing image cannot be fixed")),
            _ => Ok(()),
        }
    }
}

/// The same from the words all formats share.
///
/// # Errors
/// As [`VdiCreate::blueprint`].
pub(super) fn blueprint(new: &NewImage) -> Result<Blueprint> {
    new.only_options(&OPTIONS)?;
    let mut c = VdiCreate::new(new.size_bytes, new.uuid.unwrap_or_else(Uuid::new_v4), new.modification);
    if let Some(v) = &new.variant {
        c.variant = v.parse()?;
    }
    if let Some(size) = new.option_size("AllocationBlockSize")? {
        c.block_bytes = size;
    }
    c.comment = new.comment.clone().unwrap_or_default();
    c.geometry = new.geometry;
    c.parent = new.parent.as_ref().map(|p| Parent {
        // A raw file has no UUID to name; a diff must name one all the same.
        uuid: p.info.uuid.unwrap_or_else(Uuid::new_v4),
        modification: p.info.modification_uuid.unwrap_or_default(),
    });
    let b = c.blueprint()?;
    Ok(Blueprint::single(b.file_len(), b.preallocate(), b.into_writes()))
}

/// A new image as pieces to write.
#[derive(Clone, Debug)]
pub struct VdiBlueprint {
    head: Vec<u8>,
    blocks: u32,
    fixed: bool,
    file_len: u64,
    data_at: HostOffset,
}

impl VdiBlueprint {
    /// Length of the file in bytes. What no piece covers reads as zeros.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// The file's space from `0` of the data on is to be reserved, not only spanned (fixed images).
    pub fn preallocate(&self) -> Option<(HostOffset, u64)> {
        self.fixed.then_some((self.data_at, self.file_len - self.data_at.0))
    }

    /// The pieces in the order of writing: table first, header last, so that a file that was begun and not
    /// finished is no VDI. A piece has at most [`TABLE_PIECE_BYTES`].
    pub fn into_writes(self) -> impl Iterator<Item = (HostOffset, Vec<u8>)> + Send {
        let entries = u32::try_from(TABLE_PIECE_BYTES / 4).expect("a small constant");
        let pieces = self.blocks.div_ceil(entries);
        let head = (HostOffset(0), self.head.clone());
        (0..pieces).map(move |p| self.table_piece(p, entries)).chain(std::iter::once(head))
    }

    fn table_piece(&self, piece: u32, entries: u32) -> (HostOffset, Vec<u8>) {
        let first = piece * entries;
        let end = first.saturating_add(entries).min(self.blocks);
        let at = HostOffset(u64::from(TABLE_AT) + u64::from(first) * 4);
        let entry = |block: u32| if self.fixed { block } else { FREE };
        (at, (first..end).flat_map(|b| entry(b).to_le_bytes()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn create(size_bytes: u64) -> VdiCreate {
        VdiCreate::new(size_bytes, Uuid::from_u128(1), Uuid::from_u128(2))
    }

    #[test]
    fn impossible_values_are_named() {
        let cases: [(&str, VdiCreate); 9] = [
            ("multiple of 512", create(1000)),
            ("multiple of 512", create(0)),
            ("most a VDI", create(MAX_DISK_BYTES + 512)),
            ("larger block", create(MAX_DISK_BYTES)),
            ("power of two", VdiCreate { block_bytes: 3 << 20, ..create(512) }),
            ("power of two", VdiCreate { block_bytes: 2048, ..create(512) }),
            ("comment", VdiCreate { comment: "x".repeat(256), ..create(512) }),
            ("nil", VdiCreate { uuid: Uuid::nil(), ..create(512) }),
            ("geometry", VdiCreate { geometry: Some((1, 256, 63)), ..create(512) }),
        ];
        for (word, c) in cases {
            let e = c.blueprint().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidArgument);
            assert!(e.to_string().contains(word), "{word}: {e}");
        }
    }

    #[test]
    fn the_layout_is_virtualboxs() {
        let b = create(16 << 20).blueprint().unwrap();
        assert_eq!(b.file_len(), 2 << 20);
        let w: Vec<_> = b.into_writes().collect();
        assert_eq!(w[0], (HostOffset(1 << 20), vec![0xff; 64]));
        assert_eq!((w[1].0, w[1].1.len()), (HostOffset(0), 472));
        let fixed = VdiCreate { variant: Variant::Fixed, ..create(16 << 20) }.blueprint().unwrap();
        assert_eq!(fixed.file_len(), 18 << 20);
        assert_eq!(fixed.preallocate(), Some((HostOffset(2 << 20), 16 << 20)));
    }

    #[test]
    fn a_huge_table_comes_in_pieces() {
        let b = create(64 << 40).blueprint().unwrap();
        let mut end = u64::from(TABLE_AT);
        for (at, bytes) in b.into_writes().filter(|(at, _)| at.0 > 0) {
            assert_eq!(at.0, end);
            assert!(bytes.len() <= TABLE_PIECE_BYTES);
            end += bytes.len() as u64;
        }
        assert_eq!(end - u64::from(TABLE_AT), 4 * (64 << 20));
    }
}
