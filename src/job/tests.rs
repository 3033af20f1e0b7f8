//! Jobs in simulation: disks in memory, operations that end in any order.

use super::{CompareJob, CopyJob, Job, Piece, PieceKind, Step, StepsJob, Survey, Watch};
use crate::error::{ErrorKind, Failure};
use crate::format::vdi::{self, Parent, Variant, VdiCreate};
use crate::format::{self, FileStep, Format};
use crate::io::testing::scratch_dir;
use crate::io::{AlignedBuf, HostFile, MemFile, OpenHow, OsFile, OsHost};
use crate::map::{ByteSource, FileId, GuestOffset, GuestRange, HostOffset};
use crate::sim::{Bytes, Rng, SimEngine, SimFile};
use crate::vd::{Chain, Channel, Disk, DiskOptions, FileSource, Layer, Request};
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

use super::lanes::Lanes;

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len).unwrap()
}

fn new_vdi(size: u64, block: u64, uuid: u128, parent: Option<u128>, variant: Variant) -> Arc<MemFile> {
    let id = Uuid::from_u128(uuid);
    let mut c = VdiCreate::new(size, id, id);
    c.block_bytes = block;
    c.variant = variant;
    c.parent = parent.map(|p| Parent { uuid: Uuid::from_u128(p), modification: Uuid::from_u128(p) });
    let b = c.blueprint().unwrap();
    let f = MemFile::new(format!("{uuid:x}.vdi"), Vec::new());
    f.set_len(b.file_len()).unwrap();
    for (off, bytes) in b.into_writes() {
        f.write_at(off.0, &bytes).unwrap();
    }
    Arc::new(f)
}

/// A disk of these files, top first.
fn open(files: &[(Format, Arc<MemFile>)], read_only: bool) -> Arc<Disk> {
    let layers = files.iter().zip(0u16..).map(|((format, f), i)| {
        let how = format::OpenHow { read_only: read_only || i > 0, info_only: false };
        let map = format::open_single(*format, &f.bytes() as &dyn ByteSource, FileId(i), how).unwrap();
        Layer { number: u32::from(i), map: map.into() }
    });
    let layers = layers.collect();
    let files = files.iter().map(|(_, f)| f.clone() as Arc<dyn HostFile>).collect();
    let options = DiskOptions { read_only, skip_syncs: true, ..DiskOptions::default() };
    Disk::new(Chain::new(layers), files, options, Arc::new(OsHost), Box::new(|| ()))
}

fn channel(disk: &Arc<Disk>, rng: &mut Rng) -> Channel {
    let mut e = SimEngine::new(rng.draw());
    e.inline_percent = rng.below(100);
    e.depth = 1 + rng.below(20) as usize;
    Channel::new(disk.clone(), Box::new(e), CompareJob::slots()).unwrap()
}

/// Writes the model's bytes of a range.
fn write(lanes: &mut Lanes, model: &[u8], r: GuestRange) {
    let (from, len) = (r.start().0 as usize, r.len() as usize);
    lanes.bytes_mut(0)[..len].copy_from_slice(&model[from..from + len]);
    let started = lanes.write(0, 0, 0, r);
    lanes.finish(started).unwrap().unwrap();
}

/// A chain of diffs with random contents, and what it reads.
fn random_chain(rng: &mut Rng, size: u64, depth: u128) -> (Vec<(Format, Arc<MemFile>)>, Vec<u8>) {
    let mut files = Vec::new();
    let mut model = vec![0u8; size as usize];
    for level in 1..=depth {
        let block = 4096 << rng.below(6);
        let parent = (level > 1).then_some(level - 1);
        files.insert(0, (Format::Vdi, new_vdi(size, block, level, parent, Variant::Dynamic)));
        let disk = open(&files, false);
        let mut lanes = Lanes::new(vec![channel(&disk, rng)], 1).unwrap();
        for _ in 0..rng.below(12) {
            let len = (1 + rng.below(200)).min(size / 512);
            let r = range(rng.below(size / 512 - len + 1) * 512, len * 512);
            let value = if rng.chance(30) { 0 } else { 1 + rng.below(255) as u8 };
            model[r.start().0 as usize..r.end().0 as usize].fill(value);
            write(&mut lanes, &model, r);
        }
        lanes.close_disk(0, false).unwrap();
    }
    (files, model)
}

