//! I/O queues: requests with numbers and priorities, which can be cancelled. VirtualBox's header has them, and nothing behind it; what it leaves open
//! is said here.
//!
//! A request is allocated, then active from its submission until it completes. Cancelling it is one exchange of its state: it succeeds from either of
//! these, and fails once the request is completing. What is under way when it is cancelled goes on to its end, for the memory it works on has to
//! stay; only then is the callback called, with [`ErrorKind::Cancelled`]. What had not begun never does.
//!
//! The vhost workers do not use these types. Their requests cannot be cancelled (virtio-blk has no word for it), have their numbers (the head of the chain),
//! memory and order from the ring, and one thread each: what is a map, a lock and an allocation here is an index there, and CI counts the
//! instructions of a read. Both end in [`crate::vd::Channel`], which is where they are the same.

use super::Container;
use super::buffers::IoBuffer;
use super::dispatch::{Dispatcher, Key, Part, Task};
use super::iter::IoIter;
use crate::error::{Error, ErrorKind, Result, Status};
use crate::vd::Request;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// What a request does (`VDIOREQTYPE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum IoRequestType {
    /// Reads into the buffer.
    Read = 1,
    /// Writes from it.
    Write = 2,
    /// Makes durable what was completed before.
    Flush = 3,
    /// Gives up what the iterator is about.
    Discard = 4,
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum IoRequestState {
    /// Not submitted.
    Allocated = 0,
    /// Submitted.
    Active = 1,
    /// Its callback is being called.
    Completing = 2,
    /// It is over.
    Completed = 3,
    /// It was cancelled; if it was active, its callback is still to come.
    Canceled = 4,
}

impl IoRequestState {
    fn of(n: u8) -> Self {
        match n {
            0 => IoRequestState::Allocated,
            1 => IoRequestState::Active,
            2 => IoRequestState::Completing,
            3 => IoRequestState::Completed,
            _ => IoRequestState::Canceled,
        }
    }
}

/// Called once for each request that was submitted, when it has ended (`FNVDIOQUEUEREQCOMPLETE`): on the thread that serves the container, or on that of
/// whoever cancels it. It must not wait for other requests, nor change the chain.
pub type OnComplete = dyn Fn(&IoRequest, Result<()>) + Send + Sync;

/// An I/O queue (`VDIOQUEUE`).
pub struct IoQueue(Arc<Queue>);

struct Queue {
    priority: u32,
    private_bytes: usize,
    on_complete: Box<OnComplete>,
    state: Mutex<QueueState>,
    idle: Condvar,
}

#[derive(Default)]
struct QueueState {
    attached: Option<Arc<Dispatcher>>,
    requests: HashMap<u64, Arc<Req>>,
    /// Submitted, and their callbacks not called.
    active: usize,
}

struct Req {
    id: u64,
    state: AtomicU8,
    key: Mutex<Option<Key>>,
    private: Mutex<Vec<u8>>,
}

/// A request of a queue (`VDIOREQ`).
#[derive(Clone)]
pub struct IoRequest {
    req: Arc<Req>,
    queue: Arc<Queue>,
}

impl fmt::Debug for IoQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoQueue").field("priority", &self.0.priority).finish_non_exhaustive()
    }
}

impl fmt::Debug for IoRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoRequest")
            .field("id", &self.id())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

fn state_error(what: impl Into<String>) -> Error {
    Error::of(Status::InvalidState, what)
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().expect("queue lock")
    }
}

impl Req {
    fn swap(&self, from: IoRequestState, to: IoRequestState) -> bool {
        self.state.compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn now(&self) -> IoRequestState {
        IoRequestState::of(self.state.load(Ordering::Acquire))
    }
}

impl IoQueue {
    /// A queue of a priority, 0 the highest, whose requests have `private_bytes` for their users (`VDIoQueueCreate`). Requests of a higher
    /// priority begin before those of lower ones that have not begun; those of one priority in their order.
    pub fn new(
        on_complete: impl Fn(&IoRequest, Result<()>) + Send + Sync + 'static,
        private_bytes: usize,
        priority: u32,
    ) -> IoQueue {
        IoQueue(Arc::new(Queue {
            priority,
            private_bytes,
            on_complete: Box::new(on_complete),
            state: Mutex::default(),
            idle: Condvar::new(),
        }))
    }

