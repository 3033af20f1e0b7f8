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
        let quicker = child.wait().expect("wait").success() || run(d, "info a.vmdk").status.success();
        if quicker {
            // or killed behind its last write
            ok(d, "compare s.raw a.vmdk");
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

/// QEMU's diffs name their parent by its content ID and by name, without a UUID: they are written like any other, and
/// refused once the parent is another.
#[test]
fn a_diff_linked_by_content_id_alone_is_written() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let dir = scratch();
    let d = dir.path();
    for (n, subformat) in ["monolithicSparse", "twoGbMaxExtentSparse"].into_iter().enumerate() {
        let (base, diff) = (format!("b{n}.vmdk"), format!("d{n}.vmdk"));
        tool(d, "qemu-img", &format!("create -q -f vmdk -o subformat={subformat} {base} 8M"));
        qemu_io(d, &base, &["write -P 1 0 2M"]);
        tool(d, "qemu-img", &format!("create -q -f vmdk -o subformat={subformat} -F vmdk -b {base} {diff}"));
        io_ok(d, &diff, &["read -P 1 1M 64k", "write -P 2 1000k 30k", "write -z 512k 64k"]);
        ok(d, &format!("check {diff}"));
        let here = ["read -P 2 1000k 30k", "read -P 0 512k 64k", "read -P 1 1030k 30k"];
        qemu_io(d, &diff, &[&here[..], &["write -P 3 4M 64k"]].concat());
        io_ok(d, &diff, &["read -P 3 4M 64k", "write -P 4 5M 512", "read -P 1 1030k 30k"]);
        // the parent is written to: it is another one
        qemu_io(d, &base, &["write -P 9 0 512"]);
        let out = io(d, &diff, &["write -P 5 0 512"]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(1) && said.contains("content ID"), "{said}");
        io_ok(d, &format!("--allow-parent-mismatch {diff}"), &["read -P 9 0 512", "write -P 5 0 512"]);
    }
}

/// VirtualBox's bug 7: its diffs say `parentCID=ffffffff` and name no file. Ours say all three: what QEMU and VMware follow, and what
/// VirtualBox does. Where the content ID is not said, the UUID decides.
#[test]
fn virtualbox_bug_7_diffs_say_whose_they_are() {
    let dir = scratch();
    let d = dir.path();
    random_raw(&d.join("s.raw"), 3 * MIB, &mut Rng(6));
    ok(d, "convert --output-format vmdk s.raw base.vmdk");
    ok(d, "create --format vmdk --parent base.vmdk a.vmdk");
    let read = |f: &str| fs::read(d.join(f)).expect("read");
    let value = |bytes: &[u8], key: &str| {
        let text = String::from_utf8_lossy(&bytes[512..21 * 512]).into_owned();
        let line =
            text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_else(|| panic!("{key} in {text}"));
        line.trim_matches('"').to_string()
    };
    let (base, diff) = (read("base.vmdk"), read("a.vmdk"));
    assert_eq!(value(&diff, "parentCID="), value(&base, "CID="));
    assert_eq!(value(&diff, "ddb.uuid.parent="), value(&base, "ddb.uuid.image="));
    assert_eq!(value(&diff, "ddb.uuid.parentmodification="), value(&base, "ddb.uuid.modification="));
    assert_eq!(value(&diff, "parentFileNameHint="), "base.vmdk");
    if has("qemu-img") {
        let chain = tool(d, "qemu-img", "info --backing-chain a.vmdk");
        assert!(chain.contains("image: base.vmdk") || chain.contains("backing file: base.vmdk"), "{chain}");
    }
    // as VirtualBox writes it
    let set = |key: &str, from: &str, to: &str| {
        let bytes = read("a.vmdk");
        let (from, to) = (format!("{key}{from}"), format!("{key}{to}"));
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("the key");
        let f = fs::OpenOptions::new().write(true).open(d.join("a.vmdk")).expect("open");
        f.write_all_at(to.as_bytes(), at as u64).expect("write");
    };
    let (cid, uuid) = (value(&base, "CID="), value(&base, "ddb.uuid.image="));
    set("parentCID=", &cid, "ffffffff");
    io_ok(d, "a.vmdk", &["write -P 1 1M 64k"]);
    ok(d, "compare a.vmdk a.vmdk");
    // a UUID that is another's is refused, whatever the content ID says
    set("ddb.uuid.parent=\"", &uuid, "5eed00d0-0032-4032-80d0-000000320032");
    let out = io(d, "--parent base.vmdk a.vmdk", &["write -P 1 1M 64k"]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(1) && said.contains("UUID"), "{said}");
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
    // two grains at one place: the second gets a copy, and both show what they did
    let other = (grain + 1..48).find(|g| word((main + g * 4) as usize) != 0).expect("another grain");
    let place = (word((main + grain * 4) as usize) as u32).to_le_bytes().to_vec();
    damaged(&[(main + other * 4, place.clone()), (copy + other * 4, place)]);
    let said = check(d, 2);
    assert!(said.contains("upon each other"), "{said}");
    ok(d, "repair a.vmdk");
    ok(d, "check a.vmdk");
    let mut shown = model.clone();
    let range = |g: u64| (g << 16) as usize..((g << 16) + 65536) as usize;
    shown.copy_within(range(grain), range(other).start);
    assert!(content(d, "a.vmdk") == shown);
    io_ok(d, "a.vmdk", &[&format!("write -P 7 {} 64k", grain << 16)]);
    shown[range(grain)].fill(7);
    assert!(content(d, "a.vmdk") == shown, "each has its own place");
    // where only one of the two tables says so, the other one is right
    let place = (word((main + grain * 4) as usize) as u32).to_le_bytes().to_vec();
    damaged(&[(main + other * 4, place.clone())]);
    check(d, 2);
    assert!(ok(d, "repair a.vmdk").contains("brought back"));
    assert!(content(d, "a.vmdk") == model);
    damaged(&[(main + grain * 4, (word((main + other * 4) as usize) as u32).to_le_bytes().to_vec())]);
    ok(d, "repair a.vmdk");
    assert!(content(d, "a.vmdk") == model, "the first in order is not always the owner");
}

