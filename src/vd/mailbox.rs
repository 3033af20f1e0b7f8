//! How channels tell each other that something a slot waits for has happened.

use crate::error::Failure;
use crate::map::Waiter;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What a slot waited for has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) slot: u16,
    pub(crate) result: Result<(), Failure>,
}

/// Events for one channel from the others.
#[derive(Debug)]
pub(crate) struct Mailbox {
    events: Mutex<Vec<Event>>,
    signal: EventFd,
    rung: AtomicBool,
}

impl Mailbox {
    fn new() -> io::Result<Self> {
        Ok(Mailbox {
            events: Mutex::default(),
            signal: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            rung: AtomicBool::new(false),
        })
    }

    /// Makes the channel look again soon.
    pub(crate) fn ring(&self) {
        self.rung.store(true, Ordering::Release);
        // A counter that is full has been told often enough.
        let _ = self.signal.write(1);
    }

    pub(crate) fn post(&self, e: Event) {
        let mut events = self.events.lock().expect("mailbox lock");
        events.push(e);
        if events.len() == 1 {
            self.ring();
        }
    }

    /// Moves all events into `out`.
    pub(crate) fn empty_into(&self, out: &mut Vec<Event>) {
        let mut events = self.events.lock().expect("mailbox lock");
        // The bell may also have been rung without an event: then it must not go on ringing.
        if !events.is_empty() || self.rung.swap(false, Ordering::AcqRel) {
            let _ = self.signal.read();
            out.append(&mut events);
        }
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.signal.as_raw_fd()
    }
}

/// The mailboxes of all channels of a disk.
#[derive(Debug, Default)]
pub(crate) struct Mailboxes(Mutex<Vec<Option<Arc<Mailbox>>>>);

impl Mailboxes {
    /// A number and a box for a new channel.
    pub(crate) fn open(&self) -> io::Result<(u16, Arc<Mailbox>)> {
        let mailbox = Arc::new(Mailbox::new()?);
        let mut all = self.0.lock().expect("mailboxes lock");
        let free = all.iter().position(Option::is_none).unwrap_or(all.len());
        let number = u16::try_from(free).map_err(|_| io::Error::other("too many channels"))?;
        if free == all.len() {
            all.push(None);
        }
        all[free] = Some(mailbox.clone());
        Ok((number, mailbox))
    }

    /// The channel is gone; nobody waits in it.
    pub(crate) fn close(&self, number: u16) {
        self.0.lock().expect("mailboxes lock")[usize::from(number)] = None;
    }

    /// Tells a slot of another channel.
    pub(crate) fn post(&self, who: Waiter, result: Result<(), Failure>) {
        let mailbox = self.0.lock().expect("mailboxes lock").get(usize::from(who.channel)).cloned().flatten();
        mailbox.expect("a channel with waiting slots is open").post(Event { slot: who.slot, result });
    }
}
