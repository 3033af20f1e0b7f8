//! New QCOW2 images: header, refcount table, refcount blocks, first-level table, each at a cluster of its own.

use super::super::Format;
use super::super::blueprint::{Blueprint, NewImage, NewOption, NewParent, refused};
use super::super::bytes::{put_be32, put_be64};
use super::header::{
    EXT_BACKING_FORMAT, MAGIC, MAX_L1_BYTES, MAX_NAME_BYTES, V2_BYTES, V3_LONG_BYTES, incompatible,
};
use super::layout::Layout;
use super::refcounts::set;
use crate::error::Result;
use crate::limits::{MAX_DISK_BYTES, SECTOR_BYTES, TABLE_PIECE_BYTES};
use crate::map::HostOffset;

/// What QEMU takes if nothing is said.
const DEFAULT_CLUSTER_BYTES: u64 = 64 << 10;
/// Where the refcount table is; the blocks follow it.
const REFCOUNT_TABLE_CLUSTER: u64 = 1;

/// The options that are known.
pub(super) const OPTIONS: [NewOption; 4] = [
    NewOption::number("cluster_size", Some("65536")),
    NewOption::word("compat", Some("1.1")),
    NewOption::word("extended_l2", Some("off")),
    NewOption::number("refcount_bits", Some("16")),
];

/// What was asked for, checked.
#[derive(Clone, Debug)]
struct Shape {
    layout: Layout,
    version: u32,
    /// Clusters of the refcount table, refcount blocks, and clusters of the first-level table.
    table: u64,
    blocks: u64,
    l1: u64,
}

/// A new image, for [`super::super::blueprint`].
pub(super) fn blueprint(new: &NewImage) -> Result<Blueprint> {
    new.without(Format::Qcow2, "UUID", new.uuid.is_some())?;
    new.without(Format::Qcow2, "comment", new.comment.is_some())?;
    new.without(Format::Qcow2, "geometry", new.geometry.is_some())?;
    new.only_options(&OPTIONS)?;
    if let Some(v) = new.variant.as_deref().filter(|v| !v.eq_ignore_ascii_case("dynamic")) {
        return Err(refused(format!("unknown variant '{v}' of QCOW2")).hint("dynamic"));
    }
    let shape = Shape::of(new)?;
    let head = shape.head(new.parent.as_ref())?;
    let bytes = shape.layout.cluster_bytes();
    let total = shape.total();
    let table_at = REFCOUNT_TABLE_CLUSTER * bytes;
    let mut table = Vec::new();
    for n in 0..shape.blocks {
        table.extend((table_at + (shape.table + n) * bytes).to_be_bytes());
    }
    let per_block = shape.layout.refcounts_per_block();
    let (order, block_bytes) = (shape.layout.refcount_order, usize::try_from(bytes).expect("2 MiB at most"));
    let counts: Vec<_> = (0..shape.blocks)
        .map(|n| {
            let mut block = vec![0; block_bytes];
            for i in 0..per_block.min(total - n * per_block) {
                set(&mut block, usize::try_from(i).expect("inside a cluster"), order, 1);
            }
            (HostOffset(table_at + (shape.table + n) * bytes), block)
        })
        .collect();
    let pieces = counts
        .into_iter()
        .chain([(HostOffset(table_at), table)])
        .flat_map(|(at, bytes)| in_pieces(at, bytes))
        .chain([(HostOffset(0), head)]);
    Ok(Blueprint::single(total * bytes, None, pieces.collect::<Vec<_>>()))
}

fn in_pieces(at: HostOffset, bytes: Vec<u8>) -> Vec<(HostOffset, Vec<u8>)> {
    let piece = |(n, p): (u64, &[u8])| (at.plus(n * TABLE_PIECE_BYTES as u64), p.to_vec());
    (0..).zip(bytes.chunks(TABLE_PIECE_BYTES)).map(piece).collect()
}

fn on_off(new: &NewImage, key: &str) -> Result<bool> {
    match new.option(key).map(str::to_ascii_lowercase).as_deref() {
        None | Some("off" | "no" | "false") => Ok(false),
        Some("on" | "yes" | "true") => Ok(true),
        Some(v) => Err(refused(format!("'{v}' for option {key}")).hint("on or off")),
    }
}

