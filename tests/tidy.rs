//! The house rules that a machine can check: who may use whom, where `unsafe` may stand, how long things may be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Who may use whom inside `src/`. The binaries see everything.
const MAY_USE: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("limits", &[]),
    ("probe", &[]),
    ("map", &["error", "limits"]),
    ("size", &["error"]),
    ("format", &["error", "limits", "probe", "map", "size"]),
    ("io", &["error", "limits", "map"]),
    ("filter", &["error", "limits", "map"]),
    ("vd", &["error", "limits", "probe", "map", "filter", "format", "io"]),
    ("virtio", &["error", "limits", "map", "io", "vd"]),
    ("vhost", &["error", "limits", "probe", "map", "io", "vd", "virtio"]),
    ("job", &["error", "limits", "map", "size", "filter", "format", "io", "vd"]),
    ("plugin", &["error", "limits", "map", "filter", "format"]),
    ("container", &["error", "limits", "map", "size", "filter", "format", "plugin", "io", "vd", "job"]),
    ("medium", &["error", "limits", "map", "size", "filter", "format", "io", "vd", "job"]),
    ("live", &["error", "limits", "probe", "map", "format", "io", "vd", "job", "vhost"]),
    (
        "sim",
        &[
            "error", "limits", "probe", "map", "filter", "format", "plugin", "io", "vd", "job", "virtio",
            "vhost", "live",
        ],
    ),
    ("daemon", &["error", "limits", "map", "filter", "format", "io", "vd", "job", "virtio", "vhost", "live"]),
];

/// The only files with `unsafe` in them.
const UNSAFE: &[&str] = &[
    "filter/locked.rs",
    "io/aligned.rs",
    "container/buffers.rs",
    "io/buf.rs",
    "io/locked.rs",
    "io/sys.rs",
    "io/threads.rs",
    "io/uring.rs",
    "plugin/calls.rs",
    "plugin/library.rs",
    "vd/own.rs",
    "vhost/lost.rs",
    "vhost/mapping.rs",
    "vhost/memory.rs",
    "vhost/ring.rs",
    "vhost/shared.rs",
    "vhost/sys.rs",
];

/// The crates the device is built on, each of them really at work.
const CRATES: &[&str] = &[
    "vhost",
    "vhost_user_backend",
    "virtio_queue",
    "vm_memory",
    "vmm_sys_util",
    "virtio_bindings",
    "epoll",
    "io_uring",
];

const MAX_FILE_LINES: usize = 900;
const MAX_FN_LINES: usize = 80;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for e in entries.flatten() {
        let p = e.path();
        if p.is_dir() {
            rust_files(&p, out);
        } else if p.extension().is_some_and(|x| x == "rs") {
            out.push(p);
        }
    }
    out.sort();
}

/// All files below `folders`, by their path in the repository.
fn sources(folders: &[&str]) -> BTreeMap<String, String> {
    let mut files = Vec::new();
    for f in folders {
        rust_files(&root().join(f), &mut files);
    }
    files
        .into_iter()
        .map(|p| {
            let name = p.strip_prefix(root()).unwrap().to_str().unwrap().to_string();
            let text = fs::read_to_string(&p).unwrap();
            (name, text)
        })
        .collect()
}

/// The code of a line, without comment.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or("")
}

fn module_of(path: &str) -> Option<&str> {
    let inside = path.strip_prefix("src/")?;
    let first = inside.split('/').next()?;
    Some(first.strip_suffix(".rs").unwrap_or(first))
}

