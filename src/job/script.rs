//! Reads and writes by script, with patterns: what `vdimg io` does. They go through a channel like any guest's.

use super::lanes::Lanes;
use super::{LANE_BYTES, Step, open_channel, parse_size};
use crate::error::{Error, ErrorKind, Failure, Result};
use crate::limits::SECTOR_BYTES;
use crate::map::{GuestOffset, GuestRange};
use crate::vd::{Disk, Request};
use std::fmt::Write as _;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// What is written where no pattern is given, as qemu-io does.
const DEFAULT_PATTERN: u8 = 0xcd;
/// Longest sleep of one step.
const NAP: Duration = Duration::from_millis(50);
/// Bytes of a line of a dump.
const DUMP_BYTES: usize = 16;

/// One command of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `read [-P pattern] [-v] off len`.
    Read {
        /// Where.
        range: GuestRange,
        /// What every byte must be.
        pattern: Option<u8>,
        /// The bytes are shown.
        dump: bool,
    },
    /// `write [-P pattern] off len`.
    Write {
        /// Where.
        range: GuestRange,
        /// What every byte becomes.
        pattern: u8,
    },
    /// `write -z [-u] off len`.
    WriteZeroes {
        /// Where.
        range: GuestRange,
        /// Its space may go back to the file system.
        unmap: bool,
    },
    /// `discard off len`.
    Discard(GuestRange),
    /// `flush`.
    Flush,
    /// `sleep ms`.
    Sleep(Duration),
}

fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}

impl FromStr for Command {
    type Err = Error;

    fn from_str(line: &str) -> Result<Command> {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let args = Args::parse(name, words)?;
        match name {
            "read" | "r" => {
                args.only("Pv")?;
                Ok(Command::Read { range: args.range()?, pattern: args.pattern, dump: args.dump })
            }
            "write" | "w" if args.zeroes => {
                args.only("zu")?;
                Ok(Command::WriteZeroes { range: args.range()?, unmap: args.unmap })
            }
            "write" | "w" => {
                args.only("P")?;
                let pattern = args.pattern.unwrap_or(DEFAULT_PATTERN);
                Ok(Command::Write { range: args.range()?, pattern })
            }
            "discard" | "d" => {
                args.only("")?;
                Ok(Command::Discard(args.range()?))
            }
            "flush" | "f" => {
                args.only("")?;
                args.numbers::<0>("flush").map(|_| Command::Flush)
            }
            "sleep" => {
                args.only("")?;
                args.numbers::<1>("sleep MS").map(|[ms]| Command::Sleep(Duration::from_millis(ms)))
            }
            _ => {
                Err(refused(format!("unknown command '{name}'")).hint("read, write, discard, flush or sleep"))
            }
        }
    }
}

/// Words of a command behind its name.
#[derive(Debug, Default)]
struct Args<'a> {
    name: &'a str,
    /// Letters of the options that were given.
    given: String,
    pattern: Option<u8>,
    dump: bool,
    zeroes: bool,
    unmap: bool,
    rest: Vec<&'a str>,
}

impl<'a> Args<'a> {
    fn parse(name: &'a str, mut words: impl Iterator<Item = &'a str>) -> Result<Args<'a>> {
        let mut args = Args { name, ..Args::default() };
        while let Some(word) = words.next() {
            match word {
                "-P" => {
                    let value = words.next().ok_or_else(|| refused(format!("{name}: -P wants a pattern")))?;
                    args.pattern = Some(parse_pattern(value)?);
                }
                "-v" => args.dump = true,
                "-z" => args.zeroes = true,
                "-u" => args.unmap = true,
                _ if word.starts_with('-') => return Err(refused(format!("{name}: unknown option {word}"))),
                _ => {
                    args.rest.push(word);
                    continue;
                }
            }
            args.given.push_str(&word[1..]);
        }
        Ok(args)
    }

    fn only(&self, known: &str) -> Result<()> {
        match self.given.chars().find(|c| !known.contains(*c)) {
            None => Ok(()),
            Some(c) => Err(refused(format!("{}: option -{c} does not go with the others", self.name))),
        }
    }

    fn numbers<const N: usize>(&self, usage: &str) -> Result<[u64; N]> {
        let numbers = self.rest.iter().map(|w| parse_size(w)).collect::<Result<Vec<_>>>()?;
        <[u64; N]>::try_from(numbers).map_err(|_| refused(format!("usage: {usage}")))
    }

    fn range(&self) -> Result<GuestRange> {
        let [off, len] = self.numbers(&format!("{} [OPTIONS] OFFSET LENGTH", self.name))?;
        for (what, n) in [("offset", off), ("length", len)] {
            if !n.is_multiple_of(SECTOR_BYTES) {
                return Err(refused(format!("{}: the {what} {n} is no multiple of 512", self.name)));
            }
        }
        GuestRange::new(GuestOffset(off), len)
            .ok_or_else(|| refused(format!("{}: {off} and {len} bytes are behind every disk", self.name)))
    }
}

