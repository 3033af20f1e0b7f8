//! The part of a world that is behind rings: its guest posts chains, its workers take them.

use super::{Under, World};
use crate::error::Failure;
use crate::probe::moment::listen;
use crate::sim::Rng;
use crate::sim::driver::{Driver, Seen};
use crate::sim::port::Port;
use crate::sim::ram::ENTRIES;
use crate::sim::ram::Ram;
use crate::virtio::{STATUS_OK, STATUS_UNSUPP};
use std::sync::Arc;

/// A guest that goes on while the process that serves it is another one.
#[derive(Debug)]
pub struct Guest {
    pub(super) ram: Ram,
    pub(super) drivers: Vec<Driver>,
    pub(super) under: Vec<Vec<Option<Under>>>,
}

impl Guest {
    /// A guest with one to three queues, in which nothing is in flight.
    pub(super) fn new(rng: &mut Rng) -> Guest {
        let queues = 1 + u16::try_from(rng.below(3)).expect("few");
        let drivers = (0..queues).map(|q| Driver::new(q, rng.chance(50))).collect();
        let under = (0..queues).map(|_| (0..ENTRIES).map(|_| None).collect()).collect();
        Guest { ram: Ram::new(queues).expect("memory for a guest"), drivers, under }
    }
}

impl World {
    /// The rings are there already; their workers begin where the last ones ended.
    pub(super) fn take_guest_up(&mut self) {
        let Some((ram, drivers)) = &mut self.rings else { return };
        for file in ram.files().expect("descriptors for files in memory") {
            self.life.share(file);
        }
        drivers.iter_mut().for_each(|d| d.new_process(ram));
        self.start_rings();
    }

    pub(super) fn start_rings(&mut self) {
        let Some((ram, drivers)) = &self.rings else { return };
        for ((queue, port), driver) in (0..).zip(&mut self.ports).zip(drivers) {
            if let Port::Ring(r) = port
                && let Err(e) = r.start(queue, driver, ram)
            {
                self.wrong.get_or_insert(e);
            }
        }
    }

    /// The guest asks for the disk's serial number.
    pub(super) fn identify(&mut self, c: usize) {
        if let Some((ram, drivers)) = &mut self.rings
            && drivers[c].identify(ram, &mut self.rng).is_some()
        {
            self.posted += 1;
        }
    }

    pub(super) fn step_worker(&mut self, c: usize) {
        let (Port::Ring(port), Some((_, drivers))) = (&mut self.ports[c], &mut self.rings) else { return };
        let life = self.life.clone();
        listen(Some(Arc::new(move || {
            life.event();
        })));
        let seen = port.step(&mut drivers[c]);
        listen(None);
        self.look_at_cuts();
        if let Err(wrong) = seen.and_then(|seen| self.check_worker(c, &seen)) {
            self.wrong.get_or_insert(wrong);
        }
        if !self.life.is_dead() {
            self.hear(c);
        }
    }

    /// Did the worker do what the chains in the ring ask for?
    fn check_worker(&mut self, c: usize, seen: &[Seen]) -> Result<(), String> {
        let Some((_, drivers)) = &mut self.rings else { return Ok(()) };
        for s in seen {
            self.trace.event(format_args!("{c} {s:?}"));
            self.repeated += u64::from(drivers[c].check(*s)?);
        }
        Ok(())
    }

    /// The guest looks into its used ring.
    pub(super) fn hear(&mut self, c: usize) {
        loop {
            let Some((ram, drivers)) = &mut self.rings else { return };
            let answer = match drivers[c].answer(ram) {
                Ok(None) => return,
                Ok(Some(answer)) => answer,
                Err(wrong) => {
                    self.wrong.get_or_insert(wrong);
                    return;
                }
            };
            let outcome = match answer.status {
                STATUS_OK => Ok(()),
                STATUS_UNSUPP => Err(Failure::Unsupported),
                _ => Err(Failure::Os(libc::EIO)),
            };
            if answer.identified {
                self.trace.event(format_args!("{c}.{} identified: {outcome:?}", answer.head));
            } else {
                self.ended(c, answer.head, outcome, &answer.data);
            }
        }
    }

    /// A front-end stops a ring in the midst of things, or starts it again.
    pub(super) fn stop_or_start(&mut self, c: usize) {
        let (Port::Ring(port), Some((ram, drivers))) = (&mut self.ports[c], &self.rings) else { return };
        if !port.rests() {
            self.stops += 1;
            self.trace.event(format_args!("{c} is stopped"));
            return port.stop();
        }
        let driver = &drivers[c];
        self.trace.event(format_args!("{c} goes on at {}", driver.base));
        if driver.base != driver.answered() {
            let what = format!("queue {c} stopped at {}, {} were answered", driver.base, driver.answered());
            self.wrong.get_or_insert(what);
        }
        if let Err(e) = port.start(u16::try_from(c).expect("few"), driver, ram) {
            self.wrong.get_or_insert(e);
        }
    }

    /// As a front-end does before it lets its back-end go.
    pub(super) fn stop_rings(&mut self) {
        for c in 0..self.ports.len() {
            for _ in 0..10_000 {
                match &mut self.ports[c] {
                    Port::Ring(port) if !port.rests() && !self.life.is_dead() => port.stop(),
                    _ => break,
                }
                self.poll(c);
            }
        }
    }
}
