//! The descriptor of an open image, and the values in it that change with its contents: replaced where they stand, in as
//! many bytes.

use super::super::blocks::Steps;
use super::descriptor::value_span;
use crate::limits::SECTOR_BYTES;
use crate::map::{FileId, HostOffset, MetaKey, MetaOp, Step};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// The kind of page that changes of the descriptor are.
pub(super) const TEXT: u8 = 3;
/// Digits of a content id.
const CID_DIGITS: usize = 8;

/// A value that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Cid,
    /// VMware's longer one, which ends like the short one.
    LongCid,
    Modification,
}

/// A descriptor and where it lies.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) file: FileId,
    at: HostOffset,
    bytes: Mutex<Vec<u8>>,
    values: Vec<(What, Range<usize>)>,
    /// Content ids stay.
    keeps_ids: AtomicBool,
}

/// The content id that goes with a modification UUID; never one that says there is none.
pub(super) fn cid_of(modification: Uuid) -> u32 {
    let (high, _, _, last) = modification.as_fields();
    let [.., a, b, c, d] = *last;
    match high ^ u32::from_be_bytes([a, b, c, d]) {
        0 | u32::MAX => 1,
        cid => cid,
    }
}

impl What {
    /// The new text for a value of `len` digits.
    fn value(self, modification: Uuid, old: &[u8]) -> Vec<u8> {
        let cid = format!("{:08x}", cid_of(modification));
        match self {
            What::Modification => modification.to_string().into_bytes(),
            What::Cid => cid.as_bytes()[CID_DIGITS - old.len()..].to_vec(),
            What::LongCid => [&old[..old.len() - CID_DIGITS], cid.as_bytes()].concat(),
        }
    }

    /// A value of that shape can be replaced.
    fn fits(self, old: &[u8]) -> bool {
        let hex = old.iter().all(u8::is_ascii_hexdigit);
        match self {
            // of one or two digits there are too few values
            What::Cid => hex && (4..=CID_DIGITS).contains(&old.len()),
            What::LongCid => hex && old.len() == 4 * CID_DIGITS,
            What::Modification => old.len() == 36 && Uuid::try_parse_ascii(old).is_ok(),
        }
    }
}

impl Text {
    /// The descriptor whose bytes begin there.
    pub(super) fn new(file: FileId, at: HostOffset, bytes: Vec<u8>) -> Self {
        let keys = [
            (What::Cid, "CID"),
            (What::LongCid, "ddb.longContentID"),
            (What::Modification, "ddb.uuid.modification"),
        ];
        let values = keys
            .into_iter()
            .filter_map(|(what, key)| Some((what, value_span(&bytes, key)?)))
            .filter(|(what, span)| what.fits(&bytes[span.clone()]))
            .collect();
        Text { file, at, bytes: Mutex::new(bytes), values, keeps_ids: AtomicBool::new(false) }
    }

    fn bytes(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().expect("text lock")
    }

    /// The steps that give the contents another name. One after the other: values may share a sector.
    pub(super) fn change(&self, modification: Uuid) -> Steps {
        let mut steps = Steps::new();
        let keeps_ids = self.keeps_ids.load(Ordering::Relaxed);
        for (number, (what, _)) in (0..).zip(&self.values) {
            if keeps_ids && *what != What::Modification {
                continue;
            }
            let key = MetaKey::Page { table: TEXT, number };
            steps.push(Step::Meta { key, op: MetaOp::Modification(modification) });
            steps.push(Step::Barrier);
        }
        steps
    }

    /// From here on content ids stay as they are.
    pub(super) fn keep_ids(&self) {
        self.keeps_ids.store(true, Ordering::Relaxed);
    }

    fn value(&self, number: u64) -> Option<&(What, Range<usize>)> {
        self.values.get(usize::try_from(number).ok()?)
    }

    fn apply(bytes: &mut [u8], (what, span): &(What, Range<usize>), ops: &[MetaOp]) {
        for op in ops {
            if let MetaOp::Modification(uuid) = op {
                let new = what.value(*uuid, &bytes[span.clone()]);
                bytes[span.clone()].copy_from_slice(&new);
            }
        }
    }

    /// The sectors a value is in, with `ops` over it.
    pub(super) fn compose(
        &self,
        number: u64,
        ops: &[MetaOp],
        out: &mut Vec<u8>,
    ) -> Option<(FileId, HostOffset)> {
        let value = self.value(number)?;
        let mut bytes = self.bytes().clone();
        Self::apply(&mut bytes, value, ops);
        let sector = usize::try_from(SECTOR_BYTES).expect("a small constant");
        let from = value.1.start / sector * sector;
        let to = value.1.end.next_multiple_of(sector).min(bytes.len());
        out.extend(&bytes[from..to]);
        Some((self.file, self.at.plus(from as u64)))
    }

    /// The kernel has accepted a change.
    pub(super) fn publish(&self, number: u64, ops: &[MetaOp]) {
        if let Some(value) = self.value(number) {
            Self::apply(&mut self.bytes(), value, ops);
        }
    }

    /// Content id and modification UUID as they are now.
    pub(super) fn state(&self) -> (Option<u32>, Option<Uuid>) {
        let bytes = self.bytes();
        let text = |key| value_span(&bytes, key).and_then(|r| std::str::from_utf8(&bytes[r]).ok());
        let cid = text("CID").and_then(|t| u32::from_str_radix(t, 16).ok());
        let uuid = text("ddb.uuid.modification").and_then(|t| Uuid::parse_str(t).ok());
        (cid, uuid.filter(|u| !u.is_nil()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_change_where_they_stand() {
        let text = b"# Disk DescriptorFile\nCID=e8c5348\nRW 1 ZERO\nddb.longContentID = \"97d73e460ba3554916bffd05b983cff0\"\n\
            ddb.uuid.modification=\"522a9a1c-9e30-4df6-85f6-95053f964fe4\"\n";
        let t = Text::new(FileId(3), HostOffset(512), text.to_vec());
        let uuid = Uuid::from_u128(0x1234_5678_0000_4000_8000_0000_0000_0000);
        assert_eq!(t.change(uuid).len(), 6);
        for n in 0..3 {
            let mut out = Vec::new();
            let ops = [MetaOp::Modification(uuid)];
            assert_eq!(t.compose(n, &ops, &mut out), Some((FileId(3), HostOffset(512))));
            assert_eq!(out.len(), text.len());
            t.publish(n, &ops);
            assert_eq!(*t.bytes(), out);
        }
        assert_eq!(t.state(), (Some(0x234_5678), Some(uuid)));
        let now = String::from_utf8(t.bytes().clone()).unwrap();
        assert!(now.contains("CID=2345678\n") && now.contains("97d73e460ba3554916bffd0512345678"), "{now}");
        assert_eq!(t.compose(3, &[], &mut Vec::new()), None);
    }

    #[test]
    fn odd_values_stay() {
        let text = b"CID=fffffffffff\nddb.longContentID=12\nddb.uuid.modification=\"x\"\n";
        let t = Text::new(FileId(0), HostOffset(0), text.to_vec());
        assert!(t.change(Uuid::from_u128(1)).is_empty());
        assert_eq!(cid_of(Uuid::nil()), 1);
    }
}
