//! An image of a plug-in's format that is open: the plug-in answers, [`super::judge`] holds its answers against what can be.

use super::abi;
use super::calls::{Functions, Image, RawPlan};
use super::judge::{self, Ground, Purpose, Wrong};
use super::registry::InUse;
use super::text::count_of;
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::format::{CheckReport, ImageFile, OpenHow};
use crate::limits::{MAX_EXTENTS, MAX_TABLE_BYTES};
use crate::map::{
    BlockIndex, Change, Extent, ExtentList, FileId, GuestOffset, GuestRange, HostOffset, ImageInfo, ImageMap,
    Intent, Limits, MetaKey, MetaOp, Miss, Plan, PlanToken, Settled,
};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

/// Rounds of one `open`.
const MAX_ROUNDS: u32 = 4096;
/// Extensions in a row after which there is still no place.
const MAX_VAIN_ROOMS: u32 = 64;
/// Plans of one close.
const MAX_ENDS: u32 = 64;

/// What a format is, for its images.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    pub(super) variants: &'static [&'static str],
    pub(super) functions: Functions,
}

/// An image that is open.
#[derive(Debug)]
pub(super) struct PluginMap {
    // Closed before the plug-in may be unloaded.
    image: Image,
    file: FileId,
    kind: &'static Kind,
    limits: Limits,
    /// As it was when it was opened.
    info: ImageInfo,
    /// Opened for writing.
    writable: bool,
    /// Where the file ends, as far as that is certain.
    end: AtomicU64,
    /// It gave an answer that cannot be: nothing is changed any more.
    distrusted: AtomicBool,
    /// A change has failed: units may be in doubt.
    has_failed: AtomicBool,
    changes: Mutex<Changes>,
    _in_use: InUse,
}

/// What is under way.
#[derive(Debug, Default)]
struct Changes {
    /// Plans whose end is to be told, and where the file ends when they have succeeded.
    pending: HashMap<u64, u64>,
    /// Where pages of metadata are.
    pages: HashMap<MetaKey, (HostOffset, usize)>,
    /// The plan before the first change is under way.
    begin: Option<PlanToken>,
    /// It is done.
    begun: bool,
    vain_rooms: u32,
    ends: u32,
}

/// Opens an image, round by round.
///
/// # Errors
/// What the plug-in says, or [`ErrorKind::Corrupt`] for an answer that cannot be; those of reading.
fn open_rounds(image: &mut Image, file: ImageFile<'_>, how: u32) -> Result<Limits> {
    let source = file.source;
    let (mut have, mut total) = (Vec::new(), 0);
    for round in 0..MAX_ROUNDS {
        let (answer, ranges, count, disk) = image.open(round, how, source.len(), &have);
        match answer.code {
            abi::OK if !image.is_open() => return Err(judge::distrust("it opened no image")),
            abi::OK => return judge::disk(&disk).map_err(judge::distrust),
            abi::MORE => {}
            code => return Err(judge::refusal(code, &answer.why)),
        }
        total += judge::ranges(&ranges, count, source.len()).map_err(judge::distrust)?;
        if total > MAX_TABLE_BYTES {
            return Err(judge::distrust(format!("it asked for {total} bytes")));
        }
        have.clear();
        for r in ranges {
            let mut bytes = vec![0; usize::try_from(r.len).expect("bounded")];
            source.read_at(HostOffset(r.off), &mut bytes)?;
            have.push((r, bytes));
        }
    }
    Err(judge::distrust("it never has enough bytes to open the image"))
}

/// What is wrong with an image.
///
/// # Errors
/// As [`PluginMap::open`], but that of a damaged image is a report.
pub(super) fn check(kind: &'static Kind, _in_use: &InUse, file: ImageFile<'_>) -> Result<CheckReport> {
    let mut image = Image::new(&kind.functions);
    let how = abi::OPEN_CHECK | abi::OPEN_READ_ONLY;
    let limits = match open_rounds(&mut image, file, how) {
        Ok(limits) => limits,
        Err(e) if e.kind() == ErrorKind::Corrupt => return Ok(CheckReport::hopeless(&e)),
        Err(e) => return Err(e),
    };
    let (code, report) = image.check();
    if code != abi::OK {
        return Err(judge::refusal(code, &super::text::Text::default()));
    }
    judge::report(report, &limits)
}

