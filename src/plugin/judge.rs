//! What a plug-in answers, held against what can be. Nothing of it is believed: a wrong answer is a sentence here and an error of the
//! image, and no byte is read or written for it.

use super::abi;
use super::calls::{self, Functions, RawFile, RawPage, RawPlan, RawReport};
use super::text::{Text, count_of, field};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::format::{Blueprint, CheckReport, Severity};
use crate::limits::{
    MAX_BLOCK_BYTES, MAX_DISK_BYTES, MAX_PACKED_BYTES, MAX_UNIT_BYTES, MAX_ZEROS_BYTES, META_PAGE_BYTES,
    SECTOR_BYTES, TABLE_PIECE_BYTES,
};
use crate::map::{
    Codec, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset, ImageInfo, Limits, MetaKey,
    MetaOp, Packed, Plan, PlanToken, Step,
};
use smallvec::SmallVec;
use uuid::Uuid;

/// What is wrong with an answer.
pub(super) type Wrong = String;

/// Bytes that one round of `open` asks for.
const MAX_ROUND_BYTES: u64 = 16 << 20;

/// The error behind an answer that is none of success, with what was said about it.
pub(super) fn refusal(code: i32, why: &Text) -> Error {
    let (kind, what) = match code {
        abi::NOT_THIS_FORMAT => (ErrorKind::NotThisFormat, "is not of this format"),
        abi::CORRUPT => (ErrorKind::Corrupt, "breaks the format's rules"),
        abi::UNSUPPORTED => (ErrorKind::Unsupported, "is not supported by the plug-in"),
        abi::LIMIT => (ErrorKind::Limit, "is beyond a bound of the plug-in"),
        abi::INVALID_ARGUMENT => (ErrorKind::InvalidArgument, "is refused by the plug-in"),
        abi::READ_ONLY => (ErrorKind::ReadOnly, "is only read by the plug-in"),
        abi::NO_SPACE => (ErrorKind::NoSpace, "there is no room"),
        code => {
            return Error::new(
                ErrorKind::Corrupt,
                format!("the plug-in answered {code}, which means nothing"),
            );
        }
    };
    Error::new(kind, why.said().unwrap_or_else(|| what.into()))
}

/// An answer that cannot be, where there is an error to be told.
pub(super) fn distrust(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the plug-in gave a wrong answer: {what}"))
}

/// The failure of a request behind an answer that is none of success.
pub(super) fn failure(code: i32) -> std::result::Result<Failure, Wrong> {
    Ok(match code {
        abi::CORRUPT => Failure::Corrupt,
        abi::UNSUPPORTED => Failure::Unsupported,
        abi::READ_ONLY => Failure::ReadOnly,
        abi::NO_SPACE => Failure::Os(libc::ENOSPC),
        abi::LIMIT => Failure::Os(libc::ENOMEM),
        code => return Err(format!("{code} where that means nothing")),
    })
}

/// Whether a file may be of a format, by a plug-in's word: yes is 1, no any other.
pub(super) fn probe(functions: &Functions, head: &[u8], foot: &[u8], file_bytes: u64) -> bool {
    calls::probe(functions, head, foot, file_bytes) == 1
}

/// Where a range of the file ends.
fn end_of(off: u64, len: u64, file_end: u64) -> std::result::Result<u64, Wrong> {
    off.checked_add(len)
        .filter(|end| *end <= file_end && i64::try_from(*end).is_ok())
        .ok_or_else(|| format!("{len} bytes at {off} of a file of {file_end}"))
}

fn first_file(file: u32) -> std::result::Result<(), Wrong> {
    if file == 0 { Ok(()) } else { Err(format!("file {file} of an image with one")) }
}

/// What a round of `open` asks for, against the length of the file.
pub(super) fn ranges(ranges: &[abi::Range], count: u32, file_bytes: u64) -> std::result::Result<u64, Wrong> {
    if ranges.is_empty() || ranges.len() != count_of(count) {
        return Err(format!("{count} ranges asked for at a time"));
    }
    let mut total: u64 = 0;
    for r in ranges {
        first_file(r.file)?;
        end_of(r.off, r.len, file_bytes)?;
        total = total.saturating_add(r.len);
        if r.len == 0 || total > MAX_ROUND_BYTES {
            return Err(format!("a range of {} bytes, {total} together", r.len));
        }
    }
    Ok(total)
}

