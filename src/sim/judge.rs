//! Is what a power cut has left what was promised?

use super::Rng;
use super::bytes::Bytes;
use super::cut::Cut;
use super::foreign::{self, Order, Program};
use super::images::{Images, check};
use super::mending::{interrupted_repairs, repaired};
use super::past::{Past, fill, value_of};
use crate::map::GuestOffset;

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Moments at which the power could have gone.
    pub cuts: u64,
    /// States of the file after that.
    pub states: u64,
    /// States that were repaired, opened and compared.
    pub repaired: u64,
    /// States that repairs of those left which were interrupted.
    pub interrupted: u64,
    /// States to which other programs wrote.
    pub foreign: u64,
}

impl Stats {
    /// The sum.
    pub fn add(&mut self, other: Stats) {
        self.cuts += other.cuts;
        self.states += other.states;
        self.repaired += other.repaired;
        self.interrupted += other.interrupted;
        self.foreign += other.foreign;
    }
}

/// Looks at the states that a power cut can leave.
#[derive(Debug)]
pub struct Judge {
    /// All states of a cut with up to this many parts are looked at.
    pub exhaustive: u32,
    /// States by chance of each cut with more.
    pub samples: u64,
    /// Every so many states the image is also repaired and written to by others.
    pub deep_every: u64,
    /// No more states than these.
    pub most_states: u64,
    /// What was looked at so far.
    pub stats: Stats,
    /// The first broken promise.
    pub violation: Option<String>,
    rng: Rng,
}

impl Judge {
    /// A judge who takes `samples` of what is too much to be looked at whole.
    pub fn new(exhaustive: u32, samples: u64, seed: u64) -> Judge {
        let rng = Rng(seed ^ 0x6a75_6467);
        Judge {
            exhaustive,
            samples,
            deep_every: 8,
            most_states: u64::MAX,
            stats: Stats::default(),
            violation: None,
            rng,
        }
    }

    /// Nothing more is to be looked at.
    pub fn is_done(&self) -> bool {
        self.violation.is_some() || self.stats.states >= self.most_states
    }

    /// Looks at what may be left of `images` after `cut`, if everything answered before `flushed` is durable.
    pub fn cut(&mut self, images: &Images, cut: &Cut, past: &[Past], flushed: u64) {
        if self.is_done() {
            return;
        }
        self.stats.cuts += 1;
        let allowed: Vec<_> = past.iter().map(|p| p.after_cut(flushed)).collect();
        let mut rng = self.rng.clone();
        cut.for_each_state(self.exhaustive, self.samples, &mut rng, &mut |state| {
            if let Err(what) = self.state(images, state, &allowed) {
                self.violation = Some(what);
            }
            !self.is_done()
        });
        self.rng.draw();
    }

    /// One state.
    fn state(&mut self, images: &Images, state: &Bytes, allowed: &[Vec<u64>]) -> Result<(), String> {
        self.stats.states += 1;
        let seen = images.view(state).map_err(|e| format!("does not open: {e}"))?;
        compare(&seen, allowed)?;
        if images.living.is_some() {
            return Ok(()); // looked at where they are opened
        }
        let format = images.shape.kind.format();
        let Some(report) = check(format, state).map_err(|e| e.to_string())? else { return Ok(()) };
        if report.corruptions > 0 {
            return Err(format!("opens, and is corrupt: {:?}", report.findings));
        }
        if self.stats.states.is_multiple_of(self.deep_every) && format.can_be_repaired() {
            let repaired = self.repair(images, state)?;
            if images.view(&repaired).map_err(|e| e.to_string())? != seen {
                return Err("a repair changed what the guest sees".into());
            }
            // the models of other programs know images of one file
            if let Some(program) = foreign::program(format).filter(|_| state.further().is_empty()) {
                self.foreign(program, images, state, &seen)?;
            }
        }
        Ok(())
    }

    fn repair(&mut self, images: &Images, state: &Bytes) -> Result<Bytes, String> {
        self.stats.repaired += 1;
        if self.rng.chance(5) {
            self.stats.interrupted += interrupted_repairs(images, state, 4, &mut self.rng.clone())?;
        }
        repaired(images.shape.kind.format(), state)
    }

    /// Two blocks of other programs change nothing but themselves.
    fn foreign(
        &mut self,
        program: Program,
        images: &Images,
        state: &Bytes,
        seen: &[u8],
    ) -> Result<(), String> {
        self.stats.foreign += 1;
        let block_bytes = (program.block_bytes)(state);
        let order = if self.stats.foreign.is_multiple_of(2) { Order::DataFirst } else { Order::EntryFirst };
        let (mut b, mut expected) = (state.clone(), seen.to_vec());
        for block in (program.free_blocks)(state).into_iter().take(2) {
            let size = usize::try_from(block_bytes).expect("a small block");
            let mut data = vec![0; size];
            fill(&mut data, u64::from(block) * block_bytes / 512, 0xf0e1);
            let from = usize::try_from(u64::from(block) * block_bytes).expect("a small disk");
            let own = from..(from + size).min(expected.len());
            expected[own.clone()].copy_from_slice(&data[..own.len()]);
            images.filters.on_write(GuestOffset(u64::from(block) * block_bytes), &mut data);
            let mut wrong = None;
            (program.append)(&mut b, block, &data, order, &mut |b| {
                // On the way the new block may be anything.
                let Ok(view) = images.view(b) else { return wrong = Some("unreadable".to_string()) };
                if view[..own.start] != expected[..own.start] || view[own.end..] != expected[own.end..] {
                    wrong = Some("another block has changed".to_string());
                }
            });
            let view = images.view(&b).map_err(|e| format!("after another program wrote: {e}"))?;
            let full = (program.free_blocks)(&b).contains(&block);
            if !full && view != expected {
                wrong.get_or_insert("what it wrote is not there".into());
            }
            if let Some(wrong) = wrong {
                return Err(format!("another program added block {block} ({order:?}): {wrong}"));
            }
            if full {
                break;
            }
        }
        Ok(())
    }
}

/// Every sector holds a value it may hold, and no other sector's bytes.
fn compare(view: &[u8], allowed: &[Vec<u64>]) -> Result<(), String> {
    for ((sector, got), allowed) in (0..).zip(view.chunks(512)).zip(allowed) {
        match value_of(sector, got) {
            None => {
                return Err(format!("sector {sector} holds what nobody wrote there: {:x?}", &got[..16]));
            }
            Some(value) if !allowed.contains(&value) => {
                return Err(format!("sector {sector} holds {value}; it may hold {allowed:?}"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}
