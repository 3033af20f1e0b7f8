//! `vdimg merge`: the top shows the same, whatever happens; then what is not needed is gone.

mod vdimg_support;

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vdblk::ErrorKind;
use vdblk::job::{self, Merge, Merged, Watch, merge_images};
use vdblk::vd::{ImageSpec, OpenDisk};
use vdimg_support::*;

/// Formats with diffs that are written, and their extensions.
const FORMATS: [(&str, &str); 7] = [
    ("vdi", "vdi"),
    ("vhd", "vhd"),
    ("vmdk", "vmdk"),
    ("qcow2", "qcow2"),
    ("qed", "qed"),
    ("qcow", "qcow"),
    ("parallels", "hdd"),
];
/// The base first.
const NAMES: [&str; 4] = ["b", "m1", "m2", "t"];

/// A chain of four images of a format: what its top shows.
fn chain(d: &Path, (format, ext): (&str, &str), size: u64, rng: &mut Rng) -> Vec<u8> {
    let mut model = random_raw(&d.join("s.raw"), size, rng);
    ok(d, &format!("convert --output-format {format} s.raw b.{ext}"));
    for n in 1..NAMES.len() {
        let below = parents(&NAMES[..n], ext);
        let name = format!("{}.{ext}", NAMES[n]);
        ok(d, &format!("create --format {format} {below} {name}"));
        let mut commands = Vec::new();
        for i in 0..6 {
            let len = (1 + rng.below(size / 4096)) * 512;
            let at = rng.below((size - len) / 512) * 512;
            let value = u8::try_from(1 + rng.below(255)).unwrap();
            model[at as usize..(at + len) as usize].fill(if i % 3 == 2 { 0 } else { value });
            commands.push(match i % 3 {
                2 => format!("write -z {at} {len}"),
                _ => format!("write -P {value} {at} {len}"),
            });
        }
        let commands: Vec<_> = commands.iter().map(String::as_str).collect();
        let below = if format == "parallels" { below } else { String::new() };
        io_ok(d, &format!("{below} {name}"), &commands);
    }
    fs::write(d.join("s.raw"), &model).expect("write");
    model
}

fn parents(names: &[&str], ext: &str) -> String {
    names.iter().map(|n| format!("--parent {n}.{ext} ")).collect()
}

/// The images that are there, as a command names the one on top: Parallels' images do not name their parents.
fn top_of(d: &Path, (format, ext): (&str, &str)) -> String {
    let there: Vec<_> = NAMES.into_iter().filter(|n| d.join(format!("{n}.{ext}")).exists()).collect();
    let (top, below) = there.split_last().expect("an image is left");
    let below = if format == "parallels" { parents(below, ext) } else { String::new() };
    format!("{below}{top}.{ext}")
}

fn shows(d: &Path, format: (&str, &str), what: &str) {
    let top = top_of(d, format);
    let out = run(d, &format!("compare {top} s.raw"));
    assert!(out.status.success(), "{what}: {}{}", text(&out.stdout), text(&out.stderr));
}

fn check_all(d: &Path, (_, ext): (&str, &str), what: &str) {
    for n in NAMES.iter().map(|n| format!("{n}.{ext}")).filter(|n| d.join(n).exists()) {
        let out = run(d, &format!("check {n}"));
        assert_eq!(out.status.code(), Some(0), "{what}, {n}: {}", text(&out.stdout));
    }
}

/// QEMU sees the same, and finds nothing wrong.
fn qemu_agrees(d: &Path, (format, ext): (&str, &str)) {
    if !["qcow2", "qed", "vmdk", "qcow"].contains(&format) || !has("qemu-img") {
        return;
    }
    let top = top_of(d, (format, ext));
    tool(d, "qemu-img", &format!("compare -f {format} -F raw {top} s.raw"));
    if format != "qcow" {
        tool(d, "qemu-img", &format!("check {top}"));
    }
}

#[test]
fn every_format_merges_over_any_span_in_both_directions() {
    for (seed, format) in (1..).zip(FORMATS) {
        let (_, ext) = format;
        for (from, into) in
            [("t", "m2"), ("t", "b"), ("m2", "m1"), ("m2", "b"), ("b", "m1"), ("m1", "t"), ("b", "t")]
        {
            let dir = scratch();
            let d = dir.path();
            let what = format!("{ext} {from} into {into}");
            chain(d, format, 3 * MIB + 512, &mut Rng(seed));
            let top = top_of(d, format);
            ok(d, &format!("merge {top} --from {from}.{ext} --into {into}.{ext}"));
            let place = |name| NAMES.iter().position(|n| *n == name).unwrap();
            let (from, into) = (place(from), place(into));
            let spent = if from > into { into + 1..=from } else { from..=into - 1 };
            for (n, name) in NAMES.iter().enumerate() {
                assert_eq!(d.join(format!("{name}.{ext}")).exists(), !spent.contains(&n), "{what}: {name}");
            }
            shows(d, format, &what);
            check_all(d, format, &what);
            qemu_agrees(d, format);
        }
    }
}

