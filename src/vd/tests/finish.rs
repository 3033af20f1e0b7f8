//! The end of writing to an image that has become a parent.

use super::*;
use crate::vd::{Finish, FinishStep, NewTop};

fn block(n: u64) -> GuestRange {
    GuestRange::new(GuestOffset(n * 4096), 4096).unwrap()
}

/// A diff whose first block was written and then zeroed, so that its place is a hole which the second block moves into at the end.
fn with_a_hole() -> (Vec<Arc<MemFile>>, Arc<Disk>) {
    let files = vec![new_vdi(1 << 20, 4096, 2, Some(1)), new_vdi(1 << 20, 4096, 1, None)];
    let mut data = AlignedBuf::new(4096);
    let base = open(&files[1..], true, DiskOptions::default());
    let mut c = Channel::new(base, Box::new(SimEngine::new(1)), 1).unwrap();
    data.as_mut_slice().fill(1);
    (0..2).for_each(|n| finish(&mut c, Request::Write(block(n)), &data).unwrap());
    c.close_disk(false).unwrap();
    drop(c);
    let disk = open(&files, true, DiskOptions::default());
    let mut c = Channel::new(disk.clone(), Box::new(SimEngine::new(1)), 1).unwrap();
    data.as_mut_slice().fill(2);
    (0..2).for_each(|n| finish(&mut c, Request::Write(block(n)), &data).unwrap());
    finish(&mut c, Request::WriteZeroes { range: block(0), unmap: true }, &data).unwrap();
    drop(c);
    (files, disk)
}

#[test]
fn a_file_is_cut_behind_moved_blocks_only_when_its_readers_have_ended() {
    let (files, old) = with_a_hole();
    let above = new_vdi(1 << 20, 4096, 3, Some(2));
    let id = old.free_files(1).unwrap();
    let how = format::OpenHow { read_only: false, info_only: false };
    let map = format::open_single(Format::Vdi, &above.bytes() as &dyn ByteSource, id, how).unwrap();
    let new = old.under(NewTop {
        map: map.into(),
        files: vec![above],
        locks: Vec::new(),
        on_sync_failure: Box::new(|| ()),
    });
    let helper = Channel::new(old, Box::new(SimEngine::new(2)), 1).unwrap();
    let mut ending = Finish::new(helper);
    let mut fences = 0;
    let len = || files[0].len().unwrap();
    let before = len();
    for _ in 0..10_000 {
        match ending.step().unwrap() {
            FinishStep::More | FinishStep::Later => assert!(fences == 1 || len() == before, "it is cut"),
            FinishStep::Fence => {
                assert_eq!(len(), before, "it is cut under its readers");
                fences += 1;
                ending.pass();
            }
            FinishStep::Done => break,
        }
    }
    assert_eq!(fences, 1, "nobody was waited for");
    assert!(len() < before, "nothing is given back");
    let mut data = AlignedBuf::new(4096);
    let mut c = Channel::new(new, Box::new(SimEngine::new(3)), 1).unwrap();
    for (n, fill) in [(0, 0), (1, 2)] {
        finish(&mut c, Request::Read(block(n)), &data).unwrap();
        assert!(data.as_slice().iter().all(|b| *b == fill), "block {n}");
        data.as_mut_slice().fill(9);
    }
}
