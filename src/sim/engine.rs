//! The third engine: one thread, a seed. Operations happen and end in any order, at any time, inline or not, whole or
//! in parts, well or as the plan of faults says.

use super::cut::Change;
use super::fault::{Failing, Faults};
use super::life::Life;
use super::{Rng, SimFile, Trace};
use crate::io::{
    BufSlice, Completion, Full, HostFile, IoEngine, IoKind, IoOp, Tag, gather, scatter, sub_slices, total_len,
};
use crate::map::FileId;
use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

struct Queued {
    io: IoOp,
    bufs: Vec<BufSlice>,
    tag: Tag,
    state: State,
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A change that has not happened yet: its number at the file.
    Flying(u64),
    /// A sync, and what it covers.
    Sync(u64),
    /// Nothing has happened yet, and nothing will before it ends.
    Waiting,
    /// It has happened and nobody knows.
    Landed(Result<u64, i32>),
}

/// The engine.
pub struct SimEngine {
    known: Vec<Arc<SimFile>>,
    files: HashMap<FileId, Attached>,
    queue: Vec<Queued>,
    entered: usize,
    rng: Rng,
    faults: Faults,
    trace: Trace,
    /// Once its process is dead everything ends, nothing happens, no memory is touched.
    life: Option<Arc<Life>>,
    /// How many of a hundred reads and writes end inside [`IoEngine::try_now`].
    pub inline_percent: u64,
    /// How many of a hundred are cut short.
    pub short_percent: u64,
    /// Operations taken at once.
    pub depth: usize,
}

impl std::fmt::Debug for SimEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimEngine").field("in_flight", &self.queue.len()).finish_non_exhaustive()
    }
}

#[derive(Clone)]
enum Attached {
    Sim(Arc<SimFile>),
    /// Any other file: durable at once.
    Plain(Arc<dyn HostFile>),
}

impl SimEngine {
    /// An engine whose choices follow `seed`, for files that are never cut off.
    pub fn new(seed: u64) -> Self {
        SimEngine {
            known: Vec::new(),
            files: HashMap::new(),
            queue: Vec::new(),
            entered: 0,
            rng: Rng(seed),
            faults: Faults::default(),
            trace: Trace::default(),
            life: None,
            inline_percent: 30,
            short_percent: 5,
            depth: 32,
        }
    }

    /// An engine with habits of its own for these files.
    pub fn over(known: &[Arc<SimFile>], faults: &Faults, trace: &Trace, seed: u64) -> Self {
        let mut rng = Rng(seed);
        let (depth, inline_percent) = (1 + rng.index(20), rng.below(101));
        let (known, faults, trace) = (known.to_vec(), faults.clone(), trace.clone());
        SimEngine { known, faults, trace, rng, inline_percent, depth, ..SimEngine::new(0) }
    }

    /// It belongs to this process.
    pub(super) fn belong_to(&mut self, life: &Arc<Life>) {
        self.life = Some(life.clone());
    }

    fn is_dead(&self) -> bool {
        self.life.as_ref().is_some_and(|l| l.is_dead())
    }

    /// An operation is about to happen; true: it will not, for the process is dead.
    fn is_killed(&self) -> bool {
        self.life.as_ref().is_some_and(|l| l.event())
    }

    fn file(&self, id: FileId) -> &Attached {
        self.files.get(&id).expect("an attached file")
    }

    /// How much a read or write moves this time.
    fn moved(&mut self, bufs: &[BufSlice], fault: Option<Failing>) -> u64 {
        let all = total_len(bufs);
        let short = fault == Some(Failing::Short) || self.rng.chance(self.short_percent);
        if short && all >= 1024 { all / 2 / 512 * 512 } else { all }
    }

    /// What an operation changes, its bytes included: guests do not change their buffers meanwhile.
    fn change_of(io: &IoOp, bufs: &[BufSlice]) -> Option<Change> {
        Some(match io.kind {
            IoKind::Read | IoKind::Sync => return None,
            IoKind::Write | IoKind::WriteThrough => SimFile::write_of(io.off.0, bytes_of(bufs)),
            IoKind::Allocate => Change::Allocate { size: io.off.0 + io.len },
            IoKind::Truncate => Change::Length { size: io.off.0 },
            IoKind::Punch | IoKind::ZeroRange => Change::Zero { off: io.off.0, len: io.len },
        })
    }

