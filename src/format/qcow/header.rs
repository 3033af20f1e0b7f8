//! The header: 48 bytes, big endian. Offsets in docs/formats/qcow.md.

use super::super::bytes::{be32, be64};
use super::super::levels::{Dialect, Extra, Geometry, read_name};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_DISK_BYTES, SECTOR_BYTES};
use crate::map::{ByteSource, HostOffset, ImageInfo};

/// The first four bytes, of QCOW2 as well.
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Bytes of the fields.
pub(super) const FIELD_BYTES: usize = 48;
/// Largest first-level table: enough for 2 TiB in the smallest clusters QEMU makes.
pub(super) const MAX_L1_BYTES: u64 = 16 << 20;

/// The header, as far as it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    cluster_bits: u8,
    l2_bits: u8,
    disk_bytes: u64,
    l1_at: u64,
    backing: Option<String>,
    /// Where the parent's name stands, and how long it is.
    name: Option<(u64, u64)>,
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

impl Header {
    /// Reads it.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] without the magic, [`ErrorKind::Unsupported`] for another version and encrypted images,
    /// [`ErrorKind::Corrupt`] where it ends too early or names its parent wrong.
    pub(super) fn read(source: &dyn ByteSource) -> Result<Self> {
        let mut raw = [0; FIELD_BYTES];
        let len = raw.len().min(usize::try_from(source.len()).unwrap_or(usize::MAX));
        source.read_at(HostOffset(0), &mut raw[..len])?;
        if be32(&raw, 0) != Some(MAGIC) {
            return Err(Error::new(ErrorKind::NotThisFormat, "no QCOW signature"));
        }
        if len < raw.len() {
            return Err(corrupt(format!("the file ends inside the QCOW header, at {len} bytes")));
        }
        let word = |at| be32(&raw, at).unwrap_or(0);
        let long = |at| be64(&raw, at).unwrap_or(0);
        match word(4) {
            1 => {}
            2 | 3 => return Err(unsupported("this is QCOW2").hint("--format qcow2")),
            n => return Err(unsupported(format!("QCOW version {n} is not supported"))),
        }
        match word(36) {
            0 => {}
            1 => return Err(unsupported("it is encrypted (AES), which is not supported")),
            n => return Err(unsupported(format!("it is encrypted by method {n}, which is not known"))),
        }
        let (backing, name) = match (long(8), word(16)) {
            (0, _) | (_, 0) => (None, None),
            (at, len) => (Some(read_name(source, at, len)?), Some((at, u64::from(len)))),
        };
        let (cluster_bits, l2_bits) = (raw[32], raw[33]);
        Ok(Header { cluster_bits, l2_bits, disk_bytes: long(24), l1_at: long(40), backing, name })
    }

    /// Where everything is.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] or [`ErrorKind::Limit`] naming the field that cannot be.
    pub(super) fn geometry(&self, file_bytes: u64) -> Result<Geometry> {
        if !(9..=16).contains(&self.cluster_bits) {
            return Err(corrupt(format!(
                "the cluster size is 2^{} bytes; 2^9 to 2^16 are possible",
                self.cluster_bits
            )));
        }
        if !(6..=13).contains(&self.l2_bits) {
            return Err(corrupt(format!("a table has 2^{} entries; 2^6 to 2^13 are possible", self.l2_bits)));
        }
        if self.disk_bytes > MAX_DISK_BYTES {
            return Err(corrupt(format!(
                "the disk has {} bytes; {MAX_DISK_BYTES} are possible",
                self.disk_bytes
            )));
        }
        let geometry = Geometry {
            disk_bytes: self.disk_bytes / SECTOR_BYTES * SECTOR_BYTES,
            cluster_bytes: 1 << self.cluster_bits,
            table_bytes: 8 << self.l2_bits,
            l1_at: self.l1_at,
            header_bytes: FIELD_BYTES as u64,
            file_bytes,
            dialect: Dialect::Qcow,
        };
        if !self.l1_at.is_multiple_of(8) {
            return Err(corrupt(format!(
                "the first-level table is at byte {}, no multiple of 8",
                self.l1_at
            )));
        }
        geometry.check_l1(MAX_L1_BYTES)?;
        Ok(geometry)
    }

    /// Where the parent's name stands, and how long it is.
    pub(super) fn name_span(&self) -> Option<(u64, u64)> {
        self.name
    }

    fn name_end(&self) -> u64 {
        self.name.map_or(0, |(at, len)| at + len)
    }

    pub(super) fn extra(&self, g: &Geometry) -> Extra {
        let l1_end = g.l1_at + g.l1_entries() * 8;
        Extra { metadata_end: l1_end.max(g.header_bytes).max(self.name_end()), mark: None }
    }

    pub(super) fn info(&self) -> ImageInfo {
        ImageInfo {
            format: "qcow",
            variant: if self.backing.is_some() { "diff" } else { "dynamic" },
            virtual_size: self.disk_bytes / SECTOR_BYTES * SECTOR_BYTES,
            block_size: Some(1 << self.cluster_bits),
            version: Some("1".into()),
            parent_names: self.backing.iter().cloned().collect(),
            ..ImageInfo::default()
        }
    }
}
