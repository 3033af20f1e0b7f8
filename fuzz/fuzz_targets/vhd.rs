#![no_main]

vdblk_fuzz::target!(|case: &[u8]| vdblk_fuzz::image("vhd", case), vdblk_fuzz::mutate_numbers);
