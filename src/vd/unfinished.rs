//! Images whose key is being changed in place: a side file stands beside them until that is done.

use crate::error::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};

/// The file beside an image that says so, whatever link it was named by.
pub(crate) fn side_file(image: &Path) -> PathBuf {
    let image = &std::fs::canonicalize(image).unwrap_or_else(|_| image.to_path_buf());
    let mut name = image.file_name().unwrap_or_default().to_os_string();
    name.push(".recrypt");
    image.with_file_name(name)
}

/// Some of the image is encrypted with one key and the rest with another, or with none: nobody may use it.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if that is so.
pub(crate) fn refuse_if_unfinished(image: &Path) -> Result<()> {
    let side = side_file(image);
    match std::fs::symlink_metadata(&side) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("look whether it is there", e).at(&side)),
        Ok(_) => {
            let what =
                format!("its key was being changed when that was ended: {} has the rest", side.display());
            Err(Error::new(ErrorKind::Unsupported, what)
                .at(image)
                .hint("the same vdimg encrypt, decrypt or rekey --in-place completes it"))
        }
    }
}
