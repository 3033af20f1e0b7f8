//! What is said of vdimg holds: the lines of docs/vdimg.md run, each command's help has an example, and completions and man pages
//! name every command.

mod vdimg_support;

use std::path::Path;
use std::process::Command;
use vdimg_support::{ok, scratch, succeeded};

/// The commands that `vdimg --help` lists.
fn commands() -> Vec<String> {
    let help = ok(Path::new("/"), "--help");
    let list = help.split("Commands:\n").nth(1).and_then(|l| l.split("\n\n").next()).expect("a list");
    let names = list.lines().filter(|l| l.starts_with("  ") && !l.starts_with("   "));
    let names = names.filter_map(|l| l.split_whitespace().next());
    names.filter(|n| *n != "help").map(str::to_string).collect()
}

fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/vdimg.md");
    std::fs::read_to_string(path).expect("the page")
}

#[test]
fn the_lines_of_the_page_run() {
    let dir = scratch();
    let programs = Path::new(env!("CARGO_BIN_EXE_vdimg")).parent().expect("its folder");
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").expect("a path"));
    let page = page();
    let lines: Vec<_> = page.lines().filter_map(|l| l.strip_prefix("    ")).collect();
    assert!(lines.len() > 25, "{lines:?}");
    for line in lines {
        let mut sh = Command::new("sh");
        sh.args(["-ec", line]).env("PATH", &path).current_dir(dir.path());
        succeeded(line, sh.output().expect("start a shell"));
    }
}

#[test]
fn each_command_has_an_example_in_its_help_and_on_the_page() {
    let (all, page) = (commands(), page());
    assert!(all.len() > 20, "{all:?}");
    for c in all {
        let help = ok(Path::new("/"), &format!("{c} --help"));
        assert!(help.contains("Example"), "{c}: no example in its help");
        assert!(help.contains(&format!("vdimg {c}")), "{c}: another command's example");
        let shown = |l: &str| {
            l.trim_start().starts_with(&format!("vdimg {c}")) || l.contains(&format!("&& vdimg {c}"))
        };
        assert!(page.lines().any(shown), "{c}: no example in docs/vdimg.md");
        assert!(page.contains(&format!("`{c}`")), "{c}: not in the table of docs/vdimg.md");
    }
}

#[test]
fn completions_and_man_pages_name_every_command() {
    let dir = scratch();
    let dir = dir.path();
    for shell in ["bash", "zsh", "fish"] {
        let script = ok(dir, &format!("completions {shell}"));
        for c in commands() {
            assert!(script.contains(&c), "{shell}: {c}");
        }
    }
    succeeded(
        "bash -n",
        Command::new("bash")
            .args(["-c", "\"$0\" completions bash | bash -n", env!("CARGO_BIN_EXE_vdimg")])
            .output()
            .expect("start bash"),
    );
    ok(dir, "manpages .");
    let main = std::fs::read_to_string(dir.join("vdimg.1")).expect("vdimg.1");
    for c in commands() {
        assert!(main.contains(&c.replace('-', "\\-")), "vdimg.1: {c}");
        let page = std::fs::read_to_string(dir.join(format!("vdimg-{c}.1")));
        assert!(page.expect("a page of its own").contains("Example"), "{c}");
    }
    // The daemon's are made by itself.
    for (args, expected) in
        [(vec!["--completions", "bash"], "--blk-file"), (vec!["--manpage"], "\\-\\-blk\\-file")]
    {
        let out = Command::new(env!("CARGO_BIN_EXE_vdblk")).args(&args).output().expect("start vdblk");
        assert!(succeeded("vdblk", out).contains(expected), "{args:?}");
    }
}

#[test]
fn progress_is_told_to_programs_in_lines_of_json() {
    let dir = scratch();
    let dir = dir.path();
    ok(dir, "create --format vdi --size 8M a.vdi");
    let out = vdimg_support::run(dir, "--progress json convert a.vdi --output-format qcow2 a.qcow2");
    let lines = vdimg_support::text(&out.stderr);
    assert!(out.status.success(), "{lines}");
    let last = lines.lines().last().expect("a line at least");
    let values: Vec<serde_json::Value> = lines.lines().map(|l| serde_json::from_str(l).expect(l)).collect();
    assert!(values.iter().all(|v| v["done"].as_u64() <= v["total"].as_u64()), "{lines}");
    assert_eq!(serde_json::from_str::<serde_json::Value>(last).expect("JSON")["percent"], 100, "{lines}");
    let out = vdimg_support::run(dir, "--progress none compact a.vdi");
    assert!(out.status.success() && out.stderr.is_empty());
}
