//! The header of a QCOW2, versions 2 and 3, and its extensions. Big endian; offsets in docs/formats/qcow2.md. What we do
//! not know in them survives: only the fields we change are patched.

use super::super::bytes::{be32, be64, put_be32, put_be64};
use super::layout::Layout;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_DISK_BYTES, SECTOR_BYTES};
use crate::map::{ByteSource, HostOffset};

/// The first eight bytes but for the version.
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Bytes of version 2's header.
pub(super) const V2_BYTES: usize = 72;
/// Bytes of version 3's header without optional fields.
pub(super) const V3_BYTES: usize = 104;
/// Bytes of version 3's header with the compression type, as QEMU writes it.
pub(super) const V3_LONG_BYTES: usize = 112;
/// Bytes of the header that are ever changed: a sector, which is written whole or not at all.
const PATCHED_BYTES: usize = 512;
/// Largest first-level table: QEMU's limit.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table: QEMU's limit.
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Longest name of a backing file.
pub(super) const MAX_NAME_BYTES: u32 = 1023;
/// Extensions looked at.
const MAX_EXTENSIONS: usize = 64;
/// Longest extension whose bytes are taken over.
const MAX_EXTENSION_BYTES: u32 = 4096;

/// Features without whose knowledge an image must not be opened.
pub(super) mod incompatible {
    /// Refcounts are not right: the last writer did not close the image.
    pub(in super::super) const DIRTY: u64 = 1;
    /// The image was found corrupt, and must not be written.
    pub(in super::super) const CORRUPT: u64 = 1 << 1;
    /// The data is in another file.
    pub(in super::super) const DATA_FILE: u64 = 1 << 2;
    /// The header says how clusters are packed.
    pub(in super::super) const COMPRESSION: u64 = 1 << 3;
    /// Entries of second-level tables have 16 bytes.
    pub(in super::super) const EXTENDED_L2: u64 = 1 << 4;
    /// Those that are supported.
    pub(super) const KNOWN: u64 = DIRTY | CORRUPT | COMPRESSION | EXTENDED_L2;
}

const EXT_END: u32 = 0;
/// The format of the backing file.
pub(super) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;

/// An extension of the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extension {
    pub(super) kind: u32,
    pub(super) bytes: Vec<u8>,
}

impl Extension {
    /// The bytes of extensions one behind the other, and of their end.
    pub(super) fn area(all: impl Iterator<Item = Extension>) -> Vec<u8> {
        let mut out = Vec::new();
        for e in all {
            out.extend(e.kind.to_be_bytes());
            out.extend(u32::try_from(e.bytes.len()).expect("MAX_EXTENSION_BYTES").to_be_bytes());
            out.extend(&e.bytes);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend([0; 8]);
        out
    }
}

/// The header as it is in the file, and the texts it names.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// The first bytes of the file.
    raw: Vec<u8>,
    /// The backing file's name, if there is one.
    pub(super) backing: Option<String>,
    /// The backing file's format, if it is said.
    pub(super) backing_format: Option<String>,
    /// Names of features by (type, bit), from the table in the image.
    feature_names: Vec<(u8, u8, String)>,
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

impl Header {
    /// Reads a header whose sizes and places are yet to be judged ([`Self::layout`]).
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] without the signature, [`ErrorKind::Unsupported`] for another version and for
    /// features that are not known, [`ErrorKind::Corrupt`] where the file is too short to hold the fields.
    pub(super) fn read(source: &dyn ByteSource) -> Result<Self> {
        let len = usize::try_from(source.len().min(PATCHED_BYTES as u64)).expect("512 at most");
        let mut raw = vec![0; len];
        source.read_at(HostOffset(0), &mut raw)?;
        if raw.len() < V2_BYTES {
            let what = format!("the file ends inside the QCOW2 header, at {} bytes", source.len());
            return Err(if be32(&raw, 0) == Some(MAGIC) { corrupt(what) } else { not_this(&raw) });
        }
        if be32(&raw, 0) != Some(MAGIC) {
            return Err(not_this(&raw));
        }
        let version = be32(&raw, 4).unwrap_or(0);
        if !(2..=3).contains(&version) {
            return Err(unsupported(format!("QCOW2 version {version} is not supported")));
        }
        if version == 3 && raw.len() < V3_BYTES {
            return Err(corrupt(format!("the file ends inside the QCOW2 header, at {} bytes", source.len())));
        }
        let mut header = Header { raw, backing: None, backing_format: None, feature_names: Vec::new() };
        header.check_sizes()?;
        header.read_extensions(source)?;
        header.check_features()?;
        header.read_backing(source)?;
        Ok(header)
    }

