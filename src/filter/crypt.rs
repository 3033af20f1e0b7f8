//! VirtualBox's disk encryption as a filter.

use super::{Cipher, Filter, Secret, Xts};
use crate::error::Result;
use crate::limits::SECTOR_BYTES;
use crate::map::GuestOffset;

/// AES-XTS over sectors, the tweak being the sector's number on the virtual disk: all images of a chain share the key, and what is
/// encrypted stays readable wherever in them it lies.
#[derive(Debug)]
pub struct Crypt {
    cipher: Cipher,
    xts: Xts,
}

impl Crypt {
    /// With the key of the data itself, as [`super::KeyStore::unlock`] gives it.
    ///
    /// # Errors
    /// If the key's length is none of AES-XTS.
    pub fn new(cipher: Cipher, key: &Secret) -> Result<Crypt> {
        Ok(Crypt { cipher, xts: Xts::new(key.bytes())? })
    }

    /// The cipher.
    pub fn cipher(&self) -> Cipher {
        self.cipher
    }
}

impl Filter for Crypt {
    fn name(&self) -> &'static str {
        "CRYPT"
    }

    fn on_write(&self, at: GuestOffset, bytes: &mut [u8]) {
        self.xts.encrypt_sectors(at.0 / SECTOR_BYTES, bytes);
    }

    fn on_read(&self, at: GuestOffset, bytes: &mut [u8]) {
        self.xts.decrypt_sectors(at.0 / SECTOR_BYTES, bytes);
    }
}
