//! One suite for the engines of the operating system, on a real file system and on tmpfs.

use super::testing::{Rng, scratch_dir};
use super::*;
use crate::limits::{INLINE_WRITE_BYTES, MAX_IOVECS};
use crate::map::{FileId, HostOffset};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const FILE: FileId = FileId(3);
const KINDS: [EngineKind; 2] = [EngineKind::IoUring, EngineKind::Threads];
const LONG: Duration = Duration::from_secs(20);
const RW: OpenHow = OpenHow { write: true, direct: false, create_new: false };

/// An engine with one file, and memory to move.
struct Rig {
    engine: Box<dyn IoEngine>,
    file: Arc<dyn HostFile>,
    mem: AlignedBuf,
    /// Results reaped and not asked for yet.
    done: HashMap<Tag, Result<u64, i32>>,
    next_tag: u64,
    _dir: Arc<TempDir>,
}

/// Runs a test with every engine that works here, in a directory on every kind of file system.
fn everywhere(test: impl Fn(EngineKind, &Arc<TempDir>)) {
    for kind in KINDS {
        if let Err(e) = make_engine(kind, 1) {
            eprintln!("skipped: {kind}: {e}");
            continue;
        }
        test(kind, &Arc::new(scratch_dir()));
        match tempfile::tempdir_in("/dev/shm") {
            Ok(dir) => test(kind, &Arc::new(dir)),
            Err(e) => eprintln!("skipped: no tmpfs: {e}"),
        }
    }
}

fn engine(kind: EngineKind, depth: u32) -> Box<dyn IoEngine> {
    make_engine(kind, depth).expect("checked by `everywhere`").engine
}

fn open(path: &Path, how: OpenHow) -> Arc<dyn HostFile> {
    Arc::new(OsFile::open(path, how).expect("open"))
}

impl Rig {
    fn new(kind: EngineKind, dir: &Arc<TempDir>, depth: u32, content: &[u8]) -> Rig {
        let path = dir.path().join(format!("{kind}-{depth}"));
        std::fs::write(&path, content).expect("write");
        Rig::on(kind, dir, depth, open(&path, RW))
    }

    fn on(kind: EngineKind, dir: &Arc<TempDir>, depth: u32, file: Arc<dyn HostFile>) -> Rig {
        let mut engine = engine(kind, depth);
        engine.attach(FILE, &file).expect("attach");
        let mem = AlignedBuf::new(2 << 20);
        Rig { engine, file, mem, done: HashMap::new(), next_tag: 0, _dir: Arc::clone(dir) }
    }

    /// A piece of the memory.
    fn buf(&self, at: usize, len: usize) -> BufSlice {
        // SAFETY: the memory lives as long as the rig, which drops its engine first; tests make no reference to
        // it while operations are in flight.
        unsafe { self.mem.as_buf() }.part(at, len)
    }

    fn start(&mut self, kind: IoKind, off: u64, len: u64, bufs: &[BufSlice]) -> Result<Tag, Full> {
        let tag = Tag(self.next_tag);
        let op = IoOp { kind, file: FILE, off: HostOffset(off), len };
        self.engine.submit(&op, bufs, tag)?;
        self.next_tag += 1;
        Ok(tag)
    }

    fn end(&mut self, tag: Tag) -> Result<u64, i32> {
        let until = Instant::now() + LONG;
        let mut out = Vec::new();
        loop {
            if let Some(r) = self.done.remove(&tag) {
                return r;
            }
            assert!(Instant::now() < until, "{tag:?} does not end");
            self.engine.enter().expect("enter");
            self.engine.wait(Duration::from_secs(1)).expect("wait");
            self.engine.reap(&mut out);
            for c in out.drain(..) {
                assert!(self.done.insert(c.tag, c.result).is_none(), "ended twice");
            }
        }
    }

    fn run(&mut self, kind: IoKind, off: u64, len: u64, bufs: &[BufSlice]) -> Result<u64, i32> {
        let tag = self.start(kind, off, len, bufs).expect("room");
        self.end(tag)
    }

    fn now(&mut self, kind: IoKind, off: u64, bufs: &[BufSlice]) -> Option<Result<u64, i32>> {
        let op = IoOp { kind, file: FILE, off: HostOffset(off), len: total_len(bufs) };
        self.engine.try_now(&op, bufs)
    }

