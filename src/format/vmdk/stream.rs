//! New streamOptimized VMDKs: grains deflated one behind the other, each behind a marker that says whose it is; tables,
//! directory and a footer follow. Laid out as VirtualBox does.

use super::super::blueprint::Sequential;
use super::header::{FLAG_COMPRESSED, FLAG_MARKERS, FLAG_NEWLINE, KDMV, MAX_DIRECTORY_BYTES, RawKdmv};
use super::layout::MARKER_BYTES;
use super::table::ENTRY_BYTES;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::HostOffset;
use flate2::{Compress, Compression, FlushCompress, Status};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, IntoBytes};

/// Sectors of a grain.
const GRAIN_SECTORS: u64 = 128;
const GRAIN_BYTES: usize = 64 << 10;
/// Entries of a grain table.
const TABLE_ENTRIES: u64 = 512;
/// The first grain's sector: header and descriptor lie before.
const OVERHEAD: u64 = 128;
/// Sectors of room for the descriptor.
const TEXT_SECTORS: u64 = 20;
/// The header's version where grains are compressed, as VirtualBox has it.
const VERSION: u32 = 3;
/// A directory's place that says: it is in the footer.
const IN_FOOTER: u64 = u64::MAX;

/// What a marker that is no grain's announces.
#[derive(Clone, Copy)]
enum Mark {
    Table = 1,
    Directory = 2,
    Footer = 3,
}

/// A stream that is being written.
#[derive(Debug)]
pub(super) struct Stream {
    sectors: u64,
    text: Vec<u8>,
    /// The next sector of the file.
    at: u64,
    directory: Vec<u32>,
    /// The table that grains are being added to, and its number.
    table: Vec<u32>,
    number: u64,
    packer: Compress,
}

