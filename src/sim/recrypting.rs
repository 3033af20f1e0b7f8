//! Changes of keys in place, and those that a power cut or a kill interrupts: begun again over what is left, they complete, and
//! the disk shows the same.

use super::bytes::Bytes;
use super::images::{Images, check};
use super::mending::refuse_damage;
use super::merging::Stack;
use super::{Rng, SimFile};
use crate::filter::{Crypt, Filter, Filters, KeyChange, Unallocated};
use crate::io::HostFile;
use crate::job::{Job, RecryptJob, RecryptTask, Step};
use crate::vd::DiskOptions;
use std::sync::Arc;

/// Bytes changed at a time.
const PIECE: usize = 16 << 10;

/// What is left of a change: the images from the top, and the side file.
#[derive(Clone)]
struct Left {
    images: Vec<Bytes>,
    side: Bytes,
}

/// A change of the key of a chain.
struct Change<'a> {
    stack: &'a Stack,
    change: KeyChange,
    task: RecryptTask,
}

impl Change<'_> {
    /// From what is left on, to the end, showing each state that can be left to `judge`.
    fn run(
        &self,
        from: &Left,
        samples: u64,
        rng: &mut Rng,
        judge: &mut dyn FnMut(&Left) -> Result<(), String>,
    ) -> Result<Left, String> {
        let images: Vec<Images> =
            (0..from.images.len()).map(|n| self.stack.alone(n, &from.images[n])).collect();
        let side = SimFile::new("side", from.side.clone());
        images.iter().map(|i| &i.top).chain([&side]).for_each(|f| f.keep_cuts());
        let open = |i: &Images| {
            let options = DiskOptions { read_only: true, ..DiskOptions::default() };
            i.open(options, &Arc::default()).map_err(|e| e.to_string())
        };
        let disks = images.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let now = || Left { images: images.iter().map(|i| i.top.bytes()).collect(), side: side.bytes() };
        let (mut before, mut chance) = (from.clone(), Rng(rng.draw()));
        let mut looks = |rng: &mut Rng| -> Result<(), String> {
            let (mut wrong, all) = (None, now());
            // What is noted is noted before the images are written; of both sides what was not synced may be lost.
            for cut in side.take_cuts() {
                cut.for_each_state(4, samples, rng, &mut |left| {
                    wrong = judge(&Left { side: left.clone(), ..before.clone() }).err();
                    wrong.is_none()
                });
            }
            let noted = side.cut_now();
            for (n, image) in images.iter().enumerate() {
                for cut in image.top.take_cuts() {
                    cut.for_each_state(4, samples, rng, &mut |left| {
                        let mut state = all.clone();
                        state.images[n] = left.clone();
                        state.side = noted.random_state(&mut chance);
                        wrong = judge(&state).err();
                        wrong.is_none()
                    });
                }
            }
            wrong.map_or(Ok(()), |w| Err(format!("whose power is cut: {w}")))?;
            before = all.clone();
            judge(&all).map_err(|e| format!("that is killed: {e}"))
        };
        let file: &dyn HostFile = &*side;
        let job = RecryptJob::new(disks, self.change.clone(), &self.task, Some(file));
        let mut job = job.map_err(|e| e.to_string())?.in_pieces_of(PIECE);
        looks(rng)?;
        while job.step().map_err(|e| e.to_string())? == Step::More {
            looks(rng)?;
        }
        looks(rng)?;
        let last = now();
        let durable = images.iter().zip(&last.images).all(|(image, last)| {
            let mut same = true;
            image.top.cut_now().for_each_state(4, samples, rng, &mut |left| {
                same &= left.to_vec() == last.to_vec();
                same
            });
            same
        });
        if durable { Ok(last) } else { Err("that is done is not durable".into()) }
    }
}

fn behind(crypt: Option<&Arc<Crypt>>) -> Filters {
    crypt.map_or_else(Filters::default, |c| Filters::of(c.clone(), Unallocated::Zeros))
}

/// Looks at what an interrupted change of the key of a whole stack can leave: begun again, it completes, and the disk shows what
/// it did. Returns the stack with the new key, and how many states were looked at.
///
/// # Errors
/// The first thing that is not so.
pub fn interrupted_recrypt(
    stack: &Stack,
    (from, to): (Option<&Arc<Crypt>>, Option<&Arc<Crypt>>),
    samples: u64,
    rng: &mut Rng,
) -> Result<(Stack, u64), String> {
    let as_filter = |c: Option<&Arc<Crypt>>| c.map(|c| c.clone() as Arc<dyn Filter>);
    let name = |c: Option<&Arc<Crypt>>| c.map_or([0; 32], |c| [c.cipher() as u8 + 1; 32]);
    let task =
        RecryptTask { from: name(from), to: name(to), images: [7; 32], fill_holes: rng.chance(50).into() };
    let change = Change { stack, change: KeyChange { from: as_filter(from), to: as_filter(to) }, task };
    let expected = stack.view_behind(&behind(from))?;
    let new = behind(to);
    let begin = Left { images: stack.bytes(), side: Bytes::default() };
    let mut chance = Rng(rng.draw());
    let mut states = 0;
    let done = change.run(&begin, samples, rng, &mut |left| {
        states += 1;
        let again = change.run(left, 0, &mut chance, &mut |_| Ok(()))?;
        match stack.with_all(&again.images).view_behind(&new)? == expected {
            true => Ok(()),
            false => Err("begun again, the disk is another".into()),
        }
    })?;
    let after = stack.with_all(&done.images);
    for (bytes, format) in after.images() {
        refuse_damage(*format, bytes)?;
        check(*format, bytes).map_err(|e| e.to_string())?;
    }
    if after.view_behind(&new)? != expected {
        return Err("the disk is another".into());
    }
    Ok((after, states))
}
