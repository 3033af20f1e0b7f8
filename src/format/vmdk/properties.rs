//! What a VMDK says of itself: values of its descriptor.
//!
//! One that is embedded is written as for another parent. One in a file of its own grows: a value of another length, or one across
//! sectors, gets a new line behind all others, which does not count before its first sector is written; then the old line,
//! which counts until then, becomes a comment.

use super::super::blueprint::refused;
use super::super::steps::StepList;
use super::super::{Chs, FileStep, ImageFile, Properties, Property};
use super::create::escaped;
use super::descriptor::{line_span, value_span};
use super::open::{Found, find_descriptor, is_diff};
use super::relink::{rewrite_embedded, text_of};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;

pub(super) const KEEPS: &[Property] = &Property::ALL;
const SECTOR: usize = SECTOR_BYTES as usize;
/// Lines of which VirtualBox is not known to refuse any.
const MAX_LINES: usize = 1000;
const PHYSICAL: [&str; 3] = ["ddb.geometry.cylinders", "ddb.geometry.heads", "ddb.geometry.sectors"];
const LOGICAL: [&str; 3] =
    ["ddb.geometry.biosCylinders", "ddb.geometry.biosHeads", "ddb.geometry.biosSectors"];

/// A key, and its value; `None`: the line goes.
type Line = (&'static str, Option<String>);

/// # Errors
/// As [`super::super::set_properties`].
pub(super) fn set(files: &[ImageFile<'_>], new: &Properties) -> Result<Vec<FileStep>> {
    let found = find_descriptor(files[0].source)?;
    new.refuse_parent_unless(is_diff(&found.descriptor))?;
    let lines = lines(new)?;
    let mut list = StepList::new(files[0].id);
    if found.embedded {
        let text = with_lines(text_of(&found.bytes), &lines);
        let keys: Vec<_> = lines.iter().map(|(key, _)| *key).collect();
        rewrite_embedded(&mut list, files, &found, &text, &keys)?;
    } else {
        in_a_file(&mut list, &found, &lines)?;
    }
    Ok(list.done())
}

fn lines(new: &Properties) -> Result<Vec<Line>> {
    let uuids = [
        ("ddb.uuid.image", new.uuid),
        ("ddb.uuid.modification", new.modification_uuid),
        ("ddb.uuid.parent", new.parent_uuid),
        ("ddb.uuid.parentmodification", new.parent_modification_uuid),
    ];
    let mut lines: Vec<Line> =
        uuids.into_iter().filter_map(|(key, uuid)| Some((key, Some(uuid?.to_string())))).collect();
    for (keys, chs) in [(PHYSICAL, new.geometry), (LOGICAL, new.logical_geometry)] {
        if let Some((c, h, s)) = chs {
            let value = |n: u32| ((c, h, s) != Chs::default()).then(|| n.to_string());
            lines.extend(keys.into_iter().zip([c, h, s].map(value)));
        }
    }
    if let Some(comment) = &new.comment {
        let comment = escaped(comment)?;
        lines.push(("ddb.comment", Some(comment).filter(|c| !c.is_empty())));
    }
    Ok(lines)
}

fn end_of_lines(text: &[u8]) -> &'static str {
    if text.windows(2).any(|w| w == b"\r\n") { "\r\n" } else { "\n" }
}

/// The text with these lines, in place of those that were there.
fn with_lines(text: &[u8], lines: &[Line]) -> Vec<u8> {
    let (mut out, end) = (text.to_vec(), end_of_lines(text));
    for (key, value) in lines {
        let line = value.as_ref().map(|v| format!("{key}=\"{v}\"{end}")).unwrap_or_default();
        if let (Some(value), Some(span)) =
            (value, value_span(&out, key).filter(|s| Some(s.len()) == value.as_ref().map(String::len)))
        {
            out[span].copy_from_slice(value.as_bytes());
        } else if let Some(span) = line_span(&out, key) {
            out.splice(span, line.into_bytes());
        } else {
            append(&mut out, &line, end);
        }
    }
    out
}

fn append(text: &mut Vec<u8>, line: &str, end: &str) {
    if !line.is_empty() && !text.ends_with(b"\n") {
        text.extend(end.as_bytes());
    }
    text.extend(line.as_bytes());
}

fn in_a_file(list: &mut StepList, found: &Found, lines: &[Line]) -> Result<()> {
    let mut text = text_of(&found.bytes).to_vec();
    if found.bytes[text.len()..].iter().any(|b| *b != 0) {
        let what = "there is something behind its descriptor, which would become a part of it";
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    let mut file_bytes = found.bytes.len();
    let end = end_of_lines(&text);
    for (key, value) in lines {
        let span = value_span(&text, key);
        if let (Some(value), Some(span)) = (value, span)
            && span.len() == value.len()
            && !span.is_empty()
            && span.start / SECTOR == (span.end - 1) / SECTOR
        {
            let sector = span.start / SECTOR;
            text[span].copy_from_slice(value.as_bytes());
            write_sectors(list, &text, sector..sector + 1);
            continue;
        }
        let old = line_span(&text, key);
        if let Some(value) = value {
            let from = text.len();
            append(&mut text, &format!("{key}=\"{value}\"{end}"), end);
            if text.len() > file_bytes {
                file_bytes = text.len();
                list.set_len(file_bytes as u64);
                list.sync();
            }
            // The first sector last: it ends the text until then.
            write_sectors(list, &text, from / SECTOR..text.len().div_ceil(SECTOR));
        }
        if let Some(line) = old {
            let body = text[line.clone()].trim_ascii_end().len();
            text[line.start..line.start + body].fill(b' ');
            text[line.start] = b'#';
            // The first sector first: it makes all of the line a comment.
            for n in line.start / SECTOR..(line.start + body).div_ceil(SECTOR) {
                write_sectors(list, &text, n..n + 1);
            }
        }
    }
    if text.iter().filter(|b| **b == b'\n').count() > MAX_LINES {
        return Err(refused(format!("its descriptor would have more than {MAX_LINES} lines")));
    }
    Ok(())
}

/// Writes these sectors of a descriptor's file, the last first, each durable before the next.
fn write_sectors(list: &mut StepList, text: &[u8], sectors: std::ops::Range<usize>) {
    for n in sectors.rev() {
        list.write((n * SECTOR) as u64, text[n * SECTOR..text.len().min((n + 1) * SECTOR)].to_vec());
        list.sync();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;
    use crate::format::set_properties;
    use crate::map::{FileId, ImageInfo};
    use proptest::prelude::*;
    use uuid::Uuid;

    const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=7d0ecd1f\nparentCID=ffffffff\n\
        createType=\"twoGbMaxExtentFlat\"\n\n# Extent description\nRW 100 FLAT \"a-f001.vmdk\" 0\n\n\
        # The disk Data Base\n#DDB\n\nddb.geometry.cylinders=\"32\"\nddb.geometry.heads=\"16\"\n\
        ddb.geometry.sectors=\"63\"\nddb.uuid.image=\"559954d2-d3f7-4dc3-a027-a819ddadee8f\"\n";

    fn info_of(text: &[u8]) -> ImageInfo {
        let (text, flat) = (text.to_vec(), vec![0; 100 * SECTOR]);
        let files = [ImageFile { id: FileId(0), source: &text }, ImageFile { id: FileId(1), source: &flat }];
        let how = crate::format::OpenHow { read_only: true, info_only: true };
        crate::format::open(Format::Vmdk, &files, how).unwrap().info()
    }

    /// The file after each step of a change.
    fn states(old: &[u8], new: &Properties) -> Vec<Vec<u8>> {
        let (file, flat) = (old.to_vec(), vec![0; 100 * SECTOR]);
        let files = [ImageFile { id: FileId(0), source: &file }, ImageFile { id: FileId(1), source: &flat }];
        let mut now = file.clone();
        let mut all = vec![now.clone()];
        for step in set_properties(Format::Vmdk, &files, new).unwrap() {
            match step {
                FileStep::Write { at, bytes, .. } => {
                    let at = usize::try_from(at.0).unwrap();
                    assert!(
                        bytes.len() <= SECTOR && at.is_multiple_of(SECTOR) && at + bytes.len() <= now.len()
                    );
                    now[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                FileStep::SetLen { to, .. } => now.resize(usize::try_from(to.0).unwrap(), 0),
                FileStep::Sync { .. } => {}
                other => panic!("{other:?}"),
            }
            all.push(now.clone());
        }
        all
    }

    fn value_of(i: &ImageInfo) -> (Option<Uuid>, Option<Uuid>, Option<String>) {
        (i.uuid, i.modification_uuid, i.comment.clone())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// A descriptor in a file of its own is written sector by sector: each value is the old or the new one all the time.
        #[test]
        fn a_text_of_its_own_is_good_after_each_step(
            pad in 0usize..600,
            comments in proptest::collection::vec(prop_oneof![Just(String::new()), "[a-z\\\\ \"\n]{1,500}"], 1..5),
        ) {
            let mut now = TEXT.replace("#DDB\n", &format!("#DDB{}\n", "x".repeat(pad))).into_bytes();
            for (n, comment) in (1u128..).zip(comments) {
                let new = Properties {
                    uuid: Some(Uuid::from_u128(n)),
                    modification_uuid: Some(Uuid::from_u128(n + 100)),
                    comment: Some(comment.clone()),
                    ..Properties::default()
                };
                let old = value_of(&info_of(&now));
                let wanted = (new.uuid, new.modification_uuid, Some(comment).filter(|c| !c.is_empty()));
                for state in states(&now, &new) {
                    let is = value_of(&info_of(&state));
                    prop_assert!(is.0 == old.0 || is.0 == wanted.0, "{is:?}");
                    prop_assert!(is.1 == old.1 || is.1 == wanted.1, "{is:?}");
                    prop_assert!(is.2 == old.2 || is.2 == wanted.2, "{is:?}");
                    now = state;
                }
                prop_assert_eq!(value_of(&info_of(&now)), wanted);
                prop_assert_eq!(info_of(&now).geometry, Some((32, 16, 63)));
            }
        }
    }

    #[test]
    fn geometries_come_and_go() {
        let wish = |physical, logical| Properties {
            geometry: Some(physical),
            logical_geometry: Some(logical),
            ..Properties::default()
        };
        let set = states(TEXT.as_bytes(), &wish((1024, 8, 9), (5, 255, 63))).pop().unwrap();
        let info = info_of(&set);
        assert_eq!((info.geometry, info.logical_geometry), (Some((1024, 8, 9)), Some((5, 255, 63))));
        let gone = states(&set, &wish((0, 0, 0), (0, 0, 0))).pop().unwrap();
        assert_eq!((info_of(&gone).geometry, info_of(&gone).logical_geometry), (None, None));
    }
}
