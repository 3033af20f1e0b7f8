//! The thread around a queue worker: waits for kicks, completions and orders.
//!
//! The control side sends an order and waits for its reply, so that what it tells the front-end is true. Orders are few;
//! requests need neither lock nor allocation nor, while the ring has work, a system call of ours.

use super::memory::Memory;
use super::poller::Poller;
use super::ring::{Ring, RingSetup};
use super::worker::{QueueWorker, RingExtras, WorkerOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::vd::{BlockDevice, Disk};
use epoll::Events;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::event::{EventConsumer, EventNotifier};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Makes a queue's channel to the disk, on the queue's own thread: `make(queue, slots)`.
pub(super) type MakeChannel<D> = dyn Fn(u16, u16) -> Result<D> + Send + Sync;

/// How long to wait where no descriptor tells of the next event, in milliseconds.
const RETRY_MS: i32 = 1;

const BELL: u64 = 0;
const KICK: u64 = 1;
const DEVICE: u64 = 2;

/// A ring to begin with.
pub(super) struct StartRing {
    pub(super) setup: RingSetup,
    /// Without one the ring is looked at every millisecond.
    pub(super) kick: Option<EventConsumer>,
    pub(super) extras: RingExtras,
}

/// What the control side wants of a worker.
pub(super) enum Order {
    /// Serve a ring.
    Start(Box<StartRing>),
    /// Take no more chains; the reply comes when what was taken has ended.
    Stop,
    /// Use this memory. It contains all of the former, or no ring runs.
    Memory(Arc<Memory>),
    /// Another descriptor for kicks.
    Kick(Option<EventConsumer>),
    /// Another descriptor for signals.
    Call(Option<EventNotifier>),
    /// Another descriptor for errors.
    Err(Option<File>),
    /// Whether writes are durable before they complete.
    WriteThrough(bool),
    /// The disk has this size now.
    Size(u64),
    /// Get ready to go over to this disk.
    Prepare(Arc<Disk>),
    /// Take no more chains until as many `Release`; the reply comes when what was taken has ended.
    Hold,
    /// One `Hold` less.
    Release,
    /// Go over to this disk, as prepared; while held.
    MoveTo(Arc<Disk>),
    /// End what is in flight, and the thread.
    End,
}

/// What became of an order.
pub(super) enum Reply {
    Done,
    /// The next index to take from the stopped ring.
    Stopped(u16),
    Refused(String),
}

struct Letter {
    order: Order,
    reply: Sender<Reply>,
}

/// A reply to come.
pub(super) struct Pending(Receiver<Reply>);

impl Pending {
    pub(super) fn wait(self) -> Reply {
        self.0.recv().unwrap_or_else(|_| Self::gone())
    }

    /// The same until then; `None`: there is no reply yet.
    pub(super) fn wait_at_most(self, end: Instant) -> Option<Reply> {
        match self.0.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Self::gone()),
            Ok(reply) => Some(reply),
        }
    }

    fn gone() -> Reply {
        Reply::Refused("the queue's worker has ended".to_string())
    }
}

