//! Images whose bytes lie at odd places of the file (packed clusters and chunks, blocks of a CD), read past the page cache.

mod format_support;

use format_support::{dmg_fixtures, qcow2_fixtures};
use std::path::{Path, PathBuf};
use vdblk::job::{Watch, compare_disks};
use vdblk::vd::{OpenDisk, open_disk};

/// The images of a folder whose names begin so, copied to a file system that knows unbuffered I/O.
fn copies(from: &Path, to: &Path, start: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(from).expect("fixtures").map(|e| e.expect("an entry").path());
    let mine =
        |p: &PathBuf| p.is_file() && p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(start));
    let copy = |p: PathBuf| {
        let copy = to.join(p.file_name().expect("a file"));
        std::fs::copy(&p, &copy).expect("a copy");
        copy
    };
    entries.filter(mine).map(copy).collect()
}

/// Both ways show the same. What is shown past the cache is compared whole.
fn shows_the_same_past_the_cache(path: &Path) {
    let open = |direct| open_disk(&OpenDisk { direct, ..OpenDisk::new(path) });
    let (direct, cached) = (open(true), open(false).expect("an image that opens"));
    let direct = direct.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert!(direct.disk.size_bytes() > 0);
    let mut watch = Watch { cancelled: &|| false, progress: &mut |_| () };
    let found = compare_disks(&direct.disk, &cached.disk, &mut watch).expect("both can be read");
    assert_eq!(found.difference, None, "{}", path.display());
}

#[test]
fn packed_bytes_at_odd_places_are_read_past_the_cache() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary folder");
    let mut images = copies(dmg_fixtures(), dir.path(), "dmg-");
    assert!(images.len() >= 5, "{images:?}");
    images.extend(copies(qcow2_fixtures(), dir.path(), "packed-"));
    images.iter().for_each(|image| shows_the_same_past_the_cache(image));
}

/// A disc of three tracks by hand: what is shown is the data of each block, and nothing around it.
struct Disc {
    dir: tempfile::TempDir,
    shown: Vec<u8>,
}

impl Disc {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary folder");
        let (mut bin, mut shown) = (Vec::new(), Vec::new());
        let byte = |n: usize| u8::try_from(n * 7 % 251).expect("below 251");
        let mut block = |before: usize, data: usize, after: usize, is_shown: bool| {
            bin.extend(std::iter::repeat_n(0xee, before));
            let from = bin.len();
            bin.extend((from..from + data).map(byte));
            if is_shown {
                shown.extend_from_slice(&bin[from..]);
            }
            bin.extend(std::iter::repeat_n(0xee, after));
        };
        (0..40).for_each(|_| block(16, 2048, 288, true));
        (0..9).for_each(|_| block(0, 2352, 0, true));
        (0..11).for_each(|_| block(24, 2048, 280, true));
        std::fs::write(dir.path().join("disc one.bin"), &bin).expect("the blocks");
        let other: Vec<u8> = (0..30 * 2048).map(|n| byte(n / 3)).collect();
        shown.extend_from_slice(&other);
        std::fs::write(dir.path().join("two.bin"), &other).expect("the blocks");
        shown.resize(shown.len().next_multiple_of(512), 0);
        let disc = Disc { dir, shown };
        disc.write_sheet(
            "REM by hand\nFILE \"disc one.bin\" BINARY\n  TRACK 01 MODE1/2352\n    INDEX 01 00:00:00\n  TRACK 02 AUDIO\n    \
             INDEX 00 00:00:40\n    INDEX 01 00:00:44\n  TRACK 03 MODE2/2352\n    INDEX 01 00:00:49\nFILE two.bin BINARY\n  \
             TRACK 04 MODE1/2048\n    PREGAP 00:00:02\n    INDEX 01 00:00:00\n",
        );
        disc
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disc.cue")
    }

    fn write_sheet(&self, text: &str) {
        std::fs::write(self.path(), text).expect("the sheet");
    }

    fn vdimg(&self, args: &[&str]) -> std::process::Output {
        let vdimg = std::process::Command::new(env!("CARGO_BIN_EXE_vdimg"))
            .args(args)
            .current_dir(self.dir.path())
            .output();
        vdimg.expect("vdimg")
    }
}

