//! The back-ends, and what each can do. Nothing here is a second list: the formats themselves are asked, by having them describe
//! images they would make.

use super::flags::{BackendCaps, ConfigKeyFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{self, Format, NewImage, NewParent, RAW_EXTENSIONS};
use crate::map::{DeviceType, ImageInfo};
use std::path::Path;
use uuid::Uuid;

/// The value of a configuration key (`VDCFGVALUETYPE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ConfigValueType {
    /// A number.
    Integer = 1,
    /// A text.
    String = 2,
    /// Bytes.
    Bytes = 3,
}

impl ConfigValueType {
    /// The name for output.
    pub fn name(self) -> &'static str {
        match self {
            ConfigValueType::Integer => "integer",
            ConfigValueType::String => "string",
            ConfigValueType::Bytes => "bytes",
        }
    }
}

/// A configuration key that a back-end knows (`VDCONFIGINFO`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigKey {
    /// Its name, in any case.
    pub key: &'static str,
    /// What is taken if nothing is said; `None`: that depends.
    pub default: Option<&'static str>,
    /// The type of its value.
    pub value: ConfigValueType,
    /// How it is to be handled.
    pub flags: ConfigKeyFlags,
}

/// An extension of file names (`VDFILEEXTENSION`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtension {
    /// Lower case, without the dot.
    pub extension: &'static str,
    /// The device that images of this name are meant for.
    pub device: DeviceType,
}

/// A back-end (`VDBACKENDINFO`). All of them work on files: none composes a location or a name of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendInfo {
    /// The format behind it.
    pub format: Format,
    /// Its name as people write it. No two are the same in any case.
    pub name: String,
    /// What it can do.
    pub caps: BackendCaps,
    /// Extensions of its files, the usual one first.
    pub extensions: Vec<FileExtension>,
    /// What it can be told when an image is made.
    pub config: Vec<ConfigKey>,
    /// The file of the plug-in it came with; `None`: it is our own.
    pub plugin: Option<&'static str>,
}

/// The formats in the order in which VirtualBox tries them.
const PROBE_ORDER: [Format; 11] = [
    Format::Vmdk,
    Format::Vdi,
    Format::Vhd,
    Format::Parallels,
    Format::Dmg,
    Format::Qed,
    Format::Qcow,
    Format::Qcow2,
    Format::Vhdx,
    Format::Cue,
    Format::Raw,
];

/// All back-ends, in the order in which files are tried with them (`VDBackendInfo`): our own, then those of plug-ins. RAW alone, which takes
/// what nothing else does, is tried behind those.
pub fn backend_info() -> Vec<BackendInfo> {
    let plugged = Format::all().into_iter().filter(|f| matches!(f, Format::Registered(_)));
    PROBE_ORDER.into_iter().chain(plugged).map(BackendInfo::of).collect()
}

/// The back-end of this name, in any case (`VDBackendInfoOne`).
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] if there is none, with those there are.
pub fn backend_info_one(name: &str) -> Result<BackendInfo> {
    Ok(BackendInfo::of(name.parse()?))
}

/// Names of the cache back-ends; their images are made by [`crate::job::create_cache`].
pub const CACHE_BACKENDS: [&str; 1] = ["VCI"];

/// Checks the name of a cache back-end, in any case.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`].
pub fn cache_backend(name: &str) -> Result<&'static str> {
    let known = CACHE_BACKENDS.into_iter().find(|k| k.eq_ignore_ascii_case(name));
    known.ok_or_else(|| {
        let what = format!("unknown cache back-end '{name}'");
        Error::new(ErrorKind::InvalidArgument, what).hint(format!("one of: {}", CACHE_BACKENDS.join(", ")))
    })
}

impl BackendInfo {
    /// The back-end of a format.
    pub fn of(format: Format) -> BackendInfo {
        let name = match format {
            Format::Raw => "RAW".to_string(),
            _ => format.title().to_string(),
        };
        BackendInfo {
            format,
            name,
            caps: caps(format),
            extensions: extensions(format),
            config: config(format),
            plugin: match format {
                Format::Registered(r) => Some(r.origin()),
                _ => None,
            },
        }
    }
}

/// A small image that might be made.
fn wish(variant: Option<&str>) -> NewImage {
    NewImage {
        file_name: "image".into(),
        size_bytes: 8 << 20,
        variant: variant.map(str::to_string),
        uuid: None,
        modification: Uuid::from_u128(3),
        parent: None,
        comment: None,
        geometry: None,
        options: Vec::new(),
    }
}

fn caps(format: Format) -> BackendCaps {
    let makes = |wish: &NewImage| format::blueprint(format, wish).is_ok();
    let info = ImageInfo { format: "vdi", uuid: Some(Uuid::from_u128(1)), ..ImageInfo::default() };
    let parent = Some(NewParent { info, path: Some("parent.vdi".into()) });
    // All I/O of all formats goes through engines and the interface for files: formats themselves do none (tests/tidy.rs).
    BackendCaps::ASYNC
        .with(BackendCaps::FILE)
        .with(BackendCaps::VFS)
        .set(BackendCaps::UUID, makes(&NewImage { uuid: Some(Uuid::from_u128(2)), ..wish(None) }))
        .set(BackendCaps::CREATE_FIXED, makes(&wish(Some("fixed"))))
        .set(BackendCaps::CREATE_DYNAMIC, makes(&wish(Some("dynamic"))))
        .set(BackendCaps::CREATE_SPLIT_2G, makes(&wish(Some("split2g"))))
        .set(BackendCaps::DIFF, makes(&NewImage { parent, ..wish(None) }))
        // What is written can be punched.
        .set(BackendCaps::DISCARD, format.can_be_created())
        .set(BackendCaps::PREFERRED, matches!(format, Format::Vmdk | Format::Vdi | Format::Vhd))
}

