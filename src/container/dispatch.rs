//! Requests that end later: a thread with a channel of its own takes them by priority, and calls back.
//!
//! The list of those that wait outlives the disk: while the chain changes nothing is taken from it, and what is under way ends before.

use crate::error::{Error, ErrorKind, Result, Status};
use crate::io::{BufSlice, HostFile, scatter};
use crate::job::open_channel;
use crate::map::{ExtentKind, GuestOffset, GuestRange};
use crate::vd::{BlockDevice, Channel, Disk, Done, Outcome, Request};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Requests under way at a time.
const SLOTS: u16 = 32;
/// Longest sleep, in milliseconds.
const WAIT_MS: i32 = 1000;

/// A part of a request.
#[derive(Debug)]
pub(super) enum Part {
    /// What a channel does.
    Io(Request, Vec<BufSlice>),
    /// Reads bytes of an image's file that the disk does not show, or not in whole sectors: they begin so far from what it shows at a place.
    Around { at: GuestOffset, from: i64, bufs: Vec<BufSlice> },
}

/// A request: its parts, one after the other, and who hears of its end.
pub(super) struct Task {
    pub(super) parts: VecDeque<Part>,
    pub(super) done: Box<dyn FnOnce(Result<()>) + Send>,
}

/// The place of a request in the order: priority, 0 the highest, then the order of coming.
pub(super) type Key = (u32, u64);

/// Where the disk is.
enum Phase {
    /// Nothing is open: requests fail.
    Closed,
    /// The chain is being changed: requests wait.
    Changing,
    Open(Arc<Disk>),
}

struct State {
    phase: Phase,
    waiting: BTreeMap<Key, Task>,
    next: u64,
    thread: Option<JoinHandle<()>>,
}

pub(super) struct Dispatcher {
    state: Mutex<State>,
    wake: EventFd,
}

impl std::fmt::Debug for Dispatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let s = self.lock();
        f.debug_struct("Dispatcher").field("waiting", &s.waiting.len()).finish()
    }
}

impl Dispatcher {
    pub(super) fn new() -> Arc<Dispatcher> {
        let state = State { phase: Phase::Closed, waiting: BTreeMap::new(), next: 0, thread: None };
        Arc::new(Dispatcher {
            state: Mutex::new(state),
            wake: EventFd::new(EFD_NONBLOCK).expect("a descriptor for a container"),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("dispatcher lock")
    }

    /// A place behind all others of this priority.
    pub(super) fn key(&self, priority: u32) -> Key {
        let mut s = self.lock();
        s.next += 1;
        (priority, s.next)
    }

    /// Queues a request.
    ///
    /// # Errors
    /// [`Status::NotOpened`] without a disk; if there is no engine. Then nobody is told of its end.
    pub(super) fn submit(self: &Arc<Self>, key: Key, task: Task) -> Result<()> {
        let mut s = self.lock();
        if matches!(s.phase, Phase::Closed) {
            return Err(not_opened());
        }
        s.waiting.insert(key, task);
        let started = self.start_thread(&mut s);
        if started.is_err() {
            s.waiting.remove(&key);
        }
        drop(s);
        let _ = self.wake.write(1);
        started
    }

    /// Takes a request back that has not begun.
    pub(super) fn take_back(&self, key: Key) -> Option<Task> {
        self.lock().waiting.remove(&key)
    }

    /// The disk is there: what waits goes on.
    pub(super) fn open(self: &Arc<Self>, disk: Arc<Disk>) -> Result<()> {
        let mut s = self.lock();
        s.phase = Phase::Open(disk);
        if s.waiting.is_empty() { Ok(()) } else { self.start_thread(&mut s) }
    }

    /// Lets what is under way end, and keeps the rest.
    pub(super) fn pause(&self) {
        self.lock().phase = Phase::Changing;
        let _ = self.wake.write(1);
        let thread = self.lock().thread.take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the thread of a container's requests has panicked");
        }
    }

    /// Nothing is open any more: what waits has failed.
    pub(super) fn close(&self) {
        let waiting = {
            let mut s = self.lock();
            s.phase = Phase::Closed;
            std::mem::take(&mut s.waiting)
        };
        waiting.into_values().for_each(|task| (task.done)(Err(not_opened())));
    }

    fn start_thread(self: &Arc<Self>, s: &mut State) -> Result<()> {
        let Phase::Open(disk) = &s.phase else { return Ok(()) };
        if s.thread.is_some() {
            return Ok(());
        }
        let channel = open_channel(disk, SLOTS)?;
        let (me, disk) = (self.clone(), disk.clone());
        let thread = std::thread::Builder::new()
            .name("container".into())
            .spawn(move || Worker::new(me, disk).run(channel))
            .map_err(|e| Error::io("start a thread", e))?;
        s.thread = Some(thread);
        Ok(())
    }
}

fn not_opened() -> Error {
    Error::of(Status::NotOpened, "no image is open in the container")
}

/// The thread's own.
struct Worker {
    shared: Arc<Dispatcher>,
    disk: Arc<Disk>,
    slots: Vec<Option<Task>>,
}

impl Worker {
    fn new(shared: Arc<Dispatcher>, disk: Arc<Disk>) -> Worker {
        Worker { shared, disk, slots: (0..SLOTS).map(|_| None).collect() }
    }

