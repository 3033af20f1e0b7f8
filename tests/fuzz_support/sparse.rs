//! A file in memory whose holes cost nothing, and an engine without threads: a case is the same each time.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use vdblk::io::{
    Alignment, BufSlice, Completion, FileTraits, Full, HostFile, IoEngine, IoKind, IoOp, Tag, gather,
    scatter, sub_slices, total_len,
};
use vdblk::map::FileId;

const PAGE: u64 = 4096;
const HOLE_SEARCH: u64 = 256;

#[derive(Debug, Default)]
struct Contents {
    len: u64,
    /// Pages that are not here are zeros.
    pages: BTreeMap<u64, Box<[u8; PAGE as usize]>>,
}

impl Contents {
    fn zero(&mut self, off: u64, len: u64) {
        let end = off.saturating_add(len);
        let there: Vec<u64> =
            self.pages.range(off / PAGE..).map(|(p, _)| *p).take_while(|p| p * PAGE < end).collect();
        for page in there {
            let (from, to) = (off.max(page * PAGE) - page * PAGE, end.min((page + 1) * PAGE) - page * PAGE);
            if to - from == PAGE {
                self.pages.remove(&page);
            } else {
                self.pages.get_mut(&page).unwrap()[from as usize..to as usize].fill(0);
            }
        }
    }

    fn write(&mut self, off: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let (page, into) = ((off + at as u64) / PAGE, ((off + at as u64) % PAGE) as usize);
            let n = (PAGE as usize - into).min(bytes.len() - at);
            let new = &bytes[at..at + n];
            if self.pages.contains_key(&page) || new.iter().any(|b| *b != 0) {
                let there = self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE as usize]));
                there[into..into + n].copy_from_slice(new);
            }
            at += n;
        }
        self.len = self.len.max(off + bytes.len() as u64);
    }

    fn read(&self, off: u64, out: &mut [u8]) -> usize {
        let n = usize::try_from(self.len.saturating_sub(off)).unwrap_or(usize::MAX).min(out.len());
        let mut at = 0;
        while at < n {
            let (page, into) = ((off + at as u64) / PAGE, ((off + at as u64) % PAGE) as usize);
            let len = (PAGE as usize - into).min(n - at);
            match self.pages.get(&page) {
                Some(p) => out[at..at + len].copy_from_slice(&p[into..into + len]),
                None => out[at..at + len].fill(0),
            }
            at += len;
        }
        n
    }

    fn next_data(&self, off: u64) -> Option<u64> {
        let page = *self.pages.range(off / PAGE..).next()?.0;
        Some((page * PAGE).max(off)).filter(|at| *at < self.len)
    }

    /// Looks [`HOLE_SEARCH`] pages ahead and calls what comes then a hole: a search through all of a file each time would
    /// cost more than the file's user.
    fn next_hole(&self, off: u64) -> u64 {
        let first = off / PAGE;
        let data = (first..first + HOLE_SEARCH).take_while(|p| self.pages.contains_key(p)).count() as u64;
        ((first + data) * PAGE).max(off).min(self.len.max(off))
    }
}

/// The file.
#[derive(Debug)]
pub(crate) struct SparseFile {
    contents: Mutex<Contents>,
    name: &'static str,
}

impl SparseFile {
    pub(crate) fn new(name: &'static str, bytes: &[u8]) -> Arc<Self> {
        let mut contents = Contents::default();
        contents.write(0, bytes);
        Arc::new(SparseFile { contents: Mutex::new(contents), name })
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap()
    }

    pub(crate) fn zero(&self, off: u64, len: u64) {
        let mut c = self.lock();
        let end = off.saturating_add(len).min(c.len);
        c.zero(off, end.saturating_sub(off));
    }
}

fn too_large(end: Option<u64>) -> io::Result<u64> {
    let large = || io::Error::from_raw_os_error(libc::EFBIG);
    end.filter(|e| i64::try_from(*e).is_ok()).ok_or_else(large)
}

impl HostFile for SparseFile {
    fn path(&self) -> &Path {
        Path::new(self.name)
    }

