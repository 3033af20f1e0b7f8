//! A descriptor chain made into a checked request, or a precise refusal.
//!
//! Everything a guest can write is looked at once: a descriptor, an indirect table, the header and the segments of
//! DISCARD are copied before they are judged. Judged is all of it here; the crates underneath end malformed
//! chains without a word.
//!
//! What is decided where the specification leaves room:
//! - The status byte is the last byte of the last descriptor. If that descriptor cannot be found (a loop, an index
//!   out of its table, an indirect table that is none), is not device-writable, has no byte or lies outside memory,
//!   there is no status byte, and the chain is answered with length 0.
//! - A descriptor of length 0, a device-readable one behind a device-writable one, an indirect table within another
//!   and `INDIRECT` together with `NEXT` are malformed: IOERR. `WRITE` on an indirect descriptor is ignored, as the
//!   specification demands. A table may be longer than the queue, up to [`limits::MAX_CHAIN_DESCRIPTORS`].
//! - IN and OUT move at least one sector and carry nothing of the other direction.
//! - FLUSH ignores its sector and data. GET_ID fills what there is, up to 20 bytes.
//! - DISCARD and WRITE_ZEROES of 0 sectors succeed, as in QEMU.

use crate::io::{BufSlice, gather};
use crate::limits::{self, SECTOR_BYTES};
use crate::map::{GuestOffset, GuestRange};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;

const HEADER_BYTES: usize = 16;
const DESCRIPTOR_BYTES: usize = 16;
const SEGMENT_BYTES: usize = 16;
/// Flags of a descriptor.
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Slices of one chain: descriptors may be split where memory regions meet, but not without end.
const MAX_SLICES: usize = 2 * limits::MAX_CHAIN_DESCRIPTORS;

/// Finds guest memory.
pub trait GuestMemory {
    /// Appends the slices that hold `len` bytes from guest address `gpa` on. False if a byte of them is not there;
    /// `out` may then have grown by a part.
    fn resolve(&self, gpa: u64, len: u32, out: &mut Vec<BufSlice>) -> bool;

    /// The slice of exactly these bytes, if that is known without a search.
    fn at_hand(&self, _gpa: u64, _len: u32) -> Option<BufSlice> {
        None
    }
}

/// The descriptor table of a virtqueue.
pub trait DescriptorTable {
    /// Entries.
    fn size(&self) -> u16;
    /// A copy of an entry below [`Self::size`], fetched once.
    fn get(&self, index: u16) -> Descriptor;
}

/// What the device makes of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Refuse everything that changes the disk.
    pub read_only: bool,
    /// DISCARD is offered, and WRITE_ZEROES may give space back.
    pub discard: bool,
}

/// A range of a DISCARD or WRITE_ZEROES request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where; may be empty.
    pub range: GuestRange,
    /// WRITE_ZEROES: the space may go back.
    pub unmap: bool,
}

/// A request in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fill [`ChainParser::writable`] from the range.
    Read(GuestRange),
    /// Write [`ChainParser::readable`] to the range.
    Write(GuestRange),
    /// Make completed writes durable.
    Flush,
    /// Discard [`ChainParser::segments`].
    Discard,
    /// Zero [`ChainParser::segments`].
    WriteZeroes,
    /// Put the serial number into [`ChainParser::writable`].
    Identify,
}

/// Why a chain is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The chain comes back to itself or goes on past every bound.
    Endless,
    /// A descriptor's `next` lies outside its table.
    NextOutOfTable,
    /// The indirect table has no usable length or is not in memory.
    BadIndirectTable,
    /// An indirect table within an indirect table.
    NestedIndirect,
    /// An indirect descriptor that goes on.
    IndirectWithNext,
    /// A descriptor of length 0.
    EmptyDescriptor,
    /// A device-readable descriptor behind a device-writable one.
    ReadableAfterWritable,
    /// A buffer that is not in guest memory.
    OutsideMemory,
    /// More data than a request may have.
    TooLong,
    /// Less than 16 device-readable bytes.
    ShortHeader,
    /// No byte for the status.
    NoStatus,
    /// Data of a length or direction the request cannot have.
    BadData,
    /// Sectors beyond the end of the disk, or more than a segment may have.
    OutOfRange,
    /// A change of a read-only disk.
    ReadOnly,
    /// A request or flag this device does not know.
    Unsupported,
}