fn parse_pattern(text: &str) -> Result<u8> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u8::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| refused(format!("'{text}' is no pattern")).hint("a byte, 0 to 255 or 0x00 to 0xff"))
}

/// An open disk that commands are carried out on, one after the other.
pub struct Script {
    lanes: Lanes,
    disk: Arc<Disk>,
    command: Option<Command>,
    /// Bytes of it (or milliseconds) that are done.
    done: u64,
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Script").field("command", &self.command).finish_non_exhaustive()
    }
}

impl Script {
    /// A script on `disk`.
    ///
    /// # Errors
    /// If no channel can be opened.
    pub fn new(disk: &Arc<Disk>) -> Result<Script> {
        let lanes = Lanes::new(vec![open_channel(disk, 1)?], 1)?;
        Ok(Script { lanes, disk: disk.clone(), command: None, done: 0 })
    }

    /// Begins a command; [`Self::step`] carries it out.
    ///
    /// # Errors
    /// If its range leaves the disk.
    pub fn begin(&mut self, command: Command) -> Result<()> {
        let size = self.disk.size_bytes();
        let range = range_of(command);
        if range.end().0 > size {
            let what = format!("{range} reach behind the disk's end at {size}");
            return Err(Error::new(ErrorKind::OutOfRange, what));
        }
        self.command = Some(command);
        self.done = 0;
        Ok(())
    }

    /// Does at most 1 MiB of the command. What there is to show is appended to `out`.
    ///
    /// # Errors
    /// Of the I/O; where a pattern does not match.
    pub fn step(&mut self, out: &mut String) -> Result<Step> {
        let Some(command) = self.command else { return Ok(Step::Done) };
        let ended = match command {
            Command::Sleep(all) => self.nap(all),
            Command::Flush => {
                self.request(Request::Flush, "flush")?;
                true
            }
            Command::Discard(r) => {
                self.request(Request::Discard(r), &format!("discard {r}"))?;
                true
            }
            Command::WriteZeroes { range, unmap } => {
                self.request(Request::WriteZeroes { range, unmap }, &format!("write zeros to {range}"))?;
                true
            }
            Command::Read { range, .. } | Command::Write { range, .. } => self.move_piece(range, out)?,
        };
        if !ended {
            return Ok(Step::More);
        }
        self.command = None;
        summarize(command, out);
        Ok(Step::Done)
    }

    /// Runs a command to its end on this thread; see [`Self::begin`] and [`Self::step`].
    ///
    /// # Errors
    /// As those.
    pub fn run(&mut self, command: Command, out: &mut String) -> Result<()> {
        self.begin(command)?;
        while self.step(out)? == Step::More {}
        Ok(())
    }

    /// Leaves the image as a clean close does, and durable.
    ///
    /// # Errors
    /// If that could not be written.
    pub fn close(mut self) -> Result<()> {
        self.lanes.close_disk(0, !self.disk.options().read_only)
    }

    fn nap(&mut self, all: Duration) -> bool {
        let left = all.saturating_sub(Duration::from_millis(self.done)).min(NAP);
        std::thread::sleep(left);
        self.done += u64::try_from(left.as_millis()).expect("a nap is short");
        Duration::from_millis(self.done) >= all
    }

    fn request(&mut self, request: Request, tried: &str) -> Result<()> {
        let started = self.lanes.start(0, 0, request, &[]);
        self.lanes.finish(started)?.map_err(|f| failed(f, tried))
    }

    fn move_piece(&mut self, range: GuestRange, out: &mut String) -> Result<bool> {
        let piece = range.skip(self.done).take(LANE_BYTES);
        let len = usize::try_from(piece.len()).expect("inside a lane");
        if !piece.is_empty() {
            let (started, tried) = match self.command {
                Some(Command::Write { pattern, .. }) => {
                    self.lanes.bytes_mut(0)[..len].fill(pattern);
                    (self.lanes.write(0, 0, 0, piece), "write")
                }
                _ => (self.lanes.read(0, 0, piece), "read"),
            };
            self.lanes.finish(started)?.map_err(|f| failed(f, &format!("{tried} {piece}")))?;
            if let Some(Command::Read { pattern, dump, .. }) = self.command {
                self.look_at(piece, pattern, dump, out)?;
            }
        }
        self.done += piece.len();
        Ok(self.done == range.len())
    }

