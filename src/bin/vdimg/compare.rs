//! `vdimg compare` and `vdimg diff`.

use super::args::{Compare, CompareArgs, Diff, Image, Output, Parents};
use super::keys::Keys;
use super::terminal;
use serde_json::json;
use vdblk::Result;
use vdblk::job::{compare_disks, diff_disks};
use vdblk::map::GuestRange;
use vdblk::vd::{OpenedDisk, open_disk};

/// Exit status of images that differ.
const DIFFERENT: u8 = 1;

/// Opens both images, read-only, locked.
fn open(args: &Compare) -> Result<[OpenedDisk; 2]> {
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
    Ok([a, b])
}

fn note_sizes([x, y]: [u64; 2]) {
    if x != y {
        eprintln!("vdimg: note: the sizes differ, {x} and {y} bytes: what one has more must be zeros");
    }
}

pub(crate) fn run(args: &CompareArgs) -> Result<u8> {
    let [a, b] = open(&args.images)?;
    let found = terminal::watched(|watch| compare_disks(&a.disk, &b.disk, watch))?;
    if args.output == Output::Json {
        let told =
            json!({ "equal": found.difference.is_none(), "offset": found.difference, "sizes": found.sizes });
        terminal::print(&format!("{told}\n"))?;
        return Ok(if found.difference.is_none() { 0 } else { DIFFERENT });
    }
    note_sizes(found.sizes);
    match found.difference {
        None => terminal::print("The images are equal.\n").map(|()| 0),
        Some(at) => terminal::print(&format!("The images differ at offset {at}.\n")).map(|()| DIFFERENT),
    }
}

pub(crate) fn diff(args: &Diff) -> Result<u8> {
    let [a, b] = open(&args.images)?;
    note_sizes([a.disk.size_bytes(), b.disk.size_bytes()]);
    let json = args.output == Output::Json;
    let mut count = 0u64;
    terminal::print(if json { "[" } else { "" })?;
    let mut told = |range: GuestRange| {
        let (start, length) = (range.start().0, range.len());
        let between = if count > 0 { ",\n" } else { "" };
        count += 1;
        terminal::print(&if json {
            format!("{between}{{\"start\":{start},\"length\":{length}}}")
        } else {
            format!("{start:<16} {length}\n")
        })
    };
    terminal::watched(|watch| diff_disks(&a.disk, &b.disk, &mut told, watch))?;
    terminal::print(if json { "]\n" } else { "" })?;
    Ok(if count > 0 { DIFFERENT } else { 0 })
}
