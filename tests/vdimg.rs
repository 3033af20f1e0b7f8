//! vdimg's commands and their exit codes.

mod vdimg_support;

use serde_json::Value;
use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use uuid::Uuid;
use vdblk::format::Format;
use vdblk::job::{CreateImage, create_image};
use vdimg_support::*;

fn json(dir: &Path, args: &str) -> Value {
    serde_json::from_str(&ok(dir, args)).expect("JSON")
}

#[test]
fn info_tells_everything_under_the_promised_keys() {
    let dir = scratch();
    let d = dir.path();
    let new = CreateImage {
        uuid: Some(Uuid::from_u128(0xABCD_EF00)),
        comment: Some("two words".into()),
        geometry: Some((100, 16, 63)),
        ..CreateImage::new(d.join("a.vdi"), Format::Vdi, 10 * MIB)
    };
    create_image(&new).expect("create");
    io_ok(d, "a.vdi", &["write 0 512", "write 5M 2M"]);
    let printed = ok(d, "info --output json a.vdi");
    let keys = [
        "format",
        "variant",
        "device_type",
        "virtual_size",
        "file_size",
        "block_size",
        "allocated_blocks",
        "uuid",
        "modification_uuid",
        "parent_uuid",
        "parent_modification_uuid",
        "parent_content_id",
        "parent_names",
        "comment",
        "notes",
        "geometry",
        "logical_geometry",
        "file",
        "version",
        "snapshots",
        "regions",
        "chain",
        "chain_error",
    ];
    let place = |k: &&str| printed.find(&format!("\n  \"{k}\":")).expect(k);
    let places: Vec<_> = keys.iter().map(place).collect();
    assert!(places.is_sorted(), "{printed}");
    let v: Value = serde_json::from_str(&printed).expect("JSON");
    assert_eq!(v.as_object().expect("object").len(), keys.len(), "{printed}");
    assert_eq!(v["format"], "vdi");
    assert_eq!(v["variant"], "dynamic");
    assert_eq!(v["virtual_size"], 10 * MIB);
    assert_eq!(v["file_size"], fs::metadata(d.join("a.vdi")).expect("metadata").len());
    assert_eq!(v["block_size"], MIB);
    assert_eq!(v["allocated_blocks"], 3);
    assert_eq!(v["uuid"], "00000000-0000-0000-0000-0000abcdef00");
    assert_ne!(v["modification_uuid"], v["uuid"]);
    assert_eq!(v["modification_uuid"].as_str().expect("text").len(), 36);
    assert!(v["parent_uuid"].is_null() && v["parent_modification_uuid"].is_null());
    assert_eq!(v["comment"], "two words");
    assert_eq!(v["geometry"], serde_json::json!({"cylinders": 100, "heads": 16, "sectors": 63}));

    assert_eq!((&v["file"], &v["version"]), (&"a.vdi".into(), &"1.1".into()));
    assert_eq!(v["chain"].as_array().expect("chain").len(), 1);
    assert!(v["chain_error"].is_null());

    ok(d, "create --format vdi --parent a.vdi d.vdi");
    let diff = json(d, "info --output json d.vdi");
    let [top, base] = &diff["chain"].as_array().expect("chain")[..] else { panic!("{diff}") };
    assert_eq!(
        (&top["file"], &top["uuid"], &top["variant"]),
        (&"d.vdi".into(), &diff["uuid"], &"diff".into())
    );
    assert!(base["file"].as_str().expect("file").ends_with("/a.vdi"), "{base}");
    assert_eq!((&base["uuid"], &base["format"]), (&v["uuid"], &"vdi".into()));
    assert_eq!((&diff["variant"], &diff["parent_uuid"]), (&"diff".into(), &v["uuid"]));
    assert_eq!(diff["parent_modification_uuid"], v["modification_uuid"]);
    assert_eq!(diff["geometry"], v["geometry"]);

    fs::write(d.join("r.raw"), [1; 1000]).expect("write");
    let raw = json(d, "info --output json r.raw");
    assert_eq!((&raw["format"], &raw["virtual_size"]), (&"raw".into(), &1024.into()));
    assert_eq!(raw["file_size"], 1000);
    for absent in &["block_size", "allocated_blocks", "uuid", "modification_uuid", "comment", "geometry"] {
        assert!(raw[absent].is_null(), "{absent}");
    }
}