    fn read(&self, io: &IoOp, bufs: &[BufSlice], moved: u64) -> Result<u64, i32> {
        let file: &dyn HostFile = match self.file(io.file) {
            Attached::Sim(f) => &**f,
            Attached::Plain(f) => &**f,
        };
        let mut bytes = vec![0; usize::try_from(moved).expect("fits memory")];
        let n = file.read_at(io.off.0, &mut bytes).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
        let mut part = Vec::new();
        sub_slices(bufs, 0, n as u64, &mut part);
        scatter(&bytes[..n], &part);
        Ok(n as u64)
    }

    fn run_plain(file: &dyn HostFile, io: &IoOp, bufs: &[BufSlice], moved: u64) -> Result<u64, i32> {
        let off = io.off.0;
        let bytes = |n| bytes_of(bufs)[..n].to_vec();
        let done = match io.kind {
            IoKind::Read => unreachable!("reads are served from both sorts"),
            IoKind::Write | IoKind::WriteThrough => {
                file.write_at(off, &bytes(usize::try_from(moved).expect("fits memory"))).map(|()| moved)
            }
            IoKind::Sync => file.sync().map(|()| 0),
            IoKind::Allocate => file.allocate(off, io.len).map(|()| 0),
            IoKind::Truncate => file.set_len(off).map(|()| 0),
            IoKind::Punch | IoKind::ZeroRange => zero(file, off, io.len),
        };
        done.map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
    }

    /// Lets an operation happen, unless it has.
    fn land(&mut self, i: usize) -> Result<u64, i32> {
        let (io, bufs, state) = (self.queue[i].io, self.queue[i].bufs.clone(), self.queue[i].state);
        let file = self.file(io.file).clone();
        let result = match (state, file) {
            (State::Landed(result), _) => return result,
            (State::Sync(mark), Attached::Sim(f)) => {
                f.persist(mark);
                Ok(0)
            }
            (State::Flying(flight), Attached::Sim(f)) => {
                let moved = self.moved(&bufs, None);
                let moved = if io.kind.writes_bytes() { moved } else { 0 };
                match io.kind {
                    IoKind::WriteThrough => f.land_through(flight, moved as usize),
                    kind => f.land(flight, (kind == IoKind::Write).then_some(moved as usize)),
                }
                Ok(moved)
            }
            (_, file) => {
                let moved = self.moved(&bufs, None);
                match file {
                    Attached::Plain(f) if io.kind != IoKind::Read => Self::run_plain(&*f, &io, &bufs, moved),
                    _ => self.read(&io, &bufs, moved),
                }
            }
        };
        self.trace.io("", &io, result);
        self.queue[i].state = State::Landed(result);
        result
    }

    /// What the plan of faults makes of an operation that is submitted.
    fn failing(&mut self, io: &IoOp, bufs: &[BufSlice], how: Failing) -> Option<Result<u64, i32>> {
        let Attached::Sim(f) = self.file(io.file).clone() else { return Some(Err(libc::EIO)) };
        let result = match how {
            Failing::Interrupted => Err(libc::EINTR),
            Failing::Error(e) => Err(e),
            Failing::ErrorAfterEffect(e) => {
                if io.kind.writes_bytes()
                    && let Some(change) = Self::change_of(io, bufs)
                {
                    f.change(change);
                }
                Err(e)
            }
            Failing::Short if io.kind == IoKind::Read => {
                let moved = self.moved(bufs, Some(how));
                self.read(io, bufs, moved)
            }
            Failing::Short if io.kind.writes_bytes() => {
                let moved = self.moved(bufs, Some(how));
                let bytes = bytes_of(bufs)[..moved as usize].to_vec();
                f.change(match io.kind {
                    IoKind::WriteThrough => Change::Through { off: io.off.0, bytes: bytes.into() },
                    _ => SimFile::write_of(io.off.0, bytes),
                });
                Ok(moved)
            }
            Failing::Short => return None,
        };
        if matches!(io.kind, IoKind::Sync | IoKind::WriteThrough)
            && matches!(how, Failing::Error(_) | Failing::ErrorAfterEffect(_))
        {
            f.sync_failed(f.mark(), &mut self.rng);
        }
        self.trace.io("fault ", io, result);
        Some(result)
    }
}

