//! The steps of a live snapshot, as the program does them.

use super::order::{self, SnapshotSteps};
use super::{Chain, ChainImage, LiveDisk};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::format::{Format, NewParent};
use crate::io::EngineKind;
use crate::job::{CreateImage, create_files, named_from, open_channel_over, remove_files};
use crate::limits::MAX_CHAIN_IMAGES;
use crate::vd::{BlockDevice, Channel, Disk, Finish, FinishStep, ImageSpec, Request, open_on_top};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long something is waited for that happens in other threads.
const A_MOMENT: Duration = Duration::from_millis(1);
/// The longest wait for I/O of our own, before others are looked at.
const FOR_IO: Duration = Duration::from_millis(20);

/// A snapshot to be made of a disk that is being served.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The new image, which takes the writes from then on; nothing may be there yet.
    pub file: PathBuf,
    /// Its format; `None`: that of the image on top, or QCOW2 where that has no differencing images.
    pub format: Option<Format>,
    /// Its UUID; `None`: a random one.
    pub uuid: Option<Uuid>,
    /// `KEY=VALUE` options of the format.
    pub options: Vec<(String, String)>,
    /// How long requests under way may take to end; the disk goes on as before if they take longer.
    pub patience: Duration,
}

impl Snapshot {
    /// A snapshot whose new image is `file`, everything else as people expect.
    pub fn new(file: impl Into<PathBuf>) -> Snapshot {
        Snapshot {
            file: file.into(),
            format: None,
            uuid: None,
            options: Vec::new(),
            patience: Duration::from_secs(10),
        }
    }
}

/// What came of a snapshot.
#[derive(Debug)]
pub struct Snapped {
    /// For so long no request was taken.
    pub pause: Duration,
    /// The new image, which is on top now.
    pub image: ChainImage,
    /// The image beneath it could not be left as a clean close does; it reads right, and holds space that `vdimg repair` frees.
    pub unfinished: Option<Error>,
}

impl LiveDisk {
    /// Puts a new image on top of the disk's chain; the one that was on top stays as it is at this moment. The guest's requests wait
    /// for [`Snapped::pause`]. Durable when this returns: a daemon that is started again by the record serves the new image.
    ///
    /// # Errors
    /// For what cannot be, with one line: [`ErrorKind::Exists`], [`ErrorKind::Unsupported`], [`ErrorKind::ReadOnly`],
    /// [`ErrorKind::Limit`]. From the operating system, and [`ErrorKind::Io`] if requests do not end. The disk goes on as before then, and
    /// no image is left, except one that the record may name.
    pub fn snapshot(&self, how: &Snapshot) -> Result<Snapped> {
        let ended = self.one_change();
        if *ended {
            return Err(Error::new(ErrorKind::State, "the disk is not served any more").at(&how.file));
        }
        let old = self.current();
        let format = checked(how, &old)?;
        let helper = open_channel_over(EngineKind::Threads, &old.disk, 1)?;
        let mut steps = Steps {
            live: self,
            how,
            format,
            old,
            helper: Some(helper),
            made: Vec::new(),
            new: None,
            pause: Duration::ZERO,
        };
        let made = order::snapshot(&mut steps)?;
        if let Some(e) = &made.unfinished {
            tracing::warn!("the image beneath {} was not left in order: {e}", how.file.display());
        }
        let image = steps.new.expect("a snapshot that was made").images[0].clone();
        tracing::info!("{} is on top now, after a pause of {:?}", how.file.display(), steps.pause);
        Ok(Snapped { pause: steps.pause, image, unfinished: made.unfinished })
    }
}

/// What is known to be impossible before anything is done; the new image's format.
fn checked(how: &Snapshot, old: &Chain) -> Result<Format> {
    let refused = |kind, what: String| Err(Error::new(kind, what).at(&how.file));
    let top = &old.images[0];
    let format = how.format.unwrap_or(if top.format == Format::Raw { Format::Qcow2 } else { top.format });
    if old.disk.is_read_only() {
        return refused(ErrorKind::ReadOnly, "the disk is read-only: nothing would ever be in it".into());
    }
    if std::fs::symlink_metadata(&how.file).is_ok() {
        return refused(ErrorKind::Exists, "exists, and nothing is overwritten".into());
    }
    if old.disk.cache_counts().is_some() {
        let what =
            "a disk with a cache image takes no snapshots: its cache is of the images beneath the top one";
        return refused(ErrorKind::Unsupported, what.into());
    }
    if old.images.len() >= MAX_CHAIN_IMAGES {
        return refused(ErrorKind::Limit, format!("more than {MAX_CHAIN_IMAGES} images in a chain"));
    }
    // Their word for the parent is its UUID alone.
    let by_uuid = matches!(format, Format::Vdi | Format::Parallels);
    if by_uuid && old.disk.chain().top().map.info().uuid.is_none() {
        let what = format!("{format} names its parent by UUID, and {} has none", top.format);
        return Err(Error::new(ErrorKind::Unsupported, what).at(&how.file).hint("choose qcow2"));
    }
    Ok(format)
}

