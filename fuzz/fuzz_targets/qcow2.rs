#![no_main]

vdblk_fuzz::target!(|case: &[u8]| vdblk_fuzz::image("qcow2", case), vdblk_fuzz::mutate_numbers);
