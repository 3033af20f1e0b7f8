//! Does a list of operations with a container, as `scripts/oracle/vdtool.py` does it with VirtualBox's library: the same words, the same answers.
//! `vdtool @FILE` or `vdtool '[[OP, ARGUMENT…], …]'`; a line of JSON for each operation: [op, status, its name, result]. For `scripts/oracle/container.sh`.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use uuid::Uuid;
use vdblk::container::{
    Container, CopyImage, CreateBase, Geometry, ImageFlags, LAST_IMAGE, OpenFlags, RepairFlags, repair,
};
use vdblk::job::Watch;
use vdblk::map::DeviceType;
use vdblk::{Error, ErrorKind, Result, Status};

const PIECE: usize = 1 << 20;
const SECTOR: u64 = 512;

fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}

/// The arguments of an operation: plain ones, and those with names in an object behind them.
struct Args<'a>(&'a [Value]);

impl Args<'_> {
    fn text(&self, n: usize) -> Result<&str> {
        self.0.get(n).and_then(Value::as_str).ok_or_else(|| refused(format!("argument {n} is no text")))
    }

    fn number(&self, n: usize) -> Result<u64> {
        self.0.get(n).and_then(Value::as_u64).ok_or_else(|| refused(format!("argument {n} is no number")))
    }

    /// The number of an image; below 0 the last one.
    fn image(&self, n: usize) -> u32 {
        self.0.get(n).and_then(Value::as_i64).and_then(|i| u32::try_from(i).ok()).unwrap_or(LAST_IMAGE)
    }

    fn named(&self, name: &str) -> Option<&Value> {
        self.0.last().and_then(|last| last.get(name))
    }

    fn named_number(&self, name: &str) -> u64 {
        self.named(name).and_then(Value::as_u64).unwrap_or(0)
    }

    fn open_flags(&self) -> Result<OpenFlags> {
        let bits = u32::try_from(self.named_number("open")).ok();
        bits.and_then(OpenFlags::from_bits).ok_or_else(|| refused("unknown open flags"))
    }

    fn like(&self) -> Result<CreateBase> {
        let bits = u32::try_from(self.named_number("flags")).ok();
        let flags = bits.and_then(ImageFlags::from_bits).ok_or_else(|| refused("unknown image flags"))?;
        Ok(CreateBase {
            flags,
            comment: self.named("comment").and_then(Value::as_str).map(str::to_string),
            uuid: self.named("uuid").and_then(Value::as_str).map(parse_uuid).transpose()?,
            ..CreateBase::default()
        })
    }
}

fn parse_uuid(text: &str) -> Result<Uuid> {
    text.parse().map_err(|_| refused(format!("{text} is no UUID")))
}

fn splitmix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// As `gen.py` has it: whole sectors, each of which says where it belongs.
fn pattern(offset: u64, len: u64, kind: &str, seed: u64) -> Result<Vec<u8>> {
    let sectors = offset / SECTOR..(offset + len) / SECTOR;
    let size = usize::try_from(len).map_err(|_| refused("too long"))?;
    match kind {
        "zero" => Ok(vec![0; size]),
        "fill" => Ok(vec![seed.to_le_bytes()[0]; size]),
        "rnd" => Ok(sectors
            .flat_map(|lba| {
                let base = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(lba * 64);
                let words = (2..64).map(move |i| splitmix64(base.wrapping_add(i)));
                [lba, seed].into_iter().chain(words).flat_map(u64::to_le_bytes)
            })
            .collect()),
        _ => Err(refused(format!("no contents of the kind '{kind}'"))),
    }
}

