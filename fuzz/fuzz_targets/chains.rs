//! A guest that writes anything into a virtqueue.
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

libfuzzer_sys::fuzz_target!(|case: &[u8]| fuzz_support::chains::run(case));
