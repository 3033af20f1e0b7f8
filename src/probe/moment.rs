//! Moments between two stores to memory that outlives the process, at which a simulated one may be killed. Only tests and
//! the simulator listen to them; everywhere else [`moment`] is nothing.

#[cfg(any(test, feature = "sim"))]
mod listener {
    use std::cell::RefCell;
    use std::sync::Arc;

    /// Is told of every moment on its thread.
    pub type Listener = Arc<dyn Fn()>;

    thread_local! {
        static LISTENER: RefCell<Option<Listener>> = const { RefCell::new(None) };
    }

    /// Who is told of the moments on this thread from now on.
    pub fn listen(listener: Option<Listener>) {
        LISTENER.set(listener);
    }

    /// The process may be killed here.
    pub fn moment() {
        let listener = LISTENER.with_borrow(Clone::clone);
        if let Some(tell) = listener {
            tell();
        }
    }
}

#[cfg(any(test, feature = "sim"))]
pub use listener::{Listener, listen, moment};

/// Nobody listens.
#[cfg(not(any(test, feature = "sim")))]
#[inline(always)]
pub const fn moment() {}
