//! `vdimg create-cache`, and `vdimg info` of a cache image.

use super::args::{CreateCache, Output};
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;
use vdblk::Result;
use vdblk::job::{InspectedCache, create_cache, human_bytes};

pub(crate) fn create(args: &CreateCache) -> Result<u8> {
    create_cache(&args.file, args.size, args.block)?;
    Ok(0)
}

/// What `--output json` prints. The names are a promise.
#[derive(Serialize)]
struct Json {
    format: &'static str,
    file: String,
    file_size: u64,
    allocated_size: u64,
    block_size: u64,
    blocks: u64,
    /// None where that is not known.
    kept_blocks: Option<u64>,
    /// A session is under way, or was not ended in order.
    unclean: bool,
    sessions: u64,
    /// Of the disk whose blocks these are; 0 before the first session.
    disk_size: u64,
    base_uuid: Option<String>,
    base_modification_uuid: Option<String>,
}

/// The text of `info`.
pub(crate) fn describe(file: &Path, cache: &InspectedCache, output: Output) -> String {
    let (h, named) = (&cache.header, |u: uuid::Uuid| (!u.is_nil()).then(|| u.to_string()));
    let json = Json {
        format: "vci",
        file: file.display().to_string(),
        file_size: cache.file_bytes,
        allocated_size: cache.allocated_bytes,
        block_size: h.shape.block_bytes,
        blocks: h.shape.places,
        kept_blocks: cache.kept,
        unclean: h.unclean,
        sessions: h.generation,
        disk_size: h.base.disk_bytes,
        base_uuid: named(h.base.uuid),
        base_modification_uuid: named(h.base.modification),
    };
    match output {
        Output::Json => serde_json::to_string_pretty(&json).expect("numbers and texts") + "\n",
        Output::Human => human(&json),
    }
}

fn human(c: &Json) -> String {
    let mut t = String::new();
    // Writing to a String does not fail.
    let _ = writeln!(t, "file: {}\nformat: cache image (vci)", c.file);
    let _ = writeln!(t, "size: {}, {} on disk", human_bytes(c.file_size), human_bytes(c.allocated_size));
    let _ = writeln!(t, "blocks: {} of {}", c.blocks, human_bytes(c.block_size));
    let _ = match c.kept_blocks {
        Some(n) => writeln!(t, "kept: {n} blocks"),
        None if c.unclean => writeln!(t, "kept: not known; it is in use, or its next session begins empty"),
        None => writeln!(t, "kept: nothing that can be used; vdimg check tells why"),
    };
    if c.disk_size > 0 {
        let uuid = c.base_uuid.as_ref().map_or_else(String::new, |u| format!(", base {u}"));
        let _ = writeln!(t, "caches: a disk of {}{uuid}", human_bytes(c.disk_size));
    }
    t
}
