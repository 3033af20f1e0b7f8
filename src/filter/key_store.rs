//! The key store: the disk's key, encrypted with a password. VirtualBox keeps it as the property `CRYPT/KeyStore` of the base
//! medium, in its registry or the machine's file, as Base64 of 250 bytes, little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 4 | `SCNE` |
//! | 2 | version, 0x100 |
//! | 32 | cipher, padded with zeros |
//! | 32 | function that makes keys of passwords, padded with zeros |
//! | 4 | length of the disk's key |
//! | 32, 4 | its digest, and that one's length |
//! | 32, 4 | salt and iterations of the digest |
//! | 32, 4 | salt and iterations for the password |
//! | 4, 64 | length of the encrypted key, and it |

use super::{Secret, Xts};
use crate::error::{Error, ErrorKind, Result, Status};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pbkdf2::pbkdf2_hmac;
use std::fmt;
use std::str::FromStr;
use std::time::Instant;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: U32 = U32::from_bytes(*b"SCNE");
const VERSION: u16 = 0x100;
/// Bytes of the packed structure.
const STORE_BYTES: usize = 250;
/// Longest text that is read for a key store: 250 bytes in Base64 are 336, with `&#13;&#10;` and white space some more.
pub(super) const MAX_KEY_STORE_TEXT: u64 = 64 << 10;
/// Characters of a line, as VirtualBox breaks them.
const LINE_CHARS: usize = 64;
/// Iterations that VirtualBox makes at least, and for the digest.
const MIN_ITERATIONS: u32 = 20_000;
/// Iterations that are read at most: some minutes of computing. VirtualBox measures a quarter of a second.
const MAX_ITERATIONS: u32 = 200_000_000;
/// What a password is to cost, in milliseconds, as in VirtualBox.
pub const KDF_MILLIS: u64 = 250;

/// The structure as it is packed.
#[repr(C)]
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
struct Packed {
    magic: U32,
    version: U16,
    cipher: [u8; 32],
    kdf: [u8; 32],
    key_len: U32,
    digest: [u8; 32],
    digest_len: U32,
    digest_salt: [u8; 32],
    digest_iterations: U32,
    salt: [u8; 32],
    iterations: U32,
    wrapped_len: U32,
    wrapped: [u8; 64],
}

const _: () = assert!(size_of::<Packed>() == STORE_BYTES);

/// A cipher for disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cipher {
    /// AES with 128 bits.
    Xts128,
    /// AES with 256 bits.
    #[default]
    Xts256,
}

impl Cipher {
    /// All of them.
    pub const ALL: [Cipher; 2] = [Cipher::Xts128, Cipher::Xts256];

    /// VirtualBox's name.
    pub fn name(self) -> &'static str {
        match self {
            Cipher::Xts128 => "AES-XTS128-PLAIN64",
            Cipher::Xts256 => "AES-XTS256-PLAIN64",
        }
    }

    /// Bytes of its key: two of AES.
    fn key_bytes(self) -> u32 {
        match self {
            Cipher::Xts128 => 32,
            Cipher::Xts256 => 64,
        }
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Cipher {
    type Err = Error;

    fn from_str(name: &str) -> Result<Cipher> {
        Cipher::ALL.into_iter().find(|c| c.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
            let what = format!("there is no cipher '{}'", name.escape_debug());
            Error::new(ErrorKind::InvalidArgument, what).hint("AES-XTS128-PLAIN64 or AES-XTS256-PLAIN64")
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kdf {
    Sha1,
    Sha256,
    Sha512,
}

impl Kdf {
    const ALL: [Kdf; 3] = [Kdf::Sha1, Kdf::Sha256, Kdf::Sha512];

    fn name(self) -> &'static str {
        match self {
            Kdf::Sha1 => "PBKDF2-SHA1",
            Kdf::Sha256 => "PBKDF2-SHA256",
            Kdf::Sha512 => "PBKDF2-SHA512",
        }
    }

    fn derive(self, secret: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Kdf::Sha1 => pbkdf2_hmac::<sha1::Sha1>(secret, salt, iterations, out),
            Kdf::Sha256 => pbkdf2_hmac::<sha2::Sha256>(secret, salt, iterations, out),
            Kdf::Sha512 => pbkdf2_hmac::<sha2::Sha512>(secret, salt, iterations, out),
        }
    }
}

/// Iterations that take about `millis` milliseconds here, at least as many as VirtualBox makes.
pub fn iterations_for(cipher: Cipher, millis: u64) -> u32 {
    let mut out = Secret::zeroed(cipher.key_bytes() as usize);
    let begun = Instant::now();
    Kdf::Sha256.derive(b"benchmark", &[0; 32], MIN_ITERATIONS, out.bytes_mut());
    let nanos = begun.elapsed().as_nanos().max(1);
    let wanted = u128::from(MIN_ITERATIONS) * u128::from(millis) * 1_000_000 / nanos;
    u32::try_from(wanted).unwrap_or(u32::MAX).clamp(MIN_ITERATIONS, MAX_ITERATIONS / 10)
}

/// A key store that was looked at: known names, lengths that fit.
#[derive(Clone)]
pub struct KeyStore {
    packed: Packed,
    cipher: Cipher,
    kdf: Kdf,
}

impl fmt::Debug for KeyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyStore")
            .field("cipher", &self.cipher)
            .field("kdf", &self.kdf)
            .finish_non_exhaustive()
    }
}