#[test]
fn a_disc_shows_the_data_of_its_tracks() {
    let disc = Disc::new();
    // an image of a disc is only read, but whoever makes it has to write it
    for target in ["out.raw", "out.iso"] {
        let done = disc.vdimg(&["convert", "--output-format", "raw", "disc.cue", target]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let out = std::fs::read(disc.dir.path().join(target)).expect("what was shown");
        assert_eq!(out.len(), disc.shown.len());
        assert_eq!(out.iter().zip(&disc.shown).position(|(a, b)| a != b), None);
    }
    shows_the_same_past_the_cache(&disc.path());
    let info = disc.vdimg(&["info", "--output", "json", "disc.cue"]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).expect("JSON");
    assert_eq!((info["format"].as_str(), info["device_type"].as_str()), (Some("cue"), Some("dvd")));
    let regions = info["regions"].as_array().expect("a list").iter();
    let regions: Vec<_> = regions
        .map(|r| (r["start"].as_u64(), r["blocks"].as_u64(), r["block_size"].as_u64(), r["form"].as_str()))
        .collect();
    let region = |start, blocks, size, form| (Some(start), Some(blocks), Some(size), Some(form));
    assert_eq!(
        regions,
        [
            region(0, 40, 2352, "mode1/2352"),
            region(40, 4, 2352, "pause"),
            region(44, 5, 2352, "audio"),
            region(49, 11, 2352, "mode2/2352"),
            region(60, 2, 2048, "mode1/2048"),
            region(62, 30, 2048, "mode1/2048"),
        ]
    );
    let written = disc.vdimg(&["io", "-c", "write 0 512", "disc.cue"]);
    assert!(!written.status.success(), "a disc was written to");
}

#[test]
fn files_of_a_disc_lie_in_its_own_folder() {
    let disc = Disc::new();
    std::fs::write(disc.dir.path().join("short.bin"), vec![1; 2047]).expect("a file");
    for (name, why) in [
        ("../two.bin", "not in its own folder"),
        ("/etc/passwd", "not in its own folder"),
        ("gone.bin", "is missing"),
        ("disc.cue", "itself"),
        ("short.bin", "ends before its track 1"),
    ] {
        disc.write_sheet(&format!("FILE \"{name}\" BINARY\nTRACK 01 MODE1/2048\nINDEX 01 00:00:00\n"));
        let done = disc.vdimg(&["map", "disc.cue"]);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success() && said.contains(why), "{name}: {said}");
    }
}

/// A CD's file system makes a raw image of a file by its name, which is only read whoever asks for more.
#[test]
fn an_iso_is_only_read() {
    let disc = Disc::new();
    let mut iso = vec![0u8; 40 * 2048];
    iso[16 * 2048 + 1..16 * 2048 + 6].copy_from_slice(b"CD001");
    std::fs::write(disc.dir.path().join("a.iso"), &iso).expect("an image");
    let info = disc.vdimg(&["info", "--output", "json", "a.iso"]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).expect("JSON");
    assert_eq!((info["format"].as_str(), info["device_type"].as_str()), (Some("raw"), Some("dvd")));
    for format in [&[][..], &["--format", "raw"]] {
        let written = disc.vdimg(&[&["io", "-c", "write 0 512"], format, &["a.iso"]].concat());
        assert!(!written.status.success(), "a CD was written to");
    }
    assert_eq!(std::fs::read(disc.dir.path().join("a.iso")).expect("the image"), iso);
    std::fs::write(disc.dir.path().join("a.img"), vec![0u8; 1_474_560]).expect("an image");
    let info = disc.vdimg(&["info", "--format", "raw", "a.img"]);
    assert!(String::from_utf8_lossy(&info.stdout).contains("device: floppy"));
}
