//! Who is changing what. Only changes of metadata take claims: reads and writes to allocated blocks pass by.

use super::BlockIndex;
use std::collections::{HashMap, VecDeque, hash_map::Entry};
use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;

const SHARDS: usize = 16;

/// What a claim is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClaimKey {
    /// A unit of allocation of the image with this number in the chain's life.
    Block(u32, BlockIndex),
    /// A piece of a file that is smaller than the device can write: read, changed and written under the claim.
    Host(super::FileId, u64),
}

/// Someone who waits: a slot of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Waiter {
    /// Number of the channel in its disk.
    pub channel: u16,
    /// Its slot.
    pub slot: u16,
}

/// All claims of a disk. First come, first served.
#[derive(Debug)]
pub struct Claims {
    shards: [Mutex<HashMap<ClaimKey, VecDeque<Waiter>>>; SHARDS],
    hash: RandomState,
}

impl Default for Claims {
    fn default() -> Self {
        Claims { shards: std::array::from_fn(|_| Mutex::default()), hash: RandomState::new() }
    }
}

impl Claims {
    fn shard(&self, key: ClaimKey) -> &Mutex<HashMap<ClaimKey, VecDeque<Waiter>>> {
        let n = usize::try_from(self.hash.hash_one(key) % SHARDS as u64).unwrap_or(0);
        &self.shards[n]
    }

    /// Takes the claim, or queues `who` for it: true if it is held now.
    pub fn take(&self, key: ClaimKey, who: Waiter) -> bool {
        let mut map = self.shard(key).lock().expect("claims lock");
        match map.entry(key) {
            Entry::Vacant(v) => {
                v.insert(VecDeque::new());
                true
            }
            Entry::Occupied(mut o) => {
                debug_assert!(!o.get().contains(&who), "{who:?} waits twice for {key:?}");
                o.get_mut().push_back(who);
                false
            }
        }
    }

    /// Gives the claim up. It passes to the one who has waited longest; wake that one: it holds the claim.
    ///
    /// # Panics
    /// If nobody holds it.
    pub fn release(&self, key: ClaimKey) -> Option<Waiter> {
        let mut map = self.shard(key).lock().expect("claims lock");
        let queue = map.get_mut(&key).expect("released a claim nobody holds");
        let next = queue.pop_front();
        if next.is_none() {
            map.remove(&key);
        }
        next
    }

    /// Claims held at the moment.
    pub fn held(&self) -> usize {
        self.shards.iter().map(|s| s.lock().expect("claims lock").len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_pass_in_order() {
        let c = Claims::default();
        let k = ClaimKey::Block(0, BlockIndex(7));
        let w = |slot| Waiter { channel: 0, slot };
        assert!(c.take(k, w(1)));
        assert!(!c.take(k, w(2)));
        assert!(!c.take(k, w(3)));
        assert!(c.take(ClaimKey::Block(1, BlockIndex(7)), w(2)));
        assert_eq!(c.release(k), Some(w(2)));
        assert_eq!(c.release(k), Some(w(3)));
        assert_eq!(c.release(k), None);
        assert!(c.take(k, w(4)));
        assert_eq!(c.held(), 2);
    }
}