    fn fill(&self, at: usize, data: &[u8]) {
        self.buf(at, data.len()).write(data);
    }

    fn bytes(&self, at: usize, len: usize) -> Vec<u8> {
        let mut v = vec![0; len];
        self.buf(at, len).read(&mut v);
        v
    }
}

/// A read or write of the random test.
struct Piece {
    kind: IoKind,
    off: usize,
    len: usize,
    /// Where its memory begins.
    mem: usize,
}

/// Bytes of the file that one operation of a round may touch, and of its memory.
const LANE: usize = 64 << 10;
const LANES: usize = 24;

fn random_piece(rng: &mut Rng, lane: usize) -> Piece {
    let at = rng.below(LANE as u64 - 1) as usize;
    let len = match rng.below(3) {
        0 => 1 + rng.below((LANE - at) as u64) as usize,
        _ => (1 + rng.below(5000) as usize).min(LANE - at),
    };
    let kind = if rng.below(2) == 0 { IoKind::Read } else { IoKind::Write };
    Piece { kind, off: lane * LANE + at, len, mem: lane * LANE }
}

fn scattered(rng: &mut Rng, rig: &Rig, p: &Piece) -> Vec<BufSlice> {
    let (mut at, end) = (p.mem, p.mem + p.len);
    let mut bufs = Vec::new();
    while at < end {
        let n = if bufs.len() == 20 { end - at } else { 1 + rng.below((end - at) as u64) as usize };
        bufs.push(rig.buf(at, n));
        at += n;
    }
    bufs
}

/// Many reads and writes at once; none overlap.
fn round_of_pieces(rng: &mut Rng, rig: &mut Rig, model: &mut Vec<u8>) {
    let mut running = Vec::new();
    for lane in 0..LANES {
        if rng.below(4) == 0 {
            continue;
        }
        let p = random_piece(rng, lane);
        let bufs = scattered(rng, rig, &p);
        let data: Vec<u8> = (0..p.len).map(|_| rng.below(256) as u8).collect();
        rig.fill(p.mem, &data);
        let now = if rng.below(3) == 0 { rig.now(p.kind, p.off as u64, &bufs) } else { None };
        let started = match now {
            Some(r) => Err(r),
            None => Ok(rig.start(p.kind, p.off as u64, p.len as u64, &bufs).expect("room")),
        };
        running.push((p, data, started));
    }
    for (p, data, started) in running {
        let moved = started.map_or_else(|r| r, |tag| rig.end(tag)).expect("no error") as usize;
        assert!(moved <= p.len);
        if p.kind == IoKind::Write {
            assert_eq!(moved, p.len);
            model.resize(model.len().max(p.off + p.len), 0);
            model[p.off..p.off + p.len].copy_from_slice(&data);
        } else {
            // The file may have grown meanwhile, by a piece further on.
            let want: Vec<u8> = (p.off..p.off + moved).map(|i| model.get(i).copied().unwrap_or(0)).collect();
            assert_eq!(rig.bytes(p.mem, moved), want);
        }
    }
}

/// False where the file system cannot do it and said so.
fn supported(done: Result<u64, i32>) -> bool {
    assert!(matches!(done, Ok(0) | Err(libc::EOPNOTSUPP)), "{done:?}");
    done.is_ok()
}

/// Bytes that are durable when it ends: one buffer or two, somewhere in the file or behind its end.
fn write_through(rng: &mut Rng, rig: &mut Rig, model: &mut Vec<u8>, at: usize) {
    let data = vec![rng.below(256) as u8; 2 + rng.below(4000) as usize];
    rig.fill(0, &data);
    let cut = rng.below(data.len() as u64) as usize;
    let bufs = match cut {
        0 => vec![rig.buf(0, data.len())],
        cut => vec![rig.buf(0, cut), rig.buf(cut, data.len() - cut)],
    };
    let len = data.len() as u64;
    assert_eq!(rig.now(IoKind::WriteThrough, at as u64, &bufs), None, "it waits for the disk");
    assert_eq!(rig.run(IoKind::WriteThrough, at as u64, len, &bufs), Ok(len));
    model.resize(model.len().max(at + data.len()), 0);
    model[at..at + data.len()].copy_from_slice(&data);
}

