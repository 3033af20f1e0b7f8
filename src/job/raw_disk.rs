//! Disks of the host as raw-disk images describe them: which parts a guest shall see.

use crate::error::{Error, ErrorKind, Result};
use crate::format::partitions::{PartitionTable, Sectors};
use crate::format::{RawArea, RawAreaKind, RawDisk};
use crate::io::{HostFile, OpenHow, OsFile};
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, HostOffset};
use crate::vd::FileSource;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What of a disk of the host an image shall show.
#[derive(Clone, Debug)]
pub struct RawDiskWish {
    /// The disk: a block device, or a file instead of one.
    pub device: PathBuf,
    /// The partitions a guest may use, by number; true: only to read. `None`: the whole disk.
    pub partitions: Option<Vec<(u32, bool)>>,
    /// Partitions by their own devices, not by their places on the disk's.
    pub relative: bool,
    /// All of it only to read.
    pub read_only: bool,
}

/// Looks at a disk of the host. Returns what an image shall say of it, and its size in bytes. Nothing is written.
///
/// # Errors
/// Of opening and reading it; for partitions that are not there, and tables that contradict themselves.
pub fn look_at_raw_disk(wish: &RawDiskWish) -> Result<(RawDisk, u64)> {
    let file = OsFile::open(&wish.device, OpenHow::default())?;
    let source = FileSource::new(&file)?;
    let at = |e: Error| e.at(&wish.device);
    if source.is_empty() || !source.len().is_multiple_of(SECTOR_BYTES) {
        let what = format!("a disk of {} bytes: no multiple of {SECTOR_BYTES}", source.len());
        return Err(at(Error::new(ErrorKind::InvalidArgument, what)));
    }
    let sectors = source.len() / SECTOR_BYTES;
    let name = name_of(&wish.device)?;
    let areas = match &wish.partitions {
        None if wish.relative => {
            let what = "the whole disk has no partitions to be named by their own devices";
            return Err(at(Error::new(ErrorKind::InvalidArgument, what).hint("--partitions 1,5")));
        }
        None => vec![RawArea {
            sectors,
            kind: RawAreaKind::Device { name, offset: 0, read_only: wish.read_only },
        }],
        Some(chosen) => {
            let table = PartitionTable::read(&source).map_err(at)?;
            let shown = shown(&table, chosen).map_err(at)?;
            areas(wish, &name, sectors, &table, &shown, &source)?
        }
    };
    Ok((RawDisk { is_whole: wish.partitions.is_none(), areas }, source.len()))
}

/// The name that goes into the image: absolute, links left as they are, for those of /dev/disk are what stays.
fn name_of(device: &Path) -> Result<String> {
    let absolute = std::path::absolute(device).map_err(|e| Error::io("find its folder", e).at(device))?;
    let name = absolute.to_str().map(str::to_string);
    name.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "its name is not UTF-8").at(device))
}

/// The chosen partitions by their first sector: number, and whether they are only read.
fn shown(table: &PartitionTable, chosen: &[(u32, bool)]) -> Result<BTreeMap<u64, (u32, bool)>> {
    let refused = |what: String| Error::new(ErrorKind::InvalidArgument, what);
    let mut shown = BTreeMap::new();
    for (number, read_only) in chosen {
        if table.extended.contains(number) {
            let what = format!("partition {number} is an extended one");
            return Err(refused(what).hint("choose among those in it, from 5 on"));
        }
        let Some((_, p)) = table.partitions.iter().find(|(n, _)| n == number) else {
            let there: Vec<_> = table.partitions.iter().map(|(n, _)| n.to_string()).collect();
            let what = format!("it has no partition {number}");
            return Err(refused(what).hint(format!("there are: {}", there.join(", "))));
        };
        if shown.insert(p.start, (*number, *read_only)).is_some() {
            return Err(refused(format!("partition {number} is named twice")));
        }
    }
    Ok(shown)
}

/// The disk from its start to its end: copies of the table, chosen partitions, and what is hidden between them.
fn areas(
    wish: &RawDiskWish,
    name: &str,
    sectors: u64,
    table: &PartitionTable,
    shown: &BTreeMap<u64, (u32, bool)>,
    source: &dyn ByteSource,
) -> Result<Vec<RawArea>> {
    let mut pieces: Vec<(Sectors, Option<u32>)> = table.tables.iter().map(|t| (*t, None)).collect();
    pieces.extend(
        table.partitions.iter().filter(|(_, p)| shown.contains_key(&p.start)).map(|(n, p)| (*p, Some(*n))),
    );
    pieces.sort_unstable();
    let (mut areas, mut end) = (Vec::new(), 0);
    let hide =
        |from: u64, to: u64| (to > from).then(|| RawArea { sectors: to - from, kind: RawAreaKind::Hidden });
    for (place, partition) in pieces {
        areas.extend(hide(end, place.start));
        end = place.end();
        let kind = match partition {
            None => {
                let mut bytes = vec![0; usize::try_from(place.len * SECTOR_BYTES).expect("a table")];
                source.read_at(HostOffset(place.start * SECTOR_BYTES), &mut bytes)?;
                RawAreaKind::Copy(bytes)
            }
            Some(number) => {
                let read_only = wish.read_only || shown[&place.start].1;
                let (name, offset) = match wish.relative {
                    true => (partition_device(name, number, place)?, 0),
                    false => (name.to_string(), place.start),
                };
                RawAreaKind::Device { name, offset, read_only }
            }
        };
        areas.push(RawArea { sectors: place.len, kind });
    }
    areas.extend(hide(end, sectors));
    Ok(areas)
}

/// What Linux calls a partition of a disk. It has to be there, and as long as the table says.
fn partition_device(disk: &str, number: u32, place: Sectors) -> Result<String> {
    let name = if disk.starts_with("/dev/disk/by-") {
        format!("{disk}-part{number}")
    } else if disk.ends_with(|c: char| c.is_ascii_digit()) {
        format!("{disk}p{number}")
    } else {
        format!("{disk}{number}")
    };
    let file = OsFile::open(Path::new(&name), OpenHow::default())?;
    let len = file.len().map_err(|e| Error::io("find out its length", e).at(Path::new(&name)))?;
    if len != place.len * SECTOR_BYTES {
        let what = format!("has {len} bytes, its entry in the table says {}", place.len * SECTOR_BYTES);
        return Err(Error::new(ErrorKind::InvalidArgument, what).at(Path::new(&name)));
    }
    Ok(name)
}
