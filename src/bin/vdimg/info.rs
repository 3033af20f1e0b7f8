//! `vdimg info`.

use super::args::{Info, Output};
use super::cache;
use super::terminal::print;
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;
use uuid::Uuid;
use vdblk::Result;
use vdblk::format::Chs;
use vdblk::job::{Inspected, human_bytes, inspect_cache, inspect_image_with};
use vdblk::map::{DeviceType, ImageInfo, Region, SnapshotInfo};
use vdblk::vd::{DiskOptions, ImageSpec, OpenDisk, open_disk};

/// What `--output json` prints. The names are a promise.
#[derive(Serialize)]
struct Json<'a> {
    format: &'a str,
    variant: &'a str,
    /// hdd, dvd or floppy.
    device_type: &'a str,
    virtual_size: u64,
    file_size: u64,
    block_size: Option<u64>,
    allocated_blocks: Option<u64>,
    uuid: Option<String>,
    modification_uuid: Option<String>,
    parent_uuid: Option<String>,
    parent_modification_uuid: Option<String>,
    /// A VMDK's.
    parent_content_id: Option<u32>,
    /// What the image calls its parent's file.
    parent_names: &'a [String],
    comment: Option<&'a str>,
    /// What is odd about it although nothing is in danger.
    notes: &'a [String],
    geometry: Option<Geometry>,
    /// What a BIOS uses.
    logical_geometry: Option<Geometry>,
    file: String,
    version: Option<&'a str>,
    /// Internal snapshots, in the image's order.
    snapshots: Vec<JsonSnapshot<'a>>,
    /// What is on a CD, in the disk's order.
    regions: Vec<JsonRegion>,
    /// Top first; none where a parent was not found or not good.
    chain: Option<Vec<Link>>,
    /// Why there is none.
    chain_error: Option<String>,
}

/// An internal snapshot.
#[derive(Serialize)]
struct JsonSnapshot<'a> {
    id: &'a str,
    name: &'a str,
    /// UTC.
    date: String,
    date_sec: u32,
    vm_state_size: u64,
    virtual_size: u64,
}

impl<'a> JsonSnapshot<'a> {
    fn new(s: &'a SnapshotInfo) -> Self {
        JsonSnapshot {
            id: &s.id,
            name: &s.name,
            date: date(s.seconds),
            date_sec: s.seconds,
            vm_state_size: s.state_bytes,
            virtual_size: s.disk_bytes,
        }
    }
}

/// A stretch of a CD, in blocks.
#[derive(Serialize)]
struct JsonRegion {
    start: u64,
    blocks: u64,
    block_size: u32,
    data_size: u32,
    form: &'static str,
}

impl JsonRegion {
    fn new(r: &Region) -> Self {
        JsonRegion {
            start: r.start,
            blocks: r.blocks,
            block_size: r.block_bytes,
            data_size: r.data_bytes,
            form: r.form.name(),
        }
    }
}

/// Seconds since 1970 as date and time, UTC.
fn date(seconds: u32) -> String {
    let (days, rest) = (i64::from(seconds / 86400), seconds % 86400);
    // Years begin in March here, so that the leap day is the last of one; 400 of them have 146,097 days.
    let since = days + 719_468;
    let (era, day) = (since / 146_097, since % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + next;
    let (hours, minutes, seconds) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hours:02}:{minutes:02}:{seconds:02} UTC")
}

/// An image of the chain.
#[derive(Serialize)]
struct Link {
    file: String,
    format: &'static str,
    version: Option<String>,
    variant: &'static str,
    virtual_size: u64,
    uuid: Option<String>,
    modification_uuid: Option<String>,
    parent_uuid: Option<String>,
}

impl Link {
    fn new(file: &Path, i: &ImageInfo) -> Self {
        Link {
            file: file.display().to_string(),
            format: i.format,
            version: i.version.clone(),
            variant: i.variant,
            virtual_size: i.virtual_size,
            uuid: text(i.uuid),
            modification_uuid: text(i.modification_uuid),
            parent_uuid: text(i.parent_uuid),
        }
    }
}