fn of_chain(d: &Path, top: &str, from: &str, into: &str, parents: &[&str]) -> Merge {
    let spec = |n: &&str| ImageSpec { path: d.join(n), format: None };
    Merge {
        chain: OpenDisk {
            parents: parents.iter().map(spec).collect(),
            lock_wait: Some(Duration::ZERO),
            ..OpenDisk::new(d.join(top))
        },
        from: Some(d.join(from)),
        into: Some(d.join(into)),
        keep: false,
    }
}

/// A merge that ends at its `n`th look at whether it shall.
fn cancelled_at(how: &Merge, n: u64) -> vdblk::Result<Merged> {
    let looks = Cell::new(0);
    let cancelled = || {
        looks.set(looks.get() + 1);
        looks.get() > n
    };
    merge_images(how, &mut Watch { cancelled: &cancelled, progress: &mut |_| () })
}

fn copy_files(from: &Path, to: &Path) {
    for f in fs::read_dir(from).unwrap().map(|f| f.unwrap()) {
        fs::copy(f.path(), to.join(f.file_name())).expect("copy");
    }
}

/// How often it looks.
fn looks_of(how: &Merge) -> u64 {
    let looks = Cell::new(0);
    let cancelled = || {
        looks.set(looks.get() + 1);
        false
    };
    merge_images(how, &mut Watch { cancelled: &cancelled, progress: &mut |_| () }).expect("merge");
    looks.get()
}

/// At each moment at which it looks a merge ends: no file has gone, the disk shows the same, and the same call completes it or says
/// that it is complete; then the files that are not needed can go.
#[test]
fn a_merge_that_is_cancelled_anywhere_has_lost_nothing() {
    for (seed, format) in (10..).zip(FORMATS) {
        let (name, ext) = format;
        let original = scratch();
        chain(original.path(), format, MIB, &mut Rng(seed));
        let [b, m1, m2, t] = NAMES.map(|n| format!("{n}.{ext}"));
        let below: Vec<&str> = if name == "parallels" { vec![&b, &m1, &m2] } else { Vec::new() };
        for (from, into, spent) in
            [("t", "b", ["m1", "m2", "t"]), ("m2", "b", ["m1", "m2", ""]), ("b", "m2", ["m1", "b", ""])]
        {
            let begin = || {
                let dir = scratch();
                copy_files(original.path(), dir.path());
                let names = (format!("{from}.{ext}"), format!("{into}.{ext}"));
                let how = of_chain(dir.path(), &t, &names.0, &names.1, &below);
                (dir, how)
            };
            let (_dir, how) = begin();
            let last = looks_of(&how);
            let (mut ended, mut complete) = (0, 0);
            for n in (0..last).filter(|n| *n < 8 || n % 7 == 0 || n + 14 > last) {
                let (dir, how) = begin();
                let d = dir.path();
                let what = format!("{ext} {from} into {into}, look {n} of {last}");
                match cancelled_at(&how, n) {
                    Err(e) => assert_eq!(e.kind(), ErrorKind::Cancelled, "{what}: {e}"),
                    // It looks as often as requests need.
                    Ok(_) => continue,
                }
                ended += 1;
                assert!(
                    NAMES.iter().all(|n| d.join(format!("{n}.{ext}")).exists()),
                    "{what}: a file is gone"
                );
                shows(d, format, &what);
                match cancelled_at(&how, u64::MAX) {
                    Ok(_) => {}
                    Err(e) => {
                        complete += 1;
                        assert_eq!(e.kind(), ErrorKind::InvalidArgument, "{what}: {e}");
                        let said = e.to_string();
                        assert!(
                            said.contains("no image of the chain") && said.contains("not needed any more"),
                            "{said}"
                        );
                        shows(d, format, &what);
                        for n in spent.iter().filter(|n| !n.is_empty()) {
                            fs::remove_file(d.join(format!("{n}.{ext}"))).unwrap();
                        }
                    }
                }
                shows(d, format, &what);
                check_left(d, &what, if from == "t" { 1 } else { 2 });
            }
            // a fast machine needs few looks
            assert!(ended > 2, "{ext} {from} into {into}: ended {ended} times");
            assert!(complete > 0 || from == "t" || name == "parallels", "{ext} {from} into {into}");
        }
    }
}

/// So many images, and the raw file.
fn check_left(d: &Path, what: &str, images: usize) {
    assert_eq!(fs::read_dir(d).unwrap().count(), images + 1, "{what}: files are left");
}

