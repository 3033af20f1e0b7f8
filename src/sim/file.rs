//! A simulated file: what every process sees, what is durable, and what has changed in between.

use super::bytes::Bytes;
use super::cut::{Change, Cut, apply_whole};
use super::{DmLog, Rng};
use crate::io::{Alignment, FileTraits, HostFile};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

impl Landing {
    /// All of them.
    pub const EACH: [Landing; 3] = [Landing::None, Landing::All, Landing::Chance];
}

/// A file with a page cache that can be lost.
#[derive(Debug)]
pub struct SimFile {
    contents: Mutex<Contents>,
    name: PathBuf,
    alignment: Alignment,
    /// Nobody may change it.
    sealed: bool,
    /// Of an image's first file: its others.
    further: Vec<Arc<SimFile>>,
    /// The file of another image, written at the same time: its power goes at the same moments.
    above: Option<Arc<SimFile>>,
    /// Of the others: the first.
    first: Weak<SimFile>,
}

#[derive(Debug, Default)]
struct Contents {
    durable: Bytes,
    now: Bytes,
    /// Changes since; those that a failed sync has dropped are `None`.
    log: Vec<Option<Change>>,
    /// Number of the first change in `log`.
    first: u64,
    /// Operations that were submitted and have not landed: they may, at any moment.
    flying: BTreeMap<u64, Change>,
    next_flight: u64,
    /// Moments before a sync ended, if they are wanted.
    cuts: Option<Vec<Cut>>,
    fail_direct_syncs: bool,
    fallocate_error: Option<i32>,
    dm_log: Option<DmLog>,
    data_writes: u64,
    /// The process that changes it is dead, and no other has it yet.
    frozen: bool,
    /// Somebody has tried to change it although it is sealed.
    touched: bool,
}

/// What becomes of the operations of a killed process: all before another may open the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    /// Nothing.
    None,
    /// They happen.
    All,
    /// In any order each happens, or not, or a write in part.
    Chance,
}

/// Where the data of a small VDI begins, for [`SimFile::data_writes`].
pub const DATA: u64 = 2 << 20;

impl SimFile {
    /// A file whose bytes are durable, and the others of its image where there are some.
    pub fn new(name: impl Into<PathBuf>, bytes: Bytes) -> Arc<SimFile> {
        let (name, (bytes, others)) = (name.into(), bytes.apart());
        Arc::new_cyclic(|first| {
            let part = |b| Arc::new(SimFile { first: first.clone(), ..Self::holding(name.clone(), b) });
            SimFile { further: others.into_iter().map(part).collect(), ..Self::holding(name.clone(), bytes) }
        })
    }

    /// The same, of one file, with the empty file of an image that will be put above it.
    pub(super) fn with_above(
        name: impl Into<PathBuf>,
        bytes: Bytes,
        above: &str,
    ) -> (Arc<SimFile>, Arc<SimFile>) {
        let top = Arc::new_cyclic(|first| {
            let above = SimFile { first: first.clone(), ..Self::holding(above.into(), Bytes::default()) };
            SimFile { above: Some(Arc::new(above)), ..Self::holding(name.into(), bytes) }
        });
        let above = top.above.clone().expect("just made");
        (top, above)
    }

    /// All that lose power with it.
    fn others(&self) -> impl Iterator<Item = &Arc<SimFile>> {
        self.further.iter().chain(&self.above)
    }

    fn holding(name: PathBuf, bytes: Bytes) -> SimFile {
        let contents = Contents { durable: bytes.clone(), now: bytes, ..Contents::default() };
        let (contents, alignment) = (Mutex::new(contents), Alignment::NONE);
        SimFile {
            contents,
            name,
            alignment,
            sealed: false,
            further: Vec::new(),
            above: None,
            first: Weak::new(),
        }
    }

    /// All files of the image of which this is the first.
    pub(super) fn all(self: &Arc<Self>) -> Vec<Arc<SimFile>> {
        std::iter::once(self).chain(&self.further).cloned().collect()
    }

    /// A file that nobody may change.
    pub fn sealed(name: impl Into<PathBuf>, bytes: Bytes) -> Arc<SimFile> {
        Arc::new(SimFile { sealed: true, ..Self::holding(name.into(), bytes) })
    }

