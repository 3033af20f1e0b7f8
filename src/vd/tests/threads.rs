//! Many threads, the engines of the operating system, real files: nobody waits for ever, and every sector holds what its
//! owner wrote last.

use super::*;
use crate::io::{EngineKind, OpenHow, OsFile, make_engine};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Sectors belong to threads in turns: every block has sectors of all of them.
struct Owner {
    disk: Arc<Disk>,
    kind: EngineKind,
    me: u64,
    threads: u64,
    rng: Rng,
    /// What a sector of ours holds: a value, or zeros as well.
    values: Vec<(u64, bool)>,
    busy: Vec<bool>,
    sectors: u64,
    shared: Arc<Vec<AtomicU64>>,
}

struct Asked {
    request: Request,
    sector: u64,
    value: u64,
    buf: AlignedBuf,
}

fn sector_range(sector: u64, n: u64) -> GuestRange {
    GuestRange::new(GuestOffset(sector * SECTOR), n * SECTOR).unwrap()
}

impl Owner {
    fn run(&mut self, operations: u64, depth: usize) {
        let engine = make_engine(self.kind, 8).unwrap().engine;
        let mut c = Channel::new(self.disk.clone(), engine, depth as u16).unwrap();
        let mut asked: Vec<Option<Asked>> = (0..depth).map(|_| None).collect();
        let (mut posted, mut done) = (0, Vec::new());
        loop {
            while posted < operations {
                let Some(slot) = asked.iter().position(Option::is_none) else { break };
                posted += 1;
                let Some(a) = self.next() else { continue };
                // SAFETY: kept with the request until that has ended.
                let buf = [unsafe { a.buf.as_buf() }];
                let bufs =
                    if matches!(a.request, Request::Read(_) | Request::Write(_)) { &buf[..] } else { &[] };
                let outcome = c.submit(slot as u16, a.request, bufs);
                asked[slot] = Some(a);
                if let Some(outcome) = outcome {
                    outcome.unwrap();
                    self.ended(asked[slot].take().unwrap());
                }
            }
            c.flush_queue().unwrap();
            c.poll(&mut done);
            let none = done.is_empty();
            for d in done.drain(..) {
                d.outcome.unwrap();
                self.ended(asked[usize::from(d.slot)].take().unwrap());
            }
            let waiting = asked.iter().any(Option::is_some) || !c.is_idle();
            if posted == operations && !waiting {
                return;
            }
            if none && waiting {
                wait(&c);
            }
        }
    }

    fn next(&mut self) -> Option<Asked> {
        let n = self.sectors / self.threads;
        let mine = self.rng.below(n);
        let sector = mine * self.threads + self.me;
        if self.busy[mine as usize] {
            return None;
        }
        let one = sector_range(sector, 1);
        let request = match self.rng.below(40) {
            0 => Request::Flush,
            1..=3 => Request::Discard(one),
            4 => Request::WriteZeroes { range: one, unmap: true },
            5..=12 => Request::Read(one),
            _ => Request::Write(one),
        };
        let mut buf = AlignedBuf::new(512);
        let value = if self.rng.chance(10) { 0 } else { 1 + self.rng.below(1 << 30) };
        if let Request::Write(_) = request {
            fill(buf.as_mut_slice(), sector, value);
        }
        if request != Request::Flush {
            self.busy[mine as usize] = true;
        }
        Some(Asked { request, sector, value, buf })
    }

    fn ended(&mut self, a: Asked) {
        if a.request == Request::Flush {
            return;
        }
        let i = (a.sector / self.threads) as usize;
        self.busy[i] = false;
        match a.request {
            Request::Write(_) => self.values[i] = (a.value, false),
            Request::WriteZeroes { .. } => self.values[i] = (0, false),
            Request::Discard(_) => self.values[i].1 = true,
            _ => self.compare(i, &a),
        }
        self.shared[a.sector as usize]
            .store(self.values[i].0 << 1 | u64::from(self.values[i].1), Ordering::SeqCst);
    }

    fn compare(&mut self, i: usize, a: &Asked) {
        let (value, or_zero) = self.values[i];
        let mut want = [0; 512];
        fill(&mut want, a.sector, value);
        let zero = or_zero && a.buf.as_slice().iter().all(|b| *b == 0);
        assert!(zero || a.buf.as_slice() == want, "sector {}: not value {value}", a.sector);
        self.values[i] = (if zero { 0 } else { value }, false);
    }
}

/// Sleeps as a worker does: until one of the channel's descriptors is readable.
fn wait(c: &Channel) {
    let mut fds: Vec<_> =
        c.event_fds().into_iter().map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    // SAFETY: the array lives through the call.
    let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 20_000) };
    assert!(n != 0, "nobody wakes {c:?}");
}

fn read(c: &mut Channel, sector: u64, buf: &AlignedBuf) {
    // SAFETY: the buffer outlives this function, which waits for the request's end.
    let bufs = [unsafe { buf.as_buf() }];
    if let Some(outcome) = c.submit(0, Request::Read(sector_range(sector, 1)), &bufs) {
        return outcome.unwrap();
    }
    let mut done = Vec::new();
    c.flush_queue().unwrap();
    while done.is_empty() {
        wait(c);
        c.poll(&mut done);
    }
    done[0].outcome.unwrap();
}