#[test]
fn info_for_people_names_the_chain() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 4M base.vdi");
    fs::create_dir(d.join("Snapshots")).expect("folder");
    ok(d, "create --format vdi --parent base.vdi Snapshots/d.vdi");
    let all = ok(d, "info Snapshots/d.vdi");
    assert!(
        all.contains("format: vdi 1.1, diff") && all.contains("virtual size: 4 MiB (4194304 bytes)"),
        "{all}"
    );
    assert!(all.contains("chain, base last:") && all.contains("base.vdi (vdi, dynamic)"), "{all}");
    fs::rename(d.join("base.vdi"), d.join("gone")).expect("rename");
    let alone = ok(d, "info Snapshots/d.vdi");
    assert!(alone.contains("chain: not complete: ") && alone.contains("was not found"), "{alone}");
    let alone = json(d, "info --output json Snapshots/d.vdi");
    assert_eq!(alone["variant"], "diff");
    assert!(
        alone["chain"].is_null() && alone["chain_error"].as_str().expect("why").contains("was not found")
    );
}

#[test]
fn info_shows_no_control_characters() {
    let dir = scratch();
    let d = dir.path();
    let comment = Some("a\u{1b}[31mred\nline".to_string());
    create_image(&CreateImage { comment, ..CreateImage::new(d.join("c.vdi"), Format::Vdi, MIB) })
        .expect("create");
    let shown = ok(d, "info c.vdi");
    assert!(shown.contains("comment: a\\u{1b}[31mred\\nline"), "{shown}");
    assert_eq!(json(d, "info --output json c.vdi")["comment"], "a\u{1b}[31mred\nline");
}

#[test]
fn create_makes_what_was_asked_for() {
    let dir = scratch();
    let d = dir.path();
    let uuid = "{12345678-90AB-cdef-1234-567890abcdef}";
    ok(d, &format!("create --format VDI --size 1.5M --variant Zero-Expand --uuid {uuid} --comment x z.vdi"));
    let v = json(d, "info --output json z.vdi");
    assert_eq!((&v["variant"], &v["virtual_size"]), (&"zero-expand".into(), &(3 * MIB / 2).into()));
    assert_eq!((&v["uuid"], &v["comment"]), (&"12345678-90ab-cdef-1234-567890abcdef".into(), &"x".into()));

    ok(d, "create --format vdi --size 8M --variant fixed f.vdi");
    assert!(storage(&d.join("f.vdi")) >= 8 * MIB, "its space is reserved");
    assert_eq!(json(d, "info --output json f.vdi")["allocated_blocks"], 8);
    ok(d, "create --format vdi --size 8M --variant dynamic --option allocationblocksize=64k s.vdi");
    assert_eq!(json(d, "info --output json s.vdi")["block_size"], 64 * KIB);

    ok(d, "create --format raw --size 8M --variant dynamic a.raw");
    assert_eq!(fs::metadata(d.join("a.raw")).expect("metadata").len(), 8 * MIB);
    assert_eq!(storage(&d.join("a.raw")), 0);
    ok(d, "create --format raw --size 8M --variant fixed b.raw");
    assert!(storage(&d.join("b.raw")) >= 8 * MIB);

    // A diff of any format: its size is the parent's, or what is said.
    ok(d, "create --format vdi --parent a.raw d.vdi");
    assert_eq!(json(d, "info --output json d.vdi")["virtual_size"], 8 * MIB);
    ok(d, "create --format vdi --parent z.vdi --size 20M e.vdi");
    assert_eq!(json(d, "info --output json e.vdi")["virtual_size"], 20 * MIB);
    ok(d, "create --format vdi --parent z.vdi --parent e.vdi g.vdi");
    assert_eq!(
        json(d, "info --output json g.vdi")["parent_uuid"],
        json(d, "info --output json e.vdi")["uuid"]
    );
    ["z", "f", "s", "d", "e", "g"]
        .iter()
        .for_each(|n| assert!(ok(d, &format!("check {n}.vdi")).contains("No errors")));
}

