//! A QCOW2 that is open: look-ups in the first-level table, which is kept whole, and in pages of second-level ones.

use super::super::OpenHow;
use super::super::bytes::{be64, put_be64};
use super::header::{Header, incompatible};
use super::layout::{COPIED, Cluster, Layout, OFFSET, Place, Sub, Subclusters};
use super::snapshots::{self, Snapshot};
use super::writer::{REFCOUNTS, Writer};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::{SECTOR_BYTES, TABLE_PIECE_BYTES};
use crate::map::{
    BlockIndex, ByteSource, Change, Codec, Extent, ExtentKind, FileId, GuestOffset, GuestRange, HostOffset,
    ImageInfo, ImageMap, Intent, Limits, MetaKey, MetaOp, Miss, Packed, PageCache, PagePlace, Plan,
    PlanToken, Settled,
};
use crate::probe::paging::are_all_paged;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

/// Most bytes of tables that are read to tell how many clusters are allocated: those of a disk of 512 GiB.
const MAX_COUNTED_BYTES: u64 = 64 << 20;

/// The number by which keys of pages call second-level tables.
pub(super) const L2: u8 = 0;
/// And the first-level one.
pub(super) const L1: u8 = 1;

/// A QCOW2 that is open.
#[derive(Debug)]
pub struct Qcow2Map {
    pub(super) file: FileId,
    pub(super) layout: Layout,
    codec: Codec,
    is_diff: bool,
    /// As the kernel has accepted it.
    header: Mutex<Header>,
    /// As the kernel has accepted it, in the machine's byte order. Empty after an open for information only.
    pub(super) l1: Box<[AtomicU64]>,
    /// Pages of second-level tables, by their place in the file.
    pub(super) pages: PageCache,
    /// What data must not lie in: header, first-level table and the like, as byte ranges.
    fixed: Vec<(u64, u64)>,
    /// Bytes the file is known to have.
    pub(super) end: AtomicU64,
    snapshots: Vec<Snapshot>,
    /// Clusters of the disk that have a place, where somebody asked and it was counted.
    allocated: Option<u64>,
    /// `None` if opened for reading only.
    pub(super) writer: Option<Writer>,
}

impl Qcow2Map {
    /// Opens the image.
    ///
    /// # Errors
    /// As [`super::super::open`].
    pub fn open(source: &dyn ByteSource, file: FileId, how: OpenHow) -> Result<Self> {
        let header = Header::read(source)?;
        let layout = header.layout(source.len())?;
        let (snapshots, _) = snapshots::read(source, &header, &layout)?;
        Self::with(source, file, how, header, layout, snapshots)
    }

