//! Chains of images of different formats: every byte by a model, with different blocks, sizes smaller and larger than the
//! child's; and what holds them together: wrong parents, wrong orders, cycles and gaps are refused.

mod vdimg_support;

use std::fs;
use std::path::Path;
use vdimg_support::shapes::{self, Shape};
use vdimg_support::*;

/// A chain on disk and what it shows.
struct Stack {
    /// Base first.
    files: Vec<String>,
    model: Vec<u8>,
}

impl Stack {
    /// A base image of so many bytes.
    fn base(d: &Path, shape: &Shape, size: u64, rng: &mut Rng) -> Stack {
        let file = shape.file("layer0");
        ok(d, &format!("create {} --size {size} {file}", shape.words("--format")));
        let mut stack = Stack { files: vec![file], model: vec![0; size as usize] };
        stack.write(d, rng);
        stack
    }

    /// The parents of the image on top, as options.
    fn parents(&self) -> String {
        named(&self.files[..self.files.len() - 1])
    }

    fn top(&self) -> &str {
        self.files.last().expect("one image")
    }

    /// A diff over what is there. Where it is longer than its parent it begins as zeros there.
    fn grow(&mut self, d: &Path, shape: &Shape, size: u64, rng: &mut Rng) {
        let file = shape.file(&format!("layer{}", self.files.len()));
        let words = shape.words("--format");
        ok(d, &format!("create {words} --size {size} {} {file}", named(&self.files)));
        self.files.push(file);
        self.model.resize(size as usize, 0);
        self.assert_shown(d);
        self.write(d, rng);
    }

    /// Writes here and there, in pieces below and above every block size, and zeros over what is beneath.
    fn write(&mut self, d: &Path, rng: &mut Rng) {
        let sectors = self.model.len() as u64 / 512;
        let mut commands = Vec::new();
        for _ in 0..10 {
            let most = if rng.below(4) == 0 { 3000 } else { 100 };
            let n = (1 + rng.below(most)).min(sectors);
            let at = rng.below(sectors - n + 1);
            let value = if rng.below(4) == 0 { 0 } else { 1 + rng.below(255) as u8 };
            self.model[at as usize * 512..(at + n) as usize * 512].fill(value);
            let (at, n) = (at * 512, n * 512);
            commands.push(match value {
                0 if rng.below(2) == 0 => format!("write -z -u {at} {n}"),
                0 => format!("write -z {at} {n}"),
                _ => format!("write -P {value} {at} {n}"),
            });
        }
        // The ends of a disk are where blocks are cut off.
        commands.push(format!("write -P 77 {} 512", (sectors - 1) * 512));
        let end = self.model.len();
        self.model[end - 512..].fill(77);
        let commands: Vec<_> = commands.iter().map(String::as_str).collect();
        io_ok(d, &format!("{} {}", self.parents(), self.top()), &commands);
        self.assert_shown(d);
    }

    #[track_caller]
    fn assert_shown(&self, d: &Path) {
        ok(d, &format!("convert {} --output-format raw {} shown.raw", self.parents(), self.top()));
        let shown = fs::read(d.join("shown.raw")).expect("read");
        fs::remove_file(d.join("shown.raw")).expect("remove");
        assert_eq!(shown.len(), self.model.len(), "{:?}", self.files);
        let wrong = shown.iter().zip(&self.model).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "the first wrong byte of {:?}", self.files);
        ok(d, &format!("check {}", self.top()));
    }
}

/// `--parent` for each.
fn named(files: &[String]) -> String {
    files.iter().map(|f| format!("--parent {f} ")).collect()
}

/// Sizes that end in the middle of blocks.
fn some_size(rng: &mut Rng) -> u64 {
    (1 + rng.below(5000)) * 512
}

#[test]
fn every_format_over_every_other() {
    let parents = shapes::plain();
    let mut pairs = 0;
    for (seed, child) in (0..).zip(shapes::diffs()) {
        let mut rng = Rng(seed);
        for parent in &parents {
            let dir = scratch();
            let size = some_size(&mut rng);
            // The same, longer, shorter.
            let child_size = match rng.below(3) {
                0 => size,
                1 => size + some_size(&mut rng),
                _ => 512 * (1 + rng.below(size / 512)),
            };
            println!("seed {seed}: {child} of {child_size} bytes over {parent} of {size}");
            let mut stack = Stack::base(dir.path(), parent, size, &mut rng);
            stack.grow(dir.path(), &child, child_size, &mut rng);
            pairs += 1;
        }
    }
    println!("{pairs} pairs");
    assert!(pairs >= 60, "{pairs}");
}

