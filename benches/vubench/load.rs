//! Timed workloads: one thread per queue, closed loop at a fixed depth.
use crate::cpu::Cpu;
use crate::features::*;
use crate::hist::Hist;
use crate::queue::{Queue, Req};
use crate::rng::Rng;
use std::io;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq, Debug, clap::ValueEnum)]
pub(crate) enum Workload {
    Read,
    Write,
    #[value(name = "randread")]
    RandRead,
    #[value(name = "randwrite")]
    RandWrite,
    #[value(name = "randrw")]
    RandRw,
    Discard,
    #[value(name = "write_zeroes")]
    WriteZeroes,
    FlushMix,
}

impl Workload {
    fn sequential(self) -> bool {
        matches!(self, Workload::Read | Workload::Write)
    }
}

pub(crate) struct Job {
    pub(crate) rw: Workload,
    pub(crate) bs: usize,
    pub(crate) depth: usize,
    pub(crate) runtime: f64,
    pub(crate) ramp: f64,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) seed: u64,
    pub(crate) poll: bool,
    /// cover the range exactly once instead of running for a time
    pub(crate) once: bool,
    pub(crate) read_pct: u64,
    pub(crate) flush_every: u64,
    pub(crate) unmap: bool,
}

/// A request that takes longer than this is called lost.
const STALL: Duration = Duration::from_secs(20);

/// What one queue saw.
struct Tally {
    hist: Hist,
    errors: u64,
    bad_len: u64,
    stalled: bool,
}

pub(crate) struct Out {
    pub(crate) hist: Hist,
    pub(crate) errors: u64,
    /// completions with a used length other than the request's
    pub(crate) bad_len: u64,
    pub(crate) kicks: u64,
    pub(crate) wakes: u64,
    pub(crate) secs: f64,
    pub(crate) stalled: bool,
    pub(crate) cpu: Cpu,
}

/// Produces the next request of one queue.
struct Gen<'a> {
    j: &'a Job,
    rng: Rng,
    start: u64,
    blocks: u64,
    next: u64,
    order: Vec<u32>,
    n: u64,
}

