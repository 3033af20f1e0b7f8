//! Which format a file has. Nothing is ever taken for raw because nothing else matched: a guest that owns a
//! raw disk can write any signature into it, and would then choose how its host reads the file.

use super::{Format, registered};
use crate::error::{Error, ErrorKind, Result};
use crate::map::{ByteSource, DeviceType, HostOffset};
use std::path::Path;

/// Bytes of the head that signatures lie in.
const HEAD_BYTES: u64 = 512;

/// The format of the file at `path` with the contents `source`.
///
/// A stated format is taken as it is and nothing is read. The extension `.raw` says raw, and nothing is read
/// either. `.iso` and `.cdr` say raw where an optical medium's file system is in it: such are never written to, so that no guest
/// decides what they look like. Otherwise extension and signature must agree.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] where they do not, saying what was seen and asking for `--format`;
/// [`ErrorKind::NotThisFormat`] where the extension names a format and no signature is there;
/// errors of reading.
pub fn detect(path: &Path, source: &dyn ByteSource, stated: Option<Format>) -> Result<Format> {
    if let Some(format) = stated {
        return Ok(format);
    }
    let named = extension_format(path);
    if named == Some(Format::Raw) {
        return Ok(Format::Raw);
    }
    let seen = signature(source)?;
    if seen.is_none() && is_optical_name(path) && has_optical_file_system(source)? {
        return Ok(Format::Raw);
    }
    let (kind, what) = match (named, seen) {
        (Some(n), Some(s)) if n == s => return Ok(n),
        (Some(n), Some(s)) => (
            ErrorKind::InvalidArgument,
            format!("its name says {} but its contents look like {}", n.title(), s.title()),
        ),
        (Some(n), None) => (
            ErrorKind::NotThisFormat,
            format!("its name says {} but its contents have no {} signature", n.title(), n.title()),
        ),
        (None, Some(s)) => (
            ErrorKind::InvalidArgument,
            format!("its contents look like {} but its name does not say so", s.title()),
        ),
        (None, None) => {
            (ErrorKind::InvalidArgument, "neither its name nor its contents tell the format".to_string())
        }
    };
    Err(Error::new(kind, what).hint(advice(path, source, named, seen)?))
}

/// The name of a raw file says that it is a CD or DVD.
pub fn is_optical_name(path: &Path) -> bool {
    device_type(Format::Raw, path, u64::MAX) == DeviceType::Dvd
}

/// ISO 9660 or UDF begins where either has to: at block 16 of 2048 bytes.
fn has_optical_file_system(source: &dyn ByteSource) -> Result<bool> {
    const AT: u64 = 16 * 2048;
    let mut descriptor = [0; 6];
    if source.len() < AT + 2048 {
        return Ok(false);
    }
    source.read_at(HostOffset(AT), &mut descriptor)?;
    Ok([&b"CD001"[..], b"BEA01"].contains(&&descriptor[1..]))
}

/// Extensions of raw files that say for which device they are, as VirtualBox lists them.
pub const RAW_EXTENSIONS: [(&str, DeviceType); 7] = [
    ("iso", DeviceType::Dvd),
    ("cdr", DeviceType::Dvd),
    ("img", DeviceType::Floppy),
    ("ima", DeviceType::Floppy),
    ("dsk", DeviceType::Floppy),
    ("flp", DeviceType::Floppy),
    ("vfd", DeviceType::Floppy),
];

/// Largest floppy disk: 82 tracks of 48 sectors, two sides.
const MAX_FLOPPY_BYTES: u64 = 512 * 82 * 48 * 2;

/// The device that the file at `path` is an image of, a disk of `size` bytes. Of a raw file its name decides, as VirtualBox lists
/// them; one that is larger than any floppy disk is a hard disk, which VirtualBox refuses.
pub fn device_type(format: Format, path: &Path, size: u64) -> DeviceType {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let named = || RAW_EXTENSIONS.iter().find(|(e, _)| *e == extension).map(|(_, device)| *device);
    match format {
        Format::Dmg | Format::Cue => DeviceType::Dvd,
        Format::Raw => {
            named().filter(|d| *d != DeviceType::Floppy || size <= MAX_FLOPPY_BYTES).unwrap_or_default()
        }
        _ => DeviceType::HardDisk,
    }
}

