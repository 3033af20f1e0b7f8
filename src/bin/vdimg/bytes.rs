//! `vdimg cat`, `vdimg dd` and `vdimg bench`.

use super::args::{Bench, Cat, Dd, Output};
use super::terminal::{self, print};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;
use vdblk::format::partitions::PartitionTable;
use vdblk::job::{self, DiskBytes, bench_disk, parse_size};
use vdblk::limits::SECTOR_BYTES;
use vdblk::vd::{DiskOptions, ImageSpec, OpenDisk, open_disk};
use vdblk::{Error, ErrorKind, Result};

/// Bytes moved at a time.
const PIECE_BYTES: usize = 1 << 20;

fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}

pub(crate) fn cat(args: &Cat) -> Result<u8> {
    let opened = open_disk(&args.image.open(&args.file, args.snapshot.snapshot.as_ref(), args.lock)?)?;
    let disk = DiskBytes::new(&opened.disk)?;
    let (start, len) = match args.partition {
        None => (0, disk.size_bytes()),
        Some(number) => partition(&disk, number).map_err(|e| e.at(&args.file))?,
    };
    let left = len
        .checked_sub(args.offset)
        .ok_or_else(|| refused(format!("byte {} is behind the end at {len}", args.offset)).at(&args.file))?;
    let wanted = args.length.unwrap_or(left);
    if wanted > left {
        let what = format!("{wanted} bytes at {} reach behind the end at {len}", args.offset);
        return Err(refused(what).at(&args.file));
    }
    let mut out = std::io::stdout().lock();
    let (mut at, end) = (start + args.offset, start + args.offset + wanted);
    let mut piece = vec![0; PIECE_BYTES];
    while at < end {
        let n = usize::try_from(end - at).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        disk.read(at, &mut piece[..n]).map_err(|e| e.at(&args.file))?;
        match out.write_all(&piece[..n]) {
            Ok(()) => {}
            // A reader that has gone away had enough.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(0),
            Err(e) => return Err(Error::io("write to standard output", e)),
        }
        at += n as u64;
    }
    out.flush().map_err(|e| Error::io("write to standard output", e))?;
    Ok(0)
}

/// Where a partition begins, and its length, in bytes.
fn partition(disk: &DiskBytes, number: u32) -> Result<(u64, u64)> {
    let table = PartitionTable::read(disk)?;
    let found = table.partitions.iter().find(|(n, _)| *n == number).map(|(_, s)| s);
    let sectors = found.ok_or_else(|| {
        let known: Vec<_> = table.partitions.iter().map(|(n, _)| n.to_string()).collect();
        Error::new(ErrorKind::NotFound, format!("it has no partition {number}"))
            .hint(format!("there are: {}", known.join(", ")))
    })?;
    Ok((sectors.start * SECTOR_BYTES, sectors.len * SECTOR_BYTES))
}

/// What the operands of dd say.
struct Operands {
    input: PathBuf,
    output: PathBuf,
    block: u64,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse(texts: &[String]) -> Result<Operands> {
        let (mut input, mut output, mut block, mut count, mut skip) = (None, None, 512, None, 0);
        for text in texts {
            let (key, value) = text
                .split_once('=')
                .ok_or_else(|| refused(format!("'{text}' is no operand of the form KEY=VALUE")))?;
            match key {
                "if" => input = Some(value.into()),
                "of" => output = Some(value.into()),
                "bs" => block = parse_size(value)?,
                "count" => count = Some(parse_size(value)?),
                "skip" => skip = parse_size(value)?,
                _ => return Err(refused(format!("unknown operand '{key}'")).hint("if, of, bs, count, skip")),
            }
        }
        let (Some(input), Some(output)) = (input, output) else {
            return Err(refused("both if=FILE and of=FILE have to be given"));
        };
        if block == 0 {
            return Err(refused("a block of 0 bytes"));
        }
        Ok(Operands { input, output, block, count, skip })
    }
}

pub(crate) fn dd(args: &Dd) -> Result<u8> {
    terminal::end_in_order();
    let o = Operands::parse(&args.operands)?;
    let source = OpenDisk {
        image: ImageSpec { path: o.input.clone(), format: args.format },
        lock_wait: Some(args.lock.wait()),
        options: DiskOptions { read_only: true, ..DiskOptions::default() },
        ..OpenDisk::new(&o.input)
    };
    let blocks = |n: u64| {
        n.checked_mul(o.block).ok_or_else(|| refused(format!("{n} blocks of {} bytes are too many", o.block)))
    };
    let how = job::Extract {
        source,
        from: blocks(o.skip)?,
        len: o.count.map(blocks).transpose()?,
        target: o.output.clone(),
        format: args.output_format,
    };
    terminal::watched(|watch| job::extract(&how, watch))?;
    Ok(0)
}

pub(crate) fn bench(args: &Bench) -> Result<u8> {
    terminal::end_in_order();
    let opened = open_disk(&OpenDisk {
        direct: args.cache == "none",
        allow_write_to_parent: args.allow_write_to_parent,
        options: DiskOptions { read_only: !args.write, ..DiskOptions::default() },
        ..args.image.open(&args.file, None, args.lock)?
    })?;
    let how = job::Bench {
        count: args.count,
        depth: args.depth,
        size: args.buffer_size,
        step: args.step_size.unwrap_or(args.buffer_size),
        offset: args.offset,
        write: args.write.then_some(args.pattern),
        flush_interval: args.flush_interval,
    };
    let what = if args.write { "write" } else { "read" };
    if args.output == Output::Human {
        print(&format!(
            "Sending {} {what} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n",
            how.count, how.size, how.depth, how.offset, how.step
        ))?;
    }
    let timed =
        terminal::watched(|watch| bench_disk(&opened.disk, how, watch)).map_err(|e| e.at(&args.file))?;
    let us = |d: Duration| d.as_secs_f64() * 1e6;
    let [median, p99, longest] = timed.percentiles;
    let rate = timed.iops() * how.size as f64 / f64::from(1 << 20);
    let text = match args.output {
        Output::Human => format!(
            "Run completed in {:.3} seconds.\n{:.0} requests/s, {rate:.1} MiB/s\nlatency: mean {:.1} µs, median {:.1} µs, \
             99 % below {:.1} µs, longest {:.1} µs\n",
            timed.elapsed.as_secs_f64(),
            timed.iops(),
            us(timed.mean),
            us(median),
            us(p99),
            us(longest)
        ),
        Output::Json => {
            let json = json!({
                "requests": timed.requests, "operation": what, "size": how.size, "depth": how.depth,
                "seconds": timed.elapsed.as_secs_f64(), "iops": timed.iops(), "mib_per_second": rate,
                "latency_us": { "mean": us(timed.mean), "p50": us(median), "p99": us(p99), "max": us(longest) },
            });
            serde_json::to_string_pretty(&json).expect("numbers") + "\n"
        }
    };
    print(&text)?;
    Ok(0)
}
