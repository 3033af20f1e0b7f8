//! What goes to the terminal and what comes from it: output, warnings, progress, signals.

use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeSet;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use vdblk::job::{Progress, Watch};
use vdblk::{Error, Result};
use vmm_sys_util::signal::register_signal_handler;

/// Prints a text to standard output. A reader that has gone away is no error: it had enough.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("write to standard output", e)),
        _ => Ok(()),
    }
}

/// Warnings of the library as lines on standard error. Its errors are not shown: each of them comes back as the one
/// line that a command ends with.
pub(crate) fn show_warnings() {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(Level::WARN)
        .with_writer(std::io::stderr)
        .event_format(WarningLine)
        .finish();
    // It can only fail if there is one already.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

struct WarningLine;

impl<S, N> FormatEvent<S, N> for WarningLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut w: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if *event.metadata().level() != Level::WARN {
            return Ok(());
        }
        let mut line = String::new();
        ctx.field_format().format_fields(Writer::new(&mut line), event)?;
        // A job may open an image several times.
        if !SHOWN.lock().is_ok_and(|mut shown| shown.insert(line.clone())) {
            return Ok(());
        }
        writeln!(w, "vdimg: warning: {line}")
    }
}

/// Warnings that were shown: each is, once.
static SHOWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Set by a signal that asks us to end.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

extern "C" fn ignored(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// From here on SIGINT, SIGTERM and SIGHUP let the job end in order instead of killing us.
pub(crate) fn end_in_order() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // If it fails the signal kills us, as it would any program.
        let _ = register_signal_handler(signal, interrupted);
    }
}

/// A write beyond the file size limit becomes an error, which is reported, instead of a signal that kills.
pub(crate) fn survive_file_size_limits() {
    let _ = register_signal_handler(libc::SIGXFSZ, ignored);
}

/// Runs something that takes long, with a progress bar if standard error is a terminal.
///
/// # Errors
/// Its own.
pub(crate) fn watched<T>(what: impl FnOnce(&mut Watch<'_>) -> Result<T>) -> Result<T> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::no_length() } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{percent:>3}% {wide_bar} {bytes}/{total_bytes}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let result = what(&mut Watch {
        cancelled: &|| INTERRUPTED.load(Ordering::Relaxed),
        progress: &mut |p: Progress| {
            bar.set_length(p.total);
            bar.set_position(p.done);
        },
    });
    bar.finish_and_clear();
    result
}
