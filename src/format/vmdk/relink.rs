//! Another parent for a VMDK: keys of its descriptor.
//!
//! Where all that changes is in one sector, that sector is written. Otherwise an embedded descriptor is written behind the grains, and
//! the header, a sector that decides, says that it is there for as long as it takes to write it anew in its place; one in a file
//! of its own gets its sectors one after the other: the parent's UUID, and then what else is said of it.

use super::super::blueprint::refused;
use super::super::steps::StepList;
use super::super::{FileStep, ImageFile, NewParent};
use super::check::{Extent, examine};
use super::create::is_unspeakable;
use super::descriptor::{Descriptor, resized, value_span};
use super::header::{KDMV_BYTES, RawKdmv};
use super::layout::Entry;
use super::open::{Found, find_descriptor, is_diff};
use super::resize::whole_end;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::HostOffset;
use std::collections::BTreeSet;
use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

const SECTOR: usize = SECTOR_BYTES as usize;
/// Where all programs put embedded descriptors, and the room they leave there.
const HOME: (u64, u64) = (1, 20);
const HINT: &str = "parentFileNameHint";
const PARENT: &str = "ddb.uuid.parent";
const MODIFICATION: &str = "ddb.uuid.parentmodification";
const CONTENT: &str = "parentCID";
/// What tells the parent.
const KEYS: [&str; 4] = [HINT, PARENT, MODIFICATION, CONTENT];

