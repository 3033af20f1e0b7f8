//! docs/vd-api.md against the sources: what it names exists, and it names every function of VirtualBox's header.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(dir: &Path, out: &mut Vec<String>) {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for p in entries {
        if p.is_dir() {
            rust_files(&p, out);
        } else if p.extension().is_some_and(|x| x == "rs") {
            out.push(fs::read_to_string(p).unwrap());
        }
    }
}

fn sources(folder: &str) -> Vec<String> {
    let mut files = Vec::new();
    rust_files(&root().join(folder), &mut files);
    files
}

/// Header, item and test of each row.
fn rows() -> Vec<[String; 3]> {
    let text = fs::read_to_string(root().join("docs/vd-api.md")).unwrap();
    let rows = text.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| Header"));
    rows.map(|l| {
        let cells: Vec<_> = l.split(" | ").map(|c| c.trim_matches(['|', ' ', '`']).to_string()).collect();
        [cells[0].clone(), cells[1].clone(), cells[2].clone()]
    })
    .collect()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// `word` stands in `line` behind one of `before`, whole.
fn stands(line: &str, before: &[&str], word: &str) -> bool {
    before.iter().any(|b| {
        let start = format!("{b}{word}");
        line.match_indices(&start).any(|(at, _)| !line[at + start.len()..].starts_with(is_word))
    })
}

const TYPES: [&str; 4] = ["pub struct ", "pub enum ", "pub trait ", "pub type "];

/// The item is defined: a type, a function, a constant or a module, or a member of a type.
fn is_defined(item: &str, files: &[String]) -> bool {
    let Some((owner, member)) = item.split_once("::") else {
        let before = [
            "pub struct ",
            "pub enum ",
            "pub trait ",
            "pub type ",
            "pub fn ",
            "pub const ",
            "pub const fn ",
            "pub mod ",
        ];
        return files.iter().any(|f| f.lines().any(|l| stands(l, &before, item)));
    };
    let owned = |f: &&String| {
        f.lines().any(|l| {
            stands(l, &TYPES, owner)
                || stands(l, &["impl ", "for "], owner)
                || (l.starts_with("    ")
                    && (stands(l, &["    "], &format!("{owner}: u32 {{"))
                        || stands(l, &["    "], &format!("{owner}: u64 {{"))))
        })
    };
    files.iter().filter(owned).any(|f| {
        f.lines().any(|l| {
            let trimmed = l.trim_start();
            let variant = trimmed.strip_prefix(member).is_some_and(|rest| {
                !rest.starts_with(is_word) && [" =", ",", " {", "("].iter().any(|end| rest.starts_with(end))
            });
            let set = ["NONE", "MASK"].contains(&member) && f.contains("macro_rules! flag_set");
            variant || set || stands(trimmed, &["fn ", "const ", "pub const ", "pub "], member)
        })
    })
}

#[test]
fn every_item_that_is_named_exists() {
    let files = sources("src");
    let rows = rows();
    assert!(rows.len() > 250, "only {} rows", rows.len());
    let items = rows.iter().filter(|r| r[1] != "—");
    let missing: Vec<_> =
        items.filter(|r| !is_defined(&r[1], &files)).map(|r| format!("{}: {}", r[0], r[1])).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(!is_defined("Container::nonsense", &files) && !is_defined("OpenFlags::NONSENSE", &files));
    assert!(!is_defined("Nonsense", &files) && !is_defined("Nonsense::NONE", &files));
}

#[test]
fn every_test_that_is_named_exists() {
    let mut files = sources("src");
    files.extend(sources("tests"));
    let mut tests = BTreeSet::new();
    for file in &files {
        let lines: Vec<_> = file.lines().map(str::trim).collect();
        for (n, _) in lines.iter().enumerate().filter(|(_, l)| **l == "#[test]") {
            let name = lines[n..].iter().find_map(|l| l.strip_prefix("fn ")).unwrap_or_default();
            tests.insert(name.split('(').next().unwrap().to_string());
        }
    }
    let missing: Vec<_> = rows().into_iter().filter(|r| r[2] != "—" && !tests.contains(&r[2])).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    let untested: Vec<_> = rows().into_iter().filter(|r| r[1] != "—" && r[2] == "—").collect();
    assert!(untested.is_empty(), "items without a test: {untested:#?}");
}

#[test]
fn every_function_of_the_header_has_a_row() {
    let names = fs::read_to_string(root().join("tests/fixtures/vd-api/functions.txt")).unwrap();
    let rows: BTreeSet<_> = rows().into_iter().map(|r| r[0].clone()).collect();
    let missing: Vec<_> = names.lines().filter(|n| !rows.contains(*n)).collect();
    assert!(names.lines().count() == 87 && missing.is_empty(), "{missing:?}");
}

/// Flags, codes, values and callbacks, each with a row or named in one.
#[test]
fn every_other_name_of_the_header_is_in_the_table() {
    let names = fs::read_to_string(root().join("tests/fixtures/vd-api/names.txt")).unwrap();
    let text = fs::read_to_string(root().join("docs/vd-api.md")).unwrap();
    let table: BTreeSet<&str> = text.split(|c: char| !is_word(c)).collect();
    let missing: Vec<_> = names.lines().filter(|n| !table.contains(n)).collect();
    assert!(names.lines().count() > 90 && missing.is_empty(), "{missing:?}");
}

/// A code is given by something outside of the list of codes, or its row says that it is not.
#[test]
fn codes_are_given_or_said_to_be_numbers_only() {
    let text = fs::read_to_string(root().join("docs/vd-api.md")).unwrap();
    let sources = sources("src").into_iter().filter(|f| !f.contains("macro_rules! statuses"));
    let given: String = sources.map(|f| f.split("#[test]").next().unwrap().to_string()).collect();
    let of_kinds = fs::read_to_string(root().join("src/error/status.rs")).unwrap();
    let of_kinds = of_kinds.split("pub fn of_kind").nth(1).unwrap().split("_ => return None").next().unwrap();
    let mut wrong = Vec::new();
    for row in text.lines().filter(|l| l.contains("| `Status::")) {
        let code = row.split("`Status::").nth(1).unwrap().split('`').next().unwrap();
        let named = format!("Status::{code}");
        let is_given = stands(&given.replace('\n', " "), &[""], &named) || stands(of_kinds, &[""], &named);
        if is_given == row.contains("The number only") {
            wrong.push(row);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
