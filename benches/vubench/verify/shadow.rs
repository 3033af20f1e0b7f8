//! The model kept in a file between runs (`--shadow`).
use super::model::Model;
use super::pattern::words;
use std::io;

const MAGIC: u64 = 0x3277_6f64_6168_7376;
/// In the word of a unit's flags: changed since the last flush.
const DIRTY: u64 = 256;

impl Model {
    /// What makes a file that of this run and no other.
    fn identity(&self) -> [u64; 5] {
        let c = &self.c;
        [MAGIC, c.seed, c.offset, self.units.len() as u64, c.unit as u64]
    }

    pub(super) fn load(&mut self, path: &str) -> io::Result<()> {
        let raw = std::fs::read(path)?;
        let w: Vec<u64> = words(&raw).collect();
        let id = self.identity();
        if w.len() != id.len() + 1 + 4 * self.units.len() || w[..id.len()] != id {
            let text = "shadow file is of another run (seed, offset, size or unit differ)";
            return Err(io::Error::other(text));
        }
        self.generation = w[id.len()];
        for (i, c) in w[id.len() + 1..].chunks(4).enumerate() {
            let b = &mut self.units[i];
            (b.latest, b.durable, b.posted) = (c[0], c[1], c[2]);
            (b.flags, b.dirty) = (c[3] as u8, c[3] & DIRTY != 0);
            if b.dirty {
                self.dirty.push(i);
            }
        }
        Ok(())
    }

    /// Replaces the file as one, so that a run that is killed leaves the old one.
    pub(super) fn save(&self, path: &str) -> io::Result<()> {
        let mut v = self.identity().to_vec();
        v.push(self.generation);
        for b in &self.units {
            let flags = u64::from(b.flags) | if b.dirty { DIRTY } else { 0 };
            v.extend([b.latest, b.durable, b.posted, flags]);
        }
        let bytes: Vec<u8> = v.iter().flat_map(|x| x.to_le_bytes()).collect();
        let new = format!("{path}.new");
        std::fs::write(&new, bytes)?;
        std::fs::rename(&new, path)
    }
}
