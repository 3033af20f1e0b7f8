//! Where a parent's name goes that takes another one's place, for formats whose header says where the name stands.

use super::blueprint::{NewParent, refused};
use super::steps::StepList;
use crate::error::Result;
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, FileId, HostOffset};

/// A header whose first sector says where the parent's name is.
pub(super) struct NameRoom<'a> {
    pub(super) source: &'a dyn ByteSource,
    /// Where the name stands now.
    pub(super) old: Option<(u64, u64)>,
    /// Where names may stand: nothing else does.
    pub(super) room: std::ops::Range<u64>,
}

impl NameRoom<'_> {
    /// Where a name of `len` bytes goes: into the first sector, which is written whole, or beside the old name.
    fn place(&self, len: u64) -> Option<u64> {
        let (first, limit) = (self.room.start, self.room.end);
        let old = self.old.map_or((first, first), |(at, len)| (at, at.saturating_add(len)));
        let candidates = [first, old.1.max(first).next_multiple_of(8)];
        candidates.into_iter().find(|at| {
            let end = at.saturating_add(len);
            let apart = end <= old.0 || old.1 <= *at || old.0 == old.1;
            end <= limit && (end <= SECTOR_BYTES || apart)
        })
    }

    /// The steps: the name first, then the first sector, which `patch` tells where it is (0, 0: nowhere).
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`] where there is no room; those of reading.
    pub(super) fn steps(
        &self,
        name: Option<&str>,
        patch: impl FnOnce(&mut [u8], u64, u32),
    ) -> Result<StepList> {
        let mut sector = vec![0; usize::try_from(self.source.len().min(SECTOR_BYTES)).expect("a sector")];
        self.source.read_at(HostOffset(0), &mut sector)?;
        let mut list = StepList::new(FileId(0));
        let name = name.unwrap_or_default().as_bytes();
        let at = self.place(name.len() as u64).ok_or_else(|| {
            refused(format!("its header has no room for the parent's name of {} bytes", name.len()))
        })?;
        // What of it lies in the first sector is written with that.
        let inside = usize::try_from(at).ok().and_then(|at| sector.get_mut(at..)).unwrap_or_default();
        let shared = inside.len().min(name.len());
        inside[..shared].copy_from_slice(&name[..shared]);
        if shared < name.len() {
            list.write(at + shared as u64, name[shared..].to_vec());
            list.sync();
        }
        let len = u32::try_from(name.len()).expect("a short name");
        patch(&mut sector, if len == 0 { 0 } else { at }, len);
        list.write(0, sector);
        Ok(list)
    }
}

/// What the image is to call its parent, for formats that have nothing but the name.
///
/// # Errors
/// As [`super::levels::create::backing_name`].
pub(super) fn name_of(parent: Option<&NewParent>) -> Result<Option<&str>> {
    parent.map(super::levels::create::backing_name).transpose()
}
