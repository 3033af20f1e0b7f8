//! What the fuzz targets run: the cases of `tests/fuzz_support`, which the tests run as well.

#[path = "../../tests/format_support/build.rs"]
#[allow(dead_code)]
mod build_vdi;
#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/fuzz_support/mod.rs"]
#[allow(dead_code)]
mod fuzz_support;

mod format_support {
    pub(crate) use super::build_vdi as build;
}

use common::hostile::Random;
use fuzz_support::messages::Meeting;
use std::sync::LazyLock;
use vdblk::format::Format;

/// A guest that writes anything into a virtqueue.
pub fn chains(case: &[u8]) {
    fuzz_support::chains::run(case);
}

/// A front-end that sends anything, to a server that all cases meet.
pub fn messages(case: &[u8]) {
    static MEETING: LazyLock<Meeting> = LazyLock::new(Meeting::new);
    MEETING.run(case);
}

/// Any bytes as a key store.
pub fn keystore(case: &[u8]) {
    fuzz_support::key_store::run(case);
}

/// Any bytes as a VDI.
pub fn vdi(case: &[u8]) {
    fuzz_support::image::run(case);
}

/// Changes a case by what is known of a VDI.
pub fn mutate_vdi(case: &mut Vec<u8>, seed: u32, max_bytes: usize) {
    fuzz_support::mutate::image(case, &mut Random(u64::from(seed)), max_bytes);
}

/// Any bytes as a VMDK.
pub fn vmdk(case: &[u8]) {
    fuzz_support::one_file::run(Format::Vmdk, case);
}

/// Changes a case by what is known of a VMDK.
pub fn mutate_vmdk(case: &mut Vec<u8>, seed: u32, max_bytes: usize) {
    fuzz_support::mutate::vmdk(case, &mut Random(u64::from(seed)), max_bytes);
}

/// Any bytes as a QED or a QCOW.
pub fn levels(case: &[u8]) {
    fuzz_support::one_file::run_levels(case);
}

/// Changes a case by what is known of these.
pub fn mutate_levels(case: &mut Vec<u8>, seed: u32, max_bytes: usize) {
    fuzz_support::mutate::levels(case, &mut Random(u64::from(seed)), max_bytes);
}

/// Any bytes as an image of the format of this name.
pub fn image(format: &str, case: &[u8]) {
    fuzz_support::one_file::run(format.parse::<Format>().expect("a format"), case);
}

/// Any bytes as a cue sheet.
pub fn cue(case: &[u8]) {
    fuzz_support::one_file::run_cue(case);
}

/// Changes the numbers in a case.
pub fn mutate_numbers(case: &mut Vec<u8>, seed: u32, max_bytes: usize) {
    fuzz_support::mutate::numbers(case, &mut Random(u64::from(seed)), max_bytes);
}

/// A target whose cases are changed by `$mutate` every other time.
#[macro_export]
macro_rules! target {
    ($run:expr, $mutate:path) => {
        libfuzzer_sys::fuzz_target!(|case: &[u8]| $run(case));

        libfuzzer_sys::fuzz_mutator!(|case: &mut [u8], size: usize, max_size: usize, seed: u32| {
            if seed % 2 == 0 {
                return libfuzzer_sys::fuzzer_mutate(case, size, max_size);
            }
            let mut changed = case[..size].to_vec();
            $mutate(&mut changed, seed, max_size);
            case[..changed.len()].copy_from_slice(&changed);
            changed.len()
        });
    };
}