/// The control side's hold on a worker.
pub(super) struct WorkerHandle {
    letters: Sender<Letter>,
    bell: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    /// Starts a thread and waits until its channel to the disk is made.
    pub(super) fn spawn<D>(options: WorkerOptions, poll_us: u32, make: Arc<MakeChannel<D>>) -> Result<Self>
    where
        D: BlockDevice + 'static,
    {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| Error::io("make an eventfd", e))?;
        let bell = Arc::new(bell);
        let (letters, inbox) = channel();
        let (made, ready) = channel();
        let name = format!("queue {}", options.queue);
        let theirs = Arc::clone(&bell);
        let body = move || {
            let device = match make(options.queue, options.slots) {
                Ok(d) => d,
                Err(e) => return drop(made.send(Err(e))),
            };
            let worker = QueueWorker::new(device, &options);
            match WorkerLoop::new(worker, inbox, theirs, poll_us) {
                Ok(l) => {
                    // the other side waits for exactly this
                    let _ = made.send(Ok(()));
                    l.run();
                }
                Err(e) => drop(made.send(Err(Error::io("prepare a queue's event loop", e)))),
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(body);
        let thread = thread.map_err(|e| Error::io("start a thread", e))?;
        let gone = || Err(Error::new(ErrorKind::Io, "a queue's thread ended at its start"));
        ready.recv().unwrap_or_else(|_| gone())?;
        Ok(WorkerHandle { letters, bell, thread: Some(thread) })
    }

    /// Sends an order; its reply can be waited for.
    pub(super) fn send(&self, order: Order) -> Pending {
        let (reply, pending) = channel();
        // if the thread is gone the reply's sender is dropped with the letter, and `wait` says so
        let _ = self.letters.send(Letter { order, reply });
        self.ring_bell();
        Pending(pending)
    }

    /// Sends an order and waits for its reply.
    pub(super) fn ask(&self, order: Order) -> Reply {
        self.send(order).wait()
    }

    fn ring_bell(&self) {
        // a full counter has woken the thread already
        let _ = self.bell.write(1);
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.send(Order::End);
        if let Some(t) = self.thread.take()
            && t.join().is_err()
        {
            tracing::error!("a queue's thread had panicked");
        }
    }
}

struct WorkerLoop<D> {
    worker: QueueWorker<D>,
    inbox: Receiver<Letter>,
    bell: Arc<EventFd>,
    poller: Poller,
    kick: Option<EventConsumer>,
    /// The ring is looked at by time.
    kickless: bool,
    /// Who waits for the ring to stop.
    stopping: Option<Sender<Reply>>,
    /// Who waits until nothing is in flight while nothing is taken.
    holding: Vec<Sender<Reply>>,
    ending: bool,
    spin: Spin,
}

impl<D: BlockDevice> WorkerLoop<D> {
    fn new(
        worker: QueueWorker<D>,
        inbox: Receiver<Letter>,
        bell: Arc<EventFd>,
        poll_us: u32,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(bell.as_raw_fd(), Events::EPOLLIN, BELL)?;
        for fd in worker.event_fds() {
            poller.add(fd, Events::EPOLLIN, DEVICE)?;
        }
        let spin = Spin::new(poll_us);
        Ok(WorkerLoop {
            worker,
            inbox,
            bell,
            poller,
            kick: None,
            kickless: false,
            stopping: None,
            holding: Vec::new(),
            ending: false,
            spin,
        })
    }

    fn run(mut self) {
        let mut device_ready = true;
        loop {
            while let Ok(letter) = self.inbox.try_recv() {
                self.obey(letter);
            }
            let moved = self.worker.step(device_ready);
            device_ready = false;
            self.tell_stopped();
            self.tell_held();
            if moved {
                self.spin.worked();
                continue;
            }
            if self.ending && self.worker.in_flight() == 0 && self.worker.device().is_idle() {
                return;
            }
            if self.spin.until(|| self.worker.has_work(), self.worker.in_flight()) || !self.worker.arm() {
                continue;
            }
            device_ready = self.sleep();
        }
    }

    /// Waits for an event; true if it came from the device.
    fn sleep(&mut self) -> bool {
        let soon = self.worker.wants_retry() || self.kickless || self.ending;
        let (mut device, mut bell) = (false, false);
        let waited = self.poller.wait(if soon { RETRY_MS } else { -1 }, |token| match token {
            BELL => bell = true,
            DEVICE => device = true,
            _ => {}
        });
        if let Err(e) = waited {
            // cannot happen with a set of our own; do not turn it into a busy loop
            tracing::error!("waiting for events failed: {e}");
            std::thread::sleep(Duration::from_millis(10));
        }
        if bell {
            // empties the counter; an error means that it was empty
            let _ = self.bell.read();
        }
        device
    }

    fn obey(&mut self, letter: Letter) {
        let reply = match letter.order {
            Order::Start(ring) => self.start(*ring),
            Order::Stop => {
                self.worker.stop();
                self.stopping = Some(letter.reply);
                return;
            }
            Order::Memory(m) => {
                self.worker.set_memory(m);
                Reply::Done
            }
            Order::Kick(kick) => match self.set_kick(kick) {
                Ok(()) => Reply::Done,
                Err(e) => Reply::Refused(format!("its kick descriptor cannot be waited for: {e}")),
            },
            Order::Call(call) => {
                self.worker.set_call(call);
                Reply::Done
            }
            Order::Err(err) => {
                self.worker.set_err(err);
                Reply::Done
            }
            Order::WriteThrough(on) => {
                self.worker.device().set_write_through(on);
                Reply::Done
            }
            Order::Size(bytes) => {
                self.worker.set_size(bytes);
                Reply::Done
            }
            Order::Prepare(disk) => match self.worker.device().prepare(&disk) {
                Ok(()) => Reply::Done,
                Err(e) => Reply::Refused(e.to_string()),
            },
            Order::Hold => {
                self.worker.hold();
                self.holding.push(letter.reply);
                return;
            }
            Order::Release => {
                self.worker.release_hold();
                Reply::Done
            }
            Order::MoveTo(disk) => {
                self.worker.device().move_to(&disk);
                Reply::Done
            }
            Order::End => {
                self.worker.stop();
                self.ending = true;
                Reply::Done
            }
        };
        // nobody has to wait for it
        let _ = letter.reply.send(reply);
    }