/// One operation that concerns the whole file.
fn change_extents(rng: &mut Rng, rig: &mut Rig, model: &mut Vec<u8>) {
    let max = (LANES * LANE) as u64;
    let off = rng.below(max);
    let len = 1 + rng.below(max - off);
    let (start, end) = (off as usize, (off + len) as usize);
    match rng.below(6) {
        0 => assert_eq!(rig.run(IoKind::Sync, 0, 0, &[]), Ok(0)),
        5 => write_through(rng, rig, model, start),
        1 => {
            if supported(rig.run(IoKind::Allocate, off, len, &[])) {
                model.resize(model.len().max(end), 0);
            }
        }
        2 => {
            assert_eq!(rig.run(IoKind::Truncate, off, 0, &[]), Ok(0));
            model.resize(start, 0);
        }
        n => {
            let kind = if n == 3 { IoKind::Punch } else { IoKind::ZeroRange };
            let done = rig.run(kind, off, len, &[]);
            assert!(kind == IoKind::Punch || done.is_ok(), "zeros are written at worst");
            if supported(done) {
                let size = model.len();
                model[start.min(size)..end.min(size)].fill(0);
            }
        }
    }
    assert_eq!(rig.file.len().expect("length"), model.len() as u64);
}

#[test]
fn random_operations_match_a_model() {
    everywhere(|kind, dir| {
        for seed in 0..6 {
            let mut rng = Rng::new(seed);
            let mut rig = Rig::new(kind, dir, 32, &[]);
            let mut model = Vec::new();
            for _ in 0..30 {
                round_of_pieces(&mut rng, &mut rig, &mut model);
                change_extents(&mut rng, &mut rig, &mut model);
            }
            let content = std::fs::read(rig.file.path()).expect("read");
            assert!(content == model, "{kind} with seed {seed}: the file differs");
            assert_eq!(rig.engine.in_flight(), 0);
        }
    });
}

#[test]
fn reads_end_with_the_file() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 4, &[7; 5000]);
        let b = rig.buf(0, 4096);
        let two = [rig.buf(0, 1000), rig.buf(4096, 1000)];
        assert_eq!(rig.run(IoKind::Read, 4000, 4096, &[b]), Ok(1000));
        assert_eq!(rig.run(IoKind::Read, 3500, 2000, &two), Ok(1500));
        assert_eq!(rig.run(IoKind::Read, 5000, 4096, &[b]), Ok(0));
        assert_eq!(rig.run(IoKind::Read, 1 << 40, 4096, &[b]), Ok(0));
        assert_eq!(rig.run(IoKind::Read, 0, 0, &[]), Ok(0));
        assert_eq!(rig.now(IoKind::Read, 4000, &[b]), Some(Ok(1000)));
    });
}

#[test]
fn more_buffers_than_one_call_takes_are_a_short_operation() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 4, &[]);
        let bufs: Vec<BufSlice> = (0..MAX_IOVECS + 10).map(|i| rig.buf(i, 1)).collect();
        let n = bufs.len() as u64;
        assert_eq!(rig.run(IoKind::Write, 0, n, &bufs), Ok(MAX_IOVECS as u64));
        assert_eq!(rig.run(IoKind::Read, 0, n, &bufs), Ok(MAX_IOVECS as u64));
    });
}

#[test]
fn a_full_engine_says_so_and_recovers() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 4, &[7; 4096]);
        let b = rig.buf(0, 512);
        for _ in 0..3 {
            let tags: Vec<Tag> =
                (0..4).map(|_| rig.start(IoKind::Read, 0, 512, &[b]).expect("room")).collect();
            assert_eq!(rig.start(IoKind::Read, 0, 512, &[b]), Err(Full));
            rig.engine.enter().expect("enter");
            assert_eq!(rig.start(IoKind::Read, 0, 512, &[b]), Err(Full), "not before they are reaped");
            assert_eq!(rig.engine.in_flight(), 4);
            tags.into_iter().for_each(|t| assert_eq!(rig.end(t), Ok(512)));
        }
    });
}

