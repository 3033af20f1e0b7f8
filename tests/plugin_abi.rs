//! The header for plug-ins and the structures here are the same: by a C compiler, which is asked for every size, offset and constant.

mod plugin_support;

use plugin_support::{program, root};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::process::Command;
use vdblk::plugin::abi;

fn header() -> String {
    std::fs::read_to_string(root().join("include/vdblk_plugin.h")).unwrap()
}

/// What the C compiler makes of expressions.
fn asked(expressions: &[String]) -> Vec<i128> {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("ask.c"), dir.path().join("ask"));
    let mut text = "#include <stddef.h>\n#include <stdio.h>\n#include \"vdblk_plugin.h\"\nint main(void) {\n"
        .to_string();
    for e in expressions {
        // unsigned 64 bits are printed as such
        writeln!(text, "    if (({e}) > 0) printf(\"%llu\\n\", (unsigned long long)({e})); else printf(\"%lld\\n\", (long long)({e}));").unwrap();
    }
    text.push_str("    return 0;\n}\n");
    std::fs::write(&source, text).unwrap();
    program(&source, &out);
    let said = Command::new(&out).output().unwrap();
    String::from_utf8(said.stdout).unwrap().lines().map(|l| l.parse().unwrap()).collect()
}

#[test]
fn structures_are_the_header_s() {
    let ours = abi::layout();
    let ask: Vec<_> = ours
        .iter()
        .map(|(name, _)| match name.split_once('.') {
            Some((of, field)) => format!("offsetof({of}, {field})"),
            None => format!("sizeof({name})"),
        })
        .collect();
    for ((name, value), theirs) in ours.iter().zip(asked(&ask)) {
        assert_eq!(i128::try_from(*value).unwrap(), theirs, "{name}");
    }
    assert_eq!(ours.len(), ask.len());
    // and nothing is left out: as many fields in each as the header has
    let code: String = header().split("/*").map(|p| p.split_once("*/").map_or(p, |(_, code)| code)).collect();
    let mut fields: BTreeMap<String, usize> = BTreeMap::new();
    for piece in code.split("typedef struct ").skip(1) {
        let (name, rest) = piece.split_once(" {\n").unwrap();
        let body = rest.split("\n} ").next().unwrap();
        fields.insert(name.into(), body.lines().filter(|l| l.trim_end().ends_with(';')).count());
    }
    assert!(fields.len() > 20, "{fields:?}");
    for (name, count) in fields {
        let known = ours.iter().filter(|(n, _)| n.starts_with(&format!("{name}."))).count();
        assert_eq!(known, count, "fields of {name}");
    }
}

#[test]
fn constants_are_the_header_s() {
    let ours = abi::constants();
    let ask: Vec<_> = ours.iter().map(|(name, _)| format!("VDBLK_{name}")).collect();
    for ((name, value), theirs) in ours.iter().zip(asked(&ask)) {
        assert_eq!(*value, theirs, "{name}");
    }
    let text = header();
    let defined: BTreeSet<_> = text
        .lines()
        .filter_map(|l| l.strip_prefix("#define VDBLK_")?.split([' ', '(']).next())
        .filter(|n| !["PLUGIN_H", "PLUGIN_ENTRY"].contains(n))
        .collect();
    let known: BTreeSet<_> = ours.iter().map(|(name, _)| *name).collect();
    assert_eq!(defined, known);
    assert!(text.contains("#define VDBLK_PLUGIN_ENTRY \"vdblk_plugin_load\""));
}
