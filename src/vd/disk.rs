//! What the channels of a disk share.

use super::cache::Cache;
use super::chain::{Chain, Layer};
use super::own::Own;
use super::shared::{OnSyncFailure, Shared};
use super::sync::SyncGroup;
use crate::error::{self, Error, Failure};
use crate::filter::Filters;
use crate::io::{FileTraits, Host, HostFile, ImageLock};
use crate::limits::{BOUNCE_BYTES, MAX_FILES};
use crate::map::{FileId, ImageMap, Waiter};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, RwLock};

/// How a disk uses the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Past the page cache (O_DIRECT); flushes make durable.
    None,
    /// Through the page cache; flushes make durable.
    #[default]
    Writeback,
    /// Through the page cache; every change is synced before it is reported as done.
    Writethrough,
    /// Through the page cache; flushes are ignored. A power cut may cost everything.
    Unsafe,
}

impl std::fmt::Display for CacheMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            CacheMode::None => "none",
            CacheMode::Writeback => "writeback",
            CacheMode::Writethrough => "writethrough",
            CacheMode::Unsafe => "unsafe",
        })
    }
}

/// What the user decided about a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// No change is taken.
    pub read_only: bool,
    /// Syncs are left out: a job that syncs once at its end, or `--cache unsafe`.
    pub skip_syncs: bool,
    /// Every change is synced before it is reported as done, whatever the driver negotiated.
    pub write_through: bool,
    /// Discards give space back.
    pub discard: bool,
    /// What is written is kept although it is what shows through: what is beneath will go.
    pub write_same: bool,
    /// Zeros that are written are stored as such, where they could be marked or left out.
    pub store_zeros: bool,
}

impl Default for DiskOptions {
    fn default() -> Self {
        DiskOptions {
            read_only: false,
            skip_syncs: false,
            write_through: false,
            discard: true,
            write_same: false,
            store_zeros: false,
        }
    }
}

/// A file of a disk.
#[derive(Debug)]
pub(crate) struct DiskFile {
    pub(crate) file: Arc<dyn HostFile>,
    pub(crate) traits: FileTraits,
    pub(crate) syncs: SyncGroup,
    /// The file system cannot punch holes: found out by trying.
    cannot_punch: AtomicBool,
}

impl DiskFile {
    fn new(file: Arc<dyn HostFile>) -> Self {
        let traits = file.traits();
        DiskFile { traits, syncs: SyncGroup::new(true), cannot_punch: AtomicBool::new(false), file }
    }

    pub(crate) fn can_punch(&self) -> bool {
        !self.cannot_punch.load(Ordering::Relaxed)
    }

    pub(crate) fn note_cannot_punch(&self) {
        self.cannot_punch.store(true, Ordering::Relaxed);
    }
}

/// A disk: a chain of images over open files, and the state its channels share. Reads and writes to allocated blocks
/// touch nothing here but the chain and atomics.
pub struct Disk {
    pub(crate) chain: Chain,
    /// Those of the images, then that of the cache, each in the place of its number; shared with other disks over the same images.
    files: Vec<Option<Arc<DiskFile>>>,
    /// The first of the top image's.
    top_file: FileId,
    /// Between the images nobody writes and those above.
    pub(crate) cache: Option<Box<Cache>>,
    pub(crate) options: DiskOptions,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) start: Start,
    pub(crate) room: Mutex<Room>,
    /// Between what the disk shows and what its images hold.
    filters: RwLock<Arc<Filters>>,
    /// There are some.
    is_filtered: AtomicBool,
    /// Reads do not go straight to the images: there is a cache, or there are filters.
    detours: AtomicBool,
}

/// An image that is to become the top of a disk's chain.
pub(crate) struct NewTop {
    pub(crate) map: Arc<dyn ImageMap>,
    /// Their numbers begin with what [`Disk::free_files`] has said.
    pub(crate) files: Vec<Arc<dyn HostFile>>,
    pub(crate) locks: Vec<ImageLock>,
    pub(crate) on_sync_failure: OnSyncFailure,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk")
            .field("chain", &self.chain)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// The extension of the file that prepares host blocks: at most one runs.
#[derive(Debug, Default)]
pub(crate) struct Room {
    pub(crate) running: bool,
    pub(crate) waiters: Vec<Waiter>,
}

impl Disk {
    /// A disk over `chain`, whose files have the numbers of their places in `files`. Only the top image is written.
    pub fn new(
        chain: Chain,
        files: Vec<Arc<dyn HostFile>>,
        options: DiskOptions,
        host: Arc<dyn Host>,
        on_sync_failure: OnSyncFailure,
    ) -> Arc<Disk> {
        Self::with_cache(chain, (files, None), options, host, on_sync_failure)
    }