/// Sizes of an image.
pub(super) fn disk(disk: &abi::Disk) -> std::result::Result<Limits, Wrong> {
    let &abi::Disk { size_bytes, block_bytes, data_alignment, flags, .. } = disk;
    if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) || size_bytes > MAX_DISK_BYTES {
        return Err(format!("a disk of {size_bytes} bytes"));
    }
    if block_bytes == 0 || !block_bytes.is_multiple_of(SECTOR_BYTES) || block_bytes > MAX_BLOCK_BYTES {
        return Err(format!("blocks of {block_bytes} bytes"));
    }
    if !data_alignment.is_power_of_two() || data_alignment < SECTOR_BYTES {
        return Err(format!("an alignment of {data_alignment} bytes"));
    }
    if flags & !abi::DISK_DIFF != 0 {
        return Err(format!("flags {flags:#x} of a disk"));
    }
    Ok(Limits { size_bytes, block_bytes, data_alignment, is_diff: flags & abi::DISK_DIFF != 0 })
}

/// What an image tells of itself.
pub(super) fn info(
    raw: &abi::Info,
    format: &'static str,
    variants: &'static [&'static str],
    limits: &Limits,
) -> std::result::Result<ImageInfo, Wrong> {
    let variant = variants.get(count_of(raw.variant)).ok_or_else(|| format!("variant {}", raw.variant))?;
    let blocks = limits.size_bytes.div_ceil(limits.block_bytes);
    let has = |bit| raw.known & bit != 0;
    if has(abi::INFO_ALLOCATED) && raw.allocated_blocks > blocks {
        return Err(format!("{} of {blocks} blocks have a place", raw.allocated_blocks));
    }
    let uuid = |bit, bytes: &[u8; 16]| has(bit).then(|| Uuid::from_bytes(*bytes)).filter(|u| !u.is_nil());
    let text = |chars, what: &str| {
        let text = field(chars).map_err(|e| format!("{what} {e}"))?;
        Ok::<_, Wrong>((!text.is_empty()).then_some(text))
    };
    Ok(ImageInfo {
        format,
        variant,
        virtual_size: limits.size_bytes,
        block_size: Some(limits.block_bytes),
        allocated_blocks: has(abi::INFO_ALLOCATED).then_some(raw.allocated_blocks),
        uuid: uuid(abi::INFO_UUID, &raw.uuid),
        modification_uuid: uuid(abi::INFO_MODIFICATION, &raw.modification_uuid),
        parent_uuid: uuid(abi::INFO_PARENT, &raw.parent_uuid),
        parent_modification_uuid: uuid(abi::INFO_PARENT_MODIFICATION, &raw.parent_modification_uuid),
        parent_names: text(&raw.parent_name, "the parent's name")?.into_iter().collect(),
        parent_format: text(&raw.parent_format, "the parent's format")?,
        comment: text(&raw.comment, "the comment")?,
        version: text(&raw.version, "the version")?,
        ..ImageInfo::default()
    })
}

fn codec(codec: u32) -> std::result::Result<Codec, Wrong> {
    Ok(match codec {
        abi::CODEC_DEFLATE => Codec::Deflate,
        abi::CODEC_ZLIB => Codec::Zlib,
        abi::CODEC_ZSTD => Codec::Zstd,
        abi::CODEC_BZIP2 => Codec::Bzip2,
        abi::CODEC_LZFSE => Codec::Lzfse,
        abi::CODEC_XZ => Codec::Xz,
        other => return Err(format!("codec {other}")),
    })
}

/// An extent of at most `most` bytes. `overwrite`: only such as can be written to.
pub(super) fn extent(
    raw: &abi::Extent,
    most: u64,
    (file, end): (FileId, u64),
    overwrite: bool,
) -> std::result::Result<Extent, Wrong> {
    if raw.len == 0 || raw.len > most {
        return Err(format!("an extent of {} bytes in a range of {most}", raw.len));
    }
    let kind = match raw.kind {
        abi::EXTENT_DATA => {
            first_file(raw.file)?;
            end_of(raw.off, raw.len, end)?;
            ExtentKind::Data { file, off: HostOffset(raw.off) }
        }
        abi::EXTENT_ZERO => ExtentKind::Zero,
        abi::EXTENT_PARENT => ExtentKind::Parent,
        abi::EXTENT_PACKED => {
            first_file(raw.file)?;
            end_of(raw.off, u64::from(raw.packed_len), end)?;
            let unit = u64::from(raw.unit_len);
            let fits = u64::from(raw.into).checked_add(raw.len).is_some_and(|end| end <= unit);
            if raw.packed_len == 0
                || raw.packed_len > MAX_PACKED_BYTES
                || raw.unit_len > MAX_UNIT_BYTES
                || !fits
            {
                return Err(format!(
                    "{} bytes at {} of a packed unit of {unit}, packed in {}",
                    raw.len, raw.into, raw.packed_len
                ));
            }
            let packed = Packed {
                off: HostOffset(raw.off),
                len: raw.packed_len,
                unit: raw.unit_len,
                file,
                codec: codec(raw.codec)?,
            };
            ExtentKind::Packed { packed, into: raw.into }
        }
        other => return Err(format!("an extent of kind {other}")),
    };
    if overwrite && !matches!(kind, ExtentKind::Data { .. }) {
        return Err("what has no place can be overwritten".into());
    }
    Ok(Extent { len: raw.len, kind })
}

