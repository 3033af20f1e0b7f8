//! What vdblk writes is what QEMU reads, and `qemu-img check` finds nothing: random changes to images of all shapes, made by
//! either, with QEMU's own changes in between. Where qemu-img and qemu-io are not installed nothing is tested, and that is said.

mod qemu_support;

use qemu_support::{Case, MIB, Rng, changed_by_both, differs, has_tools, run, vdimg};
use std::path::Path;
use std::process::Command;
use vdblk::format::{FileStep, Format, ImageFile, check, repair};
use vdblk::map::FileId;

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn created(options: &[&str]) {
    changed_by_both("qcow2", &options.join(","), false, |_, image| {
        let options = options.iter().flat_map(|o| ["--option", *o]);
        let args: Vec<_> = ["create", "--format", "qcow2", "--size", "6291968"]
            .into_iter()
            .chain(options)
            .chain([image])
            .collect();
        vdimg(&args);
    });
}

#[test]
fn images_of_ours_are_sound() {
    if !has_tools() {
        return;
    }
    created(&[]);
    created(&["compat=0.10"]);
    created(&["cluster_size=512", "refcount_bits=64"]);
    created(&["cluster_size=2M", "refcount_bits=1"]);
    created(&["extended_l2=on", "cluster_size=16k"]);
}

#[test]
fn images_of_qemu_stay_sound() {
    if !has_tools() {
        return;
    }
    for options in ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=4k,lazy_refcounts=on"] {
        changed_by_both("qcow2", &format!("backing {options}"), true, |raw, image| {
            run("qemu-img", &["create", "-f", "qcow2", "-o", options, "-b", raw, "-F", "raw", image]);
        });
        changed_by_both("qcow2", &format!("packed {options}"), true, |raw, image| {
            run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", options, raw, image]);
        });
    }
    changed_by_both("qcow2", "preallocated", false, |_, image| {
        run("qemu-img", &["create", "-f", "qcow2", "-o", "preallocation=metadata", image, "6291968"]);
    });
}

/// What an internal snapshot holds stays as it was, whatever is written.
#[test]
fn snapshots_are_not_written_to() {
    if !has_tools() {
        return;
    }
    for options in ["compat=1.1", "extended_l2=on", "cluster_size=512", "compression_type=zstd"] {
        let dir = tempfile::tempdir().expect("temporary folder");
        let mut case = Case {
            dir: dir.path(),
            format: "qcow2",
            model: vec![0; 6 * MIB + 512],
            rng: Rng(options.len() as u64),
        };
        let raw = text(&dir.path().join("base.raw")).to_string();
        case.model[100_000..3 * MIB].fill(77);
        std::fs::write(&raw, &case.model).expect("a file");
        run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", options, &raw, &case.image()]);
        case.change(10);
        run("qemu-img", &["snapshot", "-c", "before", &case.image()]);
        let before = case.model.clone();
        case.change(25);
        case.judge(options);
        assert_eq!(differs(&case.shown(&["-l", "before"]), &before), None, "{options}");
        shown_and_gone_back_to(&mut case, &before);
    }
}

/// The snapshot "before" shows the same through vdimg by its name and its number, and still once QEMU has gone back to it.
fn shown_and_gone_back_to(case: &mut Case<'_>, before: &[u8]) {
    let (image, out) = (case.image(), text(&case.dir.join("snapshot.raw")).to_string());
    let list: serde_json::Value =
        serde_json::from_slice(&vdimg(&["info", "--output", "json", &image]).stdout).expect("JSON");
    let one = &list["snapshots"][0];
    assert_eq!((one["name"].as_str(), one["vm_state_size"].as_u64()), (Some("before"), Some(0)), "{list}");
    assert_eq!(one["virtual_size"], before.len());
    assert!(list["allocated_blocks"].as_u64() > Some(0), "{list}");
    for name in ["before", one["id"].as_str().expect("a number as text")] {
        let _ = std::fs::remove_file(&out);
        vdimg(&["convert", "--snapshot", name, "--output-format", "raw", &image, &out]);
        assert_eq!(differs(&std::fs::read(&out).expect("a copy"), before), None, "{name}");
        vdimg(&["compare", "--snapshot", name, &image, &out]);
        vdimg(&["compare", "--snapshot2", name, &out, &image]);
        assert!(!vdimg(&["map", "--snapshot", name, &image]).stdout.is_empty());
    }
    vdimg(&["io", "--snapshot", "before", "-c", "read 0 1M", &image]);
    let written = ["io", "--snapshot", "before", "-c", "write 0 512", &image];
    let refused = Command::new(env!("CARGO_BIN_EXE_vdimg")).args(written).output().expect("vdimg");
    assert!(!refused.status.success(), "a snapshot was written to");
    run("qemu-img", &["snapshot", "-a", "before", &image]);
    case.model.copy_from_slice(before);
    case.judge("gone back");
    case.change(20);
    case.judge("changed again");
    assert_eq!(
        differs(&case.shown(&["-l", "before"]), before),
        None,
        "the snapshot after it was gone back to"
    );
}

