//! Another parent for a VHD.
//!
//! Header and locators are several sectors under one checksum. So a second header, with its text, is written behind the blocks; the
//! copy of the footer at the beginning, a sector that decides, says for as long as it takes to write the first one anew that it is there.

use super::super::{FileStep, NewParent};
use super::check::{Examined, examine};
use super::footer::FOOTER_BYTES;
use super::header::{HEADER_BYTES, Header};
use super::layout::Layout;
use super::locator;
use super::repair::Work;
use super::table::placed;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, HostOffset};
use uuid::Uuid;
use zerocopy::IntoBytes;

/// # Errors
/// As [`super::super::relink`].
pub(super) fn relink(source: &dyn ByteSource, parent: Option<&NewParent>) -> Result<Vec<FileStep>> {
    let found = examine(source)?;
    found.report.refuse_damage()?;
    let no_diff = || Error::new(ErrorKind::Unsupported, "a VHD without a parent cannot be given one");
    let Some(image) = found.image else {
        return if parent.is_some() { Err(no_diff()) } else { Ok(Vec::new()) };
    };
    if !image.footers.best.is_diff() {
        return if parent.is_some() { Err(no_diff()) } else { Ok(Vec::new()) };
    }
    let home = home(source, &image)?;
    let header = Header::read(source, image.footers.best.header_at())?;
    let mut work = Work::new(image);
    work.mend_copy();
    work.lengthen();
    // A second one, wherever the interrupted one may lie.
    let place = work.end().max(work.image.layout.metadata_end()).next_multiple_of(SECTOR_BYTES);
    let away = Written::new(&header, parent, (place, place + HEADER_BYTES, u64::MAX));
    let back = Written::new(&header, parent, home);
    let end = away.end();
    if end + FOOTER_BYTES > work.image.file_bytes {
        work.set_len(end + FOOTER_BYTES);
    }
    work.write(end, work.footer());
    work.sync();
    work.image.footers.best.set_parent(parent.is_some());
    work.switch(&away, place);
    work.switch(&back, home.0);
    work.image.layout.metadata = Layout::new(&work.image.footers.best, &back.header, end)?.metadata;
    work.end_file();
    Ok(work.steps)
}

/// A header and its locators' texts.
struct Written {
    header: Header,
    texts: Vec<(HostOffset, Vec<u8>)>,
    at: u64,
}

impl Written {
    /// For a header at `at` whose texts may lie from `from` to `to`; what does not fit there is left out.
    fn new(old: &Header, parent: Option<&NewParent>, (at, from, to): (u64, u64, u64)) -> Self {
        let (locators, texts) = parent.map_or_else(Default::default, |p| locator::new(p, from));
        let fits = texts.iter().all(|(at, text)| at.0 + text.len() as u64 <= to);
        let (locators, texts) = if fits { (locators, texts) } else { Default::default() };
        let name = parent.and_then(|p| p.path.as_deref()).unwrap_or_default();
        let name = name.rsplit('/').next().unwrap_or_default();
        let id = parent.map(|p| p.info.uuid.unwrap_or_else(Uuid::new_v4));
        Written { header: old.with_parent(id.map(|id| (id, name)), &locators), texts, at }
    }

    fn end(&self) -> u64 {
        let texts = self.texts.iter().map(|(at, text)| at.0 + text.len() as u64);
        texts.max().unwrap_or(0).max(self.at + HEADER_BYTES)
    }
}

impl Work {
    /// Writes a header, and has the first footer name it.
    fn switch(&mut self, new: &Written, at: u64) {
        for (at, text) in &new.texts {
            self.write(at.0, text.clone());
        }
        self.write(at, new.header.as_bytes().to_vec());
        self.sync();
        self.image.footers.best.set_header_at(at);
        self.write(0, self.footer());
        self.sync();
    }
}

/// Where the header belongs, and from where to where its locators' texts may lie: in front of the table, where no block comes. An
/// interrupted change may have left it elsewhere.
fn home(source: &dyn ByteSource, image: &Examined) -> Result<(u64, u64, u64)> {
    let table_at = image.layout.table_at.0;
    let at = image.footers.best.header_at();
    let at = if at < table_at || table_at < FOOTER_BYTES + HEADER_BYTES { at } else { FOOTER_BYTES };
    let header = Header::read(source, image.footers.best.header_at())?;
    let from = at + HEADER_BYTES;
    let first_block = placed(&image.table).first().map_or(u64::MAX, |p| p.start);
    if first_block < from && at != image.footers.best.header_at() {
        let what = "there is no place for its header in front of its blocks";
        return Err(Error::new(ErrorKind::Unsupported, what));
    }
    if from <= table_at && table_at <= first_block {
        // Nothing but locators' texts is there.
        return Ok((at, from, table_at));
    }
    let own = header.locators.iter().find_map(|l| l.extent(source.len()));
    let (from, to) = own.unwrap_or((from, from));
    Ok((at, from, to))
}
