//! VHDX images made by hand: what no program at hand makes, and what a log may say.

mod format_support;

use format_support::hostile::{Random, carry_out, judge};
use format_support::vhdx::{BLOCKS_AT, Logged, MIB, Spec, entry, log, reseal, table_sector, use_log};
use format_support::{Layer, read_all};
use std::path::Path;
use std::process::Command;
use uuid::Uuid;
use vdblk::error::{Error, ErrorKind};
use vdblk::format::{self, Format, ImageFile, OpenHow, open_single};
use vdblk::map::{ByteSource, FileId, ImageMap};
use vdblk::vd::{OpenDisk, open_disk};

const READ: OpenHow = OpenHow { read_only: true, info_only: false };

fn open(file: &dyn ByteSource) -> Result<Box<dyn ImageMap>, Error> {
    open_single(Format::Vhdx, file, FileId(0), READ)
}

fn content(file: &dyn ByteSource) -> Vec<u8> {
    let map = open(file).expect("a sound image");
    read_all(&[Layer { map: &*map, bytes: file }])
}

fn refused(file: &dyn ByteSource, kind: ErrorKind, word: &str) {
    let e = open(file).map(drop).expect_err(word);
    let line = e.to_string();
    assert!(e.kind() == kind && line.contains(word) && !line.contains('\n'), "{word}: {e:?}");
}

/// Two blocks at 4 and 5 MiB that are full of ones and twos; the table has the first.
fn two_blocks() -> Vec<u8> {
    let mut f = Spec { table: vec![(0, entry(6, 4))], ..Spec::default() }.build();
    f[BLOCKS_AT..BLOCKS_AT + MIB].fill(1);
    f[BLOCKS_AT + MIB..BLOCKS_AT + 2 * MIB].fill(2);
    f
}

#[test]
fn states_of_blocks() {
    let mut f = Spec {
        table: vec![(0, entry(6, 5)), (1, entry(2, 0)), (2, entry(3, 0)), (3, entry(1, 0))],
        ..Spec::default()
    }
    .build();
    f[5 * MIB..6 * MIB].fill(7);
    let all = content(&f);
    assert!(all[..MIB].iter().all(|b| *b == 7) && all[MIB..].iter().all(|b| *b == 0));
    for (table, word) in [
        (vec![(0, entry(7, 4))], "state 7"),
        (vec![(0, entry(4, 4))], "state 4"),
        (vec![(0, entry(6, 4)), (1, entry(6, 4))], "lies already"),
        (vec![(0, entry(6, 3))], "no block can be"),
        (vec![(0, entry(6, 1))], "no block can be"),
        (vec![(0, entry(6, 0))], "no block can be"),
        (vec![(0, entry(6, 8))], "behind the file's end"),
        (vec![(0, u64::MAX)], "state 7"),
        (vec![(0, u64::MAX - 1)], "behind the file's end"),
    ] {
        let file = Spec { table, ..Spec::default() }.build();
        refused(&file, ErrorKind::Corrupt, word);
        let files = [ImageFile { id: FileId(0), source: &file }];
        let report = format::check(Format::Vhdx, &files).expect("a VHDX").expect("a report");
        assert_eq!(report.exit_code(), 2, "{word}: {report:?}");
    }
}

#[test]
fn what_has_to_be_understood_and_is_not_is_refused() {
    let strange = |region, item| Spec { strange: Some((region, item)), ..Spec::default() }.build();
    assert_eq!(content(&strange(false, false)).len(), 4 << 20);
    refused(&strange(true, false), ErrorKind::Unsupported, "a region");
    refused(&strange(false, true), ErrorKind::Unsupported, "metadata item");
    for (spec, word) in [
        (Spec { block: 3 << 20, ..Spec::default() }, "block size 3145728"),
        (Spec { block: 512, ..Spec::default() }, "block size 512"),
        (Spec { sector: 1024, ..Spec::default() }, "sector size"),
        (Spec { size: 0, ..Spec::default() }, "disk size 0"),
        (Spec { size: 4096 + 512, sector: 4096, ..Spec::default() }, "disk size 4608"),
        (Spec { size: 1 << 40, ..Spec::default() }, "block table"),
    ] {
        refused(&spec.build(), ErrorKind::Corrupt, word);
    }
}

