//! io_uring at a fixed depth, in several set-ups.
use crate::Dice;
use crate::file::{Buffers, Target};
use io_uring::{IoUring, opcode, types};
use std::io;
use std::os::fd::AsRawFd;

const DEPTH: usize = 32;

#[derive(Clone, Copy)]
enum Taskrun {
    Default,
    Defer,
    Coop,
}

/// A way to set the ring up.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// registered file and buffers
    fixed: bool,
    taskrun: Taskrun,
}

pub(crate) const KINDS: &[Kind] = &[
    Kind { name: "io_uring qd32", fixed: false, taskrun: Taskrun::Default },
    Kind { name: "io_uring qd32 fixed", fixed: true, taskrun: Taskrun::Default },
    Kind { name: "io_uring qd32 fixed defer_taskrun", fixed: true, taskrun: Taskrun::Defer },
    Kind { name: "io_uring qd32 fixed coop", fixed: true, taskrun: Taskrun::Coop },
];

pub(crate) struct Loop<'a> {
    ring: IoUring,
    t: &'a Target,
    b: &'a Buffers,
    fixed: bool,
    free: Vec<usize>,
}

impl<'a> Loop<'a> {
    pub(crate) fn new(k: &Kind, t: &'a Target, b: &'a Buffers) -> io::Result<Loop<'a>> {
        let mut builder = IoUring::builder();
        match k.taskrun {
            Taskrun::Default => {}
            Taskrun::Defer => {
                builder.setup_single_issuer().setup_defer_taskrun();
            }
            Taskrun::Coop => {
                builder.setup_single_issuer().setup_coop_taskrun();
            }
        }
        let ring: IoUring = builder.build(64)?;
        if k.fixed {
            // SAFETY: the buffers are borrowed for longer than the ring lives.
            unsafe { ring.submitter().register_buffers(&[b.iovec()])? };
            ring.submitter().register_files(&[t.file.as_raw_fd()])?;
        }
        Ok(Loop { ring, t, b, fixed: k.fixed, free: (0..DEPTH).collect() })
    }

    /// Fills the ring up, waits for a completion, and says how many there were.
    pub(crate) fn turn(&mut self, dice: &mut Dice) -> io::Result<u64> {
        while let Some(slot) = self.free.pop() {
            let at = dice.below(self.t.blocks) * self.t.bs as u64;
            let (p, n) = (self.b.slot(slot), self.t.bs as u32);
            let e = if self.fixed {
                opcode::ReadFixed::new(types::Fixed(0), p, n, 0).offset(at).build()
            } else {
                opcode::Read::new(types::Fd(self.t.file.as_raw_fd()), p, n).offset(at).build()
            };
            // SAFETY: the buffer lives until `drop` has seen the completion, and the slot is nobody
            // else's until then.
            let pushed = unsafe { self.ring.submission().push(&e.user_data(slot as u64)) };
            pushed.map_err(io::Error::other)?;
        }
        self.ring.submit_and_wait(1)?;
        self.reap()
    }

    fn reap(&mut self) -> io::Result<u64> {
        let mut n = 0;
        for c in self.ring.completion() {
            self.free.push(c.user_data() as usize);
            n += 1;
            if c.result() < 0 {
                return Err(io::Error::from_raw_os_error(-c.result()));
            }
        }
        Ok(n)
    }
}

impl Drop for Loop<'_> {
    fn drop(&mut self) {
        // the kernel may still write to the buffers
        while self.free.len() < DEPTH && self.ring.submit_and_wait(1).is_ok() {
            let _ = self.reap();
        }
    }
}
