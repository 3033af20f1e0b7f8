//! The eleven open flags, each by what it does, and by what is refused.

use super::*;
use crate::error::ErrorKind;
use crate::map::FileId;
use std::os::unix::fs::FileExt;

const ALL: usize = 4 << 20;

/// A dynamic base of 4 blocks, the first full of 5s, and a diff over it, both closed.
fn chain() -> Folder {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", 4 * MIB);
    c.write(0, &[5; MIB as usize]).unwrap();
    diff(&mut c, "VDI", &f.path("b.vdi"));
    c.close_all().unwrap();
    f
}

fn stacked(f: &Folder, flags: OpenFlags) -> Container {
    let mut c = open(&f.path("a.vdi"), "VDI", OpenFlags::READONLY);
    c.open("VDI", &f.path("b.vdi"), flags).unwrap();
    c
}

#[test]
fn readonly_shares_with_readers_and_takes_no_writes() {
    let f = chain();
    let (one, two) = (stacked(&f, OpenFlags::READONLY), stacked(&f, OpenFlags::READONLY));
    assert_eq!(bytes(&one, 0, 512), bytes(&two, 0, 512));
    assert_eq!(status(one.write(0, &[0; 512])), Status::ImageReadOnly);
    assert_eq!(
        hard_disk().open("VDI", &f.path("a.vdi"), OpenFlags::NONE).unwrap_err().kind(),
        ErrorKind::Locked
    );
}

#[test]
fn honor_zeroes_stores_zeros_as_blocks() {
    let f = chain();
    let c = stacked(&f, OpenFlags::NONE);
    c.write(0, &[0; MIB as usize]).unwrap();
    c.write(MIB, &[0; MIB as usize]).unwrap();
    assert_eq!(allocated(&c, 1), 0, "a mark, and nothing");
    drop(c);
    let f = chain();
    let c = stacked(&f, OpenFlags::HONOR_ZEROES);
    c.write(0, &[0; MIB as usize]).unwrap();
    assert_eq!(allocated(&c, 1), 1);
    c.write(MIB, &[0; MIB as usize]).unwrap();
    assert_eq!(allocated(&c, 1), 2);
    c.write(2 * MIB, &[0; 512]).unwrap();
    assert_eq!(allocated(&c, 1), 3, "a part of one, too");
    assert_eq!(bytes(&c, 0, ALL), vec![0; ALL]);
}

#[test]
fn honor_same_allocates_what_is_equal() {
    let f = chain();
    let c = stacked(&f, OpenFlags::NONE);
    c.write(512, &[5; 4096]).unwrap();
    assert_eq!(allocated(&c, 1), 0);
    drop(c);
    let c = stacked(&f, OpenFlags::HONOR_SAME);
    c.write(512, &[5; 4096]).unwrap();
    assert_eq!(allocated(&c, 1), 1);
    let fixed = CreateBase { flags: ImageFlags::FIXED, ..CreateBase::default() };
    let mut c = hard_disk();
    c.create_base("VDI", &f.path("f.vdi"), MIB, &fixed, OpenFlags::NONE).unwrap();
    assert!(c.open_flags(0).unwrap().contains(OpenFlags::HONOR_SAME), "fixed images always");
    c.set_open_flags(0, OpenFlags::NONE).unwrap();
    assert_eq!(c.open_flags(0).unwrap(), OpenFlags::HONOR_SAME, "whatever is asked for");
}

#[test]
fn info_is_for_questions_only() {
    let f = chain();
    let mut c = hard_disk();
    c.open("VDI", &f.path("b.vdi"), OpenFlags::INFO).unwrap();
    assert_eq!((c.size(0).unwrap(), c.image_flags(0).unwrap()), (4 * MIB, ImageFlags::DIFF));
    assert!(c.uuid(0).is_ok() && c.parent_uuid(0).is_ok() && c.file_size(0).unwrap() > 0);
    for refused in [c.read(0, &mut [0; 512]).map(drop), c.write(0, &[0; 512]), c.flush()] {
        assert_eq!(status(refused), Status::InvalidState);
    }
    // The place in the chain is not looked at, and neither is the device.
    c.open("VDI", &f.path("a.vdi"), OpenFlags::INFO).unwrap();
    assert_eq!(c.count(), 2);
    let mut dvd = Container::new(DeviceType::Dvd);
    dvd.open("VDI", &f.path("a.vdi"), OpenFlags::INFO).unwrap();
    // Once more is asked for, both are.
    assert_eq!(status(dvd.set_open_flags(0, OpenFlags::READONLY)), Status::InvalidType);
    assert_eq!((dvd.count(), dvd.open_flags(0).unwrap()), (1, OpenFlags::INFO), "a refusal changes nothing");
    assert_eq!(status(c.set_open_flags(0, OpenFlags::READONLY)), Status::InvalidType, "a diff first");
    let none = CreateBase::default();
    assert_eq!(status(c.create_diff("VDI", &f.path("c.vdi"), &none, OpenFlags::NONE)), Status::InvalidState);
    assert!(!f.path("c.vdi").exists());
}