/// Sectors of the third and fourth page of a bitmap, so that pages are loaded where they are needed.
fn diff(sector: u32, name: &'static str) -> (Vec<u8>, Vec<bool>) {
    // blocks 0 to 3, of which the second is there in parts; the bitmap of the first chunk behind as many as it speaks of
    let ratio = (1usize << 23) * sector as usize / MIB;
    let table = vec![(0, entry(6, 4)), (1, entry(7, 5)), (2, entry(2, 0)), (ratio, entry(6, 6))];
    let parent = Some((Uuid::from_u128(0xda7a), name));
    let mib = ratio * 8 / MIB + 8;
    let spec = Spec { sector, table, parent, data_write: Uuid::from_u128(0xd1ff), mib, ..Spec::default() };
    let mut f = spec.build();
    f[4 * MIB..5 * MIB].fill(0xa4);
    f[5 * MIB..6 * MIB].fill(0xa5);
    let sectors = MIB / sector as usize;
    let there: Vec<_> = (0..sectors).map(|i| i % 7 < 3 || i > sectors / 2 + 11).collect();
    for i in (0..sectors).filter(|i| there[*i]) {
        let bit = sectors + i;
        f[6 * MIB + bit / 8] |= 1 << (bit % 8);
    }
    (f, there)
}

#[test]
fn a_block_that_is_there_in_parts_shows_the_parent_between_them() {
    for sector in [512, 4096] {
        let mut base =
            Spec { table: (0..4).map(|i| (i, entry(6, 4 + i))).collect(), sector, ..Spec::default() }.build();
        base[4 * MIB..].fill(0xb0);
        let (diff, there) = diff(sector, "base.vhdx");
        let (below, above) = (open(&base).expect("a base"), open(&diff).expect("a diff"));
        let layers = [
            Layer { map: &*above, bytes: &diff as &dyn ByteSource },
            Layer { map: &*below, bytes: &base as &dyn ByteSource },
        ];
        let all = read_all(&layers);
        assert!(all[..MIB].iter().all(|b| *b == 0xa4));
        for (i, sector) in all[MIB..2 * MIB].chunks(sector as usize).enumerate() {
            let expected = if there[i] { 0xa5 } else { 0xb0 };
            assert!(sector.iter().all(|b| *b == expected), "sector {i}");
        }
        assert!(all[2 * MIB..3 * MIB].iter().all(|b| *b == 0), "zeros hide the parent");
        assert!(all[3 * MIB..].iter().all(|b| *b == 0xb0));
        // without the bitmap nobody knows what is there
        let at = 3 * MIB + (1usize << 23) * sector as usize / MIB * 8;
        let mut without = diff.clone();
        without[at..at + 8].fill(0);
        refused(&without, ErrorKind::Corrupt, "in parts");
    }
}

#[test]
fn a_parent_is_known_by_its_data_write_guid() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let put = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).expect("a file");
    let base = |id: u128| Spec { data_write: Uuid::from_u128(id), ..Spec::default() }.build();
    put("child.vhdx", &diff(512, ".\\base.vhdx").0);
    put("base.vhdx", &base(0xda7a));
    let how = OpenDisk::new(dir.path().join("child.vhdx"));
    assert_eq!(open_disk(&how).expect("a chain").images.len(), 2);
    // the same file, but its contents were changed since
    put("base.vhdx", &base(0xbad));
    assert_eq!(open_disk(&how).map(drop).expect_err("another").kind(), ErrorKind::ParentMismatch);
}

