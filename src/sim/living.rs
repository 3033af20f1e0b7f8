//! A live snapshot in the midst of a workload: the power goes at every moment, the process is killed at any, and whatever the record
//! names then shows what the guest has.

use super::images::{Leaf, Living, bytes_of_new, check, open_map};
use super::play::Played;
use super::port::Port;
use super::{Faults, Images, Judge, Kind, Left, Rng, Shape, SimFile, Through, Trace, World};
use crate::io::HostFile;
use crate::live::{SnapshotSteps, snapshot_in_order};
use crate::probe::sabotage::{Sabotage, is_broken};
use crate::vd::{BlockDevice, Channel, Disk, Finish, FinishStep, NewTop, Request};
use crate::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Steps of the world after which something hangs.
const MOST_STEPS: u32 = 100_000;

/// What is played.
#[derive(Clone, Copy, Debug)]
pub struct Snapping {
    /// The seed.
    pub seed: u64,
    /// The image that is served.
    pub kind: Kind,
    /// The one that is put on top of it.
    pub above: Kind,
    /// How the guest reaches its disk.
    pub through: Through,
    /// The process is killed after so many events since the snapshot began.
    pub kill: Option<u64>,
    /// States by chance of each moment at which the power may go.
    pub samples: u64,
}

/// Plays it: a workload, a snapshot in its midst, more of it, and the end.
pub fn snapshot_under_load(how: &Snapping) -> Played {
    match play(how) {
        Ok(played) => played,
        Err(e) => Played::failed(how.seed, e.to_string()),
    }
}

fn play(how: &Snapping) -> Result<Played> {
    let mut rng = Rng(how.seed ^ 0x11fe);
    let block = 4096 << rng.below(3);
    let size = (128 << 10) + block * rng.below(4) + 512 * rng.below(8);
    let shape = Shape { kind: how.kind, size, block };
    let (mut images, past) = Images::new(shape, &mut rng);
    images.put_above(Shape { kind: how.above, size, block: 4096 << rng.below(3) });
    let setup = (how.kind.options(rng.chance(20)), Faults::default(), Trace::default());
    let mut world = World::after(&images, setup, Left::new(past), how.through, rng.draw())?;
    world.judge_with(Judge::new(2, how.samples, how.seed));
    let before = rng.below(150);
    world.steps(before);
    world.life.die_after(how.kill);
    let begun = world.life.events();
    let mut steps = Steps { helper: Some(world.job_channel(1)), world: &mut world, new: None };
    let made = snapshot_in_order(&mut steps);
    drop(steps);
    if !world.life.is_dead() {
        let made = made?;
        if let Some(e) = made.unfinished {
            world.wrong.get_or_insert(format!("the old image was not finished: {e}"));
        }
        world.steps(150);
    }
    let events = world.life.events() - begun;
    let ended =
        if world.life.is_dead() { after_kill(world, how.through, &mut rng)? } else { after_close(world)? };
    Ok(Played { events, ..ended })
}

/// Everything reads right, and both images are in order.
fn after_close(mut world: World) -> Result<Played> {
    world.life.die_after(None);
    world.sweep();
    world.look_now();
    world.close()?;
    world.look_now();
    let living = world.images.living.clone().expect("a snapshot was made");
    let (old, _) = world.images.top.bytes().apart();
    for (format, bytes) in
        [(world.images.shape.kind.format(), old), (living.shape.kind.format(), living.file.bytes())]
    {
        if let Some(report) = check(format, &bytes)?.filter(|r| r.corruptions + r.leaks > 0) {
            world.wrong.get_or_insert(format!("{format} is not in order: {:?}", report.findings));
        }
    }
    Ok(Played::of(0, &mut world))
}

/// Another process opens what the record names: it has all that was answered.
fn after_kill(mut world: World, through: Through, rng: &mut Rng) -> Result<Played> {
    world.kill();
    let mut played = Played::of(0, &mut world);
    let images = world.images.as_recorded();
    let options = world.disk.options();
    let left = world.afterwards(false);
    let setup = (options, Faults::default(), Trace::default());
    let mut next = World::after(&images, setup, left, through, rng.draw())?;
    next.look_again(false);
    next.steps(40);
    next.sweep();
    next.close()?;
    played.wrong = played.wrong.or(next.wrong.take());
    played.lives = 2;
    Ok(played)
}

