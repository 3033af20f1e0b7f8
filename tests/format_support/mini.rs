//! A miniature interpreter of plans over a vector of bytes, with a disk that forgets: what was written since
//! the last sync may be there after a crash or not, sector by sector.

use super::{Layer, range_of, read};
use vdblk::error::Failure;
use vdblk::format::{Format, OpenHow, open_single};
use vdblk::map::{
    ByteSource, Change, ExtentKind, ExtentList, FileId, GuestRange, HostOffset, ImageMap, Intent, MetaKey,
    MetaOp, Miss, Plan, Settled, Step,
};

#[derive(Clone, Debug)]
enum Effect {
    Write {
        at: u64,
        bytes: Vec<u8>,
    },
    /// Durable, and the length it reaches with it.
    Through {
        at: u64,
        bytes: Vec<u8>,
    },
    SetLen(u64),
}

fn apply(file: &mut Vec<u8>, e: &Effect) {
    match e {
        Effect::Write { at, bytes } | Effect::Through { at, bytes } => {
            let (at, end) = (*at as usize, *at as usize + bytes.len());
            file.resize(file.len().max(end), 0);
            file[at..end].copy_from_slice(bytes);
        }
        Effect::SetLen(len) => file.resize(*len as usize, 0),
    }
}

/// A file on a disk that forgets what was not synced.
pub(crate) struct Medium {
    /// As every process sees it.
    pub(crate) file: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Effect>,
}

impl Medium {
    pub(crate) fn new(file: Vec<u8>) -> Self {
        Medium { durable: file.clone(), file, pending: Vec::new() }
    }

    pub(crate) fn write(&mut self, at: HostOffset, bytes: Vec<u8>) {
        self.effect(Effect::Write { at: at.0, bytes });
    }

    fn write_through(&mut self, at: HostOffset, bytes: Vec<u8>) {
        self.effect(Effect::Through { at: at.0, bytes });
    }

    pub(crate) fn set_len(&mut self, len: HostOffset) {
        self.effect(Effect::SetLen(len.0));
    }

    /// Copies inside the file; what lies behind its end reads as zeros.
    pub(crate) fn copy(&mut self, from: HostOffset, to: HostOffset, len: u64) {
        let mut bytes = self.file[from.0 as usize..self.file.len().min((from.0 + len) as usize)].to_vec();
        bytes.resize(len as usize, 0);
        self.write(to, bytes);
    }

    fn effect(&mut self, e: Effect) {
        apply(&mut self.file, &e);
        self.pending.push(e);
    }

    pub(crate) fn sync(&mut self) {
        self.durable = self.file.clone();
        self.pending.clear();
    }

    /// What the file may be after a power cut.
    pub(crate) fn crash(&self, mut keep: impl FnMut() -> bool) -> Vec<u8> {
        let mut file = self.durable.clone();
        for e in &self.pending {
            let Effect::Write { at, bytes } = e else {
                if matches!(e, Effect::Through { .. }) || keep() {
                    apply(&mut file, e);
                }
                continue;
            };
            let mut from = 0;
            while from < bytes.len() {
                let here = *at as usize + from;
                // The guest's sectors: where a layout does not keep one together, no order helps.
                let n = 512.min(bytes.len() - from);
                if keep() {
                    apply(
                        &mut file,
                        &Effect::Write { at: here as u64, bytes: bytes[from..from + n].to_vec() },
                    );
                }
                from += n;
            }
        }
        file
    }
}

/// How the world treats the interpreter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct World {
    /// The file cannot grow beyond this.
    pub(crate) capacity: u64,
    /// Extensions read as zeros.
    pub(crate) clean: bool,
    /// Steps between two barriers run in reverse.
    pub(crate) reverse: bool,
}

/// An image being served.
pub(crate) struct Mini {
    pub(crate) map: Box<dyn ImageMap>,
    pub(crate) medium: Medium,
    parent: Vec<u8>,
    pub(crate) world: World,
}

/// Why a plan ended early: the step that fails, and whether a metadata write reached the disk all the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) step: usize,
    pub(crate) but_written: bool,
}

impl Mini {
    pub(crate) fn open(file: Vec<u8>, parent: Vec<u8>, world: World) -> Self {
        let map = open_single(Format::Vdi, &file, FileId(0), OpenHow::default()).expect("a sound image");
        Mini { map, medium: Medium::new(file), parent, world }
    }

