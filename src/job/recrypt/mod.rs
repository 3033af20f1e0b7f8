//! Encrypting, decrypting, and changing the key of images: in a copy that takes the image's place, or in place.

mod journal;
mod work;

pub use journal::Task;
pub use work::RecryptJob;

use super::create::{folder_of, remove_files};
use super::{Watch, compare_disks};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::{Crypt, Filter, Filters, KeyChange, KeyStore, Secret, Unallocated};
use crate::format::OpenHow;
use crate::io::{HostFile, ImageLock, LockMode, OpenHow as OpenFile, OsFile, sync_dir};
use crate::map::{DeviceType, FileId};
use crate::vd::{
    Disk, ImageFiles, ImageSpec, OpenDisk, Sought, any_other_child, open_disk, refuse_if_unfinished,
    side_file, stand_in,
};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Bytes copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// A key of disks, and its name.
#[derive(Clone, Debug)]
pub struct DiskKey {
    /// The filter with it.
    pub filter: Arc<dyn Filter>,
    /// Names it: the digest in its key store, or another that no other key has.
    pub digest: [u8; 32],
}

impl DiskKey {
    /// The key that was in this key store.
    ///
    /// # Errors
    /// If it is none of the store's cipher.
    pub fn of(key: &Secret, store: &KeyStore) -> Result<DiskKey> {
        Ok(DiskKey { filter: Arc::new(Crypt::new(store.cipher(), key)?), digest: store.key_digest() })
    }
}

/// Where the result goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Into {
    /// A copy beside the image, which takes its place when it is complete and was compared.
    Replacement,
    /// A new file; the image stays as it is.
    File(PathBuf),
    /// The image itself, and its parents. A side file makes it safe to end at any moment.
    Place,
}

/// A change of keys.
#[derive(Clone, Debug)]
pub struct Recrypt {
    /// The image and how to find its parents.
    pub image: OpenDisk,
    /// What it is encrypted with; `None`: nothing.
    pub from: Option<DiskKey>,
    /// What it is to be encrypted with.
    pub to: Option<DiskKey>,
    /// Where to.
    pub into: Into,
    /// What takes no space in files (holes in allocated places) is encrypted, too: for programs that decrypt all there is.
    pub fill_holes: bool,
}

/// A change in place of this image has begun, and is not complete.
pub fn is_unfinished(image: &Path) -> bool {
    side_file(image).symlink_metadata().is_ok()
}

/// Changes the key. UUIDs and all that images say of themselves stay. Cancelled, or stopped in any other way: a copy leaves the image
/// as it was; in place the same call completes it, and until then nobody else opens it.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for images that cannot be changed so; [`ErrorKind::ReadOnly`] where other images stand on them; of
/// opening, locking, reading and writing; [`ErrorKind::Cancelled`].
pub fn recrypt(how: &Recrypt, watch: &mut Watch<'_>) -> Result<()> {
    let change = KeyChange { from: filter_of(&how.from), to: filter_of(&how.to) };
    let chain = Chain::lock(how)?;
    match &how.into {
        Into::Place => in_place(how, &chain, change, watch),
        Into::File(path) => copied(how, &chain, change, path, watch),
        Into::Replacement => {
            // The file itself: a link that was named stays a link.
            let path =
                &fs::canonicalize(chain.path(0)).map_err(|e| Error::io("find it", e).at(chain.path(0)))?;
            let mut name = path.file_name().unwrap_or_default().to_os_string();
            name.push(".recrypt-new");
            let copy = path.with_file_name(name);
            // One that was left by a process that was killed: we hold the image's lock, so it is nobody's.
            remove_files(std::slice::from_ref(&copy));
            copied(how, &chain, change, &copy, watch)?;
            let replaced =
                fs::rename(&copy, path).map_err(|e| Error::io("put the copy in its place", e).at(path));
            replaced.inspect_err(|_| remove_files(std::slice::from_ref(&copy)))?;
            if let Err(e) = sync_dir(folder_of(path)) {
                // Both are whole: whichever a power cut leaves.
                tracing::warn!("after a power cut the image may be the old one: {e}");
            }
            Ok(())
        }
    }
}

fn filter_of(key: &Option<DiskKey>) -> Option<Arc<dyn Filter>> {
    key.as_ref().map(|k| k.filter.clone())
}

/// The images, the top first, locked.
struct Chain {
    specs: Vec<ImageSpec>,
    images: Vec<ImageFiles>,
}

impl Chain {
    fn path(&self, n: usize) -> &Path {
        &self.specs[n].path
    }

