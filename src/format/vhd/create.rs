//! New VHDs.

use super::super::blueprint::refused;
use super::super::{Blueprint, Format, NewImage, NewOption};
use super::footer::{FOOTER_BYTES, Footer, Kind, NewFooter};
use super::header::{HEADER_BYTES, Header, NewHeader};
use super::layout::FREE;
use super::locator;
use crate::error::Result;
use crate::limits::{MAX_BLOCK_BYTES, MAX_VHD_TABLE_BYTES, MIN_BLOCK_BYTES, SECTOR_BYTES, TABLE_PIECE_BYTES};
use crate::map::HostOffset;
use uuid::Uuid;
use zerocopy::IntoBytes;

/// The block size of all other programs.
const DEFAULT_BLOCK_BYTES: u64 = 2 << 20;
/// Microsoft's limit. Behind it sectors have no 32-bit numbers any more.
const MAX_VHD_BYTES: u64 = 2040 << 30;
const BLOCK_SIZE: &str = "block_size";

/// The options that are known.
pub(super) const OPTIONS: [NewOption; 1] = [NewOption::number(BLOCK_SIZE, Some("2097152"))];

/// # Errors
/// [`crate::ErrorKind::InvalidArgument`] naming the value that is not possible.
pub(super) fn blueprint(new: &NewImage) -> Result<Blueprint> {
    new.only_options(&OPTIONS)?;
    new.without(Format::Vhd, "comment", new.comment.is_some())?;
    checked_size(new.size_bytes, MAX_BLOCK_BYTES)?;
    if let Some((c, h, s)) = new.geometry
        && !((1..=65535).contains(&c) && (1..=255).contains(&h) && (1..=255).contains(&s))
    {
        let hint = "cylinders to 65535, heads and sectors to 255";
        return Err(refused(format!("the geometry {c}/{h}/{s} is not possible")).hint(hint));
    }
    if new.uuid.is_some_and(|u| u.is_nil()) {
        return Err(refused("a nil UUID names nothing"));
    }
    match (new.variant.as_deref().map(str::to_ascii_lowercase).as_deref(), &new.parent) {
        (None | Some("dynamic"), _) => growing(new),
        (Some("fixed"), None) => fixed(new),
        (Some("fixed"), Some(_)) => Err(refused("a differencing image cannot be fixed")),
        (Some(v), _) => Err(refused(format!("unknown variant '{v}' of VHD")).hint("dynamic or fixed")),
    }
}

fn footer(new: &NewImage, kind: Kind) -> Vec<u8> {
    let header_at = (kind != Kind::Fixed).then_some(HostOffset(FOOTER_BYTES));
    let id = new.uuid.unwrap_or_else(Uuid::new_v4);
    let (size_bytes, geometry) = (new.size_bytes, new.geometry);
    Footer::new(NewFooter { kind, size_bytes, geometry, id, header_at }).as_bytes().to_vec()
}

fn fixed(new: &NewImage) -> Result<Blueprint> {
    if new.option(BLOCK_SIZE).is_some() {
        return Err(refused("a fixed VHD has no blocks"));
    }
    let end = (HostOffset(new.size_bytes), footer(new, Kind::Fixed));
    let whole = Some((HostOffset(0), new.size_bytes));
    Ok(Blueprint::single(new.size_bytes + FOOTER_BYTES, whole, [end]))
}

/// Footer copy, header, locators, table, footer. What follows the table is where other programs put the first block.
fn growing(new: &NewImage) -> Result<Blueprint> {
    let block_bytes = new.option_size(BLOCK_SIZE)?.unwrap_or(DEFAULT_BLOCK_BYTES);
    let entries = checked_entries(new.size_bytes, block_bytes)?;
    let header_end = FOOTER_BYTES + HEADER_BYTES;
    let (locators, texts) =
        new.parent.as_ref().map_or_else(Default::default, |p| locator::new(p, header_end));
    let table_at = texts.last().map_or(header_end, |(at, text)| at.0 + text.len() as u64);
    let end = table_at + (u64::from(entries) * 4).next_multiple_of(SECTOR_BYTES);
    let name = new.parent.as_ref().and_then(|p| p.path.as_deref()).unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default();
    // A raw file has no UUID to name; a diff must name one all the same.
    let parent = new.parent.as_ref().map(|p| (p.info.uuid.unwrap_or_else(Uuid::new_v4), name));
    let header = Header::new(&NewHeader {
        table_at,
        entries,
        block_bytes: u32::try_from(block_bytes).expect("checked"),
        parent,
        locators,
    });
    let footer = footer(new, if parent.is_some() { Kind::Diff } else { Kind::Dynamic });
    let head = (HostOffset(FOOTER_BYTES), header.as_bytes().to_vec());
    let ends = [(HostOffset(end), footer.clone()), (HostOffset(0), footer)];
    let pieces = table_pieces(table_at, end).chain(texts).chain([head]).chain(ends);
    Ok(Blueprint::single(end + FOOTER_BYTES, None, pieces))
}

fn table_pieces(from: u64, to: u64) -> impl Iterator<Item = (HostOffset, Vec<u8>)> + Send {
    let step = TABLE_PIECE_BYTES as u64;
    (0..(to - from).div_ceil(step)).map(move |n| {
        let at = from + n * step;
        let entries = usize::try_from((to - at).min(step) / 4).expect("a piece");
        (HostOffset(at), FREE.to_be_bytes().repeat(entries))
    })
}

/// Entries that a disk of this size needs.
///
/// # Errors
/// [`crate::ErrorKind::InvalidArgument`] for a size that no VHD has.
pub(super) fn checked_size(size: u64, block: u64) -> Result<u32> {
    if size > MAX_VHD_BYTES {
        let what = format!("the size {size} is above {MAX_VHD_BYTES} bytes, the most a VHD can have");
        return Err(refused(what));
    }
    checked_entries(size, block)
}

fn checked_entries(size: u64, block: u64) -> Result<u32> {
    if !block.is_power_of_two() || !(MIN_BLOCK_BYTES..=MAX_BLOCK_BYTES).contains(&block) {
        let what =
            format!("the block size {block} is no power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}");
        return Err(refused(what).hint("2M is what everybody else makes, 512K is common too"));
    }
    let entries = size.div_ceil(block);
    if entries * 4 > MAX_VHD_TABLE_BYTES {
        let what = format!("{entries} blocks of {block} bytes are too many for one table");
        return Err(refused(what).hint("choose a larger block size"));
    }
    Ok(u32::try_from(entries).expect("bounded by the table's bytes"))
}
