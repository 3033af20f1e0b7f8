//! Putting a VHDX right: what its log says goes to its places, and of headers and tables of regions the good one to
//! the place of the other. What a reader sees does not change: opening shows it already.
//!
//! The log counts until all that it says is durable, and a header is written over only when the other one is good.

use super::super::FileStep;
use super::super::report::Repair;
use super::check::check;
use super::header::{Header, Ids};
use super::map::Parts;
use super::region::copies;
use super::replayed::{Filling, Patch, Replayed};
use super::unsupported;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_VHDX_LOG_BYTES, TABLE_PIECE_BYTES};
use crate::map::{ByteSource, FileId, HostOffset};
use uuid::Uuid;
use zerocopy::IntoBytes;

/// A VHDX has one file.
const FILE: FileId = FileId(0);

/// Plans the repair of an image. Nothing is written.
///
/// # Errors
/// [`ErrorKind::Corrupt`] where nothing can be found any more, [`ErrorKind::Unsupported`] for a table of blocks that is
/// wrong, each with the first reason; [`ErrorKind::Limit`]; otherwise as [`check`].
pub(super) fn repair(source: &dyn ByteSource) -> Result<Repair> {
    let report = check(source)?;
    if report.is_clean() {
        return Ok(Repair { report, ..Repair::default() });
    }
    let parts = Parts::read(source).map_err(|e| Error::new(e.kind(), format!("cannot be repaired: {e}")))?;
    if let Some(first) = report.findings.iter().find(|f| !f.repairable) {
        return Err(unsupported(format!(
            "the repair of a VHDX's block table is not supported: {}",
            first.text
        )));
    }
    let mut work = Work { lines: Vec::new(), steps: vec![FileStep::Sync { file: FILE }] };
    work.write_log(&parts, source.len())?;
    work.mend_regions(&Replayed { file: source, patches: &parts.patches })?;
    work.renew_headers(&parts);
    Ok(Repair { report, lines: work.lines, steps: work.steps })
}

struct Work {
    lines: Vec<String>,
    steps: Vec<FileStep>,
}

impl Work {
    fn sync(&mut self) {
        self.steps.push(FileStep::Sync { file: FILE });
    }

    fn write(&mut self, at: u64, bytes: Vec<u8>) {
        self.steps.push(FileStep::Write { file: FILE, at: HostOffset(at), bytes });
    }

    fn write_log(&mut self, parts: &Parts, file_bytes: u64) -> Result<()> {
        let patches = &parts.patches.0;
        if patches.is_empty() {
            return Ok(());
        }
        let bytes = patches.iter().map(Patch::len).fold(0, u64::saturating_add);
        if bytes > MAX_VHDX_LOG_BYTES {
            let what = format!("cannot be repaired: its log would write {bytes} bytes");
            return Err(Error::new(ErrorKind::Limit, what).hint("no writer's log does that"));
        }
        if let Some(p) = patches.iter().find(|p| p.at.saturating_add(p.len()) > file_bytes) {
            return Err(unsupported(format!("its log would write at byte {}, behind the file's end", p.at)));
        }
        self.lines.push(format!(
            "log: its {} sectors or ranges of zeros are written to their places",
            patches.len()
        ));
        for p in patches {
            match &p.what {
                Filling::Bytes(b) => self.write(p.at, b.to_vec()),
                Filling::Zeros(n) => self.write_zeros(p.at, *n),
            }
        }
        self.sync();
        Ok(())
    }

    fn write_zeros(&mut self, at: u64, len: u64) {
        let step = TABLE_PIECE_BYTES as u64;
        for from in (0..len).step_by(TABLE_PIECE_BYTES) {
            let piece = usize::try_from(step.min(len - from)).expect("a piece");
            self.write(at + from, vec![0; piece]);
        }
    }

    fn mend_regions(&mut self, source: &dyn ByteSource) -> Result<()> {
        if let [(first_at, first), (second_at, second)] = copies(source)?
            && first.is_some() != second.is_some()
        {
            self.lines.push("table of regions: the good copy is written over the other".into());
            let at = if first.is_some() { second_at } else { first_at };
            self.write(at, first.or(second).expect("one of them"));
            self.sync();
        }
        Ok(())
    }

    /// Both headers say that no log counts, the one that did not count first.
    fn renew_headers(&mut self, parts: &Parts) {
        self.lines.push("headers: both are written again".into());
        let headers = &parts.headers;
        let file_write = Uuid::new_v4();
        for (slot, ahead) in [(1 - headers.slot, 1), (headers.slot, 2)] {
            let ids = Ids { file_write, log: [0; 16], ..headers.current.ids() };
            self.write(Header::at(slot), headers.current.renewed(ids, ahead).as_bytes().to_vec());
            self.sync();
        }
    }
}
