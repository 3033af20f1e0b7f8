//! Bad input: one line on standard error that says what and what to do, the right exit status, nothing lost.

mod vdimg_support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vdblk::format::Format;
use vdimg_support::*;

/// Every command on one file, with the exit status of its errors.
fn every_command(file: &str) -> Vec<(i32, String)> {
    let mut all: Vec<_> = ["info", "info --output json", "check", "repair", "map", "io --command flush"]
        .iter()
        .map(|c| (1, format!("{c} {file}")))
        .collect();
    all.push((1, format!("convert --output-format raw {file} new.raw")));
    all.push((1, format!("create --format vdi --parent {file} new.vdi")));
    all.push((2, format!("compare {file} {file}")));
    all
}

fn nothing_new(d: &Path) {
    assert!(!d.join("new.raw").exists() && !d.join("new.vdi").exists());
}

#[test]
fn files_that_are_not_there() {
    let dir = scratch();
    for (status, args) in every_command("missing.vdi") {
        let line = fails(dir.path(), status, &args);
        assert!(
            line.starts_with("missing.vdi: cannot open it") && line.contains("No such file"),
            "{args}: {line}"
        );
    }
    nothing_new(dir.path());
    for args in
        ["create --format vdi --size 1M no/such/folder.vdi", "create --format raw --size 1M no/folder"]
    {
        assert!(fails(dir.path(), 1, args).contains("cannot create it: No such file"), "{args}");
    }
}

#[test]
fn files_that_are_no_images() {
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("text.vdi"), "just a text, and not a long one").expect("write");
    fs::write(d.join("empty.vdi"), "").expect("write");
    fs::create_dir(d.join("folder.vdi")).expect("folder");
    for (file, want) in [
        ("text.vdi", "no VDI signature"),
        ("empty.vdi", "no VDI signature"),
        ("folder.vdi", "is a directory"),
        ("/dev/null", "is a character device"),
    ] {
        for (status, args) in every_command(file) {
            let line = fails(d, status, &args);
            assert!(line.starts_with(file) && line.contains(want), "{args}: {line}");
        }
    }
    nothing_new(d);
    assert_eq!(fs::read(d.join("text.vdi")).expect("read"), b"just a text, and not a long one");
}

#[test]
fn raw_is_never_guessed() {
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("disk.img"), vec![0; 8192]).expect("write");
    for (status, args) in every_command("disk.img") {
        assert!(fails(d, status, &args).contains("--format raw"), "{args}");
    }
    ok(d, "info --format RAW disk.img");
    ok(d, "create --format vdi --parent disk.img,format=raw over.vdi");
    // A guest that writes a signature into its raw disk changes nothing.
    ok(d, "create --format vdi --size 1M a.vdi");
    fs::rename(d.join("a.vdi"), d.join("a.raw")).expect("rename");
    assert!(ok(d, "info a.raw").contains("format: raw"));
}

#[test]
fn formats_that_cannot_be_created() {
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("s.raw"), [1; 512]).expect("write");
    let read_only: Vec<_> = Format::ALL.into_iter().filter(|f| !f.can_be_created()).collect();
    assert!(read_only.contains(&Format::Dmg) && !read_only.contains(&Format::Vdi));
    for format in read_only {
        let line = fails(d, 1, &format!("create --format {format} --size 1M new.raw"));
        assert!(line.contains("cannot be created yet"), "{line}");
        let line = fails(d, 1, &format!("convert --output-format {format} s.raw new.raw"));
        assert!(line.contains("cannot be created yet"), "{line}");
    }
    nothing_new(d);
}

#[test]
fn command_lines_that_make_no_sense() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 1M a.vdi");
    for args in [
        "",
        "frobnicate",
        "info",
        "info --output xml a.vdi",
        "info a.vdi b.vdi",
        "info --format disk a.vdi",
        "check --parent a.vdi,format=disk a.vdi",
        "create --format vdi new.vdi",
        "create --size 1M new.vdi",
        "create --format vdi --size 1X new.vdi",
        "create --format vdi --size -1 new.vdi",
        "create --format vdi --size 99999999T new.vdi",
        "create --format vdi --size 1M --uuid 123 new.vdi",
        "create --format vdi --size 1M --option Block new.vdi",
        "convert --output-format raw a.vdi",
        "compare a.vdi",
        "map --lock-wait soon a.vdi",
        "io --bogus a.vdi",
    ] {
        let line = fails(d, 2, args);
        assert!(line.contains("--help"), "{args}: {line}");
    }
    nothing_new(d);
}