#[test]
fn create_leaves_what_exists_alone() {
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("a.vdi"), "precious").expect("write");
    fs::write(d.join("a.raw"), "precious").expect("write");
    for name in ["a.vdi", "a.raw"] {
        let format = &name[2..];
        let line = fails(d, 1, &format!("create --format {format} --size 1M {name}"));
        assert!(line.starts_with(&format!("{name}: cannot create it: File exists")), "{line}");
        assert!(!line.contains("remove"), "{line}");
    }
    fs::write(d.join("s.raw"), [1; 4096]).expect("write");
    assert!(fails(d, 1, "convert --output-format vdi s.raw a.vdi").contains("File exists"));
    assert!(fails(d, 1, "convert --output-format raw s.raw s.raw").contains("File exists"));
    assert_eq!(fs::read(d.join("a.vdi")).expect("read"), b"precious");
}

/// The name decides how a file is opened: what would be taken for something else is not made.
#[test]
fn names_that_contradict_the_format_are_refused() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 1M a.vdi");
    for (args, better) in [
        ("create --format vdi --size 1M y.raw", "y.vdi"),
        ("create --format vdi --size 1M y.QCOW2", "y.vdi"),
        ("create --format raw --size 1M y.vdi", "y.raw"),
        ("create --format vdi --parent a.vdi y.raw", "y.vdi"),
        ("convert --output-format vdi a.vdi y.raw", "y.vdi"),
        ("convert --output-format raw a.vdi y.vdi", "y.raw"),
    ] {
        let line = fails(d, 1, args);
        assert!(line.contains("its name says") && line.contains(&format!("call it {better}")), "{line}");
    }
    assert_eq!(fs::read_dir(d).expect("folder").count(), 1, "something was left");
    for name in ["y.img", "y", "y.backup", "Y.VDI"] {
        ok(d, &format!("create --format vdi --size 1M {name}"));
    }
    ok(d, "convert --output-format raw a.vdi z.img");
}

#[test]
fn parents_are_searched_where_it_was_said() {
    let dir = scratch();
    let d = dir.path();
    ["vm", "vm/Snapshots", "else", "tops"].iter().for_each(|f| fs::create_dir(d.join(f)).expect("folder"));
    ok(d, "create --format vdi --size 1M vm/base.vdi");
    ok(d, "create --format vdi --parent vm/base.vdi vm/Snapshots/m.vdi");
    ok(d, "create --format vdi --parent vm/Snapshots/m.vdi tops/top.vdi");
    fails(d, 1, "map tops/top.vdi");
    // A folder called Snapshots stands for the one above too, as it does where an image lies in it.
    ok(d, "map --parent-dir vm/Snapshots tops/top.vdi");
    ok(d, "map --parent-dir vm/Snapshots/ tops/top.vdi");
    ok(d, "map --parent-dir vm tops/top.vdi");
    // The first parent is named, those beneath it are searched.
    fails(d, 1, "map --parent vm/Snapshots/m.vdi tops/top.vdi");
    ok(d, "map --parent vm/Snapshots/m.vdi --parent-dir vm tops/top.vdi");
    let line = fails(d, 1, "map --parent vm/Snapshots/m.vdi --parent-dir else tops/top.vdi");
    assert!(line.contains("m.vdi") && line.contains("was not found"), "{line}");
    for command in ["map", "info", "check", "convert --output-format raw", "io"] {
        let line = fails(d, 2, &format!("{command} --parent-dir gone tops/top.vdi new.raw"));
        assert!(line.contains("--parent-dir") && line.contains("no such folder"), "{line}");
    }
    assert!(fails(d, 2, "map --parent-dir vm/base.vdi tops/top.vdi").contains("not a folder"));
    assert!(fails(d, 2, "compare tops/top.vdi --parent-dir2 gone tops/top.vdi").contains("no such folder"));
}