#[test]
fn long_chains_of_all_formats_in_any_order() {
    let (bases, diffs) = (shapes::writable(), shapes::diffs());
    for seed in 0..6 {
        let mut rng = Rng(1000 + seed);
        let dir = scratch();
        let base = &bases[rng.below(bases.len() as u64) as usize];
        let mut stack = Stack::base(dir.path(), base, some_size(&mut rng), &mut rng);
        // All of them, in an order of this seed.
        let mut order = diffs.clone();
        (1..order.len()).for_each(|i| order.swap(i, rng.below(i as u64 + 1) as usize));
        // Each run has each format, and some of the rest.
        let mut seen = Vec::new();
        order.retain(|s| {
            let first = !seen.contains(&s.format);
            seen.push(s.format);
            first || rng.below(6) == 0
        });
        println!("seed {seed}: {base} < {}", order.iter().map(|s| format!("{s}, ")).collect::<String>());
        for shape in &order {
            stack.grow(dir.path(), shape, some_size(&mut rng), &mut rng);
        }
    }
}

/// What `vdimg info` says of an image.
fn info(d: &Path, file: &str) -> serde_json::Value {
    serde_json::from_str(&ok(d, &format!("info --output json {file}"))).expect("JSON")
}

/// Three images of a format, one over the other.
fn three(d: &Path, shape: &Shape) -> [String; 3] {
    let files = ["base", "one", "two"].map(|stem| shape.file(stem));
    let words = shape.words("--format");
    ok(d, &format!("create {words} --size 16M {}", files[0]));
    io_ok(d, &files[0], &["write -P 1 0 128k", "write -P 1 12M 64k"]);
    ok(d, &format!("create {words} --parent {} {}", files[0], files[1]));
    io_ok(d, &format!("--parent {} {}", files[0], files[1]), &["write -P 2 64k 64k"]);
    ok(d, &format!("create {words} {} {}", named(&files[..2]), files[2]));
    files
}

/// The format says of a diff which parent it has, by more than a name.
fn has_identities(d: &Path, child: &str) -> bool {
    let info = info(d, child);
    ["parent_uuid", "parent_content_id"].iter().any(|key| !info[*key].is_null())
}

#[test]
fn parents_are_found_without_a_word() {
    for shape in shapes::plain_diffs() {
        let dir = scratch();
        let d = dir.path();
        let files = three(d, &shape);
        if info(d, &files[2])["variant"] != "diff" {
            // Nothing in the image says that there is one.
            println!("{shape}: a diff says nothing of its parent");
            assert_eq!(shape.format.name(), "parallels");
            continue;
        }
        let commands = ["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 0 128k 64k", "read -P 1 12M 64k"];
        io_ok(d, &format!("--read-only {}", files[2]), &commands);
    }
}

#[test]
fn a_missing_base_is_refused_and_never_read_as_zeros() {
    for shape in shapes::plain_diffs().into_iter().filter(|s| s.format.name() != "parallels") {
        let dir = scratch();
        let d = dir.path();
        let files = three(d, &shape);
        shapes::remove(d, "base");
        for file in &files[1..] {
            let line = fails(d, 1, &format!("convert --output-format raw {file} out.raw"));
            assert!(line.contains("was not found") && line.contains("--parent"), "{shape}: {line}");
            assert!(!d.join("out.raw").exists());
        }
        let line =
            fails(d, 1, &format!("convert --parent {} --output-format raw {} out.raw", files[1], files[2]));
        assert!(line.contains("was not found"), "{shape}: {line}");
    }
}

#[test]
fn a_wrong_parent_or_order_is_refused_unless_waived() {
    let mut held = Vec::new();
    for shape in shapes::diffs() {
        let dir = scratch();
        let d = dir.path();
        let files = three(d, &shape);
        if !has_identities(d, &files[1]) {
            println!("{shape}: a diff names its parent by a file's name alone, or not at all");
            continue;
        }
        held.push(shape.format);
        let stranger = shape.file("stranger");
        ok(d, &format!("create {} --size 16M {stranger}", shape.words("--format")));
        io_ok(d, &stranger, &["write -P 9 12M 64k"]);
        let [base, one, two] = &files;
        let cases = [
            ("another image", format!("--parent {stranger} {one}")),
            ("the grandparent", format!("--parent {base} {two}")),
            ("the wrong order", format!("--parent {one} --parent {base} {two}")),
            ("a stranger below", format!("--parent {stranger} --parent {one} {two}")),
        ];
        for (what, words) in cases {
            let line = fails(d, 1, &format!("convert --output-format raw {words} out.raw"));
            let refusals = ["its parent has", "was not found", "is a base image"];
            assert!(refusals.iter().any(|r| line.contains(r)), "{shape}, {what}: {line}");
            assert!(!d.join("out.raw").exists());
        }
        let words = format!("--allow-parent-mismatch --parent {stranger} {one}");
        io_ok(d, &format!("--read-only {words}"), &["read -P 2 64k 64k", "read -P 9 12M 64k"]);
    }
    held.dedup();
    println!("links are held by {held:?}");
    assert!(held.len() >= 3, "{held:?}");
}

