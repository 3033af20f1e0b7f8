//! VDIs put together byte by byte, in every form of header, without the code under test.

/// Form of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Version 0.x: table behind the header, data behind the table.
    V0,
    /// Version 1.1 without logical geometry.
    Old,
    /// Version 1.1 as today.
    New,
}

/// What to build.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) form: Form,
    /// 1 dynamic, 2 fixed, 3 undo, 4 diff.
    pub(crate) kind: u32,
    pub(crate) size: u64,
    pub(crate) block: u64,
    pub(crate) extra: u64,
    /// Space between header and table, table and data.
    pub(crate) gaps: (u64, u64),
    /// What each guest block's entry says; shorter than the disk: the rest is free.
    pub(crate) entries: Vec<u32>,
    pub(crate) count: u32,
    /// Bytes behind the last place in use.
    pub(crate) slack: u64,
}

impl Spec {
    pub(crate) fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    fn header_end(&self) -> u64 {
        match self.form {
            Form::V0 => 420,
            Form::Old => 456,
            Form::New => 472,
        }
    }

    pub(crate) fn table_at(&self) -> u64 {
        self.header_end() + if self.form == Form::V0 { 0 } else { self.gaps.0 }
    }

    pub(crate) fn data_at(&self) -> u64 {
        self.table_at() + 4 * self.blocks() + if self.form == Form::V0 { 0 } else { self.gaps.1 }
    }

    fn extra(&self) -> u64 {
        if self.form == Form::V0 { 0 } else { self.extra }
    }

    pub(crate) fn place_at(&self, place: u32) -> u64 {
        self.data_at() + u64::from(place) * (self.block + self.extra()) + self.extra()
    }

    /// The file; places hold `fill(place)` in every byte, gaps and extra bytes 0xcc.
    pub(crate) fn build(&self, fill: impl Fn(u32) -> u8) -> Vec<u8> {
        let mut f = vec![0xcc; self.data_at() as usize];
        f[..64].fill(b'x');
        f[0x40..0x44].copy_from_slice(&0xbeda_107fu32.to_le_bytes());
        let version: u32 = if self.form == Form::V0 { 2 } else { 0x0001_0001 };
        f[0x44..0x48].copy_from_slice(&version.to_le_bytes());
        let header = self.header();
        f[72..72 + header.len()].copy_from_slice(&header);
        for b in 0..self.blocks() {
            let entry = self.entries.get(b as usize).copied().unwrap_or(u32::MAX);
            let at = (self.table_at() + 4 * b) as usize;
            f[at..at + 4].copy_from_slice(&entry.to_le_bytes());
        }
        let places = self.entries.iter().filter(|e| **e < u32::MAX - 1).max().map_or(0, |m| m + 1);
        for p in 0..places {
            f.resize(self.place_at(p) as usize, 0xcc);
            f.resize((self.place_at(p) + self.block) as usize, fill(p));
        }
        f.resize(f.len() + self.slack as usize, 0xdd);
        f
    }

    fn header(&self) -> Vec<u8> {
        let mut h = Vec::new();
        let mut put = |v: u32| h.extend(v.to_le_bytes());
        if self.form != Form::V0 {
            put(if self.form == Form::Old { 384 } else { 400 });
        }
        put(self.kind);
        put(0);
        let comment_end = h.len() + 256;
        h.extend(b"a comment \xff\xfe of bytes");
        h.resize(comment_end, 0);
        let mut put = |v: u32| h.extend(v.to_le_bytes());
        if self.form != Form::V0 {
            put(self.table_at() as u32);
            put(self.data_at() as u32);
        }
        [10, 16, 63, 512].into_iter().for_each(&mut put);
        if self.form != Form::V0 {
            put(0);
        }
        h.extend(self.size.to_le_bytes());
        let mut put = |v: u32| h.extend(v.to_le_bytes());
        put(self.block as u32);
        if self.form != Form::V0 {
            put(self.extra as u32);
        }
        put(self.blocks() as u32);
        put(self.count);
        h.extend([0x11; 16]);
        h.extend([0x22; 16]);
        h.extend([if self.kind >= 3 { 0x33 } else { 0 }; 16]);
        if self.form != Form::V0 {
            h.extend([if self.kind >= 3 { 0x44 } else { 0 }; 16]);
        }
        if self.form == Form::New {
            [20u32, 255, 63, 512].into_iter().for_each(|v| h.extend(v.to_le_bytes()));
        }
        h
    }
}