#[test]
fn asynchronous_requests_need_their_flag() {
    let f = chain();
    let c = stacked(&f, OpenFlags::NONE);
    let (done, _) = completion();
    assert_eq!(c.async_flush(done).unwrap_err().kind(), ErrorKind::Unsupported);
    drop(c);
    let c = stacked(&f, OpenFlags::ASYNC_IO);
    let (done, told) = completion();
    c.async_flush(done).unwrap();
    told.wait().unwrap();
    assert_eq!(c.async_flush(|_| ()).map_err(|e| e.kind()), Ok(()));
    drop(c);
    // A stream-optimized VMDK takes none, as in VirtualBox.
    let mut c = open(&f.path("a.vdi"), "VDI", OpenFlags::READONLY);
    let stream = CopyImage {
        backend: Some("VMDK".into()),
        path: Some(f.path("s.vmdk")),
        flags: ImageFlags::VMDK_STREAM_OPTIMIZED,
        ..CopyImage::default()
    };
    c.copy_to(0, &mut hard_disk(), &stream, unwatched!()).unwrap();
    let flags = OpenFlags::READONLY | OpenFlags::ASYNC_IO;
    let refused = hard_disk().open("VMDK", &f.path("s.vmdk"), flags).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    let mut packed = open(&f.path("s.vmdk"), "VMDK", OpenFlags::READONLY);
    assert_eq!(packed.set_open_flags(0, flags).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(bytes(&packed, 0, 512), [5; 512], "a refusal closes nothing");
}

#[test]
fn shareable_lets_two_write_a_fixed_image() {
    let f = chain();
    let fixed = CreateBase { flags: ImageFlags::FIXED, ..CreateBase::default() };
    drop({
        let mut c = hard_disk();
        c.create_base("VDI", &f.path("f.vdi"), 4 * MIB, &fixed, OpenFlags::NONE).unwrap();
        c
    });
    let one = open(&f.path("f.vdi"), "VDI", OpenFlags::SHAREABLE);
    let two = open(&f.path("f.vdi"), "VDI", OpenFlags::SHAREABLE);
    one.write(MIB, &[1; 512]).unwrap();
    two.write(MIB + 512, &[2; 512]).unwrap();
    one.flush().unwrap();
    assert_eq!(bytes(&two, MIB, 1024), bytes(&one, MIB, 1024));
    assert_eq!(bytes(&one, MIB, 1024)[511..513], [1, 2]);
    let e = hard_disk().open("VDI", &f.path("f.vdi"), OpenFlags::NONE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Locked, "alone it is not had");
    // Where metadata changes the flag has no effect.
    let _one = open(&f.path("a.vdi"), "VDI", OpenFlags::SHAREABLE);
    let e = hard_disk().open("VDI", &f.path("a.vdi"), OpenFlags::SHAREABLE).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Locked);
}

