//! Which engine.

use super::{IoEngine, ThreadEngine, ThreadPool, UringEngine};
use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use std::str::FromStr;

/// The engines of the operating system, as named on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum EngineKind {
    /// io_uring where it can be used, else threads.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// A pool of threads.
    Threads,
}

impl EngineKind {
    /// All of them.
    pub const ALL: [EngineKind; 3] = [EngineKind::Auto, EngineKind::IoUring, EngineKind::Threads];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::Auto => "auto",
            EngineKind::IoUring => "io_uring",
            EngineKind::Threads => "threads",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for EngineKind {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let unknown = || {
            Error::new(ErrorKind::InvalidArgument, format!("'{s}' is no I/O engine"))
                .hint("auto, io_uring or threads")
        };
        Self::ALL.into_iter().find(|k| k.name() == s).ok_or_else(unknown)
    }
}

/// An engine, and how it came to be this one.
pub struct ChosenEngine {
    /// The engine.
    pub engine: Box<dyn IoEngine>,
    /// What it is; never [`EngineKind::Auto`].
    pub kind: EngineKind,
    /// Why it is not io_uring although that was preferred: one line for the log.
    pub fallback: Option<String>,
}

impl fmt::Debug for ChosenEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = f.debug_struct("ChosenEngine");
        s.field("kind", &self.kind).field("fallback", &self.fallback).finish_non_exhaustive()
    }
}

/// Makes an engine for up to `depth` operations in flight (between 1 and [`crate::limits::MAX_ENGINE_DEPTH`]).
/// Any thread may make it; one thread has to use it.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if io_uring is asked for and cannot be used; else from the operating system.
pub fn make_engine(kind: EngineKind, depth: u32) -> Result<ChosenEngine> {
    let fallback = match kind {
        EngineKind::Threads => None,
        EngineKind::IoUring | EngineKind::Auto => match UringEngine::new(depth) {
            Ok(e) => {
                return Ok(ChosenEngine { engine: Box::new(e), kind: EngineKind::IoUring, fallback: None });
            }
            Err(e) if kind == EngineKind::IoUring => {
                return Err(e.hint("--io-engine=threads works everywhere"));
            }
            Err(e) => Some(e.to_string()),
        },
    };
    let engine = Box::new(ThreadEngine::new(&ThreadPool::shared()?, depth)?);
    Ok(ChosenEngine { engine, kind: EngineKind::Threads, fallback })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_kinds() {
        for k in EngineKind::ALL {
            assert_eq!(k.name().parse::<EngineKind>().expect("own name"), k);
            let Ok(made) = make_engine(k, 8) else {
                assert_eq!(k, EngineKind::IoUring);
                continue;
            };
            assert_ne!(made.kind, EngineKind::Auto);
            let fell_back = k == EngineKind::Auto && made.kind == EngineKind::Threads;
            assert_eq!(made.fallback.is_some(), fell_back, "{made:?}");
        }
        let e = "uring".parse::<EngineKind>().expect_err("unknown").to_string();
        assert_eq!(e, "'uring' is no I/O engine (auto, io_uring or threads)");
    }
}
