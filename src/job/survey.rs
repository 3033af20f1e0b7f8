//! What a disk consists of, range by range: where each lies, and in which image of the chain. The base of map,
//! convert and compare: whatever is known to be zeros is never read.

use crate::error::{Error, Result};
use crate::io::HostFile;
use crate::limits::SECTOR_BYTES;
use crate::map::{Extent, ExtentKind, ExtentList, FileId, GuestOffset, GuestRange, HostOffset, Intent, Miss};
use crate::vd::{Disk, Layer};
use std::sync::Arc;

/// What a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// Bytes in a file.
    Data {
        /// The file.
        file: FileId,
        /// Where they begin in it.
        off: HostOffset,
    },
    /// Bytes that lie packed in a file.
    Packed {
        /// The file.
        file: FileId,
    },
    /// An image has a place for it, and there the file has a hole: zeros.
    Hole {
        /// The file.
        file: FileId,
        /// Where the place begins in it.
        off: HostOffset,
    },
    /// An image says that it is zeros.
    Zero,
    /// No image says anything: zeros.
    Unallocated,
}

impl PieceKind {
    /// It has to be read to be known.
    pub fn is_data(self) -> bool {
        matches!(self, PieceKind::Data { .. } | PieceKind::Packed { .. })
    }
}

/// A range of the disk of one kind. Multiples of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where.
    pub range: GuestRange,
    /// The image that decides: 0 for the top one. Behind the end of an image that is shorter than those above it is that image.
    pub depth: usize,
    /// What.
    pub kind: PieceKind,
}

/// Goes through a disk from its start to its end. Pieces follow each other without gap; neighbours of one kind are
/// joined.
#[derive(Debug)]
pub struct Survey {
    disk: Arc<Disk>,
    layers: Vec<LayerView>,
    holes: Vec<HoleView>,
    at: u64,
    ahead: Option<Piece>,
}

impl Survey {
    /// From the disk's start on. The disk must not be changed meanwhile.
    pub fn new(disk: Arc<Disk>) -> Self {
        let layers = disk.chain().layers().iter().map(LayerView::new).collect();
        Survey { disk, layers, holes: Vec::new(), at: 0, ahead: None }
    }

    /// The same from `at` on.
    pub(crate) fn behind(disk: Arc<Disk>, at: GuestOffset) -> Self {
        Survey { at: at.0, ..Self::new(disk) }
    }

    /// The disk that is gone through.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// What is of this kind has to be read to be known: as [`PieceKind::is_data`], and everything where the disk's filters make
    /// something else of zeros.
    pub fn must_read(&self, kind: PieceKind) -> bool {
        kind.is_data() || self.disk.filters().hide_zeros()
    }

    /// Everything before this was looked at.
    pub(super) fn at(&self) -> GuestOffset {
        self.ahead.map_or(GuestOffset(self.at), |p| p.range.start())
    }

    /// The next piece; `None` at the end of the disk.
    ///
    /// # Errors
    /// What a format says of its metadata; from the operating system when it is asked for holes.
    pub fn next_piece(&mut self) -> Result<Option<Piece>> {
        let Some(mut piece) = self.ahead.take().map_or_else(|| self.look(), |p| Ok(Some(p)))? else {
            return Ok(None);
        };
        while let Some(next) = self.look()? {
            if !continues(&piece, &next) {
                self.ahead = Some(next);
                break;
            }
            piece.range = GuestRange::between(piece.range.start(), next.range.end());
        }
        Ok(Some(piece))
    }

    /// What lies at `self.at`, as far as the deciding image sees.
    fn look(&mut self) -> Result<Option<Piece>> {
        let rest = self.disk.size_bytes().saturating_sub(self.at);
        if rest == 0 {
            return Ok(None);
        }
        let start = GuestOffset(self.at);
        let (mut len, mut depth, mut kind) = (rest, self.layers.len() - 1, PieceKind::Unallocated);
        for (i, layer) in self.disk.chain().layers().iter().enumerate() {
            let Some(e) = self.layers[i].extent_at(&self.disk, layer, start)? else {
                depth = i;
                break;
            };
            len = len.min(e.len);
            kind = match e.kind {
                ExtentKind::Parent => continue,
                ExtentKind::Zero => PieceKind::Zero,
                ExtentKind::Data { file, off } => PieceKind::Data { file, off },
                ExtentKind::Packed { packed, .. } => PieceKind::Packed { file: packed.file },
            };
            depth = i;
            break;
        }
        if let PieceKind::Data { file, off } = kind {
            (kind, len) = self.split(file, off, len)?;
        }
        // Extents of odd headers and cut files may end inside a sector; it is data to its end then.
        let whole = if kind.is_data() {
            len.next_multiple_of(SECTOR_BYTES).min(rest)
        } else {
            debug_assert!(len >= SECTOR_BYTES, "no format has zeros ending inside the sector they begin in");
            (len - len % SECTOR_BYTES).max(SECTOR_BYTES).min(rest)
        };
        self.at += whole;
        let range = GuestRange::between(start, GuestOffset(self.at));
        Ok(Some(Piece { range, depth, kind }))
    }