#[test]
fn discards_need_their_flag_and_a_back_end() {
    let f = chain();
    let c = stacked(&f, OpenFlags::NONE);
    assert_eq!(status(c.discard(&[(0, MIB)])), Status::DiscardNotSupported);
    drop(c);
    let c = stacked(&f, OpenFlags::DISCARD);
    c.write(0, &pattern(1, MIB as usize)).unwrap();
    c.discard(&[(0, MIB), (2 * MIB, MIB)]).unwrap();
    assert_eq!(bytes(&c, 0, MIB as usize), vec![0; MIB as usize], "never what is beneath");
    assert!(c.discard(&[(1, 512)]).is_err());
    assert_eq!(status(c.discard(&[(4 * MIB, 512)])), Status::ReadOutOfRange);
    drop(c);
    let mut c = open(&f.path("a.vdi"), "VDI", OpenFlags::NONE);
    c.set_open_flags(0, OpenFlags::DISCARD).unwrap();
    c.discard(&[(0, 4 * MIB)]).unwrap();
    assert_eq!(bytes(&c, 0, ALL), vec![0; ALL]);
    std::fs::write(f.path("cd.bin"), vec![1; 2048 * 16]).unwrap();
    std::fs::write(f.path("cd.cue"), "FILE \"cd.bin\" BINARY\n TRACK 01 MODE1/2048\n  INDEX 01 00:00:00\n")
        .unwrap();
    let mut dvd = Container::new(DeviceType::Dvd);
    let flags = OpenFlags::READONLY | OpenFlags::DISCARD;
    assert_eq!(status(dvd.open("CUE", &f.path("cd.cue"), flags)), Status::DiscardNotSupported);
    dvd.open("CUE", &f.path("cd.cue"), OpenFlags::READONLY).unwrap();
    assert_eq!(status(dvd.set_open_flags(0, flags)), Status::DiscardNotSupported);
    assert_eq!((dvd.count(), bytes(&dvd, 0, 512)[0]), (1, 1), "a refusal closes nothing");
}

#[test]
fn ignore_flush_leaves_syncs_out() {
    let f = chain();
    let is_unsynced = |c: &Container| c.live().unwrap().disk.file(FileId(0)).syncs.is_unsynced();
    let mut c = stacked(&f, OpenFlags::IGNORE_FLUSH);
    for _ in 0..2 {
        c.write(0, &pattern(1, MIB as usize)).unwrap();
        c.flush().unwrap();
        assert!(
            is_unsynced(&c),
            "no sync has covered what was written (sim::tests::failing has the engine's side)"
        );
    }
    c.set_open_flags(LAST_IMAGE, OpenFlags::NONE).unwrap();
    c.write(0, &[9; 512]).unwrap();
    assert!(is_unsynced(&c));
    c.flush().unwrap();
    assert!(!is_unsynced(&c));
    assert_eq!(bytes(&c, 0, 512), [9; 512]);
}

#[test]
fn zero_blocks_are_told_on_request() {
    let f = chain();
    let told = |c: &Container, off: u64, len: usize| c.read(off, &mut vec![1; len]).unwrap();
    let c = stacked(&f, OpenFlags::NONE);
    assert_eq!(told(&c, 2 * MIB, 512), ReadStatus::Data);
    drop(c);
    let c = stacked(&f, OpenFlags::INFORM_ABOUT_ZERO_BLOCKS);
    let mut buf = [1; 512];
    assert_eq!(c.read(2 * MIB, &mut buf).unwrap(), ReadStatus::NewZeroedBlock);
    assert_eq!(buf, [0; 512]);
    assert_eq!((told(&c, 0, 512), told(&c, MIB - 512, 1024)), (ReadStatus::Data, ReadStatus::Data));
    c.write(0, &[0; MIB as usize]).unwrap();
    assert_eq!(told(&c, 0, 512), ReadStatus::Data, "zeros that an image says are something");
}

/// A VDI two of whose blocks share a place can be read by whoever says so, and by nobody be written.
#[test]
fn consistency_checks_are_left_out_only_for_reading() {
    let f = Folder::new();
    let mut c = with_base(&f, "VDI", "a.vdi", 4 * MIB);
    c.write(0, &[3; MIB as usize]).unwrap();
    c.write(MIB, &[4; MIB as usize]).unwrap();
    c.close_all().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(f.path("a.vdi")).unwrap();
    file.write_all_at(&0u32.to_le_bytes(), MIB + 4).unwrap();
    let try_open = |flags| {
        let mut c = hard_disk();
        c.open("VDI", &f.path("a.vdi"), flags).map(|()| c)
    };
    assert_eq!(status(try_open(OpenFlags::NONE)), Status::ImageCorrupted);
    assert_eq!(status(try_open(OpenFlags::READONLY)), Status::ImageCorrupted);
    let e = try_open(OpenFlags::SKIP_CONSISTENCY_CHECKS).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArgument, "only for reading");
    let mut c = try_open(OpenFlags::SKIP_CONSISTENCY_CHECKS | OpenFlags::READONLY).unwrap();
    assert_eq!((bytes(&c, 0, 512)[0], bytes(&c, MIB, 512)[0]), (3, 3));
    assert!(c.set_open_flags(0, OpenFlags::SKIP_CONSISTENCY_CHECKS).is_err());
    assert_eq!(c.count(), 1);
}

