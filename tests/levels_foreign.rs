//! QED and QCOW of the first version that vdblk writes are what QEMU reads: random changes to images of all shapes, made by either,
//! with QEMU's own changes in between. Where qemu-img and qemu-io are not installed nothing is tested, and that is said.

mod format_support;

use format_support::qed_fixtures;
use std::path::Path;
use std::process::{Command, Output};

const MIB: usize = 1 << 20;
const SIZE: usize = 6 * MIB + 512;

/// A sequence by a seed.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % n
    }
}

fn has_tools() -> bool {
    let there = |tool| Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success());
    let both = there("qemu-img") && there("qemu-io");
    if !both {
        eprintln!("qemu-img and qemu-io are not installed: nothing was tested");
    }
    both
}

fn run(tool: &str, args: &[&str]) -> Output {
    let out = Command::new(tool).args(args).output().unwrap_or_else(|e| panic!("{tool}: {e}"));
    let said = [&out.stdout[..], &out.stderr[..]].concat();
    assert!(out.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&said));
    out
}

fn vdimg(args: &[&str]) -> Output {
    run(env!("CARGO_BIN_EXE_vdimg"), args)
}

/// An image, and what it has to show.
struct Case<'a> {
    dir: &'a Path,
    format: &'a str,
    model: Vec<u8>,
    rng: Rng,
}

impl Case<'_> {
    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().expect("a plain path").to_string()
    }

    fn image(&self) -> String {
        self.path(&format!("a.{}", self.format))
    }

    fn range(&mut self) -> (usize, usize) {
        let len = [512, 4096, 65536, 300 << 10, MIB][self.rng.below(5)];
        let at = self.rng.below(self.model.len() - len) / 512 * 512;
        (if self.rng.below(2) == 0 { at / 65536 * 65536 } else { at }, len)
    }

    /// Changes by vdblk, in one session.
    fn change(&mut self, count: usize) {
        let mut commands = vec!["io".to_string(), self.image()];
        for _ in 0..count {
            let (at, len) = self.range();
            let (value, command) = match self.rng.below(8) {
                0 => (0, format!("write -z -u {at} {len}")),
                1 => (0, format!("write -z {at} {len}")),
                n => (n * 30, format!("write -P {} {at} {len}", n * 30)),
            };
            commands.extend(["-c".to_string(), command]);
            self.model[at..at + len].fill(u8::try_from(value).expect("below 256"));
        }
        vdimg(&commands.iter().map(String::as_str).collect::<Vec<_>>());
    }

    fn change_by_qemu(&mut self) {
        let (at, len) = self.range();
        run("qemu-io", &["-f", self.format, "-c", &format!("write -P 201 {at} {len}"), &self.image()]);
        self.model[at..at + len].fill(201);
    }

    fn judge(&self, what: &str) {
        if self.format == "qed" {
            run("qemu-img", &["check", "-f", "qed", &self.image()]);
        }
        vdimg(&["check", &self.image()]);
        let out = self.path("out.raw");
        run("qemu-img", &["convert", "-f", self.format, "-O", "raw", &self.image(), &out]);
        let shown = std::fs::read(out).expect("what qemu-img wrote");
        assert_eq!(shown.len(), self.model.len(), "{what}");
        assert_eq!(shown.iter().zip(&self.model).position(|(a, b)| a != b), None, "{what}");
    }
}

/// Two sessions of ours and one of QEMU's, over whatever `make` has made of the raw file, its first argument, or has left there.
fn changed_by_both(format: &str, name: &str, base: bool, make: impl Fn(&str, &str)) {
    let dir = tempfile::tempdir().expect("temporary folder");
    let seed = name.bytes().map(u64::from).sum();
    let mut case = Case { dir: dir.path(), format, model: vec![0; SIZE], rng: Rng(seed) };
    if base {
        for i in 0..8 {
            let (at, len) = case.range();
            case.model[at..at + len].fill(i + 1);
        }
    }
    let raw = case.path("base.raw");
    std::fs::write(&raw, &case.model).expect("a file");
    make(&raw, &case.image());
    case.model = std::fs::read(&raw).expect("the raw file");
    for round in 0..2 {
        case.change(25);
        case.judge(&format!("{format} {name}, round {round}"));
        case.change_by_qemu();
    }
    case.change(5);
    case.judge(name);
}

