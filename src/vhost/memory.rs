//! Guest memory: the regions a front-end shares, mapped, as an immutable snapshot.
//!
//! A snapshot with one more region shares the mappings of the former, so a region can be added while requests run. One
//! with a region less can only take effect once no request holds memory of it: see `handler.rs`.

use super::mapping::Mapping;
use crate::io::BufSlice;
use crate::limits;
use crate::virtio::GuestMemory;
use std::cell::Cell;
use std::fs::File;
use std::io;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// What to do about memory that cannot be mapped here.
pub(super) const SHARE_IT: &str = "guest memory has to be shared: share=on of QEMU's memory-backend-memfd or -file, \
                                   shared=on of cloud-hypervisor's --memory";

/// A memory region as a front-end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest-physical address of its first byte.
    pub guest_addr: u64,
    /// Bytes.
    pub len: u64,
    /// Address of its first byte in the front-end's process; ring addresses are given that way.
    pub user_addr: u64,
    /// Where it starts in the file that came with it.
    pub mmap_offset: u64,
}

/// A mapped region.
#[derive(Debug)]
struct Region {
    info: RegionInfo,
    /// What `bytes` and `guest` point into.
    mapping: Mapping,
    bytes: BufSlice,
    guest: Arc<GuestRegionMmap<()>>,
}

/// The guest's memory at one time.
#[derive(Debug, Default)]
pub struct Memory {
    /// By guest address, without overlap.
    regions: Vec<Arc<Region>>,
    /// The same for the crates underneath. Never handed out: its regions do not keep the mappings alive by themselves.
    guest: GuestMemoryMmap<()>,
}

impl Memory {
    /// No memory.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Maps all regions.
    ///
    /// # Errors
    /// A sentence about the region that cannot be taken; so for the following.
    pub fn new(regions: impl IntoIterator<Item = (RegionInfo, File)>) -> io::Result<Self> {
        let mapped = regions.into_iter().map(|(info, file)| Region::map(info, file).map(Arc::new));
        Self::of(mapped.collect::<io::Result<_>>()?)
    }

    fn of(mut regions: Vec<Arc<Region>>) -> io::Result<Self> {
        if regions.len() > limits::MAX_MEM_SLOTS {
            return Err(invalid(format!("more than {} memory regions", limits::MAX_MEM_SLOTS)));
        }
        regions.sort_by_key(|r| r.info.guest_addr);
        let guest = match regions.is_empty() {
            true => GuestMemoryMmap::new(),
            false => {
                GuestMemoryMmap::from_arc_regions(regions.iter().map(|r| Arc::clone(&r.guest)).collect())
                    .map_err(|_| invalid("memory regions overlap".to_string()))?
            }
        };
        Ok(Memory { regions, guest })
    }

    /// A file for the memory of a simulated guest.
    ///
    /// # Errors
    /// From the operating system.
    #[cfg(any(test, feature = "sim"))]
    pub fn file(len: u64) -> io::Result<File> {
        super::shared::SharedFile::create(c"vdblk-guest", len)
    }

    /// This and one more region.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with(&self, info: RegionInfo, file: File) -> io::Result<Self> {
        let mut regions = self.regions.clone();
        regions.push(Arc::new(Region::map(info, file)?));
        Self::of(regions)
    }

    /// This without the region at these addresses and of this length (the offset does not matter).
    ///
    /// # Errors
    /// If there is no such region.
    pub fn without(&self, info: RegionInfo) -> io::Result<Self> {
        let gone = |r: &RegionInfo| {
            (r.guest_addr, r.len, r.user_addr) == (info.guest_addr, info.len, info.user_addr)
        };
        let left: Vec<_> = self.regions.iter().filter(|r| !gone(&r.info)).cloned().collect();
        if left.len() == self.regions.len() {
            return Err(invalid(format!("no memory region at guest address {:#x}", info.guest_addr)));
        }
        Self::of(left)
    }

    /// Regions.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// A part of it was taken away by the front-end, and is zeros now.
    pub(super) fn is_lost(&self) -> bool {
        self.regions.iter().any(|r| r.mapping.is_lost())
    }

    /// True without memory.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// `len` bytes at an address of the front-end's process: where they are here, and their guest address. They lie
    /// in one region.
    pub(super) fn at_user_addr(&self, addr: u64, len: u64) -> Option<(BufSlice, GuestAddress)> {
        self.regions.iter().find_map(|r| {
            let skip = addr.checked_sub(r.info.user_addr)?;
            let end = skip.checked_add(len)?;
            if end > r.info.len {
                return None;
            }
            let gpa = GuestAddress(r.info.guest_addr.checked_add(skip)?);
            Some((r.bytes.part(index(skip), index(len)), gpa))
        })
    }

    /// The guest address of a slice that was resolved in this memory.
    pub(super) fn guest_addr_of(&self, slice: BufSlice) -> Option<u64> {
        let at = slice.as_ptr() as usize;
        self.regions.iter().find_map(|r| {
            let skip = at.checked_sub(r.bytes.as_ptr() as usize)?;
            (skip < r.bytes.len()).then_some(r.info.guest_addr + u64::try_from(skip).ok()?)
        })
    }

    /// For the checks of the crates underneath.
    pub(super) fn guest(&self) -> &GuestMemoryMmap<()> {
        &self.guest
    }

    /// The region that holds a guest address.
    fn find(&self, gpa: u64) -> Option<usize> {
        let i = self.regions.partition_point(|r| r.info.guest_addr <= gpa).checked_sub(1)?;
        (gpa - self.regions[i].info.guest_addr < self.regions[i].info.len).then_some(i)
    }
}

