//! Plug-ins that do one thing wrong each (tests/fixtures/plugins/hostile.c). Each is an error in one line: no crash, no hang, no read or write
//! elsewhere, and an image that the right plug-in still reads, with every byte that was there before.

mod plugin_support;
mod vdimg_support;

use plugin_support::{example, hostile, root};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Output;
use vdimg_support::{io_ok, ok, scratch, vdimg};

/// It is not loaded.
const LOAD: &[(&str, &str)] = &[
    ("NO_SYMBOL", "no symbol"),
    ("ENTRY_REFUSES", "not today"),
    ("ENTRY_CODE", "4711"),
    ("ENTRY_NULL", "no description"),
    ("ENTRY_ODD", "no description"),
    ("MAGIC_WRONG", "no plug-in of vdblk"),
    ("MAJOR_WRONG", "version 2.0"),
    ("MINOR_WRONG", "version 1.1"),
    ("SIZE_WRONG", "shorter"),
    ("FORMAT_SIZE_WRONG", "shorter"),
    ("FILTER_SIZE_WRONG", "shorter"),
    ("NAME_NULL", "is missing"),
    ("NAME_UTF8", "UTF-8"),
    ("NAME_ENDLESS", "too long"),
    ("NAME_CONTROL", "no text"),
    ("FORMATS_NULL", "nowhere"),
    ("FORMATS_MANY", "at most 16"),
    ("FORMAT_NULL", "no format"),
    ("FILTER_NULL", "no filter"),
    ("NOTHING", "neither"),
    ("FORMAT_NAME", "other characters"),
    ("FORMAT_NAME_TAKEN", "'qcow2' is a format"),
    ("FORMAT_NAME_VPC", "'vpc' is a format"),
    ("FORMAT_TITLE_TAKEN", "is a format"),
    ("EXTENSION_TAKEN", "extension .vdi"),
    ("EXTENSION_NULL", "is missing"),
    ("EXTENSIONS_NONE", "without extensions"),
    ("VARIANTS_NONE", "without variants"),
    ("OPTIONS_NULL", "nowhere"),
    ("NO_OPEN", "function open"),
    ("NO_COMPOSE", "function compose"),
    ("FILTER_NAME_TAKEN", "already"),
    ("FILTER_SECTOR", "4096"),
    ("NO_ON_READ", "all its functions"),
];

/// Images of it do not open.
const OPEN: &[&str] = &[
    "OPEN_NOTHING",
    "OPEN_CODE",
    "OPEN_FOREVER",
    "OPEN_WHY_ENDLESS",
    "OPEN_BEHIND_END",
    "OPEN_WRAPS",
    "OPEN_HUGE",
    "OPEN_EMPTY_RANGE",
    "OPEN_NO_RANGE",
    "OPEN_MANY_RANGES",
    "OPEN_OTHER_FILE",
    "DISK_SIZE",
    "DISK_NO_SIZE",
    "DISK_HUGE",
    "DISK_NO_BLOCK",
    "DISK_BLOCK",
    "DISK_ALIGNMENT",
    "DISK_FLAGS",
    "INFO_CODE",
    "INFO_VARIANT",
    "INFO_UTF8",
    "INFO_ENDLESS",
    "INFO_ALLOCATED",
];

/// Nothing can be read.
const READ: &[&str] = &[
    "MAP_CODE",
    "MAP_NEEDS_ROOM",
    "MAP_NEEDS_PLAN",
    "MAP_BEHIND_END",
    "MAP_WRAPS",
    "MAP_LONG",
    "MAP_EMPTY",
    "MAP_NONE",
    "MAP_MANY",
    "MAP_KIND",
    "MAP_OTHER_FILE",
    "MAP_PACKED",
    "MAP_PACKED_BEYOND",
    "MAP_CODEC",
];

/// Nothing can be written, or not twice.
const WRITE: &[&str] = &[
    "MAP_OVERWRITES_NOTHING",
    "PLAN_CODE",
    "PLAN_NEEDS_ROOM",
    "PLAN_NO_SPACE",
    "PLAN_POINTER_FIRST",
    "PLAN_NO_SYNC",
    "PLAN_BEHIND_END",
    "PLAN_WRAPS",
    "PLAN_OTHER_FILE",
    "PLAN_KIND",
    "PLAN_MANY",
    "PLAN_EMPTY",
    "PLAN_EMPTY_TOKEN",
    "PLAN_HALF",
    "PLAN_TWICE",
    "PLAN_OTHER_BYTES",
    "PLAN_TRUNCATES",
    "PLAN_EXTENDS",
    "PLAN_PUNCHES",
    "PLAN_MOVES",
    "PLAN_CLEAN",
    "PLAN_KEY",
    "PLAN_TABLE",
    "PLAN_OP",
    "PLAN_OP_FLAG",
    "ROOM_CODE",
    "ROOM_NO_TOKEN",
    "ROOM_FAR",
    "ROOM_BACK",
    "ROOM_HUGE",
    "ROOM_WRAPS",
    "ROOM_WRITES",
    "COMPOSE_CODE",
    "COMPOSE_BEHIND_END",
    "COMPOSE_WRAPS",
    "COMPOSE_LONG",
    "COMPOSE_EMPTY",
    "COMPOSE_OTHER_FILE",
    "COMPOSE_WANDERS",
    "BEGIN_CODE",
    "BEGIN_NO_TOKEN",
    "BEGIN_CUTS_AT_ONCE",
    "BEGIN_LENGTHENS",
];

