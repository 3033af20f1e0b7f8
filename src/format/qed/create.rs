//! New images: the header with the parent's name in its cluster, and a first level without entries.

use super::super::levels::create::{backing_name, check, image, power};
use super::super::{Blueprint, Format, NewImage, NewOption, blueprint::refused};
use super::header::{BACKING, BACKING_RAW, CLUSTER_BYTES, FIELD_BYTES, MAGIC};
use crate::error::Result;
use crate::limits::MAX_DISK_BYTES;

/// What QEMU takes if nothing is said.
const DEFAULT_CLUSTER_BYTES: u64 = 64 << 10;
const DEFAULT_TABLE_CLUSTERS: u64 = 4;

/// The options that are known.
pub(super) const OPTIONS: [NewOption; 2] =
    [NewOption::number("cluster_size", Some("65536")), NewOption::number("table_size", Some("4"))];

pub(super) fn blueprint(new: &NewImage) -> Result<Blueprint> {
    check(Format::Qed, new, &OPTIONS)?;
    let possible = u64::from(*CLUSTER_BYTES.start())..=u64::from(*CLUSTER_BYTES.end());
    let cluster = power(new, "cluster_size", possible, DEFAULT_CLUSTER_BYTES)?;
    // QEMU opens no image whose tables have one cluster, although its specification allows them.
    let table = power(new, "table_size", 2..=16, DEFAULT_TABLE_CLUSTERS)?;
    let entries = table * cluster / 8;
    let most = entries.saturating_mul(entries).saturating_mul(cluster).min(MAX_DISK_BYTES);
    if new.size_bytes > most {
        let what = format!("tables of {table} clusters of {cluster} bytes hold {most} bytes at most");
        return Err(refused(what).hint("choose a larger cluster_size or table_size"));
    }
    let mut head = vec![0; FIELD_BYTES];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    let small = |n: u64| u32::try_from(n).expect("at most 64 MiB").to_le_bytes();
    put(0, MAGIC);
    put(4, &small(cluster));
    put(8, &small(table));
    put(12, &small(1));
    put(40, &cluster.to_le_bytes());
    put(48, &new.size_bytes.to_le_bytes());
    if let Some(parent) = &new.parent {
        // QEMU takes no name that lies elsewhere than in the header's clusters.
        let (name, at) = (backing_name(parent)?, FIELD_BYTES as u64);
        let raw = if parent.info.format == "raw" { BACKING_RAW } else { 0 };
        put(16, &(BACKING | raw).to_le_bytes());
        put(56, &small(at));
        put(60, &small(name.len() as u64));
        head.extend(name.as_bytes());
    }
    Ok(image(head, (1 + table) * cluster))
}