impl PluginMap {
    /// Opens an image.
    ///
    /// # Errors
    /// As [`crate::format::open`].
    pub(super) fn open(
        kind: &'static Kind,
        in_use: InUse,
        file: ImageFile<'_>,
        how: OpenHow,
    ) -> Result<PluginMap> {
        let writes = kind.functions.has(abi::FORMAT_WRITES);
        let read_only = how.read_only || how.info_only || !writes;
        let bits = u32::from(read_only) * abi::OPEN_READ_ONLY + u32::from(how.info_only) * abi::OPEN_INFO;
        if !writes && !how.read_only && !how.info_only {
            let what = format!("{} images are only read by their plug-in", kind.name);
            return Err(Error::new(ErrorKind::Unsupported, what).hint("open it read-only"));
        }
        let mut image = Image::new(&kind.functions);
        let limits = open_rounds(&mut image, file, bits)?;
        let info = ask_info(&image, kind, &limits).map_err(judge::distrust)?;
        Ok(PluginMap {
            image,
            file: file.id,
            kind,
            limits,
            info,
            writable: !read_only,
            end: AtomicU64::new(file.source.len()),
            distrusted: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
            changes: Mutex::default(),
            _in_use: in_use,
        })
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disk(&self) -> GuestRange {
        GuestRange::between(GuestOffset(0), GuestOffset(self.limits.size_bytes))
    }

    /// A wrong answer: it is told once, and nothing is changed any more.
    fn distrust(&self, what: &Wrong) -> Failure {
        if !self.distrusted.swap(true, Ordering::AcqRel) {
            let name = self.kind.name;
            tracing::warn!(
                "the plug-in for {name} gave a wrong answer: {what}; its image takes no more changes"
            );
        }
        Failure::Corrupt
    }

    fn may_change(&self) -> std::result::Result<(), Miss> {
        if !self.writable {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        if self.distrusted.load(Ordering::Acquire) {
            return Err(Miss::Fail(Failure::Corrupt));
        }
        Ok(())
    }

    /// Asks for the extents of `r`; `take` gets one after the other until it has enough.
    fn extents(
        &self,
        r: GuestRange,
        why: Intent,
        room: usize,
        mut take: impl FnMut(Extent) -> bool,
    ) -> std::result::Result<(), Miss> {
        if r.is_empty() || !self.disk().contains(r) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        let overwrite = why == Intent::Overwrite;
        if overwrite {
            self.may_change()?;
            if self.must_write(r.start()) {
                return Err(Miss::NeedsPlan);
            }
        }
        let empty = abi::Extent {
            kind: u32::MAX,
            file: 0,
            len: 0,
            off: 0,
            codec: 0,
            packed_len: 0,
            unit_len: 0,
            into: 0,
        };
        let mut raw = [empty; MAX_EXTENTS];
        let intent = if overwrite { abi::INTENT_OVERWRITE } else { abi::INTENT_READ };
        let wrong = |what: Wrong| Miss::Fail(self.distrust(&what));
        let (code, count) = self.image.map(r.start().0, r.len(), intent, &mut raw[..room]);
        match code {
            abi::OK => {}
            abi::NEEDS_PLAN if overwrite => return Err(Miss::NeedsPlan),
            code => return Err(judge::failure(code).map_or_else(wrong, Miss::Fail)),
        }
        let count = count_of(count);
        if count == 0 || count > room {
            return Err(wrong(format!("{count} extents where there is room for {room}")));
        }
        let (mut rest, end) = (r.len(), self.end.load(Ordering::Acquire));
        for raw in &raw[..count] {
            let extent = judge::extent(raw, rest, (self.file, end), overwrite).map_err(wrong)?;
            rest -= extent.len;
            if !take(extent) {
                break;
            }
        }
        Ok(())
    }

    /// Looks at a plan and remembers what its end will mean.
    fn judged(&self, raw: &RawPlan, purpose: Purpose) -> std::result::Result<Plan, Wrong> {
        let mut changes = self.changes();
        let ground = Ground {
            purpose,
            file: self.file,
            end: self.end.load(Ordering::Acquire),
            block_bytes: self.limits.block_bytes,
        };
        let (plan, end) = judge::plan(raw, ground)?;
        if let Some(PlanToken(token)) = plan.token
            && changes.pending.insert(token, end).is_some()
        {
            return Err(format!("token {token} is that of another plan"));
        }
        if end < ground.end {
            // A cut: from now on nothing is there.
            self.end.store(end, Ordering::Release);
        }
        Ok(plan)
    }

    /// A plan that is no answer to a request. Empty where there is none, or none that can be carried out.
    fn own_plan(&self, (code, raw): (i32, RawPlan), purpose: Purpose) -> Plan {
        let judged = match code {
            abi::OK => self.judged(&raw, purpose),
            code => Err(format!("{code} instead of a plan for {purpose:?}")),
        };
        judged.unwrap_or_else(|wrong| {
            self.distrust(&wrong);
            Plan::default()
        })
    }
}

fn ask_info(image: &Image, kind: &'static Kind, limits: &Limits) -> std::result::Result<ImageInfo, Wrong> {
    match image.info() {
        (abi::OK, raw) => judge::info(&raw, kind.name, kind.variants, limits),
        (code, _) => Err(format!("{code} when it was asked about the image")),
    }
}

impl ImageMap for PluginMap {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        let mut found = None;
        self.extents(r, why, 1, |e| {
            found = Some(e);
            false
        })?;
        found.ok_or(Miss::Fail(Failure::Corrupt))
    }

    fn map(&self, r: GuestRange, why: Intent, out: &mut ExtentList) -> std::result::Result<(), Miss> {
        self.extents(r, why, MAX_EXTENTS, |e| out.push(e))
    }

    fn unit(&self, at: GuestOffset) -> GuestRange {
        let start = GuestOffset(at.0 / self.limits.block_bytes * self.limits.block_bytes);
        let end = start.0.saturating_add(self.limits.block_bytes).min(self.limits.size_bytes);
        GuestRange::between(start, GuestOffset(end.max(start.0)))
    }

    fn claim_of(&self, at: GuestOffset) -> BlockIndex {
        BlockIndex(at.0 / self.limits.block_bytes)
    }

    fn plan(&self, change: Change) -> std::result::Result<Plan, Miss> {
        self.may_change()?;
        if !self.changes().begun {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        let (kind, range, beneath_zero) = match change {
            Change::Write { part, beneath_zero } => (abi::CHANGE_WRITE, part, beneath_zero),
            Change::Zero { unit } => (abi::CHANGE_ZERO, unit, false),
        };
        let unit = self.unit(range.start());
        if range.is_empty() || !unit.contains(range) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        let purpose = match change {
            Change::Write { part, .. } => Purpose::Write { part, unit },
            Change::Zero { .. } => Purpose::Zero { unit },
        };
        let raw = abi::Change {
            struct_size: abi::size::<abi::Change>(),
            kind,
            guest_start: range.start().0,
            guest_len: range.len(),
            beneath_zero: u32::from(beneath_zero),
            reserved: 0,
        };
        let wrong = |what: Wrong| Miss::Fail(self.distrust(&what));
        let (code, raw) = self.image.plan(&raw);
        match code {
            abi::OK => {
                let plan = self.judged(&raw, purpose).map_err(wrong)?;
                self.changes().vain_rooms = 0;
                Ok(plan)
            }
            abi::NEEDS_ROOM if self.changes().vain_rooms > MAX_VAIN_ROOMS => {
                Err(wrong("it needs room again and again".into()))
            }
            abi::NEEDS_ROOM => Err(Miss::NeedsRoom),
            code => Err(judge::failure(code).map_or_else(wrong, Miss::Fail)),
        }
    }

    fn room(&self, urgent: bool) -> Option<Plan> {
        self.may_change().ok()?;
        if !self.changes().begun {
            return None;
        }
        let plan = self.own_plan(self.image.room(urgent), Purpose::Room);
        if plan.steps.is_empty() {
            return None;
        }
        self.changes().vain_rooms += u32::from(urgent);
        Some(plan)
    }

    fn settle(&self, token: PlanToken, how: Settled) {
        let Some(end) = self.changes().pending.remove(&token.0) else {
            debug_assert!(false, "{token:?} settled twice");
            return;
        };
        let told =
            abi::End { struct_size: abi::size::<abi::End>(), errno_value: 0, clean: 0, entry_submitted: 0 };
        let told = match how {
            Settled::Done { clean } => {
                self.end.fetch_max(end, Ordering::AcqRel);
                let mut changes = self.changes();
                changes.begun |= changes.begin == Some(token);
                drop(changes);
                abi::End { clean: u32::from(clean), ..told }
            }
            Settled::Failed { why, entry_submitted } => {
                self.has_failed.store(true, Ordering::Release);
                abi::End {
                    errno_value: why.errno().max(1),
                    entry_submitted: u32::from(entry_submitted),
                    ..told
                }
            }
        };
        self.image.settle(token.0, &told);
    }

    fn must_write(&self, at: GuestOffset) -> bool {
        self.writable && self.has_failed.load(Ordering::Acquire) && self.image.must_write(at.0)
    }

    fn compose(&self, key: MetaKey, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        let raw: Vec<_> = ops.iter().map(|op| judge::raw_op(*op)).collect();
        let (code, page) = self.image.compose(&judge::raw_key(key), &raw);
        let judged = match code {
            abi::OK => judge::page(page, self.end.load(Ordering::Acquire)),
            code => Err(format!("{code} instead of a page of metadata")),
        };
        let judged = judged.and_then(|(off, bytes)| {
            let place = (off, bytes.len());
            let known = *self.changes().pages.entry(key).or_insert(place);
            if known == place { Ok((off, bytes)) } else { Err(format!("{key:?} is now elsewhere")) }
        });
        match judged {
            Ok((off, bytes)) => {
                out.extend(bytes);
                Ok((self.file, off))
            }
            Err(wrong) => {
                self.distrust(&wrong);
                Err(judge::distrust(wrong))
            }
        }
    }

    fn publish(&self, key: MetaKey, ops: &[MetaOp]) {
        let raw: Vec<_> = ops.iter().map(|op| judge::raw_op(*op)).collect();
        self.image.publish(&judge::raw_key(key), &raw);
    }

    fn begin(&self, modification: Uuid) -> Plan {
        if !self.writable || self.changes().begun {
            return Plan::default();
        }
        let plan = self.own_plan(self.image.begin(modification.as_bytes()), Purpose::Begin);
        match plan.token {
            Some(token) => self.changes().begin = Some(token),
            None => self.changes().begun = true,
        }
        plan
    }

    fn end(&self) -> Plan {
        let (begun, ends) = {
            let mut changes = self.changes();
            changes.ends += 1;
            (changes.begun, changes.ends)
        };
        if !begun || self.may_change().is_err() {
            return Plan::default();
        }
        if ends > MAX_ENDS {
            self.distrust(&"it is never done with the close".into());
            return Plan::default();
        }
        self.own_plan(self.image.end(), Purpose::End)
    }

    fn info(&self) -> ImageInfo {
        ask_info(&self.image, self.kind, &self.limits).unwrap_or_else(|wrong| {
            self.distrust(&wrong);
            self.info.clone()
        })
    }
}
