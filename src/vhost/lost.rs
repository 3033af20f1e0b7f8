//! Memory that a front-end takes away.
//!
//! Guest memory is a file of the front-end's, and it can be shortened while we have it mapped; that a file system in
//! memory or a pool of huge pages is full comes to the same. Nothing can be agreed on beforehand: QEMU does not seal its
//! files. Whoever touches such a page gets a SIGBUS, which would end the process, and with it the service of a disk that
//! nothing is wrong with. System calls just fail with EFAULT.
//!
//! So mappings are watched here. The signal's handler puts a page of zeros in the place of the missing one, notes the
//! loss, and the instruction goes on. Whoever works on the memory looks at [`losses`] and stops: [`Watched::is_lost`].
//! Only the missing pages are replaced; what is still there stays what it is. Of a huge page no part can be replaced: all
//! of it is missing, and becomes small pages of zeros. A SIGBUS anywhere else goes to whoever handled it before, and so
//! does one where not even zeros can be had: the instruction cannot go on then, and the process ends.

use super::sys::PAGE_BYTES;
use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Mappings at a time: two tables of memory while one replaces the other, logs, regions of what is in flight; several
/// servers in one process in tests.
const MOST: usize = 4096;
/// The start of a place that is being filled in; no mapping starts there.
const TAKEN: usize = 1;
const SMALL_PAGE: usize = PAGE_BYTES as usize;

/// A watched mapping; 0: a free place.
struct Place {
    start: AtomicUsize,
    len: AtomicUsize,
    page: AtomicUsize,
    lost: AtomicBool,
}

