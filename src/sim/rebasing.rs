//! Changes of parents that a power cut or a kill interrupts: the image shows the same over whichever parent it names, and the change,
//! begun again, completes.

use super::bytes::Bytes;
use super::images::{Images, check, info_of, relink};
use super::mending::{carried_out, interrupted, refuse_damage};
use super::merging::{Stack, channel, named};
use super::{Rng, Shape};
use crate::format::{Format, NewParent};
use crate::job::{DiffJob, Job, Step};
use crate::vd::DiskOptions;

/// The uppermost image of a stack, and what it stands on before and afterwards.
struct Change<'a> {
    stack: &'a Stack,
    below: &'a [(Bytes, Format)],
}

impl Change<'_> {
    /// The image over its new parent.
    fn over(&self, top: &Bytes) -> Images {
        let shape = Shape { kind: self.stack.kinds[0], size: self.stack.size, block: 4096 };
        Images::of(shape, top.clone(), self.below)
    }

    /// Copies, showing every state the image can be left in to `judge`. The image afterwards.
    fn copy(
        &self,
        top: &Bytes,
        samples: u64,
        rng: &mut Rng,
        judge: &mut dyn FnMut(&Bytes) -> Result<(), String>,
    ) -> Result<Bytes, String> {
        let (now, then, target) = (self.stack.part(0, top), self.over(top), self.stack.part(0, top));
        target.top.keep_cuts();
        let read_only = DiskOptions { read_only: true, ..DiskOptions::default() };
        let written = DiskOptions { write_same: true, ..DiskOptions::default() };
        let slots = DiffJob::slots();
        let (a, b) = (channel(&now, read_only, slots, rng)?, channel(&then, read_only, slots, rng)?);
        let into = channel(&target, written, slots, rng)?;
        let mut job = DiffJob::writing(a, b, into).map_err(|e| e.to_string())?;
        let mut looks = |rng: &mut Rng| -> Result<(), String> {
            for cut in target.top.take_cuts() {
                let mut wrong = None;
                cut.for_each_state(4, samples, rng, &mut |left| {
                    wrong = judge(left).err();
                    wrong.is_none()
                });
                wrong.map_or(Ok(()), |w| Err(format!("whose power is cut: {w}")))?;
            }
            judge(&target.top.bytes()).map_err(|e| format!("that is killed: {e}"))
        };
        while job.step().map_err(|e| e.to_string())? == Step::More {
            looks(rng)?;
        }
        job.close_target().map_err(|e| e.to_string())?;
        looks(rng)?;
        // Nothing of it can be lost any more.
        let (last, mut same) = (target.top.bytes(), true);
        target.top.cut_now().for_each_state(4, samples, rng, &mut |left| {
            same &= left.to_vec() == last.to_vec();
            same
        });
        if same { Ok(last) } else { Err("that is done is not durable".into()) }
    }
}

/// Looks at what an interrupted change of the parent of a stack's uppermost image to another stack's, or to none, can leave: always the
/// same disk, without damage; done again it completes, and over the new parent the image shows the same. Returns the states looked at.
///
/// # Errors
/// The first thing that is not so.
pub fn interrupted_rebase(
    stack: &Stack,
    onto: Option<&Stack>,
    samples: u64,
    rng: &mut Rng,
) -> Result<u64, String> {
    let change = Change { stack, below: onto.map_or(&[], |o| &o.images) };
    let (top, format) = &stack.images[0];
    let text = |e: crate::Error| e.to_string();
    let expected = stack.view()?;
    let shows = |top: &Bytes| -> Result<(), String> {
        let view = change.over(top).view(top).map_err(text)?;
        if view == expected { Ok(()) } else { Err("over the new parent the disk is another".into()) }
    };
    let mut chance = Rng(rng.draw());
    let mut states = 0;
    let done = change.copy(top, samples, rng, &mut |left| {
        states += 1;
        refuse_damage(*format, left)?;
        if stack.with(0, left).view()? != expected {
            return Err("the disk is another".into());
        }
        if !chance.chance(10) {
            return Ok(());
        }
        let again = change.copy(left, 0, &mut chance.clone(), &mut |_| Ok(()))?;
        refuse_damage(*format, &again)?;
        shows(&again).map_err(|e| format!("done again, {e}"))
    })?;
    match check(*format, &done).map_err(text)? {
        Some(report) if !report.is_clean() => return Err(format!("not clean: {:?}", report.findings)),
        _ => shows(&done)?,
    }
    let new = onto.map(|o| info_of(o.images[0].1, &o.images[0].0)).transpose().map_err(text)?;
    // What has no UUID is called by one that stays the same here.
    let own = uuid::Uuid::from_u128(u128::from(rng.draw()) + 1);
    let new = new.map(|mut info| {
        info.uuid = info.uuid.or(Some(own));
        NewParent { info, path: Some("another-parent".into()) }
    });
    let steps = |b: &Bytes| relink(*format, b, new.as_ref()).map_err(text);
    let name = |b: &Bytes| info_of(*format, b).map(|i| named(&i)).map_err(text);
    let (old, whole) = (name(&done)?, name(&carried_out(&done, steps(&done)?)?)?);
    let judge = |left: &Bytes| -> Result<(), String> {
        refuse_damage(*format, left)?;
        let now = name(left)?;
        if now != old && now != whole {
            return Err(format!("names {now:?}, neither {old:?} nor {whole:?}"));
        }
        if stack.with(0, left).view()? != expected {
            return Err("over the old parent the disk is another".into());
        }
        shows(left)?;
        let again = carried_out(left, steps(left)?)?;
        if name(&again)? != whole {
            return Err("done again, the parent is another".into());
        }
        shows(&again)
    };
    let more = interrupted(&done, steps(&done)?, samples, rng, &judge)
        .map_err(|e| format!("a change of parent {e}"))?;
    Ok(states + more)
}