impl Refusal {
    /// The status byte that tells the driver.
    pub fn status(self) -> u8 {
        match self {
            Refusal::Unsupported => STATUS_UNSUPP,
            _ => STATUS_IOERR,
        }
    }
}

/// virtio's status of success.
pub const STATUS_OK: u8 = blk::VIRTIO_BLK_S_OK as u8;
/// virtio's status of a failure.
pub const STATUS_IOERR: u8 = blk::VIRTIO_BLK_S_IOERR as u8;
/// virtio's status of an unknown request.
pub const STATUS_UNSUPP: u8 = blk::VIRTIO_BLK_S_UNSUPP as u8;

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Where the status goes, one byte long; there is always one if `action` is in order.
    pub status: Option<BufSlice>,
    /// What to do.
    pub action: Result<Action, Refusal>,
}

/// Parses one chain after the other into buffers of its own: nothing is allocated once they have grown.
#[derive(Debug, Default)]
pub struct ChainParser {
    header: [u8; HEADER_BYTES],
    header_len: usize,
    /// Device-readable slices, the header's first, then device-writable ones.
    slices: Vec<BufSlice>,
    /// Where those of the readable data begin.
    data_at: usize,
    /// Where the writable ones begin.
    writable_at: usize,
    segments: Vec<Segment>,
    /// Device-readable bytes, the header included.
    readable_bytes: u64,
    /// Device-writable bytes, the status included.
    writable_bytes: u64,
    descriptors: usize,
    /// Last byte of the last descriptor, if it can hold the status.
    tail: Option<BufSlice>,
    refusal: Option<Refusal>,
    /// Of an indirect table.
    table: Vec<BufSlice>,
    bytes: Vec<u8>,
}

impl ChainParser {
    /// A parser with empty buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Device-readable data of the chain parsed last, the header excluded.
    pub fn readable(&self) -> &[BufSlice] {
        &self.slices[self.data_at..self.writable_at]
    }

    /// Device-writable data of the chain parsed last, the status byte excluded.
    pub fn writable(&self) -> &[BufSlice] {
        &self.slices[self.writable_at..]
    }

    /// Segments of the DISCARD or WRITE_ZEROES parsed last.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Follows the chain from `head` and judges the request in it.
    pub fn parse<T, M>(&mut self, head: u16, table: &T, memory: &M, rules: &Rules) -> Verdict
    where
        T: DescriptorTable,
        M: GuestMemory,
    {
        if let Some(verdict) = self.parse_plain(head, table, memory, rules) {
            return verdict;
        }
        self.reset();
        if let Err(why) = self.walk(head, table, memory) {
            // the chain's end is not known, so neither is the status byte
            return Verdict { status: None, action: Err(why) };
        }
        let status = self.split_status();
        let action = match (self.refusal, status) {
            (Some(why), _) => Err(why),
            (None, None) => Err(Refusal::NoStatus),
            (None, Some(_)) => self.judge(rules),
        };
        Verdict { status, action }
    }

    /// Nearly all requests have a header, one piece of data and a status, each in a descriptor of its own. `None`: it may be another
    /// sort, or wrong; whoever finds out looks at everything anew.
    fn parse_plain<T, M>(&mut self, head: u16, table: &T, memory: &M, rules: &Rules) -> Option<Verdict>
    where
        T: DescriptorTable,
        M: GuestMemory,
    {
        let [header, data, status] = three(head, table, memory)?;
        let flags = [header.flags(), data.flags() & !WRITE, status.flags()];
        let sizes = header.len() as usize == HEADER_BYTES && data.len() > 0 && status.len() == 1;
        if flags != [NEXT, NEXT, WRITE] || !sizes || u64::from(data.len()) > limits::MAX_REQUEST_BYTES {
            return None;
        }
        let bytes = u64::from(data.len());
        let buffer = memory.at_hand(data.addr().0, data.len())?;
        let status = memory.at_hand(status.addr().0, 1)?;
        memory.at_hand(header.addr().0, header.len())?.read(&mut self.header);
        self.header_len = HEADER_BYTES;
        self.slices.clear();
        self.slices.push(buffer);
        self.segments.clear();
        (self.readable_bytes, self.writable_bytes) = (HEADER_BYTES as u64, 1);
        (self.data_at, self.writable_at) = (0, 0);
        if data.is_write_only() {
            self.writable_bytes += bytes;
        } else {
            self.readable_bytes += bytes;
            self.writable_at = 1;
        }
        Some(Verdict { status: Some(status), action: self.judge(rules) })
    }