    /// Opens what the disk was when the internal snapshot of this name or number was made, for reading only.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without such a snapshot; as [`Self::open`].
    pub fn open_snapshot(source: &dyn ByteSource, file: FileId, name: &str) -> Result<Self> {
        let header = Header::read(source)?;
        let mut layout = header.layout(source.len())?;
        let (list, _) = snapshots::read(source, &header, &layout)?;
        let found = list.iter().find(|s| s.name == name).or_else(|| list.iter().find(|s| s.id == name));
        let Some(s) = found else {
            let names: Vec<_> = list.iter().map(|s| s.name.as_str()).collect();
            let e = Error::new(ErrorKind::NotFound, format!("it has no snapshot '{name}'"));
            return Err(e.hint(format!("its snapshots: {}", names.join(", "))));
        };
        layout.disk_bytes = s.disk_bytes / SECTOR_BYTES * SECTOR_BYTES;
        (layout.l1_at, layout.l1_entries) = (HostOffset(s.l1_at), s.l1_entries);
        if u64::from(layout.l1_entries) < layout.l1_needed() {
            let what = format!("the table of snapshot '{name}' is too short for its disk");
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        let how = OpenHow { read_only: true, info_only: false };
        Self::with(source, file, how, header, layout, list)
    }

    fn with(
        source: &dyn ByteSource,
        file: FileId,
        how: OpenHow,
        header: Header,
        layout: Layout,
        snapshots: Vec<Snapshot>,
    ) -> Result<Self> {
        let (l1, allocated) = match how.info_only {
            true => (Box::default(), count_allocated(source, &layout)),
            false => (load_l1(source, &layout)?, None),
        };
        let l2_pages = layout.l1_needed() * (layout.cluster_bytes() / layout.page_bytes());
        let pages = match are_all_paged() {
            true => PageCache::new(layout.page_bytes(), l2_pages, 0),
            false => PageCache::second_level(layout.page_bytes(), l2_pages, layout.l1_needed() * 8),
        };
        let codec = if header.compression() == 1 { Codec::Zstd } else { Codec::Deflate };
        let fixed = fixed_ranges(&header, &layout);
        let is_diff = header.backing.is_some();
        let (header, end) = (Mutex::new(header), AtomicU64::new(layout.file_bytes));
        let mut map = Qcow2Map {
            file,
            layout,
            codec,
            is_diff,
            header,
            l1,
            pages,
            fixed,
            end,
            snapshots,
            allocated,
            writer: None,
        };
        if !how.read_only {
            let writer = Writer::open(source, &map)?;
            // Clusters that the file has lost stay lost when it grows over them.
            let (cluster, opened) = (layout.cluster_bytes(), u64::from(writer.blocks.places_end()));
            map.fixed.push((layout.file_clusters() * cluster, opened * cluster));
            map.writer = Some(writer);
        }
        Ok(map)
    }

    /// The internal snapshots, in the image's order.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    pub(super) fn header(&self) -> std::sync::MutexGuard<'_, Header> {
        self.header.lock().expect("header lock")
    }

    /// What a first-level entry names, if it is a place where a table can be; `None` for 0.
    pub(super) fn table_of(&self, entry: u64) -> std::result::Result<Option<Place>, Failure> {
        if entry == 0 {
            return Ok(None);
        }
        let place = Place { at: HostOffset(entry & OFFSET), own: entry & COPIED != 0 };
        let fits =
            place.at.0.checked_add(self.layout.cluster_bytes()).is_some_and(|end| end <= self.known_end());
        if entry & !(OFFSET | COPIED) != 0 || !fits || !self.may_be_used(place.at) {
            return Err(Failure::Corrupt);
        }
        Ok(Some(place))
    }

    /// The second-level table that an entry of the first level names.
    pub(super) fn table_at(&self, l1: u64) -> std::result::Result<Option<Place>, Miss> {
        let entry =
            usize::try_from(l1).ok().and_then(|i| self.l1.get(i)).ok_or(Miss::Fail(Failure::OutOfRange))?;
        self.table_of(entry.load(Ordering::Acquire)).map_err(Miss::Fail)
    }

    /// An entry of the first level was written.
    pub(super) fn set_l1(&self, l1: u64, value: u64) {
        if let Some(entry) = usize::try_from(l1).ok().and_then(|i| self.l1.get(i)) {
            entry.store(value, Ordering::Release);
        }
    }

    /// A page of the first level as it is, with these entries over it; and where it goes.
    pub(super) fn compose_l1(
        &self,
        page: u64,
        entries: impl Iterator<Item = (u64, u64)>,
        out: &mut Vec<u8>,
    ) -> HostOffset {
        let (base, per_page) = (out.len(), self.layout.page_bytes() / 8);
        let first = page * per_page;
        let index = |n: u64| usize::try_from(n).expect("MAX_L1_BYTES");
        let end = (first + per_page).min(u64::from(self.layout.l1_entries));
        let published = self.l1.get(index(first)..index(end)).unwrap_or_default();
        out.extend(published.iter().flat_map(|e| e.load(Ordering::Acquire).to_be_bytes()));
        for (n, value) in entries {
            put_be64(out, base + index(n - first) * 8, value);
        }
        self.layout.l1_at.plus(first * 8)
    }