    fn traits(&self) -> FileTraits {
        let identity = (0, std::ptr::from_ref(self) as usize as u64);
        FileTraits { writable: true, direct: false, alignment: Alignment::NONE, is_device: false, identity }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().len)
    }

    fn read_at(&self, off: u64, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.lock().read(off, buf))
    }

    fn write_at(&self, off: u64, buf: &[u8]) -> io::Result<()> {
        too_large(off.checked_add(buf.len() as u64))?;
        self.lock().write(off, buf);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        too_large(Some(len))?;
        let mut c = self.lock();
        c.zero(len, u64::MAX - len);
        c.len = len;
        Ok(())
    }

    fn allocate(&self, off: u64, len: u64) -> io::Result<()> {
        let end = too_large(off.checked_add(len))?;
        let mut c = self.lock();
        c.len = c.len.max(end);
        Ok(())
    }

    fn punch(&self, off: u64, len: u64) -> io::Result<()> {
        self.lock().zero(off, len);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, off: u64) -> io::Result<Option<u64>> {
        Ok(self.lock().next_data(off))
    }

    fn next_hole(&self, off: u64) -> io::Result<u64> {
        Ok(self.lock().next_hole(off))
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.lock().pages.len() as u64 * PAGE)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Every other read or write ends at once; the rest when it is asked for, last first. Long ones take two turns.
#[derive(Debug, Default)]
pub(crate) struct SteadyEngine {
    files: HashMap<FileId, Arc<SparseFile>>,
    known: Vec<Arc<SparseFile>>,
    queue: Vec<(IoOp, Vec<BufSlice>, Tag)>,
    asked: u64,
}

impl SteadyEngine {
    /// An engine for these files.
    pub(crate) fn new(known: Vec<Arc<SparseFile>>) -> Self {
        SteadyEngine { known, ..Self::default() }
    }

    fn run(&self, op: &IoOp, bufs: &[BufSlice]) -> Result<u64, i32> {
        let (file, off) = (&self.files[&op.file], op.off.0);
        let all = total_len(bufs);
        let moved = if all >= 8192 && off.is_multiple_of(1024) { all / 2 / 512 * 512 } else { all };
        let mut part = Vec::new();
        sub_slices(bufs, 0, moved, &mut part);
        let mut bytes = vec![0; usize::try_from(moved).unwrap()];
        let done = match op.kind {
            IoKind::Read => {
                let n = file.lock().read(off, &mut bytes);
                let mut got = Vec::new();
                sub_slices(&part, 0, n as u64, &mut got);
                scatter(&bytes[..n], &got);
                Ok(n as u64)
            }
            IoKind::Write | IoKind::WriteThrough => {
                gather(&part, &mut bytes);
                file.write_at(off, &bytes).map(|()| moved)
            }
            IoKind::Sync => Ok(0),
            IoKind::Allocate => file.allocate(off, op.len).map(|()| 0),
            IoKind::Truncate => file.set_len(off).map(|()| 0),
            IoKind::Punch | IoKind::ZeroRange => {
                file.zero(off, op.len);
                Ok(0)
            }
        };
        done.map_err(|e| e.raw_os_error().unwrap())
    }
}

impl IoEngine for SteadyEngine {
    fn attach(&mut self, id: FileId, file: &Arc<dyn HostFile>) -> io::Result<()> {
        let identity = file.traits().identity;
        let known = self.known.iter().find(|k| k.traits().identity == identity);
        self.files.insert(id, known.expect("one of the case's files").clone());
        Ok(())
    }

    fn try_now(&mut self, op: &IoOp, bufs: &[BufSlice]) -> Option<Result<u64, i32>> {
        self.asked += 1;
        self.asked.is_multiple_of(2).then(|| self.run(op, bufs))
    }

    fn submit(&mut self, op: &IoOp, bufs: &[BufSlice], tag: Tag) -> Result<(), Full> {
        if self.queue.len() >= 16 {
            return Err(Full);
        }
        self.queue.push((*op, bufs.to_vec(), tag));
        Ok(())
    }

    fn enter(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        while let Some((op, bufs, tag)) = self.queue.pop() {
            out.push(Completion { tag, result: self.run(&op, &bufs) });
        }
    }

    fn wait(&mut self, _at_most: Duration) -> io::Result<()> {
        Ok(())
    }

    fn event_fd(&self) -> Option<RawFd> {
        None
    }

    fn in_flight(&self) -> usize {
        self.queue.len()
    }
}