    fn reset(&mut self) {
        self.header_len = 0;
        self.slices.clear();
        (self.data_at, self.writable_at) = (0, 0);
        self.segments.clear();
        self.readable_bytes = 0;
        self.writable_bytes = 0;
        self.descriptors = 0;
        self.tail = None;
        self.refusal = None;
    }

    /// Remembers the first thing that is wrong; the walk goes on to find the status byte.
    fn refuse(&mut self, why: Refusal) {
        self.refusal.get_or_insert(why);
    }

    fn walk<T, M>(&mut self, head: u16, table: &T, memory: &M) -> Result<(), Refusal>
    where
        T: DescriptorTable,
        M: GuestMemory,
    {
        let mut index = head;
        // a chain longer than its table has come back to itself
        for _ in 0..table.size() {
            if index >= table.size() {
                return Err(Refusal::NextOutOfTable);
            }
            let d = table.get(index);
            self.count()?;
            if d.refers_to_indirect_table() {
                self.walk_indirect(&d, memory)?;
                if d.has_next() {
                    self.refuse(Refusal::IndirectWithNext);
                }
            } else {
                self.take(&d, memory);
            }
            if !d.has_next() {
                return Ok(());
            }
            index = d.next();
        }
        Err(Refusal::Endless)
    }

    fn walk_indirect<M: GuestMemory>(&mut self, d: &Descriptor, memory: &M) -> Result<(), Refusal> {
        let entries = self.load_table(d, memory)?;
        let mut index = 0;
        for _ in 0..entries {
            let at = index * DESCRIPTOR_BYTES;
            let raw = self.bytes.get(at..at + DESCRIPTOR_BYTES).ok_or(Refusal::NextOutOfTable)?;
            let d = decode_descriptor(raw);
            self.count()?;
            if d.refers_to_indirect_table() {
                self.tail = None;
                self.refuse(Refusal::NestedIndirect);
            } else {
                self.take(&d, memory);
            }
            if !d.has_next() {
                return Ok(());
            }
            index = usize::from(d.next());
        }
        Err(Refusal::Endless)
    }