impl KeyStore {
    /// A store of a key, wrapped with a password.
    ///
    /// # Errors
    /// From the operating system, for random numbers; if the key is not one of the cipher.
    pub fn wrap(cipher: Cipher, key: &Secret, password: &Secret, iterations: u32) -> Result<KeyStore> {
        let (mut salt, mut digest_salt) = ([0; 32], [0; 32]);
        random(&mut salt)?;
        random(&mut digest_salt)?;
        Self::wrap_with(cipher, key, password, iterations, (salt, digest_salt))
    }

    /// The same with these salts: for the password, and for the digest.
    fn wrap_with(
        cipher: Cipher,
        key: &Secret,
        password: &Secret,
        iterations: u32,
        (salt, digest_salt): ([u8; 32], [u8; 32]),
    ) -> Result<KeyStore> {
        let kdf = Kdf::Sha256;
        if key.bytes().len() != cipher.key_bytes() as usize {
            let what = format!("a key of {} bytes for {cipher}", key.bytes().len());
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
        let mut digest = [0; 32];
        kdf.derive(key.bytes(), &digest_salt, MIN_ITERATIONS, &mut digest);
        let mut wrapped = [0; 64];
        let part = &mut wrapped[..key.bytes().len()];
        part.copy_from_slice(key.bytes());
        password_key(kdf, password, &salt, iterations, cipher)?.encrypt_unit(0, part);
        let packed = Packed {
            magic: MAGIC,
            version: U16::new(VERSION),
            cipher: padded(cipher.name()),
            kdf: padded(kdf.name()),
            key_len: U32::new(cipher.key_bytes()),
            digest,
            digest_len: U32::new(32),
            digest_salt,
            digest_iterations: U32::new(MIN_ITERATIONS),
            salt,
            iterations: U32::new(iterations),
            wrapped_len: U32::new(cipher.key_bytes()),
            wrapped,
        };
        Ok(KeyStore { packed, cipher, kdf })
    }

    /// A new key by chance.
    ///
    /// # Errors
    /// From the operating system.
    pub fn new_key(cipher: Cipher) -> Result<Secret> {
        let mut key = Secret::zeroed(cipher.key_bytes() as usize);
        random(key.bytes_mut())?;
        Ok(key)
    }

    /// Reads the Base64 text; white space and what XML makes of line ends (`&#13;`, `&#10;`) are passed over.
    ///
    /// # Errors
    /// [`ErrorKind::NotThisFormat`] for anything else than a key store, [`ErrorKind::Unsupported`] for one with names, or a version, that
    /// are not known, [`ErrorKind::Corrupt`] or [`ErrorKind::Limit`] for impossible numbers.
    pub fn parse(text: &str) -> Result<KeyStore> {
        let text: String = text.replace("&#10;", "").replace("&#13;", "").split_whitespace().collect();
        let bytes = STANDARD.decode(text.as_bytes()).map_err(|_| {
            Error::new(ErrorKind::NotThisFormat, "is not a key store: it is not Base64")
                .hint("it is the value of CRYPT/KeyStore in the machine's .vbox file")
        })?;
        Self::from_bytes(&bytes)
    }

    /// Reads the packed structure. Errors as [`Self::parse`].
    pub fn from_bytes(bytes: &[u8]) -> Result<KeyStore> {
        let error = |kind, what: String| Err(Error::new(kind, what));
        let packed = match Packed::read_from_bytes(bytes) {
            Ok(p) if p.magic == MAGIC => p,
            _ => {
                let what = format!("is not a key store: {STORE_BYTES} bytes that begin with SCNE are wanted");
                return error(ErrorKind::NotThisFormat, what);
            }
        };
        if packed.version.get() != VERSION {
            return error(
                ErrorKind::Unsupported,
                format!("is a key store of version {:#x}", packed.version.get()),
            );
        }
        let cipher = Cipher::ALL.into_iter().find(|c| padded(c.name()) == packed.cipher);
        let kdf = Kdf::ALL.into_iter().find(|k| padded(k.name()) == packed.kdf);
        let (Some(cipher), Some(kdf)) = (cipher, kdf) else {
            let what = format!("is a key store with {} and {}", shown(&packed.cipher), shown(&packed.kdf));
            return error(ErrorKind::Unsupported, what);
        };
        let lengths = [&packed.key_len, &packed.wrapped_len, &packed.digest_len].map(|l| l.get());
        if lengths != [cipher.key_bytes(), cipher.key_bytes(), 32] {
            let [key, wrapped, digest] = lengths;
            let what =
                format!("is a damaged key store: keys of {key} and {wrapped} bytes, a digest of {digest}");
            return error(ErrorKind::Corrupt, what);
        }
        for n in [packed.iterations.get(), packed.digest_iterations.get()] {
            if n == 0 {
                return error(ErrorKind::Corrupt, "is a damaged key store: no iterations".into());
            }
            if n > MAX_ITERATIONS {
                return error(
                    ErrorKind::Limit,
                    format!("asks for {n} iterations; {MAX_ITERATIONS} are the limit"),
                );
            }
        }
        Ok(KeyStore { packed, cipher, kdf })
    }

    /// The packed structure.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.packed.as_bytes().to_vec()
    }

