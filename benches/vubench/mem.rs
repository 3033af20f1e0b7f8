//! One memfd shared with the device: a bump allocator plus raw typed access. All access to the
//! shared pages goes through here; the other side may change them at any time.
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::AtomicU16;

/// First guest physical address we announce; everything below is unmapped on purpose.
pub(crate) const GPA_BASE: u64 = 0x1_0000_0000;

/// The mapping is rounded up to whole huge pages.
const ROUND: usize = 2 << 20;

pub(crate) struct Mem {
    pub(crate) fd: File,
    ptr: *mut u8,
    len: usize,
    used: usize,
}

// SAFETY: the pointer is to a shared mapping that lives as long as `Mem`; every access is volatile,
// atomic, or to a buffer whose only user on this side is the thread that owns its queue.
unsafe impl Send for Mem {}
// SAFETY: as above; `Mem` has no state but the mapping once `alloc` (which wants `&mut`) is done.
unsafe impl Sync for Mem {}

/// Plain old data: every bit pattern is a value, and there is no padding.
///
/// # Safety
/// The type must be `repr(C)` or primitive, without padding and without invalid values.
pub(crate) unsafe trait Pod: Copy {}
// SAFETY: a primitive integer.
unsafe impl Pod for u8 {}
// SAFETY: a primitive integer.
unsafe impl Pod for u16 {}
// SAFETY: a primitive integer.
unsafe impl Pod for u32 {}
// SAFETY: a primitive integer.
unsafe impl Pod for u64 {}

impl Mem {
    pub(crate) fn new(len: usize) -> io::Result<Mem> {
        let len = len.next_multiple_of(ROUND);
        // SAFETY: the name is a valid C string.
        let fd = unsafe { libc::memfd_create(c"vubench".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: memfd_create just gave us this descriptor, nobody else owns it.
        let fd = unsafe { File::from_raw_fd(fd) };
        fd.set_len(len as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice; the file is `len` long.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd.as_raw_fd(),
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mem { fd, ptr: p.cast(), len, used: 0 })
    }

    pub(crate) fn alloc(&mut self, len: usize, align: usize) -> usize {
        let off = self.used.next_multiple_of(align);
        assert!(off + len <= self.len, "shared memory exhausted");
        self.used = off + len;
        off
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn gpa(&self, off: usize) -> u64 {
        GPA_BASE + off as u64
    }

    pub(crate) fn uaddr(&self, off: usize) -> u64 {
        self.ptr as u64 + off as u64
    }

    fn at<T>(&self, off: usize) -> *mut T {
        assert!(off + size_of::<T>() <= self.len, "outside shared memory");
        // SAFETY: just checked to stay inside the mapping.
        unsafe { self.ptr.add(off) }.cast()
    }

    pub(crate) fn write<T: Pod>(&self, off: usize, v: T) {
        assert_eq!(off % align_of::<T>(), 0);
        // SAFETY: `at` checked the bounds, the line above the alignment; volatile since it is shared.
        unsafe { self.at::<T>(off).write_volatile(v) }
    }

    pub(crate) fn read<T: Pod>(&self, off: usize) -> T {
        assert_eq!(off % align_of::<T>(), 0);
        // SAFETY: as in `write`; any bytes are a valid `Pod`.
        unsafe { self.at::<T>(off).read_volatile() }
    }

    pub(crate) fn atomic(&self, off: usize) -> &AtomicU16 {
        assert_eq!(off % 2, 0);
        // SAFETY: bounds and alignment are checked; the mapping outlives the borrow of `self`.
        unsafe { AtomicU16::from_ptr(self.at(off)) }
    }

    /// A buffer as plain bytes. The caller must know that the device is not using it now, and must
    /// be the only one on this side to use it: buffers belong to a slot, slots to one thread.
    #[allow(clippy::mut_from_ref)]
    pub(crate) fn bytes(&self, off: usize, len: usize) -> &mut [u8] {
        assert!(off + len <= self.len);
        // SAFETY: inside the mapping; not aliased as long as the caller keeps to the rule above.
        // A device that breaks the rule can only change bytes, which are valid whatever they are.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(off), len) }
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no reference into it outlives `self`.
        unsafe { libc::munmap(self.ptr.cast(), self.len) };
    }
}
