//! `vdimg mount`: [`DiskFolder`] through FUSE. The file system knows a folder with files of fixed length, and nothing else.

use super::args::Mount;
use super::terminal::{self, print};
use fuser::{
    AccessFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite, ReplyXattr, Request, Session, SessionACL, TimeOrNow,
    WriteFlags,
};
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use vdblk::job::DiskFolder;
use vdblk::vd::{DiskOptions, OpenDisk, open_disk};
use vdblk::{Error, ErrorKind, Result};

/// Nothing changes but bytes.
const TTL: Duration = Duration::from_secs(3600);
/// How often is looked for a signal, and for the end.
const LOOK: Duration = Duration::from_millis(50);

pub(crate) fn run(args: &Mount) -> Result<u8> {
    terminal::end_in_order();
    let read_only = !args.writable;
    let opened = open_disk(&OpenDisk {
        allow_write_to_parent: args.allow_write_to_parent,
        options: DiskOptions { read_only, ..DiskOptions::default() },
        ..args.image.open(&args.file, args.snapshot.snapshot.as_ref(), args.lock)?
    })?;
    let folder = Arc::new(DiskFolder::new(&opened.disk).map_err(|e| e.at(&args.file))?);
    drop(opened);
    let names: Vec<_> = folder.files().iter().map(|f| f.name.clone()).collect();
    let fs = Files { folder: folder.clone(), since: SystemTime::now(), owner: owner_of(&args.folder)? };
    let failed = |e| Error::io("mount it", e).at(&args.folder);
    let mut session = Session::new(fs, &args.folder, &config(args)).map_err(failed)?;
    let mut mounted = session.unmount_callable();
    let served = std::thread::spawn(move || session.run());
    print(&format!("{}: {}\n", args.folder.display(), names.join(" ")))?;
    let mut is_told = false;
    while !served.is_finished() {
        if terminal::is_interrupted() && !std::mem::replace(&mut is_told, true) {
            let gone = mounted.unmount();
            if gone.is_err() {
                leave_lazily(&args.folder);
            }
        }
        std::thread::sleep(LOOK);
    }
    let ended =
        served.join().map_err(|_| Error::new(ErrorKind::Io, "the file system's thread has panicked"))?;
    let folder = Arc::into_inner(folder).expect("the session has gone");
    // Closed cleanly whatever came of the session.
    folder.close().map_err(|e| e.at(&args.file))?;
    ended.map_err(failed)?;
    Ok(0)
}

fn config(args: &Mount) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(args.file.display().to_string().replace(',', "_")),
        MountOption::Subtype("vdimg".into()),
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        if args.writable { MountOption::RW } else { MountOption::RO },
    ];
    config.acl = if args.allow_other { SessionACL::All } else { SessionACL::Owner };
    config
}

/// Somebody has a file open: nobody finds the folder any more, and we end with the last of them.
fn leave_lazily(folder: &Path) {
    tracing::warn!("{}: is in use: it ends when nobody has a file of it open", folder.display());
    match Command::new("umount").arg("--lazy").arg(folder).output() {
        Ok(done) if done.status.success() => {}
        Ok(done) => tracing::warn!("umount: {}", String::from_utf8_lossy(&done.stderr).trim()),
        Err(e) => tracing::warn!("umount: {e}"),
    }
}

/// Files belong to whom the folder belongs.
fn owner_of(folder: &Path) -> Result<(u32, u32)> {
    use std::os::unix::fs::MetadataExt;
    let there = std::fs::metadata(folder).map_err(|e| Error::io("look at it", e).at(folder))?;
    Ok((there.uid(), there.gid()))
}

struct Files {
    folder: Arc<DiskFolder>,
    since: SystemTime,
    owner: (u32, u32),
}

/// What the caller of a file is told.
fn errno(e: &Error) -> Errno {
    match e.kind() {
        ErrorKind::ReadOnly => Errno::EROFS,
        ErrorKind::NoSpace => Errno::ENOSPC,
        ErrorKind::NotFound => Errno::ENOENT,
        _ => {
            tracing::warn!("{e}");
            Errno::EIO
        }
    }
}

impl Files {
    /// The place of a file in the list.
    fn file(&self, ino: INodeNo) -> Option<usize> {
        let n = usize::try_from(u64::from(ino).checked_sub(2)?).ok()?;
        (n < self.folder.files().len()).then_some(n)
    }

    fn attr(&self, ino: INodeNo) -> Option<FileAttr> {
        let is_folder = ino == INodeNo::ROOT;
        let size = if is_folder { 0 } else { self.folder.files()[self.file(ino)?].len };
        let write = if self.folder.is_read_only() { 0 } else { 0o200 };
        Some(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: self.since,
            mtime: self.since,
            ctime: self.since,
            crtime: self.since,
            kind: if is_folder { FileType::Directory } else { FileType::RegularFile },
            perm: if is_folder { 0o555 } else { 0o444 | write },
            nlink: if is_folder { 2 } else { 1 },
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn inode(n: usize) -> INodeNo {
        INodeNo(n as u64 + 2)
    }
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let n =
            self.folder.files().iter().position(|f| parent == INodeNo::ROOT && name == OsStr::new(&f.name));
        match n.and_then(|n| self.attr(Self::inode(n))) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Lengths, owners and modes stay; times are not kept, and nobody is told that.
    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.attr(ino) {
            None => reply.error(Errno::ENOENT),
            Some(_) if self.folder.is_read_only() => reply.error(Errno::EROFS),
            Some(attr) if size.is_some_and(|s| s != attr.size) => reply.error(Errno::EPERM),
            Some(_) if mode.is_some() || uid.is_some() || gid.is_some() => reply.error(Errno::EPERM),
            Some(attr) => reply.attr(&TTL, &attr),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        match self.file(ino) {
            None => reply.error(Errno::EISDIR),
            Some(_) if writes && self.folder.is_read_only() => reply.error(Errno::EROFS),
            // Files share their bytes: what is written to one must not be old in the page cache of another.
            Some(_) if !self.folder.is_read_only() => {
                reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO)
            }
            Some(_) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(n) = self.file(ino) else { return reply.error(Errno::ENOENT) };
        match self.folder.read(n, offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(n) = self.file(ino) else { return reply.error(Errno::ENOENT) };
        match self.folder.write(n, offset, data) {
            Ok(()) => reply.written(u32::try_from(data.len()).expect("one request's")),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.folder.flush() {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if ino != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let dots = [".", ".."].map(|name| (INodeNo::ROOT, FileType::Directory, name));
        let files = self.folder.files().iter().enumerate();
        let files = files.map(|(n, f)| (Self::inode(n), FileType::RegularFile, f.name.as_str()));
        let all = (1..).zip(dots.into_iter().chain(files));
        for (next, (ino, kind, name)) in all.skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            if reply.add(ino, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    // The kernel does without, and does not ask again.

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(Errno::ENOSYS);
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(Errno::EOPNOTSUPP);
    }
}
