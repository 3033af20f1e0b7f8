//! Merging, copying, moving, compacting, resizing, repairing, and the cache image.

use super::*;
use crate::error::ErrorKind;
use crate::job::{Repaired, Watch};
use std::cell::Cell;
use std::os::unix::fs::FileExt;

const ALL: usize = 8 << 20;

/// A chain of four images with something in each; what it shows.
fn four(f: &Folder) -> (Container, Vec<u8>) {
    let mut c = with_base(f, "VDI", "0.vdi", 8 * MIB);
    for n in 1..5u64 {
        c.write(n * 700 * 1024, &pattern(n, 300 << 10)).unwrap();
        c.write(5 * MIB, &pattern(n, 4096)).unwrap();
        if n < 4 {
            diff(&mut c, "VDI", &f.path(&format!("{n}.vdi")));
        }
    }
    let all = bytes(&c, 0, ALL);
    (c, all)
}

#[test]
fn merges_in_both_directions_keep_what_is_shown() {
    for (from, to, left) in [
        (0, 3, vec!["3.vdi"]),
        (3, 0, vec!["0.vdi"]),
        (1, 2, vec!["0.vdi", "2.vdi", "3.vdi"]),
        (2, 1, vec!["0.vdi", "1.vdi", "3.vdi"]),
        (LAST_IMAGE, 2, vec!["0.vdi", "1.vdi", "2.vdi"]),
    ] {
        let f = Folder::new();
        let (mut c, all) = four(&f);
        c.merge(from, to, unwatched!()).unwrap();
        assert_eq!(f.files(), left, "{from} {to}");
        assert_eq!(c.count(), left.len());
        assert!(bytes(&c, 0, ALL) == all, "{from} {to}");
        let last = c.filename(LAST_IMAGE).unwrap().to_path_buf();
        assert_eq!(last.file_name().unwrap().to_str(), left.last().copied());
        for n in 1..c.count() as u32 {
            assert_eq!(c.parent_uuid(n).unwrap(), c.uuid(n - 1).unwrap());
        }
        c.write(0, &[1; 512]).unwrap();
        assert_eq!(status(c.merge(9, 0, unwatched!())), Status::ImageNotFound);
        assert!(c.merge(0, 0, unwatched!()).is_err());
    }
}

#[test]
fn a_cancelled_job_leaves_the_container_as_it_was() {
    let f = Folder::new();
    let (mut c, all) = four(&f);
    let files = f.files();
    let mut cancel = || -> Vec<ErrorKind> {
        let no = &|| true;
        let kinds = vec![
            c.merge(0, 3, &mut Watch { cancelled: no, progress: &mut |_| () }).unwrap_err().kind(),
            c.resize(
                16 * MIB,
                Geometry::default(),
                Geometry::default(),
                &mut Watch { cancelled: no, progress: &mut |_| () },
            )
            .unwrap_err()
            .kind(),
        ];
        let mut target = hard_disk();
        let how = CopyImage { path: Some(f.path("copy.vdi")), ..CopyImage::default() };
        let e = c.copy_to(LAST_IMAGE, &mut target, &how, &mut Watch { cancelled: no, progress: &mut |_| () });
        assert_eq!(target.count(), 0);
        let mut kinds = kinds;
        kinds.push(e.unwrap_err().kind());
        kinds
    };
    assert_eq!(cancel(), [ErrorKind::Cancelled; 3]);
    assert_eq!((f.files(), c.count()), (files, 4));
    assert!(bytes(&c, 0, ALL) == all);
    c.write(0, &[1; 512]).unwrap();
}