#[test]
fn a_log_lies_over_the_file_until_somebody_writes_it() {
    let mut f = two_blocks();
    let len = f.len() as u64;
    let (one, two) =
        (table_sector(&f, &[(1, entry(6, 5))]), table_sector(&f, &[(1, entry(2, 0)), (0, entry(6, 5))]));
    // near the end of the ring, so that the run wraps
    let first = MIB - 8192;
    let e = |sequence, tail, sectors| Logged { sequence, tail, file_bytes: len, sectors, zeros: &[] };
    let before = content(&f);
    let next = log(&mut f, first, &e(40, first, std::slice::from_ref(&one)));
    assert_eq!(content(&f), before, "a log that nobody speaks of");
    use_log(&mut f);
    let all = content(&f);
    assert!(all[MIB..2 * MIB].iter().all(|b| *b == 2));
    assert_eq!(next, 0);
    let third = log(&mut f, next, &e(41, first, std::slice::from_ref(&two)));
    let all = content(&f);
    assert!(all[..MIB].iter().all(|b| *b == 2) && all[MIB..].iter().all(|b| *b == 0), "the later one wins");
    // one that was torn, one that is out of order, and an older run further on: none of them counts
    let torn = log(&mut f, third, &e(42, first, std::slice::from_ref(&one)));
    f[MIB + third + 5000] ^= 1;
    log(&mut f, torn + 4096, &e(44, first, std::slice::from_ref(&one)));
    log(&mut f, torn + 65536, &e(12, torn + 65536, std::slice::from_ref(&one)));
    assert_eq!(content(&f), all);
    let files = [ImageFile { id: FileId(0), source: &f }];
    let report = format::check(Format::Vhdx, &files).expect("a VHDX").expect("a report");
    assert_eq!(report.exit_code(), 3, "{report:?}");
}

/// After each step, and as if the rest had never happened.
#[test]
fn a_repair_that_is_interrupted_has_changed_nothing() {
    let mut f = two_blocks();
    let len = f.len() as u64;
    let sector = [table_sector(&f, &[(1, entry(6, 5)), (2, entry(2, 0))])];
    let zeros = [(6 * MIB as u64, 2 * MIB as u64)];
    use_log(&mut f);
    log(&mut f, 8192, &Logged { sequence: 9, tail: 8192, file_bytes: len, sectors: &sector, zeros: &zeros });
    // the second table of regions is damaged as well
    f[(256 << 10) + 20] ^= 1;
    let expected = content(&f);
    let plan = |f: &Vec<u8>| {
        let files = [ImageFile { id: FileId(0), source: f as &dyn ByteSource }];
        format::repair(Format::Vhdx, &files).expect("a plan").expect("a plan").steps
    };
    let steps = plan(&f);
    assert!(steps.len() > 10, "{}", steps.len());
    for n in 0..=steps.len() {
        let mut left = f.clone();
        carry_out(steps[..n].to_vec(), &mut left);
        assert!(content(&left) == expected, "after {n} steps");
        let mut again = left.clone();
        carry_out(plan(&left), &mut again);
        assert!(content(&again) == expected, "after {n} steps and another repair");
        assert!(plan(&again).is_empty(), "not clean after {n} steps and another repair");
    }
}

#[test]
fn zeros_in_a_log_and_a_tail_further_on() {
    let mut f = two_blocks();
    let len = f.len() as u64;
    let gone = [(3 * MIB as u64, 4096)];
    let sector = [table_sector(&f, &[(1, entry(6, 5))])];
    use_log(&mut f);
    let next = log(&mut f, 0, &Logged { sequence: 5, tail: 0, file_bytes: len, sectors: &[], zeros: &gone });
    assert!(content(&f).iter().all(|b| *b == 0), "the table was zeroed");
    // the run begins with the second entry: the first has been written to its place already
    log(&mut f, next, &Logged { sequence: 6, tail: next, file_bytes: len, sectors: &sector, zeros: &[] });
    let all = content(&f);
    assert!(all[..MIB].iter().all(|b| *b == 1) && all[MIB..2 * MIB].iter().all(|b| *b == 2));
}