/// Space of packed clusters that were written over goes back at the close, as does that of discarded ones at once.
#[test]
fn what_is_free_takes_no_space() {
    use std::os::unix::fs::MetadataExt;
    if !has_tools() {
        return;
    }
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut case = Case { dir: dir.path(), format: "qcow2", model: vec![0; 6 * MIB], rng: Rng(9) };
    let raw = text(&dir.path().join("base.raw")).to_string();
    // Every other byte is by chance: it packs to about a half.
    for at in (0..case.model.len()).step_by(2) {
        case.model[at] = u8::try_from(case.rng.below(256)).expect("a byte");
    }
    std::fs::write(&raw, &case.model).expect("a file");
    run("qemu-img", &["convert", "-c", "-O", "qcow2", &raw, &case.image()]);
    let used = |case: &Case<'_>| std::fs::metadata(case.image()).expect("the image").blocks() * 512;
    let packed = used(&case);
    assert!((2 << 20..5 << 20).contains(&packed), "{packed} bytes packed");
    vdimg(&["io", "-c", "write -P 7 0 6M", &case.image()]);
    case.model.fill(7);
    assert!(used(&case) < (6 << 20) + (1 << 20), "{} bytes are used, {packed} were", used(&case));
    case.judge("written over");
    vdimg(&["io", "-c", "discard 1M 4M", "-c", "flush", &case.image()]);
    case.model[MIB..5 * MIB].fill(0);
    assert!(used(&case) < (2 << 20) + (1 << 20), "{} bytes are used after a discard", used(&case));
    case.judge("discarded");
    case.change_by_qemu();
    case.change(5);
    case.judge("changed by both");
}

/// Refcounts of a sound image overwritten at random: our repair is one for QEMU as well, and shows the same.
#[test]
fn repaired_images_are_sound() {
    if !has_tools() {
        return;
    }
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut case = Case { dir: dir.path(), format: "qcow2", model: vec![0; 6 * MIB], rng: Rng(5) };
    vdimg(&["create", "--format", "qcow2", "--size", "6M", &case.image()]);
    case.change(20);
    let sound = std::fs::read(case.image()).expect("an image");
    for _ in 0..6 {
        let mut bytes = sound.clone();
        // The first refcount block is the third cluster of an image of ours.
        for _ in 0..1 + case.rng.below(20) {
            let n = 2 * 65536 + case.rng.below(100) * 2 + 1;
            bytes[n] = u8::try_from(case.rng.below(4)).expect("small");
        }
        repaired(&case, bytes);
    }
}

/// Our repair of these bytes: afterwards nothing is found, by QEMU neither, and all is shown.
fn repaired(case: &Case<'_>, mut bytes: Vec<u8>) {
    let image = [ImageFile { id: FileId(0), source: &bytes }];
    let plan = repair(Format::Qcow2, &image).expect("repairable").expect("QCOW2 is repaired");
    assert_eq!(plan.steps.is_empty(), plan.report.is_clean());
    for step in &plan.steps {
        match step {
            FileStep::Write { at, bytes: new, .. } => {
                let at = usize::try_from(at.0).expect("a small file");
                bytes[at..at + new.len()].copy_from_slice(new);
            }
            FileStep::SetLen { to, .. } => bytes.resize(usize::try_from(to.0).expect("small"), 0),
            FileStep::Sync { .. } => {}
            FileStep::Copy { .. } => panic!("nothing is moved"),
            FileStep::Fill { .. } | FileStep::Reserve { .. } => unreachable!("no step of a repair"),
        }
    }
    let image = [ImageFile { id: FileId(0), source: &bytes }];
    let report = check(Format::Qcow2, &image).expect("a report").expect("QCOW2 is checked");
    assert!(report.is_clean(), "{report:?}");
    std::fs::write(case.image(), &bytes).expect("the image");
    case.judge("repaired");
}

