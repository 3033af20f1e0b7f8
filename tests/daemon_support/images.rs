//! Images for the daemon to serve, and what is in them afterwards by other ways than the daemon's.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use uuid::Uuid;
use vdblk::error::{Error, ErrorKind, Result};
use vdblk::format::{self, Format, NewParent};
use vdblk::job::{CreateImage, create_image};
use vdblk::map::{ByteSource, ExtentKind, ExtentList, FileId, GuestOffset, GuestRange, HostOffset};
use vdblk::map::{ImageInfo, ImageMap, Intent};

pub const MIB: u64 = 1 << 20;
/// Where the header of a VDI says how many blocks are allocated, how many there are, and where data begins.
const ALLOCATED_AT: u64 = 0x184;
const BLOCKS_AT: u64 = 0x180;
const TABLE_AT: u64 = 0x154;
const DATA_AT: u64 = 0x158;
const BLOCK_BYTES_AT: u64 = 0x178;
const CREATE_UUID_AT: u64 = 0x188;
const PARENT_UUID_AT: u64 = 0x1a8;

pub fn vdi(path: &Path, size: u64) -> PathBuf {
    create_image(&CreateImage::new(path, Format::Vdi, size)).expect("a new VDI");
    path.to_path_buf()
}

pub fn raw(path: &Path, size: u64) -> PathBuf {
    create_image(&CreateImage::new(path, Format::Raw, size)).expect("a new raw image");
    path.to_path_buf()
}

/// A differencing VDI over `parent`, of its size or another.
pub fn diff(path: &Path, parent: &Path, size: Option<u64>) -> PathBuf {
    let info = info(parent);
    let size = size.unwrap_or(info.virtual_size);
    let parent = Some(NewParent { info, path: None });
    create_image(&CreateImage { parent, ..CreateImage::new(path, Format::Vdi, size) })
        .expect("a new differencing VDI");
    path.to_path_buf()
}

/// What an image says of itself.
pub fn info(path: &Path) -> ImageInfo {
    open(path, 0).1.info()
}

pub fn uuid(path: &Path) -> Uuid {
    info(path).uuid.expect("a VDI")
}

struct Source(File);

impl ByteSource for Source {
    fn len(&self) -> u64 {
        self.0.metadata().expect("length").len()
    }

    fn read_at(&self, off: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.0.read_exact_at(buf, off.0).map_err(|e| Error::new(ErrorKind::Corrupt, e.to_string()))
    }
}

fn open(path: &Path, number: u16) -> (Source, Box<dyn ImageMap>) {
    let source = Source(File::open(path).expect("open"));
    let is_raw = path.extension().is_some_and(|e| e == "raw");
    let format = if is_raw { Format::Raw } else { Format::Vdi };
    let how = format::OpenHow { read_only: true, info_only: false };
    let map = format::open_single(format, &source, FileId(number), how).expect("a good image");
    (source, map)
}

/// The bytes of the disk that these images make, top first, by the format's map alone: neither the daemon's engine
/// nor its chain has a part in it.
pub fn contents(chain: &[PathBuf]) -> Vec<u8> {
    let layers: Vec<_> = chain.iter().zip(0..).map(|(p, n)| open(p, n)).collect();
    let mut all = vec![0; usize::try_from(layers[0].1.limits().size_bytes).expect("small")];
    read(&layers, 0, &mut all);
    all
}