/// The process is killed at some moment.
#[test]
fn a_merge_that_is_killed_has_lost_nothing() {
    let format = ("vdi", "vdi");
    let mut killed = 0;
    for delay in [3, 10, 20, 40, 80, 160, 320] {
        let dir = scratch();
        let d = dir.path();
        chain(d, format, 64 * MIB, &mut Rng(delay));
        let args = "merge --lock-wait 20 t.vdi --from m2.vdi --into b.vdi";
        let mut child = vdimg(d, args).stderr(std::process::Stdio::null()).spawn().expect("start vdimg");
        std::thread::sleep(Duration::from_millis(delay));
        killed += u32::from(child.try_wait().expect("wait").is_none());
        let _ = child.kill();
        child.wait().expect("wait");
        shows(d, format, &format!("after {delay} ms"));
        let there = |name: &str| d.join(name).exists();
        if there("m2.vdi") {
            let out = run(d, args);
            if !out.status.success() {
                let said = text(&out.stderr);
                assert!(
                    said.contains("no image of the chain") && said.contains("not needed any more"),
                    "{said}"
                );
            }
        }
        for name in ["m1.vdi", "m2.vdi"].iter().filter(|n| there(n)) {
            fs::remove_file(d.join(name)).unwrap();
        }
        shows(d, format, &format!("completed after {delay} ms"));
        check_all(d, format, "completed");
    }
    assert!(killed > 0, "every one was faster");
}

#[test]
fn into_the_parent_is_the_default_and_files_may_stay() {
    let dir = scratch();
    let d = dir.path();
    let format = ("qcow2", "qcow2");
    chain(d, format, 2 * MIB, &mut Rng(3));
    let said = ok(d, "merge --keep t.qcow2");
    assert!(said.contains("t.qcow2: merged into") && said.contains("not needed any more"), "{said}");
    for name in ["t.qcow2", "m2.qcow2"] {
        ok(d, &format!("compare {name} s.raw"));
    }
    let said = ok(d, "merge t.qcow2");
    assert!(said.ends_with("removed\n") && !d.join("t.qcow2").exists(), "{said}");
    ok(d, "compare m2.qcow2 s.raw");
}

/// A child that is longer makes what takes it in as long.
#[test]
fn the_image_that_takes_in_a_longer_one_grows() {
    for (format, name) in
        [("vdi", "b.vdi"), ("vhd", "b.vhd"), ("vmdk", "b.vmdk"), ("qcow2", "b.qcow2"), ("raw", "b.raw")]
    {
        let dir = scratch();
        let d = dir.path();
        ok(d, &format!("create --format {format} --size 4M {name}"));
        io_ok(d, name, &["write -P 1 0 4M"]);
        ok(d, &format!("create --format qcow2 --parent {name} --size 9M t.qcow2"));
        io_ok(d, "t.qcow2", &["write -P 2 3M 2M", "write -P 3 8M 1M"]);
        ok(d, "merge t.qcow2");
        io_ok(d, name, &["read -P 1 0 3M", "read -P 2 3M 2M", "read -P 0 5M 3M", "read -P 3 8M 1M"]);
        assert!(ok(d, &format!("info --output json {name}")).contains("9437184"), "{format}");
        ok(d, &format!("check {name}"));
    }
    // What cannot grow is not touched.
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format qed --size 4M b.qed");
    ok(d, "create --format qcow2 --parent b.qed --size 9M t.qcow2");
    io_ok(d, "t.qcow2", &["write -P 2 3M 2M"]);
    let before = fs::read(d.join("b.qed")).unwrap();
    let line = fails(d, 1, "merge t.qcow2");
    assert!(line.contains("size"), "{line}");
    assert!(fs::read(d.join("b.qed")).unwrap() == before);
}

/// What an image in the middle hides by being short is not seen afterwards.
#[test]
fn behind_the_end_of_a_shorter_image_zeros_stay() {
    for (from, into) in [("t", "b"), ("m", "b"), ("m", "t"), ("b", "t"), ("b", "m")] {
        let dir = scratch();
        let d = dir.path();
        ok(d, "create --format qcow2 --size 4M b.qcow2");
        io_ok(d, "b.qcow2", &["write -P 1 0 4M"]);
        ok(d, "create --format qcow2 --parent b.qcow2 --size 2M m.qcow2");
        io_ok(d, "m.qcow2", &["write -P 2 1M 64k"]);
        ok(d, "create --format qcow2 --parent m.qcow2 --size 4M t.qcow2");
        io_ok(d, "t.qcow2", &["write -P 3 3M 64k"]);
        ok(d, "convert --output-format raw t.qcow2 s.raw");
        let args = format!("merge t.qcow2 --from {from}.qcow2 --into {into}.qcow2");
        if (from, into) == ("m", "b") {
            // m is gone, and b is longer than m was.
            let line = fails(d, 1, &args);
            assert!(line.contains("would be seen"), "{line}");
        } else {
            ok(d, &args);
        }
        let top = if from == "t" { "b" } else { "t" };
        ok(d, &format!("compare {top}.qcow2 s.raw"));
    }
}

