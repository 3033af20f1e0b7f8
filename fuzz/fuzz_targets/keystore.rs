#![no_main]

libfuzzer_sys::fuzz_target!(|case: &[u8]| vdblk_fuzz::keystore(case));