struct Steps<'a> {
    live: &'a LiveDisk,
    how: &'a Snapshot,
    format: Format,
    old: Arc<Chain>,
    /// To the disk as it was.
    helper: Option<Channel>,
    made: Vec<PathBuf>,
    new: Option<Arc<Chain>>,
    pause: Duration,
}

impl Steps<'_> {
    fn helper(&mut self) -> &mut Channel {
        self.helper.as_mut().expect("until it finishes the old image")
    }

    /// Until nothing of the helper's is in flight: how its request has ended.
    fn settle(&mut self) -> Result<()> {
        let mut done = Vec::new();
        let helper = self.helper();
        while !helper.is_idle() {
            helper.drive(FOR_IO, &mut done).map_err(|e| Error::io("finish what is in flight", e))?;
            if !helper.is_idle() {
                std::thread::sleep(A_MOMENT);
            }
        }
        done.into_iter().try_for_each(|d| d.outcome.map_err(Error::from))
    }

    fn disk(&self) -> &Arc<Disk> {
        &self.old.disk
    }
}

impl SnapshotSteps for Steps<'_> {
    fn begin(&mut self) -> Result<()> {
        self.helper().begin_changes();
        self.settle()?;
        let begun = self.disk().clone();
        let end = Instant::now() + self.how.patience;
        while !begun.has_begun() {
            // a queue does it
            if Instant::now() >= end || begun.may_write().is_err() {
                let why = begun.may_write().err().unwrap_or(Failure::Os(libc::EIO));
                return Err(Error::from(why).at(begun.top_path()));
            }
            self.helper().begin_changes();
            self.settle()?;
            std::thread::sleep(A_MOMENT);
        }
        Ok(())
    }

    fn intend(&mut self) -> Result<()> {
        self.live.record(&self.old, Some(&self.how.file))
    }

    fn make(&mut self) -> Result<()> {
        let info = self.disk().chain().top().map.info();
        let geometry = self.format.geometry_from(info.geometry);
        let path = named_from(&self.how.file, self.disk().top_path());
        self.made = create_files(&CreateImage {
            uuid: self.how.uuid,
            parent: Some(NewParent { info, path }),
            geometry,
            options: self.how.options.clone(),
            ..CreateImage::new(&self.how.file, self.format, self.disk().size_bytes())
        })?;
        Ok(())
    }

    fn prepare(&mut self) -> Result<()> {
        let spec = ImageSpec { path: self.how.file.clone(), format: Some(self.format) };
        let (disk, image) = open_on_top(self.disk(), &spec, self.live.is_direct())?;
        let image = ChainImage::of(&image);
        let images = std::iter::once(image).chain(self.old.images.iter().cloned()).collect();
        let new = self.new.insert(Arc::new(Chain { disk, images }));
        self.live.control().prepare(&new.disk)?;
        if let Some(outcome) = self.helper().submit(0, Request::Flush, &[]) {
            return outcome.map_err(Error::from);
        }
        self.settle()
    }

    fn record(&mut self, new: bool) -> Result<()> {
        let chain = if new { self.new.as_ref() } else { None };
        self.live.record(chain.unwrap_or(&self.old), None)
    }

    fn switch(&mut self) -> Result<()> {
        let new = self.new.clone().expect("prepared");
        let begin = Instant::now();
        let held = self.live.control().hold(self.how.patience)?;
        if new.disk.size_bytes() != self.disk().size_bytes() {
            let what = "the disk has grown while the snapshot was being made";
            return Err(Error::new(ErrorKind::State, what).at(&self.how.file).hint("try again"));
        }
        self.live.set_current(new.clone());
        held.go_on_with(&new.disk);
        self.pause = begin.elapsed();
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let mut finish = Finish::new(self.helper.take().expect("once"));
        loop {
            match finish.step()? {
                FinishStep::More => {}
                FinishStep::Later => std::thread::sleep(A_MOMENT),
                FinishStep::Fence => {
                    drop(self.live.control().hold(self.how.patience)?);
                    finish.pass();
                }
                FinishStep::Done => return self.disk().share_top(),
            }
        }
    }

    fn remove(&mut self) {
        if let Some(new) = self.new.take() {
            new.disk.forget_top();
        }
        remove_files(&self.made);
    }
}