#[test]
fn what_would_lose_something_is_refused_before_anything_is_written() {
    let dir = scratch();
    let d = dir.path();
    let format = ("vdi", "vdi");
    chain(d, format, 2 * MIB, &mut Rng(5));
    ok(d, "create --format vdi --parent b.vdi --parent m1.vdi other.vdi");
    let before: Vec<_> = NAMES.map(|n| fs::read(d.join(format!("{n}.vdi"))).unwrap()).into();
    let cases = [
        ("merge t.vdi --into m1.vdi", "is the parent of", "other.vdi"),
        ("merge t.vdi --from m1.vdi --into b.vdi", "is the parent of", "other.vdi"),
        ("merge t.vdi --from m1.vdi --into m2.vdi", "is the parent of", "other.vdi"),
        ("merge m2.vdi", "is the parent of", "t.vdi"),
        ("merge t.vdi --from other.vdi", "no image of the chain", "other.vdi"),
        ("merge t.vdi --into t.vdi", "into itself", "t.vdi"),
        ("merge t.vdi --from b.vdi", "no parent", "b.vdi"),
        ("merge t.vdi --into none.vdi", "no such file", "none.vdi"),
        ("merge none.vdi", "none.vdi", "none.vdi"),
    ];
    for (args, word, name) in cases {
        let line = fails(d, 1, args);
        assert!(line.contains(word) && line.contains(name), "{args}: {line}");
    }
    let held = Holder::new(d, "--read-only t.vdi");
    let line = fails(d, 1, "merge t.vdi");
    assert!(line.contains("use") || line.contains("lock"), "{line}");
    drop(held);
    let after: Vec<_> = NAMES.map(|n| fs::read(d.join(format!("{n}.vdi"))).unwrap()).into();
    assert!(before == after, "nothing was written");
    ok(d, "merge --lock-wait 20 --allow-write-to-parent t.vdi --into m1.vdi");
    ok(d, "compare m1.vdi s.raw");
}

/// Internal snapshots go with their image, and show what is beneath it.
#[test]
fn internal_snapshots_are_not_lost() {
    if !has("qemu-img") {
        return;
    }
    let dir = scratch();
    let d = dir.path();
    chain(d, ("qcow2", "qcow2"), 2 * MIB, &mut Rng(6));
    tool(d, "qemu-img", "snapshot -c one m2.qcow2");
    for args in
        ["--from m2.qcow2 --into b.qcow2", "--from m1.qcow2 --into m2.qcow2", "--from b.qcow2 --into t.qcow2"]
    {
        let line = fails(d, 1, &format!("merge t.qcow2 {args}"));
        assert!(line.contains("m2.qcow2") && line.contains("internal snapshots"), "{args}: {line}");
    }
    ok(d, "convert --output-format raw --snapshot one m2.qcow2 one.raw");
    ok(d, "merge t.qcow2");
    ok(d, "compare m2.qcow2 s.raw");
    ok(d, "compare --snapshot one m2.qcow2 one.raw");
    ok(d, "check m2.qcow2");
}

/// Somebody goes on with an image, or puts another one in its place, after a merge of it was interrupted: nothing of that is lost.
#[test]
fn what_was_written_after_an_interrupted_merge_is_merged_too() {
    let original = scratch();
    chain(original.path(), ("vdi", "vdi"), MIB, &mut Rng(8));
    let mut ended = 0;
    for n in (0..8).chain((9..60).step_by(3)) {
        let dir = scratch();
        let d = dir.path();
        copy_files(original.path(), d);
        let how = of_chain(d, "t.vdi", "t.vdi", "m2.vdi", &[]);
        if cancelled_at(&how, n).is_ok() {
            break;
        }
        ended += 1;
        if n % 2 == 0 {
            // The target is put back as it was.
            fs::copy(original.path().join("m2.vdi"), d.join("m2.vdi")).unwrap();
        }
        io_ok(d, "t.vdi", &["write -P 77 512 4k"]);
        io_ok(d, "s.raw --format raw", &["write -P 77 512 4k"]);
        ok(d, "merge t.vdi");
        assert!(!d.join("t.vdi").exists());
        ok(d, "compare m2.vdi s.raw");
    }
    assert!(ended > 2);
}

