//! The control thread: takes a front-end in, hands its messages to the handler, and starts over when it has gone.
//!
//! One front-end at a time; others wait in the socket's backlog until it has gone, as with qemu-storage-daemon, so a
//! front-end that reconnects before we have noticed its end is served. A message is taken up only when all of it has
//! arrived and its reply fits the socket, so a front-end that stops in the middle of one holds up nobody but itself.

use super::control::Control;
use super::handler::Handler;
use super::memory::SHARE_IT;
use super::poller::Poller;
use super::socket::Endpoint;
use super::sys;
use super::thread::{MakeChannel, Order, WorkerHandle};
use super::worker::WorkerOptions;
use crate::error::{Error, Result};
use crate::vd::BlockDevice;
use crate::virtio::{DeviceShape, Rules};
use epoll::Events;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::Error as VhostError;
use vhost::vhost_user::message::MAX_MSG_SIZE;
use vmm_sys_util::eventfd::EventFd;

/// A message's header: request, flags and the length of the rest, 4 bytes each.
const HEADER_BYTES: usize = 12;
/// Messages handled before a look at the other descriptors.
const MESSAGES_A_TURN: usize = 64;

const SHUTDOWN: u64 = 0;
const LISTENER: u64 = 1;
const CONNECTION: u64 = 2;
const RESIZE: u64 = 3;

/// The message that brings the channel for messages to the front-end.
const SET_BACKEND_REQ_FD: u32 = 21;
/// Messages that bring the guest's memory.
const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;

/// A disk to serve.
pub struct Device<D> {
    /// What drivers are told of it.
    pub shape: DeviceShape,
    /// The answer to GET_ID: ASCII, of which the first 20 bytes count.
    pub serial: String,
    /// Microseconds a worker looks at its ring before it sleeps; 0: not at all. At most
    /// [`crate::limits::MAX_POLL_MICROS`].
    pub poll_us: u32,
    /// Makes a queue's channel to the disk, `make(queue, slots)`, on the thread that will use it.
    pub make: Box<MakeChannel<D>>,
    /// How it may grow while it is served.
    pub resize: Option<Resize>,
    /// For whoever pauses its queues, or gives them another disk.
    pub control: Control,
}

/// A disk that may grow.
pub struct Resize {
    /// Readable when the size is to be looked at.
    pub event: EventFd,
    /// The size in bytes now; `None` if it cannot be told, or not be used.
    pub look: Box<dyn FnMut() -> Option<u64> + Send>,
}

/// How to serve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServeOptions {
    /// Return when the first front-end has gone (one that said nothing does not count).
    pub once: bool,
}

/// Serves a disk until `shutdown` becomes readable, or as long as `options` say, or until the one front-end of a
/// connected endpoint has gone. On return no request is in flight and all channels to the disk are dropped.
///
/// `ready` is called when front-ends can be served.
///
/// # Errors
/// What [`Device::make`] says, a shape that cannot be, or the operating system at set-up. Front-ends cause none.
pub fn serve<D: BlockDevice + 'static>(
    device: Device<D>,
    endpoint: Endpoint,
    options: ServeOptions,
    shutdown: &EventFd,
    ready: impl FnOnce(),
) -> Result<()> {
    let mut device = device;
    device.shape.check()?;
    let resize = device.resize.take();
    let poller = Poller::new().map_err(|e| Error::io("make an epoll set", e))?;
    let wait_for =
        |fd, token| poller.add(fd, Events::EPOLLIN, token).map_err(|e| Error::io("wait for a descriptor", e));
    wait_for(shutdown.as_raw_fd(), SHUTDOWN)?;
    if let Some(r) = &resize {
        wait_for(r.event.as_raw_fd(), RESIZE)?;
    }
    let shape = Arc::new(device.shape.clone());
    let control = device.control.clone();
    let workers = start_workers(device)?;
    control.set(Some(Arc::clone(&workers)));
    let _unset = Unset(control);
    let mut server = Server { shape, workers, poller, resize };
    ready();
    match endpoint {
        Endpoint::Connected(stream) => server.serve_one(stream, &mut None).map(drop),
        Endpoint::Listener(listener) => server.serve_all(listener, options),
    }
}

/// Takes the queues out of a [`Control`] again: their threads end when nobody has them any more.
struct Unset(Control);

impl Drop for Unset {
    fn drop(&mut self) {
        self.0.set(None);
    }
}

