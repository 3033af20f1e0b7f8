//! The descriptor of a VMDK: a text of keys, extents and the disk database.
//!
//! What is not understood survives: a change edits lines in place.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use std::ops::Range;
use uuid::Uuid;

/// Largest descriptor in a file of its own.
pub(super) const MAX_BYTES: usize = 10 << 20;
/// Most lines; VirtualBox takes 1,100.
const MAX_LINES: usize = 20_000;
/// Most extents of one disk.
const MAX_EXTENTS: usize = 4000;
/// What the first line says, but for case and blanks.
const TITLE: &str = "#diskdescriptorfile";
/// CID of an image that has no parent.
const NO_CID: &str = "ffffffff";

/// What may be done with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    ReadWrite,
    ReadOnly,
    None,
}

/// How an extent's bytes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// A file with a KDMV or COWD header.
    Sparse,
    /// Bytes as they are.
    Flat,
    /// Nothing but zeros.
    Zero,
    /// ESX's newest sparse kind.
    SeSparse,
}

/// A line of the extent section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) access: Access,
    /// Sectors of the disk.
    pub(super) sectors: u64,
    pub(super) keep: Keep,
    /// Relative to the descriptor's folder; `None` for zeros.
    pub(super) file: Option<String>,
    /// Where a flat extent begins in its file, in sectors.
    pub(super) offset: u64,
}

/// A parsed descriptor.
#[derive(Clone, Debug)]
pub(super) struct Descriptor {
    lines: Vec<String>,
    extents: Vec<ExtentLine>,
}

/// True if the text is a descriptor's beginning.
pub(in super::super) fn is_descriptor(head: &[u8]) -> bool {
    let line = head.split(|b| *b == b'\n').next().unwrap_or_default();
    let squeezed: Vec<u8> =
        line.iter().filter(|b| !b.is_ascii_whitespace()).map(u8::to_ascii_lowercase).collect();
    squeezed == TITLE.as_bytes()
}

impl Descriptor {
    /// Parses a descriptor; it ends at the first zero byte.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] without its title, [`ErrorKind::Corrupt`] for a line that cannot be understood where it
    /// has to be, [`ErrorKind::Limit`].
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let bytes = bytes.split(|b| *b == 0).next().unwrap_or_default();
        if !is_descriptor(bytes) {
            return Err(Error::new(ErrorKind::NotThisFormat, "the text is not a VMDK descriptor"));
        }
        if bytes.len() > MAX_BYTES {
            return Err(Error::new(ErrorKind::Limit, format!("a descriptor of {} bytes", bytes.len())));
        }
        // Comments may be in whatever the writer's machine spoke; keys and values that matter are ASCII or UTF-8.
        let text = String::from_utf8_lossy(bytes);
        let lines: Vec<String> = text.lines().map(|l| l.trim_end_matches('\r').to_string()).collect();
        if lines.len() > MAX_LINES {
            return Err(Error::new(ErrorKind::Limit, format!("a descriptor of {} lines", lines.len())));
        }
        let mut extents = Vec::new();
        for line in &lines {
            if let Some(extent) = ExtentLine::parse(line)? {
                extents.push(extent);
            }
        }
        if extents.is_empty() || extents.len() > MAX_EXTENTS {
            let what = format!("the descriptor lists {} extents", extents.len());
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        Ok(Descriptor { lines, extents })
    }

    /// The extents, in the order of the disk.
    pub(super) fn extents(&self) -> &[ExtentLine] {
        &self.extents
    }