/// QEMU knows a VMDK's parent by its content ID, which must be right at every moment.
#[test]
fn chains_that_qemu_made_are_merged_and_read_by_it() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    for format in ["qcow2", "vmdk", "qed"] {
        for (from, into) in [("t", "b"), ("m", "b"), ("t", "m"), ("m", "t"), ("b", "t")] {
            let dir = scratch();
            let d = dir.path();
            tool(d, "qemu-img", &format!("create -f {format} b.{format} 8M"));
            tool(d, "qemu-img", &format!("create -f {format} -b b.{format} -F {format} m.{format}"));
            tool(d, "qemu-img", &format!("create -f {format} -b m.{format} -F {format} t.{format}"));
            // Not in this order a VMDK's content ID would not be what its child says.
            for (name, value) in [("b", 1), ("m", 2), ("t", 3)] {
                let own = format!("-f {format} {name}.{format}");
                let at = value * 700;
                let out = std::process::Command::new("qemu-io")
                    .current_dir(d)
                    .args(own.split_whitespace())
                    .args([
                        "-c",
                        &format!("write -P {value} {at}k 3M"),
                        "-c",
                        &format!("write -z {at}k 128k"),
                    ])
                    .output()
                    .expect("start qemu-io");
                assert!(out.status.success(), "{own}: {}{}", text(&out.stdout), text(&out.stderr));
                if format == "vmdk" && name != "t" {
                    relink_by_content(d, name, if name == "b" { "m" } else { "t" });
                }
            }
            tool(d, "qemu-img", &format!("convert -f {format} -O raw t.{format} s.raw"));
            let how = of_chain(
                d,
                &format!("t.{format}"),
                &format!("{from}.{format}"),
                &format!("{into}.{format}"),
                &[],
            );
            // Interrupted once on the way.
            let _ = cancelled_at(&how, 3);
            let what = format!("{format} {from} into {into}");
            tool(d, "qemu-img", &format!("compare -f {format} -F raw t.{format} s.raw"));
            cancelled_at(&how, u64::MAX).unwrap_or_else(|e| panic!("{what}: {e}"));
            let top = if from == "t" { into } else { "t" };
            tool(d, "qemu-img", &format!("compare -f {format} -F raw {top}.{format} s.raw"));
            tool(d, "qemu-img", &format!("check {top}.{format}"));
            ok(d, &format!("compare {top}.{format} s.raw"));
        }
    }
}

/// Writes a VMDK's content ID into its child, as one made now would say it.
fn relink_by_content(d: &Path, parent: &str, child: &str) {
    const DESCRIPTOR: std::ops::Range<usize> = 512..21 * 512;
    let path = |n: &str| -> PathBuf { d.join(format!("{n}.vmdk")) };
    let lines = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(&bytes[DESCRIPTOR]).into_owned();
        text.trim_end_matches('\0').lines().map(str::to_string).collect::<Vec<_>>()
    };
    let parent = lines(&fs::read(path(parent)).unwrap());
    let cid = parent.iter().find_map(|l| l.strip_prefix("CID=")).expect("a content ID");
    let mut bytes = fs::read(path(child)).unwrap();
    // the number may have fewer digits than the one before: QEMU writes no leading zeros
    let of_child = lines(&bytes).into_iter().map(|l| match l.starts_with("parentCID=") {
        true => format!("parentCID={cid}\n"),
        false => l + "\n",
    });
    let mut text = of_child.collect::<String>().into_bytes();
    text.resize(DESCRIPTOR.len(), 0);
    bytes[DESCRIPTOR].copy_from_slice(&text);
    fs::write(path(child), bytes).unwrap();
}

#[test]
fn progress_goes_to_the_end() {
    let dir = scratch();
    let d = dir.path();
    chain(d, ("vdi", "vdi"), 4 * MIB, &mut Rng(2));
    let mut seen = Vec::new();
    let mut progress = |p: job::Progress| seen.push(p);
    let how = of_chain(d, "t.vdi", "t.vdi", "b.vdi", &[]);
    let done = merge_images(&how, &mut Watch { cancelled: &|| false, progress: &mut progress }).unwrap();
    assert_eq!(done.spent.len(), 3);
    assert_eq!(done.into, d.join("b.vdi"));
    assert!(seen.iter().all(|p| p.done <= p.total));
    assert!(seen.iter().any(|p| p.done == 4 * MIB && p.total == 4 * MIB), "{seen:?}");
}

/// Everything between the target and what hides it shows something else afterwards, also if it is kept.
#[test]
fn other_children_are_found_also_with_keep_and_by_name() {
    for (ext, words) in
        [("vdi", "is the parent of"), ("qcow2", "is the parent of"), ("vmdk", "is the parent of")]
    {
        let dir = scratch();
        let d = dir.path();
        chain(d, (ext, ext), MIB, &mut Rng(7));
        ok(d, &format!("create --format {ext} --parent b.{ext} --parent m1.{ext} other.{ext}"));
        let before: Vec<_> = NAMES.map(|n| fs::read(d.join(format!("{n}.{ext}"))).unwrap()).into();
        for args in
            ["--into m1", "--into b", "--from m2 --into b", "--from m1 --into b", "--from m2 --into m1"]
        {
            let args = args.replace("m1", &format!("m1.{ext}")).replace("m2", &format!("m2.{ext}"));
            let args = if args.ends_with('b') { format!("{args}.{ext}") } else { args };
            for keep in ["", " --keep"] {
                // m1 goes, but what it shows does not change as long as it stays
                if keep == " --keep" && args.starts_with("--from m1") {
                    continue;
                }
                let line = fails(d, 1, &format!("merge{keep} t.{ext} {args}"));
                assert!(
                    line.contains(words) && line.contains(&format!("other.{ext}")),
                    "{args}{keep}: {line}"
                );
            }
        }
        let line = fails(d, 1, &format!("merge t.{ext} --from m1.{ext} --into m2.{ext}"));
        assert!(line.contains(&format!("other.{ext}")), "{line}");
        let after: Vec<_> = NAMES.map(|n| fs::read(d.join(format!("{n}.{ext}"))).unwrap()).into();
        assert!(before == after, "{ext}: nothing was written");
        // Nothing beneath it is another.
        ok(d, &format!("merge --keep t.{ext} --from m1.{ext} --into m2.{ext}"));
        ok(d, &format!("compare t.{ext} s.raw"));
    }
}

