//! Files of the operating system: opening them safely, and the synchronous calls of [`HostFile`].

use super::{AlignedBuf, Alignment, BUF_ALIGN, FileTraits, HostFile, sys};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::BOUNCE_BYTES;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// How to open a file. The default: for reading, through the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenHow {
    /// For writing as well.
    pub write: bool,
    /// Past the page cache (O_DIRECT).
    pub direct: bool,
    /// As a new file; one that exists is an error. Implies `write`.
    pub create_new: bool,
}

/// An open regular file or block device.
#[derive(Debug)]
pub struct OsFile {
    file: File,
    path: PathBuf,
    traits: FileTraits,
}

impl OsFile {
    /// Opens a file. Anything but a regular file or a block device is refused, and cannot make this hang.
    ///
    /// # Errors
    /// What the operating system says; [`ErrorKind::InvalidArgument`] for a directory, FIFO, socket or character
    /// device; [`ErrorKind::Unsupported`] where the file cannot be used past the page cache.
    pub fn open(path: &Path, how: OpenHow) -> Result<OsFile> {
        Self::open_unnamed(path, how).map_err(|e| e.at(path))
    }

    fn open_unnamed(path: &Path, how: OpenHow) -> Result<OsFile> {
        // Only a look: opening alone can rewind a tape or hang up a terminal. Decided is by fstat below.
        if let Ok(meta) = std::fs::metadata(path) {
            refuse_odd_files(&meta)?;
        }
        let write = how.write || how.create_new;
        let mut flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
        if how.direct {
            flags |= libc::O_DIRECT;
        }
        let opened = OpenOptions::new()
            .read(true)
            .write(write)
            .create_new(how.create_new)
            .mode(0o644)
            .custom_flags(flags)
            .open(path);
        let file = opened.map_err(|e| open_error(path, how, e))?;
        Self::adopt_unnamed(file, path)
    }

    /// Takes over a descriptor that somebody else opened; `path` is for messages and for finding its parents.
    ///
    /// # Errors
    /// As [`Self::open`]; [`ErrorKind::PermissionDenied`] if it is not open for reading.
    pub fn adopt(fd: OwnedFd, path: &Path) -> Result<OsFile> {
        Self::adopt_unnamed(File::from(fd), path).map_err(|e| e.at(path))
    }

    fn adopt_unnamed(file: File, path: &Path) -> Result<OsFile> {
        let meta = file.metadata().map_err(|e| Error::io("look at it", e))?;
        refuse_odd_files(&meta)?;
        let flags = sys::status_flags(file.as_fd()).map_err(|e| os_error("look at it", e))?;
        if flags & libc::O_NONBLOCK != 0 {
            sys::set_status_flags(file.as_fd(), flags & !libc::O_NONBLOCK)
                .map_err(|e| os_error("change its flags", e))?;
        }
        let writable = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => false,
            libc::O_RDWR => true,
            _ => return Err(Error::new(ErrorKind::PermissionDenied, "is not open for reading")),
        };
        let is_device = meta.file_type().is_block_device();
        // On tmpfs the page cache is the file: O_DIRECT is accepted and means nothing.
        let in_memory = !is_device && sys::is_tmpfs(file.as_fd());
        let direct = flags & libc::O_DIRECT != 0 && !in_memory;
        let alignment = if direct { direct_alignment(&file, is_device)? } else { Alignment::NONE };
        // Two nodes may name one device. Inode 0 does not exist, so the two kinds never meet.
        let identity = if is_device { (meta.rdev(), 0) } else { (meta.dev(), meta.ino()) };
        let traits = FileTraits { writable, direct, alignment, is_device, identity };
        Ok(OsFile { file, path: path.to_path_buf(), traits })
    }
}

/// Makes names made, changed or removed in a directory durable.
///
/// # Errors
/// From the operating system.
pub fn sync_dir(dir: &Path) -> Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io("sync the directory", e).at(dir))
}

fn os_error(tried: &str, errno: i32) -> Error {
    Error::io(tried, io::Error::from_raw_os_error(errno))
}

fn refuse_odd_files(meta: &Metadata) -> Result<()> {
    let kind = meta.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let what = if kind.is_dir() {
        "is a directory"
    } else if kind.is_fifo() {
        "is a FIFO"
    } else if kind.is_socket() {
        "is a socket"
    } else {
        "is a character device"
    };
    let message = format!("{what}, neither a regular file nor a block device");
    Err(Error::new(ErrorKind::InvalidArgument, message))
}

