//! Requests that end later, queues, iterators, buffers, and the disk as a file.

use super::*;
use crate::error::ErrorKind;
use crate::io::{AlignedBuf, BufSlice};
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

/// Memory for requests that end before it goes.
fn slice(b: &AlignedBuf) -> BufSlice {
    // SAFETY: the tests wait for their requests before they look at, or drop, the memory.
    unsafe { b.as_buf() }
}

fn disk(f: &Folder) -> Container {
    let mut c = hard_disk();
    let flags = OpenFlags::ASYNC_IO | OpenFlags::DISCARD;
    c.create_base("VDI", &f.path("a.vdi"), 8 * MIB, &CreateBase::default(), flags).unwrap();
    c
}

#[test]
fn requests_over_scattered_memory_call_back() {
    let f = Folder::new();
    let mut c = disk(&f);
    let data = pattern(3, 3 * 512);
    let mut memory = [AlignedBuf::new(512), AlignedBuf::new(1024)];
    memory[0].as_mut_slice().copy_from_slice(&data[..512]);
    memory[1].as_mut_slice().copy_from_slice(&data[512..]);
    let sg: Vec<_> = memory.iter().map(slice).collect();
    let (done, told) = completion();
    c.async_write(MIB - 512, 1536, &sg, done).unwrap();
    told.wait().unwrap();
    assert_eq!(bytes(&c, MIB - 512, 1536), data);
    memory[1].as_mut_slice().fill(0);
    let (done, told) = completion();
    c.async_read(MIB - 512, 1536, &memory.iter().map(slice).collect::<Vec<_>>(), done).unwrap();
    told.wait().unwrap();
    assert_eq!([memory[0].as_slice(), memory[1].as_slice()].concat(), data);
    let (done, told) = completion();
    c.async_discard(&[(0, MIB), (MIB, MIB)], done).unwrap();
    told.wait().unwrap();
    assert_eq!(bytes(&c, MIB - 512, 1536), [0; 1536]);
    let short = c.async_read(0, 4096, &sg, |_| panic!("not begun")).unwrap_err();
    assert_eq!(short.kind(), ErrorKind::InvalidArgument);
    assert_eq!(status(c.async_read(8 * MIB, 512, &sg, |_| ())), Status::ReadOutOfRange);
    // What changes the chain waits for them, and they for it.
    let told: Vec<_> = (0..200u64)
        .map(|n| {
            let (done, told) = completion();
            c.async_write(n * 4096 % (8 * MIB), 512, &[slice(&memory[0])], done).unwrap();
            told
        })
        .collect();
    diff(&mut c, "VDI", &f.path("b.vdi"));
    told.into_iter().for_each(|t| t.wait().unwrap());
    assert_eq!(bytes(&c, 4096, 512), data[..512]);
}

/// A queue whose ends can be waited for.
fn queue(priority: u32) -> (IoQueue, Receiver<(u64, Option<ErrorKind>)>) {
    let (tell, told) = channel();
    let tell = Mutex::new(tell);
    let on_complete = move |r: &IoRequest, ended: Result<()>| {
        r.with_private(|p| p[0] += 1);
        tell.lock().unwrap().send((r.id(), ended.err().map(|e| e.kind()))).unwrap();
    };
    (IoQueue::new(on_complete, 8, priority), told)
}

fn segment(start: u64, size: u64, flags: SegmentFlags) -> IterSegment {
    IterSegment { start, size, flags }
}

