//! A disk on a real file, served in this process to a front-end with eight queues while a job copies it.
#![allow(missing_docs, unreachable_pub)]

pub mod broken;
pub mod driver;
pub mod intervals;

use crate::common::guest::{GuestQueue, GuestRegion, QUEUE_BYTES};
use crate::common::{negotiate, set_up};
use driver::{Driver, Round, SECTOR, note_read, tick, values};
use intervals::{Access, NOBODY, Seen, Violation, What, check};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use vdblk::format::{Format, NewParent};
use vdblk::io::{EngineKind, make_engine};
use vdblk::job::{CompareJob, CopyJob, CreateImage, Watch, check_image, compare_disks, create_image};
use vdblk::map::ImageInfo;
use vdblk::vd::{BlockDevice, Channel, Disk, DiskOptions, ImageSpec, OpenDisk, OpenedDisk, open_disk};
use vdblk::vhost::{Control, Device, Endpoint, ServeOptions, serve};
use vdblk::virtio::DeviceShape;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const QUEUES: u16 = 8;
/// Between two copies: they shall not outweigh the requests in the history.
const BETWEEN_COPIES: Duration = Duration::from_millis(20);

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Raw,
    Vdi,
    Diff,
}

/// How it is served.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    pub kind: Kind,
    pub engine: EngineKind,
    /// Past the page cache.
    pub direct: bool,
    /// Bytes of a block; for raw images only where requests go.
    pub block: u64,
    pub size: u64,
}

/// What a round has shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shown {
    pub operations: u64,
    pub seen: Seen,
    /// Sectors that were read while they were written.
    pub torn: u64,
    pub copies: u64,
}

impl Shown {
    pub fn add(&mut self, more: Shown) {
        self.operations += more.operations;
        self.seen.add(more.seen);
        self.torn += more.torn;
        self.copies += more.copies;
    }
}

/// Images of one kind, one after the other, each for a round.
#[derive(Debug)]
pub struct Rig {
    way: Way,
    dir: TempDir,
    /// For diffs: the base, and what is in it.
    base: Option<(ImageInfo, Vec<u8>)>,
}

impl Rig {
    pub fn new(way: Way) -> Self {
        let exe = std::env::current_exe().unwrap();
        // not in /tmp: that may be memory, which has no O_DIRECT
        let dir = tempfile::tempdir_in(exe.parent().unwrap()).unwrap();
        let mut rig = Rig { way, dir, base: None };
        if way.kind == Kind::Diff {
            let path = rig.dir.path().join("base.vdi");
            rig.create(&path, Format::Vdi);
            let (content, _) = rig.play(&path, 6000, 1, |_, c| c).unwrap_or_else(|v| panic!("{v}"));
            let info = open_disk(&OpenDisk::new(&path)).unwrap().images[0].info.clone();
            rig.base = Some((info, content));
        }
        rig
    }

    /// The image of the next round.
    pub fn image(&self) -> PathBuf {
        self.dir.path().join(if self.way.kind == Kind::Raw { "disk.raw" } else { "disk.vdi" })
    }

    fn create(&self, path: &Path, format: Format) {
        let mut new = CreateImage::new(path, format, self.way.size);
        if format == Format::Vdi {
            new.options = vec![("AllocationBlockSize".to_string(), self.way.block.to_string())];
            new.parent = self.base.as_ref().map(|b| NewParent { info: b.0.clone(), path: None });
        }
        create_image(&new).unwrap();
    }