fn text(uuid: Option<Uuid>) -> Option<String> {
    uuid.map(|u| u.hyphenated().to_string())
}

#[derive(Serialize)]
struct Geometry {
    cylinders: u32,
    heads: u32,
    sectors: u32,
}

impl Geometry {
    fn of((cylinders, heads, sectors): Chs) -> Self {
        Geometry { cylinders, heads, sectors }
    }
}

pub(crate) fn run(args: &Info) -> Result<u8> {
    if let (None, Some(cache)) = (args.image.format, inspect_cache(&args.file)?) {
        print(&cache::describe(&args.file, &cache, args.output))?;
        return Ok(0);
    }
    let raw = args.image.parents.allow_raw_device;
    let image = inspect_image_with(&args.image.spec(&args.file), raw)?;
    let chain = chain(args, &image);
    if args.chain {
        print(&each_of(args, image, chain?)?)?;
        return Ok(0);
    }
    let text = match args.output {
        Output::Json => json(&image, chain),
        Output::Human => human(&image) + &human_chain(&chain),
    };
    print(&text)?;
    Ok(0)
}

/// All of the chain, each image as by itself.
fn each_of(args: &Info, image: Inspected, chain: Vec<Link>) -> Result<String> {
    let raw = args.image.parents.allow_raw_device;
    let spec = |l: &Link| {
        Ok::<_, vdblk::Error>(ImageSpec { path: l.file.clone().into(), format: Some(l.format.parse()?) })
    };
    let below = chain[1..].iter().map(|l| inspect_image_with(&spec(l)?, raw));
    let all = std::iter::once(Ok(image)).chain(below).collect::<Result<Vec<_>>>()?;
    if args.output == Output::Human {
        return Ok(all.iter().map(human).collect::<Vec<_>>().join("\n"));
    }
    let links = |n: usize| all[n..].iter().map(|i| Link::new(&i.path, &i.info)).collect();
    let values: Vec<_> = all.iter().enumerate().map(|(n, image)| value(image, Ok(links(n)))).collect();
    Ok(format!("[{}]\n", values.join(",\n")))
}

fn json(image: &Inspected, chain: Result<Vec<Link>>) -> String {
    value(image, chain) + "\n"
}

fn value(image: &Inspected, chain: Result<Vec<Link>>) -> String {
    let i = &image.info;
    let (chain, chain_error) = match chain {
        Ok(links) => (Some(links), None),
        Err(e) => (None, Some(e.to_string())),
    };
    let json = Json {
        format: i.format,
        variant: i.variant,
        device_type: i.device.name(),
        virtual_size: i.virtual_size,
        file_size: image.file_size,
        block_size: i.block_size,
        allocated_blocks: i.allocated_blocks,
        uuid: text(i.uuid),
        modification_uuid: text(i.modification_uuid),
        parent_uuid: text(i.parent_uuid),
        parent_modification_uuid: text(i.parent_modification_uuid),
        parent_content_id: i.parent_content_id,
        parent_names: &i.parent_names,
        comment: i.comment.as_deref(),
        notes: &i.notes,
        geometry: i.geometry.map(Geometry::of),
        logical_geometry: i.logical_geometry.map(Geometry::of),
        file: image.path.display().to_string(),
        version: i.version.as_deref(),
        snapshots: i.snapshots.iter().map(JsonSnapshot::new).collect(),
        regions: i.regions.iter().map(JsonRegion::new).collect(),
        chain,
        chain_error,
    };
    serde_json::to_string_pretty(&json).expect("numbers and texts")
}

