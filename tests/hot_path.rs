//! Promise: once a disk is warm, a request costs no allocation, whatever the format and whichever way it takes.

#[path = "../benches/hotpath/guest.rs"]
mod guest;
#[allow(dead_code)] // the benchmark counts signals too
#[path = "../benches/hotpath/served.rs"]
mod served;

use guest::Ask;
use served::{Load, Served};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The system's allocator, and how often this thread has asked it for memory.
struct Counting;

thread_local! {
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

fn asked() -> u64 {
    ASKED.with(Cell::get)
}

fn note() {
    // a thread that ends has no counter any more
    let _ = ASKED.try_with(|n| n.set(n.get() + 1));
}

// SAFETY: all is the system allocator's, whose promises these are; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: what the caller promises us.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: what the caller promises us.
        unsafe { System.dealloc(place, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: what the caller promises us.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: what the caller promises us.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DISK_BYTES: u64 = 32 << 20;
/// Batches until everything that is kept is there: slots, bounce buffers, pages of tables.
const WARM: u32 = 600;
const COUNTED: u32 = 200;

/// Windows of so many batches. What keeps its memory is allocated once, which a rare event (a write that waits) may do late; what each
/// request allocates is seen in all of them.
const WINDOWS: u32 = 5;

/// Allocations of as many batches of 32 on a warm disk: of the window with the fewest.
fn allocations(image: &Path, ask: Ask, direct: bool, bytes: u32) -> u64 {
    let load = Load { image, direct, ask, depth: 32, bytes };
    let mut served = Served::new(&load).expect("a disk to serve");
    for _ in 0..WARM {
        served.batch().expect("answers");
    }
    let mut least = u64::MAX;
    for _ in 0..WINDOWS {
        let before = (asked(), served.counters().signals);
        for _ in 0..COUNTED {
            served.batch().expect("answers");
        }
        assert_eq!(served.counters().signals - before.1, u64::from(COUNTED), "one signal a batch");
        least = least.min(asked() - before.0);
        if least == 0 {
            break;
        }
    }
    served.close().expect("a clean end");
    least
}

/// Runs vdimg, which has to succeed.
fn vdimg(args: &[&str], input: &str) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_vdimg"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("vdimg starts");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("vdimg reads");
    assert!(child.wait().expect("vdimg ends").success(), "vdimg {args:?}");
}

/// An image of this format that has every byte, in a folder of this program's own.
fn full(folder: &Path, format: &str) -> PathBuf {
    let image = folder.join(format!("disk.{format}"));
    let raw = folder.join("data.raw");
    if !raw.exists() {
        let mut byte = 1u64;
        let bytes = (0..DISK_BYTES).map(|_| {
            byte = byte.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            byte.to_be_bytes()[0]
        });
        std::fs::write(&raw, bytes.collect::<Vec<_>>()).expect("room");
    }
    vdimg(&["convert", "--output-format", format, name(&raw), name(&image)], "");
    image
}

fn name(path: &Path) -> &str {
    path.to_str().expect("a plain name")
}

/// What they cost on a disk of this format: cached reads, writes to allocated blocks, of one page and of many, reads past the cache.
fn check(format: &str) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let image = full(folder.path(), format);
    for (what, ask, direct, bytes) in [
        ("cached reads", Ask::Read, false, 4096),
        ("cached reads of 64 KiB", Ask::Read, false, 65536),
        ("reads past the cache", Ask::Read, true, 4096),
        ("writes", Ask::Write, false, 4096),
    ] {
        let n = allocations(&image, ask, direct, bytes);
        assert_eq!(n, 0, "{format}: {what}: {n} allocations in {COUNTED} batches");
    }
}

#[test]
fn requests_to_raw_images_allocate_nothing() {
    check("raw");
}

#[test]
fn requests_to_vdi_images_allocate_nothing() {
    check("vdi");
}

#[test]
fn requests_to_vmdk_images_allocate_nothing() {
    check("vmdk");
}

#[test]
fn requests_to_vhd_images_allocate_nothing() {
    check("vhd");
}

#[test]
fn requests_to_vhdx_images_allocate_nothing() {
    check("vhdx");
}

#[test]
fn requests_to_qcow2_images_allocate_nothing() {
    check("qcow2");
}

/// Every second MiB in the diff, the rest beneath.
#[test]
fn requests_through_a_chain_allocate_nothing() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let (base, diff) = (full(folder.path(), "vdi"), folder.path().join("diff.vdi"));
    vdimg(&["create", "--format", "vdi", "--parent", name(&base), name(&diff)], "");
    let writes: String =
        (0..DISK_BYTES >> 20).step_by(2).map(|m| format!("write -P 7 {} 1M\n", m << 20)).collect();
    vdimg(&["io", name(&diff)], &writes);
    assert_eq!(allocations(&diff, Ask::Read, false, 4096), 0);
    assert_eq!(allocations(&diff, Ask::Read, true, 4096), 0);
}

#[test]
fn the_count_notices_an_allocation() {
    let before = asked();
    drop(std::hint::black_box(vec![1u8; 100]));
    assert_eq!(asked() - before, 1);
}
