//! Opening, closing, stacking, and what is refused on the way.

use super::*;
use crate::error::ErrorKind;
use crate::map::DeviceType;

#[test]
fn a_chain_is_made_written_closed_and_opened_again() {
    let f = Folder::new();
    let mut c = with_base(&f, "vdi", "a.vdi", 8 * MIB);
    c.write(0, &[1; 1024]).unwrap();
    diff(&mut c, "VDI", &f.path("b.vdi"));
    assert!(c.open_flags(0).unwrap().contains(OpenFlags::READONLY), "a parent is not written");
    c.write(512, &[2; 512]).unwrap();
    diff(&mut c, "VMDK", &f.path("c.vmdk"));
    c.write(4 * MIB, &[3; 512]).unwrap();
    let all = bytes(&c, 0, 8 * MIB as usize);
    assert_eq!((all[0], all[512], all[1024], all[4 << 20]), (1, 2, 0, 3));
    assert_eq!((c.count(), c.size(LAST_IMAGE).unwrap()), (3, 8 * MIB));
    assert_eq!(c.parent_uuid(1).unwrap(), c.uuid(0).unwrap());
    assert_eq!(c.parent_uuid(2).unwrap(), c.uuid(1).unwrap());
    assert_eq!(c.parent_uuid(0).unwrap(), uuid::Uuid::nil());
    c.close_all().unwrap();
    assert_eq!((c.count(), c.is_read_only()), (0, true));

    let mut c = hard_disk();
    c.open("VDI", &f.path("a.vdi"), OpenFlags::READONLY).unwrap();
    c.open("vdi", &f.path("b.vdi"), OpenFlags::READONLY).unwrap();
    c.open("vmdk", &f.path("c.vmdk"), OpenFlags::READONLY).unwrap();
    assert_eq!(bytes(&c, 0, 8 * MIB as usize), all);
    assert_eq!(status(c.write(0, &[0; 512])), Status::ImageReadOnly);
    c.destroy().unwrap();
}

/// As the header says: what was below the one that was written is written from here on, however it was opened.
#[test]
fn closing_the_last_image_makes_the_one_below_writable() {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", MIB);
    diff(&mut c, "VDI", &f.path("b.vdi"));
    c.write(0, &[9; 512]).unwrap();
    c.close(true).unwrap();
    assert_eq!(f.files(), ["a.vdi"], "deleted on request");
    assert_eq!((c.count(), c.is_read_only()), (1, false));
    assert_eq!(bytes(&c, 0, 512), [0; 512], "what was in the diff has gone with it");
    c.write(0, &[4; 512]).unwrap();
    c.set_open_flags(0, OpenFlags::READONLY).unwrap();
    diff(&mut c, "VDI", &f.path("c.vdi"));
    c.set_open_flags(LAST_IMAGE, OpenFlags::READONLY).unwrap();
    c.close(false).unwrap();
    assert!(c.is_read_only(), "the closed one was not written");
    assert_eq!(f.files(), ["a.vdi", "c.vdi"]);
    c.close(false).unwrap();
    assert_eq!(status(c.close(false)), Status::NotOpened);
    assert_eq!(status(c.read(0, &mut [0; 512])), Status::NotOpened);
    assert_eq!(status(c.flush()), Status::NotOpened);
    assert_eq!(status(c.size(0)), Status::ImageNotFound);
}