    fn u32(&self, at: usize) -> u32 {
        be32(&self.raw, at).unwrap_or(0)
    }

    fn u64(&self, at: usize) -> u64 {
        be64(&self.raw, at).unwrap_or(0)
    }

    pub(super) fn version(&self) -> u32 {
        self.u32(4)
    }

    fn is_v3(&self) -> bool {
        self.version() >= 3
    }

    pub(super) fn cluster_bits(&self) -> u32 {
        self.u32(20)
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        self.u64(24)
    }

    pub(super) fn l1_entries(&self) -> u32 {
        self.u32(36)
    }

    pub(super) fn l1_at(&self) -> u64 {
        self.u64(40)
    }

    pub(super) fn set_disk_bytes(&mut self, bytes: u64) {
        put_be64(&mut self.raw, 24, bytes);
    }

    pub(super) fn set_l1(&mut self, at: u64, entries: u32) {
        put_be32(&mut self.raw, 36, entries);
        put_be64(&mut self.raw, 40, at);
    }

    pub(super) fn refcount_table_at(&self) -> u64 {
        self.u64(48)
    }

    pub(super) fn refcount_table_clusters(&self) -> u32 {
        self.u32(56)
    }

    pub(super) fn set_refcount_table(&mut self, at: u64, clusters: u32) {
        put_be64(&mut self.raw, 48, at);
        put_be32(&mut self.raw, 56, clusters);
    }

    pub(super) fn snapshots(&self) -> u32 {
        self.u32(60)
    }

    pub(super) fn snapshots_at(&self) -> u64 {
        self.u64(64)
    }

    pub(super) fn incompatible(&self) -> u64 {
        if self.is_v3() { self.u64(72) } else { 0 }
    }

    pub(super) fn set_incompatible(&mut self, bits: u64) {
        put_be64(&mut self.raw, 72, bits);
    }

    pub(super) fn has(&self, feature: u64) -> bool {
        self.incompatible() & feature != 0
    }

    /// What other programs have added and want void once somebody else has changed something.
    pub(super) fn clear_autoclear(&mut self) {
        if self.is_v3() {
            put_be64(&mut self.raw, 88, 0);
        }
    }

    pub(super) fn autoclear(&self) -> u64 {
        if self.is_v3() { self.u64(88) } else { 0 }
    }

    /// log2 of the bits of a refcount.
    pub(super) fn refcount_order(&self) -> u32 {
        if self.is_v3() { self.u32(96) } else { 4 }
    }

    fn header_bytes(&self) -> u32 {
        if self.is_v3() { self.u32(100) } else { V2_BYTES as u32 }
    }

    /// 0: deflate, 1: Zstandard.
    pub(super) fn compression(&self) -> u8 {
        if self.header_bytes() as usize > V3_BYTES { self.raw.get(V3_BYTES).copied().unwrap_or(0) } else { 0 }
    }