impl Stream {
    /// A disk of so many sectors, with this descriptor.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a disk or a text that is too large.
    pub(super) fn new(sectors: u64, text: String) -> Result<Self> {
        let tables = sectors.div_ceil(GRAIN_SECTORS * TABLE_ENTRIES);
        if tables * ENTRY_BYTES > MAX_DIRECTORY_BYTES {
            let what = format!("a disk of {sectors} sectors is too large for a streamOptimized VMDK");
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        let room = TEXT_SECTORS * SECTOR_BYTES;
        if text.len() as u64 >= room {
            let what = format!("a descriptor of {} bytes; {room} are there", text.len());
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        let tables = usize::try_from(tables).expect("at most MAX_DIRECTORY_BYTES");
        let entries = usize::try_from(TABLE_ENTRIES).expect("a small constant");
        Ok(Stream {
            sectors,
            text: text.into_bytes(),
            at: OVERHEAD,
            directory: vec![0; tables],
            table: vec![0; entries],
            number: 0,
            packer: Compress::new(Compression::default(), true),
        })
    }

    /// The sector that comes next, as entries say it.
    fn here(&self) -> Result<u32> {
        u32::try_from(self.at).map_err(|_| {
            Error::new(ErrorKind::Limit, "the stream reaches 2 TiB, more than its tables can name")
                .hint("choose split2g or another format")
        })
    }

    /// Appends bytes up to a whole sector.
    fn append(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let whole = bytes.len().next_multiple_of(SECTOR_BYTES as usize);
        out.extend(bytes);
        out.resize(out.len() + whole - bytes.len(), 0);
        self.at += whole as u64 / SECTOR_BYTES;
    }

    fn append_mark(&mut self, what: Mark, sectors: u64, out: &mut Vec<u8>) {
        let marker = [&sectors.to_le_bytes()[..], &0u32.to_le_bytes(), &(what as u32).to_le_bytes()].concat();
        self.append(&marker, out);
    }

    fn append_words(&mut self, what: Mark, words: &[u32], out: &mut Vec<u8>) -> Result<u32> {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.append_mark(what, (bytes.len() as u64).div_ceil(SECTOR_BYTES), out);
        let at = self.here()?;
        self.append(&bytes, out);
        Ok(at)
    }

    /// Appends the table that grains were added to; one without grains is left out.
    fn end_table(&mut self, out: &mut Vec<u8>) -> Result<()> {
        if self.table.iter().all(|e| *e == 0) {
            return Ok(());
        }
        let entries = std::mem::take(&mut self.table);
        let at = self.append_words(Mark::Table, &entries, out)?;
        let number = usize::try_from(self.number).expect("inside the directory");
        self.directory[number] = at;
        self.table = vec![0; entries.len()];
        Ok(())
    }

    fn deflated(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let mut packed = Vec::with_capacity(bytes.len() + bytes.len() / 64 + 64);
        self.packer.reset();
        loop {
            let from = usize::try_from(self.packer.total_in()).expect("inside a grain");
            match self.packer.compress_vec(&bytes[from..], &mut packed, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => return Ok(packed),
                Ok(_) => packed.reserve(4096),
                Err(e) => {
                    return Err(Error::new(ErrorKind::Io, format!("a grain cannot be compressed: {e}")));
                }
            }
        }
    }

    fn header(&self, directory_at: u64) -> RawKdmv {
        let mut head = RawKdmv::new_zeroed();
        head.magic = KDMV;
        head.version = U32::new(VERSION);
        head.flags = U32::new(FLAG_NEWLINE | FLAG_COMPRESSED | FLAG_MARKERS);
        (head.capacity, head.grain) = (U64::new(self.sectors), U64::new(GRAIN_SECTORS));
        (head.descriptor_at, head.descriptor_len) = (U64::new(1), U64::new(TEXT_SECTORS));
        head.entries = U32::new(u32::try_from(TABLE_ENTRIES).expect("a small constant"));
        (head.directory_at, head.overhead) = (U64::new(directory_at), U64::new(OVERHEAD));
        head.newlines = *b"\n \r\n";
        head.compression = U16::new(1);
        head
    }
}

impl Sequential for Stream {
    fn unit_bytes(&self) -> u64 {
        GRAIN_BYTES as u64
    }

    fn begins_at(&self) -> HostOffset {
        HostOffset(OVERHEAD * SECTOR_BYTES)
    }

    fn pack(&mut self, unit: u64, bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let (number, entry) = (unit / TABLE_ENTRIES, usize::try_from(unit % TABLE_ENTRIES).expect("few"));
        assert!(number > self.number || (number == self.number && self.table[entry] == 0), "units in order");
        if number != self.number {
            self.end_table(out)?;
            self.number = number;
        }
        // VirtualBox wants every grain whole, the last one too.
        let mut whole = std::borrow::Cow::Borrowed(bytes);
        if whole.len() < GRAIN_BYTES {
            whole.to_mut().resize(GRAIN_BYTES, 0);
        }
        let packed = self.deflated(&whole)?;
        let len = u32::try_from(packed.len()).expect("little more than a grain");
        let sector = unit * GRAIN_SECTORS;
        let marker = [&sector.to_le_bytes()[..], &len.to_le_bytes()].concat();
        debug_assert_eq!(marker.len() as u64, MARKER_BYTES);
        self.table[entry] = self.here()?;
        self.append(&[marker, packed].concat(), out);
        Ok(())
    }

    fn finish(&mut self, out: &mut Vec<u8>) -> Result<Vec<u8>> {
        self.end_table(out)?;
        let directory = std::mem::take(&mut self.directory);
        let at = self.append_words(Mark::Directory, &directory, out)?;
        self.append_mark(Mark::Footer, 1, out);
        let footer = self.header(u64::from(at));
        self.append(footer.as_bytes(), out);
        self.append(&[0; SECTOR_BYTES as usize], out); // the end: a marker of nothing
        Ok([self.header(IN_FOOTER).as_bytes(), &self.text].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_no_directory_holds_is_refused() {
        assert!(Stream::new(64 << 31, String::new()).is_ok());
        let e = Stream::new((64 << 31) * 2, String::new()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidArgument);
        assert!(Stream::new(1, "x".repeat(20 * 512)).is_err());
    }

    #[test]
    fn grains_that_no_entry_can_name_are_refused() {
        let mut s = Stream::new(1 << 20, String::new()).unwrap();
        s.at = u64::from(u32::MAX);
        let mut out = Vec::new();
        s.pack(0, &[1; 512], &mut out).unwrap();
        assert_eq!(s.pack(1, &[1; 512], &mut out).unwrap_err().kind(), ErrorKind::Limit);
    }
}
