//! `vdimg compare`.

use super::args::{Compare, Image, Parents};
use super::keys::Keys;
use super::terminal;
use vdblk::Result;
use vdblk::job::compare_disks;
use vdblk::vd::open_disk;

/// Exit status of images that differ.
const DIFFERENT: u8 = 1;

pub(crate) fn run(args: &Compare) -> Result<u8> {
    let second = Image {
        format: args.format2,
        parents: Parents {
            parents: args.parents2.clone(),
            parent_dirs: args.parent_dirs2.clone(),
            allow_parent_mismatch: args.allow_parent_mismatch2,
            allow_raw_device: args.image.parents.allow_raw_device,
        },
        keys: Keys {
            password_file: args.password_file2.clone(),
            key_store: args.key_store2.clone(),
            unallocated: args.image.keys.unallocated,
        },
    };
    let a = open_disk(&args.image.open(&args.first, args.snapshot.snapshot.as_ref(), args.lock)?)?;
    let b = open_disk(&second.open(&args.second, args.snapshot2.as_ref(), args.lock)?)?;
    let found = terminal::watched(|watch| compare_disks(&a.disk, &b.disk, watch))?;
    let [x, y] = found.sizes;
    if x != y {
        eprintln!("vdimg: note: the sizes differ, {x} and {y} bytes: what one has more must be zeros");
    }
    match found.difference {
        None => terminal::print("The images are equal.\n").map(|()| 0),
        Some(at) => terminal::print(&format!("The images differ at offset {at}.\n")).map(|()| DIFFERENT),
    }
}
