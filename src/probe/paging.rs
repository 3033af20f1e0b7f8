//! Tables that a format keeps whole where they are small are held page by page, as if they were large, and few pages are kept.

#[cfg(any(test, feature = "sim"))]
thread_local! {
    static ALL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Images that are opened in `f`, on this thread, keep no table whole.
#[cfg(any(test, feature = "sim"))]
pub fn with_paged_tables<T>(f: impl FnOnce() -> T) -> T {
    ALL.set(true);
    let done = f();
    ALL.set(false);
    done
}

/// True in [`with_paged_tables`].
pub(crate) fn are_all_paged() -> bool {
    #[cfg(any(test, feature = "sim"))]
    return ALL.get();
    #[cfg(not(any(test, feature = "sim")))]
    false
}
