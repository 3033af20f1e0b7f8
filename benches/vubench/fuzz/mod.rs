//! Malformed (and unusual but legal) descriptor chains, one at a time, each followed by a health
//! check: a valid read on the same queue.
mod cases;
mod chain;

use crate::attach::open;
use crate::dev::{Dev, Opts, close};
use crate::features::*;
use crate::mem::GPA_BASE;
use crate::queue::{Queue, Req};
use crate::server::Server;
use cases::{Case, Expect};
use chain::{Cx, D0, Post, SCRATCH, UNTOUCHED};
use serde::Serialize;
use std::io;
use std::time::Duration;

/// How long the device may take for a chain: long, since a busy machine must not fail a case.
const ANSWER: Duration = Duration::from_secs(2);
const DEPTH: usize = 4;
/// The slot whose buffer is the scratch area; the health check uses slot 0.
const SCRATCH_SLOT: usize = 3;

/// The last line of output, by which a test judges.
#[derive(Default, Serialize)]
struct Summary {
    cases: u32,
    skipped: u32,
    /// legal chains that were not answered OK with the right used length
    legal_failed: u32,
    unanswered: u32,
    /// malformed chains answered, but not as they should be
    status_mismatch: u32,
    /// queues that stopped where none may
    queue_dead: u32,
    /// queues that stopped where they may
    queue_stopped: u32,
    server_died: u32,
    no_reconnect: u32,
}

impl Summary {
    fn good(&self) -> bool {
        let bad = self.legal_failed
            + self.unanswered
            + self.status_mismatch
            + self.queue_dead
            + self.server_died
            + self.no_reconnect;
        bad == 0
    }
}

/// What became of a chain.
#[derive(Clone, Copy)]
enum Answer {
    None,
    /// used length, status byte, and whether the head was the one posted
    Used(u32, u8, bool),
}

impl Answer {
    fn describe(self) -> String {
        let Answer::Used(len, status, ours) = self else {
            return "no answer".into();
        };
        let name = match status {
            S_OK => "OK",
            S_IOERR => "IOERR",
            S_UNSUPP => "UNSUPP",
            UNTOUCHED => "used, status untouched",
            _ => "used, other status",
        };
        let id = if ours { "" } else { ", wrong head" };
        format!("{name} len={len}{id}")
    }

    /// Is this the right one? `writable`: bytes the device may have written.
    fn fits(self, e: Expect, writable: u64) -> bool {
        let Answer::Used(len, status, ours) = self else {
            return e == Expect::MayStop;
        };
        let unused = len == 0 && status == UNTOUCHED;
        let refused = (status == S_IOERR || status == S_UNSUPP) && u64::from(len) <= writable;
        match e {
            Expect::MayStop => true,
            _ if !ours => false,
            Expect::Ok(want) => status == S_OK && len == want,
            Expect::Refuse => refused,
            Expect::Unsupp => refused && status == S_UNSUPP,
            Expect::Unused => unused,
            Expect::RefuseOrUnused => refused || unused,
            Expect::Any => refused || unused || (status == S_OK && u64::from(len) <= writable),
        }
    }
}

pub(crate) fn run(o: &Opts, server: Option<&mut Server>) -> io::Result<bool> {
    let mut f = Fuzzer {
        o: Opts { queues: 1, vring: o.vring.clamp(128, 1024), ..o.clone() },
        server,
        sum: Summary::default(),
        session: None,
    };
    for case in cases::all() {
        f.case(case)?;
    }
    println!("{}", serde_json::to_string(&f.sum)?);
    Ok(f.sum.good())
}

struct Fuzzer<'a> {
    o: Opts,
    server: Option<&'a mut Server>,
    sum: Summary,
    session: Option<(Dev, Queue)>,
}