    /// The value of a key, without quotes. Keys are compared without regard to case.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.lines.iter().find_map(|l| value_in(l, key))
    }

    /// A UUID of the disk database; null counts as absent.
    pub(super) fn uuid(&self, key: &str) -> Option<Uuid> {
        let text = self.get(key)?;
        // VMware's own ddb.uuid is sixteen pairs of digits with blanks between them
        Uuid::parse_str(text.trim()).ok().filter(|u| !u.is_nil())
    }

    /// The image's content id.
    pub(super) fn cid(&self) -> Option<u32> {
        u32::from_str_radix(self.get("CID")?.trim(), 16).ok()
    }

    /// The content id that the parent had when this image was made; `None` for a base, and for VirtualBox's differencing
    /// images, which never say it.
    pub(super) fn parent_cid(&self) -> Option<u32> {
        let text = self.get("parentCID")?.trim();
        if text.eq_ignore_ascii_case(NO_CID) {
            return None;
        }
        u32::from_str_radix(text, 16).ok()
    }

    /// Where the parent was when this image was made.
    pub(super) fn parent_hint(&self) -> Option<&str> {
        self.get("parentFileNameHint").filter(|h| !h.is_empty())
    }

    /// The comment, with VirtualBox's escapes undone.
    pub(super) fn comment(&self) -> Option<String> {
        let raw = self.get("ddb.comment")?;
        let mut out = String::new();
        let mut chars = raw.chars();
        while let Some(c) = chars.next() {
            match (c, c == '\\') {
                (_, true) => match chars.next() {
                    Some('n') => out.push('\n'),
                    Some('r') => out.push('\r'),
                    Some(other) => out.push(other),
                    None => {}
                },
                (c, false) => out.push(c),
            }
        }
        Some(out).filter(|c| !c.is_empty())
    }

    /// Cylinders, heads and sectors of a kind of geometry (`""` or `"bios"`).
    pub(super) fn geometry(&self, kind: &str) -> Option<(u32, u32, u32)> {
        let one = |name: &str| {
            let key = match kind {
                "" => format!("ddb.geometry.{name}"),
                kind => format!("ddb.geometry.{kind}{}{}", name[..1].to_ascii_uppercase(), &name[1..]),
            };
            self.get(&key)?.trim().parse::<u32>().ok()
        };
        Some((one("cylinders")?, one("heads")?, one("sectors")?)).filter(|g| g.0 > 0 && g.1 > 0 && g.2 > 0)
    }
}

/// The bytes of a descriptor of one extent, with another number of sectors in that extent's line. As many bytes as before, and none
/// changed outside of one sector, so that all of it is written or nothing: a longer number takes its bytes from a comment
/// line near by. The sector's number in the descriptor. `None` where that is not possible.
pub(super) fn with_sectors(bytes: &[u8], sectors: u64) -> Option<(usize, Vec<u8>)> {
    let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
    let lines: Vec<&[u8]> = text.split_inclusive(|b| *b == b'\n').collect();
    let is_extent =
        |l: &[u8]| std::str::from_utf8(l).ok().is_some_and(|l| matches!(ExtentLine::parse(l), Ok(Some(_))));
    let own = lines.iter().position(|l| is_extent(l))?;
    let line = std::str::from_utf8(lines[own]).ok()?;
    let access = line.split_whitespace().next()?;
    let number = line.find(access)? + access.len();
    let number = number + line[number..].find(|c: char| c.is_ascii_digit())?;
    let end = number + line[number..].find(|c: char| !c.is_ascii_digit())?;
    let new_line = format!("{}{sectors}{}", &line[..number], &line[end..]);
    let longer = new_line.len().checked_sub(line.len());
    let candidates = (0..lines.len()).filter(|n| *n != 0 && lines[*n].starts_with(b"#"));
    // A number as long as before needs nothing from anywhere.
    let candidates = candidates.map(Some).chain((longer == Some(0)).then_some(None));
    candidates
        .filter_map(|comment| {
            let mut out = Vec::with_capacity(bytes.len());
            for (n, l) in lines.iter().enumerate() {
                match comment {
                    _ if n == own => out.extend_from_slice(new_line.as_bytes()),
                    Some(c) if c == n => out.extend(resized(l, line.len(), new_line.len())?),
                    _ => out.extend_from_slice(l),
                }
            }
            out.extend_from_slice(&bytes[text.len()..]);
            let first = bytes.iter().zip(&out).position(|(a, b)| a != b)? / SECTOR_BYTES as usize;
            let last = bytes.iter().zip(&out).rposition(|(a, b)| a != b)? / SECTOR_BYTES as usize;
            (out.len() == bytes.len() && first == last).then_some((first, out))
        })
        .next()
}

/// A comment line that makes up for a line that was `from` bytes long and has `to`.
pub(super) fn resized(comment: &[u8], from: usize, to: usize) -> Option<Vec<u8>> {
    let body = comment.iter().rposition(|b| !b.is_ascii_whitespace())? + 1;
    let keep = (body + from).checked_sub(to).filter(|keep| *keep > 0)?;
    let mut out = comment[..keep.min(body)].to_vec();
    out.resize(keep, b' ');
    out.extend_from_slice(&comment[body..]);
    Some(out)
}