    /// Somebody has tried to change a sealed file.
    pub fn was_touched(&self) -> bool {
        self.lock().touched
    }

    /// See [`Self::with_above`].
    pub(super) fn above(&self) -> Option<&Arc<SimFile>> {
        self.above.as_ref()
    }

    /// The process that changes it is dead: nothing changes until [`Self::kill`].
    pub(super) fn freeze(&self) {
        self.lock().frozen = true;
        self.others().for_each(|f| f.freeze());
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().expect("simulated file lock")
    }

    /// What every process sees.
    pub fn bytes(&self) -> Bytes {
        let further = self.further.iter().map(|f| f.bytes()).collect();
        self.lock().now.clone().with(further)
    }

    /// From now on the moments before each end of a sync are kept for [`Self::take_cuts`].
    pub fn keep_cuts(&self) {
        self.lock().cuts = Some(Vec::new());
    }

    /// The moments since the last call.
    pub fn take_cuts(&self) -> Vec<Cut> {
        self.lock().cuts.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The power goes now.
    pub fn cut_now(&self) -> Cut {
        let further = self.others().map(|f| f.cut_now()).collect();
        self.lock().cut().with(further)
    }

    /// A sync is about to end: a moment at which the power may go, for all files of the image.
    fn keep_cut(&self) {
        let others = self.first.upgrade();
        let first = others.as_deref().unwrap_or(self);
        if first.lock().cuts.is_some() {
            let cut = first.cut_now();
            first.lock().cuts.get_or_insert_default().push(cut);
        }
    }

    /// From now on everything is recorded.
    pub fn record(&self) {
        let c = &mut *self.lock();
        c.dm_log = Some(DmLog::of(&c.now));
    }

    /// Writes a mark into the record, if there is one.
    pub fn mark_record(&self, text: &str) {
        if let Some(log) = &mut self.lock().dm_log {
            log.mark(text);
        }
    }

    /// The record, with a last mark of what the file holds.
    pub fn take_record(&self) -> Option<DmLog> {
        let c = &mut *self.lock();
        let mut log = c.dm_log.take()?;
        log.mark_contents("end", &c.now);
        Some(log)
    }

    /// Syncs that go past the engines fail from now on, or no longer.
    pub fn fail_direct_syncs(&self, fail: bool) {
        self.lock().fail_direct_syncs = fail;
    }

    /// Space can be neither allocated nor given back from now on, by calls that go past the engines. EOPNOTSUPP: the file
    /// system has no fallocate.
    pub fn fail_direct_fallocate(&self, errno: i32) {
        self.lock().fallocate_error = Some(errno);
    }

    fn needs_fallocate(&self) -> io::Result<()> {
        self.lock().fallocate_error.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    /// Writes behind [`DATA`] so far.
    pub fn data_writes(&self) -> u64 {
        self.lock().data_writes
    }

    /// Bytes that this write changes, as a change.
    pub(super) fn write_of(off: u64, bytes: Vec<u8>) -> Change {
        Change::Write { off, bytes: bytes.into(), size: None }
    }

    /// Changes the file as every process sees it.
    pub(super) fn change(&self, change: Change) {
        if matches!(change, Change::Through { .. }) {
            self.keep_cut();
        }
        let c = &mut *self.lock();
        c.touched |= self.sealed;
        if !c.frozen && !self.sealed {
            c.change(change);
        }
    }

    /// An operation was submitted; [`Self::land`] or [`Self::kill`] ends it.
    pub(super) fn fly(&self, change: Change) -> u64 {
        let c = &mut *self.lock();
        c.touched |= self.sealed;
        c.next_flight += 1;
        c.flying.insert(c.next_flight, change);
        c.next_flight
    }

    /// The operation happens, or instead of it a part: `Some(n)` are the first bytes of a write.
    pub(super) fn land(&self, flight: u64, bytes: Option<usize>) {
        let c = &mut *self.lock();
        let change = c.flying.remove(&flight).expect("it flies");
        if self.sealed {
            return;
        }
        c.change(match (change, bytes) {
            (Change::Write { off, bytes, size }, Some(n)) => {
                Change::Write { off, bytes: bytes[..n].into(), size }
            }
            (change, _) => change,
        });
    }

    /// A write through has happened, all of it or the first bytes.
    pub(super) fn land_through(&self, flight: u64, n: usize) {
        self.keep_cut();
        let c = &mut *self.lock();
        let change = c.flying.remove(&flight).expect("it flies");
        let Change::Write { off, bytes, .. } = change else {
            unreachable!("only writes are written through")
        };
        if !self.sealed {
            c.change(Change::Through { off, bytes: bytes[..n].into() });
        }
    }

    /// The process is gone. What becomes of what it had submitted is settled before another gets the lock.
    pub fn kill(&self, how: Landing, rng: &mut Rng) {
        self.others().for_each(|f| f.kill(how, rng));
        let c = &mut *self.lock();
        c.frozen = false;
        let mut flying: Vec<_> = std::mem::take(&mut c.flying).into_values().collect();
        while !flying.is_empty() {
            let change = flying.swap_remove(rng.index(flying.len()));
            match (how, rng.below(5)) {
                (Landing::All, _) | (Landing::Chance, 0 | 1) => c.change(change),
                (Landing::Chance, 2) => c.change(change.begin_of(rng)),
                _ => {}
            }
        }
    }

    /// The power goes and comes back with this left.
    pub fn restart_with(&self, bytes: Bytes) {
        let (bytes, others) = bytes.apart();
        self.further.iter().zip(others).for_each(|(f, b)| f.restart_with(b));
        let c = &mut *self.lock();
        let mut dm_log = c.dm_log.take();
        if let Some(log) = &mut dm_log {
            log.replaced(&c.now, &bytes, "power cut");
        }
        let cuts = c.cuts.take().map(|_| Vec::new());
        let now = bytes.clone();
        *c = Contents { durable: bytes, now, dm_log, cuts, ..Contents::default() };
    }

    /// Everything that has landed before is what a sync submitted now covers.
    pub(super) fn mark(&self) -> u64 {
        let c = self.lock();
        c.first + c.log.len() as u64
    }

    /// A sync of everything before `mark` has ended well.
    pub(super) fn persist(&self, mark: u64) {
        if !self.lock().frozen {
            self.keep_cut();
            self.lock().persist(mark);
        }
    }

    /// It has failed. Of the data it was to write some is durable; the rest will never be, whatever a later sync says,
    /// and is still in the page cache or no longer. Sizes, extents and holes go through the journal, and wait for the
    /// next sync.
    pub(super) fn sync_failed(&self, mark: u64, rng: &mut Rng) {
        self.keep_cut();
        let c = &mut *self.lock();
        let upto = usize::try_from(mark.saturating_sub(c.first)).unwrap_or(0).min(c.log.len());
        for slot in &mut c.log[..upto] {
            if !matches!(slot, Some(Change::Write { .. })) {
                continue;
            }
            let Some(Change::Write { off, bytes, size }) = slot.take() else { unreachable!() };
            if rng.chance(50) {
                c.durable.put(off, &bytes);
            }
            *slot = size.map(|size| Change::Allocate { size });
        }
        if rng.chance(50) {
            let len = c.now.len();
            let before = std::mem::replace(&mut c.now, c.durable.clone());
            for change in c.log.iter().flatten() {
                apply_whole(&mut c.now, change);
            }
            c.now.set_len(len);
            if let Some(log) = &mut c.dm_log {
                log.replaced(&before, &c.now, "sync failed");
            }
        }
    }
}

impl Contents {
    fn change(&mut self, change: Change) {
        let change = match change {
            Change::Write { ref bytes, .. } if bytes.is_empty() => return,
            Change::Write { off, bytes, .. } => {
                self.data_writes += u64::from(off >= DATA);
                let end = off + bytes.len() as u64;
                Change::Write { off, bytes, size: (end > self.now.len()).then_some(end) }
            }
            // Space inside the file changes nothing that can be seen.
            Change::Allocate { size } if size <= self.now.len() => return,
            Change::Zero { off, len } => {
                let len = self.now.len().min(off.saturating_add(len)).saturating_sub(off);
                if len == 0 {
                    return;
                }
                Change::Zero { off, len }
            }
            other => other,
        };
        let before = self.now.len();
        apply_whole(&mut self.now, &change);
        if let Some(log) = &mut self.dm_log {
            log.change(&change, before, &self.now);
        }
        self.log.push(Some(change));
    }

    fn cut(&self) -> Cut {
        let landing = self.flying.values().map(|c| match c {
            Change::Write { off, bytes, .. } => {
                let end = off + bytes.len() as u64;
                let size = (end > self.now.len()).then_some(end);
                Change::Write { off: *off, bytes: bytes.clone(), size }
            }
            other => other.clone(),
        });
        Cut::new(self.durable.clone(), self.log.iter().flatten().cloned().chain(landing))
    }

    fn persist(&mut self, mark: u64) {
        let upto = usize::try_from(mark.saturating_sub(self.first)).unwrap_or(0).min(self.log.len());
        for change in self.log.drain(..upto).flatten() {
            apply_whole(&mut self.durable, &change);
        }
        self.first = self.first.max(mark);
        if let Some(log) = &mut self.dm_log {
            log.flush(&self.now);
        }
    }
}

impl HostFile for SimFile {
    fn path(&self) -> &Path {
        &self.name
    }

    fn traits(&self) -> FileTraits {
        let identity = (1, std::ptr::from_ref(self) as usize as u64);
        let direct = self.alignment != Alignment::NONE;
        FileTraits { writable: !self.sealed, direct, alignment: self.alignment, is_device: false, identity }
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().now.len())
    }

    fn read_at(&self, off: u64, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.lock().now.read(off, buf))
    }