#[test]
fn queues_carry_reads_writes_flushes_and_discards() {
    let f = Folder::new();
    let c = disk(&f);
    let (q, told) = queue(5);
    let manager = IoBufferManager::new(0, BufferFlags::NONE, None, 4);
    let mut memory = AlignedBuf::new(4096);
    memory.as_mut_slice().copy_from_slice(&pattern(1, 4096));
    let buffer = manager.alloc(Some(&[slice(&memory)]), 4096).unwrap();
    let main = SegmentFlags::MAIN_DATA;
    let iter = c.io_iter(&[segment(16, 4, main), segment(100, 4, main)], IterFlags::NONE).unwrap();
    assert_eq!((iter.bytes(), iter.segment_count(), iter.segment(1).unwrap().start), (4096, 2, 100));
    assert_eq!(iter.segment(2).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert_eq!(iter.clone().references(), 2);

    let run = |id: u64, kind, iter: Option<&IoIter>, buffer: Option<&IoBuffer>| {
        let r = q.alloc(id).unwrap();
        r.submit(kind, iter, buffer).unwrap();
        assert_eq!(told.recv().unwrap(), (id, None));
        while r.clone().free().is_err() {
            std::thread::yield_now(); // its callback returns
        }
        assert_eq!((r.state(), r.with_private(|p| p[0])), (IoRequestState::Completed, 1));
    };
    let r = q.alloc(9).unwrap();
    assert_eq!(status(r.submit(IoRequestType::Flush, None, None)), Status::InvalidState, "not attached");
    r.free().unwrap();
    c.attach(&q).unwrap();
    assert_eq!(status(c.attach(&q)), Status::InvalidState);
    run(1, IoRequestType::Write, Some(&iter), Some(&buffer));
    assert_eq!(bytes(&c, 16 * 512, 2048), pattern(1, 4096)[..2048]);
    assert_eq!(bytes(&c, 100 * 512, 2048), pattern(1, 4096)[2048..]);
    memory.as_mut_slice().fill(0);
    run(1, IoRequestType::Read, Some(&iter), Some(&buffer));
    assert_eq!(memory.as_slice(), pattern(1, 4096));
    run(2, IoRequestType::Flush, None, None);
    run(3, IoRequestType::Discard, Some(&iter), None);
    assert_eq!(bytes(&c, 16 * 512, 2048), [0; 2048]);

    let r = q.alloc(4).unwrap();
    assert_eq!(q.alloc(4).unwrap_err().kind(), ErrorKind::Exists);
    let misfits = [
        r.submit(IoRequestType::Read, Some(&iter), None),
        r.submit(IoRequestType::Flush, Some(&iter), None),
        r.submit(IoRequestType::Discard, None, None),
    ];
    assert!(misfits.into_iter().all(|m| m.unwrap_err().kind() == ErrorKind::InvalidArgument));
    let (q, e) = q.destroy().unwrap_err();
    assert_eq!(e.status(), Some(Status::InvalidState), "it is attached");
    q.detach(false).unwrap();
    assert_eq!(status(q.detach(true)), Status::InvalidState);
    r.free().unwrap();
    q.destroy().unwrap();
    let (manager, e) = manager.destroy().unwrap_err();
    assert_eq!(e.kind(), ErrorKind::State, "a buffer is alive");
    drop(buffer);
    manager.destroy().unwrap();
}

/// Requests that wait are begun by priority, and in their order within one; cancelled ones never.
#[test]
fn waiting_requests_have_an_order_and_can_be_cancelled() {
    let f = Folder::new();
    let c = disk(&f);
    let (tell, told) = channel();
    let make = |priority: u32| {
        let tell = Mutex::new(tell.clone());
        IoQueue::new(move |r, e| tell.lock().unwrap().send((r.id(), e.is_ok())).unwrap(), 0, priority)
    };
    let (low, high) = (make(u32::MAX), make(0));
    c.attach(&low).unwrap();
    c.attach(&high).unwrap();
    c.dispatcher.pause();
    let iter = c.io_iter(&[segment(0, 8, SegmentFlags::MAIN_DATA)], IterFlags::NONE).unwrap();
    let manager = IoBufferManager::new(0, BufferFlags::NONE, None, 0);
    let memory = AlignedBuf::new(4096);
    let buffer = manager.alloc(Some(&[slice(&memory)]), 4096).unwrap();
    let submit = |q: &IoQueue, id: u64| {
        let r = q.alloc(id).unwrap();
        r.submit(IoRequestType::Read, Some(&iter), Some(&buffer)).unwrap();
        r
    };
    let one = submit(&low, 1);
    submit(&low, 2);
    submit(&high, 3);
    submit(&high, 4);
    submit(&low, 5);
    assert_eq!(
        (one.state(), status(one.clone().free())),
        (IoRequestState::Active, Status::AsyncIoInProgress)
    );
    assert_eq!(status(one.submit(IoRequestType::Flush, None, None)), Status::InvalidState, "twice");
    low.cancel(2).unwrap();
    assert_eq!(told.recv().unwrap(), (2, false), "at once, for it had not begun");
    assert_eq!(status(low.cancel(2)), Status::InvalidState, "it was cancelled");
    assert_eq!(low.cancel(77).unwrap_err().kind(), ErrorKind::NotFound);
    let never = low.alloc(6).unwrap();
    never.cancel().unwrap();
    assert_eq!(never.state(), IoRequestState::Canceled);
    c.dispatcher.open(c.live().unwrap().disk.clone()).unwrap();
    let order: Vec<_> = (0..4).map(|_| told.recv().unwrap()).collect();
    assert_eq!(order, [(3, true), (4, true), (1, true), (5, true)]);
    high.detach(false).unwrap();
    low.detach(true).unwrap();
    assert_eq!(status(one.cancel()), Status::InvalidState, "a completed one is not cancelled");
}

/// A callback finds its request completing; and a request that is cancelled while it is under way still ends once.
#[test]
fn a_completing_request_cannot_be_cancelled() {
    let f = Folder::new();
    let c = disk(&f);
    let (tell, told) = channel();
    let tell = Mutex::new(tell);
    let q = IoQueue::new(
        move |r, e| {
            let tried = r.cancel().map_err(|e| e.status());
            tell.lock().unwrap().send((r.state(), tried, e.is_ok())).unwrap();
        },
        0,
        1,
    );
    c.attach(&q).unwrap();
    let r = q.alloc(1).unwrap();
    r.submit(IoRequestType::Flush, None, None).unwrap();
    let refused = Err(Some(Status::InvalidState));
    assert_eq!(told.recv().unwrap(), (IoRequestState::Completing, refused, true));
    let (mut ended, mut cancelled) = (0, 0);
    for id in 2..200 {
        let r = q.alloc(id).unwrap();
        r.submit(IoRequestType::Flush, None, None).unwrap();
        cancelled += usize::from(r.cancel().is_ok());
    }
    let purged = q.purge();
    q.detach(true).unwrap();
    while let Ok((_, _, ok)) = told.try_recv() {
        ended += 1;
        cancelled -= usize::from(!ok);
    }
    assert_eq!(
        (ended, cancelled + purged),
        (198, purged * 2),
        "each ends once, those that were cancelled as such"
    );
}

/// Once nothing is open, what is submitted fails, and what waited has failed.
#[test]
fn queues_outlive_the_images() {
    let f = Folder::new();
    let mut c = disk(&f);
    let (q, told) = queue(0);
    c.attach(&q).unwrap();
    c.dispatcher.pause();
    let r = q.alloc(1).unwrap();
    r.submit(IoRequestType::Flush, None, None).unwrap();
    c.close_all().unwrap();
    assert_eq!(told.recv().unwrap(), (1, Some(ErrorKind::State)));
    let r = q.alloc(2).unwrap();
    assert_eq!(status(r.submit(IoRequestType::Flush, None, None)), Status::NotOpened);
    assert_eq!(r.state(), IoRequestState::Allocated);
    c.open("VDI", &f.path("a.vdi"), OpenFlags::NONE).unwrap();
    r.submit(IoRequestType::Flush, None, None).unwrap();
    assert_eq!(told.recv().unwrap(), (2, None));
}

/// A caller whose data is behind callbacks: bytes are copied, within bounds.
struct Behind(Arc<Mutex<Vec<u8>>>);

impl BufferCallbacks for Behind {
    fn take(&self, _: &IoBuffer, off: usize, data: &[u8]) -> std::result::Result<(), CopyError> {
        let mut mine = self.0.lock().unwrap();
        let room = mine.get_mut(off..off + data.len()).ok_or(CopyError::Overflow)?;
        room.copy_from_slice(data);
        Ok(())
    }

    fn give(&self, _: &IoBuffer, off: usize, data: &mut [u8]) -> std::result::Result<(), CopyError> {
        let mine = self.0.lock().unwrap();
        data.copy_from_slice(mine.get(off..off + data.len()).ok_or(CopyError::Underrun)?);
        Ok(())
    }
}

#[test]
fn buffers_are_copied_and_bounded() {
    let f = Folder::new();
    let c = disk(&f);
    let (q, told) = queue(0);
    c.attach(&q).unwrap();
    let mine = Arc::new(Mutex::new(pattern(8, 4096)));
    let callbacks: Box<dyn BufferCallbacks> = Box::new(Behind(mine.clone()));
    let manager = IoBufferManager::new(8192, BufferFlags::REQUIRE_NOT_PAGEABLE, Some(callbacks), 16);
    let buffer = manager.alloc(None, 8192).unwrap();
    assert!(buffer.is_copied() && manager.used_bytes() == 8192 && buffer.with_private(|p| p.len()) == 16);
    assert_eq!(manager.alloc(None, 1).unwrap_err().kind(), ErrorKind::Limit);
    let bytes_iter = |len| {
        c.io_iter(&[segment(512, len, SegmentFlags::MAIN_DATA)], IterFlags::BYTE_OFFSET_AND_SIZE).unwrap()
    };
    let (fits, long) = (bytes_iter(4096), bytes_iter(8192));
    let r = q.alloc(1).unwrap();
    let e = r.submit(IoRequestType::Write, Some(&long), Some(&buffer)).unwrap_err();
    assert!(e.to_string().contains("underrun"), "{e}");
    r.submit(IoRequestType::Write, Some(&fits), Some(&buffer)).unwrap();
    assert_eq!(told.recv().unwrap(), (1, None));
    assert_eq!(bytes(&c, 512, 4096), pattern(8, 4096));
    mine.lock().unwrap().fill(0);
    q.alloc(2).unwrap().submit(IoRequestType::Read, Some(&fits), Some(&buffer)).unwrap();
    assert_eq!(told.recv().unwrap(), (2, None));
    assert_eq!(*mine.lock().unwrap(), pattern(8, 4096));
    q.alloc(3).unwrap().submit(IoRequestType::Read, Some(&long), Some(&buffer)).unwrap();
    assert_eq!(told.recv().unwrap(), (3, Some(ErrorKind::OutOfRange)), "an overflow");
    q.detach(false).unwrap();
    drop(buffer);
    assert_eq!(manager.used_bytes(), 0);
    manager.alloc(None, 8192).unwrap();
    let e = IoBufferManager::new(0, BufferFlags::NONE, None, 0).alloc(None, 512).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidArgument, "neither memory nor callbacks");
}