/// # Errors
/// As [`super::super::relink`].
pub(super) fn relink(files: &[ImageFile<'_>], parent: Option<&NewParent>) -> Result<Vec<FileStep>> {
    let found = find_descriptor(files[0].source)?;
    if !is_diff(&found.descriptor) {
        return match parent {
            None => Ok(Vec::new()),
            Some(_) => {
                let what = "a VMDK without a parent cannot be given one";
                Err(Error::new(ErrorKind::Unsupported, what))
            }
        };
    }
    let mut list = StepList::new(files[0].id);
    let text = text_of(&found.bytes);
    let new = with_parent(text, &found.descriptor, parent)?;
    if found.embedded {
        rewrite_embedded(&mut list, files, &found, &new, &KEYS)?;
    } else {
        let sectors = in_place(text, &new)
            .ok_or_else(|| refused("its descriptor has no room for the parent's name"))?;
        write_sectors(&mut list, &found, &new, (sectors, &KEYS));
    }
    Ok(list.done())
}

/// Writes sectors of a descriptor that differ. What says so already, in the values of `keys`, is written again: after a sync that
/// failed the disk may say something else.
fn write_sectors(list: &mut StepList, found: &Found, new: &[u8], (differ, keys): (Vec<usize>, &[&str])) {
    let mut sectors: BTreeSet<_> = differ.into_iter().collect();
    sectors.extend(keys.iter().filter_map(|key| value_span(new, key)).map(|s| s.start / SECTOR));
    for n in sectors.into_iter().rev() {
        let part = &new[n * SECTOR..new.len().min((n + 1) * SECTOR)];
        list.write(found.at.0 + (n * SECTOR) as u64, part.to_vec());
        list.sync();
    }
}

/// Writes an embedded descriptor anew, all of it or nothing.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for a damaged image; [`ErrorKind::Unsupported`] for one that cannot be written;
/// [`ErrorKind::InvalidArgument`] where there is no room.
pub(super) fn rewrite_embedded(
    list: &mut StepList,
    files: &[ImageFile<'_>],
    found: &Found,
    new: &[u8],
    keys: &[&str],
) -> Result<()> {
    if let Some(sectors) = in_place(text_of(&found.bytes), new).filter(|s| s.len() <= 1) {
        write_sectors(list, found, new, (sectors, keys));
        return Ok(());
    }
    let mut examined = match examine(files)? {
        Ok(e) => e,
        Err(report) => return report.refuse_damage(),
    };
    examined.report.refuse_damage()?;
    let extent = examined.extents.pop().filter(|e| !e.read_only);
    let extent = extent.ok_or_else(|| Error::new(ErrorKind::Unsupported, "this VMDK is only read"))?;
    away_and_back(list, found, &extent, new)
}

/// The descriptor is written twice: where it belongs is nothing that counts meanwhile.
fn away_and_back(list: &mut StepList, found: &Found, extent: &Extent<'_>, new: &[u8]) -> Result<()> {
    let mut raw = [0; KDMV_BYTES];
    extent.file.source.read_at(HostOffset(0), &mut raw)?;
    let mut raw = RawKdmv::read_from_bytes(&raw).expect("a header's bytes");
    // An interrupted change may have left it behind the grains.
    let home = if found.at < extent.layout.header.overhead {
        (raw.descriptor_at.get(), raw.descriptor_len.get())
    } else {
        HOME
    };
    let room = home.1 * SECTOR_BYTES;
    let free = extent.layout.metadata.iter().all(|(from, to)| {
        // what is there may be the descriptor itself, and the header joined with it
        found.at.0 == home.0 * SECTOR_BYTES || *from >= home.0 + home.1 || *to <= home.0
    });
    if new.len() as u64 >= room || !free {
        return Err(refused("its descriptor has no room for that"));
    }
    let mut padded = new.to_vec();
    padded.resize(usize::try_from(room).expect("a descriptor's bytes"), 0);
    let away = whole_end(extent);
    if away + room > extent.file.source.len() {
        list.set_len(away + room);
    }
    for (at, len) in [(away / SECTOR_BYTES, home.1), home] {
        list.write(at * SECTOR_BYTES, padded.clone());
        list.sync();
        (raw.descriptor_at, raw.descriptor_len) = (at.into(), len.into());
        list.write(0, raw.as_bytes().to_vec());
        list.sync();
    }
    let layout = &extent.layout;
    let metadata = layout.metadata.last().map_or(0, |(_, end)| *end * SECTOR_BYTES);
    let behind = |e: &u32| matches!(layout.entry(*e), Entry::At(at) if at > found.at);
    // What an interrupted change has left behind the grains goes as well, unless something has come to lie behind it.
    let last = metadata <= found.at.0 + room && !extent.entries.iter().any(behind);
    let is_home = found.at.0 == home.0 * SECTOR_BYTES;
    list.set_len(if last && !is_home { found.at.0 } else { away });
    Ok(())
}

/// A descriptor's bytes up to its end.
pub(super) fn text_of(bytes: &[u8]) -> &[u8] {
    bytes.split(|b| *b == 0).next().unwrap_or_default()
}

/// The sectors in which the texts differ, if they are as long, and no value that differs goes across sectors.
fn in_place(old: &[u8], new: &[u8]) -> Option<Vec<usize>> {
    if old.len() != new.len() {
        return None;
    }
    let span = value_span(new, PARENT);
    let differs =
        |n: &usize| old[n * SECTOR..].iter().zip(&new[n * SECTOR..]).take(SECTOR).any(|(a, b)| a != b);
    let sectors: Vec<_> = (0..new.len().div_ceil(SECTOR)).filter(differs).collect();
    let whole = span.is_none_or(|s| s.start / SECTOR == s.end.saturating_sub(1) / SECTOR);
    (whole || sectors.len() <= 1).then_some(sectors)
}

/// The descriptor of the same image over another parent: as long as before where a comment can make up for the name's length.
fn with_parent(text: &[u8], old: &Descriptor, parent: Option<&NewParent>) -> Result<Vec<u8>> {
    let hint = parent.and_then(|p| p.path.as_deref());
    if hint.is_some_and(is_unspeakable) {
        return Err(refused("a descriptor cannot hold the parent's file name"));
    }
    let cid = parent.and_then(|p| p.info.content_id).unwrap_or(u32::MAX);
    // Without a content ID only a UUID says that there is a parent.
    let unnamed = parent.filter(|_| cid == u32::MAX).map(|_| Uuid::new_v4());
    let named = parent.and_then(|p| p.info.uuid).or(unnamed).unwrap_or_default();
    let modification = parent.and_then(|p| p.info.modification_uuid).unwrap_or_default();
    let needs_uuid = !named.is_nil() && cid == u32::MAX && old.get(PARENT).is_none();
    let mut out = text.to_vec();
    for (key, value) in [
        (CONTENT, format!("{cid:08x}")),
        (PARENT, named.to_string()),
        (MODIFICATION, modification.to_string()),
    ] {
        if let Some(span) = value_span(&out, key) {
            out.splice(span, value.into_bytes());
        }
    }
    if needs_uuid {
        out.extend(format!("{PARENT}=\"{named}\"\n").into_bytes());
    }
    Ok(with_hint(&out, hint))
}

/// The text with another name of the parent's file, or without one.
fn with_hint(text: &[u8], hint: Option<&str>) -> Vec<u8> {
    let mut lines: Vec<Vec<u8>> = text.split_inclusive(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
    let is = |line: &[u8], key: &str| value_span(line, key).is_some();
    let end: &[u8] = if text.windows(2).any(|w| w == b"\r\n") { b"\r\n" } else { b"\n" };
    let line = hint.map(|h| [format!("{HINT}=\"{h}\"").as_bytes(), end].concat()).unwrap_or_default();
    let own = lines.iter().position(|l| is(l, HINT));
    let before = own.map_or(0, |n| lines[n].len());
    match own {
        Some(n) => lines[n].clone_from(&line),
        None if !line.is_empty() => {
            let behind = lines.iter().position(|l| is(l, "createType") || is(l, "parentCID"));
            lines.insert(behind.map_or(1.min(lines.len()), |n| n + 1), line.clone());
        }
        None => {}
    }
    // A comment near by takes up the difference, so that what follows keeps its place.
    let comments = (1..lines.len()).filter(|n| lines[*n].starts_with(b"#"));
    let made_up = comments.filter_map(|n| Some((n, resized(&lines[n], before, line.len())?))).next();
    if let Some((n, comment)) = made_up.filter(|_| before != line.len()) {
        lines[n] = comment;
    }
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::ImageInfo;

    const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=7d0ecd1f\nparentCID=12345678\n\
        createType=\"monolithicSparse\"\nparentFileNameHint=\"base.vmdk\"\n\n# Extent description\n\
        RW 100 SPARSE \"a.vmdk\"\n\n# The disk Data Base\n#DDB\n\n\
        ddb.uuid.parent=\"559954d2-d3f7-4dc3-a027-a819ddadee8f\"\n";

    fn over(name: &str, cid: Option<u32>) -> NewParent {
        let info = ImageInfo { content_id: cid, uuid: Some(Uuid::from_u128(7)), ..ImageInfo::default() };
        NewParent { info, path: Some(name.into()) }
    }

    #[test]
    fn the_keys_change_and_the_rest_keeps_its_place() {
        let old = Descriptor::parse(TEXT.as_bytes()).unwrap();
        for (name, same_length) in [("b.vmdk", true), ("longer-than.vmdk", true), (&*"x".repeat(90), false)] {
            let new = with_parent(TEXT.as_bytes(), &old, Some(&over(name, Some(9)))).unwrap();
            let d = Descriptor::parse(&new).unwrap();
            assert_eq!((d.parent_hint(), d.parent_cid()), (Some(name), Some(9)));
            assert_eq!((d.uuid(PARENT), d.cid()), (Some(Uuid::from_u128(7)), Some(0x7d0e_cd1f)));
            assert_eq!(d.extents(), old.extents());
            assert_eq!(new.len() == TEXT.len(), same_length, "{name}");
            assert_eq!(in_place(TEXT.as_bytes(), &new), same_length.then(|| vec![0]));
        }
    }

    /// A failed sync leaves the page cache ahead of the disk.
    #[test]
    fn what_names_the_parent_already_is_written_again() {
        let bytes = |text: &[u8]| {
            let mut b = text.to_vec();
            b.resize(2 * SECTOR, 0);
            b
        };
        let over = over("b.vmdk", Some(9));
        let new =
            with_parent(TEXT.as_bytes(), &Descriptor::parse(TEXT.as_bytes()).unwrap(), Some(&over)).unwrap();
        let source = bytes(&new);
        let files = [ImageFile { id: crate::map::FileId(0), source: &source }];
        let steps = relink(&files, Some(&over)).unwrap();
        let first = bytes(&new)[..new.len().min(SECTOR)].to_vec();
        let is_it =
            |s: &FileStep| matches!(s, FileStep::Write { at, bytes, .. } if at.0 == 0 && *bytes == first);
        assert!(steps.iter().any(is_it), "{steps:?}");
        assert!(matches!(steps.last(), Some(FileStep::Sync { .. })));
    }

    #[test]
    fn without_a_parent_it_is_a_base() {
        let old = Descriptor::parse(TEXT.as_bytes()).unwrap();
        let new = with_parent(TEXT.as_bytes(), &old, None).unwrap();
        let d = Descriptor::parse(&new).unwrap();
        assert!(!is_diff(&d) && d.parent_hint().is_none());
        // and a parent that is no VMDK is told by a UUID, where there was a place for none
        let bare = TEXT.replace("ddb.uuid.parent", "ddb.other");
        let old = Descriptor::parse(bare.as_bytes()).unwrap();
        let raw = NewParent { info: ImageInfo::default(), path: Some("raw".into()) };
        let new = with_parent(bare.as_bytes(), &old, Some(&raw)).unwrap();
        assert!(is_diff(&Descriptor::parse(&new).unwrap()));
    }

    #[test]
    fn a_uuid_across_sectors_does_not_change_in_place() {
        let old = Descriptor::parse(TEXT.as_bytes()).unwrap();
        let padding = SECTOR - 20 - value_span(TEXT.as_bytes(), PARENT).unwrap().start;
        let text = TEXT.replace("#DDB\n", &format!("#DDB{}\n", "x".repeat(padding)));
        let new = with_parent(text.as_bytes(), &old, Some(&over("b.vmdk", Some(9)))).unwrap();
        assert_eq!(in_place(text.as_bytes(), &new), None);
    }
}