#[test]
fn a_cycle_is_refused() {
    for shape in shapes::plain_diffs().into_iter().filter(|s| s.format.name() != "parallels") {
        let dir = scratch();
        let d = dir.path();
        let [base, one, two] = three(d, &shape);
        // The base is made once more, with the same identity, over the last of its descendants.
        let uuid = info(d, &base)["uuid"].as_str().map(|u| format!("--uuid {u}")).unwrap_or_default();
        let parents = named(&[base.clone(), one.clone(), two.clone()]);
        fs::create_dir(d.join("new")).expect("folder");
        let made = shape.file("new/base");
        ok(d, &format!("create {} {uuid} {parents} {made}", shape.words("--format")));
        fs::rename(d.join(&made), d.join(&base)).expect("rename");
        for file in [&two, &one, &base] {
            let out = run(d, &format!("convert --output-format raw {file} out.raw"));
            let line = failed(&format!("{shape} {file}"), 1, out);
            assert!(line.contains("appears twice in its own chain"), "{shape}: {line}");
        }
    }
}

#[test]
fn contents_alone_never_say_what_a_parent_is() {
    for shape in shapes::plain_diffs() {
        let dir = scratch();
        let d = dir.path();
        // A guest has written an image of that format into its raw disk.
        let inner = shape.file("inner");
        ok(d, &format!("create {} --size 1M {inner}", shape.words("--format")));
        io_ok(d, &inner, &["write -P 5 0 1M"]);
        let mut bytes = fs::read(d.join(&inner)).expect("read");
        bytes.resize(4 << 20, 0);
        fs::write(d.join("guest.raw"), &bytes).expect("write");
        fs::write(d.join("guest.img"), &bytes).expect("write");
        fs::write(d.join("model.raw"), &bytes).expect("write");
        let child = shape.file("child");
        let words = shape.words("--format");
        // A name that says nothing: the operator has to.
        let line = fails(d, 1, &format!("create {words} --parent guest.img {child}"));
        assert!(line.contains("format=") && !d.join(&child).exists(), "{shape}: {line}");
        for parent in ["guest.img,format=raw", "guest.raw"] {
            ok(d, &format!("create {words} --parent {parent} {child}"));
            ok(d, &format!("compare --parent {parent} {child} model.raw"));
            let line = failed("img", 2, run(d, &format!("compare --parent guest.img {child} model.raw")));
            assert!(line.contains("its name does not say so"), "{shape}: {line}");
            // Without a word it is raw because the image says so, or its name, or it is not taken.
            let out = run(d, &format!("compare {child} model.raw"));
            if out.status.success() {
                println!("{shape} over {parent}: found");
            } else if shape.format.name() == "parallels" {
                // Nothing in it says that there is a parent: it is read as what it is alone.
                assert_eq!(out.status.code(), Some(1));
            } else {
                let line = failed(parent, 2, out);
                let refusals = ["not found", "its name does not say so"];
                assert!(refusals.iter().any(|r| line.contains(r)), "{shape} over {parent}: {line}");
            }
            shapes::remove(d, "child");
        }
        // The other way round: an image under the name of another format, or of raw ones.
        let odd = if shape.format.name() == "vdi" { "odd.vhd" } else { "odd.vdi" };
        fs::copy(d.join(&inner), d.join(odd)).expect("copy");
        let line = fails(d, 1, &format!("create {words} --parent {odd} {child}"));
        assert!(line.contains("its contents look like"), "{shape}: {line}");
        ok(d, &format!("create {words} --parent {odd},format={} {child}", shape.format));
        let commands = ["read -P 5 0 1M"];
        io_ok(d, &format!("--read-only --parent {odd},format={} {child}", shape.format), &commands);
    }
}

#[test]
fn a_geometry_that_a_format_does_not_allow_is_left_behind() {
    let dir = scratch();
    let d = dir.path();
    // 255 sectors a track: VHD's rule for more than 31 GiB.
    ok(d, "create --format vhd --size 40G large.vhd");
    assert_eq!(info(d, "large.vhd")["geometry"]["sectors"], 255);
    for shape in shapes::plain().into_iter().filter(|s| s.format.name() != "raw") {
        let copy = shape.file("copy");
        ok(d, &format!("convert {} large.vhd {copy}", shape.words("--output-format")));
        ok(d, &format!("compare large.vhd {copy}"));
        if shape.can_be_diff() {
            ok(d, &format!("create {} --parent large.vhd {}", shape.words("--format"), shape.file("child")));
        }
        shapes::remove(d, "copy");
        shapes::remove(d, "child");
    }
}