    fn write_at(&self, off: u64, buf: &[u8]) -> io::Result<()> {
        self.change(SimFile::write_of(off, buf.to_vec()));
        Ok(())
    }

    fn set_len(&self, size: u64) -> io::Result<()> {
        self.change(Change::Length { size });
        Ok(())
    }

    fn allocate(&self, off: u64, len: u64) -> io::Result<()> {
        self.needs_fallocate()?;
        self.change(Change::Allocate { size: off + len });
        Ok(())
    }

    fn punch(&self, off: u64, len: u64) -> io::Result<()> {
        self.needs_fallocate()?;
        self.change(Change::Zero { off, len });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.lock().fail_direct_syncs {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.persist(self.mark());
        Ok(())
    }

    fn next_data(&self, off: u64) -> io::Result<Option<u64>> {
        Ok(self.lock().now.next_page(off, true))
    }

    fn next_hole(&self, off: u64) -> io::Result<u64> {
        let c = self.lock();
        Ok(c.now.next_page(off, false).unwrap_or(c.now.len()))
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.lock().now.stored())
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_file_tells_of_every_attempt_to_change_it() {
        let attempts: [fn(&SimFile); 6] = [
            |f| f.write_at(0, &[1]).unwrap(),
            |f| f.set_len(1).unwrap(),
            |f| f.allocate(0, 8192).unwrap(),
            |f| f.punch(0, 512).unwrap(),
            |f| f.change(Change::Zero { off: 0, len: 512 }),
            |f| f.land(f.fly(Change::Zero { off: 0, len: 512 }), None),
        ];
        for attempt in attempts {
            let f = SimFile::sealed("parent", Bytes::of(&[7; 4096]));
            f.sync().unwrap();
            assert!(!f.was_touched() && !f.traits().writable);
            attempt(&f);
            assert!(f.was_touched() && f.bytes().to_vec() == [7; 4096]);
        }
    }

    #[test]
    fn what_a_killed_process_had_under_way_lands_as_it_is_told() {
        let write = || SimFile::write_of(0, vec![1; 1024]);
        for (how, states) in
            [(Landing::None, vec![0]), (Landing::All, vec![2]), (Landing::Chance, vec![0, 1, 2])]
        {
            let mut seen = std::collections::BTreeSet::new();
            for seed in 0..60 {
                let f = SimFile::new("top", Bytes::of(&[0; 1024]));
                f.fly(write());
                f.freeze();
                f.change(write());
                assert!(f.bytes().to_vec() == [0; 1024], "nothing changes while it is frozen");
                f.kill(how, &mut Rng(seed));
                seen.insert(f.bytes().to_vec().chunks(512).filter(|s| s[0] == 1).count());
            }
            assert_eq!(seen.into_iter().collect::<Vec<_>>(), states, "{how:?}");
        }
    }
}