fn failed(e: std::io::Error) -> Error {
    Error::io("do what never fails here", e)
}

struct Steps<'a> {
    world: &'a mut World,
    /// To the disk as it was.
    helper: Option<Channel>,
    new: Option<Arc<Disk>>,
}

impl Steps<'_> {
    /// A moment at which the process may be killed.
    fn alive(&self) -> Result<()> {
        if self.world.life.event() {
            Err(Error::new(ErrorKind::Io, "the process was killed"))
        } else {
            Ok(())
        }
    }

    fn helper(&mut self) -> &mut Channel {
        self.helper.as_mut().expect("until it finishes the old image")
    }

    /// The guest goes on until nothing of the helper's is in flight.
    fn settle(&mut self) -> Result<()> {
        let mut done = Vec::new();
        for _ in 0..MOST_STEPS {
            self.world.steps(1);
            let helper = self.helper();
            helper.flush_queue().map_err(failed)?;
            helper.poll(&mut done);
            let idle = helper.is_idle();
            self.world.look_at_cuts();
            if self.world.life.is_dead() {
                return self.alive();
            }
            if idle {
                return done.into_iter().try_for_each(|d| d.outcome.map_err(Error::from));
            }
        }
        Err(Error::new(ErrorKind::Io, "the helper hangs"))
    }

    /// These queues take nothing until they are let go; what they have taken ends.
    fn hold(&mut self, queues: std::ops::Range<usize>) -> Result<()> {
        self.world.hold(queues.clone());
        for _ in 0..MOST_STEPS {
            self.world.steps(1);
            if self.world.life.is_dead() {
                return self.alive();
            }
            if queues.clone().all(|c| self.world.is_held(c)) {
                return Ok(());
            }
        }
        Err(Error::new(ErrorKind::Io, "a queue does not come to rest"))
    }

    /// The process is dead: what each of its channels waits for another has in flight.
    fn end_dead(&mut self, mut finish: Finish) -> Result<()> {
        finish.give_up();
        for _ in 0..MOST_STEPS {
            if finish.is_idle() {
                break;
            }
            self.world.poll_all();
            // its errors are those of a dead process
            let _ = finish.step();
        }
        Err(Error::new(ErrorKind::Io, "the process was killed"))
    }

    fn living(&mut self) -> &mut Living {
        self.world.images.living.as_mut().expect("an image to come")
    }
}

