//! New VHDX images.

use super::super::blueprint::refused;
use super::super::{Blueprint, Format, NewImage, NewOption};
use super::bat::{Entry, Layout};
use super::header::{Header, Ids, SIGNATURE};
use super::locator;
use super::metadata::{Metadata, NewItems};
use super::place::{BLOCK_UNIT, MIB, Region};
use super::region::Regions;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_BLOCK_BYTES, MAX_VHDX_LOG_BYTES, TABLE_PIECE_BYTES};
use crate::map::HostOffset;
use crate::probe::small::unit;
use uuid::Uuid;
use zerocopy::IntoBytes;

/// Microsoft's limit.
const MAX_VHDX_BYTES: u64 = 64 << 40;
/// What a diff copies when a block is changed for the first time; Hyper-V's size for them.
const DIFF_BLOCK_BYTES: u64 = 2 << 20;
const BLOCK_SIZE: &str = "block_size";
const LOG_SIZE: &str = "log_size";
const LOGICAL: &str = "logical_sector_size";
const PHYSICAL: &str = "physical_sector_size";

/// The options that are known.
pub(super) const OPTIONS: [NewOption; 4] = [
    NewOption::number(BLOCK_SIZE, None),
    NewOption::number(LOG_SIZE, Some("1048576")),
    NewOption::number(LOGICAL, Some("512")),
    NewOption::number(PHYSICAL, Some("4096")),
];

/// # Errors
/// [`ErrorKind::InvalidArgument`] naming the value that is not possible; [`ErrorKind::Limit`].
pub(super) fn blueprint(new: &NewImage) -> Result<Blueprint> {
    new.only_options(&OPTIONS)?;
    new.without(Format::Vhdx, "comment", new.comment.is_some())?;
    new.without(Format::Vhdx, "geometry", new.geometry.is_some())?;
    if new.uuid.is_some_and(|u| u.is_nil()) {
        return Err(refused("a nil UUID names nothing"));
    }
    let is_fixed = match new.variant.as_deref().map(str::to_ascii_lowercase).as_deref() {
        None | Some("dynamic") => false,
        Some("fixed") if new.parent.is_some() => {
            return Err(refused("a differencing image cannot be fixed"));
        }
        Some("fixed") => true,
        Some(v) => return Err(refused(format!("unknown variant '{v}' of VHDX")).hint("dynamic or fixed")),
    };
    let metadata = metadata(new, is_fixed)?;
    let log = Region { at: MIB, len: log_bytes(new)? };
    let items = Region { at: log.end().next_multiple_of(MIB), len: MIB };
    let table_bytes = Layout::table_bytes(&metadata).next_multiple_of(MIB);
    if u32::try_from(table_bytes).is_err() {
        let what = format!("a block table of {table_bytes} bytes is too long");
        return Err(Error::new(ErrorKind::Limit, what).hint("choose a larger block_size"));
    }
    let table = Region { at: items.end(), len: table_bytes };
    let layout = Layout::new(&metadata, table)?;
    Ok(image(new, &metadata, &layout, [log, items, table]))
}

fn metadata(new: &NewImage, is_fixed: bool) -> Result<Metadata> {
    let sector = |key, usual| match new.option_size(key)?.unwrap_or(usual) {
        n @ (512 | 4096) => Ok(n),
        n => Err(refused(format!("{key} is {n}; 512 and 4096 are possible"))),
    };
    let sector_bytes = sector(LOGICAL, 512)?;
    sector(PHYSICAL, 4096)?;
    if new.size_bytes > MAX_VHDX_BYTES || !new.size_bytes.is_multiple_of(sector_bytes) {
        let what = format!("the size {} is not possible", new.size_bytes);
        let hint = format!("a multiple of {sector_bytes}, {MAX_VHDX_BYTES} at most");
        return Err(refused(what).hint(hint));
    }
    let usual = match (new.parent.is_some(), new.size_bytes >> 30) {
        (true, _) => DIFF_BLOCK_BYTES,
        (false, 0) => 8 * MIB,
        (false, 1..100) => 16 * MIB,
        (false, _) => 32 * MIB,
    };
    let block_bytes = new.option_size(BLOCK_SIZE)?.unwrap_or(usual);
    if !block_bytes.is_power_of_two() || !(BLOCK_UNIT..=MAX_BLOCK_BYTES).contains(&block_bytes) {
        let what = format!("the block size {block_bytes} is no power of two from {MIB} to {MAX_BLOCK_BYTES}");
        return Err(refused(what).hint("2M for many small writes, 32M is what Hyper-V makes"));
    }
    Ok(Metadata {
        disk_bytes: new.size_bytes,
        block_bytes,
        sector_bytes,
        is_fixed,
        is_diff: new.parent.is_some(),
        parent: None,
        parent_names: Vec::new(),
    })
}

fn log_bytes(new: &NewImage) -> Result<u64> {
    let len = new.option_size(LOG_SIZE)?.unwrap_or(MIB);
    if len == 0 || !len.is_multiple_of(16 * unit(MIB >> 4)) || len > MAX_VHDX_LOG_BYTES {
        let what = format!("the log size {len} is no multiple of {MIB} to {MAX_VHDX_LOG_BYTES}");
        return Err(refused(what));
    }
    Ok(len)
}

fn image(new: &NewImage, m: &Metadata, layout: &Layout, [log, items, table]: [Region; 3]) -> Blueprint {
    let ids =
        Ids { file_write: Uuid::new_v4(), data_write: new.uuid.unwrap_or(new.modification), log: [0; 16] };
    let header = Header::new(ids, log);
    let headers = [0, 1]
        .map(|slot| (HostOffset(Header::at(slot)), header.renewed(ids, slot as u64).as_bytes().to_vec()));
    let regions = Regions::copies_of(table, items).map(|(at, bytes)| (HostOffset(at), bytes));
    let physical = new.option_size(PHYSICAL).ok().flatten().unwrap_or(4096);
    let locator = new.parent.as_ref().map(locator::new);
    let text = m.bytes(&NewItems { disk_id: Uuid::new_v4(), physical, locator });
    let metadata = [(HostOffset(items.at), text)];
    let mut name = SIGNATURE.to_vec();
    name.extend("vdblk".encode_utf16().flat_map(u16::to_le_bytes));
    name.resize(4096, 0);
    let pieces = metadata.into_iter().chain(regions).chain(headers).chain([(HostOffset(0), name)]);
    if !m.is_fixed {
        return Blueprint::single(table.end(), None, pieces);
    }
    let blocks = (HostOffset(table.end()), layout.blocks * layout.block_bytes);
    let layout = layout.clone();
    let entries = table_pieces(table, move |index| match layout.block_of(index) {
        Some(block) => Layout::raw_of(Entry::At(table.end() + block * layout.block_bytes)),
        None => 0,
    });
    Blueprint::single(blocks.0.0 + blocks.1, Some(blocks), entries.chain(pieces))
}

fn table_pieces(
    table: Region,
    entry: impl Fn(u64) -> u64 + Send,
) -> impl Iterator<Item = (HostOffset, Vec<u8>)> + Send {
    let step = TABLE_PIECE_BYTES as u64;
    (0..table.len.div_ceil(step)).map(move |n| {
        let (from, to) = (n * step, ((n + 1) * step).min(table.len));
        (HostOffset(table.at + from), (from / 8..to / 8).flat_map(|i| entry(i).to_le_bytes()).collect())
    })
}
