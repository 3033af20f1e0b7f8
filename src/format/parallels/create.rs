//! New images. They bear the old magic as long as its 32 bits for the size are enough: VirtualBox knows no other.

use super::super::blueprint::refused;
use super::super::{Blueprint, Format, NewImage, NewOption};
use super::header::{EXTENDED, HEADER_BYTES, PLAIN, VERSION};
use crate::error::Result;
use crate::limits::{MAX_BLOCK_BYTES, MAX_TABLE_BYTES, SECTOR_BYTES, TABLE_PIECE_BYTES};
use crate::map::HostOffset;

/// What QEMU and Parallels itself use.
const DEFAULT_CLUSTER_BYTES: u64 = 1 << 20;

/// The options that are known.
pub(super) const OPTIONS: [NewOption; 1] = [NewOption::number("cluster_size", Some("1048576"))];

pub(super) fn blueprint(new: &NewImage) -> Result<Blueprint> {
    new.without(Format::Parallels, "UUID", new.uuid.is_some())?;
    new.without(Format::Parallels, "comment", new.comment.is_some())?;
    new.only_options(&OPTIONS)?;
    match new.variant.as_deref().map(str::to_ascii_lowercase).as_deref() {
        None | Some("dynamic") => {}
        Some(v) => return Err(refused(format!("unknown variant '{v}'")).hint("dynamic")),
    }
    let cluster = new.option_size("cluster_size")?.unwrap_or(DEFAULT_CLUSTER_BYTES);
    if cluster == 0 || !cluster.is_multiple_of(SECTOR_BYTES) || cluster > MAX_BLOCK_BYTES {
        return Err(refused(format!(
            "the cluster size {cluster} is no multiple of 512 up to {MAX_BLOCK_BYTES}"
        )));
    }
    let sectors = new.size_bytes / SECTOR_BYTES;
    let entries = new.size_bytes.div_ceil(cluster);
    let table_end = HEADER_BYTES as u64 + entries * 4;
    if table_end > MAX_TABLE_BYTES {
        return Err(refused(format!("{entries} clusters of {cluster} bytes are too many for one table")));
    }
    let plain = u32::try_from(sectors).is_ok();
    let data_at = table_end.next_multiple_of(cluster);
    let mut head = vec![0; HEADER_BYTES];
    head[..16].copy_from_slice(if plain { PLAIN } else { EXTENDED });
    let cylinders = u32::try_from(sectors / 16 / 32).unwrap_or(u32::MAX);
    let word = |v: u64| u32::try_from(v).expect("checked above");
    for (at, value) in [
        (16, VERSION),
        (20, 16),
        (24, cylinders),
        (28, word(cluster / SECTOR_BYTES)),
        (32, word(entries)),
        (48, u32::try_from(data_at / SECTOR_BYTES).map_err(|_| refused("the table is too large"))?),
    ] {
        head[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    head[36..44].copy_from_slice(&sectors.to_le_bytes());
    debug_assert!(head.len() <= TABLE_PIECE_BYTES);
    // Entries of free blocks are zeros, as the file is.
    Ok(Blueprint::single(data_at, None, [(HostOffset(0), head)]))
}
