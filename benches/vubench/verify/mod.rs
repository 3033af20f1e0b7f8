//! Random I/O against a shadow model; optionally with kill -9 and recovery of the server.
mod dump;
mod model;
mod pattern;
mod session;
mod shadow;

use crate::dev::{Info, Opts, close};
use crate::features::*;
use crate::rng::Rng;
use crate::server::Server;
use crate::sys::image_is_locked;
use dump::Dump;
use model::{Model, Op, Stats};
use session::Session;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub(crate) struct Cfg {
    pub(crate) unit: usize,
    pub(crate) max_units: usize,
    pub(crate) depth: usize,
    pub(crate) runtime: f64,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) seed: u64,
    pub(crate) poll: bool,
    /// weights of write, read, write_zeroes, discard, flush
    pub(crate) mix: [u64; 5],
    pub(crate) assume_zero: bool,
    pub(crate) shadow: Option<String>,
    pub(crate) dump_model: Option<String>,
    pub(crate) check_only: bool,
    pub(crate) crashed: bool,
    pub(crate) kills: u32,
    /// whose lock is free when the last I/O of a killed server has ended
    pub(crate) image: Option<String>,
    pub(crate) spoil: Option<Spoil>,
    /// a request that takes longer than this is called lost
    pub(crate) stall: Duration,
}

/// What is done to a record of what is in flight, to see that its absence is noticed.
#[derive(Clone, Copy, PartialEq, Debug, clap::ValueEnum)]
pub(crate) enum Spoil {
    /// A request is missing, as if it had not been marked before it was started.
    Lose,
    /// One that was answered is there, as if its mark had not been cleared.
    Double,
}

pub(crate) fn run(o: &Opts, c: Cfg, mut server: Option<&mut Server>) -> io::Result<(Stats, Info)> {
    let mut r = Runner::new(o, c)?;
    while !r.finished()? {
        r.post();
        if r.kill_is_due() {
            r.kill(server.as_deref_mut())?;
        }
        r.collect()?;
    }
    if let Some(p) = &r.m.c.shadow {
        r.m.save(p)?;
    }
    let info = r.s.dev.info.clone();
    if !r.m.st.server_gone {
        close(r.s.dev, o.queues);
    }
    Ok((r.m.st, info))
}

/// Starts the server again; tells when the lock on the image was seen free meanwhile: the server waits for it, and the
/// kernel holds it for the killed one's last I/O.
fn respawn(server: &mut Server, image: Option<&str>) -> io::Result<Option<Instant>> {
    let Some(image) = image.map(File::open).transpose()? else {
        return server.respawn().map(|()| None);
    };
    let up = AtomicBool::new(false);
    std::thread::scope(|s| {
        let watch = s.spawn(|| {
            while !up.load(Relaxed) {
                if !image_is_locked(&image) {
                    return Some(Instant::now());
                }
                std::thread::sleep(Duration::from_micros(200));
            }
            None
        });
        let started = server.respawn();
        up.store(true, Relaxed);
        let free = watch.join().expect("the watch panicked");
        started.map(|()| free)
    })
}

struct Runner<'a> {
    s: Session<'a>,
    m: Model,
    dump: Option<Dump>,
    /// what each slot of each queue has in flight
    flight: Vec<Vec<Option<Op>>>,
    rng: Rng,
    start: Instant,
    last_completion: Instant,
    /// where the sweep at the end is, once it has begun
    sweep: Option<usize>,
    /// when the server ended that was killed, until its successor answers
    dead_since: Option<Instant>,
}