    /// The same with a cache image, whose file's number is the one behind the others.
    pub(crate) fn with_cache(
        chain: Chain,
        (mut files, cache): (Vec<Arc<dyn HostFile>>, Option<Cache>),
        options: DiskOptions,
        host: Arc<dyn Host>,
        on_sync_failure: OnSyncFailure,
    ) -> Arc<Disk> {
        if let Some(cache) = &cache {
            assert_eq!(usize::from(cache.id.0), files.len(), "the cache's file comes last");
            files.push(cache.file.clone());
        }
        let detours = AtomicBool::new(cache.is_some());
        let numbers = chain.layers().iter().map(|l| l.number).max().expect("a chain has an image");
        let shared = Shared::new(numbers + 1, on_sync_failure);
        if !options.read_only {
            shared.begin_writing(chain.top().number);
        }
        Arc::new(Disk {
            chain,
            files: files.into_iter().map(|f| Some(Arc::new(DiskFile::new(f)))).collect(),
            top_file: FileId(0),
            cache: cache.map(Box::new),
            options,
            host,
            shared,
            start: Start::default(),
            room: Mutex::default(),
            filters: RwLock::default(),
            is_filtered: AtomicBool::new(false),
            detours,
        })
    }

    /// The number that the first file of an image may have which is to be put on top, with so many files; `None` if there are too
    /// many.
    pub(crate) fn free_files(&self, files: usize) -> Option<FileId> {
        let first = self.files.len();
        (first + files <= MAX_FILES).then_some(FileId(u16::try_from(first).ok()?))
    }

    /// A disk with another image on top of this one's. This one is to write nothing from the moment on at which the first channel
    /// goes over to the new one; what it has left to do at its top image [`super::Finish`] does.
    ///
    /// # Panics
    /// If the disk has a cache image: its places are counted by images.
    pub(crate) fn under(self: &Arc<Disk>, top: NewTop) -> Arc<Disk> {
        assert!(self.cache.is_none(), "a cache image beneath an image that was written");
        let number = self.shared.new_image();
        self.shared.begin_writing(number);
        self.shared.hold(number, top.locks);
        self.shared.tell_of_sync_failure(top.on_sync_failure);
        let layer = Layer { number, map: top.map };
        let new = top.files.into_iter().map(|f| Some(Arc::new(DiskFile::new(f))));
        Arc::new(Disk {
            chain: Chain::new([layer].into_iter().chain(self.chain.layers().iter().cloned()).collect()),
            top_file: self.free_files(0).expect("numbers are left"),
            files: self.files.iter().cloned().chain(new).collect(),
            cache: None,
            options: self.options,
            host: self.host.clone(),
            shared: self.shared.clone(),
            start: Start::default(),
            room: Mutex::default(),
            filters: RwLock::new(self.filters()),
            is_filtered: AtomicBool::new(self.is_filtered()),
            detours: AtomicBool::new(self.has_detours()),
        })
    }

    /// Gives the disk the locks on an image, for as long as any disk over it is open.
    pub(crate) fn hold(&self, image: u32, locks: Vec<ImageLock>) {
        self.shared.hold(image, locks);
    }

    /// The top image is written no more: others may read it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Locked`] and the operating system's; the lock stays as it is.
    pub(crate) fn share_top(&self) -> error::Result<()> {
        self.shared.share_locks(self.chain.top().number, self.top_path())
    }

    /// The top image has never been served: its locks go.
    pub(crate) fn forget_top(&self) {
        self.shared.forget(self.chain.top().number);
    }

    /// The disk is closed, and no channel is left: the locks on all its images go.
    pub(crate) fn forget_images(&self) {
        self.shared.forget_all();
    }

    /// The first file of the image that is written.
    pub(crate) fn top_path(&self) -> &Path {
        self.file(self.top_file).file.path()
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.chain.size_bytes()
    }

    /// Looks at the size of the image's file again. The disk's new size, if that has changed it: larger only, and for
    /// images whose size is their file's.
    ///
    /// # Errors
    /// From the operating system.
    pub fn grow(&self) -> error::Result<Option<u64>> {
        let file = &self.file(self.top_file).file;
        self.chain.grow(&**file).map_err(|e| Error::io("find out its length", e).at(file.path()))
    }

    /// The images, top first.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// The options it was opened with.
    pub fn options(&self) -> DiskOptions {
        self.options
    }

    pub(crate) fn file(&self, id: FileId) -> &DiskFile {
        self.files[usize::from(id.0)].as_ref().expect("a file of the disk")
    }

    /// The file that extents call `id`, for jobs that ask where its holes are.
    ///
    /// # Panics
    /// If no image of the disk has such a file.
    pub fn host_file(&self, id: FileId) -> &Arc<dyn HostFile> {
        &self.file(id).file
    }

    /// The files of the images, by number.
    pub(crate) fn image_file_ids(&self) -> impl Iterator<Item = FileId> + '_ {
        self.file_ids().filter(|id| !self.is_cache(*id))
    }