/// A raw base has no UUID: its other child is found by the name it gives its parent.
#[test]
fn a_raw_base_under_two_is_not_written() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format raw --size 1M b.raw");
    io_ok(d, "b.raw", &["write -P 1 0 1M"]);
    for name in ["t.qcow2", "other.qcow2"] {
        ok(d, &format!("create --format qcow2 --parent b.raw {name}"));
    }
    io_ok(d, "t.qcow2", &["write -P 2 0 64k"]);
    for keep in ["", "--keep"] {
        let line = fails(d, 1, &format!("merge {keep} t.qcow2"));
        assert!(line.contains("b.raw") && line.contains("other.qcow2"), "{line}");
    }
    io_ok(d, "other.qcow2", &["read -P 1 0 1M"]);
    fs::remove_file(d.join("other.qcow2")).unwrap();
    ok(d, "merge t.qcow2");
    io_ok(d, "b.raw", &["read -P 2 0 64k", "read -P 1 64k 960k"]);
}

fn descriptor(kind: &str, extents: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\n\
         # Extent description\n{extents}\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"ide\"\n"
    )
}

/// What would be written there would be lost.
#[test]
fn a_target_that_forgets_or_refuses_writes_in_places_is_not_touched() {
    let cases = [
        ("partitionedDevice", "RW 2048 FLAT \"p.raw\" 0\nRW 2048 ZERO"),
        ("twoGbMaxExtentFlat", "RW 2048 FLAT \"p.raw\" 0\nRDONLY 2048 FLAT \"q.raw\" 0"),
    ];
    for (kind, extents) in cases {
        let dir = scratch();
        let d = dir.path();
        fs::write(d.join("p.raw"), vec![1; MIB as usize]).unwrap();
        fs::write(d.join("q.raw"), vec![2; MIB as usize]).unwrap();
        fs::write(d.join("b.vmdk"), descriptor(kind, extents)).unwrap();
        ok(d, "create --format qcow2 --parent b.vmdk t.qcow2");
        io_ok(d, "t.qcow2", &["write -P 3 0 64k"]);
        let line = fails(d, 1, "merge t.qcow2");
        assert!(line.contains("b.vmdk") && line.contains("takes no writes"), "{kind}: {line}");
        assert!(fs::read(d.join("p.raw")).unwrap().iter().all(|b| *b == 1));
        assert!(d.join("t.qcow2").exists());
    }
    // A CD by its name, which moreover would have to grow.
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("b.iso"), vec![1; MIB as usize]).unwrap();
    ok(d, "create --format qcow2 --parent b.iso,format=raw --size 2M t.qcow2");
    io_ok(d, "t.qcow2", &["write -P 3 0 64k"]);
    let line = fails(d, 1, "merge t.qcow2");
    assert!(line.contains("optical"), "{line}");
    assert!(fs::read(d.join("b.iso")).unwrap() == vec![1; MIB as usize]);
}