    /// Copies an indirect table to `self.bytes`; returns its entries.
    fn load_table<M: GuestMemory>(&mut self, d: &Descriptor, memory: &M) -> Result<usize, Refusal> {
        let len = usize::try_from(d.len()).map_err(|_| Refusal::BadIndirectTable)?;
        let entries = len / DESCRIPTOR_BYTES;
        if entries == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES) || entries > limits::MAX_CHAIN_DESCRIPTORS {
            return Err(Refusal::BadIndirectTable);
        }
        self.table.clear();
        if !memory.resolve(d.addr().0, d.len(), &mut self.table) {
            return Err(Refusal::BadIndirectTable);
        }
        self.bytes.resize(len, 0);
        gather(&self.table, &mut self.bytes);
        Ok(entries)
    }

    fn count(&mut self) -> Result<(), Refusal> {
        self.descriptors += 1;
        if self.descriptors > limits::MAX_CHAIN_DESCRIPTORS { Err(Refusal::Endless) } else { Ok(()) }
    }

    /// Takes a descriptor's buffer in.
    fn take<M: GuestMemory>(&mut self, d: &Descriptor, memory: &M) {
        self.tail = None;
        if d.len() == 0 {
            return self.refuse(Refusal::EmptyDescriptor);
        }
        // at most 1024 descriptors of 4 GiB each: no overflow
        if d.is_write_only() {
            self.writable_bytes += u64::from(d.len());
            self.take_writable(d, memory);
        } else {
            if self.writable_bytes > 0 {
                self.refuse(Refusal::ReadableAfterWritable);
            }
            self.readable_bytes += u64::from(d.len());
            self.take_readable(d, memory);
        }
        if self.slices.len() > MAX_SLICES
            || self.readable_bytes + self.writable_bytes > limits::MAX_REQUEST_BYTES + HEADER_BYTES as u64 + 1
        {
            self.refuse(Refusal::TooLong);
        }
    }

    #[inline]
    fn take_writable<M: GuestMemory>(&mut self, d: &Descriptor, memory: &M) {
        let before = self.slices.len();
        if !memory.resolve(d.addr().0, d.len(), &mut self.slices) {
            self.slices.truncate(before);
            return self.refuse(Refusal::OutsideMemory);
        }
        self.tail = self.slices.last().map(|b| b.last_byte());
        if self.refusal.is_some() {
            // only the status byte is still of interest
            self.slices.truncate(before);
        }
    }

    #[inline]
    fn take_readable<M: GuestMemory>(&mut self, d: &Descriptor, memory: &M) {
        if self.refusal.is_some() {
            return;
        }
        let before = self.slices.len();
        if !memory.resolve(d.addr().0, d.len(), &mut self.slices) {
            self.slices.truncate(before);
            return self.refuse(Refusal::OutsideMemory);
        }
        self.writable_at = self.slices.len();
        if self.header_len < HEADER_BYTES {
            self.fill_header();
        }
    }

    /// Moves the first bytes of the device-readable part to the header. Until it is full there are no others.
    #[inline]
    fn fill_header(&mut self) {
        let new = &mut self.slices[self.data_at..];
        if let ([b], 0) = (&*new, self.header_len)
            && b.len() == HEADER_BYTES
        {
            // a descriptor of its own: what most drivers do
            b.read(&mut self.header);
            (self.header_len, self.data_at) = (HEADER_BYTES, self.data_at + 1);
            return;
        }
        for b in new {
            let n = b.len().min(HEADER_BYTES - self.header_len);
            b.part(0, n).read(&mut self.header[self.header_len..self.header_len + n]);
            self.header_len += n;
            if n < b.len() {
                *b = b.part(n, b.len() - n);
                break;
            }
            self.data_at += 1;
        }
    }

    /// Takes the status byte off the device-writable part.
    fn split_status(&mut self) -> Option<BufSlice> {
        let tail = self.tail?;
        if self.refusal.is_none() {
            let last = self.slices.last_mut()?;
            *last = last.part(0, last.len() - 1);
            if last.is_empty() {
                self.slices.pop();
            }
        }
        Some(tail)
    }

    fn judge(&mut self, rules: &Rules) -> Result<Action, Refusal> {
        if self.header_len < HEADER_BYTES {
            return Err(Refusal::ShortHeader);
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = self.header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes(sector);
        let incoming = self.readable_bytes - HEADER_BYTES as u64;
        let outgoing = self.writable_bytes - 1;
        match kind {
            blk::VIRTIO_BLK_T_IN => data_range(sector, outgoing, incoming, rules).map(Action::Read),
            blk::VIRTIO_BLK_T_OUT if rules.read_only => Err(Refusal::ReadOnly),
            blk::VIRTIO_BLK_T_OUT => data_range(sector, incoming, outgoing, rules).map(Action::Write),
            blk::VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
            blk::VIRTIO_BLK_T_GET_ID if outgoing == 0 => Err(Refusal::BadData),
            blk::VIRTIO_BLK_T_GET_ID => Ok(Action::Identify),
            blk::VIRTIO_BLK_T_DISCARD if !rules.discard => Err(Refusal::Unsupported),
            blk::VIRTIO_BLK_T_DISCARD => self.load_segments(incoming, 0, rules).map(|()| Action::Discard),
            blk::VIRTIO_BLK_T_WRITE_ZEROES => self
                .load_segments(incoming, blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, rules)
                .map(|()| Action::WriteZeroes),
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Copies and checks the segments of a DISCARD or WRITE_ZEROES, of which `flags` may be set.
    fn load_segments(&mut self, len: u64, flags: u32, rules: &Rules) -> Result<(), Refusal> {
        if rules.read_only {
            return Err(Refusal::ReadOnly);
        }
        let len = usize::try_from(len).map_err(|_| Refusal::BadData)?;
        let count = len / SEGMENT_BYTES;
        let most = limits::MAX_DISCARD_SEGMENTS as usize;
        if count == 0 || !len.is_multiple_of(SEGMENT_BYTES) || count > most {
            return Err(Refusal::BadData);
        }
        self.bytes.resize(len, 0);
        gather(&self.slices[self.data_at..self.writable_at], &mut self.bytes);
        // unknown flags first: the specification wants UNSUPP whatever else is wrong
        let segments = self.bytes.chunks_exact(SEGMENT_BYTES);
        if segments.clone().any(|raw| u32_at(raw, 12) & !flags != 0) {
            return Err(Refusal::Unsupported);
        }
        for raw in segments {
            let (sector, sectors) = (u64_at(raw, 0), u32_at(raw, 8));
            if sectors > limits::MAX_DISCARD_SECTORS {
                return Err(Refusal::OutOfRange);
            }
            let range = disk_range(sector, u64::from(sectors) * SECTOR_BYTES, rules)?;
            let unmap = rules.discard && u32_at(raw, 12) & blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            self.segments.push(Segment { range, unmap });
        }
        Ok(())
    }
}

/// The descriptors of a chain that has three of them at least, in the table itself or first in an indirect one. `None`: it has
/// fewer, or they are not in order there, or something is wrong.
#[inline]
fn three<T, M>(head: u16, table: &T, memory: &M) -> Option<[Descriptor; 3]>
where
    T: DescriptorTable,
    M: GuestMemory,
{
    let get = |index: u16| (index < table.size()).then(|| table.get(index));
    let first = get(head)?;
    if first.flags() == INDIRECT {
        let mut raw = [0; 3 * DESCRIPTOR_BYTES];
        // a longer table may hold a longer chain
        if first.len() as usize != raw.len() {
            return None;
        }
        memory.at_hand(first.addr().0, first.len())?.read(&mut raw);
        let (all, _) = raw.as_chunks::<DESCRIPTOR_BYTES>();
        let [a, b, c] = [&all[0], &all[1], &all[2]].map(|d| decode_descriptor(d));
        return (a.next() == 1 && b.next() == 2).then_some([a, b, c]);
    }
    if first.flags() != NEXT {
        return None;
    }
    let second = get(first.next())?;
    let third = if second.has_next() { get(second.next())? } else { return None };
    Some([first, second, third])
}

/// The range of an IN or OUT with `len` bytes in its direction and `other` in the other.
fn data_range(sector: u64, len: u64, other: u64, rules: &Rules) -> Result<GuestRange, Refusal> {
    if len == 0 || !len.is_multiple_of(SECTOR_BYTES) || other != 0 {
        return Err(Refusal::BadData);
    }
    disk_range(sector, len, rules)
}

fn disk_range(sector: u64, len: u64, rules: &Rules) -> Result<GuestRange, Refusal> {
    let start = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::OutOfRange)?;
    let range = GuestRange::new(GuestOffset(start), len).ok_or(Refusal::OutOfRange)?;
    // a driver counts in sectors: a last half one is not there
    let size = rules.size_bytes - rules.size_bytes % SECTOR_BYTES;
    if range.end().0 > size { Err(Refusal::OutOfRange) } else { Ok(range) }
}

fn decode_descriptor(raw: &[u8]) -> Descriptor {
    let [f0, f1, n0, n1] = u32_at(raw, 12).to_le_bytes();
    Descriptor::new(
        u64_at(raw, 0),
        u32_at(raw, 8),
        u16::from_le_bytes([f0, f1]),
        u16::from_le_bytes([n0, n1]),
    )
}

fn u32_at(raw: &[u8], at: usize) -> u32 {
    let mut b = [0; 4];
    b.copy_from_slice(&raw[at..at + 4]);
    u32::from_le_bytes(b)
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    let mut b = [0; 8];
    b.copy_from_slice(&raw[at..at + 8]);
    u64::from_le_bytes(b)
}