#[test]
fn compare_says_equal_different_or_error() {
    let dir = scratch();
    let d = dir.path();
    let model = random_raw(&d.join("a.raw"), 5 * MIB + 512, &mut Rng(1));
    ok(d, "convert --output-format vdi a.raw a.vdi");
    assert_eq!(ok(d, "compare a.raw a.vdi"), "The images are equal.\n");
    for at in [0, 1_000_001, 5 * MIB + 511] {
        let mut other = model.clone();
        other[at as usize] ^= 1;
        fs::write(d.join("b.raw"), other).expect("write");
        for pair in ["a.vdi b.raw", "b.raw a.vdi"] {
            let out = run(d, &format!("compare {pair}"));
            assert_eq!(out.status.code(), Some(1), "{pair}");
            assert_eq!(text(&out.stdout), format!("The images differ at offset {at}.\n"));
        }
    }
    // Longer by zeros: equal, with a note.
    let mut longer = model;
    longer.resize(longer.len() + 3_000_000 / 512 * 512, 0);
    fs::write(d.join("l.img"), &longer).expect("write");
    for pair in ["a.vdi --format2 raw l.img", "--format RAW l.img a.vdi"] {
        let out = run(d, &format!("compare {pair}"));
        assert!(
            out.status.success() && text(&out.stderr).starts_with("vdimg: note: the sizes differ"),
            "{pair}"
        );
    }
    *longer.last_mut().expect("bytes") = 9;
    fs::write(d.join("l.img"), &longer).expect("write");
    assert_eq!(run(d, "compare a.vdi --format2 raw l.img").status.code(), Some(1));
    let equal = json(d, "compare --output json a.raw a.vdi");
    assert_eq!((&equal["equal"], &equal["offset"]), (&true.into(), &serde_json::Value::Null));
    let out = run(d, "compare --output json a.vdi --format2 raw l.img");
    let other: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!((out.status.code(), &other["equal"]), (Some(1), &false.into()));
    assert!(other["offset"].is_u64() && other["sizes"].as_array().is_some_and(|s| s.len() == 2), "{other}");

    fails(d, 2, "compare a.vdi missing.vdi");
    fails(d, 2, "compare a.vdi l.img");
    fails(d, 2, "compare a.vdi");
}

#[test]
fn compare_finds_the_parents_of_either_side() {
    let dir = scratch();
    let d = dir.path();
    ["p", "q"].iter().for_each(|f| fs::create_dir(d.join(f)).expect("folder"));
    ok(d, "create --format vdi --size 4M p/base.vdi");
    io_ok(d, "p/base.vdi", &["write -P 3 0 3M"]);
    ok(d, "create --format vdi --parent p/base.vdi q/d.vdi");
    fails(d, 2, "compare p/base.vdi q/d.vdi");
    ok(d, "compare p/base.vdi q/d.vdi --parent2 p/base.vdi");
    ok(d, "compare p/base.vdi q/d.vdi --parent-dir2 p");
    ok(d, "compare --parent-dir p q/d.vdi p/base.vdi");
    ok(d, "compare --parent p/base.vdi q/d.vdi --parent2 p/base.vdi,format=vdi q/d.vdi");
}

/// Writes into an image behind vdimg's back.
fn poke(path: &Path, at: u64, bytes: &[u8]) {
    fs::OpenOptions::new().write(true).open(path).expect("open").write_all_at(bytes, at).expect("write");
}

/// Where a VDI keeps its count of allocated blocks, and where ours keep their table.
const COUNT_AT: u64 = 0x184;
const TABLE_AT: u64 = MIB;