    /// The text as VirtualBox writes it, its lines ended by a newline.
    pub fn to_text(&self) -> String {
        let text = STANDARD.encode(self.packed.as_bytes());
        let lines =
            text.as_bytes().chunks(LINE_CHARS).map(|l| String::from_utf8_lossy(l).into_owned() + "\n");
        lines.collect()
    }

    /// The cipher.
    pub fn cipher(&self) -> Cipher {
        self.cipher
    }

    /// The key of the disk's data.
    ///
    /// # Errors
    /// [`ErrorKind::PermissionDenied`] if the password is not the one.
    pub fn unlock(&self, password: &Secret) -> Result<Secret> {
        let p = &self.packed;
        let key_bytes = self.cipher.key_bytes() as usize;
        let mut key = Secret::copy_of(&p.wrapped[..key_bytes]);
        let wrapping = password_key(self.kdf, password, &p.salt, p.iterations.get(), self.cipher)?;
        wrapping.decrypt_unit(0, key.bytes_mut());
        let mut digest = [0; 32];
        self.kdf.derive(key.bytes(), &p.digest_salt, p.digest_iterations.get(), &mut digest);
        if digest == p.digest {
            return Ok(key);
        }
        Err(Error::of(Status::PasswordIncorrect, "the password is not the one of the key store"))
    }

    /// Names the key by its digest: equal for stores of the same digest only.
    pub fn key_digest(&self) -> [u8; 32] {
        self.packed.digest
    }
}

/// The key that a password makes.
fn password_key(kdf: Kdf, password: &Secret, salt: &[u8], iterations: u32, cipher: Cipher) -> Result<Xts> {
    let mut key = Secret::zeroed(cipher.key_bytes() as usize);
    kdf.derive(password.bytes(), salt, iterations, key.bytes_mut());
    Xts::new(key.bytes())
}

fn random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|e| Error::io("get random numbers", std::io::Error::other(e)))
}

fn padded(name: &str) -> [u8; 32] {
    let mut out = [0; 32];
    out[..name.len()].copy_from_slice(name.as_bytes());
    out
}