impl<'a> Gen<'a> {
    fn new(j: &'a Job, queue: usize, per: u64) -> Gen<'a> {
        let mut rng = Rng(j.seed ^ (queue as u64) << 32);
        let mut order = Vec::new();
        if j.once && !j.rw.sequential() {
            order = (0..per as u32).collect();
            for i in (1..order.len()).rev() {
                order.swap(i, rng.below(i as u64 + 1) as usize);
            }
        }
        // random jobs without --once roam over the whole range
        let (first, blocks) =
            if !j.once && !j.rw.sequential() { (0, j.size / j.bs as u64) } else { (per * queue as u64, per) };
        Gen { j, rng, start: j.offset + first * j.bs as u64, blocks, next: 0, order, n: 0 }
    }

    fn block(&mut self) -> Option<u64> {
        let at = self.next;
        if self.j.once {
            if at == self.blocks {
                return None;
            }
            self.next += 1;
            Some(self.order.get(at as usize).map_or(at, |b| u64::from(*b)))
        } else if self.j.rw.sequential() {
            self.next = (at + 1) % self.blocks;
            Some(at)
        } else {
            Some(self.rng.below(self.blocks))
        }
    }

    fn next(&mut self) -> Option<Req> {
        let j = self.j;
        self.n += 1;
        if j.rw == Workload::FlushMix && self.n.is_multiple_of(j.flush_every) {
            return Some(Req { typ: T_FLUSH, off: 0, len: 0, flags: 0 });
        }
        let b = self.block()?;
        let typ = match j.rw {
            Workload::Read | Workload::RandRead => T_IN,
            Workload::Write | Workload::RandWrite | Workload::FlushMix => T_OUT,
            Workload::RandRw if self.rng.below(100) < j.read_pct => T_IN,
            Workload::RandRw => T_OUT,
            Workload::Discard => T_DISCARD,
            Workload::WriteZeroes => T_WRITE_ZEROES,
        };
        Some(Req {
            typ,
            off: self.start + b * j.bs as u64,
            len: j.bs as u32,
            flags: u32::from(j.rw == Workload::WriteZeroes && j.unmap),
        })
    }
}

/// What the threads tell each other.
struct Shared {
    stop: AtomicBool,
    measuring: AtomicBool,
    /// passed twice: all ready, all done
    barrier: Barrier,
}

pub(crate) fn run(qs: &mut [Queue], j: &Job, pid: Option<i32>) -> io::Result<Out> {
    let per = j.size / j.bs as u64 / qs.len() as u64;
    if per == 0 {
        return Err(io::Error::other("range smaller than one block per queue"));
    }
    let sh = Shared {
        stop: AtomicBool::new(false),
        measuring: AtomicBool::new(j.once || j.ramp == 0.0),
        barrier: Barrier::new(qs.len() + 1),
    };
    Ok(std::thread::scope(|s| {
        let threads: Vec<_> = qs
            .iter_mut()
            .enumerate()
            .map(|(i, q)| {
                let sh = &sh;
                s.spawn(move || drive(q, j, i, per, sh))
            })
            .collect();
        let mut out = time(j, pid, &sh);
        for t in threads {
            let (tally, kicks, wakes) = t.join().expect("a queue's thread panicked");
            out.hist.merge(&tally.hist);
            out.errors += tally.errors;
            out.bad_len += tally.bad_len;
            out.stalled |= tally.stalled;
            out.kicks += kicks;
            out.wakes += wakes;
        }
        out
    }))
}

/// The clock's side of a run: when measuring starts and ends.
fn time(j: &Job, pid: Option<i32>, sh: &Shared) -> Out {
    sh.barrier.wait();
    if !j.once && j.ramp > 0.0 {
        std::thread::sleep(Duration::from_secs_f64(j.ramp));
    }
    let (c0, t0) = (Cpu::now(pid), Instant::now());
    sh.measuring.store(true, Relaxed);
    if j.once {
        sh.barrier.wait();
    } else {
        std::thread::sleep(Duration::from_secs_f64(j.runtime));
        sh.measuring.store(false, Relaxed);
    }
    let (secs, cpu) = (t0.elapsed().as_secs_f64(), Cpu::now(pid).since(c0));
    if !j.once {
        sh.stop.store(true, Relaxed);
        sh.barrier.wait();
    }
    Out { hist: Hist::new(), errors: 0, bad_len: 0, kicks: 0, wakes: 0, secs, stalled: false, cpu }
}

fn drive(q: &mut Queue, j: &Job, index: usize, per: u64, sh: &Shared) -> (Tally, u64, u64) {
    let mut r = Gen::new(j, index, per);
    for slot in 0..j.depth {
        for b in q.data(slot, j.bs).chunks_mut(8) {
            b.copy_from_slice(&r.rng.draw().to_le_bytes()[..b.len()]);
        }
    }
    sh.barrier.wait();
    let tally = queue_loop(q, j, &mut r, sh);
    sh.barrier.wait();
    (tally, q.ring.kicks, q.wakes)
}

fn queue_loop(q: &mut Queue, j: &Job, g: &mut Gen, sh: &Shared) -> Tally {
    let mut t = Tally { hist: Hist::new(), errors: 0, bad_len: 0, stalled: false };
    let mut posted: Vec<Option<(Req, Instant)>> = vec![None; j.depth];
    let mut free: Vec<usize> = (0..j.depth).rev().collect();
    let mut dry = false;
    loop {
        let quit = dry || sh.stop.load(Relaxed);
        if !quit {
            dry = !refill(q, g, &mut free, &mut posted);
        }
        if free.len() == j.depth && (quit || dry) {
            return t;
        }
        if !q.wait(j.poll, STALL) {
            t.stalled = true;
            return t;
        }
        let (now, measuring) = (Instant::now(), sh.measuring.load(Relaxed));
        while let Some((id, len)) = q.ring.pop() {
            let s = q.slot(id);
            let Some((r, at)) = posted.get_mut(s).and_then(Option::take) else {
                t.errors += 1;
                continue;
            };
            let good = q.status(s) == S_OK;
            t.errors += u64::from(!good);
            t.bad_len += u64::from(good && len != r.used_len());
            if measuring {
                t.hist.add((now - at).as_nanos() as u64);
            }
            free.push(s);
        }
    }
}

/// Posts requests in all free slots; false once there are none to post.
fn refill(q: &mut Queue, g: &mut Gen, free: &mut Vec<usize>, posted: &mut [Option<(Req, Instant)>]) -> bool {
    let now = Instant::now();
    let mut more = true;
    while let Some(s) = free.pop() {
        let Some(r) = g.next() else {
            free.push(s);
            more = false;
            break;
        };
        q.submit(s, r);
        posted[s] = Some((r, now));
    }
    q.flush_kick();
    more
}