    /// Ends the queue (`VDIoQueueDestroy`).
    ///
    /// # Errors
    /// [`Status::InvalidState`] while it is attached or has requests; it goes on then. A queue that is dropped cancels what is active instead.
    pub fn destroy(self) -> std::result::Result<(), (Self, Error)> {
        let (attached, requests) = {
            let s = self.0.lock();
            (s.attached.is_some(), s.requests.len())
        };
        if attached || requests > 0 {
            let e =
                state_error(format!("the queue is attached, or {requests} of its requests are not freed"));
            return Err((self, e));
        }
        Ok(())
    }

    /// Ends what binds the queue to its container (`VDIoQueueDetach`): with `purge` after cancelling all that is active, otherwise after that has
    /// ended. Waits for the callbacks.
    ///
    /// # Errors
    /// [`Status::InvalidState`] if it is not attached.
    pub fn detach(&self, purge: bool) -> Result<()> {
        if self.0.lock().attached.is_none() {
            return Err(state_error("the queue is not attached to a container"));
        }
        if purge {
            self.purge();
        }
        let mut s = self.0.lock();
        while s.active > 0 {
            s = self.0.idle.wait(s).expect("queue lock");
        }
        s.attached = None;
        Ok(())
    }

    /// Cancels all requests that can be cancelled (`VDIoQueuePurge`); says how many.
    pub fn purge(&self) -> usize {
        let all: Vec<_> = self.0.lock().requests.values().cloned().collect();
        let active = all.into_iter().filter(|r| r.now() == IoRequestState::Active);
        active.map(|req| IoRequest { req, queue: self.0.clone() }).filter(|r| r.cancel().is_ok()).count()
    }

    /// A request of this number, which no other of the queue has (`VDIoQueueReqAlloc`).
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] for a number that is taken.
    pub fn alloc(&self, id: u64) -> Result<IoRequest> {
        let mut s = self.0.lock();
        if s.requests.contains_key(&id) {
            return Err(Error::new(ErrorKind::Exists, format!("a request {id} is there already")));
        }
        let req = Arc::new(Req {
            id,
            state: AtomicU8::new(IoRequestState::Allocated as u8),
            key: Mutex::new(None),
            private: Mutex::new(vec![0; self.0.private_bytes]),
        });
        s.requests.insert(id, req.clone());
        Ok(IoRequest { req, queue: self.0.clone() })
    }

    /// Cancels the request of this number (`VDIoQueueReqCancelById`).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; otherwise as [`IoRequest::cancel`].
    pub fn cancel(&self, id: u64) -> Result<()> {
        let found = self.0.lock().requests.get(&id).cloned();
        let req =
            found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no request {id}")))?;
        IoRequest { req, queue: self.0.clone() }.cancel()
    }
}

impl Drop for IoQueue {
    fn drop(&mut self) {
        // Not attached any more: that is as it should be.
        let _ = self.detach(true);
    }
}

