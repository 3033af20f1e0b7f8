//! The text of a key store, or of a machine's file with one.

use vdblk::error::ErrorKind;
use vdblk::filter::KeyStore;

/// Longer cases are no cases.
pub(crate) const MAX_BYTES: usize = 4 << 10;

/// Parses a case: as text, and as the structure itself. What is taken is written as it was read.
///
/// # Panics
/// Where a promise is broken.
pub(crate) fn run(case: &[u8]) {
    if case.len() > MAX_BYTES {
        return;
    }
    let text = String::from_utf8_lossy(case);
    for parsed in [KeyStore::parse(&text), KeyStore::from_bytes(case)] {
        match parsed {
            Ok(store) => {
                let again = KeyStore::parse(&store.to_text()).expect("what it writes it reads");
                assert_eq!(again.to_bytes(), store.to_bytes());
                assert_eq!((again.cipher(), again.key_digest()), (store.cipher(), store.key_digest()));
            }
            Err(e) => {
                let kinds =
                    [ErrorKind::NotThisFormat, ErrorKind::Unsupported, ErrorKind::Corrupt, ErrorKind::Limit];
                assert!(kinds.contains(&e.kind()), "{e:?}");
                assert!(!e.to_string().contains('\n'), "one line: {e}");
            }
        }
    }
}