/// Everything is written, and the close left out.
const CLOSE: &[&str] = &["END_CODE", "END_FOREVER", "END_CUTS_AT_ONCE", "END_LENGTHENS", "END_OVERLAPS"];

/// No check.
const CHECK: &[&str] =
    &["CHECK_CODE", "CHECK_NULL", "CHECK_UTF8", "CHECK_ENDLESS", "CHECK_SEVERITY", "CHECK_COUNTS"];

/// No image is made.
const CREATE: &[&str] = &[
    "CREATE_CODE",
    "CREATE_NOTHING",
    "CREATE_BEHIND_END",
    "CREATE_WRAPS",
    "CREATE_NULL",
    "CREATE_HUGE",
    "CREATE_LENGTH",
    "CREATE_RESERVES",
    "CREATE_NO_HOST",
];

/// No disk is opened behind it.
const FILTER: &[&str] =
    &["FILTER_CODE", "FILTER_OVERRUNS", "FILTER_UNDERRUNS", "FILTER_CHAINS", "FILTER_ONE_WAY"];

/// Odd, and without a consequence.
const HARMLESS: &[&str] = &["PLAN_TOKEN", "CHECK_NO_HOST"];

fn run(dir: &Path, args: &str) -> Output {
    vdimg(dir, args).output().expect("start vdimg")
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).to_string()
}

/// It has ended with an error, in its own way.
fn refused(case: &str, out: &Output) -> String {
    let said = said(out);
    assert_eq!(out.status.code(), Some(1), "{case}: {}: {said}", out.status);
    assert!(!said.contains("panicked"), "{case}: {said}");
    said
}

/// A folder with the right plug-in and two images of its format: one by itself, one over a VDI full of data.
fn images(dir: &Path) {
    example(dir);
    let p = "--plugin vdblk-plugin-example.so";
    ok(dir, "create --format vdi --size 1M base.vdi");
    io_ok(dir, "base.vdi", &["write -P 0x33 0 1M"]);
    ok(dir, &format!("{p} create --format blkmap --size 1M -o block_size=64k alone.blkmap"));
    ok(dir, &format!("{p} create --format blkmap --parent base.vdi -o block_size=64k diff.blkmap"));
    for image in ["alone", "diff"] {
        io_ok(dir, &format!("{p} {image}.blkmap"), &["write -P 0x11 64k 64k"]);
        std::fs::copy(dir.join(format!("{image}.blkmap")), dir.join(format!("{image}.kept"))).unwrap();
    }
}

/// A fresh copy of the image.
fn fresh(dir: &Path, image: &str) {
    std::fs::copy(dir.join(format!("{image}.kept")), dir.join(format!("{image}.blkmap"))).unwrap();
}

/// What the right plug-in shows of it, which finds no damage.
fn shown(dir: &Path, case: &str, image: &str) -> Vec<u8> {
    let p = "--plugin vdblk-plugin-example.so";
    let check = run(dir, &format!("{p} check {image}.blkmap"));
    assert!([Some(0), Some(3)].contains(&check.status.code()), "{case}: {check:?}");
    let cat = run(dir, &format!("{p} cat {image}.blkmap"));
    assert!(cat.status.success(), "{case}: {cat:?}");
    cat.stdout
}

#[test]
fn they_are_not_loaded() {
    let dir = scratch();
    for (case, what) in LOAD {
        let path = hostile(dir.path(), case);
        let said = refused(case, &run(dir.path(), &format!("formats --plugin {}", path.display())));
        assert!(said.contains(what), "{case}: {said}");
    }
}

#[test]
fn their_images_do_not_open() {
    let dir = scratch();
    let d = dir.path();
    images(d);
    for case in OPEN {
        let p = format!("--plugin {}", hostile(d, case).display());
        let said = refused(case, &run(d, &format!("{p} cat -f bad alone.blkmap")));
        assert!(said.contains("plug-in") || *case == "OPEN_WHY_ENDLESS", "{case}: {said}");
        refused(case, &run(d, &format!("{p} info -f bad alone.blkmap")));
    }
}

#[test]
fn their_images_are_not_read() {
    let dir = scratch();
    let d = dir.path();
    images(d);
    for case in READ {
        let p = format!("--plugin {}", hostile(d, case).display());
        for command in ["cat", "map"] {
            refused(case, &run(d, &format!("{p} {command} -f bad alone.blkmap")));
        }
        let said = refused(case, &run(d, &format!("{p} convert -f bad alone.blkmap {case}.raw")));
        assert!(said.contains("contradicts") || said.contains("wrong answer"), "{case}: {said}");
    }
}

