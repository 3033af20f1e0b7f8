//! A VMDK that is open: its extents in a row, and the pages of metadata they are made of.

use super::super::blocks::Steps;
use super::header::UNCLEAN_AT;
use super::layout::Entry;
use super::sesparse::{self, SeSparse};
use super::sparse::{COPY, DIRECTORY, DIRECTORY_COPY, MAIN, MARK, NEW_TABLE, Sparse, of_key};
use super::table::ENTRY_BYTES;
use super::text::{TEXT, Text};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::{META_PAGE_BYTES, SECTOR_BYTES};
use crate::map::{
    BlockIndex, Change, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset, ImageInfo, ImageMap,
    Intent, Limits, MetaKey, MetaOp, Miss, PagePlace, Plan, PlanToken, Settled, Step,
};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use uuid::Uuid;

/// Tokens are an extent's in the upper bits and its own numbers below.
const TOKEN_SHIFT: u32 = 48;
/// The extent in the token of [`ImageMap::begin`].
const ALL_EXTENTS: u64 = 0xffff;

/// How an extent's bytes are kept.
#[derive(Debug)]
pub(super) enum Body {
    Zero,
    Flat { file: FileId, off: HostOffset },
    Sparse(Box<Sparse>),
    SeSparse(Box<SeSparse>),
}

/// A part of the disk.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) range: GuestRange,
    /// The number of its first unit among those of the disk.
    pub(super) first_unit: u64,
    pub(super) writable: bool,
    /// Zeros that take writes and forget them: what a raw disk hides.
    pub(super) ignores: bool,
    pub(super) body: Body,
}

/// A VMDK that is open.
#[derive(Debug)]
pub struct VmdkMap {
    pub(super) parts: Box<[Part]>,
    pub(super) read_only: bool,
    pub(super) text: Text,
    pub(super) info: Mutex<ImageInfo>,
    pub(super) session: Mutex<Session>,
    /// The part that was last given a place.
    pub(super) active: AtomicU32,
}

/// What has become of [`ImageMap::begin`].
#[derive(Debug, Default)]
pub(super) struct Session {
    begun: bool,
    /// Tokens of the extents' own parts of the plan under way.
    tokens: Vec<(usize, PlanToken)>,
}

impl Part {
    fn sparse(&self) -> Option<&Sparse> {
        match &self.body {
            Body::Sparse(s) => Some(s),
            Body::Zero | Body::Flat { .. } | Body::SeSparse(_) => None,
        }
    }

    /// What the start of `r` is, as far as it goes in this part.
    fn extent_at(&self, r: GuestRange) -> std::result::Result<Extent, Miss> {
        let r = r.intersect(self.range);
        Ok(match &self.body {
            Body::Zero => Extent { len: r.len(), kind: ExtentKind::Zero },
            Body::Flat { file, off } => {
                let off = off.plus(r.start().since(self.range.start()));
                Extent { len: r.len(), kind: ExtentKind::Data { file: *file, off } }
            }
            Body::SeSparse(s) => {
                let grain = s.grain_at(r.start());
                let unit = s.unit_of(grain);
                let kind = match s.entry(grain)? {
                    Entry::Free => ExtentKind::Parent,
                    Entry::Zero => ExtentKind::Zero,
                    Entry::At(at) => {
                        ExtentKind::Data { file: s.file(), off: at.plus(r.start().since(unit.start())) }
                    }
                };
                Extent { len: unit.intersect(r).len(), kind }
            }
            Body::Sparse(s) => {
                let grain = s.grain_at(r.start());
                let unit = s.unit_of(grain);
                let len = unit.intersect(r).len();
                let kind = match s.entry(grain)? {
                    Entry::Free => ExtentKind::Parent,
                    Entry::Zero => ExtentKind::Zero,
                    Entry::At(at) if s.layout.header.is_compressed() => {
                        let into = r.start().since(unit.start());
                        let into = u32::try_from(into).expect("inside a unit");
                        ExtentKind::Packed { packed: s.packed(grain, at), into }
                    }
                    Entry::At(at) => {
                        ExtentKind::Data { file: s.file, off: at.plus(r.start().since(unit.start())) }
                    }
                };
                Extent { len, kind }
            }
        })
    }

    fn must_write(&self, at: GuestOffset) -> bool {
        self.sparse().is_some_and(|s| s.writer.as_ref().is_some_and(|w| w.blocks.doubts(s.grain_at(at))))
    }
}

impl VmdkMap {
    fn size(&self) -> u64 {
        self.parts.last().map_or(0, |p| p.range.end().0)
    }

    /// The part around `at`, and its number.
    fn part_at(&self, at: GuestOffset) -> Option<(usize, &Part)> {
        let i = self.parts.partition_point(|p| p.range.end() <= at);
        self.parts.get(i).map(|p| (i, p))
    }

