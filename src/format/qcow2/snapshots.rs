//! The table of internal snapshots.

use super::super::bytes::{be32, be64};
use super::header::{Header, MAX_L1_BYTES};
use super::layout::Layout;
use crate::error::{Error, ErrorKind, Result};
use crate::map::{ByteSource, HostOffset, SnapshotInfo};

/// Most snapshots of an image: QEMU's limit.
const MAX_SNAPSHOTS: u32 = 65536;
/// Bytes of the table: QEMU's limit.
const MAX_TABLE_BYTES: u64 = 64 << 20;
/// Bytes of an entry before its variable parts.
const FIXED_BYTES: usize = 40;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its number, as text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Seconds since 1970 when it was made.
    pub seconds: u32,
    /// Bytes of a machine's state that were saved with it.
    pub state_bytes: u64,
    /// Size of the disk in bytes at that time.
    pub disk_bytes: u64,
    pub(super) l1_at: u64,
    pub(super) l1_entries: u32,
}

impl Snapshot {
    /// What there is to tell of it.
    pub(super) fn info(&self) -> SnapshotInfo {
        SnapshotInfo {
            id: self.id.clone(),
            name: self.name.clone(),
            seconds: self.seconds,
            state_bytes: self.state_bytes,
            disk_bytes: self.disk_bytes,
        }
    }
}

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

/// Reads the table, and where it ends.
///
/// # Errors
/// [`ErrorKind::Corrupt`] and [`ErrorKind::Limit`], with the entry.
pub(super) fn read(
    source: &dyn ByteSource,
    header: &Header,
    layout: &Layout,
) -> Result<(Vec<Snapshot>, u64)> {
    let count = header.snapshots();
    let mut at = header.snapshots_at();
    if count == 0 {
        return Ok((Vec::new(), at));
    }
    if count > MAX_SNAPSHOTS {
        let what = format!("it has {count} snapshots; {MAX_SNAPSHOTS} are the limit");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    layout.check_table("snapshot table", at, u64::from(count) * FIXED_BYTES as u64)?;
    let (start, mut list) = (at, Vec::new());
    for n in 0..count {
        let (snapshot, len) = read_one(source, at, layout).map_err(|e| match e.kind() {
            ErrorKind::Corrupt => corrupt(format!("snapshot {n} of {count}: {e}")),
            _ => e,
        })?;
        list.push(snapshot);
        at += len.next_multiple_of(8);
        if at - start > MAX_TABLE_BYTES {
            return Err(Error::new(ErrorKind::Limit, "the snapshot table is longer than 64 MiB"));
        }
    }
    Ok((list, at))
}

fn read_one(source: &dyn ByteSource, at: u64, layout: &Layout) -> Result<(Snapshot, u64)> {
    let mut head = [0; FIXED_BYTES];
    source.read_at(HostOffset(at), &mut head)?;
    let u32_at = |i| be32(&head, i).unwrap_or(0);
    let u16_at = |i: usize| u16::from_be_bytes([head[i], head[i + 1]]);
    let (id_len, name_len, extra_len) = (u16_at(12), u16_at(14), u32_at(36));
    if extra_len > 1024 {
        return Err(corrupt(format!("{extra_len} extra bytes")));
    }
    let extra_bytes = usize::try_from(extra_len).expect("1024 at most");
    let mut rest = vec![0; extra_bytes + usize::from(id_len) + usize::from(name_len)];
    source.read_at(HostOffset(at + FIXED_BYTES as u64), &mut rest)?;
    let (extra, texts) = rest.split_at(extra_bytes);
    let (id, name) = texts.split_at(usize::from(id_len));
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    let snapshot = Snapshot {
        id: text(id),
        name: text(name),
        seconds: u32_at(16),
        state_bytes: be64(extra, 0).unwrap_or(u64::from(u32_at(32))),
        disk_bytes: be64(extra, 8).unwrap_or(layout.disk_bytes),
        l1_at: be64(&head, 0).unwrap_or(0),
        l1_entries: u32_at(8),
    };
    let l1_bytes = u64::from(snapshot.l1_entries) * 8;
    if l1_bytes > MAX_L1_BYTES {
        return Err(corrupt(format!("its table has {} entries", snapshot.l1_entries)));
    }
    layout.check_table("its table", snapshot.l1_at, l1_bytes)?;
    Ok((snapshot, FIXED_BYTES as u64 + rest.len() as u64))
}
