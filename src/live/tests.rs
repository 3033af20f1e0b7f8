use super::*;
use crate::error::ErrorKind;
use crate::io::EngineKind;
use crate::job::{CreateImage, DiskBytes, check_image, create_image, open_channel_over};
use crate::vd::{DiskOptions, OpenDisk, open_disk};
use std::path::Path;
use std::time::Duration;

const SIZE: u64 = 8 << 20;

fn how(path: &Path) -> OpenDisk {
    OpenDisk { lock_wait: Some(Duration::ZERO), options: DiskOptions::default(), ..OpenDisk::new(path) }
}

fn create(path: &Path, format: Format) {
    create_image(&CreateImage::new(path, format, SIZE)).unwrap();
}

fn live(path: &Path, record: Option<&Path>) -> LiveDisk {
    let opened = open_disk(&how(path)).unwrap();
    let record = record.map(|r| RecordFile { path: r.into(), began: path.into() });
    LiveDisk::new(&opened, false, record).unwrap()
}

/// Writes `len` bytes of `fill` at `at`, and into the model.
fn put(live: &LiveDisk, model: &mut [u8], (at, len): (usize, usize), fill: u8) {
    model[at..at + len].fill(fill);
    DiskBytes::new(&live.disk()).unwrap().write(at as u64, &model[at..at + len]).unwrap();
}

fn contents(disk: &Arc<Disk>) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(disk.size_bytes()).unwrap()];
    DiskBytes::new(disk).unwrap().read(0, &mut all).unwrap();
    all
}

fn close(live: LiveDisk) {
    let mut last = open_channel_over(EngineKind::Threads, &live.disk(), 1).unwrap();
    drop(live);
    last.close_disk(true).unwrap();
}

fn in_order(path: &Path, format: Format) {
    let spec = ImageSpec { path: path.into(), format: Some(format) };
    if let Some(report) = check_image(&spec, Duration::ZERO).unwrap().report {
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{}: {:?}", path.display(), report.findings);
    }
}

/// Two snapshots, of other formats where that is asked for; each image is what it was when it was left, in order, and the chain opens
/// by itself with every link as it should be.
fn two_snapshots(first: Format, further: Option<Format>) {
    let dir = tempfile::tempdir().unwrap();
    let name = |n: usize, format: Format| dir.path().join(format!("{n}.{}", format.extensions()[0]));
    let base = name(0, first);
    create(&base, first);
    let live = live(&base, None);
    let mut model = vec![0; usize::try_from(SIZE).unwrap()];
    let mut left = Vec::new();
    for n in 1..3 {
        let n8 = u8::try_from(n).unwrap();
        put(&live, &mut model, (n * 700_000, 300_000), n8);
        put(&live, &mut model, (n * 1_000_000 + 5, 1000), 0x10 + n8);
        let wanted = further.or(if first == Format::Raw { Some(Format::Qcow2) } else { None });
        let file = name(n, wanted.unwrap_or(first));
        let snapped = live.snapshot(&Snapshot { format: further, ..Snapshot::new(&file) }).unwrap();
        assert!(snapped.unfinished.is_none(), "{:?}", snapped.unfinished);
        left.push((live.chain()[1].clone(), model.clone()));
        assert_eq!(live.chain()[0].path, file);
        assert!(contents(&live.disk()) == model, "the disk shows something else");
        // what is beneath may be read by others now, and nobody may write it
        let beneath = &live.chain()[1];
        let open = |options| {
            let parents = live.chain()[2..].iter().rev().map(ChainImage::spec).collect();
            open_disk(&OpenDisk { image: beneath.spec(), parents, options, ..how(&beneath.path) })
        };
        drop(open(DiskOptions { read_only: true, ..DiskOptions::default() }).unwrap());
        assert!(open(DiskOptions::default()).is_err());
    }
    put(&live, &mut model, (699_000, 400_000), 9);
    let top = live.chain()[0].clone();
    close(live);
    left.push((top, model));
    for (image, expected) in left {
        in_order(&image.path, image.format);
        let opened = open_disk(&OpenDisk::new(&image.path)).unwrap();
        assert!(contents(&opened.disk) == expected, "{} has changed", image.path.display());
        for pair in opened.images.windows(2) {
            let (child, parent) = (&pair[0].info, &pair[1].info);
            assert_eq!(
                child.parent_content_id,
                parent.content_id.filter(|_| child.parent_content_id.is_some())
            );
            if let (Some(then), Some(now)) = (child.parent_modification_uuid, parent.modification_uuid) {
                assert_eq!(then, now, "{}: changed after {}", pair[1].path.display(), pair[0].path.display());
            }
        }
    }
}

#[test]
fn a_snapshot_of_every_format_leaves_what_was_there() {
    for format in
        [Format::Vdi, Format::Qcow2, Format::Vmdk, Format::Vhd, Format::Vhdx, Format::Qed, Format::Raw]
    {
        two_snapshots(format, None);
    }
}

#[test]
fn a_snapshot_may_be_of_another_format() {
    two_snapshots(Format::Vdi, Some(Format::Qcow2));
    two_snapshots(Format::Qcow2, Some(Format::Vhdx));
    two_snapshots(Format::Vhdx, Some(Format::Vdi));
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("a.raw");
    create(&base, Format::Raw);
    let live = live(&base, None);
    let kind = |s: &Snapshot| live.snapshot(s).unwrap_err().kind();
    let vdi = Snapshot { format: Some(Format::Vdi), ..Snapshot::new(dir.path().join("b.vdi")) };
    assert_eq!(kind(&vdi), ErrorKind::Unsupported);
    assert_eq!(kind(&Snapshot::new(&base)), ErrorKind::Exists);
    let raw = Snapshot { format: Some(Format::Raw), ..Snapshot::new(dir.path().join("b.raw")) };
    assert!(live.snapshot(&raw).is_err());
    assert!(live.snapshot(&Snapshot::new(dir.path().join("none/b.qcow2"))).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    live.snapshot(&Snapshot::new(dir.path().join("b.qcow2"))).unwrap();
    close(live);
}

#[test]
fn a_record_that_cannot_be_written_takes_everything_back() {
    let dir = tempfile::tempdir().unwrap();
    let (base, file) = (dir.path().join("a.vdi"), dir.path().join("b.vdi"));
    create(&base, Format::Vdi);
    let folder = dir.path().join("records");
    std::fs::create_dir(&folder).unwrap();
    let record = folder.join("r");
    let live = live(&base, Some(&record));
    assert_eq!(record::load(&record).unwrap().unwrap().chain, [live.chain()[0].spec()]);
    let mut model = vec![0; usize::try_from(SIZE).unwrap()];
    std::fs::remove_dir_all(&folder).unwrap();
    live.snapshot(&Snapshot::new(&file)).unwrap_err();
    assert!(!file.exists());
    std::fs::create_dir(&folder).unwrap();
    put(&live, &mut model, (4096, 70_000), 3);
    live.snapshot(&Snapshot::new(&file)).unwrap();
    put(&live, &mut model, (9000, 70_000), 4);
    let chain: Vec<_> = live.chain().iter().map(ChainImage::spec).collect();
    assert_eq!(record::load(&record).unwrap().unwrap(), Recorded { began: base, chain, making: None });
    close(live);
    assert!(contents(&open_disk(&OpenDisk::new(&file)).unwrap().disk) == model);
}