/// Where callbacks can tell an address nothing is copied.
#[test]
fn buffers_are_where_the_data_is() {
    struct There(AlignedBuf);
    impl BufferCallbacks for There {
        fn take(&self, _: &IoBuffer, _: usize, _: &[u8]) -> std::result::Result<(), CopyError> {
            Err(CopyError::Overflow)
        }
        fn give(&self, _: &IoBuffer, _: usize, _: &mut [u8]) -> std::result::Result<(), CopyError> {
            Err(CopyError::Underrun)
        }
        fn memory(&self, len: usize) -> Option<Vec<BufSlice>> {
            (len <= self.0.len()).then(|| vec![slice(&self.0)])
        }
    }
    let f = Folder::new();
    let c = disk(&f);
    let (q, told) = queue(0);
    c.attach(&q).unwrap();
    let mut memory = AlignedBuf::new(4096);
    memory.as_mut_slice().fill(6);
    let manager = IoBufferManager::new(512, BufferFlags::NONE, Some(Box::new(There(memory))), 0);
    let buffer = manager.alloc(None, 4096).unwrap();
    assert!(!buffer.is_copied() && manager.used_bytes() == 0);
    let iter = c.io_iter(&[segment(0, 8, SegmentFlags::AVAILABLE)], IterFlags::NONE).unwrap();
    q.alloc(1).unwrap().submit(IoRequestType::Write, Some(&iter), Some(&buffer)).unwrap();
    assert_eq!(told.recv().unwrap(), (1, None));
    assert_eq!(bytes(&c, 0, 4096), [6; 4096]);
    q.detach(false).unwrap();
}

