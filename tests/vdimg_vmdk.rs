//! VMDKs through `vdimg`, with QEMU as judge and as the one who writes in between.

mod vdimg_support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use vdimg_support::*;

/// Our variant, and what QEMU calls it.
const VARIANTS: [(&str, &str); 5] = [
    ("sparse", "monolithicSparse"),
    ("flat", "monolithicFlat"),
    ("split2g", "twoGbMaxExtentSparse"),
    ("split2g-flat", "twoGbMaxExtentFlat"),
    ("esx", "monolithicFlat"),
];

fn qemu_io(dir: &Path, image: &str, commands: &[&str]) {
    let mut q = Command::new("qemu-io");
    q.current_dir(dir).args(["-f", "vmdk"]);
    for c in commands {
        q.args(["-c", c]);
    }
    let said = succeeded("qemu-io", q.arg(image).output().expect("start"));
    assert!(!said.contains("failed"), "{said}");
}

/// What a check says that ends like this.
fn check(d: &Path, status: i32) -> String {
    let out = run(d, "check a.vmdk");
    assert_eq!(out.status.code(), Some(status), "{}", text(&out.stdout));
    text(&out.stdout)
}

/// The disk as a raw file.
fn content(d: &Path, image: &str) -> Vec<u8> {
    ok(d, &format!("convert --output-format raw {image} content.raw"));
    let bytes = fs::read(d.join("content.raw")).expect("read");
    fs::remove_file(d.join("content.raw")).expect("remove");
    bytes
}

#[test]
fn every_variant_goes_there_and_back() {
    let dir = scratch();
    let d = dir.path();
    let sizes = [512, 1536, 9 * MIB + 512, 33 * MIB];
    for (seed, size) in (0..).zip(sizes) {
        let model = random_raw(&d.join("s.raw"), size, &mut Rng(seed));
        for (variant, _) in VARIANTS {
            let folder = d.join("v");
            fs::create_dir(&folder).expect("folder");
            ok(d, &format!("convert --variant {variant} --output-format vmdk s.raw v/m.vmdk"));
            ok(d, "check v/m.vmdk");
            ok(d, "compare s.raw v/m.vmdk");
            let info: serde_json::Value =
                serde_json::from_str(&ok(d, "info --output json v/m.vmdk")).expect("JSON");
            assert_eq!(info["variant"], variant, "{info}");
            assert!(content(d, "v/m.vmdk") == model, "{size} {variant}");
            fs::remove_dir_all(&folder).expect("remove");
        }
        fs::remove_file(d.join("s.raw")).expect("remove");
    }
}

#[test]
fn qemu_reads_and_writes_what_we_make() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let dir = scratch();
    let d = dir.path();
    for (seed, (variant, _)) in (1..).zip(VARIANTS) {
        let options: &[&str] = match variant {
            "sparse" => &["", "--option zeroed_grain=on", "--option grain_size=4K"],
            _ => &[""],
        };
        for option in options {
            let folder = d.join("v");
            fs::create_dir(&folder).expect("folder");
            let mut model = random_raw(&d.join("s.raw"), 9 * MIB + 512, &mut Rng(seed));
            ok(d, &format!("convert --variant {variant} {option} --output-format vmdk s.raw v/m.vmdk"));
            tool(d, "qemu-img", "compare -q -f raw -F vmdk s.raw v/m.vmdk");
            if variant != "esx" {
                tool(d, "qemu-img", "check -q -f vmdk v/m.vmdk");
            }
            // each goes on where the other stopped
            qemu_io(d, "v/m.vmdk", &["write -P 7 1M 300k", "write -P 8 5000k 70k"]);
            model[1 << 20..(1 << 20) + (300 << 10)].fill(7);
            model[5000 << 10..5070 << 10].fill(8);
            io_ok(
                d,
                "v/m.vmdk",
                &["read -P 7 1M 300k", "write -P 9 2M 1M", "write -z 3M 64k", "discard 6M 64k", "flush"],
            );
            model[2 << 20..3 << 20].fill(9);
            model[3 << 20..(3 << 20) + (64 << 10)].fill(0);
            model[6 << 20..(6 << 20) + (64 << 10)].fill(0);
            ok(d, "check v/m.vmdk");
            tool(d, "qemu-img", "convert -f vmdk -O raw v/m.vmdk q.raw");
            assert!(fs::read(d.join("q.raw")).expect("read") == model, "{variant} {option}");
            assert!(content(d, "v/m.vmdk") == model, "{variant} {option}");
            fs::remove_dir_all(&folder).expect("remove");
            ["s.raw", "q.raw"].iter().for_each(|f| fs::remove_file(d.join(f)).expect("remove"));
        }
    }
}

