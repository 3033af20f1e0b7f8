//! Texts of a plug-in.

use super::abi;
use std::ffi::c_char;

/// A number of a plug-in as one of ours.
pub(super) fn count_of(n: u32) -> usize {
    usize::try_from(n).expect("addresses have at least 32 bits")
}

/// Where a plug-in says why it refused.
pub(super) struct Text(abi::Error);

impl Default for Text {
    fn default() -> Self {
        Text(abi::Error { text: [0; 256] })
    }
}

impl Text {
    pub(super) fn as_mut_ptr(&mut self) -> *mut abi::Error {
        &mut self.0
    }

    /// What it said, if that is a text.
    pub(super) fn said(&self) -> Option<String> {
        let text = field(&self.0.text).ok()?;
        let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        (!text.trim().is_empty()).then(|| text.trim().to_string())
    }
}

/// The text in a field of a structure.
///
/// # Errors
/// What is wrong with it: no NUL in it, or no UTF-8.
pub(super) fn field(chars: &[c_char]) -> Result<String, &'static str> {
    let end = chars.iter().position(|c| *c == 0).ok_or("does not end")?;
    let bytes = chars[..end].iter().map(|c| c.cast_unsigned()).collect();
    String::from_utf8(bytes).map_err(|_| "is no UTF-8")
}