#[test]
fn modules_use_only_what_lies_beneath_them() {
    let mut wrong = Vec::new();
    for (path, text) in sources(&["src"]) {
        let Some(module) = module_of(&path) else { continue };
        let Some((_, allowed)) = MAY_USE.iter().find(|(m, _)| *m == module) else {
            assert!(
                ["lib", "bin"].contains(&module),
                "{path}: module {module} is not in the dependency table"
            );
            continue;
        };
        for (n, line) in text.lines().enumerate() {
            for used in code(line).split("crate::").skip(1) {
                let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let is_module = MAY_USE.iter().any(|(m, _)| *m == used);
                // tests may stand on the simulator, which itself stands on everything
                let in_tests = path.ends_with("/tests.rs") || path.contains("/tests/");
                let may = allowed.contains(&used.as_str()) || (in_tests && used == "sim");
                if is_module && used != module && !may {
                    wrong.push(format!("{path}:{}: {module} uses {used}", n + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "against the dependency table:\n{}", wrong.join("\n"));
}

/// Names behind "crate::" in a text.
fn uses_of(text: &str) -> BTreeSet<&str> {
    let behind = text.lines().flat_map(|l| code(l).split("crate::").skip(1));
    behind.filter_map(|p| p.split(|c: char| !c.is_alphanumeric() && c != '_').next()).collect()
}

/// What can be reached from a file, by the files' names.
fn reach<'a>(from: &'a str, uses: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> BTreeSet<&'a str> {
    let (mut found, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(name) = next.pop() {
        let new = uses.get(name).into_iter().flatten().filter(|u| uses.contains_key(*u));
        next.extend(new.filter(|u| found.insert(**u)));
    }
    found
}

#[test]
fn the_files_of_vubench_use_each_other_in_one_direction() {
    let all = sources(&["benches/vubench"]);
    let mut uses: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (path, text) in &all {
        let name = path.strip_prefix("benches/vubench/").unwrap();
        let name = name.split('/').next().unwrap().trim_end_matches(".rs");
        uses.entry(name).or_default().extend(uses_of(text).into_iter().filter(|u| *u != name));
    }
    let looped: Vec<_> = uses.keys().filter(|name| reach(name, &uses).contains(*name)).collect();
    assert!(uses.len() > 10 && looped.is_empty(), "these use each other in a circle: {looped:?}");
}

#[test]
fn formats_do_no_io() {
    for (path, text) in sources(&["src/format", "src/map"]) {
        let before_tests = text.split("#[cfg(test)]").next().unwrap();
        for word in ["std::fs", "std::net", "libc::open", "std::thread"] {
            assert!(!before_tests.contains(word), "{path} uses {word}");
        }
    }
}

#[test]
fn unsafe_stays_where_it_belongs_and_says_why() {
    let all = sources(&["src"]);
    for (path, text) in
        all.iter().filter(|(path, _)| !path.ends_with("/tests.rs") && !path.contains("/tests/"))
    {
        let lines: Vec<_> = text.lines().collect();
        for (n, line) in lines.iter().enumerate() {
            if line.starts_with("#[cfg(test)]") {
                break;
            }
            let l = code(line);
            let is_unsafe = ["unsafe {", "unsafe impl", "unsafe fn"].iter().any(|w| l.contains(w));
            if !is_unsafe {
                continue;
            }
            let short = path.strip_prefix("src/").unwrap_or(path);
            assert!(UNSAFE.contains(&short), "{path}:{}: unsafe in a file that is not on the list", n + 1);
            let above = lines[n.saturating_sub(12)..=n].join("\n");
            assert!(above.contains("SAFETY:") || above.contains("# Safety"), "{path}:{}: no SAFETY", n + 1);
        }
    }
}

#[test]
fn the_listed_files_with_unsafe_exist_and_have_some() {
    for f in UNSAFE {
        let text = fs::read_to_string(root().join("src").join(f)).unwrap_or_else(|e| panic!("src/{f}: {e}"));
        assert!(text.contains("unsafe"), "src/{f} no longer needs to be on the list");
    }
}

#[test]
fn the_crates_are_really_used() {
    let all = sources(&["src"]);
    for c in CRATES {
        let path = format!("{c}::");
        let used = all.values().any(|t| {
            t.lines().map(code).any(|l| {
                l.match_indices(&path).any(|(i, _)| {
                    let before = l[..i].chars().next_back();
                    !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
                })
            })
        });
        assert!(used, "crate {c} is not used in src/");
    }
}

#[test]
fn files_and_functions_keep_their_size() {
    let mut long = Vec::new();
    for (path, text) in sources(&["src", "tests", "benches", "fuzz/fuzz_targets"]) {
        let lines: Vec<_> = text.lines().collect();
        if lines.len() > MAX_FILE_LINES {
            long.push(format!("{path}: {} lines", lines.len()));
        }
        for (n, line) in lines.iter().enumerate() {
            let trimmed = line.trim_start();
            let starts =
                ["fn ", "pub fn ", "pub(crate) fn ", "pub(super) fn ", "unsafe fn ", "pub unsafe fn "];
            if !starts.iter().any(|s| trimmed.starts_with(s)) {
                continue;
            }
            let indent = &line[..line.len() - trimmed.len()];
            let end = format!("{indent}}}");
            let has_body = lines[n..]
                .iter()
                .find(|l| l.ends_with('{') || l.ends_with(';'))
                .is_some_and(|l| l.ends_with('{'));
            if has_body
                && let Some(len) = lines[n..].iter().position(|l| *l == end)
                && len > MAX_FN_LINES
            {
                long.push(format!("{path}:{}: a function of {len} lines", n + 1));
            }
        }
    }
    assert!(long.is_empty(), "too long:\n{}", long.join("\n"));
}

#[test]
fn no_stubs_are_left() {
    for (path, text) in sources(&["src"]) {
        for word in ["todo!(", "unimplemented!("] {
            assert!(!text.contains(word), "{path} has {word}");
        }
    }
}