    /// Whatever is changed changes the header: what others added is void, and the refcount table may have moved.
    pub(super) fn apply_to_header(header: &mut Header, table: Option<(u64, u32)>) {
        header.clear_autoclear();
        if let Some((at, clusters)) = table {
            header.set_refcount_table(at, clusters);
        }
    }

    /// The file is at least so long now.
    pub(super) fn reaches(&self, end: HostOffset) {
        self.end.fetch_max(end.0, Ordering::AcqRel);
    }

    pub(super) fn is_diff(&self) -> bool {
        self.is_diff
    }

    fn known_end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// A cluster there can be data or a table: it begins where clusters do, and in none of the fixed parts.
    fn may_be_used(&self, at: HostOffset) -> bool {
        let bytes = self.layout.cluster_bytes();
        at.0 & (bytes - 1) == 0 && !self.fixed.iter().any(|(from, to)| at.0 < *to && at.0 + bytes > *from)
    }

    /// The second-level entry of a cluster, and its bitmap. Both are 0 without a table.
    pub(super) fn entry(&self, block: u64) -> std::result::Result<(u64, u64), Miss> {
        let index =
            usize::try_from(block >> self.layout.l2_bits()).map_err(|_| Miss::Fail(Failure::OutOfRange))?;
        let entry = self.l1.get(index).ok_or(Miss::Fail(Failure::OutOfRange))?.load(Ordering::Acquire);
        match self.table_of(entry).map_err(Miss::Fail)? {
            None => Ok((0, 0)),
            Some(table) => self.entry_in(table.at, block),
        }
    }

    /// Where the entry of a cluster is in a table: the page, and the number of its 8-byte word.
    pub(super) fn entry_place(&self, table: HostOffset, block: u64) -> (u64, usize) {
        let index = block & ((1 << self.layout.l2_bits()) - 1);
        let at = table.0 + index * self.layout.entry_bytes();
        let page = self.layout.page_bytes();
        // a power of two: no division
        (at >> page.trailing_zeros(), usize::try_from((at & (page - 1)) / 8).expect("inside a page"))
    }

    fn entry_in(&self, table: HostOffset, block: u64) -> std::result::Result<(u64, u64), Miss> {
        let (page, word) = self.entry_place(table, block);
        let lacks = Miss::NeedsPage(MetaKey::Page { table: L2, number: page });
        let get = |word| self.pages.bytes8(page, word).map(u64::from_be_bytes).ok_or(lacks);
        if !self.layout.extended {
            return Ok((get(word)?, 0));
        }
        loop {
            // Both words change one after the other: a pair that was looked at in between is looked at again.
            let entry = get(word)?;
            let bitmap = get(word + 1)?;
            if get(word)? == entry {
                return Ok((entry, bitmap));
            }
        }
    }

    /// What the table says of a cluster.
    pub(super) fn cluster(&self, block: u64) -> std::result::Result<Cluster, Miss> {
        let (entry, bitmap) = self.entry(block)?;
        self.checked(entry, bitmap).map_err(Miss::Fail)
    }

    /// What an entry says, if what it names can be.
    pub(super) fn checked(&self, entry: u64, bitmap: u64) -> std::result::Result<Cluster, Failure> {
        let cluster = self.layout.cluster(entry, bitmap)?;
        let sound = match cluster {
            Cluster::Free | Cluster::Unplaced(_) | Cluster::Zero(None) => true,
            Cluster::Zero(Some(place)) | Cluster::Data(place) | Cluster::Partly(place, _) => {
                place.at.0 < self.known_end() && self.may_be_used(place.at)
            }
            Cluster::Packed { at, .. } => {
                at.0 < self.known_end() && !self.fixed.iter().any(|(from, to)| (*from..*to).contains(&at.0))
            }
        };
        if sound { Ok(cluster) } else { Err(Failure::Corrupt) }
    }