#[test]
fn logs_that_cannot_be_are_refused() {
    let mut f = two_blocks();
    use_log(&mut f);
    let clean = f.clone();
    let len = f.len() as u64;
    let sector = |at: u64| [(at, vec![3; 4096])];
    let with = |file_bytes, sectors: &[(u64, Vec<u8>)]| {
        let mut f = clean.clone();
        log(&mut f, 0, &Logged { sequence: 1, tail: 0, file_bytes, sectors, zeros: &[] });
        f
    };
    refused(&with(len + 1, &sector(3 << 20)), ErrorKind::Corrupt, "the log is of a file");
    refused(&with(len, &sector(64 << 10)), ErrorKind::Unsupported, "headers");
    refused(&with(len, &sector(4 << 20)), ErrorKind::Unsupported, "data of the disk");
    assert_eq!(content(&with(len, &sector(7 << 20))), content(&clean), "a place nobody names");
    let mut with_zeros = |zeros| {
        log(
            &mut f,
            0,
            &Logged { sequence: 1, tail: 0, file_bytes: len, sectors: &[], zeros: &[(3 << 20, zeros)] },
        );
        f.clone()
    };
    refused(&with_zeros(!4095), ErrorKind::Limit, "would write");
    refused(&with_zeros((64 << 20) + 4096), ErrorKind::Limit, "would write");
    assert_eq!(content(&with_zeros(u64::MAX)), content(&clean), "half a sector of zeros makes no entry");
    // a log that is not in use, and not in the file either
    let mut f = two_blocks();
    for at in [64 << 10, 128 << 10] {
        f[at + 72..at + 80].copy_from_slice(&(10u64 << 40).to_le_bytes());
    }
    reseal(&mut f);
    refused(&f, ErrorKind::Corrupt, "not in the file");
}

/// Changes that the checksums do not see: they are made right again.
#[test]
fn any_vhdx_is_read_or_refused() {
    let sound = |r: &mut Random| {
        let mut f = if r.below(2) == 0 { two_blocks() } else { diff(4096, "base.vhdx").0 };
        f.truncate(f.len().min(8 * MIB));
        let (len, sector) = (f.len() as u64, [table_sector(&f, &[(3, entry(6, 7))])]);
        log(&mut f, 4096, &Logged { sequence: 3, tail: 4096, file_bytes: len, sectors: &sector, zeros: &[] });
        f
    };
    let mut opened = 0;
    for seed in 0..120 {
        let mut r = Random(seed);
        let mut f = sound(&mut r);
        for _ in 0..1 + r.below(3) {
            let (at, span) = [
                (64 << 10, 80),
                (192 << 10, 112),
                (2 * MIB, 256),
                (2 * MIB + (64 << 10), 400),
                (3 * MIB, 64),
            ][r.below(5) as usize];
            let at = at + r.below(span) as usize;
            f[at] = [0, 1, 2, 6, 7, 0x10, 0xff, r.below(256) as u8][r.below(8) as usize];
        }
        reseal(&mut f);
        if r.below(2) == 0 {
            use_log(&mut f);
        }
        let seen = std::panic::catch_unwind(|| judge(Format::Vhdx, &f));
        opened += u32::from(seen.unwrap_or_else(|_| panic!("seed {seed}")));
    }
    assert!((20..110).contains(&opened), "{opened} of 120 opened");
}

/// What a repair of these bytes leaves.
fn repaired(file: &[u8]) -> Vec<u8> {
    let mut bytes = file.to_vec();
    let files = [ImageFile { id: FileId(0), source: &file.to_vec() }];
    let steps = format::repair(Format::Vhdx, &files).expect("it can be").expect("a plan").steps;
    carry_out(steps, &mut bytes);
    let files = [ImageFile { id: FileId(0), source: &bytes }];
    let report = format::check(Format::Vhdx, &files).expect("a VHDX").expect("a report");
    assert!(report.is_clean(), "{report:?}");
    bytes
}

#[test]
fn entries_that_cannot_be_are_repaired_and_lose_nothing_that_is_there() {
    // two on each other, and one upon the half of both
    let table = vec![(0, entry(6, 4)), (1, entry(6, 4)), (2, entry(6, 5))];
    let mut f = Spec { table, block: 2 << 20, size: 6 << 20, ..Spec::default() }.build();
    f[4 * MIB..5 * MIB].fill(1);
    f[5 * MIB..6 * MIB].fill(2);
    f[6 * MIB..7 * MIB].fill(3);
    let all = content(&repaired(&f));
    let shown: Vec<_> =
        all.chunks(MIB).map(|m| if m.iter().all(|b| *b == m[0]) { m[0] } else { 99 }).collect();
    assert_eq!(shown, [1, 2, 1, 2, 2, 3]);
    // one on the block table, one behind the file, one that is cut off
    let table = vec![(0, entry(6, 3)), (1, entry(6, 100)), (2, entry(6, 7)), (3, entry(6, 4))];
    let mut f = Spec { table, ..Spec::default() }.build();
    f[4 * MIB..].fill(4);
    f.truncate(7 * MIB + 512);
    let all = content(&repaired(&f));
    assert!(all[..2 * MIB].iter().all(|b| *b == 0) && all[3 * MIB..].iter().all(|b| *b == 4));
    assert!(all[2 * MIB..2 * MIB + 512].iter().all(|b| *b == 4));
    assert!(all[2 * MIB + 512..3 * MIB].iter().all(|b| *b == 0));
}

