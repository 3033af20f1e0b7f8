//! Past the page cache: memory that is not aligned as the file demands goes through bounce buffers.

use super::*;
use crate::io::{AlignedBuf, EngineKind, make_engine};
use crate::vd::{OpenDisk, OpenedDisk, open_disk};

fn opened(dir: &std::path::Path) -> OpenedDisk {
    let path = dir.join("direct.vdi");
    std::fs::write(&path, new_vdi(8 << 20, 1 << 20, 1, None).bytes()).unwrap();
    let options = DiskOptions::default();
    open_disk(&OpenDisk { direct: true, options, ..OpenDisk::new(path) }).unwrap()
}

/// Runs a request whose memory begins one byte behind an aligned address.
fn run(c: &mut Channel, request: Request, buf: &AlignedBuf, len: usize) {
    // SAFETY: the buffer outlives this function, which waits for the request's end.
    let part = [unsafe { buf.as_buf() }.part(1, len)];
    if let Some(outcome) = c.submit(0, request, &part) {
        return outcome.unwrap();
    }
    let mut done = Vec::new();
    for _ in 0..100_000 {
        c.drive(std::time::Duration::from_millis(100), &mut done).unwrap();
        if let [d] = done[..] {
            return d.outcome.unwrap();
        }
    }
    panic!("{request:?} hangs");
}

#[test]
fn misaligned_memory_reaches_an_unbuffered_file() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    for kind in [EngineKind::Threads, EngineKind::Auto] {
        let sub = tempfile::tempdir_in(dir.path()).unwrap();
        let opened = opened(sub.path());
        if opened.disk.file(crate::map::FileId(0)).traits.alignment.memory < 2 {
            println!("skipped: this file system takes memory of any alignment");
        }
        let engine = make_engine(kind, 32).unwrap().engine;
        let mut c = Channel::new(opened.disk.clone(), engine, 1).unwrap();
        // Two and a half blocks: first writes with and without a whole block, then in place, larger than a bounce buffer.
        let len = (5 << 19) + 512;
        let range = GuestRange::new(GuestOffset(512 * 7), len as u64).unwrap();
        for round in 1..4u8 {
            let mut out = AlignedBuf::new(len + 1);
            out.as_mut_slice().iter_mut().zip(0u64..).for_each(|(b, i)| *b = (i % 251) as u8 ^ round);
            run(&mut c, Request::Write(range), &out, len);
            let back = AlignedBuf::new(len + 1);
            run(&mut c, Request::Read(range), &back, len);
            assert!(out.as_slice()[1..] == back.as_slice()[1..], "round {round}");
        }
        c.close_disk(true).unwrap();
    }
}
