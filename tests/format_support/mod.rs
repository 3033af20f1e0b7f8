//! What the tests of formats share: images as files or bytes, and reading through a chain of maps.
#![allow(dead_code)] // each test program uses its part

use sha2::{Digest, Sha256};
pub(crate) mod build;
pub(crate) mod hostile;
pub(crate) mod mini;
pub(crate) mod vhdx;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use vdblk::error::{Error, ErrorKind, Result};
use vdblk::map::{
    ByteSource, ExtentKind, ExtentList, GuestOffset, GuestRange, HostOffset, ImageMap, Intent, Miss,
};

/// A file on disk as a format sees it.
pub(crate) struct FileSource(pub(crate) File);

impl FileSource {
    pub(crate) fn open(path: &Path) -> Self {
        FileSource(File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }
}

impl ByteSource for FileSource {
    fn len(&self) -> u64 {
        self.0.metadata().expect("length").len()
    }

    fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.0.read_exact_at(buf, off.0).map_err(|e| Error::new(ErrorKind::Corrupt, e.to_string()))
    }
}

/// One image of a chain.
pub(crate) struct Layer<'a> {
    pub(crate) map: &'a dyn ImageMap,
    pub(crate) bytes: &'a dyn ByteSource,
}

/// Reads a range through a chain, leaf first. Beyond the end of a parent are zeros.
pub(crate) fn read(chain: &[Layer<'_>], range: GuestRange, buf: &mut [u8]) {
    let Some((leaf, beneath)) = chain.split_first() else { return buf.fill(0) };
    let size = leaf.map.limits().size_bytes;
    let inside = range.intersect(range_of(0, size));
    let (head, tail) = buf.split_at_mut(inside.len() as usize);
    tail.fill(0);
    let (mut rest, mut buf) = (inside, head);
    while !rest.is_empty() {
        let mut list = ExtentList::new();
        look_up(leaf, rest, &mut list);
        assert!(list.covered() > 0, "no progress at {rest}");
        for e in list.as_slice() {
            let (piece, after) = std::mem::take(&mut buf).split_at_mut(e.len as usize);
            match e.kind {
                ExtentKind::Data { off, .. } => leaf.bytes.read_at(off, piece).expect("data inside the file"),
                ExtentKind::Packed { packed, into } => {
                    let (mut from, mut unit) = (vec![0; packed.len as usize], vec![0; packed.unit as usize]);
                    leaf.bytes.read_at(packed.off, &mut from).expect("packed bytes inside the file");
                    vdblk::vd::unpack(packed.codec, &from, &mut unit).expect("a sound unit");
                    piece.copy_from_slice(&unit[into as usize..][..piece.len()]);
                }
                ExtentKind::Zero => piece.fill(0),
                ExtentKind::Parent => read(beneath, rest.take(e.len), piece),
            }
            rest = rest.skip(e.len);
            buf = after;
        }
    }
}

/// A look-up for reading, with the pages of tables it needs.
fn look_up(layer: &Layer<'_>, range: GuestRange, list: &mut ExtentList) {
    while let Err(miss) = layer.map.map(range, Intent::Read, list) {
        let Miss::NeedsPage(key) = miss else { panic!("{range}: {miss:?}") };
        let place = layer.map.page_place(key).expect("a page of the image");
        let mut page = vec![0; place.len];
        layer.bytes.read_at(place.off, &mut page).expect("a page inside the file");
        layer.map.page_read(key, &page).expect("a sound page");
    }
}

pub(crate) fn range_of(start: u64, len: u64) -> GuestRange {
    GuestRange::new(GuestOffset(start), len).expect("a range of the test")
}

/// The whole content of a small chain.
pub(crate) fn read_all(chain: &[Layer<'_>]) -> Vec<u8> {
    let size = chain[0].map.limits().size_bytes;
    let mut all = vec![0xa5; size as usize];
    read(chain, range_of(0, size), &mut all);
    all
}

/// The ranges that no image of the chain declares zero or empty, in pieces of at most 1 MiB.
pub(crate) fn data_pieces(chain: &[Layer<'_>]) -> Vec<GuestRange> {
    let size = chain[0].map.limits().size_bytes;
    let mut pieces = Vec::new();
    for layer in chain {
        let mut rest = range_of(0, size.min(layer.map.limits().size_bytes));
        while !rest.is_empty() {
            let mut list = ExtentList::new();
            look_up(layer, rest, &mut list);
            for e in list.as_slice() {
                let mut here = rest.take(e.len);
                rest = rest.skip(e.len);
                while matches!(e.kind, ExtentKind::Data { .. }) && !here.is_empty() {
                    pieces.push(here.take(1 << 20));
                    here = here.skip(1 << 20);
                }
            }
        }
    }
    pieces
}

/// The folder with the small fixtures of VDI, unpacked into sparse files.
pub(crate) fn fixtures() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| unpacked("vdi"))
}

/// The same for VHD and VHDX.
pub(crate) fn vhd_fixtures() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| unpacked("vhd"))
}

/// The same for QCOW2.
pub(crate) fn qcow2_fixtures() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| unpacked("qcow2"))
}

/// The same for DMG.
pub(crate) fn dmg_fixtures() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| unpacked("dmg"))
}

/// The same for QED and QCOW.
pub(crate) fn qed_fixtures() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| unpacked("qed"))
}

/// The fixtures of a format, unpacked into sparse files. They stay in the build folder, under the checksum of the archive.
pub(crate) fn unpacked(name: &str) -> PathBuf {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/{name}.tar.zst"));
    let packed = std::fs::read(packed).expect("fixtures");
    let sum: String = Sha256::digest(&packed)[..8].iter().map(|b| format!("{b:02x}")).collect();
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{sum}"));
    if !dir.exists() {
        let fresh = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary folder");
        unpack(&packed, fresh.path());
        // Another test program may have been quicker; its files are the same.
        let _ = std::fs::rename(fresh.path(), &dir);
    }
    dir
}

fn unpack(packed: &[u8], dir: &Path) {
    let tar = ruzstd::decoding::StreamingDecoder::new(packed).expect("zstd");
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries().expect("tar") {
        let mut entry = entry.expect("tar entry");
        let path = dir.join(entry.path().expect("name"));
        std::fs::create_dir_all(path.parent().expect("inside the folder")).expect("folder");
        write_sparse(&mut entry, &mut File::create(path).expect("file"));
    }
}

fn write_sparse(from: &mut impl Read, to: &mut File) {
    let (mut buf, mut len) = (vec![0; 64 << 10], 0);
    loop {
        let n = from.read(&mut buf).expect("unpacking");
        if n == 0 {
            break;
        }
        if buf[..n].iter().any(|b| *b != 0) {
            to.seek(SeekFrom::Start(len)).expect("seek");
            to.write_all(&buf[..n]).expect("write");
        }
        len += n as u64;
    }
    to.set_len(len).expect("length");
}
