//! In which order a live change happens. Whoever carries it out, the program or the simulator, does it by this.

use crate::error::{Error, Result};
use crate::probe::sabotage::{Sabotage, is_broken};

/// What a live snapshot consists of.
pub(crate) trait SnapshotSteps {
    /// The top image says that its contents are about to differ, so that nothing the new one will remember of it changes any more.
    fn begin(&mut self) -> Result<()>;

    /// The record says that the new image is being made: who finds it after a crash, and the disk served from the old one, may remove
    /// it, for nothing was ever written to it. Durable when this returns.
    fn intend(&mut self) -> Result<()>;

    /// The new image is made, empty, and durable, its name too.
    fn make(&mut self) -> Result<()>;

    /// It is opened and locked, and every queue ready for it. What the guest has written so far is flushed, that the pause be short.
    fn prepare(&mut self) -> Result<()>;

    /// The record says that this disk is served from the new image (`true`), or from the old one again; durable when this returns.
    fn record(&mut self, new: bool) -> Result<()>;

    /// The pause: what is in flight ends, and all queues go on with the new image on top.
    fn switch(&mut self) -> Result<()>;

    /// The old top image is left as a clean close does, while it is read.
    fn finish(&mut self) -> Result<()>;

    /// The new image is removed, which nothing names.
    fn remove(&mut self);
}

/// How a snapshot went that was made.
#[derive(Debug)]
pub(crate) struct Made {
    /// Why the old top image could not be left as a clean close does.
    pub(crate) unfinished: Option<Error>,
}

/// Makes a snapshot. Whenever power or process end, the record names an image that shows what the guest has: the new one is empty, over
/// the old one, until the pause is over, and by then it is recorded.
///
/// # Errors
/// Of whatever fails before the pause is over: the disk goes on as before, and the new image is gone, unless the record may name it.
pub(crate) fn snapshot(steps: &mut dyn SnapshotSteps) -> Result<Made> {
    steps.begin()?;
    if let Err(e) = until_switched(steps) {
        return Err(take_back(steps, e));
    }
    if is_broken(Sabotage::RecordedAfterSwitch) {
        steps.record(true)?;
    }
    Ok(Made { unfinished: steps.finish().err() })
}

fn until_switched(steps: &mut dyn SnapshotSteps) -> Result<()> {
    steps.intend()?;
    steps.make()?;
    steps.prepare()?;
    if !is_broken(Sabotage::RecordedAfterSwitch) {
        steps.record(true)?;
    }
    steps.switch()
}

/// The old image is recorded again, and only if that is durable the new one may go: what a record may name has to be there.
fn take_back(steps: &mut dyn SnapshotSteps, why: Error) -> Error {
    match steps.record(false) {
        Ok(()) => {
            steps.remove();
            why
        }
        Err(e) => why.hint(format!("the new image is left, for the record may name it: {e}")),
    }
}