    /// The file is the cache image's.
    pub(crate) fn is_cache(&self, id: FileId) -> bool {
        self.cache.as_ref().is_some_and(|c| c.id == id)
    }

    /// The files by number.
    pub(crate) fn file_ids(&self) -> impl Iterator<Item = FileId> + '_ {
        let number = |i: usize| FileId(u16::try_from(i).expect("limits::MAX_FILES"));
        self.files.iter().enumerate().filter(|(_, f)| f.is_some()).map(move |(i, _)| number(i))
    }

    /// A bounce buffer; `None`: `who` waits for one.
    pub(crate) fn take_bounce(&self, who: Waiter) -> Option<Own> {
        self.shared.bounce.take(BOUNCE_BYTES, who)
    }

    /// A bounce buffer back; the one who has waited longest is to be told.
    pub(crate) fn give_bounce(&self, buf: Own) -> Option<Waiter> {
        self.shared.bounce.give(buf)
    }

    /// A buffer for a request on its way through the filters, as [`Self::take_bounce`].
    pub(crate) fn take_filter_bounce(&self, len: usize, who: Waiter) -> Option<Own> {
        self.shared.filter_bounce.take(len, who)
    }

    /// As [`Self::give_bounce`].
    pub(crate) fn give_filter_bounce(&self, buf: Own) -> Option<Waiter> {
        self.shared.filter_bounce.give(buf)
    }

    /// The filters as they are now; a request keeps those it has begun with.
    pub fn filters(&self) -> Arc<Filters> {
        self.filters.read().expect("filter lock").clone()
    }

    /// Adds or removes filters. For requests that are under way those are at work that they have begun with.
    pub fn change_filters<T>(&self, change: impl FnOnce(&mut Filters) -> T) -> T {
        let mut filters = self.filters.write().expect("filter lock");
        let changed = change(Arc::make_mut(&mut filters));
        let any = !filters.is_empty();
        self.is_filtered.store(any, Ordering::Release);
        self.detours.store(any || self.cache.is_some(), Ordering::Release);
        changed
    }

    /// There are filters.
    pub(crate) fn is_filtered(&self) -> bool {
        self.is_filtered.load(Ordering::Acquire)
    }

    /// See [`Self::detours`]: what a read of a disk without them pays for cache and filters.
    pub(crate) fn has_detours(&self) -> bool {
        self.detours.load(Ordering::Acquire)
    }

    /// Claims, bounce buffers, page writes and waiting slots that are still held: 0 for a disk at rest.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn held(&self) -> usize {
        let room = self.room.lock().expect("room lock");
        self.shared.held() + self.cache.as_ref().map_or(0, |c| c.held()) + room.waiters.len()
    }

    /// Every change is refused.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// The top image is ready for changes: it says that its contents are about to differ.
    pub(crate) fn has_begun(&self) -> bool {
        self.start.is_done()
    }

    /// A change may begin.
    pub(crate) fn may_write(&self) -> Result<(), Failure> {
        if self.options.read_only {
            return Err(Failure::ReadOnly);
        }
        if self.shared.has_sync_failed() {
            return Err(Failure::SyncFailed);
        }
        Ok(())
    }

    /// A sync has failed: nothing is known of what the disk holds, so no change is taken from now on (rule O4).
    pub(crate) fn sync_has_failed(&self) {
        self.shared.sync_has_failed();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if !self.options.read_only {
            self.shared.end_writing(self.chain.top().number);
        }
    }
}

/// The beginning of a session of changes: done once, before the first.
#[derive(Debug, Default)]
pub(crate) struct Start {
    /// 0: not begun, 1: under way, 2: done.
    state: AtomicU8,
    waiters: Mutex<Vec<Waiter>>,
}

/// Answer of [`Start::join`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Started {
    Yes,
    /// Carry out [`crate::map::ImageMap::begin`], then call [`Start::ended`].
    Begin,
    Wait,
}

impl Start {
    /// True once changes may be made. What a write to allocated blocks pays for all of this.
    pub(crate) fn is_done(&self) -> bool {
        self.state.load(Ordering::Acquire) == 2
    }

    pub(crate) fn join(&self, who: Waiter) -> Started {
        if self.is_done() {
            return Started::Yes;
        }
        let mut waiters = self.waiters.lock().expect("start lock");
        match self.state.load(Ordering::Acquire) {
            2 => Started::Yes,
            1 => {
                waiters.push(who);
                Started::Wait
            }
            _ => {
                self.state.store(1, Ordering::Release);
                waiters.push(who);
                Started::Begin
            }
        }
    }

    /// The begin plan has ended; those who wait are to be told. After a failure the next change tries again.
    pub(crate) fn ended(&self, ok: bool) -> Vec<Waiter> {
        let mut waiters = self.waiters.lock().expect("start lock");
        self.state.store(if ok { 2 } else { 0 }, Ordering::Release);
        std::mem::take(&mut waiters)
    }
}
