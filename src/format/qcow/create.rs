//! New images: the header, the parent's name, and at the next cluster a first level without entries.

use super::super::bytes::{put_be32, put_be64};
use super::super::levels::create::{backing_name, check, image, power};
use super::super::{Blueprint, Format, NewImage, NewOption, blueprint::refused};
use super::header::{FIELD_BYTES, MAGIC, MAX_L1_BYTES};
use crate::error::Result;

/// What QEMU and VirtualBox take for images without a parent, bytes of a cluster and entries of a table.
const DEFAULT: (u64, u64) = (4096, 512);
/// What QEMU takes for others. It writes parts of new clusters and leaves the rest of them zero, whatever is beneath: in clusters of one
/// sector there is no rest.
const DEFAULT_OF_DIFFS: (u64, u64) = (512, 4096);

/// The options that are known.
pub(super) const OPTIONS: [NewOption; 2] =
    [NewOption::number("cluster_size", None), NewOption::number("table_entries", None)];

pub(super) fn blueprint(new: &NewImage) -> Result<Blueprint> {
    check(Format::Qcow, new, &OPTIONS)?;
    let default = if new.parent.is_some() { DEFAULT_OF_DIFFS } else { DEFAULT };
    let cluster = power(new, "cluster_size", 512..=64 << 10, default.0)?;
    let entries = power(new, "table_entries", 64..=8192, default.1)?;
    let l1_bytes = new.size_bytes.div_ceil(entries * cluster) * 8;
    if l1_bytes > MAX_L1_BYTES {
        let what = format!("the first-level table would have {l1_bytes} bytes; {MAX_L1_BYTES} are possible");
        return Err(refused(what).hint("choose a larger cluster_size or table_entries"));
    }
    let mut head = vec![0; FIELD_BYTES];
    put_be32(&mut head, 0, MAGIC);
    put_be32(&mut head, 4, 1);
    put_be64(&mut head, 24, new.size_bytes);
    let bits = |n: u64| u8::try_from(n.trailing_zeros()).expect("64 bits");
    (head[32], head[33]) = (bits(cluster), bits(entries));
    if let Some(parent) = &new.parent {
        let name = backing_name(parent)?;
        put_be64(&mut head, 8, FIELD_BYTES as u64);
        put_be32(&mut head, 16, u32::try_from(name.len()).expect("a short name"));
        head.extend(name.as_bytes());
    }
    // Anywhere behind the name would do. At a cluster it shares no device sector with what is in front of it.
    let l1_at = (head.len() as u64).next_multiple_of(cluster);
    put_be64(&mut head, 40, l1_at);
    Ok(image(head, (l1_at + l1_bytes).next_multiple_of(cluster)))
}