    /// Another process opens the file as this one left it, synced or not.
    pub(crate) fn open_again(&mut self) {
        self.map = open_single(Format::Vdi, &self.medium.file, FileId(0), OpenHow::default())
            .expect("a sound image");
    }

    /// The content as the guest sees it.
    pub(crate) fn content(&self) -> Vec<u8> {
        content(&*self.map, &self.medium.file, &self.parent)
    }

    /// Carries a plan out; `seen` looks at the state after every step. The guest's bytes are `data` for `part`.
    pub(crate) fn run(
        &mut self,
        plan: &Plan,
        (part, data): (GuestRange, &[u8]),
        fault: Option<Fault>,
        seen: &mut dyn FnMut(&Mini),
    ) -> Result<(), Failure> {
        plan.assert_ordered();
        let (mut submitted, mut clean, mut done) = (false, true, Ok(()));
        for (i, step) in self.in_order(plan).into_iter().enumerate() {
            let fault = fault.filter(|f| f.step == i);
            let is_entry = matches!(step, Step::Meta { op: MetaOp::Entry { .. }, .. });
            if let Some(f) = fault {
                if let (true, Step::Meta { key, op }) = (f.but_written, step) {
                    self.write_meta(key, op);
                    submitted |= is_entry;
                }
                done = Err(Failure::Os(libc::EIO));
            } else {
                done = self.step(step, part, data);
                submitted |= is_entry;
                clean &= !matches!(step, Step::Extend { .. }) || self.world.clean;
            }
            seen(self);
            if done.is_err() {
                break;
            }
        }
        if let Some(token) = plan.token {
            let how = match done {
                Ok(()) => Settled::Done { clean },
                Err(why) => Settled::Failed { why, entry_submitted: submitted },
            };
            self.map.settle(token, how);
        }
        done
    }

    fn in_order(&self, plan: &Plan) -> Vec<Step> {
        if !self.world.reverse {
            return plan.steps.to_vec();
        }
        let ends = |s: &Step| matches!(s, Step::Sync { .. } | Step::HoldSyncs { .. } | Step::Barrier);
        let mut steps = Vec::new();
        for group in plan.steps.split_inclusive(ends) {
            let (inside, last) = group.split_at(group.len() - usize::from(group.last().is_some_and(ends)));
            steps.extend(inside.iter().rev().chain(last).copied());
        }
        steps
    }

    fn composed(&self, key: MetaKey, op: MetaOp) -> (HostOffset, Vec<u8>) {
        let mut bytes = Vec::new();
        let (_, at) = self.map.compose(key, &[op], &mut bytes).expect("composed");
        (at, bytes)
    }

    fn write_meta(&mut self, key: MetaKey, op: MetaOp) {
        let (at, bytes) = self.composed(key, op);
        self.medium.write(at, bytes);
    }

    fn step(&mut self, step: Step, part: GuestRange, data: &[u8]) -> Result<(), Failure> {
        match step {
            Step::Guest { part: piece, to, .. } => {
                let at = piece.start().since(part.start()) as usize;
                let bytes = data[at..at + piece.len() as usize].to_vec();
                self.medium.write(to, bytes);
            }
            Step::Block { block, to, len, clean, .. } => {
                let bytes = self.assemble(block, len, part, data);
                let there = self.medium.file.get(to.0 as usize..to.0 as usize + len as usize);
                assert!(!clean || there.is_some_and(|b| b.iter().all(|b| *b == 0)), "not clean: {step:?}");
                self.medium.write(to, bytes);
            }
            Step::Meta { key, op } => {
                self.write_meta(key, op);
                self.map.publish(key, &[op]);
            }
            Step::Through { key, op } => {
                let (at, bytes) = self.composed(key, op);
                self.medium.write_through(at, bytes);
                self.map.publish(key, &[op]);
            }
            Step::SyncLength { to, .. } if self.world.clean => {
                self.medium.write_through(HostOffset(to.0 - 512), vec![0; 512]);
            }
            Step::SyncLength { .. } => self.medium.sync(),
            Step::Extend { from, to, .. } => self.extend(from, to)?,
            Step::Truncate { to, .. } => self.medium.set_len(to),
            Step::Punch { from, to, .. } => {
                self.medium.write(from, vec![0; usize::try_from(to.0 - from.0).expect("a small file")]);
            }
            Step::Move { from, to, len, .. } => {
                assert!(from.0 + len <= self.medium.file.len() as u64, "moves what is not there: {step:?}");
                self.medium.copy(from, to, len);
            }
            Step::Barrier | Step::HoldSyncs { .. } => {}
            Step::Sync { .. } => self.medium.sync(),
        }
        Ok(())
    }

