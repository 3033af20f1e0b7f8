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
            assert!(
                !fs::read_dir(d)
                    .unwrap()
                    .any(|f| { f.unwrap().file_name().to_string_lossy().contains("merge") }),
                "{what}: the note is left"
            );
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

/// At each moment at which it looks a merge ends; the disk shows the same, and the same call completes it.
#[test]
fn a_merge_that_is_cancelled_anywhere_is_completed_by_the_same_call() {
    for (seed, format) in (10..).zip(FORMATS) {
        let (name, ext) = format;
        let original = scratch();
        chain(original.path(), format, MIB, &mut Rng(seed));
        for (from, into) in [("t", "b"), ("m2", "b"), ("b", "m2")] {
            let mut ended = 0;
            for n in (0..8).chain([9, 11, 14]).chain((18..).step_by(7)) {
                let dir = scratch();
                let d = dir.path();
                copy_files(original.path(), d);
                let what = format!("{ext} {from} into {into}, look {n}");
                let [b, m1, m2, t] = NAMES.map(|n| format!("{n}.{ext}"));
                let below: Vec<&str> = if name == "parallels" { vec![&b, &m1, &m2] } else { Vec::new() };
                let how = of_chain(d, &t, &format!("{from}.{ext}"), &format!("{into}.{ext}"), &below);
                match cancelled_at(&how, n) {
                    Err(e) => assert_eq!(e.kind(), ErrorKind::Cancelled, "{what}: {e}"),
                    Ok(_) => break,
                }
                ended += 1;
                // Once files go the one on top may be another; until then it is there.
                let untouched = NAMES.iter().all(|n| d.join(format!("{n}.{ext}")).exists());
                if untouched {
                    shows(d, format, &what);
                }
                cancelled_at(&how, u64::MAX).unwrap_or_else(|e| panic!("{what}: {e}"));
                shows(d, format, &what);
                let left = fs::read_dir(d).unwrap().count();
                let images = if from == "t" { 1 } else { 2 };
                assert_eq!(left, images + 1, "{what}: files are left");
            }
            assert!(ended > 5, "{ext} {from} into {into}: ended {ended} times");
        }
    }
}

/// The process is killed at some moment, more than once.
#[test]
fn a_merge_that_is_killed_is_completed_by_the_same_command() {
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
        let left = |name: &str| d.join(name).exists();
        if left("m1.vdi") || left("m2.vdi") || left("m2.vdi.vdimg-merge") {
            ok(d, args);
        }
        shows(d, format, &format!("completed after {delay} ms"));
        check_all(d, format, "completed");
        assert!(!left("m1.vdi") && !left("m2.vdi") && !left("m2.vdi.vdimg-merge"));
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

/// Somebody goes on with an image after a merge of it was interrupted: what he has written is not removed.
#[test]
fn what_was_written_after_an_interrupted_merge_is_merged_too() {
    let original = scratch();
    let format = ("vdi", "vdi");
    chain(original.path(), format, MIB, &mut Rng(8));
    let mut left = 0;
    for n in 0..60 {
        let dir = scratch();
        let d = dir.path();
        copy_files(original.path(), d);
        let how = of_chain(d, "t.vdi", "t.vdi", "m2.vdi", &[]);
        if cancelled_at(&how, n).is_ok() {
            break;
        }
        left += u32::from(d.join("t.vdi.vdimg-merge").exists());
        io_ok(d, "t.vdi", &["write -P 77 512 4k"]);
        ok(d, "merge t.vdi");
        assert!(!d.join("t.vdi").exists() && !d.join("t.vdi.vdimg-merge").exists());
        io_ok(d, "m2.vdi", &["read -P 77 512 4k"]);
    }
    assert!(left > 0, "none was interrupted late enough to leave its note");
}

/// A note decides what is removed: nobody else's is believed.
#[test]
fn a_note_that_others_may_write_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = scratch();
    let d = dir.path();
    chain(d, ("vdi", "vdi"), MIB, &mut Rng(8));
    let note = d.join("t.vdi.vdimg-merge");
    fs::write(&note, "{}").unwrap();
    fs::set_permissions(&note, fs::Permissions::from_mode(0o666)).unwrap();
    let line = fails(d, 1, "merge t.vdi");
    assert!(line.contains("no note of a merge"), "{line}");
    // One that is not whole is of no use.
    fs::set_permissions(&note, fs::Permissions::from_mode(0o600)).unwrap();
    ok(d, "merge t.vdi");
    ok(d, "compare m2.vdi s.raw");
    assert!(!note.exists());
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
    let path = |n: &str| -> PathBuf { d.join(format!("{n}.vmdk")) };
    let value = |bytes: &[u8], key: &str| {
        let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).expect("a key") + key.len();
        (at, bytes[at..at + 8].to_vec())
    };
    let (_, cid) = value(&fs::read(path(parent)).unwrap(), "\nCID=");
    let mut bytes = fs::read(path(child)).unwrap();
    let (at, _) = value(&bytes, "parentCID=");
    bytes[at..at + 8].copy_from_slice(&cid);
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