#[test]
fn check_and_repair_tell_and_mend() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 8M a.vdi");
    let p = d.join("a.vdi");
    io_ok(d, "a.vdi", &["write -P 1 0 1M", "write -P 2 3M 1M"]);
    assert_eq!(ok(d, "check a.vdi"), "No errors; 2 of 8 blocks are allocated.\n");
    assert!(ok(d, "repair a.vdi").contains("Nothing to repair."));

    // A leak.
    let len = fs::metadata(&p).expect("metadata").len();
    poke(&p, len + 99_999, &[1]);
    let out = run(d, "check a.vdi");
    assert_eq!(out.status.code(), Some(3), "{out:?}");
    assert!(text(&out.stdout).contains("leak: 100000 bytes at the end"), "{out:?}");
    let leak: Value = serde_json::from_slice(&run(d, "check --output json a.vdi").stdout).expect("JSON");
    assert_eq!(
        leak,
        serde_json::json!({
            "file": "a.vdi", "format": "vdi", "result": "leaks", "corruptions": 0, "leaks": 1, "unrepairable": 0,
            "blocks": 8, "allocated_blocks": 2,
            "findings": [{"severity": "leak", "repairable": true,
                "text": "100000 bytes at the end of the file belong to no block"}],
        })
    );
    let names_it = |said: &str| {
        let range = format!("bytes {len} to {} of the file: given up, 100000 bytes", len + 100_000);
        assert!(said.contains(&range) && said.contains("(data)"), "{said}");
        assert!(said.contains("in all 100000 bytes"), "{said}");
    };
    names_it(&text(&run(d, "repair --dry-run a.vdi").stdout));
    let said = ok(d, "repair a.vdi");
    names_it(&said);
    assert!(said.contains("After the repair: No errors"));
    assert_eq!(fs::metadata(&p).expect("metadata").len(), len);

    // A corruption: two blocks in one place, and a count that is too small.
    poke(&p, TABLE_AT + 4 * 5, &1u32.to_le_bytes());
    poke(&p, COUNT_AT, &1u32.to_le_bytes());
    assert_eq!(run(d, "check a.vdi").status.code(), Some(2));
    fails(d, 1, "map a.vdi");
    let before = fs::read(&p).expect("read");
    let dry = run(d, "repair --dry-run a.vdi");
    assert_eq!(dry.status.code(), Some(2));
    assert!(text(&dry.stdout).contains("would repair: block 5: moved to a copy"), "{dry:?}");
    assert_eq!(fs::read(&p).expect("read"), before, "a dry run writes nothing");
    let mended = ok(d, "repair a.vdi");
    assert!(
        mended.contains("repaired: block 5") && mended.contains("After the repair: No errors"),
        "{mended}"
    );
    ok(d, "check a.vdi");
    io_ok(
        d,
        "--read-only a.vdi",
        &["read -P 1 0 1M", "read -P 2 3M 1M", "read -P 2 5M 1M", "read -P 0 6M 1M"],
    );

    // Beyond repair.
    poke(&p, 0x178, &3u32.to_le_bytes());
    assert_eq!(run(d, "check a.vdi").status.code(), Some(2));
    assert!(fails(d, 1, "repair a.vdi").contains("cannot be repaired"));
}

/// A repair cuts and overwrites what belongs to no block; it says so for every range of it.
#[test]
fn repair_names_every_range_it_gives_up() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 8M a.vdi");
    let p = d.join("a.vdi");
    io_ok(d, "a.vdi", &["write -P 1 0 4M"]);
    // Blocks 1 and 2 are forgotten: 2 held zeros, 1 data. The file has a tail of zeros.
    let data_at = 2 * MIB;
    poke(&p, TABLE_AT + 4, &[0xff; 8]);
    poke(&p, data_at + 2 * MIB, &vec![0; MIB as usize]);
    let len = data_at + 4 * MIB;
    fs::OpenOptions::new().write(true).open(&p).expect("open").set_len(len + 4096).expect("length");
    let dry = text(&run(d, "repair --dry-run a.vdi").stdout);
    for line in [
        format!(
            "would repair: bytes {} to {} of the file: given up, {} bytes",
            data_at + MIB,
            data_at + 3 * MIB,
            2 * MIB
        ),
        format!("would repair: bytes {len} to {} of the file: given up, 4096 bytes", len + 4096),
    ] {
        assert!(dry.contains(&line), "{dry}");
    }
    assert!(dry.contains("no block (data)") && dry.contains("no block (zeros)"), "{dry}");
    assert!(dry.contains(&format!("in all {} bytes", 2 * MIB)), "{dry}");
    let done = ok(d, "repair a.vdi");
    let of = |said: &str, prefix: &str| -> Vec<String> {
        said.lines().filter_map(|l| l.strip_prefix(prefix)).map(str::to_string).collect()
    };
    assert_eq!(of(&dry, "would repair: "), of(&done, "repaired: "), "the dry run tells the same");
    ok(d, "check a.vdi");
    io_ok(d, "--read-only a.vdi", &["read -P 1 0 1M", "read -P 0 1M 2M", "read -P 1 3M 1M"]);

    // A block whose place is gone is named with what it held of the disk.
    poke(&p, TABLE_AT + 4 * 6, &7u32.to_le_bytes());
    let said = ok(d, "repair a.vdi");
    assert!(
        said.contains(&format!("block 6 (bytes {} to {} of the disk): freed", 6 * MIB, 7 * MIB)),
        "{said}"
    );
}