/// Closing the one above succeeds in any case; where the one below cannot be written it is read, and nobody waits for ever.
#[test]
fn closing_over_an_image_that_somebody_reads_leaves_it_readable() {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", MIB);
    c.write(0, &[1; 512]).unwrap();
    diff(&mut c, "VDI", &f.path("b.vdi"));
    c.set_open_flags(LAST_IMAGE, OpenFlags::ASYNC_IO).unwrap();
    let reader = open(&f.path("a.vdi"), "VDI", OpenFlags::READONLY);
    assert_eq!(c.close(false).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!((c.count(), c.is_read_only()), (1, true));
    assert_eq!(bytes(&c, 0, 512), [1; 512]);
    drop(reader);
    c.set_open_flags(0, OpenFlags::NONE).unwrap();
    c.write(0, &[2; 512]).unwrap();
    // Gone altogether: nothing is open then.
    diff(&mut c, "VDI", &f.path("c.vdi"));
    std::fs::remove_file(f.path("a.vdi")).unwrap();
    assert_eq!(c.close(false).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(c.count(), 0);
    assert_eq!(status(c.read(0, &mut [0; 512])), Status::NotOpened);
}

/// Where neither the new image nor, after that, those that were there can be opened, nothing is, and all requests hear of it.
#[test]
fn requests_end_when_a_container_loses_its_images() {
    let f = Folder::new();
    let mut c = hard_disk();
    c.create_base("VDI", &f.path("a.vdi"), MIB, &CreateBase::default(), OpenFlags::ASYNC_IO).unwrap();
    std::fs::remove_file(f.path("a.vdi")).unwrap();
    let e = c.apart(|_| Ok(())).unwrap_err();
    assert_eq!((e.kind(), c.count()), (ErrorKind::NotFound, 0));
    let (done, _) = completion();
    assert_eq!(status(c.async_flush(done)), Status::NotOpened);
}

/// A ring of the kernel's belongs to one thread; a container to none.
#[test]
fn any_thread_reads_writes_flushes_and_closes() {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", 16 * MIB);
    c.flush().unwrap();
    std::thread::scope(|s| {
        for n in 0..4u64 {
            let c = &c;
            s.spawn(move || {
                for i in 0..20 {
                    let (at, data) = (n * 4 * MIB + i * (200 << 10), pattern(n * 100 + i, 150 << 10));
                    c.write(at, &data).unwrap();
                    c.flush().unwrap();
                    assert!(bytes(c, at, 150 << 10) == data);
                }
            });
        }
    });
    std::thread::spawn(move || {
        diff(&mut c, "VDI", &f.path("b.vdi"));
        c.write(0, &[1; 512]).unwrap();
        c.close_all().unwrap();
    })
    .join()
    .unwrap();
}

/// VirtualBox has codes of their own for what is wrong with headers.
#[test]
fn headers_are_refused_with_their_format_s_code() {
    let f = Folder::new();
    for (backend, nothing, version) in [
        ("VDI", Status::VdiInvalidSignature, Some((0x46, Status::VdiUnsupportedVersion))),
        ("VMDK", Status::VmdkInvalidHeader, Some((4, Status::VmdkUnsupportedVersion))),
        ("VHD", Status::VhdInvalidHeader, None),
        ("Parallels", Status::ParallelsInvalidHeader, None),
        ("QED", Status::GenInvalidHeader, None),
        ("QCOW", Status::GenInvalidHeader, None),
        ("QCOW2", Status::GenInvalidHeader, None),
        ("VHDX", Status::GenInvalidHeader, None),
        ("DMG", Status::DmgInvalidHeader, None),
    ] {
        let b = backend_info_one(backend).unwrap();
        let path = f.path("x").with_extension(b.extensions[0].extension);
        std::fs::write(&path, vec![0x20; 1 << 20]).unwrap();
        let open = || {
            let device = b.extensions[0].device;
            status(Container::new(device).open(backend, &path, OpenFlags::READONLY))
        };
        assert_eq!(open(), nothing, "{backend}");
        std::fs::remove_file(&path).unwrap();
        let Some((at, code)) = version else { continue };
        drop(with_base(&f, backend, path.file_name().unwrap().to_str().unwrap(), MIB));
        let mut image = std::fs::read(&path).unwrap();
        image[at] = 9;
        std::fs::write(&path, image).unwrap();
        assert_eq!(open(), code, "{backend}");
    }
    let mut c = with_base(&f, "VDI", "c.vdi", MIB);
    assert_eq!(status(c.set_comment(0, Some(&"x".repeat(256)))), Status::VdiCommentTooLong);
    let odd = CreateBase { config: vec![("Nonsense".into(), "1".into())], ..CreateBase::default() };
    assert_eq!(
        status(c.create_diff("VDI", &f.path("d.vdi"), &odd, OpenFlags::NONE)),
        Status::UnknownCfgValues
    );
}

#[test]
fn images_in_the_wrong_place_are_refused_and_nothing_changes() {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", MIB);
    diff(&mut c, "VDI", &f.path("b.vdi"));
    c.close_all().unwrap();
    drop(with_base(&f, "VDI", "other.vdi", MIB));
    let fixed = CreateBase { flags: ImageFlags::FIXED, ..CreateBase::default() };
    hard_disk().create_base("VDI", &f.path("fixed.vdi"), MIB, &fixed, OpenFlags::NONE).unwrap();

    assert_eq!(status(c.open("VDI", &f.path("b.vdi"), OpenFlags::NONE)), Status::InvalidType, "a diff first");
    c.open("VDI", &f.path("a.vdi"), OpenFlags::NONE).unwrap();
    assert_eq!(status(c.open("VDI", &f.path("fixed.vdi"), OpenFlags::NONE)), Status::InvalidType);
    assert_eq!(status(c.open("VDI", &f.path("other.vdi"), OpenFlags::NONE)), Status::UuidMismatch, "a base");
    let e = c.open("VDI", &f.path("none.vdi"), OpenFlags::NONE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::NotFound);
    assert_eq!((c.count(), c.is_read_only()), (1, false), "it is what it was");
    c.write(0, &[1; 512]).unwrap();
    assert!(c.open("nonsense", &f.path("b.vdi"), OpenFlags::NONE).is_err());
    c.open("VDI", &f.path("b.vdi"), OpenFlags::NONE).unwrap();

    // VirtualBox's rule, on request: anything over anything.
    let options = ContainerOptions { allow_parent_mismatch: true, ..ContainerOptions::default() };
    c.close_all().unwrap();
    let mut any = Container::with_options(DeviceType::HardDisk, options);
    any.open("VDI", &f.path("a.vdi"), OpenFlags::NONE).unwrap();
    any.open("VDI", &f.path("other.vdi"), OpenFlags::NONE).unwrap();
}

#[test]
fn a_container_is_of_one_device() {
    let f = Folder::new();
    let mut dvd = Container::new(DeviceType::Dvd);
    drop(with_base(&f, "VDI", "a.vdi", MIB));
    assert_eq!(status(dvd.open("VDI", &f.path("a.vdi"), OpenFlags::NONE)), Status::InvalidType);
    std::fs::write(f.path("cd.iso"), vec![5; 64 << 10]).unwrap();
    std::fs::write(f.path("disk.img"), vec![6; 1_474_560]).unwrap();
    assert_eq!(
        status(hard_disk().open("RAW", &f.path("cd.iso"), OpenFlags::READONLY)),
        Status::RawInvalidType
    );
    dvd.open("RAW", &f.path("cd.iso"), OpenFlags::READONLY).unwrap();
    assert_eq!((dvd.sector_size(0).unwrap(), bytes(&dvd, 0, 512)[0]), (2048, 5));
    assert_eq!(status(dvd.read(64 << 10, &mut [0; 512])), Status::ReadOutOfRange);

    let mut floppy = Container::new(DeviceType::Floppy);
    floppy.open("RAW", &f.path("disk.img"), OpenFlags::NONE).unwrap();
    let mut end = [0; 1024];
    floppy.read(1_474_560 - 512, &mut end).unwrap();
    assert_eq!((end[0], end[511], end[512], end[1023]), (6, 6, 0xf6, 0xf6), "behind a floppy's end");
    floppy.read(10 << 20, &mut end).unwrap();
    assert_eq!(end, [0xf6; 1024]);
    assert_eq!(status(floppy.write(1_474_560, &[0; 512])), Status::ReadOutOfRange);
}

/// An optical medium opened for writing is refused, and opened for reading only on request.
#[test]
fn read_only_is_fallen_back_to_only_on_request() {
    let f = Folder::new();
    std::fs::write(f.path("cd.iso"), vec![5; 64 << 10]).unwrap();
    let mut dvd = Container::new(DeviceType::Dvd);
    assert_eq!(status(dvd.open("RAW", &f.path("cd.iso"), OpenFlags::NONE)), Status::ImageReadOnly);
    assert_eq!(dvd.count(), 0);
    let options = ContainerOptions { read_only_fallback: true, ..ContainerOptions::default() };
    let mut dvd = Container::with_options(DeviceType::Dvd, options.clone());
    dvd.open("RAW", &f.path("cd.iso"), OpenFlags::NONE).unwrap();
    assert!(dvd.is_read_only() && dvd.open_flags(0).unwrap().contains(OpenFlags::READONLY));

    // Held by a reader: it cannot be written.
    drop(with_base(&f, "VDI", "a.vdi", MIB));
    let mut reader = hard_disk();
    reader.open("VDI", &f.path("a.vdi"), OpenFlags::READONLY).unwrap();
    let e = hard_disk().open("VDI", &f.path("a.vdi"), OpenFlags::NONE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Locked);
    let mut second = Container::with_options(DeviceType::HardDisk, options);
    second.open("VDI", &f.path("a.vdi"), OpenFlags::NONE).unwrap();
    assert!(second.is_read_only());
}

#[test]
fn new_images_are_checked_and_leave_nothing_when_they_fail() {
    let f = Folder::new();
    let mut c = hard_disk();
    let plain = CreateBase::default();
    let with = |flags| CreateBase { flags, ..CreateBase::default() };
    let p = |name: &str| f.path(name);
    assert_eq!(status(c.create_base("VDI", &p("a.vdi"), 0, &plain, OpenFlags::NONE)), Status::InvalidSize);
    assert_eq!(status(c.create_base("VDI", &p("a.vdi"), 1000, &plain, OpenFlags::NONE)), Status::InvalidSize);
    let both = with(ImageFlags::FIXED | ImageFlags::DIFF);
    assert_eq!(status(c.create_base("VDI", &p("a.vdi"), MIB, &both, OpenFlags::NONE)), Status::InvalidType);
    let split = with(ImageFlags::VMDK_SPLIT_2G);
    assert_eq!(status(c.create_base("VDI", &p("a.vdi"), MIB, &split, OpenFlags::NONE)), Status::InvalidType);
    for backend in ["QED", "DMG"] {
        let made = c.create_base(backend, &p("a"), MIB, &with(ImageFlags::FIXED), OpenFlags::NONE);
        assert_eq!(status(made), Status::InvalidType);
    }
    let odd = CreateBase { pchs: Geometry::new(1, 17, 1), ..CreateBase::default() };
    assert_eq!(status(c.create_base("VDI", &p("a.vdi"), MIB, &odd, OpenFlags::NONE)), Status::InvalidSize);
    let e = c.create_base("VDI", &p("a.vdi"), MIB, &plain, OpenFlags::INFO).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArgument);
    assert_eq!(status(c.create_diff("VDI", &p("a.vdi"), &plain, OpenFlags::NONE)), Status::NotOpened);
    assert!(f.files().is_empty(), "{:?}", f.files());

    let id = uuid::Uuid::from_u128(77);
    let like = CreateBase {
        uuid: Some(id),
        comment: Some("hello".into()),
        lchs: Geometry::new(2, 16, 63),
        ..CreateBase::default()
    };
    c.create_base("VDI", &p("a.vdi"), MIB, &like, OpenFlags::NONE).unwrap();
    assert_eq!((c.uuid(0).unwrap(), c.comment(0).unwrap()), (id, "hello".into()));
    assert_eq!(c.lchs_geometry(0).unwrap(), Geometry::new(2, 16, 63));
    assert_eq!(status(c.pchs_geometry(0)), Status::GeometryNotSet);
    assert_eq!(status(c.create_base("VDI", &p("b.vdi"), MIB, &plain, OpenFlags::NONE)), Status::InvalidState);
    assert_eq!(status(c.create_diff("RAW", &p("b.raw"), &plain, OpenFlags::NONE)), Status::InvalidType);
    let e = c.create_diff("VDI", &p("a.vdi"), &plain, OpenFlags::NONE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Exists);
    let named = CreateBase { parent_uuid: Some(uuid::Uuid::from_u128(1)), ..CreateBase::default() };
    let e = c.create_diff("VDI", &p("b.vdi"), &named, OpenFlags::NONE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::ParentMismatch, "it would name another parent than it has");
    assert_eq!((f.files(), c.count()), (vec!["a.vdi".to_string()], 1));
    c.write(0, &[1; 512]).unwrap();
}

#[test]
fn questions_are_answered_by_number_or_last() {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", 4 * MIB);
    diff(&mut c, "VHD", &f.path("b.vhd"));
    assert_eq!(c.filename(0).unwrap(), f.path("a.vdi"));
    assert_eq!(c.filename(LAST_IMAGE).unwrap(), f.path("b.vhd"));
    assert_eq!(
        (c.image_backend(0).unwrap().name, c.image_backend(1).unwrap().name),
        ("VDI".into(), "VHD".into())
    );
    assert_eq!(c.version(0).unwrap(), VDI_IMAGE_VERSION);
    assert_eq!((c.image_flags(0).unwrap(), c.image_flags(1).unwrap()), (ImageFlags::NONE, ImageFlags::DIFF));
    assert_eq!(c.file_size(0).unwrap(), std::fs::metadata(f.path("a.vdi")).unwrap().len());
    assert_eq!(c.sector_size(1).unwrap(), 512);
    let regions = c.regions(LAST_IMAGE, RegionListFlags::NONE).unwrap();
    assert_eq!((regions.regions.len(), regions.regions[0].size), (1, 4 * MIB));
    assert!(c.pchs_geometry(1).is_ok());
    let e = c.comment(1).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported, "a VHD has no comment");
    assert_eq!(c.modification_uuid(1).unwrap_err().kind(), ErrorKind::Unsupported);
    let before = c.modification_uuid(0).unwrap();
    assert_eq!(status(c.filename(2)), Status::ImageNotFound);
    let dump = c.dump();
    assert!(
        dump.lines().count() == 2 && dump.contains("b.vhd") && dump.contains(&before.to_string()),
        "{dump}"
    );
    c.close(true).unwrap();
    c.write(0, &[1; 512]).unwrap();
    assert_ne!(c.modification_uuid(0).unwrap(), before, "the first write gives a new one");
}

