//! Repairs and changes of size, and those that a power cut or a kill interrupts: they write to the image like everybody else.

use super::bytes::Bytes;
use super::images::{Images, check, compact, info_of, repair, resize, set_properties};
use super::{Rng, SimFile};
use crate::format::{FileStep, Format, Properties, Spare};
use crate::io::HostFile;
use crate::job::{Job, Step, StepsJob};
use crate::map::ImageInfo;
use std::sync::Arc;

fn as_host_files(files: &[Arc<SimFile>]) -> Vec<&dyn HostFile> {
    files.iter().map(|f| &**f as &dyn HostFile).collect()
}

/// A repaired copy, which is clean.
pub(super) fn repaired(format: Format, state: &Bytes) -> Result<Bytes, String> {
    let planned = repair(format, state).map_err(|e| format!("cannot be repaired: {e}"))?;
    let bytes = carried_out(state, planned.map(|p| p.steps).unwrap_or_default())?;
    match check(format, &bytes).map_err(|e| e.to_string())? {
        Some(report) if !report.is_clean() => Err(format!("not clean after repair: {:?}", report.findings)),
        _ => Ok(bytes),
    }
}

/// Looks at what an interrupted repair of `state` can leave: `samples` states of each moment before a sync ends, and
/// what is there between any two steps. A second repair makes each of them clean, and the guest sees what it sees after
/// a repair that nothing interrupts; where the image opens without a repair, all the time. Some of the repairs are on a
/// file system without fallocate. Returns the states looked at.
///
/// # Errors
/// The first thing that is not so.
pub fn interrupted_repairs(
    images: &Images,
    state: &Bytes,
    samples: u64,
    rng: &mut Rng,
) -> Result<u64, String> {
    let view = |b: &Bytes| images.view(b).map_err(|e| e.to_string());
    let format = images.shape.kind.format();
    let expected = view(&repaired(format, state)?)?;
    let opens = view(state).is_ok();
    let judge = |left: &Bytes| -> Result<(), String> {
        if opens && view(left)? != expected {
            return Err("the guest sees something else in the midst of a repair".into());
        }
        let again = view(&repaired(format, left)?)?;
        let differs = again.iter().zip(&expected).position(|(a, b)| a != b);
        differs.map_or(Ok(()), |at| Err(format!("after a second repair byte {at:#x} differs")))
    };
    let planned = repair(format, state).map_err(|e| e.to_string())?;
    interrupted(state, planned.map(|p| p.steps).unwrap_or_default(), samples, rng, &judge)
        .map_err(|e| format!("a repair {e}"))
}

/// Shows to `judge` what the steps on `state` can leave: `samples` states of each moment before a sync ends, and what is
/// there between any two steps. Sometimes on a file system without fallocate. Returns the states shown.
pub(super) fn interrupted(
    state: &Bytes,
    steps: Vec<FileStep>,
    samples: u64,
    rng: &mut Rng,
    judge: &dyn Fn(&Bytes) -> Result<(), String>,
) -> Result<u64, String> {
    let file = SimFile::new("mended", state.clone());
    file.keep_cuts();
    if rng.chance(40) {
        file.fail_direct_fallocate(libc::EOPNOTSUPP);
    }
    let files = file.all();
    let mut job = StepsJob::new(as_host_files(&files), steps);
    let mut states = 0;
    loop {
        let step = job.step().map_err(|e| e.to_string())?;
        for cut in file.take_cuts() {
            let mut wrong = None;
            cut.for_each_state(4, samples, rng, &mut |left| {
                states += 1;
                wrong = judge(left).err();
                wrong.is_none()
            });
            if let Some(wrong) = wrong {
                return Err(format!("whose power is cut: {wrong}"));
            }
        }
        states += 1;
        judge(&file.bytes()).map_err(|e| format!("that is killed: {e}"))?;
        if step == Step::Done {
            return Ok(states);
        }
    }
}

/// Looks at what an interrupted change of the disk's size to `size` can leave: the disk as it was, or with that size and all
/// it keeps, without damage; the change, planned again, completes, and leaves an image that a repair has nothing but leaks to
/// take from. Returns the states looked at.
///
/// # Errors
/// The first thing that is not so.
pub fn interrupted_resizes(
    images: &Images,
    state: &Bytes,
    size: u64,
    samples: u64,
    rng: &mut Rng,
) -> Result<u64, String> {
    let format = images.shape.kind.format();
    let view = |b: &Bytes| images.view(b).map_err(|e| e.to_string());
    let before = view(state)?;
    let mut after = before.clone();
    after.resize(usize::try_from(size).expect("a small disk"), 0);
    let judge = |left: &Bytes| -> Result<(), String> {
        let now = view(left)?;
        // The file's length is the size of a raw disk: there are sizes in between.
        let between = now.len() > before.len().min(after.len()) && now.len() < before.len().max(after.len());
        let raw = format == Format::Raw && between && now == after[..now.len().min(after.len())];
        if now != before && now != after && !raw {
            let kept = now.iter().zip(&before).position(|(a, b)| a != b);
            return Err(format!("a disk of {} bytes that differs from the old one at {kept:x?}", now.len()));
        }
        refuse_damage(format, left)?;
        let again = carried_out(left, resize(format, left, size).map_err(|e| e.to_string())?)?;
        refuse_damage(format, &again).map_err(|e| format!("done again, {e}"))?;
        if view(&again)? != after {
            return Err("done again, the disk is another".into());
        }
        if view(&repaired(format, &again)?)? != after {
            return Err("repaired, the disk is another".into());
        }
        Ok(())
    };
    let steps = resize(format, state, size).map_err(|e| e.to_string())?;
    interrupted(state, steps, samples, rng, &judge).map_err(|e| format!("a change of size {e}"))
}

