//! What the tests of plug-ins share: compiling them.
#![allow(dead_code)] // each test program uses its part

use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A C compiler at work; the linker of Rust is one.
fn cc(source: &Path, output: &Path, more: &[&str]) {
    // What is wrong on purpose needs no warnings.
    let is_ours = !source.ends_with("hostile.c");
    let out = Command::new("cc")
        .args(["-std=c99", "-O1"])
        .args(if is_ours { &["-Wall", "-Wextra", "-Wpedantic", "-Werror"][..] } else { &["-w"] })
        .arg("-I")
        .arg(root().join("include"))
        .arg("-o")
        .arg(output)
        .arg(source)
        .args(more)
        .output()
        .expect("start cc");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "cc {}: {said}", source.display());
}

/// Compiles a program.
pub(crate) fn program(source: &Path, output: &Path) {
    cc(source, output, &[]);
}

/// Compiles a library.
pub(crate) fn library(source: &str, output: &Path, defines: &[&str]) {
    let more: Vec<_> = ["-fPIC", "-shared"].into_iter().chain(defines.iter().copied()).collect();
    cc(&root().join(source), output, &more);
}

/// The example, in a folder.
pub(crate) fn example(dir: &Path) -> PathBuf {
    let path = dir.join("vdblk-plugin-example.so");
    library("examples/plugin/vdblk-plugin-example.c", &path, &[]);
    path
}

/// A plug-in that does one thing wrong.
pub(crate) fn hostile(dir: &Path, wrong: &str) -> PathBuf {
    let path = dir.join(format!("vdblk-plugin-{}.so", wrong.to_lowercase().replace('_', "-")));
    library("tests/fixtures/plugins/hostile.c", &path, &[&format!("-D{wrong}")]);
    path
}
