//! The header: 64 bytes, little endian, right before the table.

use super::layout::{FIRST_ENTRY, Layout};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_BLOCK_BYTES, MAX_DISK_BYTES, MAX_TABLE_BYTES, SECTOR_BYTES};
use crate::map::{ByteSource, HostOffset};

/// The old magic: entries count sectors.
pub(super) const PLAIN: &[u8; 16] = b"WithoutFreeSpace";
/// The new one: entries count clusters.
pub(super) const EXTENDED: &[u8; 16] = b"WithouFreSpacExt";
/// The only version there is.
pub(super) const VERSION: u32 = 2;
/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = 64;
/// The word of the header that says whether somebody has it open for writing.
pub(super) const IN_USE_WORD: u32 = 11;
/// What it says then (`Ynot`).
pub(super) const IN_USE: u32 = 0x746f_6e59;

/// The header, as far as it is used. Offsets in bytes: 16 version, 28 sectors of a cluster, 32 entries, 36 sectors of the disk (the upper half
/// only with the new magic), 44 in use, 48 first sector of the data, 56 sector of the extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) extended: bool,
    pub(super) in_use: bool,
    /// Further facts (dirty bitmaps) lie beside the disk, which a change of it would make wrong.
    pub(super) has_extension: bool,
    cluster_sectors: u32,
    entries: u32,
    sectors: u64,
    data_sector: u32,
}

fn word(raw: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}

fn corrupt(what: String) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

impl Header {
    /// Reads it.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] without one of the magics; [`ErrorKind::Corrupt`] where the file ends in it;
    /// [`ErrorKind::Unsupported`] for another version.
    pub(super) fn read(source: &dyn ByteSource) -> Result<Header> {
        let mut raw = [0; HEADER_BYTES];
        if source.len() < raw.len() as u64 {
            return Err(corrupt(format!("the file ends inside the header, at {} bytes", source.len())));
        }
        source.read_at(HostOffset(0), &mut raw)?;
        let extended = match &raw[..16] {
            magic if magic == PLAIN => false,
            magic if magic == EXTENDED => true,
            _ => return Err(Error::new(ErrorKind::NotThisFormat, "no Parallels signature")),
        };
        let version = word(&raw, 16);
        if version != VERSION {
            let what = format!("Parallels version {version} is not supported");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let upper = if extended { u64::from(word(&raw, 40)) << 32 } else { 0 };
        Ok(Header {
            extended,
            in_use: word(&raw, 44) == IN_USE,
            has_extension: word(&raw, 56) != 0 || word(&raw, 60) != 0,
            cluster_sectors: word(&raw, 28),
            entries: word(&raw, 32),
            sectors: upper | u64::from(word(&raw, 36)),
            data_sector: word(&raw, 48),
        })
    }

    /// Where everything is.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] or [`ErrorKind::Limit`] naming the field that cannot be.
    pub(super) fn layout(&self, file_bytes: u64) -> Result<Layout> {
        let cluster_bytes = u64::from(self.cluster_sectors) * SECTOR_BYTES;
        if cluster_bytes == 0 || cluster_bytes > MAX_BLOCK_BYTES {
            let what = format!("a cluster has {cluster_bytes} bytes; 512 to {MAX_BLOCK_BYTES} are possible");
            return Err(corrupt(what));
        }
        let disk_bytes =
            self.sectors.checked_mul(SECTOR_BYTES).filter(|b| *b <= MAX_DISK_BYTES).ok_or_else(|| {
                corrupt(format!("the disk has {} sectors, more than there can be", self.sectors))
            })?;
        if disk_bytes == 0 {
            return Err(corrupt("the disk size is 0".into()));
        }
        let table_end = HEADER_BYTES as u64 + u64::from(self.entries) * 4;
        if table_end > MAX_TABLE_BYTES {
            let what =
                format!("the table has {} entries; {} are the limit", self.entries, MAX_TABLE_BYTES / 4);
            return Err(Error::new(ErrorKind::Limit, what));
        }
        if table_end > file_bytes {
            let what = format!("the table ends at byte {table_end}, behind the file's end at {file_bytes}");
            return Err(corrupt(what));
        }
        let held = u64::from(self.entries) * cluster_bytes;
        if held < disk_bytes {
            let what =
                format!("the disk has {disk_bytes} bytes but its {} clusters hold {held}", self.entries);
            return Err(corrupt(what));
        }
        let data_at = u64::from(self.data_sector) * SECTOR_BYTES;
        if data_at != 0 && data_at < table_end {
            let what =
                format!("the data begins at byte {data_at}, inside the table that ends at {table_end}");
            return Err(corrupt(what));
        }
        let blocks = u32::try_from(disk_bytes.div_ceil(cluster_bytes)).expect("not more than entries");
        Ok(Layout::new(disk_bytes, cluster_bytes, blocks, FIRST_ENTRY + self.entries, data_at, self.extended))
    }
}
