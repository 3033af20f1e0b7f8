//! Going through all places that images have, and writing the bytes there anew.

use super::journal::{Journal, Place, RECORD_BYTES, Record, Task, read};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::KeyChange;
use crate::io::HostFile;
use crate::job::{Job, Piece, PieceKind, Progress, Step, Survey};
use crate::map::{ExtentKind, FileId, GuestRange, Intent, Miss};
use crate::vd::Disk;
use std::sync::Arc;

/// Changes the key of images, each a disk by itself, where they stand. With a side file it may be ended at any moment: begun again
/// over the same files it completes. Places of the images stay where they are; what has none stays without.
#[derive(Debug)]
pub struct RecryptJob<'a> {
    images: Vec<Arc<Disk>>,
    change: KeyChange,
    fill_holes: bool,
    journal: Option<Journal<'a>>,
    /// Bytes changed at a time.
    most: usize,
    /// The image that is gone through.
    image: usize,
    survey: Survey,
    piece: Option<Piece>,
    /// Bytes of the images before that one.
    before: u64,
    total: u64,
    /// What the disk of an image holds is not known any more: the image.
    pub(crate) sync_failed: Option<usize>,
}

impl<'a> RecryptJob<'a> {
    /// Over images whose files can be written, the top first. `side`: the side file, empty or left by such a job; `None`:
    /// what is done may be lost.
    ///
    /// # Errors
    /// Of the side file; of writing what its last record says.
    pub fn new(
        images: Vec<Arc<Disk>>,
        change: KeyChange,
        task: &Task,
        side: Option<&'a dyn HostFile>,
    ) -> Result<RecryptJob<'a>> {
        let total = images.iter().map(|d| d.size_bytes()).fold(0, u64::saturating_add).max(1);
        let survey = Survey::new(images[0].clone());
        let fill_holes = task.fill_holes != 0;
        let mut job = RecryptJob {
            images,
            change,
            fill_holes,
            journal: None,
            most: RECORD_BYTES,
            image: 0,
            survey,
            piece: None,
            before: 0,
            total,
            sync_failed: None,
        };
        if let Some(file) = side {
            let (journal, last) = match Journal::resume(file, task)? {
                Some(there) => there,
                None => (Journal::begin(file, task)?, None),
            };
            job.journal = Some(journal);
            if let Some(record) = last {
                job.do_again(record).map_err(|e| e.at(file.path()))?;
            }
        }
        Ok(job)
    }

    /// The same with at most so many bytes at a time, a multiple of 512 up to what is usual.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn in_pieces_of(self, bytes: usize) -> Self {
        RecryptJob { most: bytes.min(RECORD_BYTES), ..self }
    }

    /// The last record's bytes, of which any may be there already; then on behind it.
    fn do_again(&mut self, mut record: Record) -> Result<()> {
        let damaged = || Error::new(ErrorKind::Corrupt, "tells of places that the images do not have");
        let image = record.image;
        if image >= self.images.len() {
            return Err(damaged());
        }
        let end = record.places.last().ok_or_else(damaged)?.range.end();
        for place in &record.places {
            if !self.is_there(image, place)? {
                return Err(damaged());
            }
        }
        if self.keeps_old() {
            transform(&self.change, &record.places, &mut record.bytes);
        }
        self.write(&record)?;
        self.before = self.images[..image].iter().map(|d| d.size_bytes()).sum();
        self.image = image;
        self.survey = Survey::behind(self.images[image].clone(), end);
        Ok(())
    }

    /// The image has this range there.
    fn is_there(&self, image: usize, place: &Place) -> Result<bool> {
        let disk = &self.images[image];
        let layer = &disk.chain().layers()[0];
        let mut rest = place.range;
        let mut off = place.off;
        if rest.is_empty() || rest.end().0 > layer.map.limits().size_bytes.next_multiple_of(512) {
            return Ok(false);
        }
        while !rest.is_empty() {
            match layer.map.look(rest, Intent::Read) {
                Ok(e) => {
                    let there = ExtentKind::Data { file: place.file, off };
                    if e.kind != there || e.len == 0 {
                        return Ok(false);
                    }
                    let n = e.len.min(rest.len());
                    (rest, off) = (rest.skip(n), off.plus(n));
                }
                Err(Miss::NeedsPage(key)) => disk.load_page(layer.number, key)?,
                Err(Miss::Fail(f)) => return Err(f.into()),
                Err(Miss::NeedsPlan | Miss::NeedsRoom) => unreachable!("a read asked for a plan"),
            }
        }
        Ok(true)
    }

    /// The side file keeps the bytes as they were: the new ones are plain.
    fn keeps_old(&self) -> bool {
        self.change.to.is_none()
    }

    /// The next places, of one image, a record's worth of bytes at most.
    fn next_places(&mut self) -> Result<Vec<Place>> {
        let (mut places, mut left) = (Vec::new(), self.most as u64);
        while left > 0 {
            let Some(piece) = self.piece.take().map_or_else(|| self.survey.next_piece(), |p| Ok(Some(p)))?
            else {
                break;
            };
            let (file, off) = match piece.kind {
                PieceKind::Data { file, off } => (file, off),
                PieceKind::Hole { file, off } if self.fill_holes => (file, off),
                PieceKind::Packed { file } => {
                    let what = "has packed blocks, which cannot be changed in their places";
                    let path = self.images[self.image].host_file(file).path().to_path_buf();
                    return Err(Error::new(ErrorKind::Unsupported, what)
                        .at(&path)
                        .hint("vdimg convert it first"));
                }
                PieceKind::Hole { .. } | PieceKind::Zero | PieceKind::Unallocated => continue,
            };
            let range = piece.range.take(left);
            places.push(Place { range, file, off });
            left -= range.len();
            let rest = piece.range.skip(range.len());
            if !rest.is_empty() {
                let kind = match piece.kind {
                    PieceKind::Hole { .. } => PieceKind::Hole { file, off: off.plus(range.len()) },
                    _ => PieceKind::Data { file, off: off.plus(range.len()) },
                };
                self.piece = Some(Piece { range: rest, kind, ..piece });
            }
        }
        Ok(places)
    }

    fn read(&self, places: &[Place]) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.most);
        for p in places {
            let file = self.images[self.image].host_file(p.file);
            bytes.extend(read(&**file, p.off.0, length(p.range))?);
        }
        Ok(bytes)
    }

    /// Writes new bytes, durably if there is a side file.
    fn write(&mut self, record: &Record) -> Result<()> {
        let disk = &self.images[record.image];
        let mut from = 0;
        let mut touched: Vec<FileId> = Vec::new();
        for p in &record.places {
            let (file, to) = (disk.host_file(p.file), from + length(p.range));
            let failed = |e| Error::io(format!("write to it at {}", p.off), e).at(file.path());
            file.write_at(p.off.0, &record.bytes[from..to]).map_err(failed)?;
            from = to;
            if !touched.contains(&p.file) {
                touched.push(p.file);
            }
        }
        for id in touched.into_iter().filter(|_| self.journal.is_some()) {
            let file = disk.host_file(id);
            if let Err(e) = file.sync() {
                self.sync_failed = Some(record.image);
                return Err(Error::io("sync it", e).at(file.path()));
            }
        }
        Ok(())
    }

    /// The next image. False: there is none.
    fn next_image(&mut self) -> bool {
        self.before += self.images[self.image].size_bytes();
        if self.image + 1 == self.images.len() {
            return false;
        }
        self.image += 1;
        self.survey = Survey::new(self.images[self.image].clone());
        true
    }
}