    fn extend(&mut self, from: HostOffset, to: HostOffset) -> Result<(), Failure> {
        if to.0 > self.world.capacity {
            return Err(Failure::Os(libc::ENOSPC));
        }
        self.medium.set_len(to.max(HostOffset(self.medium.file.len() as u64)));
        if !self.world.clean {
            let bytes = vec![0xee; (to.0 - from.0) as usize];
            self.medium.write(from, bytes);
        }
        Ok(())
    }

    fn assemble(&self, block: GuestRange, len: u64, part: GuestRange, data: &[u8]) -> Vec<u8> {
        let mut bytes = self.content()[block.start().0 as usize..block.end().0 as usize].to_vec();
        let both = block.intersect(part);
        let (at, from) =
            (both.start().since(block.start()) as usize, both.start().since(part.start()) as usize);
        let n = both.len() as usize;
        bytes[at..at + n].copy_from_slice(&data[from..from + n]);
        bytes.resize(len as usize, 0);
        bytes
    }

    /// Writes one range that lies inside a unit, as the data path does it.
    pub(crate) fn write(
        &mut self,
        part: GuestRange,
        data: &[u8],
        fault: Option<Fault>,
        seen: &mut dyn FnMut(&Mini),
    ) -> Result<(), Failure> {
        let mut list = ExtentList::new();
        match self.map.map(part, Intent::Overwrite, &mut list) {
            Ok(()) => {
                let ExtentKind::Data { off, .. } = list.as_slice()[0].kind else { panic!("{list:?}") };
                assert_eq!(list.covered(), part.len());
                self.medium.write(off, data.to_vec());
                seen(self);
                return Ok(());
            }
            Err(Miss::NeedsPlan) => {}
            Err(other) => panic!("{other:?}"),
        }
        let unit = self.map.unit(part.start());
        let now = &self.content()[unit.start().0 as usize..unit.end().0 as usize];
        let change = Change::Write { part, beneath_zero: now.iter().all(|b| *b == 0) };
        loop {
            match self.map.plan(change) {
                Ok(plan) => return self.run(&plan, (part, data), fault, seen),
                Err(Miss::NeedsRoom) => {
                    let plan = self.map.room(true).expect("room is wanted and none is under way");
                    let _ = self.run(&plan, (GuestRange::EMPTY, &[]), fault, seen);
                }
                Err(Miss::Fail(f)) => return Err(f),
                Err(Miss::NeedsPlan) => panic!("a plan that needs a plan"),
                Err(Miss::NeedsPage(key)) => panic!("the table is in memory, {key:?} included"),
            }
        }
    }

    pub(crate) fn zero(
        &mut self,
        unit: GuestRange,
        fault: Option<Fault>,
        seen: &mut dyn FnMut(&Mini),
    ) -> Result<(), Failure> {
        let plan = match self.map.plan(Change::Zero { unit }) {
            Err(Miss::Fail(Failure::Unsupported)) => {
                return self.write(unit, &vec![0; unit.len() as usize], fault, seen);
            }
            plan => plan.expect("zeros need no room"),
        };
        self.run(&plan, (GuestRange::EMPTY, &[]), fault, seen)
    }
}

/// The content of an image over the bytes of a parent, as opened for reading.
pub(crate) fn content_of(file: &[u8], parent: &[u8]) -> Vec<u8> {
    let how = OpenHow { read_only: true, info_only: false };
    let map = open_single(Format::Vdi, &file, FileId(0), how).expect("a sound image");
    content(&*map, file, parent)
}

fn content(map: &dyn ImageMap, file: &[u8], parent: &[u8]) -> Vec<u8> {
    let size = map.limits().size_bytes;
    let mut all = vec![0; size as usize];
    let raw = open_single(Format::Raw, &parent, FileId(1), OpenHow::default()).expect("raw");
    let layers = [Layer { map, bytes: &file as &dyn ByteSource }, Layer { map: &*raw, bytes: &parent }];
    let used = if map.limits().is_diff { &layers[..] } else { &layers[..1] };
    read(used, range_of(0, size), &mut all);
    all
}