    fn lock(how: &Recrypt) -> Result<Chain> {
        let write = how.into == Into::Place;
        if !write {
            refuse_if_unfinished(&how.image.image.path)?;
        }
        let looked_at =
            open_disk(&OpenDisk { lock_wait: None, filters: Filters::default(), ..how.image.clone() })?;
        let spec = |path: &PathBuf, format| ImageSpec { path: path.clone(), format: Some(format) };
        let specs: Vec<_> = looked_at.images.iter().map(|i| spec(&i.path, i.format)).collect();
        drop(looked_at);
        let wait = Some(how.image.lock_wait.unwrap_or(Duration::ZERO));
        let open = |s: &ImageSpec| {
            // A copy that is to take the image's place needs it as a writer does.
            let exclusive = !matches!(how.into, Into::File(_));
            ImageFiles::open_any(&s.path, s.format, exclusive, wait, false)
        };
        let images = specs.iter().map(open).collect::<Result<Vec<_>>>()?;
        let chain = Chain { specs, images };
        chain.refuse(how)?;
        Ok(chain)
    }

    /// What cannot be done, before anything is.
    fn refuse(&self, how: &Recrypt) -> Result<()> {
        let unsupported = |n: usize, what: &str, hint: &str| {
            Err(Error::new(ErrorKind::Unsupported, what).at(self.path(n)).hint(hint))
        };
        let copies = how.into != Into::Place;
        if copies && self.images.len() > 1 {
            let what = "has parents, and all images of a chain share one key: they change together";
            return unsupported(0, what, "pass --in-place, or vdimg convert it into one image first");
        }
        if copies && self.images[0].files().len() > 1 {
            return unsupported(0, "consists of several files", "pass --in-place, or vdimg convert it first");
        }
        let is_device = |i: &ImageFiles| i.files().iter().any(|f| f.traits().is_device);
        if let Some(n) = self.images.iter().position(is_device) {
            return unsupported(n, "is a device of the host", "copy it into a file with vdimg convert");
        }
        let mut infos = Vec::new();
        for (n, image) in self.images.iter().enumerate() {
            let map = image.map(FileId(0), OpenHow { read_only: true, info_only: false })?;
            let mut info = map.info();
            info.device = crate::format::device_type(image.format(), self.path(n), info.virtual_size);
            if !info.snapshots.is_empty() {
                let what = "has internal snapshots, which would keep the old key";
                return unsupported(n, what, "vdimg convert it, or delete them");
            }
            if map.unwritten().is_some() || info.device == DeviceType::Dvd {
                return unsupported(n, "has parts that are only read", "vdimg convert it first");
            }
            if let Some(report) = image.check()?
                && report.corruptions > 0
            {
                let what = "is damaged: what of it belongs where is not certain";
                return Err(Error::new(ErrorKind::Corrupt, what)
                    .at(self.path(n))
                    .hint("vdimg repair it first"));
            }
            if !matches!(how.into, Into::File(_)) {
                image.refuse_to_write(&info, true)?;
            }
            infos.push(info);
        }
        if matches!(how.into, Into::File(_)) || how.image.allow_write_to_parent {
            return Ok(());
        }
        let own: Vec<&Path> = self.specs.iter().map(|s| s.path.as_path()).collect();
        let sought = |(n, info): (usize, &crate::map::ImageInfo)| Sought {
            path: self.path(n),
            own: info.uuid,
            named: info.uuid.or_else(|| stand_in(self.path(n))),
        };
        let sought: Vec<_> = infos.iter().enumerate().map(sought).collect();
        let Some((parent, child)) = any_other_child(&sought, &own) else { return Ok(()) };
        let what = format!("is the parent of {}, which would keep the old key", child.display());
        Err(Error::new(ErrorKind::ReadOnly, what)
            .at(parent)
            .hint("name the image on top of the chain, with --in-place"))
    }

    /// Each image as a disk by itself.
    fn alone(&self) -> Result<Vec<Arc<Disk>>> {
        self.images.iter().map(ImageFiles::alone).collect()
    }

    fn task(&self, how: &Recrypt) -> Result<Task> {
        let digest = |key: &Option<DiskKey>| key.as_ref().map_or([0; 32], |k| k.digest);
        let mut sum = Sha256::new();
        for image in &self.images {
            let info = image.map(FileId(0), OpenHow { read_only: true, info_only: false })?.info();
            sum.update(info.virtual_size.to_le_bytes());
            sum.update(info.uuid.map_or([0; 16], uuid::Uuid::into_bytes));
            sum.update([0xff]);
        }
        Ok(Task {
            from: digest(&how.from),
            to: digest(&how.to),
            images: sum.finalize().into(),
            fill_holes: how.fill_holes.into(),
        })
    }
}