/// What a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Bytes of a part of a unit.
    Write { part: GuestRange, unit: GuestRange },
    /// A unit as zeros.
    Zero { unit: GuestRange },
    /// Places ahead of need.
    Room,
    /// Before the first change.
    Begin,
    /// At the close.
    End,
}

/// What a plan is held against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ground {
    pub(super) purpose: Purpose,
    pub(super) file: FileId,
    /// Where the file ends, as far as is known for certain.
    pub(super) end: u64,
    pub(super) block_bytes: u64,
}

/// The state of a plan while its steps are looked at in turn.
struct Walk {
    ground: Ground,
    /// As [`Ground::end`], with the extensions that are complete by then.
    end: u64,
    /// The same with those that are not.
    next_end: u64,
    /// Everything before is durable.
    synced: bool,
    /// Bytes of the unit that are written.
    written: Vec<GuestRange>,
}

/// A plan, and where the file ends once it is done.
pub(super) fn plan(raw: &RawPlan, ground: Ground) -> std::result::Result<(Plan, u64), Wrong> {
    if raw.overrun {
        return Err("a plan of more steps than there is room for".into());
    }
    if raw.clean > 1 {
        return Err(format!("a plan that is clean by {}", raw.clean));
    }
    let mut walk = Walk { ground, end: ground.end, next_end: ground.end, synced: false, written: Vec::new() };
    let steps = raw.steps.iter().map(|s| walk.step(s)).collect::<std::result::Result<SmallVec<_>, _>>()?;
    let plan = Plan { steps, token: raw.token.map(PlanToken), clean: raw.clean == 1 };
    if let Some(rule) = plan.broken_rule() {
        return Err(rule.into());
    }
    walk.covers()?;
    if walk.next_end > ground.end && plan.token.is_none() {
        return Err("an extension nobody is told of".into());
    }
    if plan.steps.is_empty() && plan.token.is_some() {
        return Err("a token for nothing".into());
    }
    if ground.purpose == Purpose::Begin && !plan.steps.is_empty() && plan.token.is_none() {
        return Err("a beginning nobody is told of".into());
    }
    Ok((plan, walk.next_end))
}

impl Walk {
    fn only(&self, may: bool, what: &str) -> std::result::Result<(), Wrong> {
        if may { Ok(()) } else { Err(format!("{what} in a plan for {:?}", self.ground.purpose)) }
    }