fn created(format: &str, options: &[&str], base: bool) {
    let size = SIZE.to_string();
    changed_by_both(format, &options.join(","), base, |raw, image| {
        let wanted = if base { ["--parent", raw] } else { ["--size", &size] };
        let options = options.iter().flat_map(|o| ["--option", *o]);
        let args = ["create", "--format", format].into_iter().chain(wanted).chain(options).chain([image]);
        vdimg(&args.collect::<Vec<_>>());
    });
}

#[test]
fn qed_images_of_ours_are_sound() {
    if has_tools() {
        created("qed", &[], false);
        created("qed", &["cluster_size=4k", "table_size=2"], false);
        created("qed", &["cluster_size=4k", "table_size=16"], false);
        created("qed", &["cluster_size=1M"], false);
    }
}

/// QEMU refuses the diffs that VirtualBox makes: their parents' names are not in the header's cluster (VirtualBox's bug 6).
#[test]
fn qed_diffs_of_ours_are_accepted_by_qemu() {
    if has_tools() {
        created("qed", &[], true);
        created("qed", &["cluster_size=4k", "table_size=2"], true);
        created("qed", &["cluster_size=2M"], true);
    }
}

#[test]
fn qcow_images_of_ours_are_sound() {
    if has_tools() {
        created("qcow", &[], false);
        created("qcow", &["cluster_size=512", "table_entries=64"], false);
        created("qcow", &["cluster_size=64k", "table_entries=8192"], false);
        created("qcow", &[], true);
        created("qcow", &["cluster_size=512", "table_entries=4096"], true);
    }
}

#[test]
fn images_of_qemu_stay_sound() {
    if !has_tools() {
        return;
    }
    let size = SIZE.to_string();
    for options in ["cluster_size=65536", "cluster_size=4096,table_size=2"] {
        changed_by_both("qed", &format!("of QEMU {options}"), false, |_, image| {
            run("qemu-img", &["create", "-f", "qed", "-o", options, image, &size]);
        });
        changed_by_both("qed", &format!("backing {options}"), true, |raw, image| {
            run("qemu-img", &["create", "-f", "qed", "-o", options, "-b", raw, "-F", "raw", image]);
        });
    }
    changed_by_both("qcow", "of QEMU", false, |_, image| {
        run("qemu-img", &["create", "-f", "qcow", image, &size]);
    });
    changed_by_both("qcow", "backing", true, |raw, image| {
        run("qemu-img", &["create", "-f", "qcow", "-b", raw, "-F", "raw", image]);
    });
    changed_by_both("qcow", "packed", false, |raw, image| {
        let packed = qed_fixtures().join("qcow1-compressed.qcow");
        std::fs::copy(&packed, image).expect("a copy");
        run("qemu-img", &["convert", "-f", "qcow", "-O", "raw", image, raw]);
    });
}

/// In a diff without a word for zeros a discard leaves alone what shows through, and allocates nothing.
#[test]
fn a_discard_never_makes_a_diff_larger() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("a plain path").to_string();
    std::fs::write(path("base.raw"), vec![7; MIB]).expect("a file");
    for (format, shows) in [("qcow", 7), ("qed", 0)] {
        let image = path(&format!("a.{format}"));
        vdimg(&["create", "--format", format, "--parent", &path("base.raw"), &image]);
        vdimg(&["io", &image, "-c", "discard 64k 128k", "-c", &format!("read -P {shows} 64k 128k")]);
        vdimg(&[
            "io",
            &image,
            "-c",
            "write -z 512k 64k",
            "-c",
            "read -P 0 512k 64k",
            "-c",
            "read -P 7 448k 64k",
        ]);
        let empty = if format == "qed" { 5 * 65536 + 4 * 65536 } else { 2 * 512 + 8 * 4096 + 65536 };
        assert_eq!(std::fs::metadata(&image).expect("the image").len(), empty, "{format}");
    }
}