    /// What the part of one cluster at the start of `r` is.
    fn extent_at(&self, r: GuestRange) -> std::result::Result<Extent, Miss> {
        let block = self.layout.block_at(r.start());
        let into = r.start().0 & (self.layout.cluster_bytes() - 1);
        let len = r.len().min(self.layout.cluster_bytes() - into);
        let (kind, len) = match self.cluster(block)? {
            Cluster::Free => return Ok(self.nothing_at(r, len)),
            Cluster::Zero(_) => (ExtentKind::Zero, len),
            Cluster::Data(place) => self.data(place, into, len),
            Cluster::Unplaced(sub) => self.subcluster(None, sub, into, len),
            Cluster::Partly(place, sub) => self.subcluster(Some(place), sub, into, len),
            Cluster::Packed { at, len: bytes } => (self.packed(at, bytes, into), len),
        };
        Ok(Extent { len, kind })
    }

    /// The part of one cluster at the start of `r`, if it may be written in place.
    fn own_at(&self, r: GuestRange) -> std::result::Result<Extent, Miss> {
        let block = self.layout.block_at(r.start());
        let into = r.start().0 & (self.layout.cluster_bytes() - 1);
        let len = r.len().min(self.layout.cluster_bytes() - into);
        if self.must_write(r.start())
            || !self.table_at(block >> self.layout.l2_bits())?.is_some_and(|t| t.own)
        {
            return Err(Miss::NeedsPlan);
        }
        let (kind, len) = match self.cluster(block)? {
            Cluster::Data(place) if place.own => self.data(place, into, len),
            Cluster::Partly(place, sub) if place.own => self.subcluster(Some(place), sub, into, len),
            _ => return Err(Miss::NeedsPlan),
        };
        let found = matches!(kind, ExtentKind::Data { .. }).then_some(Extent { len, kind });
        found.ok_or(Miss::NeedsPlan)
    }

    /// Nothing is here; where there is no table there is nothing as far as it would reach.
    fn nothing_at(&self, r: GuestRange, len: u64) -> Extent {
        let span = self.layout.l1_span();
        let index = usize::try_from(r.start().0 / span).unwrap_or(usize::MAX);
        let no_table = self.l1.get(index).is_some_and(|e| e.load(Ordering::Acquire) == 0);
        let len = if no_table { r.len().min(span - r.start().0 % span) } else { len };
        Extent { len, kind: ExtentKind::Parent }
    }

    /// Data of a place. A file may end inside its last cluster; what is missing reads as zeros.
    fn data(&self, place: Place, into: u64, len: u64) -> (ExtentKind, u64) {
        let off = place.at.plus(into);
        let there = self.known_end().next_multiple_of(SECTOR_BYTES).saturating_sub(off.0);
        match there {
            0 => (ExtentKind::Zero, len),
            _ => (ExtentKind::Data { file: self.file, off }, len.min(there)),
        }
    }

    fn subcluster(&self, place: Option<Place>, sub: Subclusters, into: u64, len: u64) -> (ExtentKind, u64) {
        let bytes = self.layout.subcluster_bytes();
        let what = sub.get(into / bytes);
        let end = (into / bytes + 1..)
            .find(|n| *n == super::layout::SUBCLUSTERS || sub.get(*n) != what)
            .expect("the last one ends it");
        let len = len.min(end * bytes - into);
        match (what, place) {
            (Sub::Here, Some(place)) => self.data(place, into, len),
            (Sub::Zero, _) => (ExtentKind::Zero, len),
            _ => (ExtentKind::Parent, len),
        }
    }

    fn packed(&self, off: HostOffset, len: u32, into: u64) -> ExtentKind {
        // The last one may end before its last sector does.
        let there = u32::try_from(self.known_end().saturating_sub(off.0)).unwrap_or(u32::MAX);
        let small = |n: u64| u32::try_from(n).expect("a cluster has 2 MiB at most");
        let packed = Packed {
            off,
            len: len.min(there),
            unit: small(self.layout.cluster_bytes()),
            file: self.file,
            codec: self.codec,
        };
        ExtentKind::Packed { packed, into: small(into) }
    }