/// As VirtualBox's test of copies: image by image, with what is the same already named.
#[test]
fn a_chain_is_copied_image_by_image() {
    let f = Folder::new();
    let (mut c, all) = four(&f);
    let mut to = hard_disk();
    for n in 0..4u32 {
        let same = n.checked_sub(1).unwrap_or(IMAGE_CONTENT_UNKNOWN);
        let how = CopyImage {
            backend: (n == 2).then(|| "VHD".to_string()),
            path: Some(f.path(&format!("c{n}.{}", if n == 2 { "vhd" } else { "vdi" }))),
            from_same: same,
            to_same: same,
            ..CopyImage::default()
        };
        let steps = Cell::new(0);
        let progress = &mut |_| steps.set(steps.get() + 1);
        c.copy_to(n, &mut to, &how, &mut Watch { cancelled: &|| false, progress }).unwrap();
        assert!(steps.get() > 0, "progress is told");
    }
    assert_eq!((to.count(), c.count()), (4, 4));
    assert!(bytes(&to, 0, ALL) == all);
    assert_ne!(to.uuid(0).unwrap(), c.uuid(0).unwrap());
    assert_eq!(to.modification_uuid(3).unwrap(), c.modification_uuid(3).unwrap());
    assert!(allocated(&to, 3) <= allocated(&c, 3) && allocated(&to, 1) <= allocated(&c, 1));
    let half = CopyImage { from_same: 0, path: Some(f.path("x.vdi")), ..CopyImage::default() };
    assert_eq!(c.copy_to(3, &mut to, &half, unwatched!()).unwrap_err().kind(), ErrorKind::InvalidArgument);

    // Without that: what the target shows already is left out by comparing.
    let again = CopyImage { path: Some(f.path("d.vdi")), ..CopyImage::default() };
    c.copy_to(3, &mut to, &again, unwatched!()).unwrap();
    assert_eq!(allocated(&to, LAST_IMAGE), 0);
    // Into what is there; and larger, in another format, on the way.
    let mut into = with_base(&f, "VMDK", "into.vmdk", 16 * MIB);
    into.write(0, &[9; 4 << 20]).unwrap();
    c.copy_to(3, &mut into, &CopyImage::default(), unwatched!()).unwrap();
    assert!(bytes(&into, 0, ALL) == all);
    let mut raw = hard_disk();
    let how = CopyImage {
        backend: Some("raw".into()),
        path: Some(f.path("r.raw")),
        size_bytes: 9 * MIB,
        flags: ImageFlags::FIXED,
        ..CopyImage::default()
    };
    c.copy_to(3, &mut raw, &how, unwatched!()).unwrap();
    assert_eq!(raw.size(0).unwrap(), 9 * MIB);
    assert!(bytes(&raw, 0, ALL) == all);
    let small = CopyImage { size_bytes: MIB, path: Some(f.path("s.vdi")), ..CopyImage::default() };
    assert_eq!(status(c.copy_to(3, &mut hard_disk(), &small, unwatched!())), Status::ShrinkNotSupported);
    let stream = CopyImage {
        backend: Some("VMDK".into()),
        path: Some(f.path("stream.vmdk")),
        flags: ImageFlags::VMDK_STREAM_OPTIMIZED,
        ..CopyImage::default()
    };
    let mut packed = hard_disk();
    c.copy_to(3, &mut packed, &stream, unwatched!()).unwrap();
    assert!(packed.is_read_only() && bytes(&packed, 0, ALL) == all);
    assert_eq!(packed.image_flags(0).unwrap(), ImageFlags::VMDK_STREAM_OPTIMIZED);
}

#[test]
fn images_move_by_name_or_by_copy() {
    let f = Folder::new();
    let (mut c, all) = four(&f);
    std::fs::create_dir(f.path("else")).unwrap();
    let ids: Vec<_> = (0..4).map(|n| c.uuid(n).unwrap()).collect();
    let taken = c.move_image(1, None, &f.path("2.vdi"), true, unwatched!()).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::Exists, "onto another");
    c.move_image(0, None, &f.path("else/base.vdi"), true, unwatched!()).unwrap();
    c.move_image(1, None, &f.path("else/one.vdi"), false, unwatched!()).unwrap();
    c.move_image(LAST_IMAGE, Some("VMDK"), &f.path("last.vmdk"), true, unwatched!()).unwrap();
    assert!(bytes(&c, 0, ALL) == all);
    assert_eq!((0..4).map(|n| c.uuid(n).unwrap()).collect::<Vec<_>>(), ids, "they are what they were");
    assert_eq!(f.files(), ["2.vdi", "else", "last.vmdk"]);
    assert_eq!(c.image_backend(LAST_IMAGE).unwrap().name, "VMDK");
    c.write(0, &[1; 512]).unwrap();
    // One whose child says where it is.
    let mut q = with_base(&f, "QCOW2", "q.qcow2", MIB);
    q.write(0, &[7; 512]).unwrap();
    diff(&mut q, "QCOW2", &f.path("r.qcow2"));
    q.move_image(0, None, &f.path("else/q.qcow2"), true, unwatched!()).unwrap();
    assert_eq!(bytes(&q, 0, 512), [7; 512]);
    let names = q.info(1).unwrap().parent_names;
    assert!(names.iter().any(|n| n.contains("else/q.qcow2")), "{names:?}");
}

