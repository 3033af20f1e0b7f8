//! The container with engines and files of its own; against a model, with power cuts and failing disks it is tested in
//! `sim/tests`.

mod direct;
mod pages;
mod threads;

use super::chain::Layer;
use super::{BlockDevice, Chain, Channel, Disk, DiskOptions, Request};
use crate::error::Failure;
use crate::format::vdi::{Parent, VdiCreate};
use crate::format::{self, Format};
use crate::io::{AlignedBuf, BufSlice, Host, HostFile, MemFile};
use crate::map::{ByteSource, FileId, GuestOffset, GuestRange};
use crate::sim::{Rng, SimEngine, fill};
use std::sync::Arc;
use std::time::Instant;
use uuid::Uuid;

const SECTOR: u64 = 512;

struct TestHost;

impl Host for TestHost {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn new_uuid(&self) -> Uuid {
        Uuid::from_u128(0x5eed)
    }
}

/// A file with a fresh VDI in it.
fn new_vdi(size: u64, block: u64, uuid: u128, parent: Option<u128>) -> Arc<MemFile> {
    let id = Uuid::from_u128(uuid);
    let mut c = VdiCreate::new(size, id, id);
    c.block_bytes = block;
    c.parent = parent.map(|p| Parent { uuid: Uuid::from_u128(p), modification: Uuid::from_u128(p) });
    let b = c.blueprint().unwrap();
    let f = MemFile::new(format!("{uuid:x}.vdi"), Vec::new());
    f.set_len(b.file_len()).unwrap();
    for (off, bytes) in b.into_writes() {
        f.write_at(off.0, &bytes).unwrap();
    }
    Arc::new(f)
}

fn open(files: &[Arc<MemFile>], read_only_below: bool, options: DiskOptions) -> Arc<Disk> {
    let layers = files.iter().zip(0u16..).map(|(f, i)| {
        let how =
            format::OpenHow { read_only: options.read_only || (read_only_below && i > 0), info_only: false };
        let bytes = f.bytes();
        let map = format::open_single(Format::Vdi, &bytes as &dyn ByteSource, FileId(i), how);
        Layer { number: u32::from(i), map: map.unwrap_or_else(|e| panic!("{e}")).into() }
    });
    let layers = layers.collect();
    let files = files.iter().map(|f| f.clone() as Arc<dyn HostFile>).collect();
    Disk::new(Chain::new(layers), files, options, Arc::new(TestHost), Box::new(|| ()))
}

/// Writing what is there already allocates nothing; writing zeros to a whole block marks it.
#[test]
fn equal_bytes_allocate_nothing_and_zeros_are_marked() {
    let (size, block) = (1 << 20, 4096);
    let files = vec![new_vdi(size, block, 2, Some(1)), new_vdi(size, block, 1, None)];
    let base = open(&files[1..], true, DiskOptions::default());
    let mut data = AlignedBuf::new(8192);
    data.as_mut_slice().fill(7);
    let r = GuestRange::new(GuestOffset(4096), 8192).unwrap();
    let mut c = Channel::new(base, Box::new(SimEngine::new(1)), 1).unwrap();
    finish(&mut c, Request::Write(r), &data).unwrap();
    c.close_disk(false).unwrap();
    drop(c);

    let disk = open(&files, true, DiskOptions::default());
    let mut c = Channel::new(disk.clone(), Box::new(SimEngine::new(1)), 1).unwrap();
    finish(&mut c, Request::Write(r), &data).unwrap();
    assert_eq!(disk.chain().top().map.info().allocated_blocks, Some(0));
    let zeros = AlignedBuf::new(8192);
    finish(&mut c, Request::Write(r), &zeros).unwrap();
    assert_eq!(disk.chain().top().map.info().allocated_blocks, Some(0));
    finish(&mut c, Request::Read(r), &data).unwrap();
    assert!(data.as_slice().iter().all(|b| *b == 0));
    c.close_disk(false).unwrap();
}

#[test]
fn a_read_only_disk_takes_no_change_and_reads_on() {
    let files = vec![new_vdi(1 << 20, 4096, 1, None)];
    let before = files[0].bytes();
    let disk = open(&files, true, DiskOptions { read_only: true, ..DiskOptions::default() });
    let mut c = Channel::new(disk, Box::new(SimEngine::new(1)), 1).unwrap();
    let buf = AlignedBuf::new(4096);
    let r = GuestRange::new(GuestOffset(0), 4096).unwrap();
    assert_eq!(finish(&mut c, Request::Write(r), &buf), Err(Failure::ReadOnly));
    assert_eq!(finish(&mut c, Request::Discard(r), &buf), Err(Failure::ReadOnly));
    assert_eq!(finish(&mut c, Request::Read(r), &buf), Ok(()));
    assert_eq!(finish(&mut c, Request::Flush, &buf), Ok(()));
    let beyond = GuestRange::new(GuestOffset(1 << 20), 512).unwrap();
    assert_eq!(finish(&mut c, Request::Read(beyond), &AlignedBuf::new(512)), Err(Failure::OutOfRange));
    c.close_disk(true).unwrap();
    assert_eq!(files[0].bytes(), before);
}

fn finish(c: &mut Channel, request: Request, buf: &AlignedBuf) -> Result<(), Failure> {
    // SAFETY: the buffer outlives this function, which waits for the request's end.
    let whole = [unsafe { buf.as_buf() }];
    let bufs = if matches!(request, Request::Read(_) | Request::Write(_)) { &whole[..] } else { &[] };
    if let Some(outcome) = c.submit(0, request, bufs) {
        return outcome;
    }
    let mut done = Vec::new();
    for _ in 0..100_000 {
        c.flush_queue().unwrap();
        c.poll(&mut done);
        if let [d] = done[..] {
            return d.outcome;
        }
    }
    panic!("{request:?} hangs");
}
