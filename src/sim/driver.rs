//! The driver's side of a virtqueue in simulated guest memory: chains of all shapes, each of which has to be executed in
//! order, once by each process that finds it unanswered, and answered once.

use super::Rng;
use super::ram::{DATA_BYTES, ENTRIES, QUEUE_BYTES, Ram, SLOT_BYTES, SLOTS_AT};
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{Outcome, Request};
use crate::vhost::RingSetup;
use crate::virtio::{STATUS_IOERR, STATUS_OK, STATUS_UNSUPP};
use virtio_bindings::virtio_blk as blk;

const AVAILABLE_AT: u64 = 0x100;
const USED_AT: u64 = 0x200;
const STATUS_AT: u64 = 0x10;
const SERIAL_AT: u64 = 0x20;
const TABLE_AT: u64 = 0x40;
const SEGMENTS_AT: u64 = 0x200;
/// Nobody has written a status here.
const NO_STATUS: u8 = 0xee;

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;

/// The serial number all simulated disks have.
pub(super) const SERIAL: &str = "simulated-disk";

/// A buffer: address, length, written by the device.
type Buffer = (u64, u32, bool);

/// What happened at the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// A request was given to it, for the chain with this head.
    Begun(u16, Request),
    /// It has ended.
    Ended(u16, Outcome),
}

/// A chain in flight.
#[derive(Debug)]
struct Chain {
    /// Its place in the order of posting.
    number: u64,
    descriptors: Vec<u16>,
    /// What the device has to be asked for.
    parts: Vec<Request>,
    /// Bytes the device writes if all goes well, without the status.
    inward: u32,
    /// Parts begun by this process.
    begun: usize,
    /// Nothing of it is left to do for this process.
    ended: bool,
    /// A former process had begun it.
    before: bool,
    identifies: bool,
}

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) head: u16,
    /// The status byte.
    pub(super) status: u8,
    /// What the device has written into the data buffers.
    pub(super) data: Vec<u8>,
    /// It was a request for the serial number, which was right.
    pub(super) identified: bool,
}

/// The driver of one queue.
#[derive(Debug)]
pub(super) struct Driver {
    queue: u16,
    event_idx: bool,
    /// Where the next process begins, as far as the front-end knows.
    pub(super) base: u16,
    free: Vec<u16>,
    available: u16,
    used: u16,
    chains: Vec<Option<Chain>>,
    posted: u64,
    /// Number of the last chain that this process has begun.
    last_begun: Option<u64>,
}

impl Driver {
    pub(super) fn new(queue: u16, event_idx: bool) -> Driver {
        Driver {
            queue,
            event_idx,
            base: 0,
            free: (0..ENTRIES).rev().collect(),
            available: 0,
            used: 0,
            chains: (0..ENTRIES).map(|_| None).collect(),
            posted: 0,
            last_begun: None,
        }
    }

    fn at(&self, off: u64) -> u64 {
        Ram::RINGS + u64::from(self.queue) * QUEUE_BYTES + off
    }

    fn slot(&self, head: u16, off: u64) -> u64 {
        self.at(SLOTS_AT + u64::from(head) * SLOT_BYTES + off)
    }

    fn data(&self, head: u16) -> u64 {
        Ram::DATA + u64::from(self.queue * ENTRIES + head) * DATA_BYTES
    }

    /// The ring as a front-end describes it.
    pub(super) fn setup(&self) -> RingSetup {
        RingSetup {
            size: ENTRIES,
            descriptors: self.at(0) + Ram::USER,
            available: self.at(AVAILABLE_AT) + Ram::USER,
            used: self.at(USED_AT) + Ram::USER,
            next_avail: self.base,
            event_idx: self.event_idx,
        }
    }

    /// Chains without an answer.
    pub(super) fn in_flight(&self) -> usize {
        self.chains.iter().flatten().count()
    }

    /// Chains answered so far, as an index of the ring counts them.
    pub(super) fn answered(&self) -> u16 {
        self.used
    }

    /// Another process will serve the ring.
    pub(super) fn new_process(&mut self, ram: &Ram) {
        self.base = ram.get16(self.at(USED_AT + 2));
        self.last_begun = None;
        for c in self.chains.iter_mut().flatten() {
            c.before |= c.begun > 0;
            (c.begun, c.ended) = (0, false);
        }
    }