impl IoRequest {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.req.id
    }

    /// Where it is.
    pub fn state(&self) -> IoRequestState {
        self.req.now()
    }

    /// Lets `look` at the request's private bytes.
    pub fn with_private<T>(&self, look: impl FnOnce(&mut [u8]) -> T) -> T {
        look(&mut self.req.private.lock().expect("private bytes"))
    }

    /// Frees the request, and its number (`VDIoQueueReqFree`).
    ///
    /// # Errors
    /// [`Status::AsyncIoInProgress`] while it is active or its callback has not returned.
    pub fn free(self) -> Result<()> {
        let mut s = self.queue.lock();
        let is_active = self.req.key.lock().expect("key").is_some();
        if is_active || matches!(self.state(), IoRequestState::Active | IoRequestState::Completing) {
            return Err(Error::of(Status::AsyncIoInProgress, format!("request {} is active", self.id())));
        }
        s.requests.remove(&self.req.id);
        Ok(())
    }

    /// Cancels the request (`VDIoQueueReqCancelByHandle`). If it was active, its callback is called with [`ErrorKind::Cancelled`]: before this returns if it
    /// had not begun, else when it has ended.
    ///
    /// # Errors
    /// [`Status::InvalidState`] if it is completing, over, or cancelled already.
    pub fn cancel(&self) -> Result<()> {
        if self.req.swap(IoRequestState::Allocated, IoRequestState::Canceled) {
            return Ok(());
        }
        if !self.req.swap(IoRequestState::Active, IoRequestState::Canceled) {
            return Err(state_error(format!("request {} is {:?}", self.id(), self.state())));
        }
        let key = *self.req.key.lock().expect("key");
        let dispatcher = self.queue.lock().attached.clone();
        if let Some(task) = key.zip(dispatcher).and_then(|(key, d)| d.take_back(key)) {
            (task.done)(Err(cancelled()));
        }
        Ok(())
    }

    /// Submits the request to the container its queue is attached to (`VDIoQueueReqSubmit`): reads and writes with an iterator and a buffer, discards
    /// with an iterator, flushes with neither.
    ///
    /// # Errors
    /// [`Status::InvalidState`] unless the request was only allocated and its queue is attached; [`ErrorKind::InvalidArgument`] for what does not
    /// belong to its type, or a buffer that is too short; [`ErrorKind::Unsupported`] for a change of what is no data;
    /// [`Status::NotOpened`]. The request is what it was then, and no callback is called.
    pub fn submit(
        &self,
        kind: IoRequestType,
        iter: Option<&IoIter>,
        buffer: Option<&IoBuffer>,
    ) -> Result<()> {
        let parts = parts_of(kind, iter, buffer)?;
        let dispatcher = {
            let mut s = self.queue.lock();
            let attached = s.attached.clone().ok_or_else(|| state_error("the queue is not attached"))?;
            if !self.req.swap(IoRequestState::Allocated, IoRequestState::Active) {
                return Err(state_error(format!("request {} is {:?}", self.id(), self.state())));
            }
            s.active += 1;
            attached
        };
        let key = dispatcher.key(self.queue.priority);
        *self.req.key.lock().expect("key") = Some(key);
        let bytes = iter.map_or(0, |i| usize::try_from(i.bytes()).expect("a request's bytes"));
        let (me, memory) = (self.clone(), buffer.cloned());
        let done = move |ended: Result<()>| {
            let copied = match (&memory, kind) {
                (Some(b), IoRequestType::Read) => ended.and_then(|()| b.empty(bytes)),
                _ => ended,
            };
            // Whoever hears of the end may look how many there are.
            drop(memory);
            me.complete(copied);
        };
        let submitted = dispatcher.submit(key, Task { parts, done: Box::new(done) });
        if submitted.is_err() {
            *self.req.key.lock().expect("key") = None;
            self.req.swap(IoRequestState::Active, IoRequestState::Allocated);
            self.queue.lock().active -= 1;
            self.queue.idle.notify_all();
        }
        submitted
    }

    /// The request has ended: nobody can cancel it any more, and its callback is called.
    fn complete(&self, ended: Result<()>) {
        let in_time = self.req.swap(IoRequestState::Active, IoRequestState::Completing);
        (self.queue.on_complete)(self, if in_time { ended } else { Err(cancelled()) });
        *self.req.key.lock().expect("key") = None;
        self.req.swap(IoRequestState::Completing, IoRequestState::Completed);
        self.queue.lock().active -= 1;
        self.queue.idle.notify_all();
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the request was cancelled")
}

/// What a request does, part by part.
fn parts_of(kind: IoRequestType, iter: Option<&IoIter>, buffer: Option<&IoBuffer>) -> Result<VecDeque<Part>> {
    let misfit = || {
        let what = format!("a {kind:?} was given an iterator or a buffer too many, or too few");
        Error::new(ErrorKind::InvalidArgument, what)
    };
    match (kind, iter, buffer) {
        (IoRequestType::Read, Some(iter), Some(buffer)) => {
            Ok(iter.reads(&super::asynchronous::part_of(&buffer.slices(), iter.bytes())?))
        }
        (IoRequestType::Write, Some(iter), Some(buffer)) => {
            let memory = super::asynchronous::part_of(&buffer.slices(), iter.bytes())?;
            let parts = iter.changes(&memory, Request::Write)?;
            buffer.fill(usize::try_from(iter.bytes()).expect("a request's bytes"))?;
            Ok(parts)
        }
        (IoRequestType::Discard, Some(iter), None) => iter.changes(&[], Request::Discard),
        (IoRequestType::Flush, None, None) => Ok([Part::Io(Request::Flush, Vec::new())].into()),
        _ => Err(misfit()),
    }
}

impl Container {
    /// Attaches a queue, which is attached to no container (`VDIoQueueAttach`). What is done to the chain lets its requests wait; once nothing is open they
    /// fail.
    ///
    /// # Errors
    /// [`Status::InvalidState`] if it is attached already.
    pub fn attach(&self, queue: &IoQueue) -> Result<()> {
        let mut s = queue.0.lock();
        if s.attached.is_some() {
            return Err(state_error("the queue is attached already"));
        }
        s.attached = Some(self.dispatcher.clone());
        Ok(())
    }
}