fn extensions(format: Format) -> Vec<FileExtension> {
    let own = format.extensions().iter().map(|e| FileExtension {
        extension: e,
        device: format::device_type(format, &Path::new("image").with_extension(e), 0),
    });
    let raw = RAW_EXTENSIONS.into_iter().filter(|_| format == Format::Raw);
    own.chain(raw.map(|(extension, device)| FileExtension { extension, device })).collect()
}

fn config(format: Format) -> Vec<ConfigKey> {
    let key = |o: &format::NewOption| ConfigKey {
        key: o.key,
        default: o.default,
        value: if o.is_number { ConfigValueType::Integer } else { ConfigValueType::String },
        flags: ConfigKeyFlags::CREATE_ONLY,
    };
    format.options().iter().map(key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn caps_of(name: &str) -> u64 {
        backend_info_one(name).unwrap().caps.bits()
    }

    /// Every format is a back-end, once, and names are found in any case.
    #[test]
    fn back_ends_are_the_formats() {
        let all = backend_info();
        let formats: BTreeSet<_> = all.iter().map(|b| b.format.name()).collect();
        assert_eq!(formats.len(), Format::ALL.len());
        let names: BTreeSet<_> = all.iter().map(|b| b.name.to_lowercase()).collect();
        assert_eq!(names.len(), all.len());
        for b in &all {
            assert_eq!(&backend_info_one(&b.name.to_uppercase()).unwrap(), b);
            assert_eq!(b.name.to_lowercase(), b.format.name());
        }
        assert_eq!(all[0].name, "VMDK", "the first that is tried");
        assert_eq!(all.last().unwrap().name, "RAW", "it would match everything");
        assert_eq!(backend_info_one("iscsi").unwrap_err().kind(), ErrorKind::InvalidArgument);
    }

    /// Beside VirtualBox's own numbers (`VBoxManage list hddbackends` of 7.2): it has no discard but for VDI, makes neither raw
    /// files that grow nor VHDX, and reads QCOW2 under the name QCOW.
    #[test]
    fn capabilities_are_virtualbox_s_and_more() {
        let virtualbox = [
            ("VMDK", 0xa7f),
            ("VDI", 0xe77),
            ("VHD", 0xa77),
            ("Parallels", 0x274),
            ("DMG", 0x240),
            ("QED", 0x274),
            ("QCOW", 0x274),
            ("VHDX", 0x240),
            ("CUE", 0x240),
            ("RAW", 0x262),
        ];
        for (name, theirs) in virtualbox {
            assert_eq!(caps_of(name) & theirs, theirs, "{name} lacks what VirtualBox can");
        }
        assert_eq!(caps_of("VDI"), 0xe77);
        assert_eq!(caps_of("VMDK"), 0xe7f);
        assert_eq!(caps_of("VHD"), 0xe77);
        assert_eq!(caps_of("VHDX"), 0x677);
        assert_eq!(caps_of("QCOW2"), 0x674);
        assert_eq!((caps_of("QCOW"), caps_of("QED"), caps_of("Parallels")), (0x674, 0x674, 0x674));
        assert_eq!((caps_of("DMG"), caps_of("CUE"), caps_of("RAW")), (0x260, 0x260, 0x666));
    }

    #[test]
    fn extensions_have_devices() {
        let raw = backend_info_one("raw").unwrap().extensions;
        let of = |e: &str| raw.iter().find(|x| x.extension == e).unwrap().device;
        assert_eq!(
            (of("raw"), of("iso"), of("flp")),
            (DeviceType::HardDisk, DeviceType::Dvd, DeviceType::Floppy)
        );
        for b in backend_info() {
            assert!(!b.extensions.is_empty(), "{}", b.name);
            for e in b.extensions {
                let path = Path::new("x").with_extension(e.extension);
                assert_eq!(format::device_type(b.format, &path, 0), e.device, "{}", e.extension);
            }
        }
    }

    /// A key is one that making an image takes, with the default that is stated.
    #[test]
    fn configuration_keys_are_taken() {
        for b in backend_info() {
            for k in &b.config {
                assert_eq!(k.flags, ConfigKeyFlags::CREATE_ONLY);
                let Some(default) = k.default else { continue };
                let options = vec![(k.key.to_uppercase(), default.to_string())];
                let with = |options| NewImage { options, uuid: Some(Uuid::from_u128(7)), ..wish(None) };
                let make = |options| {
                    let wish = NewImage { uuid: None, ..with(options) };
                    format::blueprint(b.format, &wish)
                        .map(|p| p.files.iter().map(|f| f.len).collect::<Vec<_>>())
                };
                assert_eq!(make(options).unwrap(), make(Vec::new()).unwrap(), "{} {}", b.name, k.key);
                let numbered = b.format.options().iter().find(|o| o.key == k.key).unwrap().is_number;
                assert_eq!(numbered, k.value == ConfigValueType::Integer);
            }
            let wrong = NewImage { options: vec![("nonsense".into(), "1".into())], ..wish(None) };
            assert!(format::blueprint(b.format, &wrong).is_err(), "{}", b.name);
        }
        assert_eq!(cache_backend("vci").unwrap(), "VCI");
        assert_eq!(cache_backend("vdi").unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
}