    /// Plays a round of `operations` on a new image. `wrap` makes what a queue talks to of its channel.
    pub fn round<D: BlockDevice + 'static>(
        &self,
        operations: u64,
        seed: u64,
        wrap: impl Fn(u16, Channel) -> D + Send + Sync + 'static,
    ) -> Result<Shown, Violation> {
        let path = self.image();
        let _ = std::fs::remove_file(&path);
        self.create(&path, if self.way.kind == Kind::Raw { Format::Raw } else { Format::Vdi });
        self.play(&path, operations, seed, wrap).map(|(_, shown)| shown)
    }

    fn open(&self, path: &Path, read_only: bool) -> OpenedDisk {
        open_disk(&OpenDisk {
            direct: self.way.direct && !read_only,
            lock_wait: Some(Duration::from_secs(10)),
            options: DiskOptions { read_only, ..DiskOptions::default() },
            ..OpenDisk::new(path)
        })
        .unwrap()
    }

    /// A round on a given image; what is in it afterwards.
    fn play<D: BlockDevice + 'static>(
        &self,
        path: &Path,
        operations: u64,
        seed: u64,
        wrap: impl Fn(u16, Channel) -> D + Send + Sync + 'static,
    ) -> Result<(Vec<u8>, Shown), Violation> {
        let disk = self.open(path, false).disk;
        let mut log = self.start();
        let sectors = self.way.size / SECTOR as u64;
        let block = self.way.block / SECTOR as u64;
        let round = Round { sectors, block, operations, begun: AtomicU64::new(0) };
        let (content, torn, copies) = self.drive(&disk, &round, seed, wrap, &mut log);
        let mut last =
            Channel::new(disk.clone(), make_engine(EngineKind::Threads, 8).unwrap().engine, 1).unwrap();
        last.close_disk(false).unwrap();
        drop((last, disk));
        let seen = check(&mut log)?;
        // nothing but what was answered is in the file
        let reopened = self.open(path, true).disk;
        assert!(
            self.copy(&reopened, "after") == content,
            "{:?}, seed {seed}: the file has other content",
            self.way
        );
        drop(reopened);
        let spec = ImageSpec { path: path.into(), format: None };
        if let Some(report) = check_image(&spec, Duration::from_secs(10)).unwrap().report {
            assert!(report.is_clean(), "{:?}, seed {seed}: {report:?}", self.way);
        }
        Ok((content, Shown { operations, seen, torn, copies }))
    }

    /// What is there before the first request.
    fn start(&self) -> Vec<Access> {
        let zeros = vec![0; if self.base.is_some() { 0 } else { self.way.size as usize }];
        let content = self.base.as_ref().map_or(&zeros, |b| &b.1);
        let what = |bytes: &[u8]| match values(bytes)[0] {
            0 => What::Zero,
            value => What::Write(value),
        };
        let at = (0u32..).zip(content.chunks_exact(SECTOR));
        at.map(|(sector, bytes)| Access { sector, who: NOBODY, begin: 0, end: 0, what: what(bytes) })
            .collect()
    }

    /// Serves the disk to all queues and the job. What is in it then, sectors seen torn, copies made.
    fn drive<D: BlockDevice + 'static>(
        &self,
        disk: &Arc<Disk>,
        round: &Round,
        seed: u64,
        wrap: impl Fn(u16, Channel) -> D + Send + Sync + 'static,
        log: &mut Vec<Access>,
    ) -> (Vec<u8>, u64, u64) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let device = self.device(disk, wrap);
        let shutdown = EventFd::new(EFD_NONBLOCK).unwrap();
        let server = std::thread::spawn(move || {
            serve(device, Endpoint::Connected(theirs), ServeOptions::default(), &shutdown, || ())
        });
        let (frontend, queues) = connect(ours);
        let mut drivers: Vec<_> =
            (0..).zip(queues).map(|(who, q)| Driver::new(q, who, round, seed)).collect();
        let ended = AtomicBool::new(false);
        let (mut torn, copies) = std::thread::scope(|s| {
            let job = s.spawn(|| self.copy_again_and_again(disk, &ended));
            let threads: Vec<_> = drivers.iter_mut().map(|d| s.spawn(|| d.run())).collect();
            let ends: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
            ended.store(true, Ordering::Relaxed);
            let (copied, torn, copies) = job.join().unwrap();
            ends.into_iter().for_each(|e| e.unwrap());
            log.extend(copied);
            (torn, copies)
        });
        let content = drivers[0].sweep();
        for d in &mut drivers {
            log.append(&mut d.log);
            torn += d.torn;
        }
        drop((frontend, drivers));
        server.join().unwrap().unwrap();
        (content, torn, copies)
    }

    fn device<D>(
        &self,
        disk: &Arc<Disk>,
        wrap: impl Fn(u16, Channel) -> D + Send + Sync + 'static,
    ) -> Device<D> {
        let (disk, engine) = (disk.clone(), self.way.engine);
        let shape = DeviceShape { num_queues: QUEUES, queue_size: 64, ..DeviceShape::new(self.way.size) };
        let make = Box::new(move |queue, slots| {
            let engine = make_engine(engine, u32::from(slots))?.engine;
            Ok(wrap(queue, Channel::new(disk.clone(), engine, slots)?))
        });
        Device { shape, serial: String::new(), poll_us: 0, make, resize: None, control: Control::default() }
    }

    /// What a copy job makes of the disk.
    fn copy(&self, disk: &Arc<Disk>, name: &str) -> Vec<u8> {
        let path = self.dir.path().join(name);
        File::create(&path).unwrap().set_len(self.way.size).unwrap();
        let target = OpenDisk {
            image: ImageSpec { path: path.clone(), format: Some(Format::Raw) },
            options: DiskOptions { read_only: false, skip_syncs: true, ..DiskOptions::default() },
            ..OpenDisk::new(&path)
        };
        let target = open_disk(&target).unwrap().disk;
        let channel = |disk: &Arc<Disk>| {
            Channel::new(disk.clone(), make_engine(self.way.engine, 64).unwrap().engine, CompareJob::slots())
        };
        let mut job = CopyJob::new(channel(disk).unwrap(), channel(&target).unwrap()).unwrap();
        watch(|w| w.run(&mut job));
        drop(job);
        // while others write it finds what it finds, but it ends
        watch(|w| compare_disks(disk, &target, w));
        std::fs::read(path).unwrap()
    }

    /// A copy is a read of all sectors, for as long as it took.
    fn copy_again_and_again(&self, disk: &Arc<Disk>, ended: &AtomicBool) -> (Vec<Access>, u64, u64) {
        let (mut log, mut torn, mut copies) = (Vec::new(), 0, 0);
        while !ended.load(Ordering::Relaxed) {
            let begin = tick();
            let bytes = self.copy(disk, "copy");
            torn += note_read(&mut log, NOBODY, (begin, tick()), 0, &bytes);
            copies += 1;
            std::thread::sleep(BETWEEN_COPIES);
        }
        (log, torn, copies)
    }
}

fn watch<T>(run: impl FnOnce(&mut Watch<'_>) -> vdblk::Result<T>) -> T {
    run(&mut Watch { cancelled: &|| false, progress: &mut |_| () }).unwrap()
}

fn connect(stream: UnixStream) -> (Frontend, Vec<GuestQueue>) {
    let mut frontend = Frontend::from_stream(stream, u64::from(QUEUES));
    negotiate(&mut frontend);
    let region = GuestRegion::new(0, u64::from(QUEUES) * QUEUE_BYTES, 0);
    frontend.set_mem_table(&[region.info()]).unwrap();
    let queues: Vec<_> = (0..u64::from(QUEUES)).map(|i| GuestQueue::new(&region, i, 64, true)).collect();
    for (i, q) in queues.iter().enumerate() {
        set_up(&frontend, i, q);
        frontend.set_vring_enable(i, true).unwrap();
    }
    (frontend, queues)
}
