//! The property list: as much of XML as Apple's lists have, read once from front to back. Whatever is not looked for is
//! passed over; nothing is expanded or loaded.

use crate::error::{Error, ErrorKind, Result};

/// Elements inside each other; real lists have seven.
const MAX_DEPTH: usize = 32;

fn broken(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the property list is broken: {what}"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'a> {
    Open(&'a [u8]),
    Close(&'a [u8]),
    /// `<name/>`
    Empty(&'a [u8]),
    /// Never blank.
    Text(&'a [u8]),
}

struct Reader<'a> {
    rest: &'a [u8],
}

/// The tables of the image: what is in `resource-fork`, `blkx`, each `Data`.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if it is no such list.
pub(super) fn tables(xml: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut r = Reader { rest: xml };
    let mut found = Vec::new();
    r.open(b"plist")?;
    r.open(b"dict")?;
    r.dict(&[b"resource-fork", b"blkx"], &mut found)?;
    match r.next()? {
        Token::Close(b"plist") => Ok(found),
        _ => Err(broken("it does not end behind its dictionary")),
    }
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<Token<'a>> {
        loop {
            let at = self.rest.iter().position(|b| *b == b'<').ok_or_else(|| broken("it ends too early"))?;
            let (text, tag) = self.rest.split_at(at);
            if !text.trim_ascii().is_empty() {
                self.rest = tag;
                return Ok(Token::Text(text.trim_ascii()));
            }
            let end: &[u8] = match tag {
                [b'<', b'!', b'-', b'-', ..] => b"-->",
                [b'<', b'?', ..] => b"?>",
                _ => b">",
            };
            let len = tag.windows(end.len()).position(|w| w == end);
            let len = len.ok_or_else(|| broken("a tag does not end"))?;
            self.rest = &tag[len + end.len()..];
            match tag[1..len.max(1)].trim_ascii() {
                [b'?', ..] | [b'!', b'-', b'-', ..] => {}
                // Its own definitions could give names another meaning.
                [b'!', kind @ ..] if !kind.starts_with(b"DOCTYPE") || kind.contains(&b'[') => {
                    return Err(broken("it has definitions or sections of its own"));
                }
                [b'!', ..] => {}
                [b'/', name @ ..] => return Ok(Token::Close(name_in(name))),
                [name @ .., b'/'] => return Ok(Token::Empty(name_in(name))),
                name => return Ok(Token::Open(name_in(name))),
            }
        }
    }

    fn open(&mut self, name: &[u8]) -> Result<()> {
        match self.next()? {
            Token::Open(n) if n == name => Ok(()),
            _ => Err(broken(&format!("there is no <{}> where one belongs", String::from_utf8_lossy(name)))),
        }
    }

    /// The text up to `</name>`, which `<name>` was in front of.
    fn text(&mut self, name: &[u8]) -> Result<&'a [u8]> {
        let text = match self.next()? {
            Token::Close(n) if n == name => return Ok(b""),
            Token::Text(text) => text,
            _ => return Err(broken("there is a tag where text belongs")),
        };
        match self.next()? {
            Token::Close(n) if n == name => Ok(text),
            _ => Err(broken("there is a tag where text ends")),
        }
    }

    /// The next key of a dictionary; `None` behind the last.
    fn key(&mut self) -> Result<Option<&'a [u8]>> {
        match self.next()? {
            Token::Close(b"dict") => Ok(None),
            Token::Open(b"key") => self.text(b"key").map(Some),
            _ => Err(broken("a dictionary has something else than keys")),
        }
    }

    /// The rest of a dictionary, whose value for the first of `path` is looked into.
    fn dict(&mut self, path: &[&[u8]], found: &mut Vec<Vec<u8>>) -> Result<()> {
        while let Some(key) = self.key()? {
            match path {
                [name, beneath @ ..] if key == *name && !beneath.is_empty() => {
                    self.open(b"dict")?;
                    self.dict(beneath, found)?;
                }
                [name] if key == *name => {
                    self.open(b"array")?;
                    self.entries(found)?;
                }
                _ => self.skip_value()?,
            }
        }
        Ok(())
    }

    /// The rest of the list of tables.
    fn entries(&mut self, found: &mut Vec<Vec<u8>>) -> Result<()> {
        loop {
            match self.next()? {
                Token::Close(b"array") => return Ok(()),
                Token::Open(b"dict") => self.entry(found)?,
                _ => return Err(broken("a table is no dictionary")),
            }
        }
    }

    fn entry(&mut self, found: &mut Vec<Vec<u8>>) -> Result<()> {
        let before = found.len();
        while let Some(key) = self.key()? {
            if key == b"Data" {
                self.open(b"data")?;
                found.push(decode(self.text(b"data")?)?);
            } else {
                self.skip_value()?;
            }
        }
        if found.len() == before + 1 { Ok(()) } else { Err(broken("a table has not exactly one 'Data'")) }
    }

    fn skip_value(&mut self) -> Result<()> {
        let mut open: Vec<&[u8]> = Vec::new();
        loop {
            match self.next()? {
                Token::Open(name) if open.len() < MAX_DEPTH => open.push(name),
                Token::Open(_) => return Err(broken("too many elements lie inside each other")),
                Token::Close(name) if open.pop() == Some(name) => {}
                Token::Close(_) => return Err(broken("an element ends that did not begin")),
                Token::Text(_) if open.is_empty() => {
                    return Err(broken("there is text where a value belongs"));
                }
                Token::Empty(_) | Token::Text(_) => {}
            }
            if open.is_empty() {
                return Ok(());
            }
        }
    }
}