    fn version(header: &Header) -> String {
        header.version().to_string()
    }

    /// What is odd about the image.
    fn notes(&self, header: &Header) -> Vec<String> {
        let dirty =
            "was not closed by who wrote it last: its refcounts may be wrong, which vdimg repair puts right";
        let corrupt = "is marked as corrupt, and is not written before vdimg repair has put it right";
        let notes = [(incompatible::DIRTY, dirty), (incompatible::CORRUPT, corrupt)];
        notes.into_iter().filter(|(bit, _)| header.has(*bit)).map(|(_, note)| note.to_string()).collect()
    }
}

/// What data must not lie in, as the header says it.
fn fixed_ranges(header: &Header, layout: &Layout) -> Vec<(u64, u64)> {
    let cluster = layout.cluster_bytes();
    let table = |at: u64, bytes: u64| (at, at.saturating_add(bytes));
    let refcounts = u64::from(header.refcount_table_clusters()).saturating_mul(cluster);
    vec![
        (0, cluster),
        table(layout.l1_at.0, u64::from(layout.l1_entries) * 8),
        table(header.l1_at(), u64::from(header.l1_entries()) * 8),
        table(header.refcount_table_at(), refcounts),
    ]
}

fn load_l1(source: &dyn ByteSource, layout: &Layout) -> Result<Box<[AtomicU64]>> {
    let mut table = Vec::with_capacity(usize::try_from(layout.l1_entries).expect("checked"));
    let (mut at, end) = (layout.l1_at.0, layout.l1_at.0 + u64::from(layout.l1_entries) * 8);
    let mut piece = vec![0; TABLE_PIECE_BYTES];
    while at < end {
        let len = usize::try_from(end - at).map_or(piece.len(), |left| left.min(piece.len()));
        source.read_at(HostOffset(at), &mut piece[..len])?;
        table.extend(
            piece[..len].as_chunks::<8>().0.iter().map(|raw| AtomicU64::new(u64::from_be_bytes(*raw))),
        );
        at += len as u64;
    }
    Ok(table.into())
}

/// Clusters that have a place, by all second-level tables; `None` if those are too large to be read for that, or cannot be.
fn count_allocated(source: &dyn ByteSource, layout: &Layout) -> Option<u64> {
    let l1 = load_l1(source, layout).ok()?;
    let tables: Vec<_> =
        l1.iter().map(|e| e.load(Ordering::Relaxed) & OFFSET).filter(|at| *at != 0).collect();
    if tables.len() as u64 * layout.cluster_bytes() > MAX_COUNTED_BYTES {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(layout.cluster_bytes()).ok()?];
    let step = usize::try_from(layout.entry_bytes()).ok()?;
    let mut count = 0;
    for at in tables {
        source.read_at(HostOffset(at), &mut bytes).ok()?;
        for entry in bytes.chunks(step) {
            let word = |i| be64(entry, i).unwrap_or(0);
            count += u64::from(layout.cluster(word(0), word(8)).is_ok_and(|c| layout.end_of(c) > 0));
        }
    }
    Some(count)
}

impl ImageMap for Qcow2Map {
    fn limits(&self) -> Limits {
        Limits {
            size_bytes: self.layout.disk_bytes,
            block_bytes: self.layout.cluster_bytes(),
            is_diff: self.is_diff,
            data_alignment: self.layout.cluster_bytes(),
        }
    }

    fn look(&self, r: GuestRange, why: Intent) -> std::result::Result<Extent, Miss> {
        if !self.layout.disk().contains(r) {
            return Err(Miss::Fail(Failure::OutOfRange));
        }
        if why == Intent::Overwrite && self.writer.is_none() {
            return Err(Miss::Fail(Failure::ReadOnly));
        }
        match why {
            Intent::Read => self.extent_at(r),
            Intent::Overwrite => self.own_at(r),
        }
    }

