//! Parent locators: where a diff's parent is, in the words of a system.

use super::super::NewParent;
use crate::error::Result;
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, HostOffset};
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A path of Windows, from the image's folder on, UTF-16 little endian.
const RELATIVE: [u8; 4] = *b"W2ru";
/// The same from the root on.
const ABSOLUTE: [u8; 4] = *b"W2ku";
/// Longer names are none.
const MAX_NAME_BYTES: u32 = 8192;

#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Locator {
    code: [u8; 4],
    /// By the specification sectors, by Microsoft's own programs and VirtualBox bytes.
    space: U32,
    bytes: U32,
    reserved: U32,
    at: U64,
}

impl Locator {
    /// Where its text is in the file, whole sectors; `None` where it has none, or could have none there.
    pub(super) fn extent(&self, file_bytes: u64) -> Option<(u64, u64)> {
        let (at, bytes) = (self.at.get(), self.bytes.get());
        if self.code == [0; 4] || bytes == 0 || bytes > MAX_NAME_BYTES {
            return None;
        }
        let end = at.checked_add(u64::from(bytes).next_multiple_of(SECTOR_BYTES))?;
        (end <= file_bytes).then_some((at, end))
    }
}

/// The names that the locators give the parent, relative ones first. What cannot be read is no name.
///
/// # Errors
/// Those of reading.
pub(super) fn names(locators: &[Locator], source: &dyn ByteSource) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for code in [RELATIVE, ABSOLUTE] {
        for l in locators.iter().filter(|l| l.code == code) {
            let Some((at, _)) = l.extent(source.len()) else { continue };
            let mut raw = vec![0; usize::try_from(l.bytes.get()).expect("MAX_NAME_BYTES")];
            source.read_at(HostOffset(at), &mut raw)?;
            let units = raw.as_chunks::<2>().0.iter().map(|u| u16::from_le_bytes(*u));
            let units: Vec<u16> = units.take_while(|u| *u != 0).collect();
            names.push(String::from_utf16_lossy(&units));
        }
    }
    names.retain(|n| !n.is_empty());
    Ok(names)
}

/// The locators of a new diff, whose texts lie one after the other from `at` on, and the texts.
pub(super) fn new(parent: &NewParent, at: u64) -> (Vec<Locator>, Vec<(HostOffset, Vec<u8>)>) {
    let (mut locators, mut texts) = (Vec::new(), Vec::new());
    let path = parent.path.as_deref().unwrap_or_default();
    let words = match path {
        "" => None,
        p if p.starts_with('/') => Some((ABSOLUTE, p.to_string())),
        // as Windows writes it; readers elsewhere turn the strokes round
        p => Some((RELATIVE, format!(".\\{}", p.trim_start_matches("./").replace('/', "\\")))),
    };
    if let Some((code, text)) = words {
        let mut raw: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let fits = u32::try_from(raw.len()).ok().filter(|n| *n <= MAX_NAME_BYTES);
        let Some(bytes) = fits else { return (locators, texts) };
        raw.resize(raw.len().next_multiple_of(512), 0);
        let space = u32::try_from(raw.len()).expect("MAX_NAME_BYTES");
        let mut l = Locator::new_zeroed();
        (l.code, l.space, l.bytes, l.at) = (code, space.into(), bytes.into(), at.into());
        locators.push(l);
        texts.push((HostOffset(at), raw));
    }
    (locators, texts)
}