    /// Posts a request; `None`: there is no room. `more`: further segments of a discard or of zeros.
    pub(super) fn post(
        &mut self,
        ram: &Ram,
        request: Request,
        more: &[GuestRange],
        bytes: &[u8],
        rng: &mut Rng,
    ) -> Option<u16> {
        let head = *self.free.last()?;
        let (kind, first) = match request {
            Request::Read(r) => (blk::VIRTIO_BLK_T_IN, r),
            Request::Write(r) => (blk::VIRTIO_BLK_T_OUT, r),
            Request::Flush => (blk::VIRTIO_BLK_T_FLUSH, GuestRange::EMPTY),
            Request::Discard(r) => (blk::VIRTIO_BLK_T_DISCARD, r),
            Request::WriteZeroes { range, .. } => (blk::VIRTIO_BLK_T_WRITE_ZEROES, range),
        };
        let (mut parts, mut data) = (vec![request], Vec::new());
        match request {
            Request::Read(r) => data = split(self.data(head), r.len(), true, rng),
            Request::Write(r) => {
                ram.put(self.data(head), bytes);
                data = split(self.data(head), r.len(), false, rng);
            }
            Request::Flush => {}
            Request::Discard(_) | Request::WriteZeroes { .. } => {
                parts.extend(more.iter().map(|&range| match request {
                    Request::WriteZeroes { unmap, .. } => Request::WriteZeroes { range, unmap },
                    _ => Request::Discard(range),
                }));
                let at = self.slot(head, SEGMENTS_AT);
                let segments = segments(&parts);
                ram.put(at, &segments);
                data = split(at, segments.len() as u64, false, rng);
            }
        }
        let sector = if data.is_empty() { 0 } else { first.start().0 / 512 };
        let inward = data.iter().filter(|b| b.2).map(|b| b.1).sum();
        self.announce(ram, (kind, sector), &data, rng)?;
        self.chains[usize::from(head)].as_mut()?.parts = parts;
        self.chains[usize::from(head)].as_mut()?.inward = inward;
        Some(head)
    }

    /// Asks for the serial number.
    pub(super) fn identify(&mut self, ram: &Ram, rng: &mut Rng) -> Option<u16> {
        let head = *self.free.last()?;
        let serial = split(self.slot(head, SERIAL_AT), u64::from(blk::VIRTIO_BLK_ID_BYTES), true, rng);
        self.announce(ram, (blk::VIRTIO_BLK_T_GET_ID, 0), &serial, rng)?;
        let chain = self.chains[usize::from(head)].as_mut()?;
        (chain.identifies, chain.inward) = (true, blk::VIRTIO_BLK_ID_BYTES);
        Some(head)
    }

