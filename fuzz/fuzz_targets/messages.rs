//! A front-end that sends anything.
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

use fuzz_support::messages::Meeting;
use std::sync::LazyLock;

/// Met by every case.
static MEETING: LazyLock<Meeting> = LazyLock::new(Meeting::new);

libfuzzer_sys::fuzz_target!(|case: &[u8]| MEETING.run(case));
