//! Merges of chains, and those that a power cut or a kill interrupts: whatever is left, the top shows the same, and the same merge,
//! begun again, completes.

use super::bytes::Bytes;
use super::file::SimFile;
use super::images::{Images, check, engine_for, info_of, relink};
use super::mending::{carried_out, interrupted, refuse_damage, repaired};
use super::past::Past;
use super::{Faults, Kind, Rng, Shape, Trace, World};
use crate::filter::Filters;
use crate::format::{Format, NewParent};
use crate::job::{CopyJob, Job, Selection, Step};
use crate::map::ImageInfo;
use crate::vd::{Channel, Disk, DiskOptions};
use std::sync::Arc;

/// A chain of images of one file each, the top first.
#[derive(Clone, Debug)]
pub struct Stack {
    pub(super) size: u64,
    /// Kinds of the images.
    pub(super) kinds: Vec<Kind>,
    pub(super) images: Vec<(Bytes, Format)>,
}

impl Stack {
    /// Images of these kinds, the base first, written to by chance.
    pub fn new(kinds: &[Kind], rng: &mut Rng) -> Stack {
        let size = 512 * (1 + rng.below(192));
        let mut past = vec![Past::known(0); usize::try_from(size / 512).expect("a small disk")];
        let mut stack = Stack { size, kinds: Vec::new(), images: Vec::new() };
        for (uuid, kind) in (500..).zip(kinds) {
            let shape = Shape { kind: *kind, size, block: 4096 << rng.below(3) };
            let images = Images::over(shape, uuid, &stack.images);
            let setup = (kind.options(false), Faults::default(), Trace::default());
            let mut w = World::new(&images, setup, past, rng.draw()).expect("a new image");
            w.steps(30);
            w.close().expect("nothing fails");
            past = w.past.iter().map(|p| Past::known(p.may[0])).collect();
            stack.kinds.insert(0, *kind);
            stack.images.insert(0, (images.top.bytes(), kind.format()));
        }
        stack
    }

    /// The part from an image downwards, with other bytes for that.
    pub(super) fn part(&self, top: usize, bytes: &Bytes) -> Images {
        let shape = Shape { kind: self.kinds[top], size: self.size, block: 4096 };
        Images::of(shape, bytes.clone(), &self.images[top + 1..])
    }

    /// What the top shows.
    pub(super) fn view(&self) -> Result<Vec<u8>, String> {
        self.part(0, &self.images[0].0).view(&self.images[0].0).map_err(|e| e.to_string())
    }

    /// The same with other bytes for one of them.
    pub(super) fn with(&self, n: usize, bytes: &Bytes) -> Stack {
        let mut other = self.clone();
        other.images[n].0 = bytes.clone();
        other
    }

    /// What the top shows behind filters.
    ///
    /// # Errors
    /// What the format says of it.
    pub fn view_behind(&self, filters: &Filters) -> Result<Vec<u8>, String> {
        let mut images = self.part(0, &self.images[0].0);
        images.filters = filters.clone();
        images.view(&self.images[0].0).map_err(|e| e.to_string())
    }

    /// One of the images by itself, with these bytes.
    pub(super) fn alone(&self, n: usize, bytes: &Bytes) -> Images {
        Images::of(Shape { kind: self.kinds[n], size: self.size, block: 4096 }, bytes.clone(), &[])
    }

    /// The images, the top first.
    pub(super) fn images(&self) -> &[(Bytes, Format)] {
        &self.images
    }

    /// Their bytes.
    pub(super) fn bytes(&self) -> Vec<Bytes> {
        self.images.iter().map(|(b, _)| b.clone()).collect()
    }

    /// The same images with other bytes.
    pub(super) fn with_all(&self, bytes: &[Bytes]) -> Stack {
        let mut other = self.clone();
        other.images.iter_mut().zip(bytes).for_each(|(image, b)| image.0 = b.clone());
        other
    }

    fn channel(&self, images: &Images, options: DiskOptions, rng: &mut Rng) -> Result<Channel, String> {
        channel(images, options, CopyJob::slots(), rng)
    }
}