    /// What was read: shown, and held against the pattern.
    fn look_at(&self, piece: GuestRange, pattern: Option<u8>, dump: bool, out: &mut String) -> Result<()> {
        let len = usize::try_from(piece.len()).expect("inside a lane");
        let bytes = &self.lanes.bytes(0)[..len];
        if dump {
            dump_bytes(piece.start().0, bytes, out);
        }
        let Some(wanted) = pattern else { return Ok(()) };
        let Some(at) = bytes.iter().position(|b| *b != wanted) else { return Ok(()) };
        let what = format!(
            "pattern mismatch at offset {}: {:#04x} was read, {wanted:#04x} should be there",
            piece.start().0 + at as u64,
            bytes[at]
        );
        Err(Error::new(ErrorKind::Corrupt, what))
    }
}

/// `tried` completes the sentence "cannot …".
fn failed(f: Failure, tried: &str) -> Error {
    let e = Error::new(Error::from(f).kind(), format!("cannot {tried}: {f}"));
    if e.kind() == ErrorKind::ReadOnly { e.hint("leave --read-only out") } else { e }
}

/// The range a command touches.
fn range_of(command: Command) -> GuestRange {
    match command {
        Command::Read { range, .. } | Command::Write { range, .. } => range,
        Command::WriteZeroes { range, .. } | Command::Discard(range) => range,
        Command::Flush | Command::Sleep(_) => GuestRange::EMPTY,
    }
}

/// One line on what was done.
fn summarize(command: Command, out: &mut String) {
    let verb = match command {
        Command::Read { .. } => "read",
        Command::Write { .. } | Command::WriteZeroes { .. } => "wrote",
        Command::Discard(_) => "discarded",
        Command::Flush | Command::Sleep(_) => return,
    };
    let r = range_of(command);
    // Writing to a String does not fail; so below.
    let _ = writeln!(out, "{verb} {0}/{0} bytes at offset {1}", r.len(), r.start().0);
}

fn dump_bytes(start: u64, bytes: &[u8], out: &mut String) {
    for (at, line) in (start..).step_by(DUMP_BYTES).zip(bytes.chunks(DUMP_BYTES)) {
        let _ = write!(out, "{at:08x}:  ");
        for b in line {
            let _ = write!(out, "{b:02x} ");
        }
        let visible = |b: &u8| if b.is_ascii_graphic() || *b == b' ' { char::from(*b) } else { '.' };
        let _ = writeln!(out, " {}", line.iter().map(visible).collect::<String>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(off: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestOffset(off), len).unwrap()
    }

    #[test]
    fn commands() {
        for (text, want) in [
            ("read 0 4k", Command::Read { range: r(0, 4096), pattern: None, dump: false }),
            (
                " read -v -P 0xAb 512 1M ",
                Command::Read { range: r(512, 1 << 20), pattern: Some(0xab), dump: true },
            ),
            ("write 1M 512", Command::Write { range: r(1 << 20, 512), pattern: 0xcd }),
            ("w -P 7 0 512", Command::Write { range: r(0, 512), pattern: 7 }),
            ("write -z 0 1G", Command::WriteZeroes { range: r(0, 1 << 30), unmap: false }),
            ("write -z -u 0 512", Command::WriteZeroes { range: r(0, 512), unmap: true }),
            ("discard 512 512", Command::Discard(r(512, 512))),
            ("flush", Command::Flush),
            ("sleep 20", Command::Sleep(Duration::from_millis(20))),
        ] {
            assert_eq!(text.parse::<Command>().unwrap(), want, "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_a_line() {
        for text in [
            "",
            "frobnicate",
            "read",
            "read 0",
            "read 0 1 2",
            "read 100 512",
            "read 0 100",
            "read -P 0 512",
            "read -P 256 0 512",
            "read -z 0 512",
            "write -u 0 512",
            "write -z -P 1 0 512",
            "write -x 0 512",
            "discard -z 0 512",
            "flush 1",
            "sleep",
            "read 16777215T 2T",
            "write -P",
        ] {
            let e = text.parse::<Command>().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidArgument, "{text}");
            assert!(!e.to_string().contains('\n'), "{text}: {e}");
        }
    }

    #[test]
    fn dumps_have_addresses_and_text() {
        let mut out = String::new();
        dump_bytes(512, b"ABCDEFGHIJKLMNOP\0\x7f", &mut out);
        assert_eq!(
            out,
            "00000200:  41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f 50  ABCDEFGHIJKLMNOP\n\
             00000210:  00 7f  ..\n"
        );
    }
}