#[test]
fn formats_are_told_by_their_contents() {
    let f = Folder::new();
    drop(with_base(&f, "QED", "a.qed", MIB));
    std::fs::rename(f.path("a.qed"), f.path("a")).unwrap();
    std::fs::write(f.path("cd.iso"), [0; 4096]).unwrap();
    let told = |name: &str| get_format(&f.path(name)).map(|(b, d)| (b.name, d));
    assert_eq!(told("a").unwrap(), ("QED".into(), DeviceType::HardDisk));
    assert_eq!(told("cd.iso").unwrap(), ("RAW".into(), DeviceType::Dvd));
    crate::job::create_cache(&f.path("c.vci"), 8 << 20, 64 << 10).unwrap();
    assert_eq!(told("c.vci").unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(told("none").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn what_images_say_of_themselves_is_set_and_kept() {
    let f = Folder::new();
    let id = uuid::Uuid::from_u128;
    let mut c = with_base(&f, "VMDK", "a.vmdk", 4 * MIB);
    c.write(0, &[1; 512]).unwrap();
    c.set_comment(0, Some("one")).unwrap();
    c.set_uuid(0, Some(id(1))).unwrap();
    c.set_pchs_geometry(0, Geometry::new(3, 16, 63)).unwrap();
    c.set_lchs_geometry(0, Geometry::new(2, 255, 63)).unwrap();
    c.set_modification_uuid(0, Some(id(2))).unwrap();
    let told = |c: &Container| (c.comment(0).unwrap(), c.uuid(0).unwrap(), c.modification_uuid(0).unwrap());
    assert_eq!(told(&c), ("one".into(), id(1), id(2)));
    assert_eq!(c.pchs_geometry(0).unwrap(), Geometry::new(3, 16, 63));
    assert_eq!(c.lchs_geometry(0).unwrap(), Geometry::new(2, 255, 63));
    assert_eq!(bytes(&c, 0, 512), [1; 512]);
    c.set_comment(LAST_IMAGE, None).unwrap();
    assert_eq!(c.comment(0).unwrap(), "");
    c.set_uuid(0, None).unwrap();
    assert_ne!(c.uuid(0).unwrap(), id(1));

    diff(&mut c, "VDI", &f.path("b.vdi"));
    assert_eq!(status(c.set_comment(0, Some("x"))), Status::ImageReadOnly, "a parent");
    assert_eq!(status(c.set_parent_uuid(1, Some(id(9)))), Status::UuidMismatch);
    c.set_parent_uuid(1, Some(c.uuid(0).unwrap())).unwrap();
    assert_eq!(c.set_pchs_geometry(1, Geometry::new(1, 1, 1)).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(status(c.set_lchs_geometry(1, Geometry::new(1, 256, 1))), Status::InvalidSize);
    assert_eq!(status(c.set_comment(2, None)), Status::ImageNotFound);
    assert_eq!(c.count(), 2, "a refusal closes nothing");
    c.close(false).unwrap();
    assert_eq!(
        c.set_parent_uuid(0, None).unwrap_err().kind(),
        ErrorKind::Unsupported,
        "a base has no parent"
    );
    assert_eq!(bytes(&c, 0, 512), [1; 512]);
}