impl Fuzzer<'_> {
    fn connect(&self) -> io::Result<(Dev, Queue)> {
        let (dev, mut qs) = open(&self.o, DEPTH, SCRATCH)?;
        if dev.info.blk_size() != 512 {
            return Err(io::Error::other("the cases are made for blocks of 512"));
        }
        Ok((dev, qs.remove(0)))
    }

    fn case(&mut self, case: &Case) -> io::Result<()> {
        let (dev, mut q) = match self.session.take() {
            Some(s) => s,
            None => self.connect()?,
        };
        if case.skipped(&dev.info) {
            self.sum.skipped += 1;
            self.session = Some((dev, q));
            return Ok(());
        }
        self.sum.cases += 1;
        let expect = case.expect(&dev.info);
        let (answer, writable) = post(&mut q, case, &dev);
        let verdict = self.judge(answer, expect, writable);
        let alive = healthy(&mut q);
        let after = if alive && expect != Expect::MayStop {
            self.session = Some((dev, q));
            "ok".into()
        } else {
            // also where the queue survived a broken ring: what is in it is anybody's guess
            drop((dev, q));
            self.after_stop(alive, expect)?
        };
        println!("{:48} {:28} {after}{verdict}", case.name, answer.describe());
        Ok(())
    }

    fn judge(&mut self, answer: Answer, expect: Expect, writable: u64) -> String {
        if answer.fits(expect, writable) {
            return String::new();
        }
        let count = match (answer, expect) {
            (_, Expect::Ok(_)) => &mut self.sum.legal_failed,
            (Answer::None, _) => &mut self.sum.unanswered,
            _ => &mut self.sum.status_mismatch,
        };
        *count += 1;
        format!("  <-- expected {expect:?}")
    }

    /// The queue is of no more use: counts that and comes back with a new connection.
    fn after_stop(&mut self, alive: bool, expect: Expect) -> io::Result<String> {
        let mut text = String::from("ok");
        if !alive && expect == Expect::MayStop {
            self.sum.queue_stopped += 1;
            text = "queue stopped".into();
        } else if !alive {
            self.sum.queue_dead += 1;
            text = "queue dead".into();
        }
        // a process on its way out needs a moment
        std::thread::sleep(Duration::from_millis(50));
        if let Some(how) = self.server.as_deref_mut().and_then(Server::exited) {
            self.sum.server_died += 1;
            text = format!("server died ({how})");
        }
        if !self.reconnects() {
            self.sum.no_reconnect += 1;
            text += ", no reconnect";
            let gone = || io::Error::other("server gone; give --server-cmd to restart it");
            self.server.as_deref_mut().ok_or_else(gone)?.respawn()?;
        }
        Ok(text)
    }

    /// Does a new connection work?
    fn reconnects(&self) -> bool {
        let Ok((dev, mut q)) = self.connect() else {
            return false;
        };
        let well = healthy(&mut q);
        close(dev, 1);
        well
    }
}

/// Posts the chain of a case and waits for the answer.
fn post(q: &mut Queue, case: &Case, dev: &Dev) -> (Answer, u64) {
    let s = q.buf(SCRATCH_SLOT);
    q.mem.bytes(s, SCRATCH).fill(0);
    let p: Post = (case.build)(&Cx {
        q,
        s,
        qsz: q.ring.size,
        sectors: dev.info.capacity() / 512,
        end: GPA_BASE + q.mem.len() as u64,
    });
    q.mem.write(s + p.status, UNTOUCHED);
    for (i, x) in p.v.iter().enumerate() {
        q.ring.set_desc(D0 + i as u16, *x);
    }
    for _ in 0..p.times {
        q.ring.push(p.head);
    }
    q.flush_kick();
    (answer(q, s + p.status, p.head), p.writable)
}

fn answer(q: &mut Queue, status: usize, head: u16) -> Answer {
    q.wait(false, ANSWER);
    match q.ring.pop() {
        Some((id, len)) => Answer::Used(len, q.mem.read(status), id == u32::from(head)),
        None => Answer::None,
    }
}

/// Does a valid read come back?
fn healthy(q: &mut Queue) -> bool {
    let read = Req { typ: T_IN, off: 0, len: 512, flags: 0 };
    q.submit(0, read);
    q.flush_kick();
    // a kick the device asked for no more, in case its wish was made of rubbish
    let _ = q.kick.write(1);
    // what still comes from the case goes before it
    for _ in 0..4 {
        if !q.wait(false, ANSWER) {
            return false;
        }
        while let Some((id, len)) = q.ring.pop() {
            if q.slot(id) == 0 {
                return q.status(0) == S_OK && len == read.used_len();
            }
        }
    }
    false
}
