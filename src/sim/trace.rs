//! What happened, in order: as text if somebody wants to read it, and as a number that two runs of a seed share.

use crate::io::IoOp;
use std::fmt::Display;
use std::sync::{Arc, Mutex};

#[derive(Debug)]
struct State {
    digest: u64,
    print: bool,
    lines: u64,
}

impl Default for State {
    fn default() -> Self {
        State { digest: 0xcbf2_9ce4_8422_2325, print: false, lines: 0 }
    }
}

/// The order of events of a simulation.
#[derive(Clone, Debug, Default)]
pub struct Trace(Arc<Mutex<State>>);

impl Trace {
    /// One that prints every event.
    pub fn printing(print: bool) -> Trace {
        Trace(Arc::new(Mutex::new(State { print, ..State::default() })))
    }

    /// An event.
    pub fn event(&self, what: impl Display) {
        let s = &mut *self.0.lock().expect("trace lock");
        let line = what.to_string();
        for b in line.bytes() {
            s.digest = (s.digest ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
        }
        s.lines += 1;
        if s.print {
            println!("{:6} {line}", s.lines);
        }
    }

    pub(super) fn io(&self, how: &str, op: &IoOp, result: Result<u64, i32>) {
        let what = format_args!(
            "  {how}{:?} file {} at {:#x} + {:#x}: {result:?}",
            op.kind, op.file.0, op.off.0, op.len
        );
        self.event(what);
    }

    /// A number for everything so far.
    pub fn digest(&self) -> u64 {
        self.0.lock().expect("trace lock").digest
    }
}
