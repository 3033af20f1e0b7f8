#![no_main]

// Half of the changes know where a VMDK's numbers are.
vdblk_fuzz::target!(vdblk_fuzz::vmdk, vdblk_fuzz::mutate_vmdk);