/// Looks at what interrupted steps that take `spare` from an image can leave: always the same disk, without damage; done again they
/// complete, and leave an image that is clean. Returns the states looked at.
///
/// # Errors
/// The first thing that is not so.
pub fn interrupted_compacting(
    images: &Images,
    state: &Bytes,
    spare: &Spare,
    samples: u64,
    rng: &mut Rng,
) -> Result<u64, String> {
    let format = images.shape.kind.format();
    let view = |b: &Bytes| images.view(b).map_err(|e| e.to_string());
    let before = view(state)?;
    let steps = |b: &Bytes| compact(format, b, spare).map_err(|e| e.to_string());
    let whole = carried_out(state, steps(state)?)?;
    let judge = |left: &Bytes| -> Result<(), String> {
        if view(left)? != before {
            return Err("the disk is another".into());
        }
        refuse_damage(format, left)?;
        let again = carried_out(left, steps(left)?)?;
        let report = check(format, &again).map_err(|e| e.to_string())?.unwrap_or_default();
        if !report.is_clean() || view(&again)? != before {
            return Err(format!("done again, not as it should be: {:?}", report.findings));
        }
        if again.len() != whole.len() {
            return Err(format!("done again, the file has {} bytes, not {}", again.len(), whole.len()));
        }
        Ok(())
    };
    interrupted(state, steps(state)?, samples, rng, &judge).map_err(|e| format!("compacting {e}"))
}

/// A copy with these steps done.
pub(super) fn carried_out(state: &Bytes, steps: Vec<FileStep>) -> Result<Bytes, String> {
    let file = SimFile::new("mended", state.clone());
    let files = file.all();
    let mut job = StepsJob::new(as_host_files(&files), steps);
    while job.step().map_err(|e| e.to_string())? == Step::More {}
    Ok(file.bytes())
}

pub(super) fn refuse_damage(format: Format, state: &Bytes) -> Result<(), String> {
    match check(format, state).map_err(|e| e.to_string())? {
        Some(report) if report.corruptions > 0 => Err(format!("damaged: {:?}", report.findings)),
        _ => Ok(()),
    }
}

/// Looks at what interrupted changes of what an image says of itself can leave: always the same disk, without damage; each value the
/// old or the new one; done again they complete. Returns the states looked at.
///
/// # Errors
/// The first thing that is not so.
pub fn interrupted_properties(
    images: &Images,
    state: &Bytes,
    new: &Properties,
    samples: u64,
    rng: &mut Rng,
) -> Result<u64, String> {
    let format = images.shape.kind.format();
    let text = |e: crate::Error| e.to_string();
    let view = |b: &Bytes| images.view(b).map_err(text);
    let steps = |b: &Bytes| set_properties(format, b, new).map_err(text);
    let said = |b: &Bytes| info_of(format, b).map_err(text);
    let (before, old) = (view(state)?, said(state)?);
    let whole = said(&carried_out(state, steps(state)?)?)?;
    let judge = |left: &Bytes| -> Result<(), String> {
        if view(left)? != before {
            return Err("the disk is another".into());
        }
        refuse_damage(format, left)?;
        mixed(&said(left)?, &old, &whole)?;
        let again = carried_out(left, steps(left)?)?;
        refuse_damage(format, &again).map_err(|e| format!("done again, {e}"))?;
        mixed(&said(&again)?, &whole, &whole).map_err(|e| format!("done again, {e}"))?;
        if view(&repaired(format, &again)?)? != before {
            return Err("done again and repaired, the disk is another".into());
        }
        Ok(())
    };
    interrupted(state, steps(state)?, samples, rng, &judge).map_err(|e| format!("a change of properties {e}"))
}

/// Each value is one of two.
fn mixed(is: &ImageInfo, a: &ImageInfo, b: &ImageInfo) -> Result<(), String> {
    // A change of a VHDX's file gives it another one each time.
    let modification =
        is.format == "vhdx" || [a, b].iter().any(|o| o.modification_uuid == is.modification_uuid);
    let one_of = |f: &dyn Fn(&ImageInfo) -> bool| f(a) || f(b);
    let good = modification
        && one_of(&|o| o.uuid == is.uuid)
        && one_of(&|o| o.parent_uuid == is.parent_uuid)
        && one_of(&|o| o.parent_modification_uuid == is.parent_modification_uuid)
        && one_of(&|o| o.comment == is.comment)
        && one_of(&|o| o.geometry == is.geometry)
        && one_of(&|o| o.logical_geometry == is.logical_geometry)
        && one_of(&|o| o.parent_names == is.parent_names);
    if good { Ok(()) } else { Err(format!("says {is:?}, neither {a:?} nor {b:?}")) }
}
