//! What goes to the terminal and what comes from it: output, warnings, progress, signals.

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeSet;
use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
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

/// One of these signals has come.
pub(crate) fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// A write beyond the file size limit becomes an error, which is reported, instead of a signal that kills.
pub(crate) fn survive_file_size_limits() {
    let _ = register_signal_handler(libc::SIGXFSZ, ignored);
}

/// How progress is told, on standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ShowProgress {
    /// A bar, if it is a terminal.
    #[default]
    Auto,
    /// A JSON object a line: done and total in bytes, percent.
    Json,
    /// Not at all.
    None,
}

/// How progress is told, from here on.
static SHOWN_AS: Mutex<ShowProgress> = Mutex::new(ShowProgress::Auto);

/// Says how progress is told.
pub(crate) fn show_progress(how: ShowProgress) {
    *SHOWN_AS.lock().expect("nobody panics with it") = how;
}

/// Between two lines of JSON.
const LINES_APART: Duration = Duration::from_millis(100);

/// Tells programs of progress, a JSON object a line.
struct Lines {
    last: Option<(Instant, Progress)>,
}

impl Lines {
    fn tell(&mut self, p: Progress) {
        let is_due = |(at, told): &(Instant, Progress)| {
            *told != p && (at.elapsed() >= LINES_APART || p.done >= p.total)
        };
        if !self.last.as_ref().is_none_or(is_due) {
            return;
        }
        self.last = Some((Instant::now(), p));
        let percent = u128::from(p.done) * 100 / u128::from(p.total.max(1));
        let line = format!("{{\"done\":{},\"total\":{},\"percent\":{percent}}}", p.done, p.total);
        // Nobody may be there to read it.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

/// Runs something that takes long, and tells of its progress: by a bar if standard error is a terminal, or as was said.
///
/// # Errors
/// Its own.
pub(crate) fn watched<T>(what: impl FnOnce(&mut Watch<'_>) -> Result<T>) -> Result<T> {
    let how = *SHOWN_AS.lock().expect("nobody panics with it");
    let has_bar = how == ShowProgress::Auto && std::io::stderr().is_terminal();
    let bar = if has_bar { ProgressBar::no_length() } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{percent:>3}% {wide_bar} {bytes}/{total_bytes}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut lines = (how == ShowProgress::Json).then_some(Lines { last: None });
    let result = what(&mut Watch {
        cancelled: &|| INTERRUPTED.load(Ordering::Relaxed),
        progress: &mut |p: Progress| {
            bar.set_length(p.total);
            bar.set_position(p.done);
            if let Some(lines) = &mut lines {
                lines.tell(p);
            }
        },
    });
    bar.finish_and_clear();
    result
}