fn start_workers<D: BlockDevice + 'static>(device: Device<D>) -> Result<Arc<[WorkerHandle]>> {
    let make: Arc<MakeChannel<D>> = Arc::from(device.make);
    let shape = &device.shape;
    let rules = Rules {
        size_bytes: shape.size_bytes,
        read_only: shape.read_only,
        discard: shape.discard && !shape.read_only,
    };
    let worker = |queue| {
        let serial = device.serial.clone();
        let options = WorkerOptions { queue, slots: shape.queue_size, rules, serial };
        WorkerHandle::spawn(options, device.poll_us, Arc::clone(&make))
    };
    (0..shape.num_queues).map(worker).collect()
}

struct Server {
    shape: Arc<DeviceShape>,
    workers: Arc<[WorkerHandle]>,
    poller: Poller,
    resize: Option<Resize>,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The front-end went without having said anything.
    Silent,
    /// The front-end went, or its message made no sense.
    Gone,
    /// We were told to end.
    Shutdown,
}

/// What woke the control thread, apart from the front-end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Told {
    shutdown: bool,
    resize: bool,
}

/// Whether a message can be taken up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Readiness {
    /// By the number of its request.
    Message(u32),
    NotYet,
    Gone,
}

type Requests = BackendReqHandler<Mutex<Handler>>;

impl Server {
    fn serve_all(&mut self, listener: UnixListener, options: ServeOptions) -> Result<()> {
        // a front-end that gave up while it waited must not make `accept` wait for the next
        listener.set_nonblocking(true).map_err(|e| Error::io("set up the socket", e))?;
        let mut listener = Some(listener);
        while let Some(listening) = &listener
            && let Some(stream) = self.next_front_end(listening)?
        {
            match self.serve_one(stream, &mut listener)? {
                End::Shutdown => break,
                End::Gone if options.once => break,
                End::Gone | End::Silent => {}
            }
        }
        Ok(())
    }