fn unwatched<T>(work: impl FnOnce(&mut Watch<'_>) -> Result<T>) -> Result<T> {
    work(&mut Watch { cancelled: &|| false, progress: &mut |_| () })
}

struct Engine(Container);

impl Engine {
    fn new() -> Engine {
        Engine(Container::new(DeviceType::HardDisk))
    }

    fn run(&mut self, op: &str, a: &Args<'_>) -> Result<Value> {
        let c = &mut self.0;
        match op {
            "new" => *c = Container::new(DeviceType::HardDisk),
            "create" => {
                let (backend, path, size) = (a.text(0)?, Path::new(a.text(1)?), a.number(2)?);
                c.create_base(backend, path, size, &a.like()?, a.open_flags()?)?;
            }
            "diff" => c.create_diff(a.text(0)?, Path::new(a.text(1)?), &a.like()?, a.open_flags()?)?,
            "open" => c.open(a.text(0)?, Path::new(a.text(1)?), a.open_flags()?)?,
            "flags" => c.set_open_flags(a.image(0), a.open_flags()?)?,
            "w" => c.write(a.number(0)?, &pattern(a.number(0)?, a.number(1)?, a.text(2)?, a.number(3)?)?)?,
            "trim" => c.discard(&[(a.number(0)?, a.number(1)?)])?,
            "flush" => c.flush()?,
            "close" => c.close(a.named("delete").is_some_and(|d| d == &json!(true) || d == &json!(1)))?,
            "closeall" => c.close_all()?,
            "compact" => drop(unwatched(|w| c.compact(a.image(0), w))?),
            "resize" => {
                let none = Geometry::default();
                unwatched(|w| c.resize(a.number(0)?, none, none, w))?;
            }
            "merge" => unwatched(|w| c.merge(a.image(0), a.image(1), w))?,
            "copy" => self.copy(a)?,
            "setcomment" => c.set_comment(a.image(0), Some(a.text(1)?))?,
            "setuuid" => c.set_uuid(a.image(0), Some(parse_uuid(a.text(1)?)?))?,
            "info" => return Ok(self.info()),
            "sha" => return self.sha(None),
            "raw" => return self.sha(Some(&create(a.text(0)?)?)),
            "repair" => {
                let flags = if a.number(2)? == 0 { RepairFlags::NONE } else { RepairFlags::DRY_RUN };
                unwatched(|w| {
                    repair(a.text(0)?, Path::new(a.text(1)?), flags, std::time::Duration::ZERO, w)
                })?;
            }
            _ => return Err(refused(format!("unknown operation {op}"))),
        }
        Ok(Value::Null)
    }

    fn copy(&mut self, a: &Args<'_>) -> Result<()> {
        let like = a.like()?;
        let how = CopyImage {
            backend: Some(a.text(0)?.into()),
            path: Some(a.text(1)?.into()),
            size_bytes: a.named_number("size"),
            flags: like.flags,
            uuid: like.uuid,
            ..CopyImage::default()
        };
        let image = a.named("n").and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
        let mut target = Container::new(DeviceType::HardDisk);
        unwatched(|w| self.0.copy_to(image.unwrap_or(LAST_IMAGE), &mut target, &how, w))?;
        target.destroy()
    }

    fn info(&self) -> Value {
        let c = &self.0;
        let images = 0..u32::try_from(c.count()).expect("few images");
        let of = |n| {
            json!({
                "size": c.size(n).ok(),
                "uuid": c.uuid(n).map(|u| u.to_string()).ok(),
                "parent": c.parent_uuid(n).map(|u| u.to_string()).ok(),
                "comment": c.comment(n).ok(),
                "imageflags": c.image_flags(n).map(|f| format!("{:#x}", f.bits())).ok(),
            })
        };
        images.map(of).collect()
    }

    fn sha(&self, raw: Option<&File>) -> Result<Value> {
        let size = self.0.size(LAST_IMAGE)?;
        let (mut sum, mut buf, mut at) = (Sha256::new(), vec![0; PIECE], 0);
        while at < size {
            let n = usize::try_from(size - at).map_or(PIECE, |left| left.min(PIECE));
            self.0.read(at, &mut buf[..n])?;
            sum.update(&buf[..n]);
            if let Some(file) = raw {
                file.write_all_at(&buf[..n], at).map_err(|e| Error::io("write", e))?;
            }
            at += n as u64;
        }
        let hex: String = sum.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok(json!({ "sha256": hex, "size": size }))
    }
}

fn create(path: &str) -> Result<File> {
    File::create(path).map_err(|e| Error::io("make it", e).at(Path::new(path)))
}

/// VirtualBox's number for an error, or one of ours where it has none.
fn number(e: &Error) -> i32 {
    e.status().map_or(-1, Status::number)
}

fn main() {
    let text = std::env::args().nth(1).expect("usage: vdtool @FILE, or a list in JSON");
    let text = match text.strip_prefix('@') {
        Some(file) => std::fs::read_to_string(file).expect("the list of operations"),
        None => text,
    };
    let ops: Vec<Vec<Value>> = serde_json::from_str(&text).expect("a list of operations");
    let (mut engine, mut failed) = (Engine::new(), false);
    for op in ops {
        let name = op[0].as_str().expect("an operation's name");
        let told = match engine.run(name, &Args(&op[1..])) {
            Ok(result) => json!([name, 0, "VINF_SUCCESS", result]),
            Err(e) => {
                failed = true;
                json!([name, number(&e), e.to_string(), null])
            }
        };
        println!("{told}");
    }
    std::process::exit(i32::from(failed));
}