fn read_all(disk: &Arc<Disk>, rng: &mut Rng) -> Vec<u8> {
    let mut lanes = Lanes::new(vec![channel(disk, rng)], 1).unwrap();
    let mut all = Vec::new();
    while (all.len() as u64) < disk.size_bytes() {
        let r = range(all.len() as u64, (disk.size_bytes() - all.len() as u64).min(1 << 20));
        let started = lanes.read(0, 0, r);
        lanes.finish(started).unwrap().unwrap();
        all.extend_from_slice(&lanes.bytes(0)[..r.len() as usize]);
    }
    all
}

fn run(job: &mut dyn Job) {
    for _ in 0..1_000_000 {
        if job.step().unwrap() == Step::Done {
            return;
        }
    }
    panic!("the job hangs");
}

fn copy(from: &Arc<Disk>, to: &Arc<Disk>, rng: &mut Rng) {
    let mut job = CopyJob::new(channel(from, rng), channel(to, rng)).unwrap();
    run(&mut job);
    assert_eq!(job.progress().done, from.size_bytes());
    job.close_target().unwrap();
}

fn difference(a: &Arc<Disk>, b: &Arc<Disk>, rng: &mut Rng) -> Option<u64> {
    let mut job = CompareJob::new(channel(a, rng), channel(b, rng)).unwrap();
    run(&mut job);
    job.result().difference
}

#[test]
fn copies_show_what_the_chain_shows_and_compare_equal() {
    for seed in 0..60 {
        let mut rng = Rng(seed);
        let size = (1 + rng.below(5000)) * 512;
        let depth = 1 + u128::from(rng.below(3));
        let (files, mut model) = random_chain(&mut rng, size, depth);
        let source = open(&files, true);
        assert_eq!(read_all(&source, &mut rng), model, "seed {seed}");
        let raw = Arc::new(MemFile::new("t.raw", vec![0; size as usize]));
        let variant = if rng.chance(30) { Variant::Fixed } else { Variant::Dynamic };
        let target = match rng.below(2) {
            0 => vec![(Format::Raw, raw)],
            _ => vec![(Format::Vdi, new_vdi(size, 4096 << rng.below(9), 77, None, variant))],
        };
        copy(&source, &open(&target, false), &mut rng);
        let copied = open(&target, true);
        assert_eq!(read_all(&copied, &mut rng), model, "seed {seed}");
        if target[0].0 == Format::Vdi {
            assert!(vdi::check(&target[0].1.bytes()).unwrap().is_clean(), "seed {seed}");
        }
        assert_eq!(difference(&source, &copied, &mut rng), None, "seed {seed}");
        if !rng.chance(70) {
            continue;
        }
        // One byte less is found, and only where it is.
        let at = rng.below(size);
        model[at as usize] = model[at as usize].wrapping_add(1);
        let changed = vec![(Format::Raw, Arc::new(MemFile::new("c.raw", model)))];
        assert_eq!(difference(&source, &open(&changed, true), &mut rng), Some(at), "seed {seed}");
    }
}

#[test]
fn a_longer_disk_is_equal_if_the_rest_is_zeros() {
    let mut rng = Rng(1);
    let raw = |bytes: Vec<u8>| open(&[(Format::Raw, Arc::new(MemFile::new("r.raw", bytes)))], true);
    let mut long = vec![7; 5000 * 512];
    let short = raw(long[..1024].to_vec());
    assert_eq!(difference(&short, &raw(long.clone()), &mut rng), Some(1024));
    long[1024..].fill(0);
    assert_eq!(difference(&short, &raw(long.clone()), &mut rng), None);
    assert_eq!(difference(&raw(long.clone()), &short, &mut rng), None);
    let last = long.len() - 1;
    long[last] = 1;
    assert_eq!(difference(&raw(long), &short, &mut rng), Some(last as u64));
}