fn on_disk(path: &Path, vdi: &MemFile, direct: bool) -> Option<Arc<dyn HostFile>> {
    std::fs::write(path, vdi.bytes()).unwrap();
    let how = OpenHow { write: true, direct, ..OpenHow::default() };
    let f: Arc<dyn HostFile> = Arc::new(OsFile::open(path, how).ok()?);
    (f.traits().alignment.offset <= 512).then_some(f)
}

/// A parent in which about half of the sectors hold a value.
fn full_parent(values: &mut [u64], rng: &mut Rng) -> Arc<MemFile> {
    let f = new_vdi(values.len() as u64 * SECTOR, 65536, 1, None);
    let disk = open(std::slice::from_ref(&f), true, DiskOptions::default());
    let mut c = Channel::new(disk, Box::new(SimEngine::new(1)), 1).unwrap();
    let mut at = 0;
    while at < values.len() as u64 {
        let n = (1 + rng.below(256)).min(values.len() as u64 - at);
        if rng.chance(60) {
            let (mut buf, value) = (AlignedBuf::new((n * SECTOR) as usize), 1 + rng.below(1000));
            fill(buf.as_mut_slice(), at, value);
            finish(&mut c, Request::Write(sector_range(at, n)), &buf).unwrap();
            values[at as usize..(at + n) as usize].fill(value);
        }
        at += n;
    }
    c.close_disk(true).unwrap();
    f
}

fn stress(kind: EngineKind, direct: bool, block: u64, size: u64, diff: bool, seed: u64, ops: u64) {
    if make_engine(kind, 1).is_err() {
        return eprintln!("skipped: no {kind}");
    }
    let dir = crate::io::testing::scratch_dir();
    let sectors = size / SECTOR;
    let mut rng = Rng(seed);
    let mut start = vec![0; sectors as usize];
    let mut files: Vec<Arc<dyn HostFile>> = Vec::new();
    let top = new_vdi(size, block, 2, diff.then_some(1));
    let Some(f) = on_disk(&dir.path().join("top.vdi"), &top, direct) else { return };
    files.push(f);
    let mut images = vec![top];
    if diff {
        let base = full_parent(&mut start, &mut rng);
        let Some(f) = on_disk(&dir.path().join("base.vdi"), &base, direct) else { return };
        files.push(f);
        images.push(base);
    }
    let layers = images.iter().zip(0u16..).map(|(f, i)| {
        let how = format::OpenHow { read_only: i > 0, info_only: false };
        let map = format::open_single(Format::Vdi, &f.bytes() as &dyn ByteSource, FileId(i), how).unwrap();
        Layer { number: u32::from(i), map: map.into() }
    });
    let chain = Chain::new(layers.collect());
    let disk = Disk::new(chain, files, DiskOptions::default(), Arc::new(TestHost), Box::new(|| ()));
    let threads = 4;
    let shared: Arc<Vec<AtomicU64>> = Arc::new(start.iter().map(|v| AtomicU64::new(v << 1)).collect());
    std::thread::scope(|s| {
        for me in 0..threads {
            let own = (0..sectors / threads).map(|i| (start[(i * threads + me) as usize], false)).collect();
            let mut owner = Owner {
                disk: disk.clone(),
                kind,
                me,
                threads,
                rng: Rng(seed << 8 | me),
                values: own,
                busy: vec![false; (sectors / threads) as usize],
                sectors,
                shared: shared.clone(),
            };
            s.spawn(move || owner.run(ops, 24));
        }
    });
    assert_eq!(disk.shared.claims.held(), 0);
    let mut c = Channel::new(disk, make_engine(kind, 8).unwrap().engine, 1).unwrap();
    let mut buf = AlignedBuf::new(512);
    let mut want = [0; 512];
    for sector in 0..sectors {
        buf.as_mut_slice().fill(0x5a);
        read(&mut c, sector, &buf);
        let v = shared[sector as usize].load(Ordering::SeqCst);
        fill(&mut want, sector, v >> 1);
        let zero = v & 1 == 1 && buf.as_slice().iter().all(|b| *b == 0);
        assert!(zero || buf.as_slice() == want, "sector {sector} of {kind}, seed {seed}");
    }
    c.close_disk(true).unwrap();
    drop(c);
    let bytes = std::fs::read(dir.path().join("top.vdi")).unwrap();
    let report = format::vdi::check(&bytes as &dyn ByteSource).unwrap();
    assert!(report.is_clean(), "{kind}, seed {seed}: {report:?}");
}

fn everywhere(diff: bool) {
    let rounds = std::env::var("VDBLK_ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    for seed in 0..rounds {
        for kind in [EngineKind::IoUring, EngineKind::Threads] {
            for direct in [false, true] {
                stress(kind, direct, 4096, 4 << 20, diff, seed, 6000);
                stress(kind, direct, 1 << 20, 16 << 20, diff, seed, 2000);
            }
        }
    }
}

#[test]
fn threads_on_a_base_do_not_disturb_each_other() {
    everywhere(false);
}

#[test]
fn threads_on_a_diff_do_not_disturb_each_other() {
    everywhere(true);
}