    fn sparse_parts(&self) -> impl Iterator<Item = (usize, &Sparse)> {
        self.parts.iter().enumerate().filter_map(|(i, p)| p.sparse().map(|s| (i, s)))
    }

    fn sparse(&self, part: usize) -> Option<&Sparse> {
        self.parts.get(part).and_then(Part::sparse)
    }

    /// A plan of one part as one of the disk.
    fn tokened(part: usize, plan: Plan) -> Plan {
        let token = plan.token.map(|t| PlanToken((part as u64) << TOKEN_SHIFT | t.0));
        Plan { token, ..plan }
    }

    fn room_of(&self, part: usize, urgent: bool) -> Option<Plan> {
        let s = self.sparse(part)?;
        let plan = s.writer.as_ref()?.blocks.room(s, urgent)?;
        Some(Self::tokened(part, plan))
    }

    fn apply_entries(s: &Sparse, page: u64, base: usize, ops: &[MetaOp], out: &mut [u8]) {
        for op in ops {
            let MetaOp::Entry { index, value, .. } = *op else {
                debug_assert!(false, "not an entry: {op:?}");
                continue;
            };
            let (of, at) = s.table.place(index);
            let value = u32::try_from(value).expect("entries have 32 bits");
            if of == page {
                out[base + at * 4..base + at * 4 + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    fn compose_entries(
        &self,
        table: u8,
        number: u64,
        ops: &[MetaOp],
        out: &mut Vec<u8>,
    ) -> Option<(FileId, HostOffset)> {
        let (part, page) = of_key(number);
        let s = self.sparse(part)?;
        let directory = if table == MAIN { s.directory() } else { s.redundant()? };
        let at = s.layout.entry_at(directory, s.table.first_of(page))?;
        let base = out.len();
        if !s.table.copy_page(page, out) {
            return None;
        }
        Self::apply_entries(s, page, base, ops, out);
        Some((s.file, at))
    }

    /// A page of a directory with all tables in it.
    fn compose_directory(&self, table: u8, number: u64, out: &mut Vec<u8>) -> Option<(FileId, HostOffset)> {
        let (part, page) = of_key(number);
        let s = self.sparse(part)?;
        let new = s.new_tables.as_ref()?;
        let (all, at) = match table {
            DIRECTORY => (&new.directory, s.layout.header.directory_at),
            _ => (new.redundant.as_ref()?, s.layout.header.redundant_at?),
        };
        let into = page * META_PAGE_BYTES;
        let entries = usize::try_from(META_PAGE_BYTES / ENTRY_BYTES).expect("a small constant");
        let words = all.chunks(entries).nth(usize::try_from(page).ok()?)?;
        let base = out.len();
        out.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        // whole sectors: the directory has them to itself
        out.resize(base + (out.len() - base).next_multiple_of(SECTOR_BYTES as usize), 0);
        Some((s.file, at.plus(into)))
    }

    /// A page of a table that is new.
    fn compose_new_table(&self, number: u64, out: &mut Vec<u8>) -> Option<(FileId, HostOffset)> {
        let (part, page) = of_key(number);
        let s = self.sparse(part)?;
        let (page, at) = s.new_table_page(page)?;
        if !s.table.is_whole() {
            out.resize(out.len() + s.table.page_bytes(), 0);
        } else if !s.table.copy_page(page, out) {
            return None;
        }
        Some((s.file, at))
    }

    fn compose_mark(&self, number: u64, ops: &[MetaOp], out: &mut Vec<u8>) -> Option<(FileId, HostOffset)> {
        let s = self.sparse(of_key(number).0)?;
        let base = out.len();
        out.extend(s.head);
        for op in ops {
            if let MetaOp::InUse(in_use) = op {
                out[base + UNCLEAN_AT] = u8::from(*in_use);
            }
        }
        Some((s.file, HostOffset(0)))
    }

    /// Steps of all extents that are written, each told apart by its file, with the syncs of `files` behind.
    fn begin_steps(&self, modification: Uuid) -> Steps {
        let mut steps = self.text.change(modification);
        let mut files = vec![self.text.file];
        for (_, s) in self.sparse_parts() {
            if let Some(w) = &s.writer {
                w.before(s, &mut steps);
                files.push(s.file);
            }
        }
        files.sort_unstable();
        files.dedup();
        steps.extend(files.into_iter().map(|file| Step::Sync { file }));
        for (_, s) in self.sparse_parts() {
            if let Some(w) = &s.writer {
                w.behind(s, &mut steps);
            }
        }
        steps
    }

    fn settle_begin(&self, how: Settled) {
        let mut session = self.session.lock().expect("session lock");
        session.begun = matches!(how, Settled::Done { .. });
        for (part, token) in std::mem::take(&mut session.tokens) {
            if let Some((s, w)) = self.sparse(part).and_then(|s| Some((s, s.writer.as_ref()?))) {
                if session.begun {
                    s.has_new_tables.store(s.new_tables.is_some(), Ordering::Release);
                }
                w.blocks.settle(s, token, how);
            }
        }
    }

    fn plan_sparse(&self, part: usize, s: &Sparse, change: Change) -> std::result::Result<Plan, Miss> {
        let writer = s.writer.as_ref().ok_or(Miss::Fail(Failure::ReadOnly))?;
        let plan = match change {
            Change::Write { part, beneath_zero } => {
                writer.blocks.plan_write(s, s.grain_at(part.start()), part, beneath_zero)
            }
            Change::Zero { unit } => writer.blocks.plan_zero(s, s.grain_at(unit.start())),
        };
        if plan == Err(Miss::NeedsRoom) {
            writer.wants_room.store(true, Ordering::Release);
        } else if plan.is_ok() {
            self.active.store(u32::try_from(part).unwrap_or(u32::MAX), Ordering::Relaxed);
        }
        let plan = plan?;
        plan.assert_ordered();
        Ok(Self::tokened(part, plan))
    }
}

impl ImageMap for VmdkMap {
    fn limits(&self) -> Limits {
        let block_bytes = self.parts.iter().find_map(|p| match &p.body {
            Body::Sparse(s) => Some(s.layout.header.grain_bytes),
            Body::SeSparse(_) => Some(sesparse::GRAIN_BYTES),
            Body::Zero | Body::Flat { .. } => None,
        });
        let flat = self.parts.iter().filter_map(|p| match p.body {
            Body::Flat { off, .. } => Some(1 << off.0.trailing_zeros().min(63)),
            // directories and tables lie at any sector
            Body::Sparse(_) | Body::SeSparse(_) => Some(SECTOR_BYTES),
            Body::Zero => None,
        });
        let data_alignment = flat.min().unwrap_or(1 << 63);
        let is_diff = self.info.lock().expect("info lock").variant == "diff";
        Limits { size_bytes: self.size(), block_bytes: block_bytes.unwrap_or(0), is_diff, data_alignment }
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        if r.end().0 > self.size() {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        let overwrite = why == Intent::Overwrite;
        if overwrite && self.read_only {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        let (_, part) = self.part_at(r.start()).ok_or(Miss::Fail(Failure::OutOfRange))?;
        match part.extent_at(r)? {
            _ if overwrite && !part.writable => Err(Miss::Fail(Failure::ReadOnly)),
            e if overwrite && !matches!(e.kind, ExtentKind::Data { .. }) => Err(Miss::NeedsPlan),
            _ if overwrite && part.must_write(r.start()) => Err(Miss::NeedsPlan),
            e => Ok(e),
        }
    }

    fn unit(&self, at: GuestOffset) -> GuestRange {
        match self.part_at(at) {
            None => GuestRange::between(GuestOffset(self.size()), GuestOffset(self.size())),
            Some((_, Part { body: Body::Sparse(s), .. })) => s.unit_of(s.grain_at(at)),
            Some((_, part)) => part.range,
        }
    }

    fn claim_of(&self, at: GuestOffset) -> BlockIndex {
        BlockIndex(match self.part_at(at) {
            None => u64::MAX,
            Some((_, part)) => part.first_unit + part.sparse().map_or(0, |s| s.grain_at(at)),
        })
    }

    fn plan(&self, change: Change) -> std::result::Result<Plan, Miss> {
        let at = match change {
            Change::Write { part, .. } => part.start(),
            Change::Zero { unit } => unit.start(),
        };
        let (i, part) = self.part_at(at).ok_or(Miss::Fail(Failure::OutOfRange))?;
        match &part.body {
            Body::Sparse(s) if part.writable => self.plan_sparse(i, s, change),
            _ if part.ignores && !self.read_only => Ok(Plan::default()),
            // zeros cannot become anything else, nor may what is only to be read
            _ => Err(Miss::Fail(Failure::ReadOnly)),
        }
    }

    fn room(&self, urgent: bool) -> Option<Plan> {
        if !urgent {
            return self.room_of(usize::try_from(self.active.load(Ordering::Relaxed)).ok()?, false);
        }
        let asked =
            |s: &Sparse| s.writer.as_ref().is_some_and(|w| w.wants_room.swap(false, Ordering::AcqRel));
        self.sparse_parts().filter(|(_, s)| asked(s)).find_map(|(i, _)| self.room_of(i, true))
    }

    fn settle(&self, token: PlanToken, how: Settled) {
        let (part, own) = (token.0 >> TOKEN_SHIFT, PlanToken(token.0 & ((1 << TOKEN_SHIFT) - 1)));
        if part == ALL_EXTENTS {
            return self.settle_begin(how);
        }
        let part = usize::try_from(part).expect("16 bits");
        if let Some((s, w)) = self.sparse(part).and_then(|s| Some((s, s.writer.as_ref()?))) {
            w.blocks.settle(s, own, how);
        }
    }

    fn must_write(&self, at: GuestOffset) -> bool {
        self.part_at(at).is_some_and(|(_, p)| p.must_write(at))
    }

    fn has_page(&self, key: MetaKey) -> bool {
        let MetaKey::Page { table: MAIN, number } = key else { return false };
        let (part, page) = of_key(number);
        match self.parts.get(part).map(|p| &p.body) {
            Some(Body::Sparse(s)) => s.table.contains(page),
            Some(Body::SeSparse(s)) => s.contains(page),
            _ => false,
        }
    }

    fn page_place(&self, key: MetaKey) -> std::result::Result<PagePlace, Failure> {
        let MetaKey::Page { table: MAIN, number } = key else { return Err(Failure::Corrupt) };
        let (part, page) = of_key(number);
        match self.parts.get(part).map(|p| &p.body) {
            Some(Body::Sparse(s)) => s.page_place(page),
            Some(Body::SeSparse(s)) => s.page_place(page),
            _ => Err(Failure::Corrupt),
        }
    }

    fn page_read(&self, key: MetaKey, bytes: &[u8]) -> std::result::Result<(), Failure> {
        let MetaKey::Page { table: MAIN, number } = key else { return Err(Failure::Corrupt) };
        let (part, page) = of_key(number);
        if let Some(Body::SeSparse(s)) = self.parts.get(part).map(|p| &p.body) {
            return s.insert(page, bytes);
        }
        let s = self.sparse(part).ok_or(Failure::Corrupt)?;
        if bytes.len() != s.table.page_bytes() {
            return Err(Failure::Corrupt);
        }
        s.table.insert(page, bytes);
        Ok(())
    }

    fn compose(&self, key: MetaKey, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        let place = match key {
            MetaKey::Page { table: table @ (MAIN | COPY), number } => {
                self.compose_entries(table, number, ops, out)
            }
            MetaKey::Page { table: MARK, number } => self.compose_mark(number, ops, out),
            MetaKey::Page { table: table @ (DIRECTORY | DIRECTORY_COPY), number } => {
                self.compose_directory(table, number, out)
            }
            MetaKey::Page { table: NEW_TABLE, number } => self.compose_new_table(number, out),
            MetaKey::Page { table: TEXT, number } => self.text.compose(number, ops, out),
            _ => None,
        };
        place.ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("no page {key:?} of this image")))
    }

    fn publish(&self, key: MetaKey, ops: &[MetaOp]) {
        match key {
            MetaKey::Page { table: MAIN, number } => {
                let Some(s) = self.sparse(of_key(number).0) else { return };
                for op in ops {
                    s.publish(op);
                }
            }
            MetaKey::Page { table: TEXT, number } => {
                self.text.publish(number, ops);
                let (id, uuid) = self.text.state();
                let mut info = self.info.lock().expect("info lock");
                (info.content_id, info.modification_uuid) = (id, uuid);
            }
            _ => {} // copies and marks are not looked at
        }
    }

    fn begin(&self, modification: Uuid) -> Plan {
        let mut session = self.session.lock().expect("session lock");
        if self.read_only || session.begun {
            return Plan::default();
        }
        session.tokens.clear();
        for (i, s) in self.sparse_parts() {
            let plan = s.writer.as_ref().map(|w| w.blocks.begin(Steps::new));
            session.tokens.extend(plan.and_then(|p| p.token).map(|t| (i, t)));
        }
        let steps = self.begin_steps(modification);
        Plan { token: Some(PlanToken(ALL_EXTENTS << TOKEN_SHIFT)), ..Plan::of(steps) }
    }

    fn unwritten(&self) -> Option<GuestRange> {
        let is_dead = |p: &&Part| !p.writable || p.ignores || matches!(p.body, Body::Zero);
        self.parts.iter().find(is_dead).map(|p| p.range)
    }

    fn keep_content_id(&self) {
        self.text.keep_ids();
    }

    fn end(&self) -> Plan {
        let mut plan = Plan::default();
        for (_, s) in self.sparse_parts() {
            if let Some(w) = &s.writer {
                plan.steps.extend(w.end(s));
            }
        }
        plan.assert_ordered();
        plan
    }

    fn info(&self) -> ImageInfo {
        let allocated = self.sparse_parts().map(|(_, s)| s.allocated()).try_fold(0, |sum, n| Some(sum + n?));
        let any = self.sparse_parts().next().is_some();
        ImageInfo {
            allocated_blocks: allocated.filter(|_| any),
            ..self.info.lock().expect("info lock").clone()
        }
    }
}