#[test]
fn a_target_that_is_too_small_is_refused() {
    let mut rng = Rng(1);
    let raw = |n: usize| open(&[(Format::Raw, Arc::new(MemFile::new("r.raw", vec![1; n])))], false);
    let (large, small) = (raw(1024), raw(512));
    assert!(CopyJob::new(channel(&large, &mut rng), channel(&small, &mut rng)).is_err());
}

#[test]
fn a_failure_ends_the_copy_and_names_the_place() {
    let mut rng = Rng(5);
    let files = [(Format::Raw, Arc::new(MemFile::new("s.raw", vec![1; 40 << 20])))];
    let source = open(&files, true);
    // The file shrinks under the copy.
    files[0].1.set_len(3 << 20).unwrap();
    let target = open(&[(Format::Raw, Arc::new(MemFile::new("t.raw", vec![0; 40 << 20])))], false);
    let mut job = CopyJob::new(channel(&source, &mut rng), channel(&target, &mut rng)).unwrap();
    let e = loop {
        match job.step() {
            Ok(step) => assert_eq!(step, Step::More),
            Err(e) => break e.to_string(),
        }
    };
    assert!(e.starts_with("s.raw: cannot read guest offset "), "{e}");
}

#[test]
fn a_survey_tells_the_images_apart() {
    let mib = 1 << 20;
    let mut rng = Rng(9);
    let base = (Format::Vdi, new_vdi(2 * mib, mib / 2, 1, None, Variant::Dynamic));
    let mut files = vec![base];
    let model = vec![5; 4 << 20];
    let mut put = |files: &[(Format, Arc<MemFile>)], r: GuestRange, zero: bool| {
        let disk = open(files, false);
        let mut lanes = Lanes::new(vec![channel(&disk, &mut rng)], 1).unwrap();
        if zero {
            let started = lanes.start(0, 0, Request::WriteZeroes { range: r, unmap: true }, &[]);
            lanes.finish(started).unwrap().unwrap();
        } else {
            write(&mut lanes, &model, r);
        }
        lanes.close_disk(0, false).unwrap();
    };
    put(&files, range(0, mib), false);
    // Larger than its base.
    files.insert(0, (Format::Vdi, new_vdi(4 * mib, mib / 2, 2, Some(1), Variant::Dynamic)));
    put(&files, range(0, mib / 2), true);
    put(&files, range(3 * mib, mib / 2), false);
    let mut survey = Survey::new(open(&files, true));
    let mut pieces = Vec::new();
    while let Some(p) = survey.next_piece().unwrap() {
        pieces.push(p);
    }
    let kinds: Vec<_> = pieces.iter().map(|p| (p.range, p.depth)).collect();
    let (half, end) = (mib / 2, 4 * mib);
    assert_eq!(
        kinds,
        [
            (range(0, half), 0),
            (range(half, half), 1),
            (range(mib, 2 * mib), 1),
            (range(3 * mib, half), 0),
            (range(3 * mib + half, end - 3 * mib - half), 1),
        ]
    );
    let is = |i: usize, want: fn(&Piece) -> bool| assert!(want(&pieces[i]), "{i}: {:?}", pieces[i]);
    is(0, |p| p.kind == PieceKind::Zero);
    is(1, |p| matches!(p.kind, PieceKind::Data { file: FileId(1), .. }));
    is(2, |p| p.kind == PieceKind::Unallocated);
    is(3, |p| matches!(p.kind, PieceKind::Data { file: FileId(0), .. }));
    is(4, |p| p.kind == PieceKind::Unallocated);
}