/// Where the value of a key stands in a descriptor's bytes, without quotes.
pub(super) fn value_span(bytes: &[u8], key: &str) -> Option<Range<usize>> {
    let (line, sign) = line_of(bytes, key)?;
    let value = &bytes[sign + 1..line.end];
    let blanks = value.len() - value.trim_ascii_start().len();
    let trimmed = value.trim_ascii();
    let quoted = trimmed.len() >= 2 && trimmed.starts_with(b"\"") && trimmed.ends_with(b"\"");
    let from = sign + 1 + blanks + usize::from(quoted);
    Some(from..from + trimmed.len() - 2 * usize::from(quoted))
}

/// Where the line of a key stands in a descriptor's bytes, with its end.
pub(super) fn line_span(bytes: &[u8], key: &str) -> Option<Range<usize>> {
    let (line, _) = line_of(bytes, key)?;
    let has_end = bytes.get(line.end) == Some(&b'\n');
    Some(line.start..line.end + usize::from(has_end))
}

/// The first line of a key, without its end, and where its sign of equality is.
fn line_of(bytes: &[u8], key: &str) -> Option<(Range<usize>, usize)> {
    let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
    let mut at = 0;
    text.split(|b| *b == b'\n').find_map(|line| {
        let start = at;
        at += line.len() + 1;
        let sign = line.iter().position(|b| *b == b'=')?;
        let is_it = line[..sign].trim_ascii().eq_ignore_ascii_case(key.as_bytes());
        is_it.then_some((start..start + line.len(), start + sign))
    })
}

/// The value in `line` if it is one of `key`.
fn value_in<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (name, value) = line.split_once('=')?;
    if name.trim_start().starts_with('#') || !name.trim().eq_ignore_ascii_case(key) {
        return None;
    }
    let value = value.trim();
    Some(value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value))
}