fn read(layers: &[(Source, Box<dyn ImageMap>)], at: u64, buf: &mut [u8]) {
    let Some(((source, map), beneath)) = layers.split_first() else { return };
    let inside = map.limits().size_bytes.saturating_sub(at).min(buf.len() as u64);
    let mut done = 0;
    while done < inside {
        let range = GuestRange::new(GuestOffset(at + done), inside - done).expect("inside the disk");
        let mut extents = ExtentList::new();
        map.map(range, Intent::Read, &mut extents).expect("a look-up");
        for e in extents.as_slice() {
            let place = &mut buf[done as usize..(done + e.len) as usize];
            match e.kind {
                ExtentKind::Data { off, .. } => source.read_at(off, place).expect("data inside the file"),
                ExtentKind::Packed { packed, into } => {
                    let (mut from, mut unit) = (vec![0; packed.len as usize], vec![0; packed.unit as usize]);
                    source.read_at(packed.off, &mut from).expect("packed bytes inside the file");
                    vdblk::vd::unpack(packed.codec, &from, &mut unit).expect("a sound unit");
                    place.copy_from_slice(&unit[into as usize..][..place.len()]);
                }
                ExtentKind::Zero => place.fill(0),
                ExtentKind::Parent => read(beneath, at + done, place),
            }
            done += e.len;
        }
    }
}

/// The first place where two disks differ. (They are too long to be printed.)
pub fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a.len() != b.len() {
        return Some(a.len().min(b.len()));
    }
    a.iter().zip(b).position(|(a, b)| a != b)
}

fn u32_at(file: &File, at: u64) -> u32 {
    let mut b = [0; 4];
    file.read_exact_at(&mut b, at).expect("a header");
    u32::from_le_bytes(b)
}

/// What a cleanly closed VDI is, read from its bytes: the count is exact, and blocks fill the file without a gap.
#[track_caller]
pub fn assert_dense(path: &Path) {
    let file = File::open(path).expect("open");
    let count = u32_at(&file, ALLOCATED_AT);
    let table = u64::from(u32_at(&file, TABLE_AT));
    let mut used: Vec<u32> =
        (0..u64::from(u32_at(&file, BLOCKS_AT))).map(|i| u32_at(&file, table + 4 * i)).collect();
    used.retain(|e| *e < 0xffff_fffe);
    used.sort_unstable();
    assert!(used.iter().copied().eq(0..count), "{count} blocks are counted, these are used: {used:?}");
    let data = u64::from(u32_at(&file, DATA_AT));
    let end = data + u64::from(count) * u64::from(u32_at(&file, BLOCK_BYTES_AT));
    assert_eq!(file.metadata().expect("length").len(), end, "{}: slack at its end", path.display());
}

/// Gives a VDI another UUID, or another parent's.
pub fn set_uuid(path: &Path, uuid: Uuid) {
    put(path, CREATE_UUID_AT, uuid);
}

pub fn set_parent_uuid(path: &Path, uuid: Uuid) {
    put(path, PARENT_UUID_AT, uuid);
}

/// UUIDs in a VDI are as Windows keeps them: the first three fields little endian.
fn put(path: &Path, at: u64, uuid: Uuid) {
    let file = File::options().write(true).open(path).expect("open");
    file.write_all_at(&uuid.to_bytes_le(), at).expect("write");
}

/// `qemu-img check` finds nothing, where there is qemu-img.
#[track_caller]
pub fn assert_checked_by_qemu(path: &Path) {
    if !super::has("qemu-img") {
        return;
    }
    let mut c = Command::new("qemu-img");
    c.args(["check", "-q", "-f", "vdi"]).arg(path).stdin(Stdio::null());
    let ended = super::process::run(c);
    assert!(ended.status.success(), "{ended:?}");
}

/// The bytes of a base image by QEMU's reading; `None` without qemu-img.
pub fn contents_by_qemu(path: &Path, format: &str) -> Option<Vec<u8>> {
    if !super::has("qemu-img") {
        return None;
    }
    let out = path.with_extension("by-qemu");
    let mut c = Command::new("qemu-img");
    c.args(["convert", "-f", format, "-O", "raw"]).arg(path).arg(&out).stdin(Stdio::null());
    let ended = super::process::run(c);
    assert!(ended.status.success(), "{ended:?}");
    let bytes = fs::read(&out).expect("converted");
    fs::remove_file(&out).expect("remove");
    Some(bytes)
}
