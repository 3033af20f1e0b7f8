//! Recording what a file goes through in the format of the kernel's dm-log-writes, for the tools that replay it.
//!
//! The format knows writes, flushes and discards of a device. A file also changes its length: those changes become
//! marks (`truncate N`, `allocate N`). A flush stands where a sync has *ended*, with all that landed before it.

use super::cut::Change;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const SECTOR: usize = 512;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// A record in memory.
#[derive(Debug, Default)]
pub struct DmLog {
    entries: u64,
    /// Everything behind the first sector.
    body: Vec<u8>,
}

impl DmLog {
    fn entry(&mut self, off: u64, len: u64, flags: u64, inline: &[u8]) {
        self.entries += 1;
        let start = self.body.len();
        for word in [off / SECTOR as u64, len.div_ceil(SECTOR as u64), flags, inline.len() as u64] {
            self.body.extend_from_slice(&word.to_le_bytes());
        }
        self.body.extend_from_slice(inline);
        self.body.resize(start + SECTOR, 0);
    }

    pub(super) fn change(&mut self, change: &Change) {
        match change {
            Change::Write { off, bytes, .. } => {
                self.entry(*off, bytes.len() as u64, 0, &[]);
                self.body.extend_from_slice(bytes);
                self.body.resize(self.body.len().next_multiple_of(SECTOR), 0);
            }
            Change::Zero { off, len } => self.entry(*off, *len, DISCARD, &[]),
            Change::Allocate { size } => self.mark(&format!("allocate {size}")),
            Change::Length { size } => self.mark(&format!("truncate {size}")),
        }
    }

    pub(super) fn flush(&mut self) {
        self.entry(0, 0, FLUSH, &[]);
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
        let mut out = Vec::with_capacity(SECTOR + self.body.len());
        for word in [MAGIC, VERSION, self.entries] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&(SECTOR as u32).to_le_bytes());
        out.resize(SECTOR, 0);
        out.extend_from_slice(&self.body);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_laid_out_as_the_kernel_does() {
        let mut log = DmLog::default();
        log.change(&Change::Write { off: 1024, bytes: vec![9; 700].into(), size: None });
        log.flush();
        log.change(&Change::Zero { off: 512, len: 512 });
        log.mark("end");
        let b = log.into_bytes();
        let word = |at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
        assert_eq!((word(0), word(8), word(16), b[24..28].to_vec()), (MAGIC, 1, 4, vec![0, 2, 0, 0]));
        assert_eq!([word(512), word(520), word(528), word(536)], [2, 2, 0, 0]);
        assert_eq!(b[1024..1724], [9; 700]);
        assert_eq!([word(2048), word(2056), word(2064)], [0, 0, FLUSH]);
        assert_eq!([word(2560), word(2568), word(2576)], [1, 1, DISCARD]);
        assert_eq!((word(3088), word(3096), &b[3104..3107]), (MARK, 3, &b"end"[..]));
        assert_eq!(b.len(), 3584);
    }
}
