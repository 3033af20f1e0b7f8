//! vdblk
