//! An image of a container, and the rules for its place in the chain.

use super::backends::BackendInfo;
use super::flags::{BackendCaps, ImageFlags, OpenFlags};
use crate::error::{Error, ErrorKind, Result, Status};
use crate::format::Format;
use crate::job::{Inspected, inspect_image_with};
use crate::map::{DeviceType, ImageInfo};
use crate::vd::ImageSpec;
use std::path::{Path, PathBuf};

/// An image that is open in a container.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) path: PathBuf,
    pub(super) format: Format,
    /// As they are in effect.
    pub(super) flags: OpenFlags,
    pub(super) kind: ImageFlags,
}

impl Image {
    /// Looks at a file that shall become an image of a container of this device type, with these flags, over others or not.
    ///
    /// # Errors
    /// For flags that are not possible together or not with this back-end; for an image of another device or in a wrong place;
    /// of looking at it.
    pub(super) fn look(
        path: &Path,
        format: Format,
        flags: OpenFlags,
        device: DeviceType,
        (is_first, allow_raw_device): (bool, bool),
    ) -> Result<Image> {
        check_flags(flags).map_err(|e| e.at(path))?;
        let inspected = inspect(path, format, allow_raw_device).map_err(|e| with_code(e, format))?;
        let kind = kind_of(&inspected.info);
        check_back_end(format, kind, flags).map_err(|e| e.at(path))?;
        if !flags.contains(OpenFlags::INFO) {
            check_device(&inspected, device)?;
            check_place(kind, is_first).map_err(|e| e.at(path))?;
        }
        Ok(Image { path: path.to_path_buf(), format, flags: in_effect(flags, kind), kind })
    }

    /// The same image with other flags. One that was only to be asked about is looked at as if it were opened now.
    ///
    /// # Errors
    /// As [`Self::look`].
    pub(super) fn reopened(
        &self,
        flags: OpenFlags,
        device: DeviceType,
        place: (bool, bool),
    ) -> Result<Image> {
        if self.has(OpenFlags::INFO) && !flags.contains(OpenFlags::INFO) {
            return Self::look(&self.path, self.format, flags, device, place);
        }
        check_flags(flags)
            .and_then(|()| check_back_end(self.format, self.kind, flags))
            .map_err(|e| e.at(&self.path))?;
        Ok(Image { flags: in_effect(flags, self.kind), ..self.clone() })
    }

    pub(super) fn spec(&self) -> ImageSpec {
        ImageSpec { path: self.path.clone(), format: Some(self.format) }
    }

    pub(super) fn has(&self, flag: OpenFlags) -> bool {
        self.flags.contains(flag)
    }
}

/// Nothing is ever left out of fixed images.
fn in_effect(flags: OpenFlags, kind: ImageFlags) -> OpenFlags {
    if is_fixed(kind) { flags.with(OpenFlags::HONOR_SAME) } else { flags }
}

/// VirtualBox has codes of their own for headers of most formats.
fn with_code(e: Error, format: Format) -> Error {
    let code = match (format, e.kind()) {
        (Format::Vdi, ErrorKind::NotThisFormat) => Status::VdiInvalidSignature,
        (Format::Vdi, ErrorKind::Corrupt) => Status::VdiInvalidHeader,
        (Format::Vdi, ErrorKind::Unsupported) => Status::VdiUnsupportedVersion,
        (Format::Vmdk, ErrorKind::NotThisFormat | ErrorKind::Corrupt) => Status::VmdkInvalidHeader,
        (Format::Vmdk, ErrorKind::Unsupported) => Status::VmdkUnsupportedVersion,
        (Format::Vhd, ErrorKind::NotThisFormat | ErrorKind::Corrupt) => Status::VhdInvalidHeader,
        (Format::Parallels, ErrorKind::NotThisFormat | ErrorKind::Corrupt) => Status::ParallelsInvalidHeader,
        (Format::Dmg, ErrorKind::NotThisFormat | ErrorKind::Corrupt) => Status::DmgInvalidHeader,
        (_, ErrorKind::NotThisFormat | ErrorKind::Corrupt) => Status::GenInvalidHeader,
        _ => return e,
    };
    e.with_status(code)
}

/// What the file says of itself.
pub(super) fn inspect(path: &Path, format: Format, allow_raw_device: bool) -> Result<Inspected> {
    inspect_image_with(&ImageSpec { path: path.to_path_buf(), format: Some(format) }, allow_raw_device)
}

/// Flags that are not possible together.
pub(super) fn check_flags(flags: OpenFlags) -> Result<()> {
    if flags.contains(OpenFlags::SKIP_CONSISTENCY_CHECKS) && !flags.contains(OpenFlags::READONLY) {
        let what = "consistency checks can only be left out of an image that is opened read-only";
        return Err(Error::new(ErrorKind::InvalidArgument, what));
    }
    Ok(())
}

/// Flags that the back-end has to be able to keep, for images of this kind.
pub(super) fn check_back_end(format: Format, kind: ImageFlags, flags: OpenFlags) -> Result<()> {
    let caps = BackendInfo::of(format).caps;
    if flags.contains(OpenFlags::DISCARD) && !caps.contains(BackendCaps::DISCARD) {
        return Err(Error::of(
            Status::DiscardNotSupported,
            format!("{} images take no discards", format.title()),
        ));
    }
    // As in VirtualBox: whoever asks for ASYNC_IO is told that he has to do without.
    let is_stream = kind.contains(ImageFlags::VMDK_STREAM_OPTIMIZED);
    if flags.contains(OpenFlags::ASYNC_IO) && (is_stream || !caps.contains(BackendCaps::ASYNC)) {
        let which = if is_stream { "stream-optimized VMDK" } else { format.title() };
        let what = format!("{which} images take no asynchronous requests");
        return Err(Error::new(ErrorKind::Unsupported, what).hint("open it without ASYNC_IO"));
    }
    Ok(())
}

