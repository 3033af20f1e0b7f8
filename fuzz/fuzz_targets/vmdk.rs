//! Any bytes as a VMDK.
#![no_main]

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

libfuzzer_sys::fuzz_target!(|case: &[u8]| fuzz_support::vmdk::run(case));

// Half of the changes know where a VMDK's numbers are.
libfuzzer_sys::fuzz_mutator!(|case: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed % 2 == 0 {
        return libfuzzer_sys::fuzzer_mutate(case, size, max_size);
    }
    let mut changed = case[..size].to_vec();
    fuzz_support::mutate::vmdk(&mut changed, &mut Random(u64::from(seed)), max_size);
    case[..changed.len()].copy_from_slice(&changed);
    changed.len()
});
