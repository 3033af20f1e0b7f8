//! What the channels of a disk share.

use super::cache::Cache;
use super::chain::Chain;
use super::loads::Loads;
use super::mailbox::Mailboxes;
use super::own::Own;
use super::pages::Pages;
use super::sync::SyncGroup;
use super::units::Units;
use crate::error::{self, Error, Failure};
use crate::filter::Filters;
use crate::io::{BouncePool, FileTraits, Host, HostFile, ImageLock};
use crate::limits::BOUNCE_BYTES;
use crate::map::{Claims, FileId, Waiter};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

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
    /// Those of the images, then that of the cache.
    pub(crate) files: Vec<DiskFile>,
    /// Between the images nobody writes and those above.
    pub(crate) cache: Option<Box<Cache>>,
    pub(crate) options: DiskOptions,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) claims: Claims,
    pub(crate) pages: Pages,
    pub(crate) loads: Loads,
    pub(crate) units: Units,
    pub(crate) start: Start,
    pub(crate) room: Mutex<Room>,
    bounce: Bounces,
    /// Between what the disk shows and what its images hold.
    filters: RwLock<Arc<Filters>>,
    /// There are some.
    is_filtered: AtomicBool,
    /// Reads do not go straight to the images: there is a cache, or there are filters.
    detours: AtomicBool,
    /// Of requests on their way through the filters. A pool of its own: whoever holds one of these may need one of the other.
    filter_bounce: Bounces,
    pub(crate) mailboxes: Mailboxes,
    /// The locks on its images: they go when the last channel has gone, and its I/O with it.
    locks: OnceLock<Vec<ImageLock>>,
    sync_failed: AtomicBool,
    on_sync_failure: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk")
            .field("chain", &self.chain)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// A bounded number of bounce buffers, and who waits for one.
#[derive(Debug, Default)]
pub(crate) struct Bounces {
    pool: Arc<BouncePool>,
    waiters: Mutex<VecDeque<Waiter>>,
}

impl Bounces {
    /// A buffer of `len` bytes; `None`: `who` waits for one.
    fn take(&self, len: usize, who: Waiter) -> Option<Own> {
        let mut waiters = self.waiters.lock().expect("bounce lock");
        let buf = self.pool.take(len).map(Own::Pooled);
        if buf.is_none() {
            waiters.push_back(who);
        }
        buf
    }

    /// A buffer back; the one who has waited longest is to be told.
    fn give(&self, buf: Own) -> Option<Waiter> {
        let mut waiters = self.waiters.lock().expect("bounce lock");
        drop(buf);
        waiters.pop_front()
    }

    /// Buffers in use, and those who wait for one.
    #[cfg(any(test, feature = "sim"))]
    fn held(&self) -> usize {
        self.pool.in_use() + self.waiters.lock().expect("bounce lock").len()
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
        on_sync_failure: Box<dyn Fn() + Send + Sync>,
    ) -> Arc<Disk> {
        Self::with_cache(chain, (files, None), options, host, on_sync_failure)
    }

    /// The same with a cache image, whose file's number is the one behind the others.
    pub(crate) fn with_cache(
        chain: Chain,
        (mut files, cache): (Vec<Arc<dyn HostFile>>, Option<Cache>),
        options: DiskOptions,
        host: Arc<dyn Host>,
        on_sync_failure: Box<dyn Fn() + Send + Sync>,
    ) -> Arc<Disk> {
        if let Some(cache) = &cache {
            assert_eq!(usize::from(cache.id.0), files.len(), "the cache's file comes last");
            files.push(cache.file.clone());
        }
        let detours = AtomicBool::new(cache.is_some());
        Arc::new(Disk {
            chain,
            files: files.into_iter().map(DiskFile::new).collect(),
            cache: cache.map(Box::new),
            options,
            host,
            claims: Claims::default(),
            pages: Pages::default(),
            loads: Loads::default(),
            units: Units::default(),
            start: Start::default(),
            room: Mutex::default(),
            bounce: Bounces::default(),
            filters: RwLock::default(),
            is_filtered: AtomicBool::new(false),
            detours,
            filter_bounce: Bounces::default(),
            mailboxes: Mailboxes::default(),
            locks: OnceLock::new(),
            sync_failed: AtomicBool::new(false),
            on_sync_failure,
        })
    }

    /// Gives the disk the locks on its images, once.
    pub(crate) fn hold(&self, locks: Vec<ImageLock>) {
        assert!(self.locks.set(locks).is_ok(), "a disk is given its locks once");
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
        // an image's first file has its place in the chain
        let file = &self.files[0].file;
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
        &self.files[usize::from(id.0)]
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
        (0..self.files.len()).map(|i| FileId(u16::try_from(i).expect("limits::MAX_FILES")))
    }

    /// A bounce buffer; `None`: `who` waits for one.
    pub(crate) fn take_bounce(&self, who: Waiter) -> Option<Own> {
        self.bounce.take(BOUNCE_BYTES, who)
    }

    /// A bounce buffer back; the one who has waited longest is to be told.
    pub(crate) fn give_bounce(&self, buf: Own) -> Option<Waiter> {
        self.bounce.give(buf)
    }

    /// A buffer for a request on its way through the filters, as [`Self::take_bounce`].
    pub(crate) fn take_filter_bounce(&self, len: usize, who: Waiter) -> Option<Own> {
        self.filter_bounce.take(len, who)
    }

    /// As [`Self::give_bounce`].
    pub(crate) fn give_filter_bounce(&self, buf: Own) -> Option<Waiter> {
        self.filter_bounce.give(buf)
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
        self.claims.held()
            + self.bounce.held()
            + self.filter_bounce.held()
            + self.pages.in_flight_count()
            + self.loads.in_flight_count()
            + self.units.in_flight_count()
            + self.cache.as_ref().map_or(0, |c| c.held())
            + room.waiters.len()
    }

    /// Every change is refused.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// A change may begin.
    pub(crate) fn may_write(&self) -> Result<(), Failure> {
        if self.options.read_only {
            return Err(Failure::ReadOnly);
        }
        if self.sync_failed.load(Ordering::Acquire) {
            return Err(Failure::SyncFailed);
        }
        Ok(())
    }

    /// A sync has failed: nothing is known of what the disk holds, so no change is taken from now on (rule O4).
    pub(crate) fn sync_has_failed(&self) {
        if !self.sync_failed.swap(true, Ordering::AcqRel) {
            (self.on_sync_failure)();
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
