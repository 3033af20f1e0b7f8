//! What new images of both formats have in common.

use super::super::blueprint::{NewImage, NewOption, NewParent, refused};
use super::super::{Blueprint, Format};
use crate::error::Result;
use crate::limits::TABLE_PIECE_BYTES;
use crate::map::HostOffset;

/// Bytes of a parent's name that QEMU reads.
const MAX_NAME_BYTES: usize = 1023;

/// Refuses what neither format can say.
///
/// # Errors
/// The first such thing.
pub(in super::super) fn check(format: Format, new: &NewImage, options: &[NewOption]) -> Result<()> {
    new.without(format, "UUID", new.uuid.is_some())?;
    new.without(format, "comment", new.comment.is_some())?;
    new.without(format, "geometry", new.geometry.is_some())?;
    new.only_options(options)?;
    match new.variant.as_deref() {
        Some(v) if !v.eq_ignore_ascii_case("dynamic") => {
            Err(refused(format!("unknown variant '{v}'")).hint("dynamic"))
        }
        _ => Ok(()),
    }
}

/// An option that is a power of two.
///
/// # Errors
/// For any other value.
pub(in super::super) fn power(
    new: &NewImage,
    key: &str,
    possible: std::ops::RangeInclusive<u64>,
    default: u64,
) -> Result<u64> {
    let value = new.option_size(key)?.unwrap_or(default);
    if value.is_power_of_two() && possible.contains(&value) {
        return Ok(value);
    }
    let (least, most) = (possible.start(), possible.end());
    Err(refused(format!("{value} for option {key}: powers of two from {least} to {most} are possible")))
}

/// What the image calls its parent.
///
/// # Errors
/// If that is not known, or too long.
pub(in super::super) fn backing_name(parent: &NewParent) -> Result<&str> {
    let Some(name) = parent.path.as_deref() else { return Err(refused("the parent's file is not known")) };
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains('\0') {
        let what = format!("the parent's name has {} bytes; 1 to {MAX_NAME_BYTES} are possible", name.len());
        return Err(refused(what));
    }
    Ok(name)
}

/// An image of a header, and zeros up to `len`: tables without entries.
pub(in super::super) fn image(head: Vec<u8>, len: u64) -> Blueprint {
    debug_assert!(head.len() <= TABLE_PIECE_BYTES);
    Blueprint::single(len, None, [(HostOffset(0), head)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::format::{ImageFile, OpenHow, blueprint, check as check_image, open_single};
    use crate::map::{FileId, ImageInfo};
    use uuid::Uuid;

    fn new(size_bytes: u64, options: &[(&str, &str)], parent: Option<&str>) -> NewImage {
        let info = ImageInfo { format: "raw", ..ImageInfo::default() };
        NewImage {
            file_name: "a".into(),
            size_bytes,
            variant: None,
            uuid: None,
            modification: Uuid::nil(),
            parent: parent.map(|p| NewParent { info, path: Some(p.into()) }),
            comment: None,
            geometry: None,
            options: options.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        }
    }

    fn bytes_of(format: Format, new: &NewImage) -> Vec<u8> {
        let file = blueprint(format, new).unwrap().files.pop().unwrap();
        let mut bytes = vec![0; usize::try_from(file.len).unwrap()];
        for (at, piece) in file.pieces {
            let at = usize::try_from(at.0).unwrap();
            bytes[at..at + piece.len()].copy_from_slice(&piece);
        }
        bytes
    }

    #[test]
    fn impossible_values_are_named() {
        let long = "x".repeat(1024);
        let cases = [
            (Format::Qed, "cluster_size", new(512, &[("cluster_size", "2k")], None)),
            (Format::Qed, "cluster_size", new(512, &[("cluster_size", "128M")], None)),
            (Format::Qed, "table_size", new(512, &[("table_size", "3")], None)),
            (Format::Qed, "table_size", new(512, &[("table_size", "1")], None)),
            (Format::Qed, "hold", new(8 << 40, &[("cluster_size", "4k"), ("table_size", "2")], None)),
            (Format::Qed, "unknown option", new(512, &[("table_entries", "64")], None)),
            (Format::Qed, "1024 bytes", new(512, &[], Some(&long))),
            (Format::Qcow, "cluster_size", new(512, &[("cluster_size", "128k")], None)),
            (Format::Qcow, "table_entries", new(512, &[("table_entries", "32")], None)),
            (Format::Qcow, "first-level", new(8 << 40, &[], None)),
            (Format::Qcow, "1024 bytes", new(512, &[], Some(&long))),
        ];
        for (format, word, n) in cases {
            let e = blueprint(format, &n).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidArgument, "{e}");
            assert!(e.to_string().contains(word), "{word}: {e}");
        }
    }

    #[test]
    fn every_shape_opens_clean_and_says_what_it_was_told() {
        let parents = [None, Some("base.raw"), Some(&*"p".repeat(1023))];
        for (format, bits) in [(Format::Qed, 12..=22), (Format::Qcow, 9..=16)] {
            for (bits, parent) in bits.flat_map(|b: u32| parents.map(|p| (b, p))) {
                let cluster = (1u64 << bits).to_string();
                let bytes = bytes_of(format, &new(5 << 20, &[("cluster_size", &cluster)], parent));
                let source = &bytes[..];
                let map = open_single(format, &source, FileId(0), OpenHow::default()).unwrap();
                let info = map.info();
                assert_eq!((info.virtual_size, info.block_size), (5 << 20, Some(1 << bits)));
                assert_eq!(info.parent_names.first().map(String::as_str), parent);
                assert_eq!(info.parent_format.is_some(), format == Format::Qed && parent.is_some());
                assert_eq!(map.limits().data_alignment, 1 << bits, "tables and data share no sector");
                let file = ImageFile { id: FileId(0), source: &source };
                assert!(check_image(format, &[file]).unwrap().unwrap().is_clean());
            }
        }
    }
}