impl Shape {
    fn of(new: &NewImage) -> Result<Shape> {
        let size = new.size_bytes;
        if size == 0 || !size.is_multiple_of(SECTOR_BYTES) || size > MAX_DISK_BYTES {
            return Err(refused(format!(
                "the size {size} is no multiple of 512 bytes from 512 to {MAX_DISK_BYTES}"
            )));
        }
        let version = match new.option("compat") {
            None | Some("1.1" | "v3" | "3") => 3,
            Some("0.10" | "v2" | "2") => 2,
            Some(v) => return Err(refused(format!("unknown compat '{v}'")).hint("0.10 or 1.1")),
        };
        let extended = on_off(new, "extended_l2")?;
        let cluster = new.option_size("cluster_size")?.unwrap_or(DEFAULT_CLUSTER_BYTES);
        if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
            let what = format!("the cluster size {cluster} is no power of two from 512 to 2M");
            return Err(refused(what).hint("64k is QEMU's own choice"));
        }
        let bits: u64 = match new.option("refcount_bits") {
            None => 16,
            Some(b) => b.parse().map_err(|_| refused(format!("'{b}' for option refcount_bits")))?,
        };
        if !bits.is_power_of_two() || bits > 64 {
            return Err(refused(format!("refcounts of {bits} bits")).hint("1, 2, 4, 8, 16, 32 or 64"));
        }
        if version == 2 && (extended || bits != 16) {
            return Err(refused("extended_l2 and refcount_bits need compat=1.1"));
        }
        if extended && cluster < 16 << 10 {
            return Err(refused(format!(
                "extended_l2 needs clusters of 16 KiB or more, not {cluster} bytes"
            )));
        }
        let mut layout = Layout {
            disk_bytes: size,
            cluster_bits: cluster.trailing_zeros(),
            extended,
            zero_flag: version == 3,
            refcount_order: bits.trailing_zeros(),
            l1_entries: 0,
            l1_at: HostOffset(0),
            file_bytes: 0,
        };
        let l1_bytes = layout.l1_needed() * 8;
        if l1_bytes > MAX_L1_BYTES {
            let what = format!("a disk of {size} bytes is too large for clusters of {cluster}");
            return Err(refused(what).hint("choose a larger cluster_size"));
        }
        layout.l1_entries = u32::try_from(layout.l1_needed()).expect("MAX_L1_BYTES");
        Ok(Self::with_refcounts(layout, version, l1_bytes.div_ceil(cluster)))
    }

    /// Refcount blocks count themselves, and the table that names them.
    fn with_refcounts(mut layout: Layout, version: u32, l1: u64) -> Shape {
        let (mut table, mut blocks) = (1, 1);
        loop {
            let total = 1 + table + blocks + l1;
            let needed = total.div_ceil(layout.refcounts_per_block());
            let needed_table = (needed * 8).div_ceil(layout.cluster_bytes());
            if needed <= blocks && needed_table <= table {
                break;
            }
            (blocks, table) = (blocks.max(needed), table.max(needed_table));
        }
        layout.l1_at = HostOffset((REFCOUNT_TABLE_CLUSTER + table + blocks) * layout.cluster_bytes());
        Shape { layout, version, table, blocks, l1 }
    }

    fn total(&self) -> u64 {
        1 + self.table + self.blocks + self.l1
    }

    /// The first cluster, as far as it is not zeros.
    fn head(&self, parent: Option<&NewParent>) -> Result<Vec<u8>> {
        let header_bytes = if self.version == 3 { V3_LONG_BYTES } else { V2_BYTES };
        let mut head = vec![0; header_bytes];
        let name = parent.map(backing_name).transpose()?;
        if let Some(parent) = parent {
            let format = backing_format(parent.info.format);
            head.extend(EXT_BACKING_FORMAT.to_be_bytes());
            head.extend(u32::try_from(format.len()).expect("a short name").to_be_bytes());
            head.extend(format.as_bytes());
            head.resize(head.len().next_multiple_of(8), 0);
        }
        // the end of the extensions
        head.extend([0; 8]);
        let l = &self.layout;
        put_be32(&mut head, 0, MAGIC);
        put_be32(&mut head, 4, self.version);
        put_be32(&mut head, 20, l.cluster_bits);
        put_be64(&mut head, 24, l.disk_bytes);
        put_be32(&mut head, 36, l.l1_entries);
        put_be64(&mut head, 40, l.l1_at.0);
        put_be64(&mut head, 48, REFCOUNT_TABLE_CLUSTER * l.cluster_bytes());
        put_be32(&mut head, 56, u32::try_from(self.table).expect("few clusters"));
        if self.version == 3 {
            put_be64(&mut head, 72, if l.extended { incompatible::EXTENDED_L2 } else { 0 });
            put_be32(&mut head, 96, l.refcount_order);
            put_be32(&mut head, 100, V3_LONG_BYTES as u32);
        }
        if let Some(name) = name {
            let at = head.len();
            put_be64(&mut head, 8, at as u64);
            put_be32(&mut head, 16, u32::try_from(name.len()).expect("MAX_NAME_BYTES"));
            head.extend(name.as_bytes());
        }
        if head.len() as u64 > l.cluster_bytes() {
            let what = "the parent's name does not fit into the first cluster";
            return Err(refused(what).hint("choose a larger cluster_size"));
        }
        Ok(head)
    }
}