#[test]
fn lanes_are_given_back_after_a_failure() {
    let mut rng = Rng(2);
    let disk = open(&[(Format::Raw, Arc::new(MemFile::new("r.raw", vec![1; 4096])))], true);
    let mut lanes = Lanes::new(vec![channel(&disk, &mut rng)], 1).unwrap();
    let started = lanes.write(0, 0, 0, range(0, 512));
    assert_eq!(lanes.finish(started).unwrap(), Err(Failure::ReadOnly));
    let started = lanes.read(0, 0, range(4096, 512));
    assert_eq!(lanes.finish(started).unwrap(), Err(Failure::OutOfRange));
    let started = lanes.read(0, 0, range(0, 512));
    assert_eq!(lanes.finish(started).unwrap(), Ok(()));
    assert_eq!(lanes.bytes(0)[..512], AlignedBuf::new(512).as_slice().iter().map(|_| 1).collect::<Vec<u8>>());
}

/// The engines of the operating system, over real files: above all, that waiting for them ends.
#[test]
fn both_engines_copy_and_compare() {
    use super::{CreateImage, create_image};
    use crate::io::{EngineKind, make_engine};
    use crate::vd::{OpenDisk, open_disk};
    let exe = std::env::current_exe().unwrap();
    let dir = tempfile::tempdir_in(exe.parent().unwrap()).unwrap();
    let mut rng = Rng(4);
    let mut bytes = vec![0; 20 << 20];
    bytes[3 << 20..12 << 20].iter_mut().for_each(|b| *b = rng.draw() as u8);
    std::fs::write(dir.path().join("s.raw"), bytes).unwrap();
    for kind in [EngineKind::IoUring, EngineKind::Threads] {
        let target = dir.path().join(format!("{kind}.vdi"));
        create_image(&CreateImage::new(&target, Format::Vdi, 20 << 20)).unwrap();
        let options = DiskOptions { skip_syncs: true, ..DiskOptions::default() };
        let source = open_disk(&OpenDisk::new(dir.path().join("s.raw"))).unwrap();
        let copied = open_disk(&OpenDisk { options, ..OpenDisk::new(&target) }).unwrap();
        let channel = |disk: &Arc<Disk>| match make_engine(kind, 16) {
            Ok(chosen) => Some(Channel::new(disk.clone(), chosen.engine, CompareJob::slots()).unwrap()),
            Err(e) => {
                println!("skipped: {e}");
                None
            }
        };
        let (Some(from), Some(to)) = (channel(&source.disk), channel(&copied.disk)) else { continue };
        let mut job = CopyJob::new(from, to).unwrap();
        run(&mut job);
        job.close_target().unwrap();
        let (a, b) = (channel(&source.disk).unwrap(), channel(&copied.disk).unwrap());
        let mut job = CompareJob::new(a, b).unwrap();
        run(&mut job);
        assert_eq!(job.result().difference, None, "{kind}");
        assert_eq!(copied.disk.chain().top().map.info().allocated_blocks, Some(9), "{kind}");
    }
}

/// A file with a VDI of this shape, all entries given, and some bytes at its first place.
fn damaged(dir: &Path, blocks: u32, block: u64, entry: impl Fn(u32) -> u32) -> OsFile {
    let id = Uuid::from_u128(7);
    let mut c = VdiCreate::new(u64::from(blocks) * block, id, id);
    c.block_bytes = block;
    let b = c.blueprint().unwrap();
    let path = dir.join("damaged.vdi");
    std::fs::write(&path, b"").unwrap();
    let f = OsFile::open(&path, OpenHow { write: true, ..OpenHow::default() }).unwrap();
    b.clone().into_writes().for_each(|(off, bytes)| f.write_at(off.0, &bytes).unwrap());
    let table: Vec<u8> = (0..blocks).flat_map(|b| entry(b).to_le_bytes()).collect();
    f.write_at(1 << 20, &table).unwrap();
    f.write_at(b.file_len(), &[0x77; 4096]).unwrap();
    f
}

fn repair(f: &OsFile) -> crate::Result<()> {
    let plan = vdi::repair(&FileSource::new(f)?)?;
    let mut watch = Watch { cancelled: &|| false, progress: &mut |_| () };
    watch.run(&mut StepsJob::new(vec![f], plan.steps))
}