fn open_error(path: &Path, how: OpenHow, e: io::Error) -> Error {
    if how.direct && e.raw_os_error() == Some(libc::EINVAL) {
        if how.create_new {
            // The kernel makes the name before it finds out. With O_EXCL it is ours; if it stays, it is empty.
            let _ = std::fs::remove_file(path);
        }
        return no_direct();
    }
    let tried = match (how.create_new, how.write) {
        (true, _) => "create it",
        (false, true) => "open it for writing",
        (false, false) => "open it",
    };
    Error::io(tried, e)
}

fn no_direct() -> Error {
    Error::new(ErrorKind::Unsupported, "cannot be opened past the page cache")
        .hint("its file system has no O_DIRECT; use buffered I/O")
}

/// What I/O under O_DIRECT must be aligned to: the kernel's word, else the device's sector, else 4096, which is
/// right for every common file system.
fn direct_alignment(file: &File, is_device: bool) -> Result<Alignment> {
    let told = sys::direct_alignment(file.as_fd());
    let (memory, offset) = match told {
        Some(pair) => pair,
        None if is_device => {
            let sector = sys::sector_bytes(file.as_fd()).unwrap_or(4096);
            (sector, sector)
        }
        None => (4096, 4096),
    };
    let usable = |v: u32| v.is_power_of_two() && usize::try_from(v).is_ok_and(|v| v <= BUF_ALIGN);
    if !usable(memory) || !usable(offset) {
        return Err(no_direct());
    }
    Ok(Alignment { memory, offset })
}

/// An error number as an [`io::Error`].
fn to_io<T>(r: std::result::Result<T, i32>) -> io::Result<T> {
    r.map_err(io::Error::from_raw_os_error)
}

fn out_of_range() -> io::Error {
    io::Error::from_raw_os_error(libc::EFBIG)
}