    fn step(&mut self, s: &abi::Step) -> std::result::Result<Step, Wrong> {
        if s.kind != abi::STEP_META && s.kind != abi::STEP_BARRIER {
            first_file(s.file)?;
        }
        let (file, purpose) = (self.ground.file, self.ground.purpose);
        let step = match s.kind {
            abi::STEP_GUEST => return self.guest(s),
            abi::STEP_BLOCK => return self.block(s),
            abi::STEP_META => Step::Meta { key: key(&s.key)?, op: op(&s.op)? },
            abi::STEP_EXTEND => {
                self.only(matches!(purpose, Purpose::Begin | Purpose::Room), "an extension")?;
                if s.from > self.end || s.to <= s.from || s.to - s.from > MAX_ZEROS_BYTES {
                    return Err(format!(
                        "an extension from {} to {} of a file of {}",
                        s.from, s.to, self.end
                    ));
                }
                end_of(s.to, 0, u64::MAX)?;
                self.next_end = self.next_end.max(s.to);
                Step::Extend { file, from: HostOffset(s.from), to: HostOffset(s.to) }
            }
            abi::STEP_TRUNCATE => {
                self.only(matches!(purpose, Purpose::Begin | Purpose::End) && self.synced, "a cut")?;
                end_of(s.to, 0, self.end)?;
                (self.end, self.next_end) = (s.to, s.to);
                Step::Truncate { file, to: HostOffset(s.to) }
            }
            abi::STEP_PUNCH => {
                self.only(purpose == Purpose::End && self.synced, "a hole")?;
                if s.to <= s.from || s.to > self.end {
                    return Err(format!("a hole from {} to {} in a file of {}", s.from, s.to, self.end));
                }
                Step::Punch { file, from: HostOffset(s.from), to: HostOffset(s.to) }
            }
            abi::STEP_MOVE => {
                self.only(purpose == Purpose::End, "a move")?;
                let (a, b) = (end_of(s.from, s.len, self.end)?, end_of(s.to, s.len, self.end)?);
                if s.len == 0 || (s.from < b && s.to < a) {
                    return Err(format!("{} bytes move from {} to {}", s.len, s.from, s.to));
                }
                Step::Move { file, from: HostOffset(s.from), to: HostOffset(s.to), len: s.len }
            }
            abi::STEP_BARRIER | abi::STEP_SYNC => {
                self.end = self.next_end;
                self.synced |= s.kind == abi::STEP_SYNC;
                if s.kind == abi::STEP_SYNC { Step::Sync { file } } else { Step::Barrier }
            }
            other => return Err(format!("a step of kind {other}")),
        };
        Ok(step)
    }

    fn guest_range(s: &abi::Step, within: GuestRange) -> std::result::Result<GuestRange, Wrong> {
        GuestRange::new(GuestOffset(s.guest_start), s.guest_len)
            .filter(|r| !r.is_empty() && within.contains(*r))
            .ok_or_else(|| format!("{} bytes at {} are written, not of {within}", s.guest_len, s.guest_start))
    }

    fn guest(&mut self, s: &abi::Step) -> std::result::Result<Step, Wrong> {
        let within = match self.ground.purpose {
            Purpose::Write { part, .. } => part,
            Purpose::Zero { unit } => unit,
            _ => return self.only(false, "a guest's bytes").map(|()| Step::Barrier),
        };
        let part = Self::guest_range(s, within)?;
        end_of(s.to, part.len(), self.end)?;
        self.written.push(part);
        Ok(Step::Guest { part, file: self.ground.file, to: HostOffset(s.to) })
    }

    fn block(&mut self, s: &abi::Step) -> std::result::Result<Step, Wrong> {
        let Purpose::Write { unit, .. } = self.ground.purpose else {
            return self.only(false, "a block").map(|()| Step::Barrier);
        };
        let block = Self::guest_range(s, unit)?;
        if block != unit || s.len != self.ground.block_bytes || s.clean > 1 {
            return Err(format!("a block of {} bytes, {} of them of the disk", s.len, block.len()));
        }
        end_of(s.to, s.len, self.end)?;
        self.written.push(block);
        let (file, to, len) = (self.ground.file, HostOffset(s.to), s.len);
        Ok(Step::Block { block, file, to, len, clean: s.clean == 1 })
    }

    /// Every byte that is to be written is, once.
    fn covers(&mut self) -> std::result::Result<(), Wrong> {
        self.written.sort_by_key(|r| r.start());
        if self.written.windows(2).any(|w| w[0].end() > w[1].start()) {
            return Err("bytes are written to two places".into());
        }
        let Purpose::Write { part, .. } = self.ground.purpose else { return Ok(()) };
        let mut at = part.start();
        for r in &self.written {
            if r.start() > at {
                break;
            }
            at = at.max(r.end());
        }
        if at < part.end() { Err(format!("bytes from {at} on are not written")) } else { Ok(()) }
    }
}

fn key(key: &abi::Key) -> std::result::Result<MetaKey, Wrong> {
    match (key.kind, u8::try_from(key.table)) {
        (abi::KEY_HEADER, _) => Ok(MetaKey::Header),
        (abi::KEY_PAGE, Ok(table)) => Ok(MetaKey::Page { table, number: key.number }),
        _ => Err(format!("metadata of kind {}, table {}", key.kind, key.table)),
    }
}