fn backing_name(parent: &NewParent) -> Result<String> {
    let Some(name) = &parent.path else { return Err(refused("the parent's file is not known")) };
    if name.is_empty() || name.len() > MAX_NAME_BYTES as usize || name.contains('\0') {
        return Err(refused(format!(
            "the parent's name has {} bytes; {MAX_NAME_BYTES} are the limit",
            name.len()
        )));
    }
    Ok(name.clone())
}

/// QEMU's word for a format.
pub(super) fn backing_format(ours: &'static str) -> &'static str {
    if ours == "vhd" { "vpc" } else { ours }
}

#[cfg(test)]
mod tests {
    use super::super::header::Header;
    use super::*;
    use crate::error::ErrorKind;
    use crate::map::ImageInfo;
    use uuid::Uuid;

    fn new(size_bytes: u64, options: &[(&str, &str)]) -> NewImage {
        NewImage {
            file_name: "a.qcow2".into(),
            size_bytes,
            variant: None,
            uuid: None,
            modification: Uuid::nil(),
            parent: None,
            comment: None,
            geometry: None,
            options: options.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        }
    }

    fn bytes_of(new: &NewImage) -> Vec<u8> {
        let file = blueprint(new).unwrap().files.pop().unwrap();
        let mut bytes = vec![0; usize::try_from(file.len).unwrap()];
        for (at, piece) in file.pieces {
            let at = usize::try_from(at.0).unwrap();
            bytes[at..at + piece.len()].copy_from_slice(&piece);
        }
        bytes
    }

    #[test]
    fn impossible_values_are_named() {
        let cases: [(&str, NewImage); 9] = [
            ("multiple of 512", new(1000, &[])),
            ("power of two", new(512, &[("cluster_size", "3k")])),
            ("power of two", new(512, &[("cluster_size", "4M")])),
            ("larger cluster_size", new(1 << 40, &[("cluster_size", "512")])),
            ("compat", new(512, &[("compat", "9")])),
            ("need compat=1.1", new(512, &[("compat", "0.10"), ("extended_l2", "on")])),
            ("16 KiB", new(512, &[("cluster_size", "8k"), ("extended_l2", "on")])),
            ("bits", new(512, &[("refcount_bits", "128")])),
            ("unknown option", new(512, &[("nosuch", "1")])),
        ];
        for (word, n) in cases {
            let e = blueprint(&n).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidArgument);
            assert!(e.to_string().contains(word), "{word}: {e}");
        }
    }

    #[test]
    fn every_shape_says_what_it_was_told() {
        for bits in 9..=21u32 {
            for order in [0, 4, 6] {
                let (cluster, refcounts) = ((1u64 << bits).to_string(), (1 << order).to_string());
                let options = [("cluster_size", cluster.as_str()), ("refcount_bits", refcounts.as_str())];
                let mut n = new(5 << 20, &options);
                let info = ImageInfo { format: "vhd", ..ImageInfo::default() };
                n.parent = (order == 4).then(|| NewParent { info, path: Some("base.vhd".into()) });
                let header = Header::read(&bytes_of(&n)).unwrap();
                assert_eq!((header.cluster_bits(), header.refcount_order()), (bits, order));
                assert_eq!(header.disk_bytes(), 5 << 20);
                let backing = (header.backing.as_deref(), header.backing_format.as_deref());
                assert_eq!(backing, if order == 4 { (Some("base.vhd"), Some("vpc")) } else { (None, None) });
                assert!(header.layout(bytes_of(&n).len() as u64).is_ok());
            }
        }
    }
}