impl Region {
    fn map(info: RegionInfo, file: File) -> io::Result<Self> {
        if [info.guest_addr, info.user_addr].iter().any(|a| a.checked_add(info.len).is_none()) {
            return Err(wraps());
        }
        let mapping = Mapping::new(file, info.mmap_offset, info.len).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidInput => invalid(format!("a memory region {e}")),
            _ => io::Error::other(format!("a memory region {e} ({SHARE_IT})")),
        })?;
        let (bytes, (prot, flags)) = (mapping.bytes(), mapping.mode());
        // SAFETY: `bytes` are mapped that way as long as `mapping`, which `Region` keeps beside this view of it; whoever uses
        // it holds a Memory with this Region.
        let view = unsafe { MmapRegion::build_raw(bytes.as_ptr(), bytes.len(), prot, flags) };
        let view = view.map_err(|e| invalid(e.to_string()))?;
        let guest = GuestRegionMmap::new(view, GuestAddress(info.guest_addr)).ok_or_else(wraps)?;
        Ok(Region { info, mapping, bytes, guest: Arc::new(guest) })
    }
}

fn wraps() -> io::Error {
    invalid("a memory region passes the end of the address space".to_string())
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// A length within a mapping, which by that fits a `usize`.
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// One thread's way into a snapshot: remembers the region it looked at last.
#[derive(Debug)]
pub struct MemoryView {
    memory: Arc<Memory>,
    last: Cell<Window>,
}

/// A region as a view remembers it.
#[derive(Clone, Copy, Debug)]
struct Window {
    guest_addr: u64,
    bytes: Option<BufSlice>,
}

impl Window {
    /// The bytes at `gpa`, from there to its end.
    fn from(self, gpa: u64) -> Option<BufSlice> {
        let (bytes, skip) = (self.bytes?, index(gpa.wrapping_sub(self.guest_addr)));
        (skip < bytes.len()).then(|| bytes.part(skip, usize::MAX))
    }
}

impl MemoryView {
    /// A view of `memory`.
    pub fn new(memory: Arc<Memory>) -> Self {
        MemoryView { memory, last: Cell::new(Window { guest_addr: 0, bytes: None }) }
    }

    /// The snapshot.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The bytes of the region at `gpa`, from there to its end.
    fn from(&self, gpa: u64) -> Option<BufSlice> {
        if let Some(there) = self.last.get().from(gpa) {
            return Some(there);
        }
        let r = &self.memory.regions[self.memory.find(gpa)?];
        let window = Window { guest_addr: r.info.guest_addr, bytes: Some(r.bytes) };
        self.last.set(window);
        window.from(gpa)
    }

    /// See [`GuestMemory::resolve`]; for what may lie in several regions.
    fn resolve_pieces(&self, gpa: u64, len: u32, out: &mut Vec<BufSlice>) -> bool {
        let (mut at, mut left) = (gpa, u64::from(len));
        loop {
            let Some(there) = self.from(at) else { return false };
            let piece = there.part(0, index(left));
            out.push(piece);
            left -= piece.len() as u64;
            if left == 0 {
                return true;
            }
            // regions that lie side by side are one piece of memory to the guest
            match at.checked_add(piece.len() as u64) {
                Some(next) => at = next,
                None => return false,
            }
        }
    }
}

impl GuestMemory for MemoryView {
    #[inline]
    fn resolve(&self, gpa: u64, len: u32, out: &mut Vec<BufSlice>) -> bool {
        // nearly always it is all in the region that was looked at last
        match self.at_hand(gpa, len) {
            Some(all) => out.push(all),
            None => return self.resolve_pieces(gpa, len, out),
        }
        true
    }

    #[inline]
    fn at_hand(&self, gpa: u64, len: u32) -> Option<BufSlice> {
        self.last.get().from(gpa)?.first(index(u64::from(len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn file(len: u64) -> File {
        let f = tempfile::tempfile().unwrap();
        f.set_len(len).unwrap();
        f
    }

    fn info(guest_addr: u64, len: u64, user_addr: u64, mmap_offset: u64) -> RegionInfo {
        RegionInfo { guest_addr, len, user_addr, mmap_offset }
    }

    fn lens(m: &Memory, gpa: u64, len: u32) -> Option<Vec<usize>> {
        let mut out = Vec::new();
        let view = MemoryView::new(Arc::new(Memory::of(m.regions.clone()).unwrap()));
        view.resolve(gpa, len, &mut out).then(|| out.iter().map(|b| b.len()).collect())
    }

    #[test]
    fn offset_regions_show_their_part_of_the_file() {
        let f = file(0x10000);
        f.write_all_at(b"here", 0x3010).unwrap();
        let m =
            Memory::new([(info(0xc4_f000, 0x2000, 0x7000_0000, 0x3000), f.try_clone().unwrap())]).unwrap();
        let (b, gpa) = m.at_user_addr(0x7000_0010, 4).unwrap();
        let mut got = [0; 4];
        b.read(&mut got);
        assert_eq!((&got, gpa.0), (b"here", 0xc4_f010));
        b.write(b"gone");
        f.read_exact_at(&mut got, 0x3010).unwrap();
        assert_eq!(&got, b"gone");
        assert!(m.at_user_addr(0x7000_0010, 0x2000).is_none());
        assert!(m.at_user_addr(0x6fff_ffff, 2).is_none());
    }

    #[test]
    fn buffers_may_cross_neighbouring_regions_only() {
        let m = Memory::new([
            (info(0x4000, 0x1000, 0x9000, 0), file(0x1000)),
            (info(0x3000, 0x1000, 0x1000, 0), file(0x1000)),
            (info(0x8000, 0x1000, 0x2000, 0), file(0x1000)),
        ])
        .unwrap();
        assert_eq!(lens(&m, 0x3f00, 0x200), Some(vec![0x100, 0x100]));
        assert_eq!(lens(&m, 0x3000, 0x2000), Some(vec![0x1000, 0x1000]));
        assert_eq!(lens(&m, 0x8fff, 1), Some(vec![1]));
        for (gpa, len) in
            [(0x3000, 0x2001), (0x2fff, 2), (0x5000, 1), (0x8fff, 2), (u64::MAX, 1), (u64::MAX - 3, 90)]
        {
            assert_eq!(lens(&m, gpa, len), None, "{gpa:#x}+{len}");
        }
    }

    #[test]
    fn slices_know_their_guest_address() {
        let m = Memory::new([
            (info(0x4000, 0x1000, 0x9000, 0), file(0x1000)),
            (info(0x10_0000, 0x2000, 0x1000, 0x1000), file(0x3000)),
        ])
        .unwrap();
        for (user, gpa) in [(0x9000, 0x4000), (0x9fff, 0x4fff), (0x1000, 0x10_0000), (0x2800, 0x10_1800)] {
            let (slice, _) = m.at_user_addr(user, 1).unwrap();
            assert_eq!(m.guest_addr_of(slice), Some(gpa));
            assert_eq!(Memory::empty().guest_addr_of(slice), None);
        }
    }

    #[test]
    fn bad_regions_are_refused() {
        let refused = |i: RegionInfo, len| Memory::new([(i, file(len))]).unwrap_err().to_string();
        assert!(refused(info(0, 0x1000, 0, 0x800), 0x10000).contains("within a page"));
        assert!(refused(info(0, 0x2000, 0, 0), 0x1fff).contains("in a file of"));
        assert!(refused(info(0, 0, 0, 0), 0x1000).contains("empty or passes"));
        assert!(refused(info(u64::MAX - 0xfff, 0x2000, 0, 0), 0x2000).contains("passes"));
        assert!(refused(info(0, 0x2000, u64::MAX - 0xfff, 0), 0x2000).contains("passes"));
        assert!(refused(info(0, 0x1000, 0, !0xfff), 0x1000).contains("passes"));
        assert!(refused(info(0, 0x1000, 0, i64::MAX as u64 & !0xfff), 0x1000).contains("passes"));
        let two = [(info(0, 0x2000, 0, 0), file(0x2000)), (info(0x1000, 0x1000, 0x5000, 0), file(0x1000))];
        assert!(Memory::new(two).unwrap_err().to_string().contains("overlap"));
        let (_, pipe) = io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
        assert!(Memory::new([(info(0, 0x1000, 0, 0), pipe)]).unwrap_err().to_string().contains("not a file"));
        let many = (0..510).map(|i| (info(i * 0x1000, 0x1000, i * 0x1000, 0), file(0x1000)));
        assert!(Memory::new(many).unwrap_err().to_string().contains("more than 509"));
    }

    #[test]
    fn snapshots_share_what_they_have_in_common() {
        let a = Memory::new([(info(0, 0x1000, 0, 0), file(0x1000))]).unwrap();
        let b = a.with(info(0x1000, 0x1000, 0x1000, 0), file(0x1000)).unwrap();
        assert_eq!((a.len(), b.len()), (1, 2));
        assert_eq!(a.regions[0].bytes.as_ptr(), b.regions[0].bytes.as_ptr());
        assert!(b.with(info(0x800, 0x1000, 0, 0), file(0x1000)).is_err());
        assert!(b.without(info(0x1000, 0x800, 0x1000, 0)).is_err());
        let c = b.without(info(0, 0x1000, 0, 0)).unwrap();
        assert_eq!(lens(&c, 0, 1), None);
        assert!(c.without(info(0x1000, 0x1000, 0x1000, 0)).unwrap().is_empty());
    }
}