#[test]
fn check_needs_neither_parents_nor_a_format_that_can_be_wrong() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 4M base.vdi");
    ok(d, "create --format vdi --parent base.vdi d.vdi");
    fs::remove_file(d.join("base.vdi")).expect("remove");
    ok(d, "check d.vdi");
    ok(d, "repair d.vdi");
    fs::write(d.join("r.img"), [1; 4096]).expect("write");
    for command in ["check", "repair", "repair --dry-run"] {
        let out = run(d, &format!("{command} --format raw r.img"));
        assert!(text(&out.stdout).contains("raw image has nothing to check"));
        assert_eq!(out.status.code(), Some(0));
        let out = run(d, "check --output json --format raw r.img");
        let raw: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
        assert_eq!((&raw["result"], &raw["format"]), (&"nothing-to-check".into(), &"raw".into()));
        fails(d, 1, &format!("{command} r.img"));
        fails(d, 1, &format!("{command} missing.vdi"));
        assert!(fails(d, 1, &format!("{command} --format vdi r.img")).contains("signature"));
        fails(d, 1, &format!("{command} --format qed r.img"));
    }
}

#[test]
fn map_tells_which_image_holds_what() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 4M base.vdi");
    io_ok(d, "base.vdi", &["write 0 2M"]);
    ok(d, "create --format vdi --parent base.vdi d.vdi");
    io_ok(d, "d.vdi", &["write -z 1M 1M", "write -P 5 3M 1M"]);
    let v = json(d, "map --output json d.vdi");
    let entry = |start: u64, length: u64, depth: u64, present: bool, data: bool, offset: Option<u64>| {
        let mut e = serde_json::json!({
            "start": start, "length": length, "depth": depth, "present": present, "zero": !data, "data": data,
            "compressed": false,
        });
        if let Some(o) = offset {
            e["offset"] = o.into();
        }
        e
    };
    let want = [
        entry(0, MIB, 1, true, true, Some(2 * MIB)),
        entry(MIB, MIB, 0, true, false, None),
        entry(2 * MIB, MIB, 1, false, false, None),
        entry(3 * MIB, MIB, 0, true, true, Some(2 * MIB)),
    ];
    assert_eq!(v.as_array().expect("list"), &want);
    let human = ok(d, "map d.vdi");
    let lines: Vec<_> = human.lines().collect();
    assert_eq!(lines.len(), 3, "{human}");
    assert!(lines[1].starts_with("0x0 ") && lines[1].contains("base.vdi"), "{human}");
    assert!(lines[2].starts_with("0x300000") && lines[2].ends_with("d.vdi"), "{human}");
}

#[test]
fn map_of_an_empty_or_raw_file() {
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("e.raw"), "").expect("write");
    assert_eq!(ok(d, "map --output json e.raw"), "[]\n");
    fs::write(d.join("r.raw"), vec![1; 4096]).expect("write");
    fs::OpenOptions::new().write(true).open(d.join("r.raw")).expect("open").set_len(MIB).expect("length");
    let v = json(d, "map --output json r.raw");
    assert_eq!(v[0]["length"].as_u64().expect("number") + v[1]["length"].as_u64().expect("number"), MIB);
    assert_eq!((&v[1]["zero"], &v[1]["data"], &v[1]["present"]), (&true.into(), &false.into(), &true.into()));
    assert_eq!(v[1]["offset"], v[1]["start"]);
}

#[test]
fn io_reads_what_it_wrote() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 8M a.vdi");
    let said = io_ok(
        d,
        "a.vdi",
        &[
            "write -P 0x11 512 3M",
            "write 4M 512",
            "flush",
            "read -P 17 512 3M",
            "read -P 0xcd 4M 512",
            "read -P 0 0 512",
        ],
    );
    assert!(said.starts_with("wrote 3145728/3145728 bytes at offset 512\n"), "{said}");
    io_ok(d, "a.vdi", &["write -z 1M 1M", "write -z -u 512 4k", "discard 2M 512k", "sleep 1"]);
    let zeros = ["read -P 0 1M 1M", "read -P 0 512 4k", "read -P 0 2M 512k", "read -P 17 2621440 512"];
    io_ok(d, "--read-only a.vdi", &zeros);
    let dump = io_ok(d, "--read-only a.vdi", &["read -v 4193792 1k"]);
    assert!(dump.contains("\n00400000:  cd cd cd"), "{dump}");
    assert_eq!(dump.lines().count(), 65);
    ok(d, "check a.vdi");
}