/// What may belong to others is left, and told.
#[test]
fn only_files_that_are_the_images_own_are_removed() {
    let dir = scratch();
    let d = dir.path();
    let mut signed = vec![1; MIB as usize];
    signed[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    for (name, bytes) in
        [("p.raw", vec![1; MIB as usize]), ("q.raw", vec![2; MIB as usize]), ("r.raw", signed)]
    {
        fs::write(d.join(name), bytes).unwrap();
    }
    let extents = "RW 2048 FLAT \"p.raw\" 0\nRDONLY 2048 FLAT \"q.raw\" 0\nRW 2048 FLAT \"r.raw\" 0";
    fs::write(d.join("b.vmdk"), descriptor("twoGbMaxExtentFlat", extents)).unwrap();
    ok(d, "create --format qcow2 --parent b.vmdk t.qcow2");
    let said = ok(d, "merge t.qcow2 --from b.vmdk --into t.qcow2");
    for line in ["b.vmdk: merged into", "p.raw: removed", "q.raw: not removed", "r.raw: not removed"] {
        assert!(said.contains(line), "{said}");
    }
    for (name, there) in [("b.vmdk", false), ("p.raw", false), ("q.raw", true), ("r.raw", true)] {
        assert_eq!(d.join(name).exists(), there, "{name}");
    }
    io_ok(d, "t.qcow2", &["read -P 1 0 1M", "read -P 2 1M 1M", "read -P 1 2097664 512"]);
    // A link is not what it leads to.
    fs::create_dir(d.join("far")).unwrap();
    ok(d, "create --format vdi --size 1M b.vdi");
    ok(d, "create --format vdi --parent b.vdi far/t.vdi");
    io_ok(d, "--parent b.vdi far/t.vdi", &["write -P 3 0 64k"]);
    std::os::unix::fs::symlink("far/t.vdi", d.join("t.vdi")).unwrap();
    let said = ok(d, "merge --parent b.vdi t.vdi");
    assert!(said.contains("t.vdi: not removed: its name is a link"), "{said}");
    io_ok(d, "--read-only b.vdi", &["read -P 3 0 64k"]);
    assert!(d.join("far/t.vdi").exists());
}

/// The parts of a removed image go with it.
#[test]
fn the_extents_of_a_split_image_go_with_it() {
    let dir = scratch();
    let d = dir.path();
    for n in 0..2 {
        fs::write(d.join(format!("b-f00{n}.vmdk")), vec![1; MIB as usize]).unwrap();
    }
    let extents = "RW 2048 FLAT \"b-f000.vmdk\" 0\nRW 2048 FLAT \"b-f001.vmdk\" 0";
    fs::write(d.join("b.vmdk"), descriptor("twoGbMaxExtentFlat", extents)).unwrap();
    ok(d, "create --format vmdk --parent b.vmdk t.vmdk");
    io_ok(d, "t.vmdk", &["write -P 3 0 64k"]);
    let said = ok(d, "merge t.vmdk --from b.vmdk --into t.vmdk");
    assert!(said.contains("b-f001.vmdk: removed"), "{said}");
    let left: Vec<_> = fs::read_dir(d).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(left, ["t.vmdk"]);
    io_ok(d, "t.vmdk", &["read -P 3 0 64k", "read -P 1 64k 1984k"]);
}

/// Somebody who heeds no locks writes to an image that is being merged: it is not removed.
#[test]
fn what_changes_without_a_lock_meanwhile_is_not_removed() {
    for what in ["written", "replaced"] {
        let dir = scratch();
        let d = dir.path();
        chain(d, ("vdi", "vdi"), MIB, &mut Rng(8));
        let how = of_chain(d, "t.vdi", "m2.vdi", "m1.vdi", &[]);
        let path = d.join("m2.vdi");
        let done = Cell::new(false);
        let cancelled = || {
            if !done.replace(true) {
                let bytes = fs::read(&path).unwrap();
                if what == "replaced" {
                    fs::rename(&path, d.join("old.bin")).unwrap();
                }
                fs::write(&path, bytes).unwrap();
            }
            false
        };
        let e = merge_images(&how, &mut Watch { cancelled: &cancelled, progress: &mut |_| () }).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Locked, "{e}");
        assert!(e.to_string().contains(what) && path.exists(), "{e}");
        shows(d, ("vdi", "vdi"), what);
    }
}

/// A file is called what the command calls it, whatever that is a link to.
#[test]
fn a_parents_name_is_the_one_it_was_opened_by() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format qcow2 --size 1M base-v1.qcow2");
    std::os::unix::fs::symlink("base-v1.qcow2", d.join("base.qcow2")).unwrap();
    ok(d, "create --format qcow2 --parent base.qcow2 m.qcow2");
    io_ok(d, "m.qcow2", &["write -P 1 0 64k"]);
    ok(d, "create --format qcow2 --parent base.qcow2 --parent m.qcow2 t.qcow2");
    ok(d, "merge --parent base.qcow2 --parent m.qcow2 t.qcow2 --from m.qcow2 --into base.qcow2");
    let named = text(&run(d, "info --output json t.qcow2").stdout);
    assert!(named.contains("\"base.qcow2\""), "{named}");
    io_ok(d, "t.qcow2", &["read -P 1 0 64k"]);
}

/// What the disk holds of such an image is unknown: neither is it written nor are its bytes believed and then removed.
#[test]
fn an_image_of_which_a_sync_has_failed_is_not_merged() {
    use std::os::unix::fs::MetadataExt;
    for marked in ["t", "m2", "b"] {
        let dir = scratch();
        let d = dir.path();
        chain(d, ("vdi", "vdi"), MIB, &mut Rng(9));
        let meta = fs::metadata(d.join(format!("{marked}.vdi"))).unwrap();
        let made = meta.created().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        let made = made.map_or(0, |t| t.as_nanos());
        let runtime = d.join("run");
        fs::create_dir_all(runtime.join("vdblk")).unwrap();
        let mark = runtime.join(format!("vdblk/sync-failed-{:x}-{:x}-{made:x}", meta.dev(), meta.ino()));
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        fs::write(&mark, boot.trim()).unwrap();
        let before: Vec<_> = NAMES.map(|n| fs::read(d.join(format!("{n}.vdi"))).unwrap()).into();
        let args = "merge t.vdi --from m2.vdi --into b.vdi";
        let out = vdimg(d, args).env("XDG_RUNTIME_DIR", &runtime).output().unwrap();
        let line = failed(args, 1, out);
        assert!(line.contains(&format!("{marked}.vdi")) && line.contains("sync"), "{line}");
        let after: Vec<_> = NAMES.map(|n| fs::read(d.join(format!("{n}.vdi"))).unwrap()).into();
        assert!(before == after, "{marked}: nothing was written");
        fs::remove_file(mark).unwrap();
        succeeded(args, vdimg(d, args).env("XDG_RUNTIME_DIR", &runtime).output().unwrap());
    }
}