/// Refcount table or blocks that are lost, or named where something else lies, are made anew.
#[test]
fn lost_refcounts_are_made_anew() {
    if !has_tools() {
        return;
    }
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "compat=0.10",
        "refcount_bits=1",
        "cluster_size=16k,extended_l2=on",
    ] {
        let dir = tempfile::tempdir().expect("temporary folder");
        let mut case = Case {
            dir: dir.path(),
            format: "qcow2",
            model: vec![0; 2 * MIB],
            rng: Rng(options.len() as u64),
        };
        let options: Vec<_> = options.split(',').flat_map(|o| ["--option", o]).collect();
        let image = case.image();
        vdimg(&[&["create", "--format", "qcow2", "--size", "2M"], &options[..], &[&image]].concat());
        case.change(12);
        if options != ["--option", "refcount_bits=1"] {
            run("qemu-img", &["snapshot", "-c", "one", &image]);
            case.change(6);
        }
        let sound = std::fs::read(&image).expect("an image");
        let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().expect("8 bytes"));
        let (table, first) = (usize::try_from(word(48)).expect("small"), word(40) & !511);
        let outside = (sound.len() as u64).next_multiple_of(2 << 20) + (2 << 20);
        let damage: [(usize, u64); 7] =
            [(table, 0), (table, 513), (table, outside), (table, first), (48, outside), (48, first), (56, 0)];
        for (at, value) in damage {
            let mut bytes = sound.clone();
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
            if at == 56 {
                // the number of snapshots stands beside it
                bytes[60..64].copy_from_slice(&sound[60..64]);
            }
            repaired(&case, bytes);
        }
        case.change(5);
        case.judge("changed after a repair");
        case.change_by_qemu();
        case.judge("changed by QEMU after a repair");
    }
}

/// VirtualBox takes clusters of version 3 that are flagged as zeros for data, rewrites the header as version 2 when it opens such an image for
/// writing, and leaves refcounts as they are. Here they read as zeros with and without a place, and the rest stays right.
#[test]
fn virtualbox_bug_3_zero_clusters_and_the_header_of_version_3() {
    if !has_tools() {
        return;
    }
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut case = Case { dir: dir.path(), format: "qcow2", model: vec![0; 6 * MIB + 512], rng: Rng(3) };
    let image = case.image();
    run("qemu-img", &["create", "-f", "qcow2", "-o", "compat=1.1", &image, "6291968"]);
    let commands = ["write -P 7 0 3M", "write -z 1M 512k", "write -z -u 2M 512k", "write -z 4M 64k"];
    let commands: Vec<_> = commands.iter().flat_map(|c| ["-c", *c]).collect();
    run("qemu-io", &[&["-f", "qcow2"], &commands[..], &[&image]].concat());
    case.model[..3 * MIB].fill(7);
    case.model[MIB..MIB + (512 << 10)].fill(0);
    case.model[2 * MIB..2 * MIB + (512 << 10)].fill(0);
    let ours = text(&dir.path().join("ours.raw")).to_string();
    vdimg(&["convert", "--output-format", "raw", &image, &ours]);
    assert_eq!(
        differs(&std::fs::read(&ours).expect("a copy"), &case.model),
        None,
        "flagged clusters are zeros"
    );
    vdimg(&["io", "-c", "write -P 9 1M 4k", "-c", "write -P 9 2M 4k", "-c", "write -P 9 4M 4k", &image]);
    for at in [MIB, 2 * MIB, 4 * MIB] {
        case.model[at..at + 4096].fill(9);
    }
    let head = std::fs::read(&image).expect("the image");
    assert_eq!(head[4..8], [0, 0, 0, 3], "the header is version 3 as before");
    case.judge("refcounts are right, and all is there");
}