#[test]
fn values_an_image_cannot_have() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 1M a.vdi");
    for (args, want) in [
        ("create --format vdi --size 0 new.vdi", "multiple of 512"),
        ("create --format vdi --size 1000 new.vdi", "multiple of 512"),
        ("create --format raw --size 511 new.vdi", "multiple of 512"),
        ("create --format vdi --size 5P new.vdi", "at most"),
        ("create --format vdi --size 4P new.vdi", "larger block size"),
        ("create --format vdi --size 1M --variant split new.vdi", "dynamic, fixed or zero-expand"),
        ("create --format raw --size 1M --variant diff new.vdi", "unknown variant 'diff'"),
        ("create --format vdi --size 1M --option Colour=red new.vdi", "known: AllocationBlockSize"),
        ("create --format vdi --size 1M --option AllocationBlockSize=3M new.vdi", "power of two"),
        ("create --format vdi --size 1M --option AllocationBlockSize=big new.vdi", "is not a size"),
        ("create --format raw --size 1M --option AllocationBlockSize=1M new.vdi", "it has none"),
        ("create --format vdi --size 1M --uuid 00000000-0000-0000-0000-000000000000 new.vdi", "nil UUID"),
        ("create --format raw --size 1M --comment x new.vdi", "no comment"),
        ("create --format raw --parent a.vdi new.vdi", "no parent"),
        ("create --format vdi --variant fixed --parent a.vdi new.vdi", "cannot be fixed"),
        ("convert --output-format vdi --variant odd a.vdi new.vdi", "unknown variant"),
        ("convert --output-format raw --option a=b a.vdi new.vdi", "unknown option"),
    ] {
        let line = fails(d, 1, args);
        assert!(line.contains(want), "{args}: {line}");
        nothing_new(d);
    }
    let long = "x".repeat(256);
    assert!(fails(d, 1, &format!("create --format vdi --size 1M --comment {long} new.vdi")).contains("255"));
}

#[test]
fn images_another_process_holds() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 4M a.vdi");
    let writer = Holder::new(d, "a.vdi");
    for (status, args) in every_command("a.vdi") {
        if args.starts_with("info") {
            ok(d, &args);
            continue;
        }
        let line = fails(d, status, &args);
        // Who wants to write hears only that it is in use.
        let writes = args.starts_with("repair") || args.starts_with("io");
        let how = if writes { "is using it" } else { "has it open for writing" };
        assert!(line.starts_with(&format!("a.vdi: another process {how}")), "{args}: {line}");
    }
    nothing_new(d);
    if has("qemu-img") {
        let out = Command::new("qemu-img").current_dir(d).args(["check", "a.vdi"]).output().expect("start");
        assert!(!out.status.success() && text(&out.stderr).contains("lock"), "{out:?}");
    }
    drop(writer);
    let reader = Holder::new(d, "--read-only a.vdi");
    ok(d, "check a.vdi");
    ok(d, "map a.vdi");
    ok(d, "compare a.vdi a.vdi");
    for args in ["repair a.vdi", "io --command flush a.vdi"] {
        assert!(fails(d, 1, args).starts_with("a.vdi: another process is using it"), "{args}");
    }
    drop(reader);
    ok(d, "repair --lock-wait 20 a.vdi");
}

#[test]
fn a_parent_that_is_being_written_to() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 4M a.vdi");
    ok(d, "create --format vdi --parent a.vdi d.vdi");
    let _writer = Holder::new(d, "--allow-write-to-parent a.vdi");
    assert!(fails(d, 1, "map d.vdi").contains("a.vdi: another process has it open for writing"));
    assert!(fails(d, 1, "create --format vdi --parent a.vdi new.vdi").contains("a.vdi: another process"));
    nothing_new(d);
    ok(d, "check d.vdi");
    assert!(ok(d, "info d.vdi").contains("a.vdi (vdi, dynamic)"));
}

#[test]
fn a_lock_is_waited_for_if_asked() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 4M a.vdi");
    let writer = Holder::new(d, "a.vdi");
    let start = Instant::now();
    assert!(fails(d, 1, "map --lock-wait 1 a.vdi").contains("for 1 s by now"));
    assert!(start.elapsed() >= Duration::from_secs(1));
    let waiting = vdimg(d, "map --lock-wait 60 a.vdi").stdout(Stdio::null()).spawn().expect("start");
    std::thread::sleep(Duration::from_millis(200));
    drop(writer);
    assert!(waiting.wait_with_output().expect("end").status.success());
}

