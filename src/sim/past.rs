//! What each sector may hold: the guest's side of the promises.

/// The bytes of a sector with a value: the value and the sector's own number, all over. Value 0 is zeros.
pub fn fill(buf: &mut [u8], first: u64, value: u64) {
    for (sector, chunk) in (first..).zip(buf.chunks_mut(512)) {
        let word = if value == 0 { 0 } else { value << 24 | sector };
        chunk.chunks_mut(8).for_each(|w| w.copy_from_slice(&word.to_le_bytes()));
    }
}

/// The value of a sector's bytes; `None`: they are another sector's, torn, metadata, or nobody's.
pub fn value_of(sector: u64, got: &[u8]) -> Option<u64> {
    let (words, _) = got.as_chunks::<8>();
    let first = words[0];
    let word = u64::from_le_bytes(first);
    let own = word == 0 || word & 0xff_ffff == sector;
    (own && words.iter().all(|w| *w == first)).then_some(word >> 24)
}

/// What one sector may hold, and why.
#[derive(Clone, Debug)]
pub struct Past {
    /// What a read may return now.
    pub(super) may: Vec<u64>,
    /// What was asked to be written, in order, with the time it was asked.
    asked: Vec<(u64, u64)>,
    /// Writes that went well: when asked, when answered.
    done: Vec<(u64, u64)>,
    /// When the last write was asked that is durable because it was written through.
    synced: u64,
    /// A request on it is in flight.
    pub(super) busy: bool,
}

impl Past {
    /// A sector that durably holds a value.
    pub fn known(value: u64) -> Past {
        Past { may: vec![value], asked: vec![(0, value)], done: vec![(0, 0)], synced: 0, busy: false }
    }

    /// What may be there after everything answered before `time` was made durable.
    pub fn after_cut(&self, time: u64) -> Vec<u64> {
        let from = self.last_durable(time);
        self.asked.iter().filter(|(a, _)| *a >= from).map(|(_, v)| *v).collect()
    }

    fn last_durable(&self, time: u64) -> u64 {
        let before = self.done.iter().filter(|(_, d)| *d <= time).map(|(a, _)| *a).max();
        before.unwrap_or(0).max(self.synced)
    }

    /// Forgets what can no longer be seen after a cut.
    pub(super) fn forget_before(&mut self, time: u64) {
        let from = self.last_durable(time);
        self.asked.retain(|(a, _)| *a >= from);
        self.done.retain(|(a, _)| *a >= from);
    }

    /// Another program has put `value` here, without a sync.
    pub(super) fn changed_by_another(&mut self, value: u64) {
        self.may = vec![value];
        let last = self.asked.last().map_or(0, |a| a.0);
        self.asked.push((last, value));
    }

    pub(super) fn ask(&mut self, time: u64, value: u64) {
        self.busy = true;
        self.asked.push((time, value));
    }

    /// A write asked at `asked` has gone well.
    pub(super) fn wrote(&mut self, value: u64, asked: u64, now: u64) {
        self.may = vec![value];
        self.done.push((asked, now));
    }

    /// That write is durable, too.
    pub(super) fn wrote_through(&mut self, asked: u64) {
        self.synced = self.synced.max(asked);
    }

    /// After a new start it was seen to hold a value, which is as durable as what came before.
    pub(super) fn seen(&mut self, value: u64, time: u64) {
        self.asked.push((time, value));
        self.done.push((time, time));
        self.may = vec![value];
    }

    /// When anything last happened to it.
    pub(super) fn latest(&self) -> u64 {
        let answered = self.done.iter().map(|d| d.1);
        self.asked.iter().map(|a| a.0).chain(answered).max().unwrap_or(0)
    }
}