#[test]
fn a_repair_copies_what_is_there_and_no_holes() {
    let dir = scratch_dir();
    let f = damaged(dir.path(), 4, 256 << 20, |b| if b < 2 { 0 } else { u32::MAX });
    repair(&f).unwrap();
    assert!(vdi::check(&FileSource::new(&f).unwrap()).unwrap().is_clean());
    let mut got = [0; 4097];
    f.read_at((2 << 20) + (256 << 20), &mut got).unwrap();
    assert!(got[..4096] == [0x77; 4096] && got[4096] == 0);
    assert!(f.allocated().unwrap() < 4 << 20, "{} bytes", f.allocated().unwrap());
}

#[test]
fn a_repair_that_would_copy_without_end_is_refused() {
    let dir = scratch_dir();
    let f = damaged(dir.path(), 20_000, 4096, |_| 0);
    let before = std::fs::read(f.path()).unwrap();
    let e = repair(&f).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Limit);
    assert!(e.to_string().contains("19999 blocks") && !e.to_string().contains('\n'), "{e}");
    assert!(std::fs::read(f.path()).unwrap() == before);
    let few = damaged(dir.path(), 10_000, 4096, |_| 0);
    repair(&few).unwrap();
    assert!(vdi::check(&FileSource::new(&few).unwrap()).unwrap().is_clean());
}

/// The image is marked by that: not by what fails otherwise.
#[test]
fn a_sync_that_fails_among_steps_is_remembered() {
    let file = FileId(0);
    let write = FileStep::Write { file, at: HostOffset(0), bytes: vec![1] };
    for fails in [true, false] {
        let f = SimFile::new("x", Bytes::of(&[7; 700]));
        f.fail_direct_syncs(fails);
        let mut job = StepsJob::new(vec![&*f], vec![write.clone(), FileStep::Sync { file }]);
        let mut watch = Watch { cancelled: &|| false, progress: &mut |_| () };
        assert_eq!(watch.run(&mut job).is_err(), fails);
        assert_eq!(job.sync_failed, fails);
    }
}

#[test]
fn a_file_is_lengthened_by_zeros_where_nothing_can_be_allocated() {
    let (at, to) = (700, (5 << 20) + 1000);
    let lengthen = |f: &SimFile, to: u64| -> crate::Result<u64> {
        let mut job = StepsJob::new(vec![f], vec![FileStep::SetLen { file: FileId(0), to: HostOffset(to) }]);
        let mut steps = 0;
        while job.step()? == Step::More {
            steps += 1;
        }
        Ok(steps)
    };
    for (errno, pieces) in [(None, 1), (Some(libc::EOPNOTSUPP), 6)] {
        let f = SimFile::new("short", Bytes::of(&[7; 700]));
        if let Some(errno) = errno {
            f.fail_direct_fallocate(errno);
        }
        assert_eq!(lengthen(&f, to).unwrap(), pieces, "no piece is larger than 1 MiB");
        // whatever of it is durable reads as before, or as zeros
        f.cut_now().for_each_state(3, 40, &mut Rng(1), &mut |left| {
            let bytes = left.to_vec();
            assert!(bytes[..at].iter().all(|b| *b == 7) && bytes[at..].iter().all(|b| *b == 0));
            true
        });
        assert_eq!(f.len().unwrap(), to);
        assert_eq!((lengthen(&f, 512).unwrap(), f.len().unwrap()), (1, 512));
    }
    let f = SimFile::new("short", Bytes::of(&[7; 700]));
    f.fail_direct_fallocate(libc::EOPNOTSUPP);
    assert!(lengthen(&f, 2 << 30).unwrap_err().to_string().contains("zeros"), "endless writing");
    f.fail_direct_fallocate(libc::ENOSPC);
    assert!(lengthen(&f, to).is_err() && f.len().unwrap() == 700, "a full disk is told of");
}