/// A name of the store, for people.
fn shown(name: &[u8; 32]) -> String {
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    format!("'{}'", String::from_utf8_lossy(&name[..end]).escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by VirtualBox 7.2.22 (`VBoxManage encryptmedium`), as it stands in the machine's file; the password is "vdblk-dev".
    const FIXTURE: &str = "U0NORQABQUVTLVhUUzEyOC1QTEFJTjY0AAAAAAAAAAAAAAAAAABQQktERjItU0hB&#10;MjU2AAAAAAAAAAAAAAAAAAAAAAAAACAAAACXi+0yVuUW5iS83xFZJa1wqm+E6mGr&#10;XK2ckOt7BTIsaiAAAAAG6Kn2QogXmzRYj8Yo9Nr7G+cxZTySVJo68qpdKgX8uiBO&#10;AACPTuQJc4605dS588SdkkL6NBiFpzvjjyix9GPZswZDFeDmCwAgAAAAzg5wnlFL&#10;qBkFPwDFVjKN9+oCuJGKKKA5KSLuc5LStU0AAAAAAAAAAAAAAAAAAAAAAAAAAAAA&#10;AAAAAAAAAAAAAA==";

    fn password(text: &str) -> Secret {
        Secret::copy_of(text.as_bytes())
    }

    #[test]
    fn virtualbox_s_own_is_the_same_byte_for_byte() {
        let store = KeyStore::parse(FIXTURE).unwrap();
        assert_eq!(store.cipher(), Cipher::Xts128);
        assert_eq!(store.to_text().trim_end(), FIXTURE.replace("&#10;", "\n"));
        let key = store.unlock(&password("vdblk-dev")).unwrap();
        assert_eq!(store.unlock(&password("vdblk-dex")).unwrap_err().kind(), ErrorKind::PermissionDenied);
        // the same key, password, salts and iterations give the same bytes
        let p = &store.packed;
        let salts = (p.salt, p.digest_salt);
        let again =
            KeyStore::wrap_with(Cipher::Xts128, &key, &password("vdblk-dev"), p.iterations.get(), salts);
        assert_eq!(again.unwrap().to_bytes(), store.to_bytes());
    }

    #[test]
    fn what_is_wrapped_comes_out_again() {
        for cipher in Cipher::ALL {
            let key = KeyStore::new_key(cipher).unwrap();
            let store = KeyStore::wrap(cipher, &key, &password("x"), MIN_ITERATIONS).unwrap();
            let read = KeyStore::parse(&store.to_text()).unwrap();
            assert_eq!(read.to_bytes(), store.to_bytes());
            assert_eq!(read.unlock(&password("x")).unwrap().bytes(), key.bytes());
            assert!(read.unlock(&password("y")).is_err());
        }
        assert!(KeyStore::wrap(Cipher::Xts256, &Secret::zeroed(32), &password("x"), 1).is_err());
        assert_eq!("aes-xts256-plain64".parse::<Cipher>().unwrap(), Cipher::Xts256);
        assert!("aes".parse::<Cipher>().is_err());
    }

    #[test]
    fn other_functions_for_passwords_are_read() {
        let (mut store, key) = (KeyStore::parse(FIXTURE).unwrap(), Secret::copy_of(&[7; 32]));
        for kdf in [Kdf::Sha1, Kdf::Sha512] {
            (store.kdf, store.packed.kdf) = (kdf, padded(kdf.name()));
            store.packed.iterations = U32::new(10);
            kdf.derive(
                key.bytes(),
                &store.packed.digest_salt.clone(),
                MIN_ITERATIONS,
                &mut store.packed.digest,
            );
            store.packed.wrapped[..32].copy_from_slice(key.bytes());
            let salt = store.packed.salt;
            let wrapping = password_key(kdf, &password("p"), &salt, 10, Cipher::Xts128).unwrap();
            wrapping.encrypt_unit(0, &mut store.packed.wrapped[..32]);
            let read = KeyStore::from_bytes(&store.to_bytes()).unwrap();
            assert_eq!(read.unlock(&password("p")).unwrap().bytes(), key.bytes());
        }
    }

    #[test]
    fn nonsense_is_refused_in_one_line() {
        let good = KeyStore::parse(FIXTURE).unwrap().to_bytes();
        let with = |at: usize, bytes: &[u8]| {
            let mut b = good.clone();
            b[at..at + bytes.len()].copy_from_slice(bytes);
            KeyStore::from_bytes(&b).unwrap_err()
        };
        let huge = u32::MAX.to_le_bytes();
        let cases = [
            (KeyStore::parse("").unwrap_err(), ErrorKind::NotThisFormat),
            (KeyStore::parse("%%%").unwrap_err(), ErrorKind::NotThisFormat),
            (KeyStore::parse("<?xml version=\"1.0\"?>").unwrap_err(), ErrorKind::NotThisFormat),
            (KeyStore::from_bytes(&good[1..]).unwrap_err(), ErrorKind::NotThisFormat),
            (KeyStore::from_bytes(&[good.clone(), vec![0]].concat()).unwrap_err(), ErrorKind::NotThisFormat),
            (with(0, b"X"), ErrorKind::NotThisFormat),
            (with(4, &[9]), ErrorKind::Unsupported),
            (with(6, b"\x1b[31m"), ErrorKind::Unsupported),
            (with(38, &[0xff; 32]), ErrorKind::Unsupported),
            (with(70, &huge), ErrorKind::Corrupt),
            (with(106, &huge), ErrorKind::Corrupt),
            (with(182, &huge), ErrorKind::Corrupt),
            (with(142, &[0; 4]), ErrorKind::Corrupt),
            (with(178, &[0; 4]), ErrorKind::Corrupt),
            (with(142, &huge), ErrorKind::Limit),
            (with(178, &huge), ErrorKind::Limit),
        ];
        for (e, kind) in cases {
            assert_eq!(e.kind(), kind, "{e}");
            let line = e.to_string();
            assert!(!line.contains('\n') && !line.contains('\x1b') && line.len() < 200, "{line}");
        }
    }

    #[test]
    fn a_password_costs_what_it_shall() {
        let few = iterations_for(Cipher::Xts128, 0);
        assert_eq!(few, MIN_ITERATIONS);
        assert!(iterations_for(Cipher::Xts128, 1000) >= MIN_ITERATIONS);
    }
}