fn check_device(inspected: &Inspected, device: DeviceType) -> Result<()> {
    let own = inspected.info.device;
    if own == device {
        return Ok(());
    }
    let raw = inspected.format == Format::Raw;
    let status = if raw { Status::RawInvalidType } else { Status::InvalidType };
    let what = format!("is an image of a {}, and the container is of a {}", own.name(), device.name());
    Err(Error::of(status, what).at(&inspected.path))
}

fn check_place(kind: ImageFlags, is_first: bool) -> Result<()> {
    if is_first && kind.contains(ImageFlags::DIFF) {
        let what = "is a differencing image, and the first image of a container has to be a base";
        return Err(Error::of(Status::InvalidType, what).hint("open its parents first, the base before all"));
    }
    if !is_first && is_fixed(kind) {
        let what = "is fixed: it has all of its blocks, and cannot lie over another image";
        return Err(Error::of(Status::InvalidType, what));
    }
    Ok(())
}

pub(super) fn is_fixed(kind: ImageFlags) -> bool {
    kind.contains(ImageFlags::FIXED)
}

/// The flags of an image, by what it says of itself.
pub(super) fn kind_of(info: &ImageInfo) -> ImageFlags {
    let mut kind = match info.variant {
        "fixed" | "flat" => ImageFlags::FIXED,
        "split2g" => ImageFlags::VMDK_SPLIT_2G,
        "split2g-flat" => ImageFlags::VMDK_SPLIT_2G | ImageFlags::FIXED,
        "stream" => ImageFlags::VMDK_STREAM_OPTIMIZED,
        "rawdisk" => ImageFlags::VMDK_RAWDISK | ImageFlags::FIXED,
        "esx" => ImageFlags::VMDK_ESX | ImageFlags::FIXED,
        "zero-expand" => ImageFlags::VDI_ZERO_EXPAND,
        _ => ImageFlags::NONE,
    };
    if info.variant == "diff" || info.parent_uuid.is_some() || !info.parent_names.is_empty() {
        kind = kind.without(ImageFlags::FIXED).with(ImageFlags::DIFF);
    }
    kind
}

/// The variant that makes images with these flags.
///
/// # Errors
/// [`Status::InvalidType`] for flags that do not go together, or not with the format.
pub(super) fn variant_of(format: Format, kind: ImageFlags) -> Result<Option<&'static str>> {
    let refused = || {
        let what = format!("{} images cannot be {}", format.title(), kind.names().join(" and "));
        Err(Error::of(Status::InvalidType, what))
    };
    let known = match format {
        Format::Vmdk => ImageFlags::VMDK_MASK,
        Format::Vdi => ImageFlags::VDI_MASK,
        _ => ImageFlags::FIXED.with(ImageFlags::DIFF),
    };
    if !known.contains(kind) || kind.contains(ImageFlags::FIXED.with(ImageFlags::DIFF)) {
        return refused();
    }
    let fixed = ImageFlags::FIXED;
    let kind = kind.without(ImageFlags::DIFF);
    Ok(match kind {
        ImageFlags::NONE => None,
        ImageFlags::FIXED => Some("fixed"),
        ImageFlags::VMDK_SPLIT_2G => Some("split2g"),
        ImageFlags::VMDK_STREAM_OPTIMIZED => Some("stream"),
        ImageFlags::VMDK_ESX => Some("esx"),
        ImageFlags::VDI_ZERO_EXPAND => Some("zero-expand"),
        k if k == fixed.with(ImageFlags::VMDK_SPLIT_2G) => Some("split2g-flat"),
        k if k == fixed.with(ImageFlags::VMDK_ESX) => Some("esx"),
        k if k.contains(ImageFlags::VMDK_RAWDISK) => Some("rawdisk"),
        _ => return refused(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_variants_and_back() {
        for (format, kind, variant) in [
            (Format::Vdi, ImageFlags::NONE, None),
            (Format::Vdi, ImageFlags::FIXED, Some("fixed")),
            (Format::Vdi, ImageFlags::VDI_ZERO_EXPAND, Some("zero-expand")),
            (Format::Vmdk, ImageFlags::VMDK_SPLIT_2G, Some("split2g")),
            (Format::Vmdk, ImageFlags::VMDK_SPLIT_2G | ImageFlags::FIXED, Some("split2g-flat")),
            (Format::Vmdk, ImageFlags::VMDK_STREAM_OPTIMIZED, Some("stream")),
            (Format::Vmdk, ImageFlags::VMDK_ESX | ImageFlags::FIXED, Some("esx")),
        ] {
            assert_eq!(variant_of(format, kind).unwrap(), variant);
            if let Some(variant) = variant {
                assert_eq!(kind_of(&ImageInfo { variant, ..ImageInfo::default() }), kind);
            }
        }
        for (format, kind) in [
            (Format::Vdi, ImageFlags::FIXED | ImageFlags::DIFF),
            (Format::Vdi, ImageFlags::VMDK_SPLIT_2G),
            (Format::Vmdk, ImageFlags::VDI_ZERO_EXPAND),
            (Format::Qed, ImageFlags::VMDK_ESX),
        ] {
            assert_eq!(variant_of(format, kind).unwrap_err().status(), Some(Status::InvalidType), "{kind:?}");
        }
    }

    #[test]
    fn whoever_names_a_parent_is_a_diff() {
        let named = ImageInfo { variant: "dynamic", parent_names: vec!["a".into()], ..ImageInfo::default() };
        assert_eq!(kind_of(&named), ImageFlags::DIFF);
    }
}