/// What to do about a file whose format is not clear.
fn advice(
    path: &Path,
    source: &dyn ByteSource,
    named: Option<Format>,
    seen: Option<Format>,
) -> Result<String> {
    let say = |f: Format| format!("--format {f}, for a parent FILE,format={f}");
    if source.is_empty() {
        return Ok("the file is empty; vdimg create makes a new image, under a name that is free".into());
    }
    if is_cache_image(source)? {
        return Ok("it is a cache image and no disk; vdblk takes it with --cache-image".into());
    }
    if describes_a_machine(path, source)? {
        return Ok("it describes a machine; name one of the image files it lists".into());
    }
    Ok(match (named, seen) {
        (Some(n), Some(s)) => {
            format!("say which it is: --format {n} or --format {s}, for a parent FILE,format={s}")
        }
        (Some(n), None) => format!(
            "it is damaged or no {} at all; if it is a raw disk say so with {}",
            n.title(),
            say(Format::Raw)
        ),
        (None, Some(s)) => format!("if it is one say so with {}", say(s)),
        (None, None) => format!("if it is a raw disk say so with {}", say(Format::Raw)),
    })
}

fn is_cache_image(source: &dyn ByteSource) -> Result<bool> {
    let mut head = [0; 4];
    if source.len() < head.len() as u64 {
        return Ok(false);
    }
    source.read_at(HostOffset(0), &mut head)?;
    Ok(super::vci::Header::is_signed(&head))
}

/// Settings of VirtualBox, or another XML file beside the images they list.
fn describes_a_machine(path: &Path, source: &dyn ByteSource) -> Result<bool> {
    const XML: &[u8] = b"<?xml";
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    if ["vbox", "vbox-prev", "ovf"].contains(&extension.as_str()) {
        return Ok(true);
    }
    let mut head = [0; XML.len()];
    if source.len() < head.len() as u64 {
        return Ok(false);
    }
    source.read_at(HostOffset(0), &mut head)?;
    Ok(head == *XML)
}

/// The format the extension names, in any case.
pub fn extension_format(path: &Path) -> Option<Format> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    Format::all().into_iter().find(|f| f.extensions().contains(&extension.as_str()))
}

/// The format whose signature the contents bear. Never [`Format::Raw`]. Formats that are registered are asked after our own, so that
/// none of them takes away a file that would be read without it.
///
/// # Errors
/// Those of reading; a file too short for a signature has none.
pub fn signature(source: &dyn ByteSource) -> Result<Option<Format>> {
    let len = source.len().min(HEAD_BYTES);
    let mut head = vec![0; usize::try_from(len).expect("512 at most")];
    source.read_at(HostOffset(0), &mut head)?;
    if let Some(format) = signature_of_head(&head) {
        return Ok(Some(format));
    }
    let foot_at = source.len().saturating_sub(HEAD_BYTES);
    let mut foot = vec![0; head.len()];
    source.read_at(HostOffset(foot_at), &mut foot)?;
    if len == HEAD_BYTES {
        match foot.first_chunk() {
            Some(b"conectix") => return Ok(Some(Format::Vhd)),
            Some([b'k', b'o', b'l', b'y', ..]) => return Ok(Some(Format::Dmg)),
            _ => {}
        }
    }
    Ok(registered::probe(&head, &foot, source.len()).map(Format::Registered))
}

