#![no_main]

// Half of the changes know what a VDI is.
vdblk_fuzz::target!(vdblk_fuzz::vdi, vdblk_fuzz::mutate_vdi);
