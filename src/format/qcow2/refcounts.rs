//! Refcounts: how they lie in their blocks, and the blocks and the table that grow along with the file.

use super::super::bytes::put_be64;
use super::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use super::layout::{Layout, OFFSET};
use crate::error::{Error, ErrorKind, Result};
use crate::map::{ByteSource, HostOffset};
use std::collections::{BTreeMap, BTreeSet};

/// Pages of refcounts in which clusters are used again.
const MAX_ADOPTED_PAGES: usize = 64;
/// Refcount blocks looked at for clusters that the file does not have.
const MAX_COUNTED_BYTES: u64 = 64 << 20;

/// A refcount in the bytes of a block or of a page of one.
pub(super) fn get(bytes: &[u8], index: usize, order: u32) -> u64 {
    if order < 3 {
        let per_byte = 8 >> order;
        let bits = 1 << order;
        return u64::from(bytes[index / per_byte] >> (index % per_byte * bits) & ((1 << bits) - 1));
    }
    let width = 1 << (order - 3);
    bytes[index * width..(index + 1) * width].iter().fold(0, |sum, b| sum << 8 | u64::from(*b))
}

/// Puts one there.
pub(super) fn set(bytes: &mut [u8], index: usize, order: u32, value: u64) {
    if order < 3 {
        let per_byte = 8 >> order;
        let (bits, shift) = (1 << order, index % per_byte * (1 << order));
        let mask = ((1u8 << bits) - 1) << shift;
        let value = u8::try_from(value).expect("a refcount of few bits") << shift & mask;
        bytes[index / per_byte] = bytes[index / per_byte] & !mask | value;
        return;
    }
    let width = 1 << (order - 3);
    bytes[index * width..(index + 1) * width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

/// Clusters as indices of memory and of tables: refcount tables are bounded.
fn index(n: u64) -> usize {
    usize::try_from(n).expect("bounded by MAX_REFCOUNT_TABLE_BYTES")
}

/// Clusters as they are numbered in a file that is written.
fn number(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// The refcount table as the kernel has accepted it, and what an extension under way will make of it.
#[derive(Debug)]
pub(super) struct Refcounts {
    layout: Layout,
    at: u64,
    clusters: u32,
    /// Where the blocks are; 0: nowhere.
    table: Vec<u64>,
    /// Clusters that the file had when it was opened, or that something said it had: what lies behind has the refcounts we
    /// gave it.
    opened: u32,
    /// The page that has the refcount of the cluster at `opened`, as it was then but for what was adopted.
    first_page: Vec<u8>,
    /// Pages as they were when the image was opened, with 1 for what was adopted.
    adopted: BTreeMap<u64, Vec<u8>>,
    /// Clusters from `opened` up to here have 1.
    announced: u32,
    growth: Growth,
    /// Entries that the disk may have otherwise.
    doubtful: BTreeSet<usize>,
    /// The header may name another table.
    header_doubtful: bool,
    /// Our own clusters behind `opened` that are blocks or the table.
    own: BTreeSet<u32>,
    /// Clusters in which an extension that failed may have written blocks or a table: the next one takes fewer, or others.
    soiled: BTreeSet<u32>,
}

/// Clusters up to the last one behind the file's end that has a refcount: something may name it, so that nothing new must come
/// to lie there. A file that was cut has such, and one whose growth a power cut took back.
fn counted_clusters(source: &dyn ByteSource, table: &[u64], layout: &Layout) -> Result<u64> {
    let (per_block, clusters) = (layout.refcounts_per_block(), layout.file_clusters());
    let first = clusters / per_block;
    let behind: Vec<_> = (0u64..).zip(table).filter(|(n, at)| *n >= first && **at != 0).collect();
    if behind.len() as u64 * layout.cluster_bytes() > MAX_COUNTED_BYTES {
        let what = format!("{} refcount blocks are for clusters behind the file's end", behind.len());
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    let mut bytes = vec![0; index(layout.cluster_bytes())];
    let mut counted = 0;
    for (n, at) in behind {
        source.read_at(HostOffset(*at), &mut bytes)?;
        let last = (0..index(per_block)).rev().find(|i| get(&bytes, *i, layout.refcount_order) != 0);
        counted = last.map_or(counted, |i| n * per_block + i as u64 + 1);
    }
    Ok(counted)
}

/// What an extension adds to the tables.
#[derive(Clone, Debug, Default)]
pub(super) struct Growth {
    /// New blocks: their number, and the cluster of each.
    pub(super) blocks: Vec<(usize, u32)>,
    /// A new table: its first cluster, and how many.
    pub(super) table: Option<(u32, u32)>,
    /// The first cluster that is left for data.
    rest: u64,
}

impl Refcounts {
    /// Reads the table. Clusters below `least` may be named by something.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Limit`] if it cannot be relied on.
    pub(super) fn load(
        source: &dyn ByteSource,
        header: &Header,
        layout: &Layout,
        least: u64,
    ) -> Result<Self> {
        let (at, clusters) = (header.refcount_table_at(), header.refcount_table_clusters());
        let bytes = u64::from(clusters) * layout.cluster_bytes();
        if clusters == 0 || bytes > MAX_REFCOUNT_TABLE_BYTES {
            let what = format!("the refcount table has {clusters} clusters");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        layout.check_table("refcount table", at, bytes)?;
        let mut raw = vec![0; index(bytes)];
        source.read_at(HostOffset(at), &mut raw)?;
        let table: Vec<_> = raw.as_chunks::<8>().0.iter().map(|b| u64::from_be_bytes(*b)).collect();
        for (n, block) in table.iter().enumerate().filter(|(_, b)| **b != 0) {
            let inside =
                block.checked_add(layout.cluster_bytes()).is_some_and(|end| end <= layout.file_bytes);
            if *block & !OFFSET != 0 || !block.is_multiple_of(layout.cluster_bytes()) || !inside {
                let what = format!("refcount block {n} at byte {block} is no cluster of the file");
                return Err(Error::new(ErrorKind::Corrupt, what));
            }
        }
        let most = layout.refcounts_per_block().saturating_mul(MAX_REFCOUNT_TABLE_BYTES / 8);
        let counted = counted_clusters(source, &table, layout)?;
        let opened = layout.file_clusters().max(counted).max(least);
        let opened = u32::try_from(opened).ok().filter(|n| u64::from(*n) < most);
        let Some(opened) = opened.filter(|n| *n < u32::MAX / 2) else {
            let what =
                format!("the file has {} clusters, which is too many to be written", layout.file_clusters());
            return Err(Error::new(ErrorKind::Limit, what));
        };
        let mut counts = Refcounts {
            layout: *layout,
            at,
            clusters,
            table,
            opened,
            first_page: vec![0; index(layout.page_bytes())],
            adopted: BTreeMap::new(),
            announced: opened,
            growth: Growth::default(),
            doubtful: BTreeSet::new(),
            header_doubtful: false,
            own: BTreeSet::new(),
            soiled: BTreeSet::new(),
        };
        if let Some(page_at) = counts.page_at(counts.page_of(opened)) {
            source.read_at(page_at, &mut counts.first_page)?;
        }
        Ok(counts)
    }

    /// Has 1 written for these clusters, which nothing names, when the first change begins. The answer are those for which there is a
    /// block.
    ///
    /// # Errors
    /// Of reading.
    pub(super) fn adopt(
        &mut self,
        source: &dyn ByteSource,
        clusters: BTreeSet<u32>,
    ) -> Result<BTreeSet<u32>> {
        let mut adopted = BTreeSet::new();
        for cluster in clusters {
            let page = self.page_of(cluster);
            let Some(at) = self.page_at(page) else { continue };
            if !self.adopted.contains_key(&page) {
                if self.adopted.len() == MAX_ADOPTED_PAGES {
                    break;
                }
                let mut bytes = vec![0; index(self.layout.page_bytes())];
                source.read_at(at, &mut bytes)?;
                self.adopted.insert(page, bytes);
            }
            let (first, order) = (page * self.per_page(), self.layout.refcount_order);
            if let Some(bytes) = self.adopted.get_mut(&page) {
                set(bytes, index(u64::from(cluster) - first), order, 1);
                adopted.insert(cluster);
            }
        }
        if let Some(bytes) = self.adopted.get(&self.page_of(self.opened)) {
            self.first_page.clone_from(bytes);
        }
        Ok(adopted)
    }

    /// Pages of refcounts that are to be written before the first change.
    pub(super) fn adopted_pages(&self) -> impl Iterator<Item = u64> {
        self.adopted.keys().copied()
    }

    pub(super) fn opened(&self) -> u32 {
        self.opened
    }

    pub(super) fn announced(&self) -> u32 {
        self.announced
    }

    /// Most clusters that a table of the largest size counts.
    pub(super) fn max_clusters(&self) -> u32 {
        let most = self.layout.refcounts_per_block() * (MAX_REFCOUNT_TABLE_BYTES / 8);
        u32::try_from(most).unwrap_or(u32::MAX).min(u32::MAX / 2)
    }

    pub(super) fn is_own(&self, cluster: u32) -> bool {
        self.own.contains(&cluster)
    }

    /// It is none of our tables, and may hold what was written for one.
    pub(super) fn is_soiled(&self, cluster: u32) -> bool {
        self.soiled.contains(&cluster) && !self.is_own(cluster)
    }

    /// Refcounts of one page.
    pub(super) fn per_page(&self) -> u64 {
        (self.layout.page_bytes() * 8) >> self.layout.refcount_order
    }

    pub(super) fn page_of(&self, cluster: u32) -> u64 {
        u64::from(cluster) / self.per_page()
    }

    fn pages_per_block(&self) -> u64 {
        self.layout.cluster_bytes() / self.layout.page_bytes()
    }

    /// Where a page of refcounts is, by the table or by what is about to be in it.
    pub(super) fn page_at(&self, page: u64) -> Option<HostOffset> {
        let block = index(page / self.pages_per_block());
        let known = self.table.get(block).copied().filter(|at| *at != 0);
        let coming = || self.growth.blocks.iter().find(|(n, _)| *n == block).map(|(_, c)| self.offset(*c).0);
        let at = known.or_else(coming)?;
        Some(HostOffset(at + page % self.pages_per_block() * self.layout.page_bytes()))
    }

    fn offset(&self, cluster: u32) -> HostOffset {
        HostOffset(u64::from(cluster) << self.layout.cluster_bits)
    }

    /// Whether block `n` exists.
    fn has_block(&self, n: u64) -> bool {
        self.table.get(index(n)).is_some_and(|at| *at != 0)
    }

    /// What the tables need for clusters up to `to`, of which those from `from` on are new: the tables take the first of
    /// them.
    fn growth(&self, from: u32, to: u32) -> Growth {
        let per_block = self.layout.refcounts_per_block();
        let (first, last) = (u64::from(from) / per_block, u64::from(to - 1) / per_block);
        // An extension that failed half-way may have made some of them ours already.
        let row = |from: u64, n: u64| {
            let is_free = |first: &u64| (*first..*first + n).all(|c| !self.is_own(number(c)));
            (from..).find(is_free).expect("fewer are ours than there are numbers")
        };
        let mut next = u64::from(from);
        let mut blocks = Vec::new();
        for n in (first..=last).filter(|n| !self.has_block(*n)) {
            let at = row(next, 1);
            blocks.push((index(n), number(at)));
            next = at + 1;
        }
        let needed = ((last + 1) * 8).div_ceil(self.layout.cluster_bytes());
        let table = (needed > u64::from(self.clusters)).then(|| {
            let most = MAX_REFCOUNT_TABLE_BYTES / self.layout.cluster_bytes();
            let clusters = needed.max(u64::from(self.clusters) * 2).min(most.max(needed));
            let at = row(next, clusters);
            next = at + clusters;
            (number(at), number(clusters))
        });
        Growth { blocks, table, rest: row(next, 1) }
    }

    /// Fewest clusters from `from` on with which an extension leaves some for data.
    pub(super) fn least_extension(&self, from: u32) -> u32 {
        let mut least = 1;
        for _ in 0..8 {
            let to = from.saturating_add(least);
            let needed = u32::try_from(self.growth(from, to).rest + 1 - u64::from(from)).unwrap_or(u32::MAX);
            if needed <= least {
                break;
            }
            least = needed;
        }
        least
    }

    /// Begins an extension. What the one before has begun and not finished is in doubt from now on.
    pub(super) fn begin_extension(&mut self, from: u32, to: u32) -> Growth {
        self.abandon();
        self.growth = self.growth(from, to);
        self.growth.clone()
    }

    /// No extension is under way any more.
    pub(super) fn abandon(&mut self) {
        let before = std::mem::take(&mut self.growth);
        let tables = before.table.into_iter().flat_map(|(first, n)| first..first + n);
        let written = before.blocks.iter().map(|(_, cluster)| *cluster).chain(tables);
        self.soiled.extend(written.filter(|c| !self.own.contains(c)));
        let unwritten = before.blocks.into_iter().map(|(n, _)| n).filter(|n| !self.has_block(*n as u64));
        let unwritten: Vec<_> = unwritten.collect();
        self.doubtful.extend(unwritten);
        self.header_doubtful |= before.table.is_some_and(|(at, _)| self.offset(at).0 != self.at);
    }

    /// Pages to be written so that the clusters `from..to` have 1: those that hold one, and all of new blocks.
    pub(super) fn pages_for(&self, from: u32, to: u32) -> Vec<u64> {
        let mut pages: BTreeSet<u64> = (self.page_of(from)..=self.page_of(to - 1)).collect();
        for (n, _) in &self.growth.blocks {
            let first = *n as u64 * self.pages_per_block();
            pages.extend(first..first + self.pages_per_block());
        }
        pages.into_iter().collect()
    }

    /// Entries of the table that have to be written: new ones, and those in doubt.
    pub(super) fn entries_to_write(&self) -> Vec<(usize, u64)> {
        let new = self.growth.blocks.iter().map(|(n, c)| (*n, self.offset(*c).0));
        let old = self.doubtful.iter().filter(|n| !self.growth.blocks.iter().any(|(m, _)| m == *n));
        let capacity = index(u64::from(self.clusters) * self.layout.cluster_bytes() / 8);
        let known = |n: &usize| (*n < capacity).then(|| (*n, self.table.get(*n).copied().unwrap_or(0)));
        new.chain(old.filter_map(known)).collect()
    }

    pub(super) fn header_is_doubtful(&self) -> bool {
        self.header_doubtful
    }

    /// A page of refcounts, where clusters up to `announced` have 1.
    pub(super) fn compose_page(&self, page: u64, announced: u32, out: &mut Vec<u8>) {
        let base = out.len();
        if page == self.page_of(self.opened) {
            out.extend_from_slice(&self.first_page);
        } else if let Some(bytes) = self.adopted.get(&page) {
            out.extend_from_slice(bytes);
        } else {
            out.resize(base + index(self.layout.page_bytes()), 0);
        }
        let first = page * self.per_page();
        let from = u64::from(self.opened).max(first);
        let to = u64::from(announced.max(self.announced)).min(first + self.per_page());
        for n in from..to.max(from) {
            set(&mut out[base..], index(n - first), self.layout.refcount_order, 1);
        }
    }

    /// Clusters up to there have 1.
    pub(super) fn announce(&mut self, to: u32) {
        self.announced = self.announced.max(to);
    }

    /// A page of the table as it is, with these entries over it; and where it goes.
    pub(super) fn compose_table(
        &self,
        page: u64,
        entries: &[(usize, u64)],
        out: &mut Vec<u8>,
    ) -> (HostOffset, usize) {
        let base = out.len();
        let at = page * self.layout.page_bytes();
        self.table_bytes(at, out);
        for (n, value) in entries {
            put_be64(out, base + n * 8 - index(at), *value);
        }
        (HostOffset(self.at + at), base)
    }

    fn table_bytes(&self, at: u64, out: &mut Vec<u8>) {
        let first = index(at / 8);
        let count = index(self.layout.page_bytes() / 8);
        out.extend(
            (first..first + count).flat_map(|n| self.table.get(n).copied().unwrap_or(0).to_be_bytes()),
        );
    }

    /// A page of the new table, with the new blocks in it; and where it goes.
    pub(super) fn compose_new_table(&self, page: u64, out: &mut Vec<u8>) -> Option<HostOffset> {
        let (base, at) = (out.len(), page * self.layout.page_bytes());
        let (cluster, _) = self.growth.table?;
        self.table_bytes(at, out);
        for (n, c) in &self.growth.blocks {
            let entry = *n as u64 * 8;
            if (at..at + self.layout.page_bytes()).contains(&entry) {
                put_be64(out, base + index(entry - at), self.offset(*c).0);
            }
        }
        Some(HostOffset(self.offset(cluster).0 + at))
    }

    /// An entry of the table was written.
    pub(super) fn set_entry(&mut self, n: usize, value: u64) {
        if self.table.len() <= n {
            self.table.resize(n + 1, 0);
        }
        self.table[n] = value;
        self.doubtful.remove(&n);
        self.own.extend(u32::try_from(value >> self.layout.cluster_bits).ok().filter(|c| *c >= self.opened));
    }

    /// Where the header is to say that the table is, if an extension moves it.
    pub(super) fn new_table(&self) -> (u64, u32) {
        self.growth.table.map_or((self.at, self.clusters), |(c, n)| (self.offset(c).0, n))
    }

    /// The header that names the table at `at` was written: the clusters of the one before.
    pub(super) fn moved(&mut self, at: u64) -> Option<(u32, u32)> {
        self.header_doubtful = false;
        let (new_at, clusters) = self.new_table();
        if at == self.at || at != new_at {
            return None;
        }
        let old = (u32::try_from(self.at >> self.layout.cluster_bits).ok()?, self.clusters);
        (self.at, self.clusters) = (at, clusters);
        let first = u32::try_from(at >> self.layout.cluster_bits).ok()?;
        self.own.extend(first..first + clusters);
        for (n, c) in std::mem::take(&mut self.growth.blocks) {
            self.set_entry(n, self.offset(c).0);
        }
        for n in old.0..old.0 + old.1 {
            self.own.remove(&n);
        }
        Some(old)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn refcounts_of_any_width_lie_side_by_side(order in 0u32..7, sets in proptest::collection::vec((0usize..64, any::<u64>()), 1..50)) {
            let mut bytes = vec![0; 512];
            let mut model = [0u64; 64];
            let mask = u64::MAX >> (64 - (1u32 << order));
            for (i, v) in sets {
                set(&mut bytes, i, order, v & mask);
                model[i] = v & mask;
            }
            for (i, v) in model.iter().enumerate() {
                prop_assert_eq!(get(&bytes, i, order), *v);
            }
        }
    }

    /// Bit 0 is the lowest of a byte, and wider ones are big endian.
    #[test]
    fn refcounts_lie_as_the_specification_says() {
        let mut bytes = [0; 16];
        set(&mut bytes, 1, 0, 1);
        set(&mut bytes, 5, 1, 3);
        set(&mut bytes, 2, 4, 0x0102);
        assert_eq!(bytes[..6], [0b10, 0b1100, 0, 0, 1, 2]);
    }
}
