//! VHDX images that vdblk and QEMU write to in turns are sound for both: random changes to images of all shapes, made by either.
//! Where qemu-img and qemu-io are not installed nothing is tested, and that is said.

mod qemu_support;

use qemu_support::{SIZE, changed_by_both, has_tools, run, vdimg};

#[test]
fn images_of_ours_are_sound() {
    if !has_tools() {
        return;
    }
    let size = SIZE.to_string();
    for words in
        ["", "--option block_size=1M", "--variant fixed", "--option log_size=2M --option block_size=2M"]
    {
        changed_by_both("vhdx", words, false, |_, image| {
            let more = words.split_whitespace();
            let args = ["create", "--format", "vhdx", "--size", &size].into_iter().chain(more);
            vdimg(&args.chain([image]).collect::<Vec<_>>());
        });
    }
}

#[test]
fn images_of_qemu_stay_sound() {
    if !has_tools() {
        return;
    }
    for options in ["block_size=1M", "block_size=2M,log_size=2M", "subformat=fixed", "block_state_zero=off"] {
        changed_by_both("vhdx", &format!("of QEMU {options}"), true, |raw, image| {
            run("qemu-img", &["convert", "-f", "raw", "-O", "vhdx", "-o", options, raw, image]);
        });
    }
}