fn op(op: &abi::Op) -> std::result::Result<MetaOp, Wrong> {
    Ok(match (op.kind, op.flag) {
        (abi::OP_ENTRY, 0 | 1) => MetaOp::Entry { index: op.index, value: op.value, pointer: op.flag == 1 },
        (abi::OP_COUNT, _) => {
            MetaOp::Count(u32::try_from(op.index).map_err(|_| format!("a count of {}", op.index))?)
        }
        (abi::OP_MODIFICATION, _) => MetaOp::Modification(Uuid::from_bytes(op.uuid)),
        (abi::OP_IN_USE, 0 | 1) => MetaOp::InUse(op.flag == 1),
        (kind, flag) => return Err(format!("a change of metadata of kind {kind}, flag {flag}")),
    })
}

/// The same for the plug-in.
pub(super) fn raw_key(key: MetaKey) -> abi::Key {
    match key {
        MetaKey::Header => abi::Key { kind: abi::KEY_HEADER, table: 0, number: 0 },
        MetaKey::Page { table, number } => abi::Key { kind: abi::KEY_PAGE, table: u32::from(table), number },
    }
}

/// The same for the plug-in.
pub(super) fn raw_op(op: MetaOp) -> abi::Op {
    let raw = abi::Op { kind: 0, flag: 0, index: 0, value: 0, uuid: [0; 16] };
    match op {
        MetaOp::Entry { index, value, pointer } => {
            abi::Op { kind: abi::OP_ENTRY, flag: u32::from(pointer), index, value, ..raw }
        }
        MetaOp::Count(n) => abi::Op { kind: abi::OP_COUNT, index: u64::from(n), ..raw },
        MetaOp::Modification(uuid) => abi::Op { kind: abi::OP_MODIFICATION, uuid: uuid.into_bytes(), ..raw },
        MetaOp::InUse(on) => abi::Op { kind: abi::OP_IN_USE, flag: u32::from(on), ..raw },
    }
}

/// Where a page goes, and its bytes.
pub(super) fn page(mut raw: RawPage, end: u64) -> std::result::Result<(HostOffset, Vec<u8>), Wrong> {
    first_file(raw.file)?;
    let len = u64::from(raw.len);
    if len == 0 || len > META_PAGE_BYTES {
        return Err(format!("a page of {len} bytes"));
    }
    end_of(raw.off, len, end)?;
    raw.bytes.truncate(count_of(raw.len));
    Ok((HostOffset(raw.off), raw.bytes))
}

/// What a check found.
pub(super) fn report(raw: RawReport, limits: &Limits) -> Result<CheckReport> {
    let blocks = limits.size_bytes.div_ceil(limits.block_bytes);
    if raw.blocks > blocks || raw.allocated > raw.blocks {
        return Err(distrust(format!("{} of {} blocks have a place", raw.allocated, raw.blocks)));
    }
    let mut report = CheckReport { blocks: raw.blocks, allocated: raw.allocated, ..CheckReport::default() };
    for (severity, text) in raw.findings {
        let severity = match severity {
            abi::FINDING_CORRUPTION => Severity::Corruption,
            abi::FINDING_LEAK => Severity::Leak,
            other => return Err(distrust(format!("a finding of severity {other}"))),
        };
        let text = text.map_err(|e| distrust(format!("a finding whose text {e}")))?;
        let text = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        report.add(severity, false, text);
    }
    (0..raw.more.min(MAX_MORE)).for_each(|_| report.add(Severity::Corruption, false, String::new()));
    Ok(report)
}

/// Findings that are counted though they were not kept.
const MAX_MORE: u64 = 1 << 20;

/// A new file.
pub(super) fn blueprint(raw: RawFile) -> Result<Blueprint> {
    let len = raw.len;
    if len == 0 || i64::try_from(len).is_err() || raw.refused || raw.pieces.is_empty() {
        return Err(distrust(format!("a new file of {len} bytes, {} pieces", raw.pieces.len())));
    }
    let reserve = raw
        .reserve
        .map(|(off, bytes)| end_of(off, bytes, len).map(|_| (HostOffset(off), bytes)).map_err(distrust));
    let mut pieces = Vec::new();
    for (off, bytes) in raw.pieces {
        end_of(off, bytes.len() as u64, len).map_err(distrust)?;
        let mut at = off;
        for part in bytes.chunks(TABLE_PIECE_BYTES) {
            pieces.push((HostOffset(at), part.to_vec()));
            at += part.len() as u64;
        }
    }
    Ok(Blueprint::single(len, reserve.transpose()?, pieces))
}
