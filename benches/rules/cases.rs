//! Which rule is broken under which load. Those that cost something only when something fails (O4, a place given away too
//! early, O5 for zeros) have no case: nothing fails here.

use crate::drive::MAX_JOURNALS;
use vdblk::sim::Sabotage;

/// What is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Image {
    Raw,
    /// Empty.
    Vdi,
    /// An empty diff over a base that is full.
    Diff,
}

impl Image {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Image::Raw => "raw",
            Image::Vdi => "vdi",
            Image::Diff => "diff",
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Figure {
    /// First writes a second, each to a block nobody has written; `journals`: flushed by so many (0: not flushed).
    Rate { bytes: usize, sequential: bool, journals: usize },
    /// The time from opening to the end of the first write.
    Opening,
    /// The time of a clean close, everything before it flushed.
    Closing,
}

const SEQUENTIAL: Figure = Figure::Rate { bytes: 64 << 10, sequential: true, journals: 0 };
const RANDOM: Figure = Figure::Rate { bytes: 4 << 10, sequential: false, journals: 0 };
/// Its flushes meet no sync under way.
const JOURNAL: Figure = Figure::Rate { bytes: 4 << 10, sequential: false, journals: 1 };
/// Flushes come while the sync of another runs.
const JOURNALS: Figure = Figure::Rate { bytes: 4 << 10, sequential: false, journals: MAX_JOURNALS };

impl Figure {
    pub(crate) fn name(self) -> String {
        match self {
            Figure::Rate { bytes, sequential, journals } => {
                let order = if sequential { "seq" } else { "random" };
                let flushes = ["", ", a journal", ", journals"][journals.min(2)];
                format!("{} KiB {order}{flushes}", bytes >> 10)
            }
            Figure::Opening => "open and first write".into(),
            Figure::Closing => "close".into(),
        }
    }
}

pub(crate) struct Case {
    pub(crate) rule: &'static str,
    /// `None`: all syncs are left out, as by `--cache unsafe`.
    pub(crate) broken: Option<Sabotage>,
    pub(crate) image: Image,
    pub(crate) figure: Figure,
}

impl Case {
    pub(crate) fn name(&self) -> String {
        self.broken.map_or_else(|| self.rule.to_string(), |b| format!("{} {b:?}", self.rule))
    }
}

const fn case(rule: &'static str, broken: Sabotage, image: Image, figure: Figure) -> Case {
    Case { rule, broken: Some(broken), image, figure }
}

const fn no_syncs(image: Image, figure: Figure) -> Case {
    Case { rule: "all syncs", broken: None, image, figure }
}

pub(crate) const CASES: [Case; 25] = [
    case("O1", Sabotage::NoSyncBeforeEntry, Image::Vdi, SEQUENTIAL),
    case("O1", Sabotage::NoSyncBeforeEntry, Image::Diff, SEQUENTIAL),
    case("O1", Sabotage::NoSyncBeforeEntry, Image::Diff, RANDOM),
    case("O2", Sabotage::CutBeforeSync, Image::Vdi, Figure::Opening),
    case("O2", Sabotage::CutBeforeSync, Image::Diff, Figure::Opening),
    case("O2", Sabotage::CloseWithoutSync, Image::Vdi, Figure::Closing),
    case("O2", Sabotage::CloseWithoutSync, Image::Diff, Figure::Closing),
    case("O3", Sabotage::RoomWithoutSync, Image::Vdi, SEQUENTIAL),
    case("O3", Sabotage::RoomWithoutSync, Image::Vdi, RANDOM),
    case("O3", Sabotage::RoomWithoutSync, Image::Diff, SEQUENTIAL),
    case("O3", Sabotage::CountNotWritten, Image::Vdi, SEQUENTIAL),
    case("O3", Sabotage::CountNotWritten, Image::Diff, SEQUENTIAL),
    case("O5", Sabotage::AnsweredBeforeEntry, Image::Vdi, SEQUENTIAL),
    case("O5", Sabotage::AnsweredBeforeEntry, Image::Vdi, RANDOM),
    case("O5", Sabotage::AnsweredBeforeEntry, Image::Diff, SEQUENTIAL),
    case("O5", Sabotage::AnsweredBeforeEntry, Image::Diff, RANDOM),
    case("O6", Sabotage::LateJoin, Image::Raw, JOURNALS),
    case("O6", Sabotage::LateJoin, Image::Vdi, JOURNALS),
    case("O6", Sabotage::LateJoin, Image::Diff, JOURNALS),
    case("O6", Sabotage::ForgottenWrite, Image::Raw, JOURNAL),
    case("O6", Sabotage::ForgottenWrite, Image::Vdi, JOURNAL),
    case("O6", Sabotage::ForgottenWrite, Image::Diff, JOURNAL),
    no_syncs(Image::Vdi, SEQUENTIAL),
    no_syncs(Image::Diff, SEQUENTIAL),
    no_syncs(Image::Diff, JOURNAL),
];
