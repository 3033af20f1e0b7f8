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
    let odd = CopyImage { size_bytes: 1000, ..small };
    assert_eq!(status(c.copy_to(3, &mut hard_disk(), &odd, unwatched!())), Status::InvalidSize);
    let stream = CopyImage {
        backend: Some("VMDK".into()),
        path: Some(f.path("stream.vmdk")),
        flags: ImageFlags::VMDK_STREAM_OPTIMIZED,
        ..CopyImage::default()
    };
    let mut packed = hard_disk();
    c.copy_to(3, &mut packed, &stream, unwatched!()).unwrap();
    assert!(packed.is_read_only() && bytes(&packed, 0, ALL) == all);
    let other = CopyImage { size_bytes: 16 * MIB, path: Some(f.path("t.vmdk")), ..stream };
    assert_eq!(status(c.copy_to(3, &mut hard_disk(), &other, unwatched!())), Status::InvalidSize);
    assert_eq!(packed.image_flags(0).unwrap(), ImageFlags::VMDK_STREAM_OPTIMIZED);
}

/// A smaller disk takes what fits if there is nothing behind, into a new base, a diff, and an image that is there.
#[test]
fn a_copy_may_be_smaller_where_nothing_is_lost() {
    let f = Folder::new();
    let (mut c, all) = four(&f);
    // The last bytes are those at 5 MiB.
    let fits = 5 * MIB + 4096;
    let how =
        |name: &str, size_bytes| CopyImage { path: Some(f.path(name)), size_bytes, ..CopyImage::default() };
    let mut to = hard_disk();
    assert_eq!(
        status(c.copy_to(3, &mut to, &how("a.vdi", fits - 512), unwatched!())),
        Status::ShrinkNotSupported
    );
    assert_eq!((to.count(), f.path("a.vdi").exists()), (0, false));
    for (name, backend) in [("a.vdi", "VDI"), ("b.qcow2", "QCOW2"), ("c.vmdk", "VMDK")] {
        let how =
            CopyImage { backend: Some(backend.into()), open_flags: OpenFlags::READONLY, ..how(name, fits) };
        let mut to = hard_disk();
        c.copy_to(LAST_IMAGE, &mut to, &how, unwatched!()).unwrap();
        assert_eq!((to.size(0).unwrap(), to.is_read_only()), (fits, true));
        assert!(bytes(&to, 0, fits as usize) == all[..fits as usize], "{backend}");
    }
    let mut to = with_base(&f, "VDI", "d.vdi", 6 * MIB);
    to.write(0, &[1; 6 << 20]).unwrap();
    c.copy_to(3, &mut to, &CopyImage { size_bytes: 6 * MIB, ..CopyImage::default() }, unwatched!()).unwrap();
    assert!(bytes(&to, 0, 6 << 20) == all[..6 << 20], "zeros as well, to its end");
    c.copy_to(3, &mut to, &how("e.vdi", 6 * MIB), unwatched!()).unwrap();
    assert_eq!((to.count(), allocated(&to, 1)), (2, 0));
    // An image of the middle, and what ends behind the data of the last piece.
    c.write(7 * MIB, &[0; 512]).unwrap();
    c.copy_to(1, &mut hard_disk(), &how("f.vdi", fits), unwatched!()).unwrap();
}

/// Whoever is above, in another folder, is told before the old place goes, and a cancelled move leaves all as it was.
#[test]
fn a_move_tells_the_image_above_first() {
    let f = Folder::new();
    std::fs::create_dir(f.path("sub")).unwrap();
    let mut c = with_base(&f, "QCOW2", "base.qcow2", MIB);
    c.write(0, &[7; 512]).unwrap();
    diff(&mut c, "QCOW2", &f.path("sub/top.qcow2"));
    for by_rename in [true, false] {
        let e = c.move_image(
            0,
            None,
            &f.path("new.qcow2"),
            by_rename,
            &mut Watch { cancelled: &|| true, progress: &mut |_| () },
        );
        assert_eq!(e.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!((f.files(), c.count()), (vec!["base.qcow2".to_string(), "sub".into()], 2));
        assert_eq!(bytes(&c, 0, 512), [7; 512]);
    }
    let mut at = f.path("base.qcow2");
    for (by_rename, name) in [(true, "one.qcow2"), (false, "two.qcow2")] {
        c.move_image(0, None, &f.path(name), by_rename, unwatched!()).unwrap();
        assert!(!at.exists() && f.path(name).exists());
        assert!(c.info(1).unwrap().parent_names.iter().any(|n| n.contains(name)));
        at = f.path(name);
    }
    // Every moment at which a copy that moves looks whether it is cancelled.
    for n in 0..40 {
        let looks = Cell::new(0);
        let cancelled = || looks.replace(looks.get() + 1) == n;
        let to = f.path(&format!("m{n}.qcow2"));
        let moved =
            c.move_image(0, None, &to, false, &mut Watch { cancelled: &cancelled, progress: &mut |_| () });
        let gone = if moved.is_ok() { &at } else { &to };
        assert!(!gone.exists(), "{n}: {moved:?}");
        assert_eq!((c.count(), bytes(&c, 0, 512)), (2, vec![7; 512]), "{n}");
        if moved.is_ok() {
            break;
        }
    }
    // Files of one image move together.
    let split = CreateBase { flags: ImageFlags::VMDK_SPLIT_2G, ..CreateBase::default() };
    let mut c = hard_disk();
    c.create_base("VMDK", &f.path("s.vmdk"), MIB, &split, OpenFlags::NONE).unwrap();
    c.write(0, &[3; 512]).unwrap();
    c.move_image(0, None, &f.path("sub/s.vmdk"), true, unwatched!()).unwrap();
    assert_eq!(bytes(&c, 0, 512), [3; 512]);
    assert!(!f.files().iter().any(|n| n.starts_with("s.") || n.starts_with("s-")), "{:?}", f.files());
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
    assert_eq!(run("VDI", "b.vdi", RepairFlags::NONE).unwrap_err().kind(), ErrorKind::NotThisFormat);
    std::fs::write(f.path("cd.bin"), vec![1; 2048 * 16]).unwrap();
    std::fs::write(f.path("cd.cue"), "FILE \"cd.bin\" BINARY\n TRACK 01 MODE1/2048\n  INDEX 01 00:00:00\n")
        .unwrap();
    let told = run("CUE", "cd.cue", RepairFlags::NONE);
    assert_eq!(status(told), Status::ImageRepairNotSupported);
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
    assert_eq!(c.cache_open("VCI", &f.path("none.vci")).unwrap_err().kind(), ErrorKind::NotFound);
    std::fs::write(f.path("odd.vci"), [0; 4096]).unwrap();
    assert_eq!(status(c.cache_open("VCI", &f.path("odd.vci"))), Status::CacheNotFound);
    c.cache_open("VCI", &f.path("c.vci")).unwrap();
    assert_eq!(c.cache_filename(), Some(f.path("c.vci").as_path()));
    assert!(bytes(&c, 512, ALL - 512) == pattern(1, ALL)[512..]);
    c.cache_close(true).unwrap();
    assert!(!f.path("c.vci").exists() && c.cache_open("VDI", &f.path("c.vci")).is_err());
}