    /// Makes a chain of one of the shapes there are, and shows it to the device.
    fn announce(
        &mut self,
        ram: &Ram,
        (kind, sector): (u32, u64),
        data: &[Buffer],
        rng: &mut Rng,
    ) -> Option<()> {
        let head = *self.free.last()?;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let (at, status) = (self.slot(head, 0), self.slot(head, STATUS_AT));
        let mut all =
            if rng.chance(10) { vec![(at, 8, false), (at + 8, 8, false)] } else { vec![(at, 16, false)] };
        all.extend_from_slice(data);
        all.push((status, 1, true));
        // so many descriptors are the ring's own; the others lie in a table, which the last of those names
        let direct = match rng.below(3) {
            0 => 0,
            1 => 1,
            _ => all.len(),
        };
        let needed = if direct == all.len() { direct } else { direct + 1 };
        if needed > self.free.len() {
            return None;
        }
        let descriptors: Vec<u16> = (0..needed).filter_map(|_| self.free.pop()).collect();
        ram.put(at, &header);
        ram.put(status, &[NO_STATUS]);
        for (i, d) in descriptors.iter().enumerate() {
            let next = descriptors.get(i + 1);
            let place = self.at(u64::from(*d) * 16);
            if i < direct {
                ram.put(place, &descriptor(all[i], next.copied()));
                continue;
            }
            let table = self.slot(head, TABLE_AT);
            let rest = &all[direct..];
            for (j, b) in (0u16..).zip(rest) {
                let next = (usize::from(j) + 1 < rest.len()).then_some(j + 1);
                ram.put(table + u64::from(j) * 16, &descriptor(*b, next));
            }
            let bytes = u32::try_from(rest.len() * 16).expect("a small table");
            let mut d = descriptor((table, bytes, false), None);
            d[12] |= INDIRECT as u8;
            ram.put(place, &d);
        }
        self.posted += 1;
        self.chains[usize::from(head)] = Some(Chain {
            number: self.posted,
            descriptors,
            parts: Vec::new(),
            inward: 0,
            begun: 0,
            ended: false,
            before: false,
            identifies: false,
        });
        ram.put(self.at(AVAILABLE_AT + 4 + 2 * u64::from(self.available % ENTRIES)), &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        ram.put(self.at(AVAILABLE_AT + 2), &self.available.to_le_bytes());
        Some(())
    }

    /// What happened at the device, in order: is that what has to happen? True: it is executed again.
    pub(super) fn check(&mut self, seen: Seen) -> Result<bool, String> {
        let head = match seen {
            Seen::Begun(head, _) | Seen::Ended(head, _) => head,
        };
        let what = |what: &str| Err(format!("queue {}: chain {head}: {what}: {seen:?}", self.queue));
        let waits = self.chains.iter().flatten().any(|c| c.before && !c.ended);
        let Some(chain) = self.chains[usize::from(head)].as_mut() else { return what("was answered before") };
        let request = match seen {
            Seen::Ended(_, outcome) => {
                chain.ended = outcome.is_err() || chain.begun == chain.parts.len();
                return Ok(false);
            }
            Seen::Begun(_, request) => request,
        };
        if chain.begun == 0 {
            if self.last_begun.is_some_and(|n| n >= chain.number) {
                return what("is begun out of order");
            }
            if !chain.before && waits {
                return what("is begun before what a former process had begun has ended");
            }
            self.last_begun = Some(chain.number);
        }
        if chain.ended {
            return what("is begun twice");
        }
        if chain.parts.get(chain.begun) != Some(&request) {
            return what("is not what was asked for");
        }
        chain.begun += 1;
        Ok(chain.before && chain.begun == 1)
    }

    /// The next answer that the device has shown.
    pub(super) fn answer(&mut self, ram: &Ram) -> Result<Option<Answer>, String> {
        if ram.get16(self.at(USED_AT + 2)) == self.used {
            return Ok(None);
        }
        let entry = ram.get(self.at(USED_AT + 4 + 8 * u64::from(self.used % ENTRIES)), 8);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes"));
        let (id, len) = (word(0), word(4));
        let head = u16::try_from(id).unwrap_or(u16::MAX);
        let wrong = |what: &str| Err(format!("queue {}: chain {id} is answered {what}", self.queue));
        let Some(chain) = self.chains.get_mut(usize::from(head)).and_then(Option::take) else {
            return wrong("and is not in flight");
        };
        self.used = self.used.wrapping_add(1);
        let status = ram.get(self.slot(head, STATUS_AT), 1)[0];
        self.free.extend(chain.descriptors.iter().rev());
        let expected = match status {
            STATUS_OK => chain.inward + 1,
            STATUS_IOERR | STATUS_UNSUPP => 1,
            other => return wrong(&format!("with status {other:#x}")),
        };
        if len != expected {
            return wrong(&format!("with {len} bytes, not {expected}"));
        }
        if chain.identifies {
            let serial = ram.get(self.slot(head, SERIAL_AT), SERIAL.len());
            if serial != SERIAL.as_bytes() {
                return wrong("with another serial number");
            }
        }
        let inward = if chain.identifies { 0 } else { chain.inward };
        let data = ram.get(self.data(head), usize::try_from(inward).expect("a small request"));
        Ok(Some(Answer { head, status, data, identified: chain.identifies }))
    }
}

fn descriptor((addr, len, writable): Buffer, next: Option<u16>) -> [u8; 16] {
    let mut d = [0; 16];
    d[..8].copy_from_slice(&addr.to_le_bytes());
    d[8..12].copy_from_slice(&len.to_le_bytes());
    let flags = if writable { WRITABLE } else { 0 } | if next.is_some() { NEXT } else { 0 };
    d[12..14].copy_from_slice(&flags.to_le_bytes());
    d[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
    d
}

/// A buffer in one to four pieces, which need not end at sectors.
fn split(at: u64, len: u64, writable: bool, rng: &mut Rng) -> Vec<Buffer> {
    let (mut pieces, mut done) = (Vec::new(), 0);
    for last in [false, false, false, true] {
        let left = len - done;
        let n = if last || rng.chance(50) { left } else { rng.below(left + 1) };
        if n > 0 {
            pieces.push((at + done, u32::try_from(n).expect("a small request"), writable));
        }
        done += n;
    }
    pieces
}

/// The segments of a discard or of zeros as they are on the wire.
fn segments(parts: &[Request]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        let (range, unmap) = match *part {
            Request::WriteZeroes { range, unmap } => (range, unmap),
            Request::Discard(range) | Request::Read(range) | Request::Write(range) => (range, false),
            Request::Flush => (GuestRange::between(GuestOffset(0), GuestOffset(0)), false),
        };
        bytes.extend_from_slice(&(range.start().0 / 512).to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(range.len() / 512).expect("a small range").to_le_bytes());
        bytes.extend_from_slice(&u32::from(unmap).to_le_bytes());
    }
    bytes
}