    /// Waits for a front-end; `None` at shutdown.
    fn next_front_end(&mut self, listener: &UnixListener) -> Result<Option<UnixStream>> {
        let failed = |e| Error::io("wait for a front-end", e);
        let fd = listener.as_raw_fd();
        self.poller.add(fd, Events::EPOLLIN, LISTENER).map_err(failed)?;
        let stream = loop {
            let told = self.wait(-1).map_err(failed)?;
            if told.shutdown {
                break None;
            }
            if told.resize {
                self.look_at_size();
            }
            match listener.accept() {
                Ok((stream, _)) => break Some(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => {
                    // out of descriptors or memory: the front-end tries again, and so do we
                    tracing::warn!("cannot take a front-end in: {e}");
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        };
        self.poller.remove(listener);
        Ok(stream)
    }

    /// Serves a front-end until one of both sides ends it. If we do, nobody is listened to any more when it finds out: one
    /// that connects again at once shall reach whoever comes after us.
    fn serve_one(&mut self, stream: UnixStream, listener: &mut Option<UnixListener>) -> Result<End> {
        let failed = |e| Error::io("serve a front-end", e);
        stream.set_nonblocking(false).map_err(failed)?;
        let handler = Handler::new(Arc::clone(&self.shape), Arc::clone(&self.workers)).map_err(failed)?;
        let handler = Arc::new(Mutex::new(handler));
        let socket = stream.try_clone().map_err(failed)?;
        let mut requests = Requests::from_stream(stream, Arc::clone(&handler));
        // by edge: what cannot be taken up yet does not wake us again before more has come
        let events = Events::EPOLLIN | Events::EPOLLOUT | Events::EPOLLRDHUP | Events::EPOLLET;
        self.poller.add(socket.as_raw_fd(), events, CONNECTION).map_err(failed)?;
        tracing::info!("front-end connected");
        let end = self.converse(&mut requests, &handler, &socket);
        self.poller.remove(&socket);
        if matches!(end, Ok(End::Shutdown)) {
            *listener = None;
        }
        // close the socket last: who sees it closed may rely on its rings and memory being left alone
        handler.lock().unwrap_or_else(PoisonError::into_inner).close();
        tracing::info!("front-end disconnected");
        end.map_err(failed)
    }

    fn wait(&self, timeout_ms: i32) -> io::Result<Told> {
        let mut seen = Told::default();
        self.poller.wait(timeout_ms, |token| {
            seen.shutdown |= token == SHUTDOWN;
            seen.resize |= token == RESIZE;
        })?;
        Ok(seen)
    }

    /// Looks at the disk's size; true if it has grown. One that has shrunk is served as it was: there is no way to tell
    /// a driver that would not be too late.
    fn look_at_size(&mut self) -> bool {
        let Some(r) = &mut self.resize else { return false };
        // empties the counter; an error means that it was empty
        let _ = r.event.read();
        let Some(size) = (r.look)().filter(|size| *size > self.shape.size_bytes) else { return false };
        tracing::info!("the disk has grown from {} to {size} bytes", self.shape.size_bytes);
        self.shape = Arc::new(DeviceShape { size_bytes: size, ..(*self.shape).clone() });
        let orders = self.workers.iter().map(|w| w.send(Order::Size(size)));
        orders.collect::<Vec<_>>().into_iter().for_each(|p| drop(p.wait()));
        true
    }

    fn converse(
        &mut self,
        requests: &mut Requests,
        handler: &Mutex<Handler>,
        socket: &UnixStream,
    ) -> io::Result<End> {
        let mut silent = true;
        let mut busy = false;
        loop {
            let told = self.wait(if busy { 0 } else { -1 })?;
            if told.shutdown {
                return Ok(End::Shutdown);
            }
            if told.resize && self.look_at_size() {
                handler.lock().unwrap_or_else(PoisonError::into_inner).grown(&self.shape);
            }
            busy = true;
            for _ in 0..MESSAGES_A_TURN {
                let request = match readiness(socket)? {
                    Readiness::Message(request) => request,
                    Readiness::NotYet => {
                        busy = false;
                        break;
                    }
                    Readiness::Gone => return Ok(if silent { End::Silent } else { End::Gone }),
                };
                if request == SET_BACKEND_REQ_FD {
                    let channel = sys::peek_descriptor(socket)?;
                    handler.lock().unwrap_or_else(PoisonError::into_inner).expect_back_channel(channel);
                }
                silent = false;
                if !goes_on(request, requests.handle_request()) {
                    return Ok(End::Gone);
                }
            }
        }
    }
}

/// Whether a connection goes on after a message; says why not.
fn goes_on(request: u32, handled: std::result::Result<(), VhostError>) -> bool {
    match handled {
        Ok(()) | Err(VhostError::SocketRetry(_)) => true,
        Err(VhostError::InvalidOperation(why)) => {
            tracing::warn!("front-end's wish refused: {why}");
            true
        }
        Err(VhostError::Disconnected | VhostError::PartialMessage | VhostError::SocketBroken(_)) => false,
        Err(VhostError::ReqHandlerError(why)) => {
            tracing::warn!("front-end's message is not acceptable: {why}; connection closed");
            false
        }
        // regions without a descriptor each, for one
        Err(e) if matches!(request, SET_MEM_TABLE | ADD_MEM_REG) => {
            tracing::warn!("front-end's memory cannot be used: {e} ({SHARE_IT}); connection closed");
            false
        }
        Err(e) => {
            tracing::warn!("front-end's message is not acceptable: {e}; connection closed");
            false
        }
    }
}

/// Looks whether a whole message has arrived and its reply can be sent without waiting.
fn readiness(socket: &UnixStream) -> io::Result<Readiness> {
    let mut header = [0; HEADER_BYTES];
    match sys::peek(socket, &mut header) {
        Ok(0) => return Ok(Readiness::Gone),
        Ok(HEADER_BYTES) => {}
        Ok(_) => return Ok(partial(socket)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Readiness::NotYet),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(Readiness::NotYet),
        Err(_) => return Ok(Readiness::Gone),
    }
    let [r0, r1, r2, r3, .., l0, l1, l2, l3] = header;
    let request = u32::from_ne_bytes([r0, r1, r2, r3]);
    let body = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
    // a length out of bounds is refused as soon as the header is read
    let whole = body > MAX_MSG_SIZE || sys::bytes_waiting(socket)? >= HEADER_BYTES + body;
    if !whole {
        return Ok(partial(socket));
    }
    Ok(if sys::is_writable(socket)? { Readiness::Message(request) } else { Readiness::NotYet })
}

/// A part of a message is there: the rest comes, or the front-end has gone.
fn partial(socket: &UnixStream) -> Readiness {
    if sys::has_hung_up(socket) { Readiness::Gone } else { Readiness::NotYet }
}