#[test]
fn a_bitmap_that_is_gone_is_impossible_to_repair() {
    let (mut f, _) = diff(512, ".\\base.vhdx");
    let bitmap = 3 * MIB + 4096 * 8;
    f[bitmap..bitmap + 8].copy_from_slice(&entry(6, 100).to_le_bytes());
    let files = [ImageFile { id: FileId(0), source: &f }];
    let e = format::repair(Format::Vhdx, &files).map(drop).expect_err("nobody knows the parts");
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("cannot be repaired: a bitmap"), "{e}");
}

#[test]
fn what_belongs_to_no_block_and_an_image_that_was_not_closed_are_leaks() {
    let mut f = two_blocks();
    f.truncate(6 * MIB);
    use_log(&mut f);
    let files = [ImageFile { id: FileId(0), source: &f }];
    let report = format::check(Format::Vhdx, &files).expect("a VHDX").expect("a report");
    assert_eq!((report.exit_code(), report.leaks), (3, 2), "{report:?}");
    let before = content(&f);
    let after = repaired(&f);
    assert_eq!(after.len(), 5 * MIB);
    assert!(content(&after) == before);
}

fn vdimg(args: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_vdimg")).args(args).output().expect("it runs");
    assert!(out.status.success(), "vdimg {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn path(p: &Path) -> &str {
    p.to_str().expect("a name")
}

/// Carries out a script on an image.
fn io(p: &Path, commands: &[String]) {
    let args = commands.iter().flat_map(|c| ["-c", c.as_str()]);
    vdimg(&["io", path(p)].into_iter().chain(args).collect::<Vec<_>>());
}

fn commands<const N: usize>(all: [&str; N]) -> [String; N] {
    all.map(str::to_string)
}

fn is_clean(p: &Path) {
    assert!(vdimg(&["check", path(p)]).contains("No errors"), "{}", p.display());
}

#[test]
fn a_log_goes_to_its_places_before_anything_else_is_written() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut f = two_blocks();
    let (len, sector) = (f.len() as u64, [table_sector(&f, &[(1, entry(6, 5)), (500, 77)])]);
    let zeros = [(6 * MIB as u64, 65536)];
    f[6 * MIB..7 * MIB].fill(9);
    log(&mut f, 8192, &Logged { sequence: 9, tail: 8192, file_bytes: len, sectors: &sector, zeros: &zeros });
    use_log(&mut f);
    let mut expected = content(&f);
    let file = dir.path().join("a.vhdx");
    std::fs::write(&file, &f).expect("a file");
    io(&file, &commands(["write -P 3 1M 512", "write -P 4 3M 1k", "flush"]));
    expected[MIB..MIB + 512].fill(3);
    expected[3 * MIB..3 * MIB + 1024].fill(4);
    let now = std::fs::read(&file).expect("a file");
    assert!(content(&now) == expected);
    is_clean(&file);
    // what nobody understands stays in the table, and no header speaks of a log
    assert_eq!(now[3 * MIB + 500 * 8..3 * MIB + 501 * 8], 77u64.to_le_bytes());
    let id = |f: &[u8], at: usize| f[at..at + 16].to_vec();
    for header in [64 << 10, 128 << 10] {
        assert_eq!(id(&now, header + 48), [0; 16]);
        for changed in [16, 32] {
            assert_ne!(id(&now, header + changed), id(&f, header + changed), "GUID at {changed}");
        }
    }
}

