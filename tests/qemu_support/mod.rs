//! Images that vdblk and QEMU change in turns: qemu-img and qemu-io as judges of what vdblk writes.
#![allow(dead_code)] // each test program uses its part

use std::path::Path;
use std::process::{Command, Output};

pub(crate) const MIB: usize = 1 << 20;
/// Bytes of the disks: not whole clusters.
pub(crate) const SIZE: usize = 6 * MIB + 512;

/// A sequence by a seed.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % n
    }
}

pub(crate) fn has_tools() -> bool {
    let there = |tool| Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success());
    let both = there("qemu-img") && there("qemu-io");
    if !both {
        eprintln!("qemu-img and qemu-io are not installed: nothing was tested");
    }
    both
}

pub(crate) fn run(tool: &str, args: &[&str]) -> Output {
    let out = Command::new(tool).args(args).output().unwrap_or_else(|e| panic!("{tool}: {e}"));
    let said = [&out.stdout[..], &out.stderr[..]].concat();
    assert!(out.status.success(), "{tool} {args:?}: {}", String::from_utf8_lossy(&said));
    out
}

pub(crate) fn vdimg(args: &[&str]) -> Output {
    run(env!("CARGO_BIN_EXE_vdimg"), args)
}

/// An image, and what it has to show.
pub(crate) struct Case<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) format: &'a str,
    pub(crate) model: Vec<u8>,
    pub(crate) rng: Rng,
}

impl Case<'_> {
    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.join(name).to_str().expect("a plain path").to_string()
    }

    pub(crate) fn image(&self) -> String {
        self.path(&format!("a.{}", self.format))
    }

    pub(crate) fn range(&mut self) -> (usize, usize) {
        let len = [512, 4096, 65536, 300 << 10, MIB][self.rng.below(5)];
        let at = self.rng.below(self.model.len() - len) / 512 * 512;
        (if self.rng.below(2) == 0 { at / 65536 * 65536 } else { at }, len)
    }

    /// Changes by vdblk, in one session.
    pub(crate) fn change(&mut self, count: usize) {
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

    pub(crate) fn change_by_qemu(&mut self) {
        let (at, len) = self.range();
        run("qemu-io", &["-f", self.format, "-c", &format!("write -P 201 {at} {len}"), &self.image()]);
        self.model[at..at + len].fill(201);
    }

    /// QEMU finds nothing wrong, and both read what the image has to show.
    pub(crate) fn judge(&self, what: &str) {
        // it has no check of the first version
        if self.format != "qcow" {
            run("qemu-img", &["check", "-f", self.format, &self.image()]);
        }
        vdimg(&["check", &self.image()]);
        assert_eq!(differs(&self.shown(&[]), &self.model), None, "{what}");
    }

    /// What qemu-img reads.
    pub(crate) fn shown(&self, more: &[&str]) -> Vec<u8> {
        let (image, out) = (self.image(), self.path("out.raw"));
        run("qemu-img", &[&["convert", "-f", self.format, "-O", "raw"], more, &[&image, &out]].concat());
        std::fs::read(out).expect("what qemu-img wrote")
    }
}

/// Where two disks begin to differ.
pub(crate) fn differs(a: &[u8], b: &[u8]) -> Option<usize> {
    (a.len() != b.len()).then_some(usize::MAX).or_else(|| a.iter().zip(b).position(|(a, b)| a != b))
}

/// Two sessions of ours and one of QEMU's, over whatever `make` has made of the raw file, its first argument, or has left there.
pub(crate) fn changed_by_both(format: &str, name: &str, base: bool, make: impl Fn(&str, &str)) {
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