/// Setting flags that cannot be had closes all images, as the header says.
#[test]
fn a_failed_change_of_flags_closes_all_images() {
    let f = chain();
    let mut c = stacked(&f, OpenFlags::READONLY);
    let reader = stacked(&f, OpenFlags::READONLY);
    assert_eq!(status(c.set_open_flags(0, OpenFlags::NONE)), Status::InvalidState, "a parent");
    assert_eq!(status(c.set_open_flags(2, OpenFlags::READONLY)), Status::ImageNotFound);
    assert_eq!(c.count(), 2);
    assert_eq!(c.set_open_flags(1, OpenFlags::NONE).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(c.count(), 0);
    assert_eq!(status(c.read(0, &mut [0; 512])), Status::NotOpened);
    assert_eq!(reader.live().unwrap().disk.host_file(FileId(0)).path(), f.path("b.vdi"));
}

/// What is written once is made with it; elsewhere it is ignored: opening never fails for it, and what is not in order works too.
#[test]
fn sequential_makes_what_is_written_once() {
    let f = chain();
    let lchs = Geometry::new(1, 16, 63);
    let stream = CreateBase { flags: ImageFlags::VMDK_STREAM_OPTIMIZED, lchs, ..CreateBase::default() };
    let mut c = hard_disk();
    let path = f.path("s.vmdk");
    let mut make = |flags| c.create_base("VMDK", &path, 4 * MIB + 512, &stream, flags).map(|()| c.count());
    assert!(make(OpenFlags::NONE).is_err() && !path.exists());
    assert_eq!(make(OpenFlags::SEQUENTIAL | OpenFlags::ASYNC_IO).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(!path.exists(), "a refusal leaves nothing");
    assert_eq!(make(OpenFlags::SEQUENTIAL).unwrap(), 1);
    let (first, last) = (pattern(1, 200 << 10), pattern(2, MIB as usize + 512));
    c.write(64 << 10, &first).unwrap();
    c.write(0, &[1; 512]).map_err(|e| e.status()).expect_err("that unit is written");
    assert_eq!(status(c.write(100 << 10, &[1; 512])), Status::VmdkInvalidWrite);
    c.write(263 << 10, &[9; 1024]).unwrap();
    assert_eq!(status(c.write(4 * MIB, &[1; 1024])), Status::ReadOutOfRange);
    c.write(3 * MIB, &last).unwrap();
    c.flush().unwrap();
    assert_eq!(
        (c.size(0).unwrap(), c.image_flags(0).unwrap()),
        (4 * MIB + 512, ImageFlags::VMDK_STREAM_OPTIMIZED)
    );
    assert_eq!(status(c.read(0, &mut [0; 512])), Status::InvalidState, "no disk before it is closed");
    assert_eq!(status(c.set_uuid(0, None)), Status::InvalidState);
    assert_eq!(status(c.compact(0, unwatched!())), Status::InvalidState);
    let open = |flags| {
        let mut c = hard_disk();
        c.open("VMDK", &path, flags).map(|()| c)
    };
    assert!(open(OpenFlags::READONLY).is_err(), "nor an image");
    c.close(false).unwrap();
    let c = open(OpenFlags::READONLY | OpenFlags::SEQUENTIAL).unwrap();
    let mut all = vec![0; 4 << 20 | 512];
    all[64 << 10..264 << 10].copy_from_slice(&first);
    all[263 << 10..264 << 10].fill(9);
    all[3 << 20..].copy_from_slice(&last);
    assert!(bytes(&c, 0, all.len()) == all);
    // Given up, nothing is left.
    let mut c = hard_disk();
    c.create_base("VMDK", &f.path("t.vmdk"), MIB, &stream, OpenFlags::SEQUENTIAL).unwrap();
    c.write(0, &[1; 512]).unwrap();
    c.close(true).unwrap();
    assert!(!f.path("t.vmdk").exists() && c.count() == 0);
    // Elsewhere.
    let c = stacked(&f, OpenFlags::SEQUENTIAL);
    assert!(c.open_flags(LAST_IMAGE).unwrap().contains(OpenFlags::SEQUENTIAL));
    c.write(2 * MIB, &[1; 512]).unwrap();
    c.write(0, &[2; 512]).unwrap();
    assert_eq!((bytes(&c, 0, 512), bytes(&c, 2 * MIB, 512)), (vec![2; 512], vec![1; 512]));
}