/// Side files of all images are there before the first byte is written, and the one that matters is the last to go.
fn in_place(how: &Recrypt, chain: &Chain, change: KeyChange, watch: &mut Watch<'_>) -> Result<()> {
    let task = chain.task(how)?;
    let side = open_side_file(&side_file(chain.path(0)))?;
    for n in 1..chain.images.len() {
        // It says what the one of the top says: no other command takes the image for one that was never touched.
        let file = open_side_file(&side_file(chain.path(n)))?;
        if journal::Journal::resume(&file, &task)?.is_none() {
            journal::Journal::begin(&file, &task)?;
        }
    }
    let folders: Vec<_> = chain.specs.iter().map(|s| folder_of(&s.path)).collect();
    folders.iter().try_for_each(|f| sync_dir(f))?;
    let mut job = RecryptJob::new(chain.alone()?, change, &task, Some(&side))?;
    let done = watch.run(&mut job);
    if let Some(n) = job.sync_failed {
        chain.images[n].mark_failed_sync();
    }
    done?;
    for n in (0..chain.images.len()).rev() {
        let path = side_file(chain.path(n));
        fs::remove_file(&path).map_err(|e| Error::io("remove it", e).at(&path))?;
        sync_dir(folders[n])?;
    }
    Ok(())
}

fn open_side_file(path: &Path) -> Result<OsFile> {
    let new = OpenFile { create_new: true, ..OpenFile::default() };
    let file = match OsFile::open(path, new) {
        Err(e) if e.kind() == ErrorKind::Exists => {
            OsFile::open(path, OpenFile { write: true, ..OpenFile::default() })?
        }
        opened => opened?,
    };
    file.sync().map_err(|e| Error::io("sync it", e).at(path))?;
    Ok(file)
}

/// A copy of the image's one file, with the other key, compared with the image.
fn copied(how: &Recrypt, chain: &Chain, change: KeyChange, to: &Path, watch: &mut Watch<'_>) -> Result<()> {
    let file = OsFile::open(to, OpenFile { create_new: true, ..OpenFile::default() })?;
    let done = fill_copy(how, chain, change, &file, watch);
    if done.is_err() {
        remove_files(&[to.to_path_buf()]);
    }
    done
}

fn fill_copy(
    how: &Recrypt,
    chain: &Chain,
    change: KeyChange,
    file: &OsFile,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let (source, path) = (&chain.images[0].files()[0], file.path());
    // Nobody shall take it for an image before it is one.
    let lock = ImageLock::take(file, LockMode::Exclusive, Duration::ZERO)?;
    copy_bytes(&**source, file, watch)?;
    keep_mode(source.path(), path)?;
    let format = chain.images[0].format();
    let copy = ImageFiles::open_any(path, Some(format), true, None, false)?;
    let mut job = RecryptJob::new(vec![copy.alone()?], change, &chain.task(how)?, None)?;
    watch.run(&mut job)?;
    file.sync().map_err(|e| Error::io("sync it", e).at(path))?;
    // What both show has to be the same.
    let (before, after) = (chain.images[0].alone()?, copy.alone()?);
    let behind = |key: &Option<DiskKey>| {
        key.as_ref().map_or_else(Filters::default, |k| Filters::of(k.filter.clone(), Unallocated::Zeros))
    };
    before.change_filters(|f| *f = behind(&how.from));
    after.change_filters(|f| *f = behind(&how.to));
    if let Some(at) = compare_disks(&before, &after, watch)?.difference {
        let what = format!("the copy does not show the same, first at byte {at} of the disk");
        return Err(Error::new(ErrorKind::Io, what).at(path));
    }
    sync_dir(folder_of(path))?;
    watch.stop_if_cancelled()?;
    drop(lock);
    Ok(())
}

/// All bytes of a file; its holes stay holes.
fn copy_bytes(from: &dyn HostFile, to: &OsFile, watch: &Watch<'_>) -> Result<()> {
    let read_failed = |e| Error::io("read it", e).at(from.path());
    let write_failed = |e| Error::io("write it", e).at(to.path());
    let len = from.len().map_err(read_failed)?;
    to.set_len(len).map_err(write_failed)?;
    let mut at = 0;
    while let Some(data) = from.next_data(at).map_err(read_failed)?.filter(|d| *d < len) {
        let end = from.next_hole(data).map_err(read_failed)?.clamp(data + 1, len);
        at = data;
        while at < end {
            watch.stop_if_cancelled()?;
            let n = (end - at).min(COPY_BYTES);
            let bytes = journal::read(from, at, usize::try_from(n).expect("1 MiB at most"))?;
            to.write_at(at, &bytes).map_err(write_failed)?;
            at += n;
        }
    }
    Ok(())
}

/// Whoever may read the image may read the copy. Its owner stays where we may not give files away.
fn keep_mode(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, chown};
    let there = fs::metadata(from).map_err(|e| Error::io("look at its permissions", e).at(from))?;
    let _ = chown(to, Some(there.uid()), Some(there.gid()));
    fs::set_permissions(to, there.permissions()).map_err(|e| Error::io("set its permissions", e).at(to))
}