impl<'a> Runner<'a> {
    fn new(o: &'a Opts, c: Cfg) -> io::Result<Runner<'a>> {
        let s = Session::open(o, c.depth, c.unit * c.max_units)?;
        let disk = s.dev.info.capacity();
        let size = if c.size == 0 { disk.saturating_sub(c.offset) } else { c.size };
        let units = (size / c.unit as u64) as usize;
        if units == 0 {
            return Err(io::Error::other("range smaller than one unit"));
        }
        let mut m = Model::new(c, units);
        if let Some(p) = m.c.shadow.clone().filter(|p| Path::new(p).exists()) {
            m.load(&p)?;
            if m.c.crashed {
                m.crash();
            }
        } else if m.c.check_only {
            return Err(io::Error::other("--check-only needs a --shadow that exists"));
        }
        let dump = m.c.dump_model.as_deref();
        Ok(Runner {
            dump: dump.map(|p| Dump::create(p, disk)).transpose()?,
            flight: vec![vec![None; m.c.depth]; o.queues],
            rng: Rng(m.c.seed ^ m.generation ^ 0xabcd),
            start: Instant::now(),
            last_completion: Instant::now(),
            sweep: m.c.check_only.then_some(0),
            dead_since: None,
            s,
            m,
        })
    }

    fn outstanding(&self) -> usize {
        self.flight.iter().flatten().flatten().count()
    }

    /// Waits a little if there is nothing to do; true when the run is over.
    fn finished(&mut self) -> io::Result<bool> {
        if self.sweep.is_none() && self.start.elapsed().as_secs_f64() > self.m.c.runtime {
            self.sweep = Some(0);
        }
        let outstanding = self.outstanding();
        if outstanding == 0 {
            self.last_completion = Instant::now();
            return Ok(self.sweep.is_some_and(|p| p >= self.m.units.len()));
        }
        if self.completion_comes() {
            return Ok(false);
        }
        if self.s.over() {
            self.m.st.server_gone = true;
        } else if self.last_completion.elapsed() > self.m.c.stall {
            self.m.st.lost = outstanding as u64;
            self.tell_lost();
        }
        Ok(self.m.st.server_gone || self.m.st.lost > 0)
    }

    fn tell_lost(&mut self) {
        let waited = self.m.c.stall;
        for (queue, flight) in self.flight.iter().enumerate() {
            for (slot, op) in flight.iter().enumerate().filter_map(|(slot, op)| Some((slot, (*op)?))) {
                self.m.tell(format!("LOST no answer for {waited:?}, queue {queue}, slot {slot}: {op:?}"));
            }
        }
    }

    /// Waits a little for a completion, unless there is one already.
    fn completion_comes(&mut self) -> bool {
        if self.s.qs.iter().any(|q| q.ring.pending()) {
            return true;
        }
        let busy = |f: &Vec<Option<Op>>| f.iter().any(Option::is_some);
        let i = self.flight.iter().position(busy).unwrap_or(0);
        self.s.qs[i].wait(self.m.c.poll, Duration::from_millis(20))
    }

    /// Fills every free slot.
    fn post(&mut self) {
        for qi in 0..self.flight.len() {
            for slot in 0..self.flight[qi].len() {
                if self.flight[qi][slot].is_none()
                    && let Some(op) = self.next_op()
                {
                    self.submit(qi, slot, op);
                }
            }
            self.s.qs[qi].flush_kick();
        }
    }

    fn submit(&mut self, qi: usize, slot: usize, op: Op) {
        let q = &mut self.s.qs[qi];
        let r = self.m.request(&op);
        let data = q.data(slot, r.len as usize);
        match op.typ {
            T_OUT => pattern::fill(data, self.m.c.seed, r.off, op.generation),
            T_IN => data.fill(0x5a),
            _ => {}
        }
        self.m.posted(&op);
        q.submit(slot, r);
        self.flight[qi][slot] = Some(op);
    }

    fn next_op(&mut self) -> Option<Op> {
        match self.sweep {
            Some(at) => self.sweep_op(at),
            None => self.random_op(),
        }
    }

    /// The next piece of the sweep; it waits for whatever is still under way there.
    fn sweep_op(&mut self, first: usize) -> Option<Op> {
        let end = self.m.units.len().min(first + self.m.c.max_units);
        let n = (first..end).take_while(|i| !self.m.busy(*i, 1)).count();
        self.sweep = Some(first + n);
        (n > 0).then_some(Op { typ: T_IN, first, n, generation: 0, seq: self.m.seq, sweep: true })
    }

    /// A random request; none if the dice want what is not offered or not free.
    fn random_op(&mut self) -> Option<Op> {
        let typ = self.random_type()?;
        let mut op = Op { typ, first: 0, n: 0, generation: 0, seq: self.m.seq, sweep: false };
        if typ != T_FLUSH {
            let units = self.m.units.len();
            op.n = 1 + self.rng.below(self.m.c.max_units.min(units) as u64) as usize;
            op.first = self.rng.below((units - op.n + 1) as u64) as usize;
            if self.m.busy(op.first, op.n) {
                return None;
            }
            self.m.generation += 1;
            op.generation = self.m.generation;
        }
        Some(op)
    }

    fn random_type(&mut self) -> Option<u32> {
        let mix = self.m.c.mix;
        let mut dice = self.rng.below(mix.iter().sum());
        let chosen = mix.iter().position(|w| {
            let hit = dice < *w;
            dice = dice.saturating_sub(*w);
            hit
        })?;
        let (typ, needs) = [
            (T_OUT, 0),
            (T_IN, 0),
            (T_WRITE_ZEROES, BLK_F_WRITE_ZEROES),
            (T_DISCARD, BLK_F_DISCARD),
            (T_FLUSH, BLK_F_FLUSH),
        ][chosen];
        (needs == 0 || self.s.dev.info.has(needs)).then_some(typ)
    }

    fn kill_is_due(&self) -> bool {
        let (c, done) = (&self.m.c, self.m.st.kills);
        let pause = c.runtime / f64::from(c.kills + 1);
        done < c.kills && self.start.elapsed().as_secs_f64() > pause * f64::from(done + 1)
    }

    fn kill(&mut self, server: Option<&mut Server>) -> io::Result<()> {
        let Some(server) = server else {
            return Ok(());
        };
        self.m.st.kills += 1;
        if self.m.c.spoil == Some(Spoil::Double) {
            self.await_an_answer()?;
        }
        server.kill();
        let killed = Instant::now();
        // a process that ends takes nothing along that it has acknowledged; but without a record of what is in
        // flight some of it is lost or done late
        if !self.s.dev.info.inflight() {
            self.m.crash();
        }
        let ended = respawn(server, self.m.c.image.as_deref())?;
        // what it had answered is not in flight, and not its successor's answer
        self.collect()?;
        self.dead_since = Some(ended.unwrap_or(killed));
        self.m.st.in_flight_at_kills += self.outstanding() as u64;
        self.spoil()?;
        self.s.recover()?;
        self.last_completion = Instant::now();
        Ok(())
    }

    /// Afterwards something has been answered that can be said to be in flight.
    fn await_an_answer(&mut self) -> io::Result<()> {
        while self.flight.iter().flatten().all(Option::is_some) && !self.s.over() {
            self.completion_comes();
            self.collect()?;
        }
        Ok(())
    }

    /// Changes the record of one request, if that is asked for.
    fn spoil(&mut self) -> io::Result<()> {
        let Some(how) = self.m.c.spoil else { return Ok(()) };
        let wanted = |op: &Option<Op>| op.is_some() == (how == Spoil::Lose);
        let slots = self.flight.iter().map(|f| f.iter().position(wanted));
        match slots.enumerate().find_map(|(queue, slot)| Some((queue, slot?))) {
            Some((queue, slot)) => self.s.mark(queue, slot, how == Spoil::Double),
            None => Ok(()),
        }
    }

    /// Takes all completions that are there.
    fn collect(&mut self) -> io::Result<()> {
        for (n, (q, flight)) in self.s.qs.iter_mut().zip(&mut self.flight).enumerate() {
            while let Some((id, len)) = q.ring.pop() {
                self.last_completion = Instant::now();
                if let Some(t) = self.dead_since.take() {
                    self.m.st.resume_ms.push(t.elapsed().as_secs_f64() * 1e3);
                }
                let slot = q.slot(id);
                let Some(op) = flight.get_mut(slot).and_then(Option::take) else {
                    self.m.st.duplicates += 1;
                    self.m.tell(format!("DOUBLED answer, queue {n}, slot {slot}, head {id}"));
                    continue;
                };
                let (status, data) = (q.status(slot), q.data(slot, op.n * self.m.c.unit));
                self.m.done(&op, status, len, data);
                if let Some(d) = self.dump.as_ref().filter(|_| op.sweep && status == S_OK) {
                    for (k, seen) in data.chunks(self.m.c.unit).enumerate() {
                        let i = op.first + k;
                        d.put(self.m.offset(i), &self.m.expected(i, seen))?;
                    }
                }
            }
        }
        Ok(())
    }
}