/// That a child says when its parent was changed is nice to have: one that cannot is told, and the merge is done.
#[test]
fn a_child_that_cannot_say_when_its_parent_was_changed_is_no_hindrance() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 1M b.vdi");
    io_ok(d, "b.vdi", &["write -P 1 0 1M"]);
    ok(d, "create --format vdi --parent b.vdi m.vdi");
    io_ok(d, "m.vdi", &["write -P 2 0 64k"]);
    ok(d, "create --format vhdx --parent b.vdi --parent m.vdi t.vhdx");
    let args = "merge --parent b.vdi --parent m.vdi t.vhdx --from b.vdi --into m.vdi";
    let out = run(d, args);
    assert!(out.status.success() && text(&out.stderr).contains("warning: t.vhdx"), "{}", text(&out.stderr));
    assert!(!d.join("b.vdi").exists());
    io_ok(d, "--parent m.vdi t.vhdx", &["read -P 2 0 64k", "read -P 1 64k 960k"]);
}

/// Another child that turns up while an image is being merged keeps it from being removed.
#[test]
fn a_child_that_comes_meanwhile_keeps_its_parent() {
    let dir = scratch();
    let d = dir.path();
    chain(d, ("vdi", "vdi"), MIB, &mut Rng(8));
    ok(d, "create --format vdi --parent b.vdi --parent m1.vdi --parent m2.vdi other.vdi");
    let elsewhere = scratch();
    fs::rename(d.join("other.vdi"), elsewhere.path().join("other.vdi")).unwrap();
    let how = of_chain(d, "t.vdi", "m2.vdi", "m1.vdi", &[]);
    let done = Cell::new(false);
    let cancelled = || {
        if !done.replace(true) {
            fs::copy(elsewhere.path().join("other.vdi"), d.join("other.vdi")).unwrap();
        }
        false
    };
    let e = merge_images(&how, &mut Watch { cancelled: &cancelled, progress: &mut |_| () }).unwrap_err();
    assert!(e.kind() == ErrorKind::ReadOnly && e.to_string().contains("other.vdi"), "{e}");
    for name in ["t.vdi", "other.vdi"] {
        assert!(run(d, &format!("info {name}")).status.success());
    }
    shows(d, ("vdi", "vdi"), "the top");
    assert!(d.join("m2.vdi").exists());
}

/// As the kernel is asked: the target durable before names of parents change, those durable before the first file goes.
#[test]
fn each_part_is_durable_before_the_next_begins() {
    if !has("strace") {
        return;
    }
    for (format, from, into, child) in [
        (("vdi", "vdi"), "m2", "b", "t"),
        (("qcow2", "qcow2"), "m2", "b", "t"),
        (("vmdk", "vmdk"), "b", "m2", "m2"),
    ] {
        let dir = scratch();
        let d = dir.path();
        let ext = format.1;
        chain(d, format, MIB, &mut Rng(4));
        let calls = "trace=pwrite64,pwritev2,fsync,fdatasync,unlink,unlinkat";
        let out = std::process::Command::new("strace")
            .current_dir(d)
            .args(["-f", "-y", "-o", "calls", "-e", calls, env!("CARGO_BIN_EXE_vdimg"), "merge"])
            .args(format!("t.{ext} --from {from}.{ext} --into {into}.{ext}").split_whitespace())
            .output()
            .expect("start strace");
        if !out.status.success() && text(&out.stderr).contains("ptrace") {
            println!("skipped: nothing can be traced here");
            return;
        }
        assert!(out.status.success(), "{}", text(&out.stderr));
        let calls = fs::read_to_string(d.join("calls")).unwrap();
        let lines: Vec<&str> = calls.lines().collect();
        let of = |name: &str, words: [&str; 2]| -> Vec<usize> {
            let file = format!("/{name}.{ext}>");
            let is = |l: &str| words.iter().any(|w| l.contains(w)) && l.contains(&file);
            (0..lines.len()).filter(|n| is(lines[*n])).collect()
        };
        let (write, sync) = (["pwrite64(", "pwritev2("], ["fdatasync(", "fsync("]);
        let gone = lines.iter().position(|l| l.contains("unlink")).expect("a file is removed");
        let folder = format!("{}>", fs::canonicalize(d).unwrap().display());
        let is_folder = |l: &&str| l.contains("sync(") && l.contains(&folder);
        assert!(lines[..gone].iter().any(is_folder) && lines[gone..].iter().any(is_folder), "{calls}");
        for name in [into, child] {
            let last = *of(name, write).last().expect("it is written");
            assert!(of(name, sync).iter().any(|n| (last..gone).contains(n)), "{ext}, {name}: {calls}");
        }
        if child != into {
            let (bytes, link) = (*of(into, write).last().unwrap(), of(child, write)[0]);
            assert!(of(into, sync).iter().any(|n| (bytes..link).contains(n)), "{ext}: {calls}");
        }
    }
}
