//! The twelve capability bits: a back-end with one can do it, one without refuses.

use super::*;
use crate::error::ErrorKind;
use crate::format::{self, Format};
use crate::io::{HostFile, MemFile};
use crate::map::FileId;

fn makes(b: &BackendInfo, flags: ImageFlags) -> bool {
    let f = Folder::new();
    let name = f.path("image").with_extension(b.extensions[0].extension);
    let like = CreateBase { flags, ..CreateBase::default() };
    let mut c = hard_disk();
    match c.create_base(&b.name, &name, 8 * MIB, &like, OpenFlags::NONE) {
        Ok(()) => {
            assert_eq!(c.size(0).unwrap(), 8 * MIB);
            c.write(MIB, &[1; 512]).unwrap();
            true
        }
        Err(e) => {
            assert_eq!(e.status(), Some(Status::InvalidType), "{}: {e}", b.name);
            false
        }
    }
}

#[test]
fn creating_is_told_by_three_bits() {
    for b in backend_info() {
        assert_eq!(b.caps.contains(BackendCaps::CREATE_DYNAMIC), makes(&b, ImageFlags::NONE), "{}", b.name);
        assert_eq!(b.caps.contains(BackendCaps::CREATE_FIXED), makes(&b, ImageFlags::FIXED), "{}", b.name);
        let split = ImageFlags::VMDK_SPLIT_2G;
        assert_eq!(b.caps.contains(BackendCaps::CREATE_SPLIT_2G), makes(&b, split), "{}", b.name);
    }
}

/// Uuid, Diff, Async, File and Discard, of each back-end that makes images.
#[test]
fn what_a_bit_says_an_image_does() {
    for b in backend_info() {
        if !b.caps.contains(BackendCaps::CREATE_DYNAMIC) {
            continue;
        }
        let f = Folder::new();
        let ext = b.extensions[0].extension;
        let name = f.path("image").with_extension(ext);
        let mut c = hard_disk();
        let flags = OpenFlags::ASYNC_IO | OpenFlags::DISCARD;
        c.create_base(&b.name, &name, 8 * MIB, &CreateBase::default(), flags).unwrap();
        assert!(b.caps.contains(BackendCaps::ASYNC | BackendCaps::DISCARD | BackendCaps::FILE));
        c.write(0, &[7; MIB as usize]).unwrap();
        c.discard(&[(0, MIB)]).unwrap();
        assert_eq!(bytes(&c, 0, MIB as usize), vec![0; MIB as usize], "{}", b.name);
        let (done, told) = completion();
        c.async_flush(done).unwrap();
        told.wait().unwrap();
        assert!(name.is_file());
        let has_uuid = c.uuid(0).map_err(|e| assert_eq!(e.kind(), ErrorKind::Unsupported)).is_ok();
        assert_eq!(b.caps.contains(BackendCaps::UUID), has_uuid, "{}", b.name);
        let over = f.path("over").with_extension(ext);
        let made = c.create_diff(&b.name, &over, &CreateBase::default(), OpenFlags::NONE);
        assert_eq!(b.caps.contains(BackendCaps::DIFF), made.is_ok(), "{}: {made:?}", b.name);
    }
}

/// Config and TcpNet: none of these back-ends is anything but files. Preferred: VirtualBox's three.
#[test]
fn no_back_end_needs_configuration_or_a_network() {
    for b in backend_info() {
        assert!(!b.caps.intersects(BackendCaps::CONFIG | BackendCaps::TCPNET), "{}", b.name);
        assert!(b.config.iter().all(|k| !k.flags.contains(ConfigKeyFlags::MANDATORY)));
        let preferred = ["VDI", "VMDK", "VHD"].contains(&b.name.as_str());
        assert_eq!(b.caps.contains(BackendCaps::PREFERRED), preferred);
    }
}

/// Vfs: images open over any file that is one by its interface, here over memory.
#[test]
fn formats_see_files_only_through_the_interface() {
    for format in Format::ALL.into_iter().filter(|f| f.can_be_created()) {
        let f = Folder::new();
        let name = f.path("image").with_extension(format.extensions()[0]);
        drop({
            let mut c = hard_disk();
            c.create_base(format.name(), &name, 8 * MIB, &CreateBase::default(), OpenFlags::NONE).unwrap();
            c
        });
        let memory = MemFile::new("memory", std::fs::read(&name).unwrap());
        let source = crate::vd::FileSource::new(&memory).unwrap();
        let how = format::OpenHow { read_only: true, info_only: false };
        let map = format::open_single(format, &source, FileId(0), how).unwrap();
        assert_eq!(map.limits().size_bytes, 8 * MIB);
        assert!(memory.fd().is_none());
        assert!(BackendInfo::of(format).caps.contains(BackendCaps::VFS));
    }
}
