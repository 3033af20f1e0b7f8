//! Recording what a file goes through in the format of the kernel's dm-log-writes, for the tools that replay it.
//!
//! The format knows writes, flushes and discards of a device, in whole sectors. So a record begins with everything the file
//! held, an edge of a sector brings the sector along, and what a truncation cuts off is discarded: replayed onto an empty
//! file, cut to the length the last mark tells, the record gives the file back byte for byte. Changes of the length are
//! marks (`truncate N`, `allocate N`). A flush stands where a sync has *ended*, with all that landed before it, and a mark
//! behind it tells what every process sees then: `sync K: N bytes, crc32 X`.

use super::bytes::Bytes;
use super::cut::Change;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const SECTOR: u64 = 512;
const SECTOR_BYTES: usize = SECTOR as usize;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// A record in memory.
#[derive(Debug, Default)]
pub struct DmLog {
    entries: u64,
    syncs: u64,
    /// Everything behind the first sector.
    body: Vec<u8>,
}

impl DmLog {
    /// A record that begins with all of a file.
    pub fn of(file: &Bytes) -> DmLog {
        let mut log = DmLog::default();
        log.replaced(&Bytes::default(), file, "begin");
        log
    }

    fn entry(&mut self, off: u64, len: u64, flags: u64, inline: &[u8]) {
        self.entries += 1;
        let start = self.body.len();
        for word in [off / SECTOR, len.div_ceil(SECTOR), flags, inline.len() as u64] {
            self.body.extend_from_slice(&word.to_le_bytes());
        }
        self.body.extend_from_slice(inline);
        self.body.resize(start + SECTOR_BYTES, 0);
    }

    /// All sectors that a range touches, as they are now.
    fn write(&mut self, off: u64, len: u64, now: &Bytes) {
        let (start, end) = (off / SECTOR * SECTOR, (off + len).next_multiple_of(SECTOR));
        if start == end {
            return;
        }
        self.entry(start, end - start, 0, &[]);
        let mut sectors = vec![0; usize::try_from(end - start).expect("fits memory")];
        now.read(start, &mut sectors);
        self.body.extend_from_slice(&sectors);
    }

    /// A range that reads as zeros now: a discard, and a write where it begins or ends inside a sector.
    fn zeroed(&mut self, off: u64, len: u64, now: &Bytes) {
        let end = off + len;
        let (start, stop) = (off.next_multiple_of(SECTOR), end / SECTOR * SECTOR);
        if start > stop {
            return self.write(off, len, now);
        }
        self.write(off, start - off, now);
        if start < stop {
            self.entry(start, stop - start, DISCARD, &[]);
        }
        self.write(stop, end - stop, now);
    }

    /// A change of a file that had `before` bytes; `now` is what has come of it.
    pub(super) fn change(&mut self, change: &Change, before: u64, now: &Bytes) {
        match change {
            Change::Write { off, bytes, .. } | Change::Through { off, bytes } => {
                self.write(*off, bytes.len() as u64, now);
            }
            Change::Zero { off, len } => self.zeroed(*off, *len, now),
            Change::Allocate { size } => self.mark(&format!("allocate {size}")),
            Change::Length { size } => {
                self.zeroed(*size, before.saturating_sub(*size), now);
                self.mark(&format!("truncate {size}"));
            }
        }
    }

    /// The file is another one now: after a power cut, or a failed sync that has dropped pages.
    pub(super) fn replaced(&mut self, before: &Bytes, now: &Bytes, why: &str) {
        self.mark(why);
        const STEP: usize = 4096;
        let (mut old, mut new) = ([0; STEP], [0; STEP]);
        for off in (0..before.len().max(now.len())).step_by(STEP) {
            old.fill(0);
            new.fill(0);
            before.read(off, &mut old);
            now.read(off, &mut new);
            if old != new {
                self.write(off, STEP as u64, now);
            }
        }
    }

    /// A sync has ended.
    pub(super) fn flush(&mut self, now: &Bytes) {
        self.entry(0, 0, FLUSH, &[]);
        self.syncs += 1;
        self.mark_contents(&format!("sync {}", self.syncs), now);
    }

    /// A mark that tells what the file holds.
    pub(super) fn mark_contents(&mut self, name: &str, now: &Bytes) {
        self.mark(&format!("{name}: {} bytes, crc32 {:08x}", now.len(), crc32(&now.to_vec())));
    }

    /// A mark with a text of at most 400 bytes.
    pub fn mark(&mut self, text: &str) {
        self.entry(0, 0, MARK, &text.as_bytes()[..text.len().min(400)]);
    }

