//! `vdimg map`.

use super::args::{Map, Output};
use super::terminal::print;
use serde::Serialize;
use std::fmt::Write;
use vdblk::Result;
use vdblk::job::{Piece, PieceKind, Survey};
use vdblk::vd::{OpenedDisk, open_disk};

/// Printed at a time.
const FLUSH_BYTES: usize = 64 << 10;

/// A range with qemu-img's keys.
#[derive(Serialize)]
struct Json {
    start: u64,
    length: u64,
    depth: usize,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

pub(crate) fn run(args: &Map) -> Result<u8> {
    let opened = open_disk(&args.image.open(&args.file, args.snapshot.snapshot.as_ref(), args.lock)?)?;
    let mut survey = Survey::new(opened.disk.clone());
    let hidden = opened.disk.filters().hide_zeros();
    let json = args.output == Output::Json;
    let mut text = String::from(if json { "[" } else { HEADER });
    let mut first = true;
    while let Some(piece) = survey.next_piece()? {
        if json {
            text.push_str(if first { "" } else { ",\n" });
            text.push_str(&json_of(&opened, &piece, hidden));
        } else {
            human_of(&opened, &piece, &mut text);
        }
        first = false;
        if text.len() >= FLUSH_BYTES {
            print(&text)?;
            text.clear();
        }
    }
    text.push_str(if json { "]\n" } else { "" });
    print(&text)?;
    Ok(0)
}

/// As qemu-img says it: `data` where the image has a place, `zero` where it reads as zeros, `present` where any image of
/// the chain decides. A hole in a raw file is no place. `hidden`: filters make something else of zeros.
fn json_of(opened: &OpenedDisk, p: &Piece, hidden: bool) -> String {
    let (data, offset) = match p.kind {
        PieceKind::Data { off, .. } => (true, Some(off.0)),
        PieceKind::Packed { .. } => (true, None),
        PieceKind::Hole { off, .. } => (opened.images[p.depth].info.block_size.is_some(), Some(off.0)),
        PieceKind::Zero | PieceKind::Unallocated => (false, None),
    };
    let json = Json {
        start: p.range.start().0,
        length: p.range.len(),
        depth: p.depth,
        present: p.kind != PieceKind::Unallocated,
        zero: !p.kind.is_data() && !hidden,
        data,
        compressed: matches!(p.kind, PieceKind::Packed { .. }),
        offset,
    };
    serde_json::to_string(&json).expect("numbers")
}

const HEADER: &str = "Offset          Length          Mapped to       File\n";

/// Only what has to be read, as qemu-img does.
fn human_of(opened: &OpenedDisk, p: &Piece, out: &mut String) {
    let off = match p.kind {
        PieceKind::Data { off, .. } => format!("{:#x}", off.0),
        PieceKind::Packed { .. } => "packed".to_string(),
        PieceKind::Hole { .. } | PieceKind::Zero | PieceKind::Unallocated => return,
    };
    {
        let path = opened.images[p.depth].path.display();
        let (start, len) = (p.range.start().0, p.range.len());
        // Writing to a String does not fail.
        let _ = writeln!(out, "{start:<#16x}{len:<#16x}{off:<16}{path}");
    }
}