/// The name of an element, without attributes.
fn name_in(tag: &[u8]) -> &[u8] {
    tag.split(u8::is_ascii_whitespace).next().unwrap_or_default()
}

/// Base64 (RFC 4648), with white space anywhere.
fn decode(text: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count, mut padding) = (0u32, 0u32, 0u32);
    for b in text.iter().filter(|b| !b.is_ascii_whitespace()) {
        let value = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                padding += 1;
                continue;
            }
            _ => return Err(broken("a table has something else than Base64")),
        };
        if padding > 0 {
            return Err(broken("a table goes on behind its end"));
        }
        bits = (bits << 6) | u32::from(value);
        count += 1;
        if count == 4 {
            out.extend_from_slice(&bits.to_be_bytes()[1..]);
            (bits, count) = (0, 0);
        }
    }
    match (count, padding) {
        (0, 0) => {}
        (2, 2) => out.push((bits << 12).to_be_bytes()[1]),
        (3, 1) => out.extend_from_slice(&(bits << 6).to_be_bytes()[1..3]),
        _ => return Err(broken("a table ends in the middle of a byte")),
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn list(tables: &str) -> String {
        format!(
            "<?xml version=\"1.0\"?>\n<!DOCTYPE plist PUBLIC \"-//Apple//DTD\" \"http://x\">\n<!-- a > b -->\
             <plist version=\"1.0\"><dict><key>other</key><array><dict><key>blkx</key><array/></dict><true/>\
             </array><key>resource-fork</key><dict><key>blkx</key>{tables}<key>plst</key><array/></dict></dict></plist>"
        )
    }

    fn with(data: &str) -> Result<Vec<Vec<u8>>> {
        tables(list(&format!("<array><dict><key>Data</key><data>{data}</data></dict></array>")).as_bytes())
    }

    #[test]
    fn tables_are_found_wherever_else_their_names_stand() {
        let two = "<array><dict><key>ID</key><string>-1</string><key>Data</key>\n<data>\n\tYWJj\n\tZGU=\n</data></dict>\
                   <dict><key>Data</key><data>YQ==</data><key>Name</key><string></string></dict></array>";
        assert_eq!(tables(list(two).as_bytes()).unwrap(), [b"abcde".to_vec(), b"a".to_vec()]);
        assert_eq!(tables(list("<array></array>").as_bytes()).unwrap(), Vec::<Vec<u8>>::new());
        assert_eq!(with("").unwrap(), [b""]);
    }

    #[test]
    fn what_is_broken_is_refused_in_one_line() {
        let deep = "<array>".repeat(40);
        let lists = [
            String::new(),
            "<plist><dict>".into(),
            "<plist><dict></dict>".into(),
            "<plist><array></array></plist>".into(),
            "<plist><dict><string>x</string></dict></plist>".into(),
            "<plist><dict><key>x</key><a></b></dict></plist>".into(),
            "<plist><dict><key>x</key>text</dict></plist>".into(),
            "<!DOCTYPE plist [<!ENTITY a \"b\">]><plist><dict></dict></plist>".into(),
            "<plist><dict><key>x</key><![CDATA[a]]></dict></plist>".into(),
            format!("<plist><dict><key>x</key>{deep}"),
            list("<string>x</string>"),
            list("<array><dict></dict></array>"),
            list("<array><string>x</string></array>"),
            "<".into(),
            "<plist".into(),
            "<!-".into(),
            "<!-->".into(),
        ];
        for l in lists {
            let e = tables(l.as_bytes()).expect_err(&l);
            assert!(e.kind() == ErrorKind::Corrupt && !e.to_string().contains('\n'), "{l}: {e}");
        }
        for data in ["Y", "YQ", "YQ=", "YWI==", "YQ==YQ==", "Y!==", "<b>"] {
            assert!(with(data).is_err(), "{data}");
        }
    }

    proptest! {
        #[test]
        fn base64_of_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
            let mut text = String::new();
            for three in bytes.chunks(3) {
                let n = three.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - three.len()));
                for i in 0..4 {
                    let letter = LETTERS[(n >> (18 - 6 * i) & 63) as usize] as char;
                    text.push(if i <= three.len() { letter } else { '=' });
                }
            }
            prop_assert_eq!(with(&text).unwrap(), [bytes]);
        }

        #[test]
        fn any_changed_list_is_read_or_refused(at in any::<usize>(), with in proptest::collection::vec(any::<u8>(), 0..6)) {
            let mut l = list("<array><dict><key>Data</key><data>YQ==</data></dict></array>").into_bytes();
            let at = at % l.len();
            let end = (at + with.len()).min(l.len());
            l.splice(at..end, with);
            let _ = tables(&l);
        }
    }
}
