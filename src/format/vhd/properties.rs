//! What a VHD says of itself: UUID and geometry in its footers, the parent's UUID in the first sector of the header.

use super::super::steps::StepList;
use super::super::{FileStep, Properties, Property};
use super::check::examine;
use super::footer::{FOOTER_BYTES, Footer, Footers};
use super::header::Header;
use super::repair::Work;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{ByteSource, FileId};
use zerocopy::IntoBytes;

pub(super) const KEEPS: &[Property] = &[Property::Uuid, Property::ParentUuid, Property::Geometry];

/// # Errors
/// As [`super::super::set_properties`].
pub(super) fn set(source: &dyn ByteSource, new: &Properties) -> Result<Vec<FileStep>> {
    let found = examine(source)?;
    found.report.refuse_damage()?;
    let Some(image) = found.image else {
        new.refuse_parent_unless(false)?;
        return fixed(source, new);
    };
    new.refuse_parent_unless(image.footers.best.is_diff())?;
    let mut work = Work::new(image);
    work.mend_copy();
    if let Some(parent) = new.parent_uuid {
        let at = work.image.footers.best.header_at();
        let mut header = Header::read(source, at)?;
        header.set_parent(parent);
        work.write(at, header.as_bytes()[..SECTOR_BYTES as usize].to_vec());
        work.sync();
    }
    if new.uuid.is_some() || new.geometry.is_some() {
        work.lengthen();
        change(&mut work.image.footers.best, new)?;
        // The one that decides first: the other is written behind the last block.
        work.write(0, work.footer());
        work.sync();
        work.end_file();
    }
    Ok(work.steps)
}

/// The only footer of a fixed image is a sector.
fn fixed(source: &dyn ByteSource, new: &Properties) -> Result<Vec<FileStep>> {
    let mut footer = Footers::read(source)?.best;
    change(&mut footer, new)?;
    let at = source.len() - FOOTER_BYTES;
    if !at.is_multiple_of(SECTOR_BYTES) {
        let what = "its footer lies across sectors, and could be lost while it is written";
        return Err(Error::new(ErrorKind::Unsupported, what).hint("vdimg convert it"));
    }
    let mut list = StepList::new(FileId(0));
    list.write(at, footer.as_bytes().to_vec());
    Ok(list.done())
}

fn change(footer: &mut Footer, new: &Properties) -> Result<()> {
    if let Some(chs) = new.geometry {
        footer.set_geometry(chs)?;
    }
    if let Some(id) = new.uuid {
        footer.set_id(id);
    }
    Ok(())
}
