//! QED and QCOW of the first version that vdblk writes are what QEMU reads: random changes to images of all shapes, made by either,
//! with QEMU's own changes in between. Where qemu-img and qemu-io are not installed nothing is tested, and that is said.

mod format_support;
mod qemu_support;

use format_support::qed_fixtures;
use qemu_support::{MIB, SIZE, changed_by_both, has_tools, run, vdimg};

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