fn length(range: GuestRange) -> usize {
    usize::try_from(range.len()).expect("inside a record")
}

fn transform(change: &KeyChange, places: &[Place], bytes: &mut [u8]) {
    let mut from = 0;
    for p in places {
        let to = from + length(p.range);
        change.apply(p.range.start(), &mut bytes[from..to]);
        from = to;
    }
}

impl Job for RecryptJob<'_> {
    fn step(&mut self) -> Result<Step> {
        let places = self.next_places()?;
        if places.is_empty() {
            return Ok(if self.next_image() { Step::More } else { Step::Done });
        }
        let bytes = self.read(&places)?;
        let mut record = Record { image: self.image, places, bytes };
        let (old, change) = (self.keeps_old(), &self.change);
        if !old {
            transform(change, &record.places, &mut record.bytes);
        }
        if let Some(journal) = &mut self.journal {
            journal.write(&record)?;
        }
        if old {
            transform(change, &record.places, &mut record.bytes);
        }
        self.write(&record)?;
        Ok(Step::More)
    }

    fn progress(&self) -> Progress {
        let at = self.piece.map_or_else(|| self.survey.at(), |p| p.range.start());
        let done = self.before.saturating_add(at.0);
        Progress { done: done.min(self.total), total: self.total }
    }
}