#[test]
fn mistakes_are_answered_as_completions() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 8, &[7; 4096]);
        let b = rig.buf(0, 512);
        for id in [FileId(0), FileId(9), FileId(u16::MAX)] {
            let op = IoOp { kind: IoKind::Read, file: id, off: HostOffset(0), len: 512 };
            rig.engine.submit(&op, &[b], Tag(1000)).expect("room");
            assert_eq!(rig.end(Tag(1000)), Err(libc::EBADF));
            assert_eq!(rig.engine.try_now(&op, &[b]), None);
        }
        // past the largest offset; and the one that io_uring takes for "where the last one ended"
        for off in [1 << 63, u64::MAX] {
            assert_eq!(rig.run(IoKind::Read, off, 512, &[b]), Err(libc::EINVAL));
            assert_eq!(rig.run(IoKind::Truncate, off, 0, &[]), Err(libc::EINVAL));
        }
        let ro = open(rig.file.path(), OpenHow::default());
        rig.engine.attach(FILE, &ro).expect("another file takes the number");
        assert_eq!(rig.run(IoKind::Write, 0, 512, &[b]), Err(libc::EBADF));
        assert_eq!(rig.now(IoKind::Write, 0, &[b]), None);
        let memory: Arc<dyn HostFile> = Arc::new(MemFile::default());
        assert_eq!(rig.engine.attach(FILE, &memory).map_err(|e| e.raw_os_error()), Err(Some(libc::EBADF)));
    });
}

#[test]
fn a_number_is_not_taken_from_a_busy_file() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 8, &[7; 4096]);
        let tag = rig.start(IoKind::Sync, 0, 0, &[]).expect("room");
        let file = Arc::clone(&rig.file);
        let busy = rig.engine.attach(FILE, &file).expect_err("busy");
        assert_eq!(busy.raw_os_error(), Some(libc::EBUSY));
        rig.engine.attach(FileId(0), &file).expect("other numbers are free");
        assert_eq!(rig.end(tag), Ok(0));
        rig.engine.attach(FILE, &file).expect("idle");
    });
}

#[test]
fn zeros_keep_the_length_of_the_file() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 8, &[7; 1_500_000]);
        // longer than one piece of written zeros, unaligned, and past the end
        assert_eq!(rig.run(IoKind::ZeroRange, 333, 900_000, &[]), Ok(0));
        assert_eq!(rig.run(IoKind::ZeroRange, 1_400_001, 900_000, &[]), Ok(0));
        assert_eq!(rig.run(IoKind::ZeroRange, 2_000_000, 4096, &[]), Ok(0));
        assert_eq!(rig.run(IoKind::Write, 1_400_000, 1, &[rig.buf(0, 1)]), Ok(1));
        let got = std::fs::read(rig.file.path()).expect("read");
        assert_eq!(got.len(), 1_500_000);
        let zero = |i: usize| (333..900_333).contains(&i) || i >= 1_400_000;
        assert!(got.iter().enumerate().all(|(i, b)| *b == if zero(i) { 0 } else { 7 }));
    });
}

#[test]
fn punched_and_allocated_space_is_accounted() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 8, &[]);
        if !supported(rig.run(IoKind::Allocate, 0, 4 << 20, &[])) {
            return eprintln!("skipped: no fallocate in {}", dir.path().display());
        }
        assert!(rig.file.allocated().expect("blocks") >= 4 << 20);
        assert_eq!(rig.run(IoKind::ZeroRange, 0, 4 << 20, &[]), Ok(0));
        assert!(rig.file.allocated().expect("blocks") >= 4 << 20, "zeroed space stays");
        assert_eq!(rig.run(IoKind::Punch, 0, 2 << 20, &[]), Ok(0));
        assert!(rig.file.allocated().expect("blocks") < 3 << 20);
        assert_eq!(rig.file.len().expect("length"), 4 << 20);
    });
}