/// A channel of a job over images.
pub(super) fn channel(
    images: &Images,
    options: DiskOptions,
    slots: u16,
    rng: &mut Rng,
) -> Result<Channel, String> {
    let disk: Arc<Disk> = images.open(options, &Arc::default()).map_err(|e| e.to_string())?;
    disk.chain().top().map.keep_content_id();
    let engine = engine_for(images, &Faults::default(), &Trace::default(), rng);
    Channel::new(disk, Box::new(engine), slots).map_err(|e| e.to_string())
}

/// A merge of an image into another, counted from the top.
#[derive(Clone, Copy, Debug)]
struct Span {
    from: usize,
    into: usize,
}

impl Span {
    fn is_down(self) -> bool {
        self.from < self.into
    }

    /// The chain without what is not needed any more.
    fn without_spent(self, stack: &Stack) -> Stack {
        let spent = if self.is_down() { self.from..self.into } else { self.into + 1..self.from + 1 };
        let mut other = stack.clone();
        other.images.drain(spent.clone());
        other.kinds.drain(spent);
        other
    }

    /// Which image gets which parent.
    fn link(self, stack: &Stack) -> Option<(usize, Option<usize>)> {
        if self.is_down() {
            return self.from.checked_sub(1).map(|child| (child, Some(self.into)));
        }
        Some((self.into, Some(self.from + 1).filter(|p| *p < stack.images.len())))
    }

    /// Copies, showing every state the target can be left in to `judge`. The target afterwards.
    fn copy(
        self,
        stack: &Stack,
        samples: u64,
        rng: &mut Rng,
        judge: &mut dyn FnMut(&Bytes) -> Result<(), String>,
    ) -> Result<Bytes, String> {
        let (first, selection) = Selection::of_merge(self.from, self.into, stack.images.len());
        let source = stack.part(first, &stack.images[first].0);
        let target = stack.part(self.into, &stack.images[self.into].0);
        target.top.keep_cuts();
        let read_only = DiskOptions { read_only: true, ..DiskOptions::default() };
        let written = DiskOptions { write_same: !self.is_down(), ..DiskOptions::default() };
        let from = stack.channel(&source, read_only, rng)?;
        let into = stack.channel(&target, written, rng)?;
        let mut job = CopyJob::of(from, into, selection).map_err(|e| e.to_string())?;
        copied(&mut job, CopyJob::close_target, &target.top, samples, rng, judge)
    }
}

/// Runs a job that writes to `target` to its end, and shows every state that a cut or a kill can leave there to `judge`. What is there
/// afterwards, durable.
pub(super) fn copied<J: Job>(
    job: &mut J,
    close: impl FnOnce(&mut J) -> crate::Result<()>,
    target: &SimFile,
    samples: u64,
    rng: &mut Rng,
    judge: &mut dyn FnMut(&Bytes) -> Result<(), String>,
) -> Result<Bytes, String> {
    let mut looks = |rng: &mut Rng| -> Result<(), String> {
        for cut in target.take_cuts() {
            let mut wrong = None;
            cut.for_each_state(4, samples, rng, &mut |left| {
                wrong = judge(left).err();
                wrong.is_none()
            });
            wrong.map_or(Ok(()), |w| Err(format!("whose power is cut: {w}")))?;
        }
        judge(&target.bytes()).map_err(|e| format!("that is killed: {e}"))
    };
    while job.step().map_err(|e| e.to_string())? == Step::More {
        looks(rng)?;
    }
    close(job).map_err(|e| e.to_string())?;
    looks(rng)?;
    // Nothing of it can be lost any more.
    let (last, mut same) = (target.bytes(), true);
    target.cut_now().for_each_state(4, samples, rng, &mut |left| {
        same &= left.to_vec() == last.to_vec();
        same
    });
    if same { Ok(last) } else { Err("that is done is not durable".into()) }
}

