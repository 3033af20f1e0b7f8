//! The container's cache image: a persistent read cache for the images that nobody writes (docs/formats/vci.md).

use super::Container;
use super::backends::cache_backend;
use crate::error::{Error, Result, Status};
use crate::job::{CACHE_BLOCK_BYTES, create_cache, inspect_cache};
use std::fs;
use std::path::Path;

impl Container {
    /// Makes a cache image of at most `size_bytes` and opens it (`VDCreateCache`).
    ///
    /// # Errors
    /// [`Status::CacheAlreadyExists`] if one is open; as [`create_cache`] and [`Self::cache_open`]; no file is left then.
    pub fn create_cache(&mut self, backend: &str, path: &Path, size_bytes: u64) -> Result<()> {
        cache_backend(backend)?;
        self.refuse_second()?;
        self.live()?;
        create_cache(path, size_bytes, CACHE_BLOCK_BYTES)?;
        let opened = self.cache_open(backend, path);
        if opened.is_err() {
            let _ = fs::remove_file(path); // of no use to anybody
        }
        opened
    }

    /// Opens a cache image (`VDCacheOpen`). What it holds of other images, or of these before they were changed, is not used; VirtualBox refuses such
    /// a one instead ([`Status::CacheNotUpToDate`]).
    ///
    /// # Errors
    /// [`Status::CacheAlreadyExists`] if one is open; [`Status::NotOpened`]; [`Status::CacheNotFound`] if the file is none;
    /// [`crate::ErrorKind::InvalidArgument`] if the container's only image is written.
    pub fn cache_open(&mut self, backend: &str, path: &Path) -> Result<()> {
        cache_backend(backend)?;
        self.refuse_second()?;
        self.live()?;
        if inspect_cache(path)?.is_none() {
            return Err(Error::of(Status::CacheNotFound, "is no cache image").at(path));
        }
        if let Err(e) = self.shut() {
            self.forget();
            return Err(e);
        }
        self.cache = Some(path.to_path_buf());
        let Err(e) = self.start() else { return Ok(()) };
        self.cache = None;
        self.apart(|_| Ok(()))?;
        Err(e)
    }

    /// Closes the cache image; with `delete` its file is removed (`VDCacheClose`).
    ///
    /// # Errors
    /// [`Status::NotOpened`] if none is open; of closing, removing and opening the images again.
    pub fn cache_close(&mut self, delete: bool) -> Result<()> {
        let Some(path) = self.cache.clone() else {
            return Err(Error::of(Status::NotOpened, "no cache image is open in the container"));
        };
        self.apart(|this| {
            this.cache = None;
            match delete {
                true => fs::remove_file(&path).map_err(|e| Error::io("remove it", e).at(&path)),
                false => Ok(()),
            }
        })
    }

    /// The cache image that is open.
    pub fn cache_filename(&self) -> Option<&Path> {
        self.cache.as_deref()
    }

    fn refuse_second(&self) -> Result<()> {
        match &self.cache {
            Some(path) => {
                let what = "is the cache image of the container: it has at most one";
                Err(Error::of(Status::CacheAlreadyExists, what).at(path))
            }
            None => Ok(()),
        }
    }
}