/// True if epoll finds the descriptor readable within the time.
fn epoll_readable(fd: RawFd, at_most: Duration) -> bool {
    let ep = epoll::create(true).expect("epoll");
    // SAFETY: just made, and nobody else's.
    let ep: std::os::fd::OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(ep) };
    let event = epoll::Event::new(epoll::Events::EPOLLIN, 1);
    epoll::ctl(ep.as_raw_fd(), epoll::ControlOptions::EPOLL_CTL_ADD, fd, event).expect("add");
    let until = Instant::now() + at_most;
    loop {
        let mut got = [epoll::Event::new(epoll::Events::empty(), 0)];
        let left = until.saturating_duration_since(Instant::now());
        match epoll::wait(ep.as_raw_fd(), left.as_millis() as i32, &mut got) {
            Ok(n) => return n > 0,
            // completions that are worked through by this thread interrupt it
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::Interrupted),
        }
    }
}

#[test]
fn the_event_descriptor_follows_the_completions() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 8, &[7; 65536]);
        let fd = rig.engine.event_fd().expect("engines of the operating system have one");
        let b = rig.buf(0, 4096);
        let none = Duration::from_millis(5);
        assert!(!epoll_readable(fd, none));
        let ops: [(IoKind, &[BufSlice]); 4] =
            [(IoKind::Read, &[b]), (IoKind::Write, &[b]), (IoKind::Sync, &[]), (IoKind::ZeroRange, &[])];
        for (op, bufs) in ops {
            let tag = rig.start(op, 4096, 4096, bufs).expect("room");
            rig.engine.enter().expect("enter");
            // a reap that finds nothing yet, or an intermediate step, must not swallow the event
            let mut out = Vec::new();
            while out.is_empty() {
                assert!(epoll_readable(fd, LONG), "{kind}: {op:?}");
                rig.engine.reap(&mut out);
            }
            assert!(out.len() == 1 && out[0].tag == tag && out[0].result.is_ok());
            assert!(!epoll_readable(fd, none), "{kind}: {op:?} was reaped");
        }
        // one that ends before the kernel has seen it
        let op = IoOp { kind: IoKind::Read, file: FileId(77), off: HostOffset(0), len: 512 };
        rig.engine.submit(&op, &[b], Tag(99)).expect("room");
        rig.engine.enter().expect("enter");
        assert!(epoll_readable(fd, LONG));
    });
}

#[test]
fn waiting_is_bounded() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 8, &[7; 4096]);
        let t = Instant::now();
        rig.engine.wait(LONG).expect("nothing in flight: nothing to wait for");
        assert!(t.elapsed() < LONG / 2);
        let tag = rig.start(IoKind::Sync, 0, 0, &[]).expect("room");
        rig.engine.wait(Duration::ZERO).expect("no time");
        assert_eq!(rig.end(tag), Ok(0));
    });
}

#[test]
fn dropping_waits_for_what_is_in_flight() {
    everywhere(|kind, dir| {
        for queued in [0, 5] {
            let mut rig = Rig::new(kind, dir, 64, &[7; 1 << 20]);
            for i in 0..16 {
                let b = rig.buf(i * LANE, LANE);
                let kind = if i % 2 == 0 { IoKind::Write } else { IoKind::Read };
                rig.start(kind, (i * LANE) as u64, LANE as u64, &[b]).expect("room");
            }
            rig.start(IoKind::Sync, 0, 0, &[]).expect("room");
            rig.engine.enter().expect("enter");
            for i in 0..queued {
                let b = rig.buf(i * LANE, LANE);
                rig.start(IoKind::Read, 0, LANE as u64, &[b]).expect("room");
            }
            drop(rig.engine);
            rig.mem.as_mut_slice().fill(1);
            std::thread::sleep(Duration::from_millis(10));
            assert!(
                rig.mem.as_slice().iter().all(|b| *b == 1),
                "{kind} wrote to memory after it was dropped"
            );
        }
    });
}

#[test]
fn an_engine_moves_to_the_thread_that_uses_it() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 16, &[7; 65536]);
        let b = rig.buf(0, 4096);
        let rig = std::thread::scope(|s| {
            let user = s.spawn(move || {
                assert_eq!(rig.run(IoKind::Read, 0, 4096, &[b]), Ok(4096));
                for _ in 0..8 {
                    rig.start(IoKind::Sync, 0, 0, &[]).expect("room");
                }
                rig.engine.enter().expect("enter");
                rig
            });
            user.join().expect("user")
        });
        // with operations in flight, on a third thread
        drop(rig);
    });
}

