//! New images of a plug-in's format.

use super::abi;
use super::calls::{self, Wish};
use super::image::Kind;
use super::judge;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Blueprint, NewImage, NewOption};
use std::ffi::CString;
use uuid::Uuid;

/// Describes a new image.
///
/// # Errors
/// As [`crate::format::blueprint`]; [`ErrorKind::Corrupt`] for an answer that cannot be.
pub(super) fn blueprint(kind: &'static Kind, known: &[NewOption], new: &NewImage) -> Result<Blueprint> {
    let functions = &kind.functions;
    new.only_options(known)?;
    for (what, given, flag) in [
        ("UUID", new.uuid.is_some(), abi::FORMAT_UUID),
        ("parent", new.parent.is_some(), abi::FORMAT_DIFF),
        ("comment", new.comment.is_some(), abi::FORMAT_COMMENT),
        ("geometry", new.geometry.is_some(), 0),
    ] {
        if given && !functions.has(flag) {
            let what = format!("{} images have no {what}", kind.name);
            return Err(Error::new(ErrorKind::InvalidArgument, what));
        }
    }
    let (answer, file) = calls::create(functions, &wish(kind, new)?);
    match answer.code {
        abi::OK => judge::blueprint(file),
        code => Err(judge::refusal(code, &answer.why)),
    }
}

fn wish(kind: &'static Kind, new: &NewImage) -> Result<Wish> {
    let variant = new.variant.as_ref().map(|v| v.to_ascii_lowercase());
    if let Some(v) = variant.as_ref().filter(|v| !kind.variants.contains(&v.as_str())) {
        let what = format!("{} images have no variant '{v}'", kind.name);
        let all = kind.variants.join(", ");
        return Err(Error::new(ErrorKind::InvalidArgument, what).hint(format!("one of: {all}")));
    }
    let text = |text: &str| {
        CString::new(text).map_err(|_| Error::new(ErrorKind::InvalidArgument, "a text cannot contain NUL"))
    };
    let maybe = |t: Option<&String>| t.map(|t| text(t)).transpose();
    let bytes = |uuid: Option<Uuid>| uuid.unwrap_or_default().into_bytes();
    let parent = new.parent.as_ref();
    let info = parent.map(|p| &p.info);
    let (uuid, parent_uuid) = (new.uuid, info.and_then(|i| i.uuid));
    let parent_modification = info.and_then(|i| i.modification_uuid);
    let flags = [
        (uuid.is_some(), abi::NEW_UUID),
        (parent.is_some(), abi::NEW_DIFF),
        (parent_uuid.is_some(), abi::NEW_PARENT_UUID),
        (parent_modification.is_some(), abi::NEW_PARENT_MODIFICATION),
    ];
    let parent_format = info.map(|i| i.format).filter(|f| !f.is_empty());
    Ok(Wish {
        flags: flags.iter().filter(|(is, _)| *is).map(|(_, bit)| bit).sum(),
        size_bytes: new.size_bytes,
        variant: maybe(variant.as_ref())?,
        uuid: bytes(uuid),
        modification_uuid: new.modification.into_bytes(),
        parent_uuid: bytes(parent_uuid),
        parent_modification_uuid: bytes(parent_modification),
        parent_name: maybe(parent.and_then(|p| p.path.as_ref()))?,
        parent_format: parent_format.map(text).transpose()?,
        comment: maybe(new.comment.as_ref())?,
        options: new.options.iter().map(|(k, v)| Ok((text(k)?, text(v)?))).collect::<Result<_>>()?,
    })
}