#[test]
fn parents_that_do_not_fit() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 4M a.vdi");
    ok(d, "create --format vdi --size 4M other.vdi");
    io_ok(d, "other.vdi", &["write -P 6 0 1M"]);
    ok(d, "create --format vdi --parent a.vdi d.vdi");
    ok(d, "create --format vdi --parent a.vdi --parent d.vdi e.vdi");
    let fails_with = |args: &str, want: &str| {
        let line = fails(d, 1, args);
        assert!(line.contains(want), "{args}: {line}");
    };
    fails_with("map --parent other.vdi d.vdi", "its parent has UUID");
    fails_with("map --parent d.vdi --parent a.vdi e.vdi", "its parent has UUID");
    fails_with("map --parent d.vdi e.vdi", "its parent");
    fails_with("map --parent a.vdi a.vdi", "is a base image");
    fails_with("map --parent d.vdi d.vdi", "twice in its own chain");
    fails_with("map --parent missing.vdi d.vdi", "missing.vdi: cannot open it");
    fails_with("convert --output-format raw --parent other.vdi d.vdi new.raw", "--allow-parent-mismatch");
    nothing_new(d);
    ok(d, "convert --output-format raw --parent other.vdi --allow-parent-mismatch d.vdi forced.raw");
    let both = "compare --parent other.vdi d.vdi --parent2 other.vdi d.vdi";
    for (options, status) in [("", 2), (" --allow-parent-mismatch", 2), (" --allow-parent-mismatch2", 2)] {
        fails(d, status, &format!("{both}{options}"));
    }
    ok(d, &format!("{both} --allow-parent-mismatch --allow-parent-mismatch2"));
    ok(d, "compare other.vdi forced.raw");

    fs::copy(d.join("a.vdi"), d.join("copy.vdi")).expect("copy");
    fails_with("map d.vdi", "two files have its parent's UUID");
    fs::remove_file(d.join("copy.vdi")).expect("remove");
    ok(d, "map d.vdi");
    fs::remove_file(d.join("a.vdi")).expect("remove");
    fails_with("map d.vdi", "name it with --parent FILE, or the folder with --parent-dir DIR");
    fails_with("convert --output-format raw e.vdi new.raw", "was not found");
    nothing_new(d);
}

#[test]
fn images_that_are_cut_or_damaged() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 4M a.vdi");
    io_ok(d, "a.vdi", &["write 0 2M"]);
    let good = fs::read(d.join("a.vdi")).expect("read");
    for len in [0x60, 0x100, 0x180, 0x1d7, MIB as usize + 3, 2 * MIB as usize + 5, good.len() - MIB as usize]
    {
        fs::write(d.join("b.vdi"), &good[..len]).expect("write");
        for (args, status) in
            [("map b.vdi", 1), ("convert --output-format raw b.vdi new.raw", 1), ("compare a.vdi b.vdi", 2)]
        {
            let line = fails(d, status, args);
            assert!(line.starts_with("b.vdi: "), "{len}, {args}: {line}");
        }
        assert_ne!(run(d, "check b.vdi").status.code(), Some(0), "{len}");
        nothing_new(d);
    }
}

#[test]
fn files_without_permission() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 1M a.vdi");
    fs::set_permissions(d.join("a.vdi"), fs::Permissions::from_mode(0o000)).expect("mode");
    fs::set_permissions(d, fs::Permissions::from_mode(0o555)).expect("mode");
    if !is_root() {
        for (status, args) in every_command("a.vdi") {
            let line = fails(d, status, &args);
            assert!(
                line.starts_with("a.vdi: cannot open it") && line.contains("Permission denied"),
                "{line}"
            );
        }
        assert!(fails(d, 1, "create --format vdi --size 1M new.vdi").contains("Permission denied"));
    } else if let Some(run) = as_nobody(d, "--version").filter(|o| o.status.success()) {
        drop(run);
        for args in ["info a.vdi", "map a.vdi", "repair a.vdi", "create --format vdi --size 1M new.vdi"] {
            let line = failed(args, 1, as_nobody(d, args).expect("as before"));
            assert!(line.contains(".vdi: cannot ") && line.contains("Permission denied"), "{line}");
        }
    } else {
        println!("skipped: root may do everything, and nobody cannot be asked");
    }
    fs::set_permissions(d, fs::Permissions::from_mode(0o755)).expect("mode");
    nothing_new(d);
}

/// vdimg as a user without rights.
fn as_nobody(d: &Path, args: &str) -> Option<std::process::Output> {
    let mut c = Command::new("setpriv");
    c.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(env!("CARGO_BIN_EXE_vdimg"));
    c.current_dir(d).args(args.split_whitespace()).output().ok()
}