impl SnapshotSteps for Steps<'_> {
    fn begin(&mut self) -> Result<()> {
        self.alive()?;
        while !self.world.disk.has_begun() {
            self.helper().begin_changes();
            self.settle()?;
        }
        Ok(())
    }

    fn intend(&mut self) -> Result<()> {
        self.alive()
    }

    fn make(&mut self) -> Result<()> {
        self.alive()?;
        let parent = self.world.disk.chain().top().map.info();
        let living = self.living();
        let (file, bytes) = (living.file.clone(), bytes_of_new(living.shape, parent));
        file.set_len(bytes.len()).map_err(failed)?;
        let mut at = 0;
        while at < bytes.len() {
            let mut piece = vec![0; usize::try_from((bytes.len() - at).min(4096)).expect("a page")];
            bytes.read(at, &mut piece);
            if piece.iter().any(|b| *b != 0) {
                file.write_at(at, &piece).map_err(failed)?;
            }
            at += 4096;
        }
        self.alive()?;
        if !is_broken(Sabotage::NewImageUnsynced) {
            file.sync().map_err(failed)?;
        }
        self.world.look_at_cuts();
        Ok(())
    }

    fn prepare(&mut self) -> Result<()> {
        self.alive()?;
        self.world.steps(5);
        let (disk, marks) = (self.world.disk.clone(), self.world.marks.clone());
        let living = self.living();
        let first = disk.free_files(1).expect("numbers are left");
        let map = open_map(&living.file.bytes(), living.shape.kind.format(), first, false)?;
        let new = disk.under(NewTop {
            map,
            files: vec![living.file.clone() as Arc<dyn HostFile>],
            locks: Vec::new(),
            on_sync_failure: Box::new(move || {
                marks.fetch_add(1, Ordering::SeqCst);
            }),
        });
        for c in 0..self.world.queues() {
            self.world.device(c).prepare(&new)?;
        }
        self.new = Some(new);
        if let Some(outcome) = self.helper().submit(0, Request::Flush, &[]) {
            outcome.map_err(Error::from)?;
        }
        self.settle()
    }

    fn record(&mut self, new: bool) -> Result<()> {
        self.alive()?;
        // the guest goes on while it is written
        self.world.steps(30);
        self.alive()?;
        // renamed, and not known to be durable: either may be there
        self.world.look_now();
        self.living().leaf = if new { Leaf::New } else { Leaf::Old };
        self.world.look_now();
        self.alive()?;
        self.world.steps(10);
        Ok(())
    }

    fn switch(&mut self) -> Result<()> {
        self.alive()?;
        let (new, queues) = (self.new.clone().expect("prepared"), self.world.queues());
        let apart = is_broken(Sabotage::SwitchedApart);
        let at_a_time = if apart { 1 } else { queues };
        let turns = (0..queues).step_by(at_a_time).map(|c| c..c + at_a_time);
        for turn in turns {
            self.hold(turn.clone())?;
            turn.clone().for_each(|c| self.world.device(c).move_to(&new));
            self.world.let_go_of(turn);
            if apart {
                self.world.steps(40);
            }
        }
        self.world.disk = new;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.alive()?;
        let mut finish = Finish::new(self.helper.take().expect("once"));
        for _ in 0..MOST_STEPS {
            self.world.steps(3);
            let step = finish.step();
            self.world.look_at_cuts();
            if self.world.life.is_dead() {
                return self.end_dead(finish);
            }
            match step? {
                FinishStep::More | FinishStep::Later => {}
                FinishStep::Fence => {
                    let queues = 0..self.world.queues();
                    if self.hold(queues.clone()).is_err() {
                        return self.end_dead(finish);
                    }
                    self.world.let_go_of(queues);
                    finish.pass();
                }
                FinishStep::Done => return Ok(()),
            }
        }
        Err(Error::new(ErrorKind::Io, "the old image is never finished"))
    }

    fn remove(&mut self) {}
}

impl Drop for Steps<'_> {
    /// Whatever the helper of a dead process had submitted ends.
    fn drop(&mut self) {
        for _ in 0..MOST_STEPS {
            let Some(helper) = self.helper.as_mut().filter(|h| !h.is_idle()) else { return };
            if helper.flush_queue().is_err() {
                return;
            }
            helper.poll(&mut Vec::new());
            self.world.poll_all();
        }
    }
}

impl World {
    fn device(&mut self, c: usize) -> &mut Channel {
        self.port(c).channel()
    }

    fn hold(&mut self, queues: std::ops::Range<usize>) {
        queues.for_each(|c| self.held[c] = true);
        self.pass_holds_on();
    }

    fn let_go_of(&mut self, queues: std::ops::Range<usize>) {
        queues.for_each(|c| self.held[c] = false);
        self.pass_holds_on();
    }

    fn pass_holds_on(&mut self) {
        for c in 0..self.queues() {
            let held = self.held[c];
            if let Port::Ring(ring) = self.port(c) {
                ring.hold(held);
            }
        }
    }

    fn is_held(&mut self, c: usize) -> bool {
        match self.port(c) {
            Port::Ring(ring) => ring.is_held(),
            Port::Direct(channel) => channel.is_idle(),
        }
    }
}

/// The files of the image to come belong to the power cuts of the one that is served.
impl Images {
    /// An image will be put above the one on top; its file is there, and empty.
    fn put_above(&mut self, shape: Shape) {
        let (top, file) = SimFile::with_above("top", self.top.bytes(), "above");
        self.top = top;
        self.living = Some(Living { shape, file, leaf: Leaf::Old });
    }

    /// The images as the record names them.
    fn as_recorded(&self) -> Images {
        let living = self.living.clone().expect("an image to come");
        match living.leaf {
            Leaf::Old => {
                let mut images = self.clone();
                images.living = None;
                images
            }
            Leaf::New => {
                let (old, below) = (self.top.bytes().apart().0, self.below_bytes());
                let all: Vec<_> = [(old, self.shape.kind.format())].into_iter().chain(below).collect();
                Images::of(living.shape, living.file.bytes(), &all)
            }
        }
    }
}