    fn unit(&self, at: GuestOffset) -> GuestRange {
        self.layout.unit(self.layout.block_at(at))
    }

    fn claim_of(&self, at: GuestOffset) -> BlockIndex {
        BlockIndex(self.layout.block_at(at))
    }

    fn plan(&self, change: Change) -> std::result::Result<Plan, Miss> {
        let plan = self.plan_change(change)?;
        plan.assert_ordered();
        Ok(plan)
    }

    fn room(&self, urgent: bool) -> Option<Plan> {
        self.plan_room(urgent)
    }

    fn settle(&self, token: PlanToken, how: Settled) {
        self.settle_plan(token, how);
    }

    fn must_write(&self, at: GuestOffset) -> bool {
        self.writer.as_ref().is_some_and(|w| w.blocks.doubts(self.layout.block_at(at)))
    }

    fn has_page(&self, key: MetaKey) -> bool {
        matches!(key, MetaKey::Page { table: L2, number } if self.pages.contains(number))
    }

    fn page_place(&self, key: MetaKey) -> std::result::Result<PagePlace, Failure> {
        let MetaKey::Page { table, number } = key else { return Err(Failure::Corrupt) };
        if table == REFCOUNTS {
            return self.refcount_page_place(number).ok_or(Failure::Corrupt);
        }
        let bytes = self.layout.page_bytes();
        let off = number.checked_mul(bytes).filter(|off| off + bytes <= self.known_end());
        let off = HostOffset(off.ok_or(Failure::Corrupt)?);
        Ok(PagePlace { file: self.file, off, len: self.pages.page_bytes() })
    }

    fn page_read(&self, key: MetaKey, bytes: &[u8]) -> std::result::Result<(), Failure> {
        match key {
            MetaKey::Page { table: L2, number } => {
                self.pages.insert(number, bytes);
                Ok(())
            }
            MetaKey::Page { table: REFCOUNTS, number } => {
                self.refcount_page_read(number, bytes);
                Ok(())
            }
            _ => Err(Failure::Corrupt),
        }
    }

    fn compose(&self, key: MetaKey, ops: &[MetaOp], out: &mut Vec<u8>) -> Result<(FileId, HostOffset)> {
        let at = match key {
            MetaKey::Page { table: L2, number } => self.compose_l2(number, ops, out)?,
            other => self.compose_other(other, ops, out)?,
        };
        Ok((self.file, at))
    }

    fn publish(&self, key: MetaKey, ops: &[MetaOp]) {
        match key {
            MetaKey::Page { table: L2, number } => self.publish_l2(number, ops),
            other => self.publish_other(other, ops),
        }
        if let MetaKey::Page { table: REFCOUNTS, number } = key {
            self.page_closed(number);
        }
    }

    fn begin(&self, modification: Uuid) -> Plan {
        self.begin_plan(modification)
    }

    fn end_needs(&self) -> Option<MetaKey> {
        self.close_needs()
    }

    fn end(&self) -> Plan {
        let plan = self.close_plan();
        plan.assert_ordered();
        plan
    }

    fn info(&self) -> ImageInfo {
        let header = self.header();
        ImageInfo {
            format: "qcow2",
            variant: if header.backing.is_some() { "diff" } else { "dynamic" },
            virtual_size: self.layout.disk_bytes,
            block_size: Some(self.layout.cluster_bytes()),
            version: Some(Self::version(&header)),
            parent_names: header.backing.iter().cloned().collect(),
            parent_format: header.backing_format.clone(),
            allocated_blocks: self.allocated,
            snapshots: self.snapshots.iter().map(Snapshot::info).collect(),
            notes: self.notes(&header),
            ..ImageInfo::default()
        }
    }
}
