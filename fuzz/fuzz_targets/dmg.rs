#![no_main]

vdblk_fuzz::target!(|case: &[u8]| vdblk_fuzz::image("dmg", case), vdblk_fuzz::mutate_numbers);