    /// Entries so far.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// The bytes of the log device.
    pub fn into_bytes(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SECTOR_BYTES + self.body.len());
        for word in [MAGIC, VERSION, self.entries] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&(SECTOR_BYTES as u32).to_le_bytes());
        out.resize(SECTOR_BYTES, 0);
        out.extend_from_slice(&self.body);
        out
    }
}

/// The checksum of zip and PNG.
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < table.len() {
            let (mut word, mut bit) = (i as u32, 0);
            while bit < 8 {
                word = if word & 1 == 1 { word >> 1 ^ 0xedb8_8320 } else { word >> 1 };
                bit += 1;
            }
            table[i] = word;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, b| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ b)])
}

#[cfg(test)]
mod tests {
    use super::super::cut::apply_whole;
    use super::super::{Play, Rng, play};
    use super::*;

    #[test]
    fn is_laid_out_as_the_kernel_does() {
        let mut log = DmLog::default();
        let mut file = Bytes::of(&[7; 1000]);
        let write = Change::Write { off: 1024, bytes: vec![9; 700].into(), size: None };
        apply_whole(&mut file, &write);
        log.change(&write, 1000, &file);
        log.flush(&file);
        log.change(&Change::Zero { off: 512, len: 512 }, 1724, &file);
        log.mark("end");
        let b = log.into_bytes();
        let word = |at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
        assert_eq!((word(0), word(8), word(16), b[24..28].to_vec()), (MAGIC, 1, 5, vec![0, 2, 0, 0]));
        assert_eq!([word(512), word(520), word(528), word(536)], [2, 2, 0, 0]);
        assert_eq!((&b[1024..1724], &b[1724..2048]), (&[9; 700][..], &[0; 324][..]));
        assert_eq!([word(2048), word(2056), word(2064)], [0, 0, FLUSH]);
        let told = format!("sync 1: 1724 bytes, crc32 {:08x}", crc32(&file.to_vec()));
        assert_eq!((word(2576), &b[2592..2592 + told.len()]), (MARK, told.as_bytes()));
        assert_eq!([word(3072), word(3080), word(3088)], [1, 1, DISCARD]);
        assert_eq!((word(3600), word(3608), &b[3616..3619]), (MARK, 3, &b"end"[..]));
        assert_eq!(b.len(), 4096);
    }

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!((crc32(b""), crc32(b"123456789")), (0, 0xcbf4_3926));
    }

    /// What a tool makes of a record, and how many marks told the truth about it.
    fn replay(log: &[u8]) -> (Vec<u8>, usize) {
        let (mut device, mut at, mut held) = (Vec::new(), SECTOR_BYTES, 0);
        while at < log.len() {
            let word = |n: usize| u64::from_le_bytes(log[at + 8 * n..][..8].try_into().unwrap());
            let (off, len) = ((word(0) * SECTOR) as usize, (word(1) * SECTOR) as usize);
            let (flags, inline) = (word(2), &log[at + 32..][..word(3) as usize]);
            at += SECTOR_BYTES;
            device.resize(device.len().max(off + len), 0);
            if flags == DISCARD {
                device[off..off + len].fill(0);
            } else {
                device[off..off + len].copy_from_slice(&log[at..at + len]);
                at += len;
            }
            let text = std::str::from_utf8(inline).unwrap();
            if let Some((bytes, crc)) =
                text.split_once(": ").and_then(|(_, t)| t.split_once(" bytes, crc32 "))
            {
                device.resize(bytes.parse().unwrap(), 0);
                assert_eq!(format!("{:08x}", crc32(&device)), crc, "{text}");
                held += 1;
            }
        }
        (device, held)
    }

    #[test]
    fn replayed_it_gives_the_file_at_every_mark() {
        for seed in 1..=4 {
            let played = play(&Play { record: true, requests: 300, ..Play::seed(seed) });
            assert_eq!(played.wrong, None);
            let log = played.record.expect("a record").into_bytes();
            let (_, held) = replay(&log);
            assert!(held > 10, "seed {seed}: only {held} marks");
        }
    }

    #[test]
    fn edges_inside_sectors_keep_their_neighbours() {
        let rng = &mut Rng(5);
        let mut file = Bytes::of(&[3; 5000]);
        let mut log = DmLog::of(&file);
        for _ in 0..500 {
            let (off, len) = (rng.below(6000), 1 + rng.below(1500));
            let change = match rng.below(5) {
                0 => Change::Length { size: off },
                1 => Change::Zero { off, len },
                2 => Change::Allocate { size: off },
                _ => {
                    Change::Write { off, bytes: vec![rng.below(256) as u8; len as usize].into(), size: None }
                }
            };
            let before = file.len();
            apply_whole(&mut file, &change);
            log.change(&change, before, &file);
            log.flush(&file);
        }
        let (device, held) = replay(&log.into_bytes());
        assert_eq!((device == file.to_vec(), held), (true, 500));
    }
}
