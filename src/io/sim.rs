//! An engine on one thread with a seed: operations end in any order, at any time, some of them in two halves.

use super::{
    BufSlice, Completion, Full, HostFile, IoEngine, IoKind, IoOp, Tag, gather, scatter, sub_slices, total_len,
};
use crate::map::FileId;
use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

/// A small random generator (splitmix64): the same sequence for the same seed, everywhere.
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True `percent` times of a hundred.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

struct Queued {
    io: IoOp,
    bufs: Vec<BufSlice>,
    tag: Tag,
}

/// The engine. Operations take effect when they are reaped.
pub(crate) struct SimEngine {
    files: HashMap<FileId, Arc<dyn HostFile>>,
    queue: Vec<Queued>,
    entered: usize,
    rng: Rng,
    /// How many of a hundred reads and writes end inside [`IoEngine::try_now`].
    pub(crate) inline_percent: u64,
    /// Operations taken at once.
    pub(crate) depth: usize,
}

impl SimEngine {
    /// An engine whose choices follow `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        SimEngine {
            files: HashMap::new(),
            queue: Vec::new(),
            entered: 0,
            rng: Rng(seed),
            inline_percent: 30,
            depth: 32,
        }
    }

    fn run(&mut self, io: &IoOp, bufs: &[BufSlice]) -> Result<u64, i32> {
        let file = self.files.get(&io.file).expect("an attached file").clone();
        let off = io.off.0;
        let short = total_len(bufs) >= 1024 && self.rng.chance(5);
        let moved = if short { total_len(bufs) / 2 / 512 * 512 } else { total_len(bufs) };
        let mut part = Vec::new();
        sub_slices(bufs, 0, moved, &mut part);
        let result = match io.kind {
            IoKind::Read => {
                let mut bytes = vec![0; usize::try_from(moved).expect("fits memory")];
                file.read_at(off, &mut bytes).map(|n| {
                    let mut got = Vec::new();
                    sub_slices(&part, 0, n as u64, &mut got);
                    scatter(&bytes[..n], &got);
                    n as u64
                })
            }
            IoKind::Write => {
                let mut bytes = vec![0; usize::try_from(moved).expect("fits memory")];
                gather(&part, &mut bytes);
                file.write_at(off, &bytes).map(|()| moved)
            }
            IoKind::Sync => file.sync().map(|()| 0),
            IoKind::Allocate => file.allocate(off, io.len).map(|()| 0),
            IoKind::Truncate => file.set_len(off).map(|()| 0),
            IoKind::Punch | IoKind::ZeroRange => zero(&*file, off, io.len),
        };
        result.map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))
    }
}

fn zero(file: &dyn HostFile, off: u64, len: u64) -> io::Result<u64> {
    let end = file.len()?.min(off.saturating_add(len));
    if off < end {
        file.write_at(off, &vec![0; usize::try_from(end - off).expect("fits memory")])?;
    }
    Ok(0)
}

impl IoEngine for SimEngine {
    fn attach(&mut self, id: FileId, file: &Arc<dyn HostFile>) -> io::Result<()> {
        self.files.insert(id, file.clone());
        Ok(())
    }

    fn try_now(&mut self, op: &IoOp, bufs: &[BufSlice]) -> Option<Result<u64, i32>> {
        self.rng.chance(self.inline_percent).then(|| self.run(op, bufs))
    }

    fn submit(&mut self, op: &IoOp, bufs: &[BufSlice], tag: Tag) -> Result<(), Full> {
        if self.queue.len() >= self.depth {
            return Err(Full);
        }
        self.queue.push(Queued { io: *op, bufs: bufs.to_vec(), tag });
        Ok(())
    }

    fn enter(&mut self) -> io::Result<()> {
        self.entered = self.queue.len();
        Ok(())
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let n = self.rng.below(self.entered as u64 + 1);
        for _ in 0..n {
            let i = usize::try_from(self.rng.below(self.entered as u64)).expect("fits memory");
            let q = self.queue.remove(i);
            self.entered -= 1;
            let result = self.run(&q.io, &q.bufs);
            out.push(Completion { tag: q.tag, result });
        }
    }

    fn wait(&mut self, _at_most: Duration) -> io::Result<()> {
        Ok(())
    }

    fn event_fd(&self) -> Option<RawFd> {
        None
    }

    fn in_flight(&self) -> usize {
        self.queue.len()
    }
}