    /// The part of an extent up to where the file goes over from data to a hole or back.
    fn split(&mut self, file: FileId, off: HostOffset, len: u64) -> Result<(PieceKind, u64)> {
        let index = usize::from(file.0);
        if self.holes.len() <= index {
            self.holes.resize(index + 1, HoleView::default());
        }
        let host = self.disk.host_file(file);
        let (is_data, run) = self.holes[index].run_at(&**host, off.0, len)?;
        // Less than a sector of hole is not worth a piece of its own.
        if is_data || run < SECTOR_BYTES {
            Ok((PieceKind::Data { file, off }, run))
        } else {
            Ok((PieceKind::Hole { file, off }, run))
        }
    }
}

fn continues(a: &Piece, b: &Piece) -> bool {
    let follows =
        |f: FileId, o: HostOffset, file, off| f == file && o.checked_add(a.range.len()) == Some(off);
    a.depth == b.depth
        && match (a.kind, b.kind) {
            (PieceKind::Data { file: f, off: o }, PieceKind::Data { file, off })
            | (PieceKind::Hole { file: f, off: o }, PieceKind::Hole { file, off }) => {
                follows(f, o, file, off)
            }
            (a, b) => a == b,
        }
}

/// The last look-up in one image, so that a long extent above many short ones is not looked up for each of them.
#[derive(Debug)]
struct LayerView {
    size: u64,
    list: ExtentList,
    /// The extent that was used last, and where it begins.
    index: usize,
    start: u64,
}

impl LayerView {
    /// Nothing is known yet.
    fn new(layer: &Layer) -> Self {
        let size = layer.map.limits().size_bytes;
        LayerView { size, list: ExtentList::new(), index: 0, start: 0 }
    }

    /// The rest of the extent around `at`; offsets never go back. `None` behind the image's end.
    fn extent_at(&mut self, disk: &Disk, layer: &Layer, at: GuestOffset) -> Result<Option<Extent>> {
        if at.0 >= self.size {
            return Ok(None);
        }
        while let Some(e) = self.list.as_slice().get(self.index) {
            if at.0 < self.start + e.len {
                return Ok(Some(from(*e, at.0 - self.start)));
            }
            self.start += e.len;
            self.index += 1;
        }
        self.list.clear();
        (self.index, self.start) = (0, at.0);
        let rest = GuestRange::between(at, GuestOffset(self.size));
        while let Err(miss) = layer.map.map(rest, Intent::Read, &mut self.list) {
            match miss {
                Miss::NeedsPage(key) => disk.load_page(layer.number, key)?,
                Miss::Fail(f) => return Err(f.into()),
                Miss::NeedsPlan | Miss::NeedsRoom => unreachable!("a read asked for a plan"),
            }
        }
        Ok(self.list.as_slice().first().copied())
    }
}

/// An extent without its first `skip` bytes.
fn from(e: Extent, skip: u64) -> Extent {
    let kind = match e.kind {
        ExtentKind::Data { file, off } => ExtentKind::Data { file, off: off.plus(skip) },
        ExtentKind::Packed { packed, into } => {
            ExtentKind::Packed { packed, into: into + u32::try_from(skip).expect("inside a unit") }
        }
        kind => kind,
    };
    Extent { len: e.len - skip, kind }
}

/// The run of data or hole that a file was last seen to have.
#[derive(Clone, Copy, Debug, Default)]
struct HoleView {
    start: u64,
    end: u64,
    is_data: bool,
}

impl HoleView {
    /// Whether data is at `off`, and how many of the `len` bytes there are of the same sort.
    fn run_at(&mut self, file: &dyn HostFile, off: u64, len: u64) -> Result<(bool, u64)> {
        if !(self.start..self.end).contains(&off) {
            *self = Self::look(file, off).map_err(|e| Error::io("look for its holes", e).at(file.path()))?;
        }
        Ok((self.is_data, len.min(self.end.saturating_sub(off)).max(1)))
    }

    fn look(file: &dyn HostFile, off: u64) -> std::io::Result<HoleView> {
        Ok(match file.next_data(off)? {
            None if off < file.len()? => HoleView { start: off, end: file.len()?, is_data: false },
            // The file has shrunk: no hole but an error, which reading will report.
            None => HoleView { start: off, end: off.saturating_add(SECTOR_BYTES), is_data: true },
            Some(data) if data > off => HoleView { start: off, end: data, is_data: false },
            // A file system that answers oddly makes everything data for a sector, never an endless loop.
            Some(_) => {
                let end = file.next_hole(off)?.max(off.saturating_add(SECTOR_BYTES));
                HoleView { start: off, end, is_data: true }
            }
        })
    }
}