#[test]
fn we_read_and_write_what_qemu_makes() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let dir = scratch();
    let d = dir.path();
    let formats = VARIANTS.iter().map(|(_, f)| format!("subformat={f}"));
    let more = ["zeroed_grain=on", "compat6"].map(str::to_string);
    for (seed, options) in (10..).zip(formats.take(4).chain(more)) {
        let folder = d.join("v");
        fs::create_dir(&folder).expect("folder");
        random_raw(&d.join("s.raw"), 9 * MIB + 512, &mut Rng(seed));
        tool(d, "qemu-img", &format!("convert -f raw -O vmdk -o {options} s.raw v/q.vmdk"));
        ok(d, "check v/q.vmdk");
        ok(d, "compare s.raw v/q.vmdk");
        io_ok(d, "v/q.vmdk", &["write -P 3 1M 3M", "write -z 2M 64k", "write -P 4 9M 512"]);
        ok(d, "check v/q.vmdk");
        qemu_io(
            d,
            "v/q.vmdk",
            &["read -P 3 1M 1M", "read -P 0 2M 64k", "read -P 4 9M 512", "write -P 5 5M 64k"],
        );
        io_ok(d, "--read-only v/q.vmdk", &["read -P 5 5M 64k", "read -P 3 3M 1M"]);
        fs::remove_dir_all(&folder).expect("remove");
        fs::remove_file(d.join("s.raw")).expect("remove");
    }
}

/// Streams are written once, by a conversion: QEMU, 7-Zip and we read what was there.
#[test]
fn streams_hold_what_was_converted() {
    let dir = scratch();
    let d = dir.path();
    for (seed, size) in (20..).zip([512, 1536, 65536, 9 * MIB + 512, 70 * MIB + 4096]) {
        let model = random_raw(&d.join("s.raw"), size, &mut Rng(seed));
        ok(d, "convert --variant stream --output-format vmdk s.raw a.vmdk");
        ok(d, "check a.vmdk");
        ok(d, "compare s.raw a.vmdk");
        assert!(content(d, "a.vmdk") == model, "{size}");
        let info: serde_json::Value =
            serde_json::from_str(&ok(d, "info --output json a.vmdk")).expect("JSON");
        assert_eq!(info["variant"], "stream", "{info}");
        if has("qemu-img") {
            tool(d, "qemu-img", "compare -q -f raw -F vmdk s.raw a.vmdk");
            tool(d, "qemu-img", "check -q -f vmdk a.vmdk");
        }
        if has("7z") {
            tool(d, "7z", "e -y -bd -o7 a.vmdk");
            let made = fs::read_dir(d.join("7")).expect("folder").next().expect("a file").expect("a file");
            assert!(fs::read(made.path()).expect("read") == model, "{size} by 7-Zip");
            fs::remove_dir_all(d.join("7")).expect("remove");
        }
        let mut io = Command::new(env!("CARGO_BIN_EXE_vdimg"));
        io.current_dir(d).args(["io", "-c", "write 0 512", "a.vmdk"]);
        let out = io.output().expect("start");
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(1));
        assert!(said.contains("only read") && said.lines().count() == 1, "{said}");
        // and on into another one
        ok(d, "convert --variant stream --output-format vmdk a.vmdk b.vmdk");
        ok(d, "compare s.raw b.vmdk");
        ["s.raw", "a.vmdk", "b.vmdk"].iter().for_each(|f| fs::remove_file(d.join(f)).expect("remove"));
    }
    let said = fails(d, 1, "create --format vmdk --variant stream --size 1M a.vmdk");
    assert!(said.contains("written once") && said.contains("vdimg convert"), "{said}");
    fs::write(d.join("s.raw"), [0; 512]).expect("write");
    let said =
        fails(d, 1, "convert --variant stream --option grain_size=4K --output-format vmdk s.raw a.vmdk");
    assert!(said.contains("unknown option"), "{said}");
    assert!(!d.join("a.vmdk").exists());
}

