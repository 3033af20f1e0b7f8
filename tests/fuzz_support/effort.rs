//! What a case may cost: memory and time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Memory for one image of at most 1 MiB. The harness' own is counted as well, its file included.
const MAX_HEAP_BYTES: usize = 256 << 20;
/// CPU time for one image of at most 1 MiB, in milliseconds. Not wall time: other processes do not count.
const MAX_CPU_MS: u64 = 1000;
/// How much longer a build may take that checks itself (as those of cargo-fuzz do, too).
const SLOW_BUILD: u64 = 10;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The heap, counted.
pub(crate) struct CountingHeap;

#[global_allocator]
static HEAP: CountingHeap = CountingHeap;

fn took(bytes: usize) {
    let now = NOW.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

fn gave(bytes: usize) {
    NOW.fetch_sub(bytes, Ordering::Relaxed);
}

// SAFETY: all of it is done by `System`, whose promises these are; counting touches no memory of the callers.
unsafe impl GlobalAlloc for CountingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promises are those `System` asks for; so in the following.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        gave(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        took(new_size);
        gave(layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

/// CPU time of this thread in milliseconds.
fn cpu_ms() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is valid for writing.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut t) };
    assert_eq!(failed, 0, "the kernel counts a thread's time");
    u64::try_from(t.tv_sec).unwrap() * 1000 + u64::try_from(t.tv_nsec).unwrap() / 1_000_000
}

/// The effort since it was begun. Other threads of the process must be at rest.
pub(crate) struct Effort {
    cpu_ms: u64,
    heap: usize,
}

impl Effort {
    pub(crate) fn begin() -> Self {
        let heap = NOW.load(Ordering::Relaxed);
        PEAK.store(heap, Ordering::Relaxed);
        Effort { cpu_ms: cpu_ms(), heap }
    }

    /// Milliseconds and bytes so far.
    pub(crate) fn so_far(&self) -> (u64, usize) {
        (cpu_ms() - self.cpu_ms, PEAK.load(Ordering::Relaxed).saturating_sub(self.heap))
    }

    /// # Panics
    /// If it was too much.
    pub(crate) fn judge(&self, what: &str) {
        let (ms, bytes) = self.so_far();
        let most_ms = MAX_CPU_MS * if cfg!(debug_assertions) { SLOW_BUILD } else { 1 };
        assert!(bytes <= MAX_HEAP_BYTES, "{what} took {bytes} bytes of memory");
        assert!(ms <= most_ms, "{what} took {ms} ms");
    }
}
