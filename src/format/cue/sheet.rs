//! The text of a cue sheet: files, their tracks, where those begin.

use crate::error::{Error, ErrorKind, Result};
use crate::map::{ByteSource, DataForm, HostOffset};

/// Longest sheet that is read.
const MAX_SHEET_BYTES: u64 = 64 << 10;
/// Tracks of a CD.
const MAX_TRACKS: usize = 99;
/// Blocks of a second.
const BLOCKS_PER_SECOND: u64 = 75;

/// What a sheet says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sheet {
    /// In the disc's order; each has a track at least.
    pub(super) files: Vec<File>,
}

/// A file with tracks in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct File {
    pub(super) name: String,
    pub(super) tracks: Vec<Track>,
}

/// A track.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Track {
    pub(super) number: u32,
    pub(super) form: DataForm,
    /// Blocks of silence in front of it that are in no file.
    pub(super) pregap: u64,
    /// Blocks of silence behind it that are in no file.
    pub(super) postgap: u64,
    /// Where it begins in its file, in blocks from the file's start: the gap before it, if the file has one.
    pub(super) first: u64,
    /// Where its own part begins.
    pub(super) start: u64,
}

/// Words that a sheet can begin with.
const FIRST_WORDS: [&str; 7] = ["FILE", "REM", "CATALOG", "PERFORMER", "TITLE", "SONGWRITER", "CDTEXTFILE"];

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

/// Whether the beginning of a file looks like a sheet.
pub(in super::super) fn is_sheet(head: &[u8]) -> bool {
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    FIRST_WORDS.iter().any(|word| {
        head.split_at_checked(word.len()).is_some_and(|(w, rest)| {
            w.eq_ignore_ascii_case(word.as_bytes()) && rest.first().is_some_and(|b| b" \t".contains(b))
        })
    })
}

impl Sheet {
    /// Reads a sheet.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`], [`ErrorKind::Corrupt`], [`ErrorKind::Unsupported`] and [`ErrorKind::Limit`], with the line.
    pub(super) fn read(source: &dyn ByteSource) -> Result<Self> {
        let head_bytes = source.len().min(MAX_SHEET_BYTES + 1);
        let mut raw = vec![0; usize::try_from(head_bytes).expect("MAX_SHEET_BYTES")];
        source.read_at(HostOffset(0), &mut raw)?;
        if !is_sheet(&raw) {
            return Err(Error::new(
                ErrorKind::NotThisFormat,
                "not a cue sheet: it begins with none of its words",
            ));
        }
        if source.len() > MAX_SHEET_BYTES {
            let what = format!("the sheet has {} bytes, at most {MAX_SHEET_BYTES} are read", source.len());
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let text = String::from_utf8_lossy(&raw);
        let mut reader = Reader::default();
        for (n, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let words = words(line);
            reader.line(&words).map_err(|e| Error::new(e.kind(), format!("line {}: {e}", n + 1)))?;
        }
        reader.end_track()?;
        let sheet = reader.sheet;
        match sheet.files.iter().find(|f| f.tracks.is_empty()) {
            Some(f) => Err(corrupt(format!("there is no track in '{}'", f.name.escape_debug()))),
            None if sheet.files.is_empty() => Err(corrupt("it names no file")),
            None => Ok(sheet),
        }
    }
}

/// Words between blanks; those between quotation marks are one.
fn words(line: &str) -> Vec<&str> {
    let (mut words, mut rest) = (Vec::new(), line.trim());
    while !rest.is_empty() {
        let (word, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
        };
        words.push(word);
        rest = after.trim_start();
    }
    words
}

/// A sheet as far as it was read.
#[derive(Debug, Default)]
struct Reader {
    sheet: Sheet,
    track: Option<Unfinished>,
}

#[derive(Debug)]
struct Unfinished {
    number: u32,
    form: DataForm,
    pregap: u64,
    postgap: u64,
    gap: Option<u64>,
    start: Option<u64>,
}

impl Reader {
    fn line(&mut self, words: &[&str]) -> Result<()> {
        let Some((command, rest)) = words.split_first() else { return Ok(()) };
        match (command.to_ascii_uppercase().as_str(), rest) {
            (
                "REM" | "CATALOG" | "CDTEXTFILE" | "FLAGS" | "ISRC" | "PERFORMER" | "SONGWRITER" | "TITLE",
                _,
            ) => Ok(()),
            ("FILE", [name, kind]) => self.file(name, kind),
            ("TRACK", [number, mode]) => self.track(number, mode),
            ("INDEX", [number, at]) => self.index(number, at),
            ("PREGAP", [len]) => {
                self.current()?.pregap = blocks(len)?;
                Ok(())
            }
            ("POSTGAP", [len]) => {
                self.current()?.postgap = blocks(len)?;
                Ok(())
            }
            _ => Err(corrupt(format!("'{}' makes no sense there", words.join(" ").escape_debug()))),
        }
    }