    /// The first sector, to be written at the file's start.
    pub(super) fn write_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.raw);
    }

    fn check_sizes(&self) -> Result<()> {
        let bits = self.cluster_bits();
        if !(9..=21).contains(&bits) {
            return Err(corrupt(format!("the cluster size is 2^{bits} bytes; 2^9 to 2^21 are possible")));
        }
        if self.disk_bytes() > MAX_DISK_BYTES {
            let what = format!(
                "the disk size is {} bytes; at most {MAX_DISK_BYTES} are possible",
                self.disk_bytes()
            );
            return Err(corrupt(what));
        }
        if self.refcount_order() > 6 {
            return Err(corrupt(format!(
                "refcounts of 2^{} bits; at most 64 are possible",
                self.refcount_order()
            )));
        }
        let bytes = self.header_bytes();
        let least = if self.is_v3() { V3_BYTES } else { V2_BYTES };
        if (bytes as usize) < least || u64::from(bytes) > 1 << bits {
            return Err(corrupt(format!("the header says it has {bytes} bytes")));
        }
        Ok(())
    }

    fn check_features(&self) -> Result<()> {
        if self.u32(32) != 0 {
            let what = match self.u32(32) {
                1 => "it is encrypted (AES), which is not supported".to_string(),
                2 => "it is encrypted (LUKS), which is not supported".to_string(),
                n => format!("it is encrypted by method {n}, which is not known"),
            };
            return Err(unsupported(what));
        }
        if self.has(incompatible::DATA_FILE) {
            return Err(unsupported("its data is in another file, which is not supported"));
        }
        let unknown = self.incompatible() & !incompatible::KNOWN;
        if unknown != 0 {
            let name = |bit: u8| {
                let named = self.feature_names.iter().find(|(kind, b, _)| *kind == 0 && *b == bit);
                named.map_or_else(|| format!("bit {bit}"), |(_, _, name)| format!("{name} (bit {bit})"))
            };
            let bits: Vec<_> = (0..64u8).filter(|b| unknown >> b & 1 == 1).map(name).collect();
            return Err(unsupported(format!("it uses features that are not supported: {}", bits.join(", "))));
        }
        let packed = self.compression();
        if packed > 1 || (packed == 1) != self.has(incompatible::COMPRESSION) {
            return Err(unsupported(format!(
                "its clusters are packed by method {packed}, which is not known"
            )));
        }
        if self.has(incompatible::EXTENDED_L2) && self.cluster_bits() < 14 {
            return Err(corrupt("subclusters need clusters of 16 KiB or more"));
        }
        Ok(())
    }

    /// Where extensions end: at the backing file's name, or with the first cluster.
    fn extensions_end(&self) -> u64 {
        let cluster = 1u64 << self.cluster_bits();
        match self.u64(8) {
            0 => cluster,
            name => name.min(cluster),
        }
    }

    /// Where the extensions begin.
    pub(super) fn extensions_start(&self) -> u64 {
        u64::from(self.header_bytes()).next_multiple_of(8)
    }

    /// Where the backing file's name stands, and how long it is.
    pub(super) fn name_span(&self) -> Option<(u64, u64)> {
        Some((self.u64(8), u64::from(self.u32(16)))).filter(|(at, len)| *at > 0 && *len > 0)
    }

    /// All extensions.
    ///
    /// # Errors
    /// [`ErrorKind::Limit`] for those that no sector holds; those of reading.
    pub(super) fn extensions(&self, source: &dyn ByteSource) -> Result<Vec<Extension>> {
        let end = self.extensions_end().min(source.len());
        let (mut at, mut all) = (self.extensions_start(), Vec::new());
        while at + 8 <= end {
            let mut head = [0; 8];
            source.read_at(HostOffset(at), &mut head)?;
            let (kind, len) = (be32(&head, 0).unwrap_or(0), be32(&head, 4).unwrap_or(0));
            if kind == EXT_END {
                break;
            }
            if u64::from(len) > end - at - 8 || len > MAX_EXTENSION_BYTES || all.len() == MAX_EXTENSIONS {
                return Err(Error::new(ErrorKind::Limit, "its header has too many extensions"));
            }
            let mut bytes = vec![0; usize::try_from(len).expect("MAX_EXTENSION_BYTES")];
            source.read_at(HostOffset(at + 8), &mut bytes)?;
            all.push(Extension { kind, bytes });
            at += 8 + u64::from(len).next_multiple_of(8);
        }
        Ok(all)
    }

    fn read_extensions(&mut self, source: &dyn ByteSource) -> Result<()> {
        let end = self.extensions_end().min(source.len());
        let mut at = self.extensions_start();
        for _ in 0..MAX_EXTENSIONS {
            if at + 8 > end {
                return Ok(());
            }
            let mut head = [0; 8];
            source.read_at(HostOffset(at), &mut head)?;
            let (kind, len) = (be32(&head, 0).unwrap_or(0), be32(&head, 4).unwrap_or(0));
            if kind == EXT_END {
                return Ok(());
            }
            at += 8;
            if u64::from(len) > end - at {
                let what = format!("the header extension {kind:#010x} of {len} bytes does not fit");
                return Err(corrupt(what));
            }
            if matches!(kind, EXT_BACKING_FORMAT | EXT_FEATURE_NAMES) && len <= 4096 {
                let mut bytes = vec![0; usize::try_from(len).expect("4096 at most")];
                source.read_at(HostOffset(at), &mut bytes)?;
                self.take_extension(kind, &bytes);
            }
            at += u64::from(len).next_multiple_of(8);
        }
        Ok(())
    }

    fn take_extension(&mut self, kind: u32, bytes: &[u8]) {
        if kind == EXT_BACKING_FORMAT {
            self.backing_format = Some(String::from_utf8_lossy(bytes).into_owned());
            return;
        }
        for entry in bytes.chunks_exact(48) {
            let name = &entry[2..];
            let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
            let name: String =
                String::from_utf8_lossy(&name[..end]).chars().filter(|c| !c.is_control()).collect();
            self.feature_names.push((entry[0], entry[1], name));
        }
    }

    fn read_backing(&mut self, source: &dyn ByteSource) -> Result<()> {
        let (at, len) = (self.u64(8), self.u32(16));
        if at == 0 || len == 0 {
            return Ok(());
        }
        let cluster = 1u64 << self.cluster_bits();
        if len > MAX_NAME_BYTES || at > cluster || u64::from(len) > cluster - at {
            let what = format!(
                "the backing file's name of {len} bytes at byte {at} is not inside the first cluster"
            );
            return Err(corrupt(what));
        }
        let mut name = vec![0; usize::try_from(len).expect("MAX_NAME_BYTES")];
        source.read_at(HostOffset(at), &mut name)?;
        let name = String::from_utf8(name).map_err(|_| corrupt("the backing file's name is not UTF-8"))?;
        self.backing = Some(name);
        Ok(())
    }

    /// Where things are, if the fields that say so make sense together and with a file of `file_bytes` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Limit`], naming the field.
    pub(super) fn layout(&self, file_bytes: u64) -> Result<Layout> {
        let cluster_bits = self.cluster_bits();
        let layout = Layout {
            disk_bytes: self.disk_bytes() / SECTOR_BYTES * SECTOR_BYTES,
            cluster_bits,
            extended: self.has(incompatible::EXTENDED_L2),
            zero_flag: self.is_v3(),
            refcount_order: self.refcount_order(),
            l1_entries: self.l1_entries(),
            l1_at: HostOffset(self.l1_at()),
            file_bytes,
        };
        let (entries, needed) = (u64::from(layout.l1_entries), layout.l1_needed());
        if entries * 8 > MAX_L1_BYTES {
            let what =
                format!("the first-level table has {entries} entries; {} are the limit", MAX_L1_BYTES / 8);
            return Err(Error::new(ErrorKind::Limit, what));
        }
        if entries < needed {
            let what = format!("the first-level table has {entries} entries; the disk needs {needed}");
            return Err(corrupt(what));
        }
        layout.check_table("first-level table", self.l1_at(), entries * 8)?;
        Ok(layout)
    }
}

fn not_this(raw: &[u8]) -> Error {
    let magic = be32(raw, 0).map_or("too short".to_string(), |m| format!("{m:#010x}"));
    Error::new(ErrorKind::NotThisFormat, format!("not a QCOW2: the signature at byte 0 is {magic}"))
}