    /// Serves requests until the chain changes and none is under way. The channel goes before the requests' memory.
    fn run(mut self, mut channel: Channel) {
        let Ok(epoll) = self.watch(&channel) else {
            tracing::error!("a container's requests cannot be waited for");
            return self.shared.close();
        };
        let mut done: Vec<Done> = Vec::new();
        loop {
            let more = self.take_some(&mut channel);
            if let Err(e) = channel.flush_queue() {
                tracing::debug!("cannot hand I/O to the kernel: {e}");
            }
            channel.poll(&mut done);
            let moved = !done.is_empty();
            for d in done.drain(..) {
                self.part_ended(&mut channel, d.slot, d.outcome);
            }
            if !more && self.slots.iter().all(Option::is_none) && channel.is_idle() {
                return;
            }
            if !moved {
                let _ = epoll.wait(WAIT_MS, &mut [EpollEvent::default(); 4]);
                let _ = self.shared.wake.read();
            }
        }
    }

    fn watch(&self, channel: &Channel) -> std::io::Result<Epoll> {
        use std::os::fd::AsRawFd;
        let epoll = Epoll::new()?;
        for fd in channel.event_fds().into_iter().chain([self.shared.wake.as_raw_fd()]) {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(epoll)
    }

    /// Begins what waits, as far as there is room. False: the chain changes, and nothing more is taken.
    fn take_some(&mut self, channel: &mut Channel) -> bool {
        while let Some(slot) = self.slots.iter().position(Option::is_none) {
            let mut s = self.shared.lock();
            if !matches!(s.phase, Phase::Open(_)) {
                return false;
            }
            let Some((_, task)) = s.waiting.pop_first() else { break };
            drop(s);
            self.slots[slot] = Some(task);
            self.advance(channel, u16::try_from(slot).expect("few slots"));
        }
        true
    }

    /// On with the next part, and those behind it that end at once.
    fn advance(&mut self, channel: &mut Channel, slot: u16) {
        loop {
            let task = self.slots[usize::from(slot)].as_mut().expect("a request in its slot");
            let ended = match task.parts.pop_front() {
                None => return self.finish(slot, Ok(())),
                Some(Part::Io(request, bufs)) => match channel.submit(slot, request, &bufs) {
                    None => return,
                    Some(outcome) => outcome.map_err(Error::from),
                },
                Some(Part::Around { at, from, bufs }) => read_around(&self.disk, at, from, &bufs),
            };
            if let Err(e) = ended {
                return self.finish(slot, Err(e));
            }
        }
    }

    fn part_ended(&mut self, channel: &mut Channel, slot: u16, outcome: Outcome) {
        match outcome {
            Ok(()) => self.advance(channel, slot),
            Err(f) => self.finish(slot, Err(f.into())),
        }
    }

    fn finish(&mut self, slot: u16, result: Result<()>) {
        let task = self.slots[usize::from(slot)].take().expect("a request in its slot");
        (task.done)(result);
    }
}

/// Reads from an image's file what lies around, or at, what the disk shows at a place.
fn read_around(disk: &Disk, at: GuestOffset, from: i64, bufs: &[BufSlice]) -> Result<()> {
    let corrupt = || Error::new(ErrorKind::OutOfRange, format!("no file has what lies around {at}"));
    let whole = GuestRange::new(at, 1).ok_or_else(corrupt)?;
    let extent = disk.chain().look(whole).map_err(|_| corrupt())?;
    let ExtentKind::Data { file, off } = extent.kind else { return Err(corrupt()) };
    let file: &Arc<dyn HostFile> = disk.host_file(file);
    let from = off.0.checked_add_signed(from).ok_or_else(corrupt)?;
    let len = bufs.iter().map(|b| b.len()).sum();
    let mut bytes = vec![0; len];
    let got = file.read_at(from, &mut bytes).map_err(|e| Error::io("read it", e).at(file.path()))?;
    if got < len {
        return Err(Error::new(ErrorKind::Corrupt, "is shorter than its sheet says").at(file.path()));
    }
    scatter(&bytes, bufs);
    Ok(())
}