#[test]
fn io_stops_where_something_is_wrong() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 8M a.vdi");
    let out = io(d, "a.vdi", &["write -P 1 1M 1M", "read -P 1 1M 1025k", "write -P 9 0 512"]);
    let line = failed("pattern", 1, out);
    assert!(
        line.contains("pattern mismatch at offset 2097152: 0x00 was read, 0x01 should be there"),
        "{line}"
    );
    io_ok(d, "a.vdi", &["read -P 0 0 512"]);
    for (args, command, want) in [
        ("--read-only a.vdi", "write 0 512", "read-only"),
        ("--read-only a.vdi", "discard 0 512", "read-only"),
        ("a.vdi", "read 8M 512", "behind the disk's end"),
        ("a.vdi", "write 0 9M", "behind the disk's end"),
    ] {
        let line = failed(command, 1, io(d, args, &[command]));
        assert!(line.starts_with("a.vdi: ") && line.contains(want), "{line}");
    }
    for nonsense in ["read 1 512", "jump", "write -P 300 0 512", "sleep x", ""] {
        failed(nonsense, 2, io(d, "a.vdi", &[nonsense]));
    }
}

#[test]
fn io_takes_commands_from_standard_input() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 1M a.vdi");
    let feed = |script: &str| {
        let mut c = vdimg(d, "io a.vdi");
        let mut child =
            c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start");
        child.stdin.take().expect("piped").write_all(script.as_bytes()).expect("feed");
        child.wait_with_output().expect("end")
    };
    let out = feed("# a comment\n\nwrite -P 4 0 1k\nread -P 4 0 1k\n");
    assert_eq!(succeeded("script", out).lines().count(), 2);
    assert!(failed("script", 1, feed("read -P 4 0 1k\nread -P 5 0 512\n")).contains("mismatch"));
    assert!(failed("script", 1, feed("dance\n")).contains("unknown command 'dance'"));
}

#[test]
fn io_does_not_write_to_the_parent_of_another() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 1M a.vdi");
    ok(d, "create --format vdi --parent a.vdi d.vdi");
    assert!(failed("io", 1, io(d, "a.vdi", &["write 0 512"])).contains("is the parent of"));
    io_ok(d, "--read-only a.vdi", &["read -P 0 0 512"]);
    io_ok(d, "--allow-write-to-parent a.vdi", &["write 0 512"]);
}

/// Every option and every file of every command is described.
#[test]
fn help_leaves_nothing_out() {
    let dir = scratch();
    let commands = ["info", "create", "convert", "compare", "check", "repair", "map", "io"];
    for command in commands {
        let help = ok(dir.path(), &format!("{command} --help"));
        let lines: Vec<_> = help.lines().collect();
        for (line, next) in lines.iter().zip(lines.iter().skip(1).chain([&""])) {
            let named = line.trim_start();
            let is_item = ["-", "<"].iter().any(|c| named.starts_with(c)) && line.starts_with("  ");
            if is_item && !named.starts_with("- ") {
                let beside = named.split_once("  ").is_some_and(|(_, text)| !text.trim().is_empty());
                assert!(beside || !next.trim().is_empty(), "{command}: '{line}' is not explained");
            }
        }
    }
    let io = ok(dir.path(), "io --help");
    for part in ["write -z [-u] OFFSET LENGTH", "multiples of 512", "0xcd", "sleep MS", "Exit status"] {
        assert!(io.contains(part), "{part}: {io}");
    }
    assert!(ok(dir.path(), "--help").contains("Exit status"));
}

#[test]
fn help_and_version_are_no_errors() {
    let dir = scratch();
    for args in ["--help", "--version", "convert --help", "help io"] {
        assert!(ok(dir.path(), args).contains("vdimg"), "{args}");
    }
}