/// Whatever a killed conversion leaves is no image: its first sector is written when all else is durable.
#[test]
fn a_stream_that_was_not_finished_does_not_open() {
    let dir = scratch();
    let d = dir.path();
    random_raw(&d.join("s.raw"), 64 * MIB, &mut Rng(3));
    let mut left = 0;
    for wait in [30, 100, 200, 300] {
        let args = ["convert", "--variant", "stream", "--output-format", "vmdk", "s.raw", "a.vmdk"];
        let mut child =
            Command::new(env!("CARGO_BIN_EXE_vdimg")).current_dir(d).args(args).spawn().expect("start");
        std::thread::sleep(std::time::Duration::from_millis(wait));
        child.kill().expect("kill");
        if child.wait().expect("wait").success() {
            ok(d, "compare s.raw a.vmdk"); // it was quicker
        } else if d.join("a.vmdk").exists() {
            left += 1;
            fails(d, 1, "info a.vmdk");
            if has("qemu-img") {
                let out =
                    Command::new("qemu-img").current_dir(d).args(["info", "-f", "vmdk", "a.vmdk"]).output();
                assert!(!out.expect("start").status.success());
            }
        }
        let _ = fs::remove_file(d.join("a.vmdk"));
    }
    assert!(left > 0, "every conversion was quicker than its kill, or had not begun");
}

/// VirtualBox's diffs say neither the parent's content ID nor its name; ours do, so QEMU chains them (its bug 7).
#[test]
fn a_diff_names_its_parent_for_everybody() {
    let dir = scratch();
    let d = dir.path();
    let model = random_raw(&d.join("s.raw"), 3 * MIB, &mut Rng(5));
    ok(d, "convert --output-format vmdk s.raw base.vmdk");
    for (name, options) in [("a", ""), ("b", "--option zeroed_grain=on"), ("c", "--variant split2g")] {
        let file = format!("{name}.vmdk");
        ok(d, &format!("create --format vmdk {options} --parent base.vmdk {file}"));
        io_ok(d, &file, &["write -P 6 1000k 10k", "write -z 2M 128k"]);
        let mut expected = model.clone();
        expected[1000 << 10..1010 << 10].fill(6);
        expected[2 << 20..(2 << 20) + (128 << 10)].fill(0);
        ok(d, &format!("check {file}"));
        assert!(content(d, &file) == expected, "{name}");
        if has("qemu-img") {
            tool(d, "qemu-img", &format!("convert -f vmdk -O raw {file} q.raw"));
            assert!(fs::read(d.join("q.raw")).expect("read") == expected, "{name} by QEMU");
        }
        let text = String::from_utf8_lossy(&fs::read(d.join(&file)).expect("read")).into_owned();
        assert!(
            text.contains("parentFileNameHint=\"base.vmdk\"") && !text.contains("parentCID=ffffffff"),
            "{name}"
        );
    }
    // over a VDI there is no content id, but a UUID
    ok(d, "convert --output-format vdi s.raw base.vdi");
    ok(d, "create --format vmdk --parent base.vdi over.vmdk");
    io_ok(d, "over.vmdk", &["write -P 1 0 512"]);
    assert!(content(d, "over.vmdk")[512..] == model[512..]);
    // and a base that was written to since is another one
    io_ok(d, "--allow-write-to-parent base.vmdk", &["write -P 1 0 512"]);
    let id = |f: &str| {
        let text = ok(d, &format!("info --output json --allow-parent-mismatch {f}"));
        serde_json::from_str::<serde_json::Value>(&text).expect("JSON")
    };
    assert_ne!(id("base.vmdk"), serde_json::Value::Null);
}

/// A session that writes gives the contents another content id and leaves no mark.
#[test]
fn each_session_changes_the_content_id_once() {
    let dir = scratch();
    let d = dir.path();
    for variant in ["sparse", "flat"] {
        let file = format!("{variant}.vmdk");
        ok(d, &format!("create --format vmdk --size 1M --variant {variant} {file}"));
        let cid = || {
            let text = String::from_utf8_lossy(&fs::read(d.join(&file)).expect("read")).into_owned();
            let at = text.find("\nCID=").expect("a content ID") + 5;
            text[at..at + 8].to_string()
        };
        let len = fs::metadata(d.join(&file)).expect("there").len();
        let before = cid();
        ok(d, &format!("check {file}"));
        io_ok(d, &format!("--read-only {file}"), &["read 0 1M"]);
        assert_eq!(cid(), before, "reading changes nothing");
        io_ok(d, &file, &["write -P 1 0 4096"]);
        assert_ne!(cid(), before);
        if variant == "flat" {
            assert_eq!(fs::metadata(d.join(&file)).expect("there").len(), len, "in as many bytes");
        }
        ok(d, &format!("check {file}"));
    }
}

