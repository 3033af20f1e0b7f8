//! The beginning and the end of a cache image's session. The orders are docs/formats/vci.md's: the mark that one has begun
//! is durable before anything is changed, and goes when all else is.

use super::FileSource;
use super::cache::{Cache, CacheCounts, Scope};
use super::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::format::vci::{
    Base, HEADER_BYTES, Header, NO_BLOCK, PAGE_BYTES, PAGE_ENTRIES, TABLE_AT, page_of_bytes, page_to_bytes,
    wrong_entry,
};
use crate::io::{HostFile, ImageLock};
use crate::map::{ByteSource, FileId, HostOffset};
use crate::probe::sabotage::{Sabotage, is_broken};
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

/// Reads the header of a cache image, whose length must be what it says.
///
/// # Errors
/// As [`Header::parse`]; [`ErrorKind::Corrupt`] for another length.
pub fn read_cache_header(file: &dyn HostFile) -> Result<Header> {
    let source = FileSource::new(file)?;
    let mut bytes = [0; HEADER_BYTES];
    let have = usize::try_from(source.len()).unwrap_or(HEADER_BYTES).min(HEADER_BYTES);
    source.read_at(HostOffset(0), &mut bytes[..have])?;
    let header = Header::parse(&bytes).map_err(|e| e.at(file.path()))?;
    if source.len() != header.shape.file_bytes() {
        let what = format!("has {} bytes, and its header says {}", source.len(), header.shape.file_bytes());
        return Err(Error::new(ErrorKind::Corrupt, what).at(file.path()).hint("make a new one"));
    }
    Ok(header)
}

/// The blocks in a cache image's places, by its table, which a clean session has written.
///
/// # Errors
/// [`ErrorKind::Corrupt`] at the first thing that cannot be; from the operating system.
pub fn read_cache_table(file: &dyn HostFile, header: &Header) -> Result<Vec<u64>> {
    // A rule broken on purpose, with all that would notice it.
    let generation = (!is_broken(Sabotage::UncleanTrusted)).then_some(header.generation);
    let corrupt = |what: String| Error::new(ErrorKind::Corrupt, what).at(file.path());
    let (shape, source) = (header.shape, FileSource::new(file)?);
    let mut entries = Vec::with_capacity(usize::try_from(shape.places).expect("limits::MAX_CACHE_PLACES"));
    let mut bytes = [0; PAGE_BYTES];
    for number in 0..shape.pages() {
        source.read_at(page_at(number), &mut bytes)?;
        let page = page_of_bytes(&bytes, number, generation);
        let page = page.ok_or_else(|| corrupt(format!("page {number} of its table is damaged")))?;
        let left = shape.places - number * PAGE_ENTRIES;
        entries.extend(page.take(usize::try_from(left.min(PAGE_ENTRIES)).expect("a page")));
    }
    let blocks = header.base.disk_bytes / shape.block_bytes;
    let used = || (0..).zip(&entries).filter(|(_, block)| **block != NO_BLOCK);
    if let Some(what) = used().find_map(|(place, block)| wrong_entry(shape, blocks, place, *block)) {
        return Err(corrupt(what));
    }
    let mut seen = BTreeSet::new();
    match used().find(|(_, block)| !seen.insert(**block)) {
        Some((place, block)) => Err(corrupt(format!("place {place} holds block {block}, as another does"))),
        None => Ok(entries),
    }
}

fn page_at(number: u64) -> HostOffset {
    HostOffset(TABLE_AT + number * PAGE_BYTES as u64)
}

impl Cache {
    /// Begins a session: what the file holds is taken over if it is `base`'s and the last session ended well. `None` where the
    /// file cannot be written, with a warning: the disk does without.
    ///
    /// # Errors
    /// If the file is no cache image, or a damaged one.
    pub(crate) fn begin(
        (file, id, lock): (Arc<dyn HostFile>, FileId, Option<ImageLock>),
        base: Base,
        scope: Scope,
    ) -> Result<Option<Cache>> {
        let old = read_cache_header(&*file)?;
        let entries = trusted_entries(&*file, &old, base);
        let header = Header { base, unclean: true, generation: old.generation.wrapping_add(1), ..old };
        let marked = file.write_at(0, &header.to_bytes()).and_then(|()| file.sync());
        if let Err(e) = marked {
            tracing::warn!(
                "{}: cannot be written ({e}): the disk does without this cache",
                file.path().display()
            );
            return Ok(None);
        }
        Ok(Some(Cache::new((file, id, lock), header, scope, entries)))
    }

    /// Ends the session, with nothing on its way: the next one takes over what is there. If that cannot be written it begins
    /// with nothing. Nothing is looked up afterwards.
    pub(crate) fn end(&self) {
        let counts = self.counts();
        if !self.turn_off() {
            return; // for good: what is in the file is not known
        }
        let path = self.file.path().display();
        match self.write_table() {
            Ok(()) => tracing::info!("{path}: {}", told(counts)),
            Err(e) => tracing::warn!("{path}: cannot be written ({e}): it will begin empty"),
        }
    }

    fn write_table(&self) -> io::Result<()> {
        let mut entries = self.entries();
        for number in 0..self.shape.pages() {
            let page = entries.by_ref().take(usize::try_from(PAGE_ENTRIES).expect("a page"));
            let bytes = page_to_bytes(number, self.header.generation, page);
            self.file.write_at(page_at(number).0, &bytes)?;
        }
        // Blocks and table, before the header says that they are there.
        self.file.sync()?;
        self.file.write_at(0, &Header { unclean: false, ..self.header }.to_bytes())?;
        self.file.sync()
    }
}

fn told(c: CacheCounts) -> String {
    let mib = |bytes: u64| bytes >> 20;
    format!(
        "{} MiB were read from this cache, {} MiB from beneath it; {} blocks were filled, {} of others replaced, {} kept",
        mib(c.hit_bytes),
        mib(c.missed_bytes),
        c.filled,
        c.replaced,
        c.kept
    )
}

/// What may be taken over of the last session; nothing where there is any doubt.
fn trusted_entries(file: &dyn HostFile, old: &Header, base: Base) -> Vec<u64> {
    let path = file.path().display();
    let none = || vec![NO_BLOCK; usize::try_from(old.shape.places).expect("limits::MAX_CACHE_PLACES")];
    if old.unclean && !is_broken(Sabotage::UncleanTrusted) {
        tracing::info!("{path}: its last session was not ended in order: begins empty");
        return none();
    }
    if old.base != base {
        if old.base != Base::NONE {
            tracing::info!("{path}: caches another base, or this one before it was changed: begins empty");
        }
        return none();
    }
    match read_cache_table(file, old) {
        Ok(entries) => {
            let kept = entries.iter().filter(|b| **b != NO_BLOCK).count();
            tracing::info!("{path}: {kept} blocks of {} are here from before", old.shape.places);
            entries
        }
        Err(e) => {
            tracing::warn!("{e}: begins empty");
            none()
        }
    }
}

impl Disk {
    /// What the disk's cache image has been good for; `None` without one.
    pub fn cache_counts(&self) -> Option<CacheCounts> {
        self.cache.as_ref().map(|c| c.counts())
    }

    /// Ends the session of the disk's cache image, if it has one. To be called when no channel of the disk has anything in
    /// flight; the first call counts.
    pub fn end_cache(&self) {
        if let Some(cache) = &self.cache {
            cache.end();
        }
    }
}
