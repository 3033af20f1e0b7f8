//! A cache image beneath the top of simulated images, and the judge of what a moment leaves of it: whatever a next process
//! would take over from it has to be what the images show.

use super::{Bytes, Images, Rng, SimFile};
use crate::error::Result;
use crate::format::vci::{Base, Header, NO_BLOCK, Shape};
use crate::map::FileId;
use crate::vd::{Cache, Scope};
use std::sync::Arc;
use uuid::Uuid;

/// The file of a cache image, and what its disk says of the images beneath.
#[derive(Clone, Debug)]
pub struct CacheFile {
    /// The file.
    pub file: Arc<SimFile>,
    /// The images it is about.
    pub base: Base,
}

impl CacheFile {
    /// An empty one for a disk of `disk_bytes`, with so many places for blocks of 4 KiB.
    pub fn new(disk_bytes: u64, places: u64) -> CacheFile {
        let shape = Shape { block_bytes: 4096, places };
        let mut bytes = Bytes::default();
        bytes.set_len(shape.file_bytes());
        bytes.write(0, &Header::new(shape).to_bytes());
        let base = Base { uuid: Uuid::nil(), modification: Uuid::nil(), disk_bytes, identity: 1 };
        CacheFile { file: SimFile::new("cache", bytes), base }
    }

    /// A process begins its session; its file has the number behind those of the images.
    pub(super) fn begin(&self, images: &Images) -> Result<Option<Cache>> {
        self.begin_on(&self.file, images)
    }

    fn begin_on(&self, file: &Arc<SimFile>, images: &Images) -> Result<Option<Cache>> {
        let below = images.files().len() - images.top.all().len();
        let counts = std::iter::once(images.top.all().len()).chain(std::iter::repeat_n(1, below));
        let counts: Vec<_> = counts.collect();
        let scope = Scope::of(counts.iter().copied(), false).expect("images with a parent");
        let id = FileId(u16::try_from(images.files().len()).expect("few"));
        Cache::begin((file.clone(), id, None), self.base, scope)
    }

    /// What is wrong with these bytes of it, if a process begins with them: a block it would show that is not `beneath`'s.
    pub fn wrong(&self, bytes: Bytes, images: &Images, beneath: &[u8]) -> Option<String> {
        let file = SimFile::new("cache", bytes.clone());
        let cache = match self.begin_on(&file, images) {
            Ok(cache) => cache?,
            Err(e) => return Some(format!("does not open: {e}")),
        };
        let entries = cache.entries().enumerate().filter(|(_, block)| *block != NO_BLOCK);
        for (place, block) in entries {
            let at = usize::try_from(block * 4096).expect("a small disk");
            let mut kept = vec![0; 4096];
            bytes.read(cache.place_at(place as u64).0, &mut kept);
            if beneath.get(at..at + 4096) != Some(&kept[..]) {
                return Some(format!("place {place} holds other bytes than block {block} has beneath it"));
            }
        }
        None
    }

    /// The same of what every moment since the last call may have left, some of the many for each.
    pub fn wrong_after_cuts(
        &self,
        images: &Images,
        beneath: &[u8],
        states: u32,
        rng: &mut Rng,
    ) -> Option<String> {
        let cuts = self.file.take_cuts();
        let all = cuts.iter().flat_map(|cut| (0..states).map(move |_| cut));
        all.into_iter().find_map(|cut| self.wrong(cut.random_state(rng), images, beneath))
    }
}