/// Looks at what an interrupted merge of a stack's image into another (counted from the top) can leave: always the same disk, without
/// damage; done again it completes, and the image whose parent changes names the old or the new one. Returns the states looked at.
///
/// # Errors
/// The first thing that is not so.
pub fn interrupted_merge(
    stack: &Stack,
    (from, into): (usize, usize),
    samples: u64,
    rng: &mut Rng,
) -> Result<u64, String> {
    let span = Span { from, into };
    let expected = stack.view()?;
    let format = stack.images[into].1;
    let mut chance = Rng(rng.draw());
    let mut states = 0;
    let done = span.copy(stack, samples, rng, &mut |left| {
        states += 1;
        refuse_damage(format, left)?;
        let now = stack.with(into, left);
        if now.view()? != expected {
            return Err("the disk is another".into());
        }
        if !chance.chance(10) {
            return Ok(());
        }
        let again = span.copy(&now, 0, &mut chance.clone(), &mut |_| Ok(()))?;
        // Where nothing was left to write, what was reserved stays so until a repair.
        refuse_damage(format, &again)?;
        finished(&stack.with(into, &again), span, &expected).map_err(|e| format!("done again, {e}"))
    })?;
    let stack = stack.with(into, &done);
    match check(format, &done).map_err(|e| e.to_string())? {
        Some(report) if !report.is_clean() => return Err(format!("not clean: {:?}", report.findings)),
        _ => finished(&stack, span, &expected)?,
    }
    match span.link(&stack) {
        None => Ok(states),
        Some(link) => Ok(states + interrupted_relink(&stack, span, link, &expected, samples, rng)?),
    }
}

/// What is needed shows the same.
fn finished(stack: &Stack, span: Span, expected: &[u8]) -> Result<(), String> {
    if stack.view()? != expected || span.without_spent(stack).view()? != expected {
        return Err("without the images that went into another the disk is another".into());
    }
    Ok(())
}

/// What an image says of its parent, as far as it is found by that.
pub(super) fn named(info: &ImageInfo) -> (Option<uuid::Uuid>, Vec<String>, Option<u32>) {
    (info.parent_uuid, info.parent_names.clone(), info.parent_content_id)
}

fn interrupted_relink(
    stack: &Stack,
    span: Span,
    (child, parent): (usize, Option<usize>),
    expected: &[u8],
    samples: u64,
    rng: &mut Rng,
) -> Result<u64, String> {
    let (state, format) = &stack.images[child];
    let text = |e: crate::Error| e.to_string();
    let new = match parent {
        Some(p) => {
            let info = info_of(stack.images[p].1, &stack.images[p].0).map_err(text)?;
            let length = usize::try_from(rng.below(120)).expect("small");
            Some(NewParent { info, path: Some(format!("{}new-parent", "x".repeat(length))) })
        }
        None => None,
    };
    let steps = |b: &Bytes| relink(*format, b, new.as_ref()).map_err(text);
    let of = |b: &Bytes| info_of(*format, b).map(|i| (named(&i), i)).map_err(text);
    let (old, _) = of(state)?;
    let (whole, _) = of(&carried_out(state, steps(state)?)?)?;
    let linked = *format != Format::Parallels;
    if linked && parent.is_none() && !(whole.0.is_none() && whole.1.is_empty()) {
        return Err(format!("still names a parent: {whole:?}"));
    }
    let judge = |left: &Bytes| -> Result<(), String> {
        refuse_damage(*format, left)?;
        let (now, _) = of(left)?;
        // A UUID by chance where the parent has none is another one each time.
        let known = new.as_ref().is_none_or(|p| p.info.uuid.is_some());
        if now != old && now != whole && known {
            return Err(format!("names {now:?}, neither {old:?} nor {whole:?}"));
        }
        let stack = stack.with(child, left);
        if stack.view()? != expected || span.without_spent(&stack).view()? != expected {
            return Err("the disk is another".into());
        }
        let again = carried_out(left, steps(left)?)?;
        if of(&again)?.0 != whole && known {
            return Err("done again, the parent is another".into());
        }
        // A place it had for a while may be left behind the file's end.
        refuse_damage(*format, &again)?;
        let again = if check(*format, &again).map_err(text)?.is_some_and(|r| !r.is_clean()) {
            repaired(*format, &again)?
        } else {
            again
        };
        if span.without_spent(&stack.with(child, &again)).view()? != expected {
            return Err("done again, the disk is another".into());
        }
        Ok(())
    };
    interrupted(state, steps(state)?, samples, rng, &judge).map_err(|e| format!("a change of parent {e}"))
}