static PLACES: [Place; MOST] = [const {
    Place {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; MOST];

/// Pages replaced so far.
static LOSSES: AtomicU64 = AtomicU64::new(0);

/// Who handled the signal before us; `None` while nobody is watched.
static FORMER: OnceLock<libc::sigaction> = OnceLock::new();

/// How many losses there were, of all mappings together: whoever sees another number than before looks at its own.
pub(super) fn losses() -> u64 {
    LOSSES.load(Ordering::Acquire)
}

/// A mapping that is watched. To be dropped before the mapping is undone.
#[derive(Debug)]
pub(super) struct Watched(usize);

impl Watched {
    /// Watches `len` bytes at `start`, mapped in whole pages of `page` bytes at multiples of that, readable and writable.
    /// They must stay mapped as long as this lives.
    ///
    /// # Errors
    /// If there are too many; from the operating system.
    pub(super) fn new(start: *const u8, len: usize, page: usize) -> io::Result<Watched> {
        install()?;
        let take =
            |p: &Place| p.start.compare_exchange(0, TAKEN, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let i =
            PLACES.iter().position(take).ok_or_else(|| io::Error::other("too many mappings of memory"))?;
        let place = &PLACES[i];
        place.len.store(len, Ordering::Relaxed);
        place.page.store(page, Ordering::Relaxed);
        place.lost.store(false, Ordering::Relaxed);
        place.start.store(start as usize, Ordering::Release);
        Ok(Watched(i))
    }

    /// True once a page of it was found missing.
    pub(super) fn is_lost(&self) -> bool {
        PLACES[self.0].lost.load(Ordering::Acquire)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        PLACES[self.0].start.store(0, Ordering::Release);
    }
}

/// Handles the signal from now on, if that is not done yet.
fn install() -> io::Result<()> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if FORMER.get().is_some() {
        return Ok(());
    }
    // SAFETY: all-zero bytes are a valid sigaction.
    let mut former: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: asks for what is set, into a valid place.
    check(unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut former) })?;
    // before the handler, which looks there; nobody else comes here
    let _ = FORMER.set(former);
    // SAFETY: as above.
    let mut ours: libc::sigaction = unsafe { mem::zeroed() };
    ours.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and does only what a handler may.
    check(unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut()) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Runs in the thread that touched the page, between two of its instructions: no lock, no allocation, nothing but atomics
/// and system calls.
extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the thread's own errno, which what was interrupted may be about to look at.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo.
    let info = unsafe { &*info };
    // Memory found broken that nobody has touched yet: nothing is repeated, and whoever touches it hears of it.
    let untouched = info.si_code == libc::BUS_MCEERR_AO;
    // a code above 0 says that the kernel sent it, about an address
    // SAFETY: for SIGBUS from the kernel that field is set.
    let replaced = untouched || info.si_code > 0 && replace_page(unsafe { info.si_addr() } as usize);
    if !replaced {
        pass_on(info.si_code > 0);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Leaves the signal to others. `by_kernel`: the instruction is repeated, and the signal comes again, to whoever handled it
/// before us. One that was sent by somebody would not come again: it ends the process, as is usual.
fn pass_on(by_kernel: bool) {
    // SAFETY: all-zero bytes are a valid sigaction, and mean SIG_DFL.
    let usual: libc::sigaction = unsafe { mem::zeroed() };
    let next = FORMER.get().filter(|_| by_kernel).unwrap_or(&usual);
    // SAFETY: sets what is usual, or what the kernel once said was set.
    unsafe { libc::sigaction(libc::SIGBUS, next, ptr::null_mut()) };
    if !by_kernel {
        // SAFETY: a plain call that a handler may make; it takes effect when the handler has returned.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}

/// Puts zeros in the place of the page around `address`, if that is watched.
fn replace_page(address: usize) -> bool {
    for place in &PLACES {
        let start = place.start.load(Ordering::Acquire);
        let (len, page) = (place.len.load(Ordering::Relaxed), place.page.load(Ordering::Relaxed));
        let hit = start > TAKEN && address.checked_sub(start).is_some_and(|skip| skip < len);
        // the place may have been given to another while we looked
        if !hit || page == 0 || place.start.load(Ordering::Acquire) != start {
            continue;
        }
        // before anybody can take the zeros for the driver's word
        place.lost.store(true, Ordering::Release);
        LOSSES.fetch_add(1, Ordering::Release);
        return fillings(start, len, page, address).iter().any(|(from, len)| put_zeros(*from, *len));
    }
    false
}

/// What can be replaced in a mapping of `len` bytes at `start` where `address` is missing, the best first, as start and
/// length: the small page; the whole page, since the kernel splits no huge ones; where there are too many mappings to make
/// three of one, all of it.
fn fillings(start: usize, len: usize, page: usize, address: usize) -> [(usize, usize); 3] {
    let skip = address - start;
    [(address - skip % SMALL_PAGE, SMALL_PAGE), (address - skip % page, page), (start, len)]
}

/// New zeros for a page or more of a watched mapping.
fn put_zeros(from: usize, len: usize) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range lies inside a mapping that its owner keeps (`Watched`) and of which nobody counts on more than that
    // it is mapped: its content may change at any time.
    let there = unsafe { libc::mmap(from as *mut libc::c_void, len, protection, flags, -1, 0) };
    there != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::BufSlice;
    use vm_memory::{FileOffset, MmapRegion};

    const PAGE: usize = SMALL_PAGE;

    #[test]
    fn what_is_replaced_are_whole_pages_around_the_place() {
        for (page, start) in
            [(PAGE, 0x7f00_0000_3000), (2 << 20, 0x7f00_0020_0000), (1 << 30, 0x7f00_4000_0000)]
        {
            let len = 3 * page;
            for skip in [0, 1, PAGE - 1, PAGE, page - 1, page, 2 * page + 5, len - 1] {
                let address = start + skip;
                let found = fillings(start, len, page, address);
                assert_eq!(found.map(|f| f.1), [PAGE, page, len]);
                for ((from, n), unit) in found.into_iter().zip([PAGE, page, page]) {
                    assert!((from..from + n).contains(&address) && from.is_multiple_of(unit));
                    assert!(from >= start && from + n <= start + len && n.is_multiple_of(unit));
                }
            }
        }
    }

    #[test]
    fn a_page_behind_the_end_reads_as_zeros_and_the_others_stay() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE as u64).unwrap();
        let place = FileOffset::new(file.try_clone().unwrap(), 0);
        let mapping: MmapRegion<()> = MmapRegion::from_file(place, 4 * PAGE).unwrap();
        let other: MmapRegion<()> = MmapRegion::new(PAGE).unwrap();
        let watched = Watched::new(mapping.as_ptr(), mapping.size(), PAGE).unwrap();
        let another = Watched::new(other.as_ptr(), other.size(), PAGE).unwrap();
        // SAFETY: mapped until the end of the test, and no reference to it is made.
        let bytes = unsafe { BufSlice::new(mapping.as_ptr(), mapping.size()) };
        bytes.write(&[7; 4 * PAGE]);
        let before = losses();
        file.set_len(2 * PAGE as u64).unwrap();
        let mut got = [1; 4 * PAGE];
        assert!(!watched.is_lost());
        bytes.read(&mut got);
        assert!(got[..2 * PAGE].iter().all(|b| *b == 7) && got[2 * PAGE..].iter().all(|b| *b == 0));
        assert!(watched.is_lost() && !another.is_lost() && losses() >= before + 2);
        // it is ordinary memory now
        bytes.part(3 * PAGE, 1).write(&[9]);
        bytes.read(&mut got);
        assert_eq!(got[3 * PAGE], 9);
        drop(watched);
        // a place that is used again begins anew
        let watched = Watched::new(mapping.as_ptr(), PAGE, PAGE).unwrap();
        assert!(!watched.is_lost());
    }
}