/// The five kinds of segments, over a CD with a track of raw data and one of sound.
#[test]
fn segments_reach_all_of_a_cd_s_blocks() {
    let f = Folder::new();
    let bin = pattern(2, 20 * 2352);
    std::fs::write(f.path("cd.bin"), &bin).unwrap();
    let sheet = "FILE \"cd.bin\" BINARY\n TRACK 01 MODE1/2352\n  INDEX 01 00:00:00\n TRACK 02 AUDIO\n  INDEX 01 00:00:10\n";
    std::fs::write(f.path("cd.cue"), sheet).unwrap();
    let mut c = Container::new(DeviceType::Dvd);
    c.open("CUE", &f.path("cd.cue"), OpenFlags::READONLY).unwrap();
    let list = c.regions(0, RegionListFlags::LOC_SIZE_BLOCKS).unwrap();
    assert_eq!((list.regions.len(), list.regions[1].start), (2, 10));
    let (q, told) = queue(0);
    c.attach(&q).unwrap();
    let next = std::cell::Cell::new(0);
    let read = |segments: &[IterSegment]| {
        let iter = c.io_iter(segments, IterFlags::NONE)?;
        let memory = AlignedBuf::new(usize::try_from(iter.bytes()).unwrap());
        let manager = IoBufferManager::new(0, BufferFlags::NONE, None, 0);
        let buffer = manager.alloc(Some(&[slice(&memory)]), memory.len())?;
        next.set(next.get() + 1);
        q.alloc(next.get())?.submit(IoRequestType::Read, Some(&iter), Some(&buffer))?;
        assert_eq!(told.recv().unwrap().1, None);
        Ok::<_, Error>(memory.as_slice().to_vec())
    };
    let raw = |block: usize, from: usize, to: usize| bin[block * 2352 + from..block * 2352 + to].to_vec();
    use SegmentFlags as S;
    assert_eq!(read(&[segment(3, 1, S::PRE_METADATA)]).unwrap(), raw(3, 0, 16));
    let two = [raw(3, 16, 2064), raw(4, 16, 2064)].concat();
    assert_eq!(read(&[segment(3, 2, S::MAIN_DATA)]).unwrap(), two);
    assert_eq!(read(&[segment(3, 1, S::POST_METADATA)]).unwrap(), raw(3, 2064, 2352));
    assert_eq!(read(&[segment(3, 1, S::CHECKSUM)]).unwrap(), raw(3, 2064, 2068));
    assert_eq!(read(&[segment(9, 3, S::AVAILABLE)]).unwrap(), bin[9 * 2352..12 * 2352], "into the sound");
    let mixed = read(&[segment(0, 1, S::PRE_METADATA | S::CHECKSUM), segment(15, 1, S::MAIN_DATA)]).unwrap();
    assert_eq!(mixed, [raw(0, 0, 16), raw(0, 2064, 2068), raw(15, 0, 2352)].concat());
    let kind = |s: IterSegment| read(&[s]).unwrap_err().kind();
    assert_eq!(kind(segment(12, 1, S::PRE_METADATA)), ErrorKind::Unsupported, "sound has nothing around it");
    assert_eq!(kind(segment(18, 3, S::MAIN_DATA)), ErrorKind::OutOfRange);
    assert_eq!(kind(segment(0, 1, S::NONE)), ErrorKind::InvalidArgument);
    let in_bytes = c.io_iter(&[segment(2048, 2048, S::MAIN_DATA)], IterFlags::BYTE_OFFSET_AND_SIZE).unwrap();
    assert_eq!(in_bytes.bytes(), 2048);
    q.detach(true).unwrap();
}

