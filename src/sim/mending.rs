//! Repairs, and repairs that a power cut or a kill interrupts: a repair writes to the image like everybody else.

use super::bytes::Bytes;
use super::images::{Images, check, repair};
use super::{Rng, SimFile};
use crate::format::Format;
use crate::io::HostFile;
use crate::job::{Job, RepairJob, Step};
use std::sync::Arc;

fn as_host_files(files: &[Arc<SimFile>]) -> Vec<&dyn HostFile> {
    files.iter().map(|f| &**f as &dyn HostFile).collect()
}

/// A repaired copy, which is clean.
pub(super) fn repaired(format: Format, state: &Bytes) -> Result<Bytes, String> {
    let file = SimFile::new("repaired", state.clone());
    let planned = repair(format, state).map_err(|e| format!("cannot be repaired: {e}"))?;
    let files = file.all();
    let mut job = RepairJob::new(as_host_files(&files), planned.map(|p| p.steps).unwrap_or_default());
    while job.step().map_err(|e| e.to_string())? == Step::More {}
    let bytes = file.bytes();
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
    let file = SimFile::new("mended", state.clone());
    file.keep_cuts();
    if rng.chance(40) {
        file.fail_direct_fallocate(libc::EOPNOTSUPP);
    }
    let planned = repair(format, state).map_err(|e| e.to_string())?;
    let files = file.all();
    let mut job = RepairJob::new(as_host_files(&files), planned.map(|p| p.steps).unwrap_or_default());
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
                return Err(format!("a repair whose power is cut: {wrong}"));
            }
        }
        states += 1;
        judge(&file.bytes()).map_err(|e| format!("a killed repair: {e}"))?;
        if step == Step::Done {
            return Ok(states);
        }
    }
}