/// Some programs make grain tables when they are needed: the first change makes all that are missing.
#[test]
fn missing_tables_are_made_when_something_is_written() {
    let dir = scratch();
    let d = dir.path();
    for (size, lacking) in [("200M", "both"), ("200M", "copies"), ("200M", "tables"), ("260G", "both")] {
        let _ = fs::remove_file(d.join("a.vmdk"));
        ok(d, &format!("create --format vmdk --size {size} a.vmdk"));
        if size == "200M" {
            io_ok(d, "a.vmdk", &["write -P 5 1M 128k"]);
        }
        let f = fs::OpenOptions::new().read(true).write(true).open(d.join("a.vmdk")).expect("open");
        let word = |at: u64| {
            let mut w = [0; 8];
            f.read_exact_at(&mut w, at).expect("read");
            u64::from_le_bytes(w)
        };
        let tables = (word(12) / (128 * 512)).max(1) + 1;
        for (at, of) in [(48, "copies"), (56, "tables")] {
            if lacking == of || lacking == "both" {
                // all but the first, which is in use, unless the first change never came
                let keep = u64::from(size == "200M");
                let zeros = vec![0; ((tables - keep) * 4 - 4) as usize];
                f.write_all_at(&zeros, word(at) * 512 + keep * 4).expect("write");
            }
        }
        let before = fs::read(d.join("a.vmdk")).map(|b| b.len()).expect("read");
        io_ok(d, "--read-only a.vmdk", &["read -P 0 150M 1M"]);
        assert_eq!(fs::read(d.join("a.vmdk")).map(|b| b.len()).expect("read"), before);
        io_ok(d, "a.vmdk", &["write -P 6 150M 1M", "write -P 7 199M 512", "read -P 6 150M 1M"]);
        ok(d, "check a.vmdk");
        io_ok(d, "a.vmdk", &["read -P 7 199M 512", "read -P 0 100M 1M", "write -P 8 60M 64k"]);
        ok(d, "check a.vmdk");
        if size == "200M" {
            io_ok(d, "a.vmdk", &["read -P 5 1M 128k"]);
        }
        if has("qemu-img") {
            tool(d, "qemu-img", "check -q -f vmdk a.vmdk");
            qemu_io(d, "a.vmdk", &["read -P 6 150M 1M", "read -P 8 60M 64k", "write -P 9 120M 64k"]);
            io_ok(d, "--read-only a.vmdk", &["read -P 9 120M 64k"]);
        }
    }
}

#[test]
fn what_cannot_be_made_is_said() {
    let dir = scratch();
    let d = dir.path();
    for (args, word) in [
        ("--size 3T a.vmdk", "split2g or flat"),
        ("--size 1M --variant rawdisk a.vmdk", "--raw-device"),
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