#[test]
fn a_block_that_is_there_in_parts_is_made_whole_by_its_first_change() {
    for sector in [512u32, 4096] {
        let dir = tempfile::tempdir().expect("temporary folder");
        let mut base =
            Spec { table: (0..4).map(|i| (i, entry(6, 4 + i))).collect(), sector, ..Spec::default() }.build();
        base[4 * MIB..].fill(0xb0);
        let (diff, there) = diff(sector, ".\\base.vhdx");
        let file = dir.path().join("a.vhdx");
        std::fs::write(dir.path().join("base.vhdx"), &base).expect("a file");
        std::fs::write(&file, &diff).expect("a file");
        io(&file, &commands(["write -P 1 1M 4k", "write -z 3M 1M", "write -P 2 2M 4k", "flush"]));
        let now = std::fs::read(&file).expect("a file");
        let (below, above) = (open(&base).expect("a base"), open(&now).expect("a diff"));
        let layers = [
            Layer { map: &*above, bytes: &now as &dyn ByteSource },
            Layer { map: &*below, bytes: &base as &dyn ByteSource },
        ];
        let all = read_all(&layers);
        for (i, bytes) in all[MIB..2 * MIB].chunks(sector as usize).enumerate() {
            let at = i * sector as usize;
            let expected = if at < 4096 {
                1
            } else if there[i] {
                0xa5
            } else {
                0xb0
            };
            assert!(bytes.iter().all(|b| *b == expected), "sector {i}");
        }
        assert!(all[2 * MIB..2 * MIB + 4096].iter().all(|b| *b == 2));
        assert!(all[2 * MIB + 4096..].iter().all(|b| *b == 0), "zeros hide the parent");
        let state = |block: usize| now[3 * MIB + block * 8] & 7;
        assert_eq!([0, 1, 2, 3].map(state), [6, 6, 6, 2]);
        is_clean(&file);
    }
}

/// More blocks than fit into one log, so that it begins anew.
#[test]
fn a_log_that_is_full_begins_anew() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let file = dir.path().join("a.vhdx");
    let create = ["create", "--format", "vhdx", "--size", "1G", "--option", "block_size=1M", path(&file)];
    vdimg(&create);
    // one after the other, far from each other, then the rest
    let at = |n: u64| n * 389 % 1024;
    let writes: Vec<_> = (0..600).map(|n| format!("write -P {} {}M 512", 1 + n % 250, at(n))).collect();
    io(&file, &writes);
    is_clean(&file);
    let reads: Vec<_> = (0..600).map(|n| format!("read -P {} {}M 512", 1 + n % 250, at(n))).collect();
    io(&file, &reads);
    assert!(vdimg(&["info", path(&file)]).contains("600"));
}

#[test]
fn new_images_are_clean_and_say_what_they_are() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let at = |name: &str| dir.path().join(name);
    let create = |name: &str, more: &[&str]| {
        let file = at(name);
        vdimg(&[&["create", "--format", "vhdx"], more, &[path(&file)]].concat());
        is_clean(&file);
        let source = std::fs::read(&file).expect("a file");
        open(&source).expect("an image").info()
    };
    let dynamic = create("d.vhdx", &["--size", "5M"]);
    assert_eq!(
        (dynamic.variant, dynamic.block_size, dynamic.allocated_blocks),
        ("dynamic", Some(8 << 20), Some(0))
    );
    let fixed = create("f.vhdx", &["--size", "3584k", "--variant", "fixed", "--option", "block_size=1M"]);
    assert_eq!((fixed.variant, fixed.allocated_blocks), ("fixed", Some(4)));
    let big = ["--size", "4M", "--option", "logical_sector_size=4096", "--option", "log_size=2M"];
    assert_eq!(create("s.vhdx", &big).virtual_size, 4 << 20);
    let parent = at("d.vhdx");
    let diff = create("c.vhdx", &["--parent", path(&parent)]);
    assert_eq!((diff.variant, diff.block_size, diff.parent_uuid), ("diff", Some(2 << 20), dynamic.uuid));
    assert_eq!(diff.parent_names, [".\\d.vhdx"]);
    io(
        &at("f.vhdx"),
        &commands(["write -P 7 1M 64k", "read -P 7 1M 64k", "write -z 1M 64k", "read -P 0 1M 64k"]),
    );
    io(&at("c.vhdx"), &commands(["write -P 7 1M 64k", "read -P 7 1M 64k", "read -P 0 2M 3M"]));
    for name in ["f.vhdx", "c.vhdx"] {
        is_clean(&at(name));
    }
}