fn bytes_of(bufs: &[BufSlice]) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(total_len(bufs)).expect("fits memory")];
    gather(bufs, &mut bytes);
    bytes
}

fn zero(file: &dyn HostFile, off: u64, len: u64) -> io::Result<u64> {
    let end = file.len()?.min(off.saturating_add(len));
    if off < end {
        file.write_at(off, &vec![0; usize::try_from(end - off).expect("fits memory")])?;
    }
    Ok(0)
}

impl IoEngine for SimEngine {
    fn attach(&mut self, id: FileId, file: &Arc<dyn HostFile>) -> io::Result<()> {
        let identity = file.traits().identity;
        let known = self.known.iter().find(|f| f.traits().identity == identity);
        let attached = match known {
            Some(f) => Attached::Sim(f.clone()),
            None => Attached::Plain(file.clone()),
        };
        self.files.insert(id, attached);
        Ok(())
    }

    fn try_now(&mut self, op: &IoOp, bufs: &[BufSlice]) -> Option<Result<u64, i32>> {
        if self.is_dead() || !self.rng.chance(self.inline_percent) || self.is_killed() {
            return None;
        }
        if let Some(how) = self.faults.hit(op, true)
            && let Some(result) = self.failing(op, bufs, how)
        {
            return Some(result);
        }
        let moved = self.moved(bufs, None);
        let result = match (op.kind, self.file(op.file).clone()) {
            (IoKind::Read, _) => self.read(op, bufs, moved),
            (_, Attached::Sim(f)) => {
                f.change(SimFile::write_of(op.off.0, bytes_of(bufs)[..moved as usize].to_vec()));
                Ok(moved)
            }
            (_, Attached::Plain(f)) => Self::run_plain(&*f, op, bufs, moved),
        };
        self.trace.io("now ", op, result);
        Some(result)
    }

    fn submit(&mut self, op: &IoOp, bufs: &[BufSlice], tag: Tag) -> Result<(), Full> {
        if self.queue.len() >= self.depth {
            return Err(Full);
        }
        if self.is_killed() {
            self.queue.push(Queued { io: *op, bufs: Vec::new(), tag, state: State::Landed(Err(libc::EIO)) });
            return Ok(());
        }
        let failed = self.faults.hit(op, false).and_then(|how| self.failing(op, bufs, how));
        let state = match (failed, self.file(op.file), Self::change_of(op, bufs)) {
            (Some(result), ..) => State::Landed(result),
            (None, Attached::Sim(f), Some(change)) => State::Flying(f.fly(change)),
            (None, Attached::Sim(f), None) if op.kind == IoKind::Sync => State::Sync(f.mark()),
            _ => State::Waiting,
        };
        self.queue.push(Queued { io: *op, bufs: bufs.to_vec(), tag, state });
        Ok(())
    }

    fn enter(&mut self) -> io::Result<()> {
        self.entered = self.queue.len();
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        if self.is_dead() {
            self.entered = 0;
            out.extend(self.queue.drain(..).map(|q| Completion { tag: q.tag, result: Err(libc::EIO) }));
            return;
        }
        // Some happen now and are reported later.
        for i in 0..self.entered {
            if matches!(self.queue[i].state, State::Flying(_)) && self.rng.chance(20) && !self.is_killed() {
                let _ = self.land(i);
            }
        }
        let n = self.rng.index(self.entered + 1);
        for _ in 0..n {
            let i = self.rng.index(self.entered);
            if self.is_killed() {
                return;
            }
            let result = self.land(i);
            let q = self.queue.remove(i);
            self.entered -= 1;
            out.push(Completion { tag: q.tag, result });
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