fn signature_of_head(head: &[u8]) -> Option<Format> {
    if head.get(0x40..0x44) == Some(&super::vdi::SIGNATURE.to_le_bytes()) {
        return Some(Format::Vdi);
    }
    if super::vmdk::is_descriptor(head) {
        return Some(Format::Vmdk);
    }
    if super::cue::is_sheet(head) {
        return Some(Format::Cue);
    }
    let starts: [(&[u8], Format); 10] = [
        (b"KDMV", Format::Vmdk),
        (b"COWD", Format::Vmdk),
        (b"conectix", Format::Vhd),
        (b"vhdxfile", Format::Vhdx),
        (b"QFI\xfb\0\0\0\x01", Format::Qcow),
        (b"QFI\xfb\0\0\0\x02", Format::Qcow2),
        (b"QFI\xfb\0\0\0\x03", Format::Qcow2),
        (b"QED\0", Format::Qed),
        (b"WithoutFreeSpace", Format::Parallels),
        (b"WithouFreSpacExt", Format::Parallels),
    ];
    starts.into_iter().find(|(start, _)| head.starts_with(start)).map(|(_, format)| format)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vdi() -> Vec<u8> {
        let mut b = vec![0; 1024];
        b[0x40..0x44].copy_from_slice(&super::super::vdi::SIGNATURE.to_le_bytes());
        b
    }

    fn of(path: &str, bytes: &[u8], stated: Option<Format>) -> Result<Format> {
        detect(Path::new(path), &bytes, stated)
    }

    #[test]
    fn raw_is_said_never_guessed() {
        assert_eq!(of("a.raw", &vdi(), None).unwrap(), Format::Raw);
        assert_eq!(of("a.img", &vdi(), Some(Format::Raw)).unwrap(), Format::Raw);
        for bytes in [vec![0u8; 4096], vec![1; 100]] {
            let e = of("a.img", &bytes, None).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidArgument);
            assert!(e.to_string().contains("--format raw"), "{e}");
        }
    }

    #[test]
    fn a_disc_with_a_file_system_is_raw_by_its_name() {
        let mut disc = vec![0; 20 * 2048];
        disc[16 * 2048 + 1..16 * 2048 + 6].copy_from_slice(b"CD001");
        assert_eq!(of("a.ISO", &disc, None).unwrap(), Format::Raw);
        assert_eq!(of("a.cdr", &disc, None).unwrap(), Format::Raw);
        assert!(of("a.img", &disc, None).is_err());
        assert!(of("a.iso", &[0; 20 * 2048], None).is_err());
        disc[..4].copy_from_slice(b"QED\0");
        let e = of("a.iso", &disc, None).unwrap_err().to_string();
        assert!(e.contains("look like QED"), "{e}");
    }

    #[test]
    fn devices_are_what_names_say() {
        let device = |path: &str, size| device_type(Format::Raw, Path::new(path), size).name();
        assert_eq!((device("a.iso", 1 << 30), device("a.CDR", 0)), ("dvd", "dvd"));
        for name in ["a.img", "a.ima", "a.dsk", "a.flp", "a.vfd"] {
            assert_eq!((device(name, 1_474_560), device(name, 8 << 20)), ("floppy", "hdd"), "{name}");
        }
        assert_eq!((device("a.raw", 512), device("a", 512)), ("hdd", "hdd"));
        assert_eq!(device_type(Format::Vdi, Path::new("a.iso"), 512), DeviceType::HardDisk);
    }

    #[test]
    fn name_and_signature_must_agree() {
        assert_eq!(of("A.VDI", &vdi(), None).unwrap(), Format::Vdi);
        assert_eq!(of("a.vdi", &[0; 4096], None).unwrap_err().kind(), ErrorKind::NotThisFormat);
        let e = of("a.vmdk", &vdi(), None).unwrap_err().to_string();
        assert!(e.contains("VMDK") && e.contains("VDI") && e.contains("--format"), "{e}");
        let e = of("disk", &vdi(), None).unwrap_err().to_string();
        assert!(e.contains("--format vdi"), "{e}");
    }

    #[test]
    fn advice_fits_the_case() {
        let advice = |path: &str, bytes: &[u8]| of(path, bytes, None).unwrap_err().to_string();
        for name in ["a.vdi", "a.img", "a.vbox"] {
            let e = advice(name, &[]);
            assert!(e.contains("is empty") && e.contains("create") && !e.contains("--format"), "{e}");
        }
        for (name, bytes) in [("web.vbox", &b"<?xml version"[..]), ("web.vbox", b"?"), ("x", b"<?xml ?>")] {
            let e = advice(name, bytes);
            assert!(e.contains("a machine") && !e.contains("--format"), "{e}");
        }
        let e = advice("a.vdi", &[7; 600]);
        assert!(e.contains("damaged") && e.contains("FILE,format=raw"), "{e}");
        assert!(advice("plain", &vdi()).contains("FILE,format=vdi"));
    }

    #[test]
    fn signatures_at_either_end() {
        let mut vhd = vec![0; 2048];
        vhd[1536..1544].copy_from_slice(b"conectix");
        assert_eq!(of("a.vhd", &vhd, None).unwrap(), Format::Vhd);
        vhd[1536..1544].copy_from_slice(b"koly\0\0\0\x04");
        assert_eq!(of("a.dmg", &vhd, None).unwrap(), Format::Dmg);
        assert_eq!(signature(&b"QFI\xfb\0\0\0\x03".to_vec()).unwrap(), Some(Format::Qcow2));
        assert_eq!(signature(&b"QFI\xfb\0\0\0\x01".to_vec()).unwrap(), Some(Format::Qcow));
    }
}