    fn file(&mut self, name: &str, kind: &str) -> Result<()> {
        self.end_track()?;
        if !kind.eq_ignore_ascii_case("BINARY") {
            let what = format!("its file is of kind {}; only BINARY is supported", kind.escape_debug());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        self.sheet.files.push(File { name: name.to_string(), tracks: Vec::new() });
        Ok(())
    }

    fn track(&mut self, number: &str, mode: &str) -> Result<()> {
        self.end_track()?;
        let before = self.sheet.files.iter().map(|f| f.tracks.len()).sum::<usize>();
        if self.sheet.files.is_empty() || before >= MAX_TRACKS {
            return Err(corrupt("a track without a file, or more than 99"));
        }
        let form = match mode.to_ascii_uppercase().as_str() {
            "AUDIO" => DataForm::Audio,
            "MODE1/2048" => DataForm::Mode1Cooked,
            "MODE1/2352" => DataForm::Mode1Raw,
            "MODE2/2336" | "CDI/2336" => DataForm::Mode2Cooked,
            "MODE2/2352" | "CDI/2352" => DataForm::Mode2Raw,
            _ => {
                let what = format!("tracks of mode {} are not supported", mode.escape_debug());
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
        };
        let number = number.parse().map_err(|_| corrupt("the track has no number"))?;
        self.track = Some(Unfinished { number, form, pregap: 0, postgap: 0, gap: None, start: None });
        Ok(())
    }

    fn index(&mut self, number: &str, at: &str) -> Result<()> {
        let at = blocks(at)?;
        let track = self.current()?;
        match number.parse() {
            Ok(0u32) => track.gap = Some(at),
            Ok(1) => track.start = Some(at),
            Ok(2..=99) => {}
            _ => return Err(corrupt("the index has no number")),
        }
        Ok(())
    }

    fn current(&mut self) -> Result<&mut Unfinished> {
        self.track.as_mut().ok_or_else(|| corrupt("it belongs to no track"))
    }

    /// The track is complete.
    fn end_track(&mut self) -> Result<()> {
        let Some(t) = self.track.take() else { return Ok(()) };
        let what = |how: &str| corrupt(format!("track {} {how}", t.number));
        let start = t.start.ok_or_else(|| what("has no INDEX 01"))?;
        let first = t.gap.unwrap_or(start);
        let file = self.sheet.files.last_mut().expect("a track is only begun in a file");
        let before = file.tracks.last().map(|t| t.start);
        if first > start || before.is_some_and(|b| b >= first) {
            return Err(what("begins before the one in front of it"));
        }
        let (number, form, pregap, postgap) = (t.number, t.form, t.pregap, t.postgap);
        file.tracks.push(Track { number, form, pregap, postgap, first, start });
        Ok(())
    }
}

/// Minutes, seconds and blocks, as a number of blocks.
fn blocks(text: &str) -> Result<u64> {
    let parts: Vec<Option<u64>> = text.split(':').map(|p| p.parse().ok()).collect();
    match parts[..] {
        [Some(m), Some(s), Some(f)] if m < 1000 && s < 60 && f < BLOCKS_PER_SECOND => {
            Ok((m * 60 + s) * BLOCKS_PER_SECOND + f)
        }
        _ => Err(corrupt(format!("'{}' is no time", text.escape_debug()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Sheet> {
        Sheet::read(&text.as_bytes().to_vec())
    }

    #[test]
    fn a_sheet_says_where_tracks_are() {
        let sheet = read(
            "\u{feff}rem made by hand\nFILE \"a b.bin\" BINARY\r\n  TRACK 01 MODE1/2352\n    FLAGS DCP\n    INDEX 01 00:00:00\n \
             TRACK 02 AUDIO\n PREGAP 00:02:00\n INDEX 00 00:01:00\n INDEX 01 00:01:10\nINDEX 02 00:01:11\nFILE c BINARY\nTRACK 3 MODE2/2336\nINDEX 1 0:0:0\nPOSTGAP 00:00:01\n",
        )
        .unwrap();
        let track = |number, form, pregap, postgap, first, start| Track {
            number,
            form,
            pregap,
            postgap,
            first,
            start,
        };
        let a = vec![track(1, DataForm::Mode1Raw, 0, 0, 0, 0), track(2, DataForm::Audio, 150, 0, 75, 85)];
        let c = vec![track(3, DataForm::Mode2Cooked, 0, 1, 0, 0)];
        let file = |name: &str, tracks| File { name: name.into(), tracks };
        assert_eq!(sheet.files, [file("a b.bin", a), file("c", c)]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_line() {
        let line = |text: &str| read(text).unwrap_err().to_string();
        assert!(line("KOLY").contains("not a cue sheet"));
        assert!(line("FILE a WAVE\n").contains("line 1: its file is of kind WAVE"));
        assert!(line("REM\t\nTRACK 1 AUDIO").contains("line 2: a track without a file"));
        assert!(line("FILE a BINARY\n").contains("no track in 'a'"));
        assert!(line("REM nothing").contains("names no file"));
        assert!(line("FILE a BINARY\nTRACK 1 MODE9").contains("mode MODE9"));
        assert!(line("FILE a BINARY\nTRACK 1 AUDIO\n").contains("no INDEX 01"));
        assert!(line("FILE a BINARY\nTRACK 1 AUDIO\nINDEX 1 0:60:0").contains("'0:60:0' is no time"));
        assert!(line("FILE a BINARY\nINDEX 1 0:0:0").contains("belongs to no track"));
        assert!(line("FILE a BINARY\nBOX").contains("'BOX' makes no sense"));
        let twice = "FILE a BINARY\nTRACK 1 AUDIO\nINDEX 1 0:0:5\nTRACK 2 AUDIO\nINDEX 1 0:0:5";
        assert!(line(twice).contains("track 2 begins before"));
        assert!(line(&format!("REM {}", "x".repeat(70_000))).contains("at most 65536"));
    }
}