    fn start(&mut self, s: StartRing) -> Reply {
        match self.try_start(s) {
            Ok(()) => Reply::Done,
            Err(why) => {
                // nobody will stop what has not begun
                self.forget_kick();
                Reply::Refused(why)
            }
        }
    }

    fn try_start(&mut self, s: StartRing) -> std::result::Result<(), String> {
        let ring = Ring::new(&s.setup, self.worker.memory()).map_err(|e| e.to_string())?;
        self.set_kick(s.kick).map_err(|e| format!("its kick descriptor cannot be waited for: {e}"))?;
        self.worker.start(ring, s.extras).map_err(|e| e.to_string())
    }

    fn forget_kick(&mut self) {
        if let Some(old) = self.kick.take() {
            self.poller.remove(&old);
        }
        self.kickless = false;
    }

    /// Kicks are waited for by edge and never read: the counter tells nothing, and each kick saves a system call.
    fn set_kick(&mut self, kick: Option<EventConsumer>) -> io::Result<()> {
        if let Some(old) = self.kick.take() {
            self.poller.remove(&old);
        }
        // also if the new one turns out to be of no use
        self.kickless = true;
        if let Some(new) = kick {
            self.poller.add(new.as_raw_fd(), Events::EPOLLIN | Events::EPOLLET, KICK)?;
            self.kick = Some(new);
            self.kickless = false;
        }
        Ok(())
    }

    fn tell_held(&mut self) {
        if !self.holding.is_empty() && self.worker.is_held() {
            // who has lost patience does not listen any more
            self.holding.drain(..).for_each(|reply| drop(reply.send(Reply::Done)));
        }
    }

    fn tell_stopped(&mut self) {
        if self.stopping.is_none() {
            return;
        }
        if let Some(next_avail) = self.worker.stopped() {
            self.forget_kick();
            if let Some(reply) = self.stopping.take() {
                let _ = reply.send(Reply::Stopped(next_avail));
            }
        }
    }
}

/// Looks at the ring for a while before going to sleep, as long as that pays: the time doubles when work came and halves
/// when none did. Never while the device has requests: those announce themselves.
struct Spin {
    most: Duration,
    now: Duration,
    /// Something was done since the last sleep; only then is it worth it.
    warm: bool,
}

impl Spin {
    const LEAST: Duration = Duration::from_micros(2);

    fn new(poll_us: u32) -> Self {
        let most = Duration::from_micros(u64::from(poll_us.min(limits::MAX_POLL_MICROS)));
        Spin { most, now: most, warm: false }
    }

    fn worked(&mut self) {
        self.warm = true;
    }

    /// True if `work` turned up.
    fn until(&mut self, work: impl Fn() -> bool, in_flight: u16) -> bool {
        if self.most.is_zero() || in_flight > 0 || !std::mem::take(&mut self.warm) {
            return false;
        }
        let start = Instant::now();
        while start.elapsed() < self.now {
            for _ in 0..32 {
                if work() {
                    self.now = (self.now * 2).min(self.most);
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        self.now = (self.now / 2).max(Self::LEAST.min(self.most));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polling_stays_within_its_bound_and_adapts() {
        let mut s = Spin::new(0);
        s.worked();
        assert!(!s.until(|| true, 0));
        let mut s = Spin::new(64);
        assert!(!s.until(|| true, 0), "cold");
        s.worked();
        assert!(!s.until(|| true, 1), "the device has requests");
        for _ in 0..10 {
            s.worked();
            assert!(!s.until(|| false, 0));
        }
        assert_eq!(s.now, Spin::LEAST);
        for _ in 0..10 {
            s.worked();
            assert!(s.until(|| true, 0));
        }
        assert_eq!(s.now, Duration::from_micros(64));
        assert_eq!(Spin::new(u32::MAX).most, Duration::from_micros(1000));
    }
}
