//! Pages of metadata that many channels change.

use super::*;
use crate::io::{IoEngine, IoKind, IoOp};
use std::sync::atomic::Ordering;

fn range(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len).unwrap()
}

/// An engine during whose page writes another thread stages the next change.
struct Busy {
    inner: SimEngine,
    other: Arc<std::sync::Mutex<Option<Channel>>>,
    next: u64,
    depth: usize,
    deepest: Arc<std::sync::atomic::AtomicUsize>,
}

impl IoEngine for Busy {
    fn attach(&mut self, id: FileId, file: &Arc<dyn HostFile>) -> std::io::Result<()> {
        self.inner.attach(id, file)
    }
    fn try_now(&mut self, op: &IoOp, bufs: &[BufSlice]) -> Option<Result<u64, i32>> {
        if op.kind == IoKind::Write && op.off.0 == 1 << 20 && self.next < 500 {
            self.depth += 1;
            self.deepest.fetch_max(self.depth, Ordering::SeqCst);
            // What another thread does while this one is in the kernel.
            let buf = Box::leak(Box::new(AlignedBuf::new(4096)));
            buf.as_mut_slice().fill(1);
            // SAFETY: leaked.
            let bufs = [unsafe { buf.as_buf() }];
            let slot = self.next as u16;
            self.next += 1;
            let r = range(self.next * 4096, 4096);
            if let Some(c) = self.other.lock().unwrap().as_mut() {
                c.submit(slot, Request::Write(r), &bufs);
            }
        }
        self.inner.try_now(op, bufs)
    }
    fn submit(&mut self, op: &IoOp, bufs: &[BufSlice], tag: crate::io::Tag) -> Result<(), crate::io::Full> {
        self.inner.submit(op, bufs, tag)
    }
    fn enter(&mut self) -> std::io::Result<()> {
        self.inner.enter()
    }
    fn reap(&mut self, out: &mut Vec<crate::io::Completion>) {
        self.depth = 0;
        self.inner.reap(out);
    }
    fn wait(&mut self, t: std::time::Duration) -> std::io::Result<()> {
        self.inner.wait(t)
    }
    fn event_fd(&self) -> Option<i32> {
        None
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
}

/// Pages that many channels change: the one that writes them serves its own guest, too, and its stack stays small.
#[test]
fn a_page_many_write_to_is_no_endless_task_for_one() {
    let files = [new_vdi(4 << 20, 4096, 1, None)];
    let disk = open(&files, true, DiskOptions::default());
    let mut engine = SimEngine::new(1);
    engine.inline_percent = 100;
    let mut other = Channel::new(disk.clone(), Box::new(engine), 600).unwrap();
    let mut inner = SimEngine::new(2);
    inner.inline_percent = 100;
    // Plenty of prepared blocks.
    let buf = AlignedBuf::new(4096 * 64);
    let mut data = AlignedBuf::new(4096 * 64);
    data.as_mut_slice().fill(3);
    for i in 0..5 {
        finish(&mut other, Request::Write(range((600 + i * 64) * 4096, 4096 * 64)), &data).unwrap();
    }
    drop(buf);
    let shared = Arc::new(std::sync::Mutex::new(Some(other)));
    let deepest = Arc::default();
    let busy = Busy { inner, other: shared.clone(), next: 0, depth: 0, deepest: Arc::clone(&deepest) };
    let mut c = Channel::new(disk, Box::new(busy), 1).unwrap();
    finish(&mut c, Request::Write(range(0, 4096)), &data_of(&data)).unwrap();
    let deepest = deepest.load(Ordering::SeqCst);
    let mut done = Vec::new();
    let mut other = shared.lock().unwrap().take().unwrap();
    for _ in 0..100_000 {
        for ch in [&mut c, &mut other] {
            ch.flush_queue().unwrap();
            ch.poll(&mut done);
        }
    }
    assert!(c.is_idle() && other.is_idle());
    assert!(deepest < 10, "{deepest} page writes within each other");
}

fn data_of(b: &AlignedBuf) -> AlignedBuf {
    let mut a = AlignedBuf::new(4096);
    a.as_mut_slice().copy_from_slice(&b.as_slice()[..4096]);
    a
}
