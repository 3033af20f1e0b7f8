//! A connection that can be taken up again with the same rings and the same inflight region.
use crate::attach::{make_queues, start};
use crate::dev::{Dev, Opts};
use crate::queue::Queue;
use crate::sys::poll_fd;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use vhost::vhost_user::message::VhostUserInflight;

/// Bytes of a queue's header in an inflight region, and of an entry, whose first byte is the mark. A queue's part
/// begins at a multiple of 64 with vdblk; the specification leaves it open.
const INFLIGHT_HEADER: u64 = 16;
const INFLIGHT_ENTRY: u64 = 16;

pub(super) struct Session<'a> {
    o: &'a Opts,
    pub(super) dev: Dev,
    pub(super) qs: Vec<Queue>,
    inflight: Option<(VhostUserInflight, File)>,
}

impl Session<'_> {
    /// Like `attach::open`, with the inflight region set before the vrings start.
    pub(super) fn open(o: &Opts, depth: usize, bs: usize) -> io::Result<Session<'_>> {
        let dev = Dev::connect(o)?;
        let qs = make_queues(o, &dev.info, depth, bs)?;
        let mut s = Session { o, dev, qs, inflight: None };
        s.inflight = s.dev.get_inflight(o)?;
        s.start(|_| 0)?;
        Ok(s)
    }

    /// What a VMM does after the back-end came back: same memory, same rings, base = used index.
    pub(super) fn recover(&mut self) -> io::Result<()> {
        self.dev = Dev::connect(self.o)?;
        for q in &mut self.qs {
            q.renew_events()?;
        }
        self.start(|q| q.ring.used_idx())?;
        for q in &self.qs {
            q.kick.write(1)?;
        }
        Ok(())
    }

    /// Says in the inflight region that the slot's request is in flight, or is not.
    pub(super) fn mark(&self, queue: usize, slot: usize, in_flight: bool) -> io::Result<()> {
        let Some((d, f)) = &self.inflight else {
            return Err(io::Error::other("the server keeps no inflight region"));
        };
        let queue_bytes = (INFLIGHT_HEADER + INFLIGHT_ENTRY * u64::from(d.queue_size)).next_multiple_of(64);
        let head = u64::from(self.qs[queue].head(slot));
        let at = d.mmap_offset + queue as u64 * queue_bytes + INFLIGHT_HEADER + INFLIGHT_ENTRY * head;
        f.write_all_at(&[u8::from(in_flight)], at)
    }

    fn start(&mut self, base: impl Fn(&Queue) -> u16) -> io::Result<()> {
        if let Some((d, f)) = &self.inflight {
            self.dev.set_inflight(d, f)?;
        }
        self.dev.set_mem(&self.qs[0].mem, self.o.mem_slots)?;
        for (i, q) in self.qs.iter().enumerate() {
            start(&mut self.dev, i, q, base(q))?;
        }
        Ok(())
    }

    /// Has the server gone, with nothing left of its completions?
    pub(super) fn over(&self) -> bool {
        let shown = poll_fd(&self.dev.fe, libc::POLLRDHUP, 0);
        let hung_up = shown & (libc::POLLHUP | libc::POLLRDHUP) != 0;
        hung_up && !self.qs.iter().any(|q| q.ring.pending())
    }
}
