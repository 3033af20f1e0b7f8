//! The header: 64 bytes, little endian. Offsets in docs/formats/qed.md.

use super::super::levels::{Dialect, Extra, Geometry, Marking, read_name};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_DISK_BYTES, MAX_TABLE_BYTES, SECTOR_BYTES};
use crate::map::{ByteSource, HostOffset, ImageInfo};

/// The first four bytes.
pub(super) const MAGIC: &[u8; 4] = b"QED\0";
/// Bytes of the fields.
pub(super) const FIELD_BYTES: usize = 64;
/// Where the features are.
pub(super) const FEATURES_AT: u64 = 16;
/// Features that whoever writes has to clear if he does not know them, and we know none.
const AUTOCLEAR: std::ops::Range<usize> = 32..40;
/// There is a backing file.
pub(super) const BACKING: u64 = 1;
/// The tables may not be right: the last writer did not close the image.
const NEED_CHECK: u64 = 1 << 1;
/// The backing file is raw, whatever it looks like.
pub(super) const BACKING_RAW: u64 = 1 << 2;
/// Sizes of clusters.
pub(super) const CLUSTER_BYTES: std::ops::RangeInclusive<u32> = 4096..=64 << 20;

/// The header, as far as it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    cluster_bytes: u32,
    table_clusters: u32,
    header_clusters: u32,
    features: u64,
    l1_at: u64,
    disk_bytes: u64,
    backing: Option<String>,
    /// Where the parent's name stands, and how long it is.
    name: Option<(u64, u64)>,
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

impl Header {
    /// Reads it.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] without the magic, [`ErrorKind::Unsupported`] for features that are not known,
    /// [`ErrorKind::Corrupt`] where it ends too early or names its parent wrong.
    pub(super) fn read(source: &dyn ByteSource) -> Result<Self> {
        let mut raw = [0; FIELD_BYTES];
        let len = raw.len().min(usize::try_from(source.len()).unwrap_or(usize::MAX));
        source.read_at(HostOffset(0), &mut raw[..len])?;
        if raw[..4] != *MAGIC {
            return Err(Error::new(ErrorKind::NotThisFormat, "no QED signature"));
        }
        if len < raw.len() {
            return Err(corrupt(format!("the file ends inside the QED header, at {len} bytes")));
        }
        let word = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let mut header = Header {
            cluster_bytes: word(4),
            table_clusters: word(8),
            header_clusters: word(12),
            features: long(16),
            l1_at: long(40),
            disk_bytes: long(48),
            backing: None,
            name: None,
        };
        let unknown = header.features & !(BACKING | NEED_CHECK | BACKING_RAW);
        if unknown != 0 {
            let bits: Vec<_> =
                (0..64).filter(|b| unknown >> b & 1 == 1).map(|b| format!("bit {b}")).collect();
            let what = format!("it uses features that are not supported: {}", bits.join(", "));
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        if header.features & BACKING != 0 {
            header.name = Some((u64::from(word(56)), u64::from(word(60))));
            header.backing = Some(read_name(source, u64::from(word(56)), word(60))?);
        }
        Ok(header)
    }

    /// Where everything is.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] or [`ErrorKind::Limit`] naming the field that cannot be.
    pub(super) fn geometry(&self, file_bytes: u64) -> Result<Geometry> {
        let (cluster, tables) = (self.cluster_bytes, self.table_clusters);
        if !cluster.is_power_of_two() || !CLUSTER_BYTES.contains(&cluster) {
            return Err(corrupt(format!(
                "the cluster size is {cluster} bytes; 4 KiB to 64 MiB are possible"
            )));
        }
        if !tables.is_power_of_two() || tables > 16 {
            return Err(corrupt(format!("a table has {tables} clusters; 1, 2, 4, 8 and 16 are possible")));
        }
        let header_bytes = u64::from(self.header_clusters) * u64::from(cluster);
        if header_bytes == 0 || header_bytes > file_bytes {
            return Err(corrupt(format!("the header has {} clusters", self.header_clusters)));
        }
        let table_bytes = u64::from(tables) * u64::from(cluster);
        let geometry = Geometry {
            disk_bytes: self.disk_bytes,
            cluster_bytes: u64::from(cluster),
            table_bytes,
            l1_at: self.l1_at,
            header_bytes,
            file_bytes,
            dialect: Dialect::Qed,
        };
        let most = (table_bytes / 8).saturating_mul(geometry.span()).min(MAX_DISK_BYTES);
        if !self.disk_bytes.is_multiple_of(SECTOR_BYTES) || self.disk_bytes > most {
            let what =
                format!("the disk has {} bytes; multiples of 512 up to {most} are possible", self.disk_bytes);
            return Err(corrupt(what));
        }
        if !self.l1_at.is_multiple_of(u64::from(cluster)) {
            return Err(corrupt(format!(
                "the first-level table at byte {} does not begin with a cluster",
                self.l1_at
            )));
        }
        geometry.check_l1(MAX_TABLE_BYTES)?;
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
        let l1_end = g.l1_at + g.table_bytes;
        let byte = u8::try_from(self.features & !NEED_CHECK).expect("no other features are known");
        let mark = (self.features & NEED_CHECK != 0).then_some((FEATURES_AT, byte));
        Extra { metadata_end: l1_end.max(g.header_bytes).max(self.name_end()), mark }
    }

    /// The entry of a cluster of zeros. VirtualBox knows none: it shows what is at byte 1 of the file, and writes there. So diffs of
    /// its own get none, which are told by their parents' names: nobody else puts those where QEMU refuses them.
    pub(super) fn zeros(&self) -> Option<u64> {
        let header_bytes = u64::from(self.header_clusters) * u64::from(self.cluster_bytes);
        (self.name_end() <= header_bytes).then_some(1)
    }

    /// How a writer leaves its mark. Whatever others have added that a writer has to know goes with it.
    ///
    /// # Errors
    /// Those of reading.
    pub(super) fn marking(&self, source: &dyn ByteSource) -> Result<Marking> {
        let mut sector = [0; SECTOR_BYTES as usize];
        source.read_at(HostOffset(0), &mut sector)?;
        let mark = |sector: &mut [u8; SECTOR_BYTES as usize], in_use| {
            let bit = u8::try_from(NEED_CHECK).expect("one of the low bits");
            let features = &mut sector[FEATURES_AT as usize];
            *features = if in_use { *features | bit } else { *features & !bit };
            sector[AUTOCLEAR].fill(0);
        };
        Ok(Marking { sector, mark })
    }

    pub(super) fn info(&self) -> ImageInfo {
        let raw = self.features & BACKING_RAW != 0;
        ImageInfo {
            format: "qed",
            variant: if self.backing.is_some() { "diff" } else { "dynamic" },
            virtual_size: self.disk_bytes,
            block_size: Some(u64::from(self.cluster_bytes)),
            parent_names: self.backing.iter().cloned().collect(),
            parent_format: (raw && self.backing.is_some()).then(|| "raw".to_string()),
            ..ImageInfo::default()
        }
    }
}
