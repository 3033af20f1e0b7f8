#![no_main]

libfuzzer_sys::fuzz_target!(|case: &[u8]| vdblk_fuzz::levels(case));

// Half of the changes know where the numbers of a QED or a QCOW are.
libfuzzer_sys::fuzz_mutator!(|case: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed % 2 == 0 {
        return libfuzzer_sys::fuzzer_mutate(case, size, max_size);
    }
    let mut changed = case[..size].to_vec();
    vdblk_fuzz::mutate_levels(&mut changed, seed, max_size);
    case[..changed.len()].copy_from_slice(&changed);
    changed.len()
});