impl ExtentLine {
    /// The extent a line describes; `None` if it describes none.
    fn parse(line: &str) -> Result<Option<Self>> {
        let line = line.trim();
        let (word, rest) = split_word(line);
        let access = match word {
            "RW" => Access::ReadWrite,
            "RDONLY" => Access::ReadOnly,
            "NOACCESS" => Access::None,
            _ => return Ok(None),
        };
        let wrong = |what: &str| {
            Err(Error::new(ErrorKind::Corrupt, format!("{what} in the extent line: {}", line.escape_debug())))
        };
        let (sectors, rest) = split_word(rest);
        let Some(sectors) = sectors.parse::<u64>().ok().filter(|n| *n > 0 && *n <= 1 << 54) else {
            return wrong("no size");
        };
        let (kind, rest) = split_word(rest);
        let keep = match kind {
            "SPARSE" | "VMFSSPARSE" => Keep::Sparse,
            "FLAT" | "VMFS" => Keep::Flat,
            "ZERO" => Keep::Zero,
            "SESPARSE" => Keep::SeSparse,
            "VMFSRDM" | "VMFSRAW" => {
                let what = format!("{kind} extents (a disk of the machine it was made on) are not supported");
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            _ => return wrong("an unknown type"),
        };
        if keep == Keep::Zero {
            return Ok(Some(ExtentLine { access, sectors, keep, file: None, offset: 0 }));
        }
        let Some((file, rest)) = rest.strip_prefix('"').and_then(|r| r.split_once('"')) else {
            return wrong("no file name");
        };
        if file.is_empty() {
            return wrong("an empty file name");
        }
        let (offset, _) = split_word(rest.trim_start());
        let offset = if offset.is_empty() { Some(0) } else { offset.parse().ok().filter(|n| *n <= 1 << 54) };
        let Some(offset) = offset else { return wrong("no offset") };
        Ok(Some(ExtentLine { access, sectors, keep, file: Some(file.to_string()), offset }))
    }
}

/// The first word and what follows it.
fn split_word(text: &str) -> (&str, &str) {
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    (word, rest.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FLAT: &str = "# Disk DescriptorFile\nversion=1\nCID=7d0ecd1f\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n\n\
        # Extent description\nRW 4192256 FLAT \"a b-f001.vmdk\" 0\nRW 217088 FLAT \"a b-f002.vmdk\" 128\nRDONLY 100 ZERO\n\n\
        # The disk Data Base \n#DDB\n\nddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders=\"32\"\nddb.geometry.heads=\"16\"\n\
        ddb.geometry.sectors=\"63\"\nddb.uuid.image=\"559954d2-d3f7-4dc3-a027-a819ddadee8f\"\n\
        ddb.uuid.parent=\"00000000-0000-0000-0000-000000000000\"\nddb.comment=\"two\\nlines \\\\ and \\\"quotes\\\"\"\n";

    #[test]
    fn keys_extents_and_database_are_read() {
        let d = Descriptor::parse(FLAT.as_bytes()).unwrap();
        assert_eq!(
            (d.cid(), d.parent_cid(), d.get("createtype")),
            (Some(0x7d0e_cd1f), None, Some("twoGbMaxExtentFlat"))
        );
        let [a, b, zero] = d.extents() else { panic!("{:?}", d.extents()) };
        assert_eq!(
            (a.sectors, a.keep, a.file.as_deref(), a.offset),
            (4_192_256, Keep::Flat, Some("a b-f001.vmdk"), 0)
        );
        assert_eq!((b.offset, b.access), (128, Access::ReadWrite));
        assert_eq!((zero.keep, zero.access, zero.file.as_deref()), (Keep::Zero, Access::ReadOnly, None));
        assert_eq!(d.geometry(""), Some((32, 16, 63)));
        assert_eq!(d.geometry("bios"), None);
        assert_eq!(d.uuid("ddb.uuid.image").unwrap().to_string(), "559954d2-d3f7-4dc3-a027-a819ddadee8f");
        assert_eq!(d.uuid("ddb.uuid.parent"), None);
        assert_eq!(d.comment().unwrap(), "two\nlines \\ and \"quotes\"");
    }

    #[test]
    fn values_are_found_where_they_stand() {
        for text in [FLAT.to_string(), FLAT.replace('\n', "\r\n")] {
            let d = Descriptor::parse(text.as_bytes()).unwrap();
            for key in ["cid", "parentCID", "createType", "ddb.virtualHWVersion", "ddb.uuid.image"] {
                let span = value_span(text.as_bytes(), key).unwrap();
                assert_eq!(&text[span], d.get(key).unwrap(), "{key}");
            }
            assert_eq!(value_span(text.as_bytes(), "ddb.uuid.modification"), None);
            assert_eq!(value_span(b"a=1\0CID=2", "CID"), None, "behind the end");
            assert_eq!(value_span(b"CID=\"", "CID"), Some(4..5));
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_where_it_matters() {
        let with = |line: &str| Descriptor::parse(format!("# Disk DescriptorFile\n{line}\n").as_bytes());
        for line in [
            "",
            "RW x FLAT \"a\" 0",
            "RW 0 FLAT \"a\" 0",
            "RW 9 FLAT",
            "RW 9 FLAT \"\" 0",
            "RW 9 WHAT \"a\"",
            "RW 9 FLAT \"a\" x",
        ] {
            assert_eq!(with(line).unwrap_err().kind(), ErrorKind::Corrupt, "{line}");
        }
        assert_eq!(with("RW 9 VMFSRDM \"a\"").unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(Descriptor::parse(b"KDMV").unwrap_err().kind(), ErrorKind::NotThisFormat);
        assert!(
            is_descriptor(b"# Disk Descriptor File\r\nversion=1") && is_descriptor(b"#disk descriptorfile\n")
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(tail in ".{0,400}") {
            let _ = Descriptor::parse(format!("# Disk DescriptorFile\n{tail}").as_bytes());
        }

        #[test]
        fn a_value_is_read_where_it_is_found(tail in "[a-z=\" \r\n]{0,60}") {
            let text = format!("# Disk DescriptorFile\nRW 1 ZERO\n{tail}");
            let d = Descriptor::parse(text.as_bytes()).unwrap();
            for key in ["a", "ab", ""] {
                let found = value_span(text.as_bytes(), key).map(|r| &text[r]);
                prop_assert_eq!(found, d.get(key), "{}", text);
            }
        }
    }
}