#[test]
fn cached_reads_and_small_writes_are_done_at_once() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 8, &[7; 1 << 20]);
        let (b, large) = (rig.buf(0, 4096), rig.buf(0, INLINE_WRITE_BYTES as usize + 1));
        assert_eq!(rig.now(IoKind::Read, 4096, &[b]), Some(Ok(4096)), "{kind}: it is in the cache");
        assert_eq!(rig.bytes(0, 4096), [7; 4096]);
        rig.fill(0, &[9; 4096]);
        // an inline write may be put off after a slow one; not for long
        let until = Instant::now() + LONG;
        let done = std::iter::repeat_with(|| rig.now(IoKind::Write, 100, &[b])).find_map(|r| {
            assert!(Instant::now() < until);
            r
        });
        assert_eq!(done, Some(Ok(4096)));
        assert_eq!(std::fs::read(rig.file.path()).expect("read")[100..4196], [9; 4096]);
        assert_eq!(rig.now(IoKind::Write, 0, &[large]), None);
        assert_eq!(rig.now(IoKind::Sync, 0, &[]), None);
    });
}

#[test]
fn large_writes_of_jobs_are_done_at_once_and_reach_no_further_than_they_say() {
    everywhere(|kind, dir| {
        let mut rig = Rig::new(kind, dir, 8, &[7; 100]);
        rig.engine.be_patient(true);
        rig.fill(0, &[9; 1 << 20]);
        let b = rig.buf(0, 1 << 20);
        // into a hole behind the end, over what is there, and a small one: space that is taken first shows nowhere
        for off in [3 << 20, (3 << 20) + 4096, 50] {
            assert_eq!(rig.now(IoKind::Write, off, &[b]), Some(Ok(1 << 20)), "{kind}");
        }
        let end = (4 << 20) + 4096;
        assert_eq!(rig.file.len().expect("length"), end as u64);
        let mut model = vec![0; end];
        model[..50].fill(7);
        model[50..50 + (1 << 20)].fill(9);
        model[3 << 20..].fill(9);
        assert!(std::fs::read(rig.file.path()).expect("read") == model, "{kind}");
    });
}

#[test]
fn unbuffered_files_go_through_the_engine() {
    everywhere(|kind, dir| {
        let how = OpenHow { direct: true, create_new: true, ..RW };
        let path = dir.path().join("direct");
        let file = match OsFile::open(&path, how) {
            Ok(f) if f.traits().direct => f,
            _ => return eprintln!("skipped: no O_DIRECT on {}", dir.path().display()),
        };
        let mut rig = Rig::on(kind, dir, 32, Arc::new(file));
        let align = rig.file.traits().alignment;
        let data: Vec<u8> = (0..LANE).map(|i| (i / 512) as u8).collect();
        rig.fill(0, &data);
        let parts = [rig.buf(0, 8192), rig.buf(8192, LANE - 8192)];
        assert!(align.fits(8192, &parts));
        assert_eq!(rig.now(IoKind::Write, 8192, &parts), None);
        assert_eq!(rig.run(IoKind::Write, 8192, LANE as u64, &parts), Ok(LANE as u64));
        let b = rig.buf(LANE, LANE);
        assert_eq!(rig.now(IoKind::Read, 8192, &[b]), None);
        let tags: Vec<Tag> = (0..32)
            .map(|i| {
                let b = rig.buf(LANE + i * 2048, 2048);
                rig.start(IoKind::Read, 8192 + 2048 * i as u64, 2048, &[b]).expect("room")
            })
            .collect();
        let fits = align.fits(2048, &[rig.buf(2048, 2048)]);
        for t in tags {
            assert_eq!(rig.end(t), if fits { Ok(2048) } else { Err(libc::EINVAL) });
        }
        if fits {
            assert_eq!(rig.bytes(LANE, LANE), data);
        }
        assert_eq!(rig.run(IoKind::ZeroRange, 8192, 4096, &[]), Ok(0));
        assert_eq!(rig.run(IoKind::Read, 8192, 8192, &[rig.buf(0, 8192)]), Ok(8192));
        assert!(rig.bytes(0, 4096).iter().all(|b| *b == 0) && rig.bytes(4096, 4096) == data[4096..8192]);
    });
}