/// As VirtualBox's test of compaction: half of what is there becomes zeros, then all of it.
#[test]
fn compacting_gives_space_back() {
    for backend in ["VDI", "VHD", "VMDK"] {
        let f = Folder::new();
        let name = format!("a.{}", backend.to_lowercase());
        let mut c = with_base(&f, backend, &name, 32 * MIB);
        let data = pattern(1, 32 << 20);
        c.write(0, &data).unwrap();
        c.write(8 * MIB, &vec![0; 16 << 20]).unwrap();
        let gained = c.compact(0, unwatched!()).unwrap();
        assert!(gained.after < gained.before - 12 * MIB, "{backend}: {gained:?}");
        assert_eq!(c.file_size(0).unwrap(), gained.after);
        let now = bytes(&c, 0, 32 << 20);
        assert!(now[..8 << 20] == data[..8 << 20] && now[24 << 20..] == data[24 << 20..]);
        assert!(now[8 << 20..24 << 20].iter().all(|b| *b == 0));
        c.write(0, &vec![0; 32 << 20]).unwrap();
        assert!(c.compact(LAST_IMAGE, unwatched!()).unwrap().after < 3 * MIB);
    }
    // What is equal to the parent goes as well.
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", 8 * MIB);
    c.write(0, &[3; ALL]).unwrap();
    c.create_diff("VDI", &f.path("b.vdi"), &CreateBase::default(), OpenFlags::HONOR_SAME).unwrap();
    c.write(0, &[3; ALL]).unwrap();
    assert_eq!(allocated(&c, 1), 8);
    c.compact(1, unwatched!()).unwrap();
    assert_eq!((allocated(&c, 1), bytes(&c, 0, ALL)), (0, vec![3; ALL]));
    c.set_open_flags(1, OpenFlags::READONLY).unwrap();
    assert_eq!(status(c.compact(1, unwatched!())), Status::ImageReadOnly);
    let mut q = with_base(&f, "QED", "q.qed", MIB);
    assert_eq!(q.compact(0, unwatched!()).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(status(q.compact(1, unwatched!())), Status::ImageNotFound);
    assert_eq!(q.count(), 1, "a refusal closes nothing");
}

#[test]
fn the_last_image_is_resized_with_its_geometry() {
    let f = Folder::new();
    for backend in ["VDI", "VMDK", "VHD", "QCOW2", "Parallels", "RAW"] {
        let ext = backend_info_one(backend).unwrap().extensions[0].extension;
        let mut c = with_base(&f, backend, &format!("a.{ext}"), 8 * MIB);
        c.write(7 * MIB, &[4; MIB as usize]).unwrap();
        c.resize(12 * MIB, Geometry::new(20, 16, 63), Geometry::new(3, 255, 63), unwatched!()).unwrap();
        assert_eq!(c.size(LAST_IMAGE).unwrap(), 12 * MIB, "{backend}");
        assert_eq!((bytes(&c, 8 * MIB - 512, 1024)[0], bytes(&c, 8 * MIB, 512)), (4, vec![0; 512]));
        c.write(11 * MIB, &[5; 512]).unwrap();
        if backend == "VMDK" {
            assert_eq!(c.pchs_geometry(0).unwrap(), Geometry::new(20, 16, 63));
            assert_eq!(c.lchs_geometry(0).unwrap(), Geometry::new(3, 255, 63));
        }
        let lost = c.resize(7 * MIB, Geometry::default(), Geometry::default(), unwatched!());
        assert!(lost.is_err() && c.size(0).unwrap() == 12 * MIB, "{backend}: data would be lost");
    }
    let mut c = open(&f.path("a.vdi"), "VDI", OpenFlags::READONLY);
    let none = Geometry::default();
    assert_eq!(status(c.resize(16 * MIB, none, none, unwatched!())), Status::ImageReadOnly);
    assert_eq!(status(c.resize(16 * MIB, Geometry::new(1, 17, 1), none, unwatched!())), Status::InvalidSize);
}

#[test]
fn repairs_tell_first_and_mend_then() {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", 4 * MIB);
    c.write(0, &[1; MIB as usize]).unwrap();
    c.write(MIB, &[2; MIB as usize]).unwrap();
    c.close_all().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(f.path("a.vdi")).unwrap();
    file.write_all_at(&0u32.to_le_bytes(), MIB + 4).unwrap();
    let before = std::fs::read(f.path("a.vdi")).unwrap();
    let run = |backend: &str, name: &str, flags| {
        repair(backend, &f.path(name), flags, Duration::ZERO, unwatched!())
    };
    let Repaired::Report { lines, after, .. } = run("VDI", "a.vdi", RepairFlags::DRY_RUN).unwrap() else {
        panic!("a VDI can be damaged")
    };
    assert!(!lines.is_empty() && after.is_none());
    assert!(std::fs::read(f.path("a.vdi")).unwrap() == before, "nothing is written");
    let done = run("VDI", "a.vdi", RepairFlags::NONE).unwrap();
    assert!(matches!(done, Repaired::Report { after: Some(r), .. } if r.corruptions == 0));
    let c = open(&f.path("a.vdi"), "VDI", OpenFlags::NONE);
    assert_eq!(bytes(&c, 0, 512), [1; 512]);
    drop(c);
    std::fs::write(f.path("b.vdi"), vec![0; 4096]).unwrap();
    assert!(run("VDI", "b.vdi", RepairFlags::NONE).is_err());
    std::fs::write(f.path("cd.cue"), "x").unwrap();
    assert!(run("CUE", "cd.cue", RepairFlags::NONE).is_err());
}

#[test]
fn a_container_has_one_cache_image() {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", 8 * MIB);
    c.write(0, &pattern(1, ALL)).unwrap();
    let e = c.create_cache("VCI", &f.path("c.vci"), 4 * MIB).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArgument, "nothing but an image that is written");
    assert_eq!((f.files(), c.count()), (vec!["a.vdi".to_string()], 1));
    diff(&mut c, "VDI", &f.path("b.vdi"));
    c.create_cache("vci", &f.path("c.vci"), 4 * MIB).unwrap();
    assert_eq!(status(c.cache_open("VCI", &f.path("c.vci"))), Status::CacheAlreadyExists);
    for _ in 0..2 {
        assert!(bytes(&c, 0, ALL) == pattern(1, ALL));
    }
    c.write(0, &[2; 512]).unwrap();
    assert_eq!(bytes(&c, 0, 512), [2; 512]);
    c.cache_close(false).unwrap();
    assert_eq!(status(c.cache_close(false)), Status::NotOpened);
    assert_eq!(
        status(c.cache_open("VCI", &f.path("none.vci")).map_err(|e| e.with_status(Status::CacheNotFound))),
        Status::CacheNotFound
    );
    std::fs::write(f.path("odd.vci"), [0; 4096]).unwrap();
    assert_eq!(status(c.cache_open("VCI", &f.path("odd.vci"))), Status::CacheNotFound);
    c.cache_open("VCI", &f.path("c.vci")).unwrap();
    assert_eq!(c.cache_filename(), Some(f.path("c.vci").as_path()));
    assert!(bytes(&c, 512, ALL - 512) == pattern(1, ALL)[512..]);
    c.cache_close(true).unwrap();
    assert!(!f.path("c.vci").exists() && c.cache_open("VDI", &f.path("c.vci")).is_err());
}