#[test]
fn their_images_are_not_written() {
    let dir = scratch();
    let d = dir.path();
    images(d);
    for case in WRITE {
        let p = format!("--plugin {}", hostile(d, case).display());
        for (image, beneath) in [("alone", 0), ("diff", 0x33)] {
            // what only a block that is copied up shows
            if image == "alone" && ["PLAN_NO_SYNC", "PLAN_POINTER_FIRST"].contains(case) {
                continue;
            }
            fresh(d, image);
            let mut c = vdimg(d, &format!("{p} io -f bad {image}.blkmap"));
            let writes =
                ["write -P 0x44 0 4096", "write -P 0x55 256k 4096", "write -P 0x66 68k 4096", "flush"];
            writes.iter().for_each(|w| {
                c.args(["-c", w]);
            });
            refused(&format!("{case} {image}"), &c.output().unwrap());
            let bytes = shown(d, case, image);
            for (n, sector) in bytes.chunks(512).enumerate() {
                let (old, new) = match n * 512 {
                    at if at < 4096 => (beneath, 0x44),
                    at if (256 << 10..260 << 10).contains(&at) => (beneath, 0x55),
                    at if (68 << 10..72 << 10).contains(&at) => (0x11, 0x66),
                    at if (64 << 10..128 << 10).contains(&at) => (0x11, 0x11),
                    _ => (beneath, beneath),
                };
                let is = |b: u8| sector.iter().all(|s| *s == b);
                assert!(is(old) || is(new), "{case} {image}: sector {n}: {:x}", sector[0]);
            }
        }
    }
}

#[test]
fn their_close_is_left_out() {
    let dir = scratch();
    let d = dir.path();
    images(d);
    for case in CLOSE {
        let p = format!("--plugin {}", hostile(d, case).display());
        for image in ["alone", "diff"] {
            fresh(d, image);
            let mut c = vdimg(d, &format!("{p} io -f bad {image}.blkmap"));
            let out = c.args(["-c", "write -P 0x44 0 4096"]).output().unwrap();
            assert!(out.status.code().is_some_and(|c| c < 2), "{case}: {out:?}");
            assert!(said(&out).contains("wrong answer"), "{case}: {out:?}");
            let bytes = shown(d, case, image);
            assert!(bytes[..4096].iter().all(|b| *b == 0x44), "{case} {image}");
            assert!(bytes[64 << 10..128 << 10].iter().all(|b| *b == 0x11), "{case} {image}");
        }
    }
}

#[test]
fn their_checks_and_new_images_are_refused() {
    let dir = scratch();
    let d = dir.path();
    images(d);
    for case in CHECK {
        let p = format!("--plugin {}", hostile(d, case).display());
        let said = refused(case, &run(d, &format!("{p} check -f bad alone.blkmap")));
        assert!(said.contains("plug-in"), "{case}: {said}");
    }
    for case in CREATE {
        let p = format!("--plugin {}", hostile(d, case).display());
        refused(case, &run(d, &format!("{p} create --format bad --size 1M {case}.bad")));
        assert!(!d.join(format!("{case}.bad")).exists(), "{case}");
        let listed = run(d, &format!("formats {p}"));
        assert!(listed.status.success(), "{case}: {listed:?}");
    }
}

#[test]
fn their_filters_are_not_opened() {
    let dir = scratch();
    let d = dir.path();
    std::fs::write(d.join("a.raw"), [1; 65536]).unwrap();
    for case in FILTER {
        let p = format!("--plugin {}", hostile(d, case).display());
        let said = refused(case, &run(d, &format!("{p} cat --filter BAD a.raw")));
        assert!(said.contains("plug-in"), "{case}: {said}");
    }
}

#[test]
fn what_is_only_odd_does_no_harm() {
    let dir = scratch();
    let d = dir.path();
    images(d);
    for case in HARMLESS {
        let p = format!("--plugin {}", hostile(d, case).display());
        fresh(d, "diff");
        io_ok(d, &format!("{p} -f bad diff.blkmap"), &["write -P 0x44 0 4096", "write -P 0x44 256k 4096"]);
        ok(d, &format!("{p} check -f bad diff.blkmap"));
        let bytes = shown(d, case, "diff");
        assert!(bytes[..4096].iter().all(|b| *b == 0x44) && bytes[4096] == 0x33, "{case}");
    }
}

#[test]
fn every_wrong_is_tried() {
    let text = std::fs::read_to_string(root().join("tests/fixtures/plugins/hostile.c")).unwrap();
    let written: BTreeSet<_> = text.lines().filter_map(|l| l.strip_prefix("#ifdef ")).collect();
    let tried: BTreeSet<_> = LOAD
        .iter()
        .map(|(case, _)| *case)
        .filter(|case| *case != "NO_SYMBOL")
        .chain([OPEN, READ, WRITE, CLOSE, CHECK, CREATE, FILTER, HARMLESS].concat())
        .collect();
    assert!(tried.len() > 100);
    assert_eq!(written, tried);
}