/// Damage that a repair puts right, without touching what reads right.
#[test]
fn repair_brings_back_what_is_there() {
    let dir = scratch();
    let d = dir.path();
    let model = random_raw(&d.join("s.raw"), 3 * MIB, &mut Rng(8));
    ok(d, "convert --output-format vmdk s.raw a.vmdk");
    let clean = fs::read(d.join("a.vmdk")).expect("read");
    let word = |at: usize| u32::from_le_bytes(clean[at..at + 4].try_into().expect("4 bytes")) as u64;
    let (copy, main) = (word(21 * 512) * 512, word(26 * 512) * 512);
    let grain = (0..48).find(|g| word((main + g * 4) as usize) != 0).expect("a grain");
    let damaged = |writes: &[(u64, Vec<u8>)]| {
        fs::write(d.join("a.vmdk"), &clean).expect("write");
        let f = fs::OpenOptions::new().write(true).open(d.join("a.vmdk")).expect("open");
        writes.iter().for_each(|(at, b)| f.write_all_at(b, *at).expect("write"));
    };
    let far = 0x7fff_ff00u32.to_le_bytes().to_vec();
    // the table names a place behind the end, the copy the right one
    damaged(&[(main + grain * 4, far.clone())]);
    let said = check(d, 2);
    assert!(said.contains("behind the file's end"), "{said}");
    assert_eq!(run(d, "repair --dry-run a.vmdk").status.code(), Some(2));
    check(d, 2); // a dry run changes nothing
    ok(d, "repair a.vmdk");
    ok(d, "check a.vmdk");
    assert!(content(d, "a.vmdk") == model);
    // the copy differs, the mark is set, the file is longer
    damaged(&[(copy + grain * 4, far.clone()), (72, vec![1]), (clean.len() as u64 + (1 << 20), vec![1])]);
    let said = check(d, 3);
    assert!(said.contains("0 corruptions") && said.contains("redundant tables differ"), "{said}");
    assert!(content(d, "a.vmdk") == model);
    ok(d, "repair a.vmdk");
    ok(d, "check a.vmdk");
    assert!(content(d, "a.vmdk") == model);
    // a session that writes puts the copies right by itself
    damaged(&[(copy + grain * 4, far)]);
    io_ok(d, "a.vmdk", &["write -P 1 0 512", "write -P 2 0 512"]);
    ok(d, "check a.vmdk");
    // two grains at one place: told, and left alone
    let other = (grain + 1..48).find(|g| word((main + g * 4) as usize) != 0).expect("another grain");
    let place = (word((main + grain * 4) as usize) as u32).to_le_bytes().to_vec();
    damaged(&[(main + other * 4, place.clone()), (copy + other * 4, place)]);
    let said = check(d, 2);
    assert!(said.contains("upon each other"), "{said}");
    let before = fs::read(d.join("a.vmdk")).expect("read");
    fails(d, 1, "repair a.vmdk");
    assert!(fs::read(d.join("a.vmdk")).expect("read") == before);
}

#[test]
fn what_cannot_be_made_is_said() {
    let dir = scratch();
    let d = dir.path();
    for (args, word) in [
        ("--size 3T a.vmdk", "split2g or flat"),
        ("--size 1M --variant rawdisk a.vmdk", "raw disks"),
        ("--size 1M --variant big a.vmdk", "unknown variant"),
        ("--size 1M --option grain_size=5K a.vmdk", "power of two"),
        ("--size 1M --option zeroed_grain=maybe a.vmdk", "on or off"),
        ("--size 1M --variant flat --option zeroed_grain=on a.vmdk", "no grains"),
        ("--size 1M a\"b.vmdk", "quotes"),
    ] {
        let said = fails(d, 1, &format!("create --format vmdk {args}"));
        assert!(said.contains(word), "{args}: {said}");
    }
    assert_eq!(fs::read_dir(d).expect("folder").count(), 0, "nothing is left");
}

/// 2 TiB less what metadata need: tables of 128 MB, of which 16 MiB are kept.
#[test]
fn a_large_disk_is_written_page_by_page() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vmdk --size 2047G a.vmdk");
    io_ok(
        d,
        "a.vmdk",
        &["write -P 1 0 64k", "write -P 2 2000G 1M", "write -P 3 1000G 512", "flush", "read -P 2 2000G 1M"],
    );
    ok(d, "check a.vmdk");
    io_ok(
        d,
        "a.vmdk",
        &["read -P 1 0 64k", "read -P 3 1000G 512", "read -P 0 1500G 1M", "write -P 4 1000G 1k"],
    );
    ok(d, "check a.vmdk");
    if has("qemu-img") {
        qemu_io(d, "a.vmdk", &["read -P 2 2000G 1M", "read -P 4 1000G 1k", "write -P 5 7G 64k"]);
        io_ok(d, "--read-only a.vmdk", &["read -P 5 7G 64k"]);
    }
}
