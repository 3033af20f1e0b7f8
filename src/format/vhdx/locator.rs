//! Parent locators: a diff's words for where its parent is, keys and values in UTF-16.

use super::super::NewParent;
use super::{corrupt, unsupported};
use crate::error::Result;
use uuid::{Uuid, uuid};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The only kind of locator there is: another VHDX.
const VHDX_LOCATOR: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");
const HEAD_BYTES: usize = 20;
const LINKAGE: &str = "parent_linkage";
const RELATIVE: &str = "relative_path";
const ABSOLUTE: &str = "absolute_win32_path";
const VOLUME: &str = "volume_path";
/// Longer names are none.
const MAX_NAME_BYTES: usize = 16 << 10;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct LocatorEntry {
    key_at: U32,
    value_at: U32,
    key_bytes: U16,
    value_bytes: U16,
}

/// The parent's GUID, and the names it is given, relative ones first.
///
/// # Errors
/// [`crate::ErrorKind::Corrupt`] and [`crate::ErrorKind::Unsupported`].
pub(super) fn read(raw: &[u8]) -> Result<(Option<Uuid>, Vec<String>)> {
    let id = raw.get(..16).and_then(|b| Some(Uuid::from_bytes_le(b.try_into().ok()?)));
    if id != Some(VHDX_LOCATOR) {
        return Err(unsupported("its parent locator is of a kind that is not known"));
    }
    let count = raw.get(18..20).map_or(0, |n| usize::from(u16::from_le_bytes([n[0], n[1]])));
    let mut pairs = Vec::new();
    for entry in raw.get(HEAD_BYTES..).unwrap_or_default().chunks_exact(size_of::<LocatorEntry>()).take(count)
    {
        let e = LocatorEntry::read_from_bytes(entry).expect("the length of an entry");
        let key = text(raw, e.key_at.get(), e.key_bytes.get());
        let value = text(raw, e.value_at.get(), e.value_bytes.get());
        let (Some(key), Some(value)) = (key, value) else {
            return Err(corrupt("the parent locator names text behind its end"));
        };
        pairs.push((key, value));
    }
    let find = |key: &str| pairs.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
    let parent = find(LINKAGE)
        .map(|text| Uuid::parse_str(text.trim()).map_err(|_| corrupt("its parent linkage is no GUID")))
        .transpose()?;
    let keys = [RELATIVE, ABSOLUTE, VOLUME];
    Ok((parent, keys.into_iter().filter_map(find).filter(|n| !n.is_empty()).collect()))
}

fn text(raw: &[u8], at: u32, bytes: u16) -> Option<String> {
    let at = usize::try_from(at).ok()?;
    let units = raw.get(at..at.checked_add(usize::from(bytes))?)?.as_chunks::<2>().0.iter();
    let units: Vec<u16> = units.map(|u| u16::from_le_bytes(*u)).collect();
    Some(String::from_utf16_lossy(&units))
}

/// The locator of a new diff. A parent without a GUID is called by one that is nobody's: a diff must name one all the same.
pub(super) fn new(parent: &NewParent) -> Vec<u8> {
    let linkage = parent.info.uuid.unwrap_or_else(Uuid::new_v4);
    let mut pairs = vec![(LINKAGE, format!("{{{linkage}}}"))];
    match parent.path.as_deref().unwrap_or_default() {
        "" => {}
        p if p.starts_with('/') => pairs.push((ABSOLUTE, p.to_string())),
        // as Windows writes it; readers elsewhere turn the strokes round
        p => pairs.push((RELATIVE, format!(".\\{}", p.trim_start_matches("./").replace('/', "\\")))),
    }
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let pairs: Vec<_> = pairs.iter().map(|(k, v)| (utf16(k), utf16(v))).collect();
    let pairs: Vec<_> = pairs.into_iter().filter(|(_, v)| v.len() <= MAX_NAME_BYTES).collect();
    let number = |n: usize| u16::try_from(n).expect("MAX_NAME_BYTES");
    let mut raw = VHDX_LOCATOR.to_bytes_le().to_vec();
    raw.extend([0, 0]);
    raw.extend(number(pairs.len()).to_le_bytes());
    let mut at = HEAD_BYTES + pairs.len() * size_of::<LocatorEntry>();
    for (key, value) in &pairs {
        let offset = |n: usize| U32::new(u32::try_from(n).expect("a few names"));
        let entry = LocatorEntry {
            key_at: offset(at),
            value_at: offset(at + key.len()),
            key_bytes: number(key.len()).into(),
            value_bytes: number(value.len()).into(),
        };
        raw.extend(entry.as_bytes());
        at += key.len() + value.len();
    }
    raw.extend(pairs.into_iter().flat_map(|(key, value)| [key, value].concat()));
    raw
}