/// Writing to a String does not fail.
fn human(image: &Inspected) -> String {
    let i = &image.info;
    let mut t = String::new();
    let version = i.version.as_ref().map_or_else(String::new, |v| format!(" {v}"));
    let _ = writeln!(t, "image: {}", image.path.display());
    let _ = writeln!(t, "format: {}{version}, {}", i.format, i.variant);
    if i.device != DeviceType::HardDisk {
        let _ = writeln!(t, "device: {}", i.device.name());
    }
    let _ = writeln!(t, "virtual size: {}", human_bytes(i.virtual_size));
    let _ = writeln!(t, "file size: {}", human_bytes(image.file_size));
    let _ = writeln!(t, "storage used: {}", human_bytes(image.storage_bytes));
    if let Some(block) = i.block_size {
        let _ = writeln!(t, "block size: {}", human_bytes(block));
        let blocks = i.virtual_size.div_ceil(block.max(1));
        if let Some(n) = i.allocated_blocks {
            let _ = writeln!(t, "allocated blocks: {n} of {blocks}");
        }
    }
    for (name, uuid) in [
        ("UUID", i.uuid),
        ("modification UUID", i.modification_uuid),
        ("parent UUID", i.parent_uuid),
        ("parent modification UUID", i.parent_modification_uuid),
    ] {
        if let Some(u) = uuid {
            let _ = writeln!(t, "{name}: {}", u.hyphenated());
        }
    }
    for name in &i.parent_names {
        let _ = writeln!(t, "parent file: {}", name.escape_debug());
    }
    for r in &i.regions {
        let (start, blocks, size, form) = (r.start, r.blocks, r.block_bytes, r.form.name());
        let _ = writeln!(t, "region: {blocks} blocks of {size} bytes from block {start} on, {form}");
    }
    for s in &i.snapshots {
        let (name, state) = (s.name.escape_debug(), human_bytes(s.state_bytes));
        let (id, date) = (s.id.escape_debug(), date(s.seconds));
        let _ = writeln!(t, "snapshot {id}: {name}, {date}, machine's state {state}");
    }
    for note in &i.notes {
        let _ = writeln!(t, "note: it {note}");
    }
    if let Some(comment) = &i.comment {
        // Whoever made the image chose the text: no control characters reach the terminal.
        let _ = writeln!(t, "comment: {}", comment.escape_debug());
    }
    if let Some((c, h, s)) = i.geometry {
        let _ = writeln!(t, "geometry: {c} cylinders, {h} heads, {s} sectors");
    }
    if let Some((c, h, s)) = i.logical_geometry.filter(|g| i.geometry != Some(*g)) {
        let _ = writeln!(t, "logical geometry: {c} cylinders, {h} heads, {s} sectors");
    }
    t
}

/// The image and what it stands on, top first. Only of a diff the files are opened.
fn chain(args: &Info, image: &Inspected) -> Result<Vec<Link>> {
    if image.info.parent_uuid.is_none() && image.info.variant != "diff" {
        return Ok(vec![Link::new(&image.path, &image.info)]);
    }
    let opened = open_disk(&OpenDisk {
        image: args.image.spec(&args.file),
        parents: args.image.parents.parents.clone(),
        parent_dirs: args.image.parents.parent_dirs.clone(),
        allow_parent_mismatch: args.image.parents.allow_parent_mismatch,
        allow_raw_device: args.image.parents.allow_raw_device,
        lock_wait: None,
        options: DiskOptions { read_only: true, ..DiskOptions::default() },
        ..OpenDisk::new(&args.file)
    })?;
    Ok(opened.images.iter().map(|i| Link::new(&i.path, &i.info)).collect())
}

/// Nothing for an image that stands alone.
fn human_chain(chain: &Result<Vec<Link>>) -> String {
    match chain {
        Err(e) => format!("chain: not complete: {e}\n"),
        Ok(links) if links.len() < 2 => String::new(),
        Ok(links) => {
            let mut t = String::from("chain, base last:\n");
            for l in links {
                let _ = writeln!(t, "  {} ({}, {})", l.file, l.format, l.variant);
            }
            t
        }
    }
}

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (u32::MAX, "2106-02-07 06:28:15 UTC"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}