/// Reads until `buf` is full or the file ends.
fn read_full(file: &File, mut off: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buf.len() {
        match file.read_at(&mut buf[got..], off) {
            Ok(0) => break,
            Ok(n) => {
                got += n;
                off = off.checked_add(n as u64).ok_or_else(out_of_range)?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

impl OsFile {
    /// The aligned window of at most [`BOUNCE_BYTES`] around the first bytes of a range: where it begins, how
    /// many bytes of it come before the range, how many belong to the range, and its length.
    fn window(&self, off: u64, len: usize) -> io::Result<Window> {
        let align = usize::try_from(self.traits.alignment.offset).map_err(|_| out_of_range())?;
        let skip =
            usize::try_from(off % u64::from(self.traits.alignment.offset)).map_err(|_| out_of_range())?;
        let take = len.min(BOUNCE_BYTES - skip);
        Ok(Window { start: off - skip as u64, skip, take, len: (skip + take).next_multiple_of(align) })
    }

    fn read_bounced(&self, off: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut bounce = AlignedBuf::new(BOUNCE_BYTES);
        let mut got = 0;
        while got < buf.len() {
            let at = off.checked_add(got as u64).ok_or_else(out_of_range)?;
            let w = self.window(at, buf.len() - got)?;
            let n = read_full_aligned(&self.file, w.start, &mut bounce.as_mut_slice()[..w.len])?;
            let n = n.saturating_sub(w.skip).min(w.take);
            buf[got..got + n].copy_from_slice(&bounce.as_slice()[w.skip..w.skip + n]);
            got += n;
            if n < w.take {
                break;
            }
        }
        Ok(got)
    }

    /// Reads, changes and writes back aligned pieces. Nothing else may be writing there: this is for opening,
    /// creating and closing.
    fn write_bounced(&self, off: u64, buf: &[u8]) -> io::Result<()> {
        let end = off.checked_add(buf.len() as u64).ok_or_else(out_of_range)?;
        let wanted = self.len()?.max(end);
        let mut bounce = AlignedBuf::new(BOUNCE_BYTES);
        let mut done = 0;
        while done < buf.len() {
            let at = off.checked_add(done as u64).ok_or_else(out_of_range)?;
            let w = self.window(at, buf.len() - done)?;
            let piece = &mut bounce.as_mut_slice()[..w.len];
            let n = if w.is_partial() { read_full_aligned(&self.file, w.start, piece)? } else { w.len };
            piece[n..].fill(0);
            piece[w.skip..w.skip + w.take].copy_from_slice(&buf[done..done + w.take]);
            self.file.write_all_at(piece, w.start)?;
            done += w.take;
        }
        // The last piece may have been rounded up past the end.
        if self.len()? > wanted { self.set_len(wanted) } else { Ok(()) }
    }
}

struct Window {
    start: u64,
    skip: usize,
    take: usize,
    len: usize,
}

impl Window {
    fn is_partial(&self) -> bool {
        self.skip + self.take < self.len || self.skip > 0
    }
}

/// One aligned read: under O_DIRECT a short one means the end of the file, and going on from there would not be
/// aligned.
fn read_full_aligned(file: &File, off: u64, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match file.read_at(buf, off) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            r => return r,
        }
    }
}

impl HostFile for OsFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn traits(&self) -> FileTraits {
        self.traits
    }

    fn len(&self) -> io::Result<u64> {
        to_io(sys::file_len(self.file.as_fd()))
    }

    fn read_at(&self, off: u64, buf: &mut [u8]) -> io::Result<usize> {
        if self.traits.direct { self.read_bounced(off, buf) } else { read_full(&self.file, off, buf) }
    }

    fn write_at(&self, off: u64, buf: &[u8]) -> io::Result<()> {
        if self.traits.direct { self.write_bounced(off, buf) } else { self.file.write_all_at(buf, off) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        to_io(sys::ftruncate(self.file.as_fd(), len)).map(drop)
    }

    fn allocate(&self, off: u64, len: u64) -> io::Result<()> {
        to_io(sys::fallocate(self.file.as_fd(), sys::ALLOCATE, off, len)).map(drop)
    }

    fn punch(&self, off: u64, len: u64) -> io::Result<()> {
        to_io(sys::fallocate(self.file.as_fd(), sys::PUNCH, off, len)).map(drop)
    }

    fn sync(&self) -> io::Result<()> {
        to_io(sys::fdatasync(self.file.as_fd())).map(drop)
    }

    fn next_data(&self, off: u64) -> io::Result<Option<u64>> {
        match sys::lseek(self.file.as_fd(), off, libc::SEEK_DATA) {
            Ok(at) => Ok(Some(at)),
            Err(libc::ENXIO) => Ok(None),
            // Block devices and some file systems cannot tell: everything counts as data.
            Err(libc::EINVAL | libc::EOPNOTSUPP) => Ok((off < self.len()?).then_some(off)),
            Err(e) => to_io(Err(e)),
        }
    }

    fn next_hole(&self, off: u64) -> io::Result<u64> {
        match sys::lseek(self.file.as_fd(), off, libc::SEEK_HOLE) {
            Ok(at) => Ok(at),
            Err(libc::ENXIO) => Ok(off),
            Err(libc::EINVAL | libc::EOPNOTSUPP) => Ok(self.len()?.max(off)),
            Err(e) => to_io(Err(e)),
        }
    }

    fn allocated(&self) -> io::Result<u64> {
        if self.traits.is_device {
            return self.len();
        }
        // st_blocks counts 512 bytes whatever the file system's block
        self.file.metadata()?.blocks().checked_mul(512).ok_or_else(out_of_range)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::testing::scratch_dir;
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    const RW: OpenHow = OpenHow { write: true, direct: false, create_new: false };
    const NEW: OpenHow = OpenHow { write: true, direct: false, create_new: true };

    /// A new file under O_DIRECT, or `None` with a message where the file system has none.
    fn direct(path: &Path) -> Option<OsFile> {
        match OsFile::open(path, OpenHow { direct: true, ..NEW }) {
            Ok(f) => Some(f),
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
                assert!(!path.exists(), "nothing is left behind");
                eprintln!("skipped: {e}");
                None
            }
        }
    }

    #[test]
    fn messages_say_what_was_tried() {
        let dir = scratch_dir();
        let p = dir.path().join("x.vdi");
        let e = OsFile::open(&p, RW).expect_err("missing");
        assert_eq!(e.kind(), ErrorKind::NotFound);
        let want = format!("{}: cannot open it for writing: No such file or directory", p.display());
        assert_eq!(e.to_string(), want);
        OsFile::open(&p, NEW).expect("create");
        assert_eq!(OsFile::open(&p, NEW).expect_err("exists").kind(), ErrorKind::Exists);
        let f = OsFile::open(&p, OpenHow::default()).expect("open");
        assert!(!f.traits().writable && f.write_at(0, b"x").is_err());
    }

    #[test]
    fn odd_files_are_refused_and_do_not_hang() {
        let dir = scratch_dir();
        let fifo = dir.path().join("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
        let sock = dir.path().join("sock");
        let _listener = UnixListener::bind(&sock).expect("bind");
        for p in [fifo.as_path(), sock.as_path(), dir.path(), Path::new("/dev/null")] {
            for how in [OpenHow::default(), RW] {
                let e = OsFile::open(p, how).expect_err("odd");
                assert_eq!(e.kind(), ErrorKind::InvalidArgument, "{e}");
            }
        }
        // Past the first look, as if it had been exchanged after that.
        let f = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&fifo).expect("open");
        assert!(OsFile::adopt(f.into(), &fifo).is_err());
    }

    #[test]
    fn flags_are_as_promised() {
        let dir = scratch_dir();
        let f = OsFile::open(&dir.path().join("a"), NEW).expect("create");
        let flags = sys::status_flags(f.file.as_fd()).expect("flags");
        assert_eq!(flags & (libc::O_NONBLOCK | libc::O_ACCMODE), libc::O_RDWR);
        let again = OsFile::open(&dir.path().join("a"), RW).expect("open");
        assert_eq!(f.traits(), again.traits());
        let b = OsFile::open(&dir.path().join("b"), NEW).expect("create");
        assert_ne!(f.traits().identity, b.traits().identity);
        let w = OpenOptions::new().write(true).open(dir.path().join("a")).expect("open");
        let e = OsFile::adopt(w.into(), Path::new("a")).expect_err("not readable");
        assert_eq!(e.kind(), ErrorKind::PermissionDenied);
        sync_dir(dir.path()).expect("sync");
    }

    #[test]
    fn any_alignment_is_served_past_the_page_cache() {
        let dir = scratch_dir();
        let Some(f) = direct(&dir.path().join("d")) else { return };
        assert!(f.traits().direct && f.traits().alignment.offset >= 512);
        let mut model: Vec<u8> = Vec::new();
        let sizes = [(0, 10), (5, 700), (511, 2), (4096, 4096), (9000, 300_000), (100, 1), (700_001, 13)];
        for (i, (off, len)) in sizes.into_iter().enumerate() {
            let data: Vec<u8> = (0..len).map(|b: usize| (b * 7 + i) as u8).collect();
            f.write_at(off as u64, &data).expect("write");
            model.resize(model.len().max(off + len), 0);
            model[off..off + len].copy_from_slice(&data);
            assert_eq!(f.len().expect("length"), model.len() as u64);
        }
        assert_eq!(std::fs::read(f.path()).expect("read"), model);
        for (off, len) in [(0, model.len() + 5), (3, 1), (262_143, 262_145), (700_010, 100), (800_000, 9)] {
            let mut got = vec![0; len];
            let n = f.read_at(off as u64, &mut got).expect("read");
            let want = &model[off.min(model.len())..(off + len).min(model.len())];
            assert_eq!(&got[..n], want);
        }
    }

    #[test]
    fn holes_are_found() {
        let dir = scratch_dir();
        let f = OsFile::open(&dir.path().join("a"), NEW).expect("create");
        f.set_len(8 << 20).expect("extend");
        assert_eq!(f.next_data(0).expect("seek"), None);
        f.write_at(4 << 20, &[1; 4096]).expect("write");
        f.sync().expect("sync");
        assert_eq!(f.next_data(0).expect("seek"), Some(4 << 20));
        assert_eq!(f.next_hole(4 << 20).expect("seek"), (4 << 20) + 4096);
        assert_eq!(f.next_data(5 << 20).expect("seek"), None);
        assert_eq!(f.next_hole(8 << 20).expect("seek"), 8 << 20);
        assert!((4096..1 << 20).contains(&f.allocated().expect("blocks")));
        match f.allocate(8 << 20, 1 << 20) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return eprintln!("skipped: no fallocate");
            }
            done => done.expect("allocate"),
        }
        assert!(f.len().expect("length") == 9 << 20 && f.allocated().expect("blocks") >= 1 << 20);
    }
}
