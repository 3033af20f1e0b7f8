//! When a simulated process dies: between any two operations of it, and between the stores to shared memory that say so
//! ([`crate::probe::moment`]).
//!
//! Nothing is unwound. From the moment of death on its engines move no byte and the file takes no change; what the program
//! still does to memory that outlives it, until it returns to the simulator, is undone by [`Life::bury`].

use super::SimFile;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// The life of one process.
#[derive(Debug)]
pub struct Life {
    dead: AtomicBool,
    /// Events so far.
    events: AtomicU64,
    /// The event before which it dies.
    last: AtomicU64,
    files: Vec<Arc<SimFile>>,
    /// What outlives it, and its bytes at the moment of death.
    shared: Mutex<Vec<(File, Vec<u8>)>>,
}

impl Life {
    /// Of a process that writes these files.
    pub(super) fn new(files: Vec<Arc<SimFile>>) -> Arc<Life> {
        Arc::new(Life {
            dead: AtomicBool::new(false),
            events: AtomicU64::new(0),
            last: AtomicU64::new(u64::MAX),
            files,
            shared: Mutex::default(),
        })
    }

    /// This file's bytes outlive the process.
    pub(super) fn share(&self, file: File) {
        self.shared.lock().expect("life lock").push((file, Vec::new()));
    }

    /// It has died.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Operations, and other moments at which it could have died, so far.
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::SeqCst)
    }

    /// After so many more events it dies; `None`: only if it is told to.
    pub fn die_after(&self, events: Option<u64>) {
        let last = events.map_or(u64::MAX, |n| self.events() + n);
        self.last.store(last, Ordering::SeqCst);
    }

    /// Something is about to happen; true: it will not, for the process is dead.
    pub(super) fn event(&self) -> bool {
        if !self.is_dead() && self.events.fetch_add(1, Ordering::SeqCst) >= self.last.load(Ordering::SeqCst) {
            self.die();
        }
        self.is_dead()
    }

    pub(super) fn die(&self) {
        if self.dead.swap(true, Ordering::SeqCst) {
            return;
        }
        self.files.iter().for_each(|f| f.freeze());
        for (file, bytes) in self.shared.lock().expect("life lock").iter_mut() {
            let len = file.metadata().expect("its length").len();
            bytes.resize(usize::try_from(len).expect("a small file"), 0);
            file.read_exact_at(bytes, 0).expect("a file in memory");
        }
    }

    /// What outlives it is as it was when it died.
    pub(super) fn bury(&self) {
        for (file, bytes) in self.shared.lock().expect("life lock").drain(..) {
            file.write_all_at(&bytes, 0).expect("a file in memory");
        }
    }
}