#[test]
fn a_disk_is_a_file_of_any_offset_and_length() {
    let f = Folder::new();
    let (folder, e) = hard_disk().into_file(DiskFileFlags::NONE).unwrap_err();
    assert_eq!((folder.count(), e.status()), (0, Some(Status::NotOpened)));
    let mut file = disk(&f).into_file(DiskFileFlags::NONE).unwrap();
    let mut model = vec![0; 8 << 20];
    let mut rng = crate::sim::Rng(4);
    for n in 0..200 {
        let at = (rng.draw() % (8 * MIB)) as usize;
        let len = (rng.draw() % 5000) as usize;
        let data = pattern(n, len);
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        let wrote = if at + len > model.len() { model.len() - at } else { len };
        file.write_all(&data[..wrote]).unwrap();
        model[at..at + wrote].copy_from_slice(&data[..wrote]);
        let (from, to) = (at.saturating_sub(700), (at + len + 700).min(model.len()));
        let mut back = vec![0; to - from];
        assert_eq!(file.read_at(from as u64, &mut back).unwrap(), back.len());
        assert!(back == model[from..to], "{n}: {at} {len}");
    }
    file.flush().unwrap();
    assert_eq!(file.seek(SeekFrom::End(-3)).unwrap(), 8 * MIB - 3);
    let mut end = Vec::new();
    file.read_to_end(&mut end).unwrap();
    assert_eq!(end, model[model.len() - 3..]);
    assert!(file.write(&[1]).is_err(), "it keeps its size");
    assert!(file.seek(SeekFrom::Current(-(9 << 20))).is_err());
    assert!(file.allocated().unwrap() > 0);
    let c = file.release().unwrap().expect("it was not to be destroyed");
    assert_eq!(c.count(), 1);
    let file = c.into_file(DiskFileFlags::DESTROY_ON_RELEASE).unwrap();
    assert!(file.release().unwrap().is_none());
    drop(open(&f.path("a.vdi"), "VDI", OpenFlags::NONE));
}
