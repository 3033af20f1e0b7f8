//! Kinds of filters: our own, and those that plug-ins have brought (docs/plugins.md).

use super::Filter;
use crate::error::{Error, ErrorKind, Result};
use std::sync::{Arc, PoisonError, RwLock};

/// A kind of filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterInfo {
    /// Its name. No two are the same in any case.
    pub name: String,
    /// The plug-in it came from; `None`: it is our own.
    pub origin: Option<String>,
}

/// Opens a filter, of what the user has said about it.
pub(crate) type OpenFilter = dyn Fn(&str) -> Result<Arc<dyn Filter>> + Send + Sync;

struct Row {
    info: FilterInfo,
    open: Arc<OpenFilter>,
}

static ROWS: RwLock<Vec<Row>> = RwLock::new(Vec::new());

/// All kinds there are now, our own first (`VDFilterInfo`).
pub fn filter_info() -> Vec<FilterInfo> {
    let rows = ROWS.read().unwrap_or_else(PoisonError::into_inner);
    let own = FilterInfo { name: "CRYPT".into(), origin: None };
    std::iter::once(own).chain(rows.iter().map(|r| r.info.clone())).collect()
}

/// The kind of this name, in any case (`VDFilterInfoOne`).
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] if there is none, with those there are.
pub fn filter_info_one(name: &str) -> Result<FilterInfo> {
    let all = filter_info();
    let names: Vec<_> = all.iter().map(|f| f.name.clone()).collect();
    all.into_iter().find(|f| f.name.eq_ignore_ascii_case(name)).ok_or_else(|| {
        Error::new(ErrorKind::InvalidArgument, format!("unknown filter '{name}'"))
            .hint(format!("one of: {}", names.join(", ")))
    })
}

/// Opens a filter that a plug-in has brought. [`super::Crypt`] is made of its keys ([`super::KeyFiles`]).
///
/// # Errors
/// As [`filter_info_one`]; [`ErrorKind::Unsupported`] for CRYPT; what the filter says about `config`.
pub fn open_filter(name: &str, config: &str) -> Result<Arc<dyn Filter>> {
    let info = filter_info_one(name)?;
    let open = {
        let rows = ROWS.read().unwrap_or_else(PoisonError::into_inner);
        rows.iter().find(|r| r.info == info).map(|r| r.open.clone())
    };
    let what = format!("the filter {} is made of its keys", info.name);
    let open = open.ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, what).hint("--password-file FILE and --key-store FILE")
    })?;
    open(config)
}

/// Registers a kind of filter.
///
/// # Errors
/// [`ErrorKind::Exists`] for a name there is.
pub(crate) fn register(name: &str, origin: &str, open: Arc<OpenFilter>) -> Result<()> {
    let mut rows = ROWS.write().unwrap_or_else(PoisonError::into_inner);
    if std::iter::once("CRYPT")
        .chain(rows.iter().map(|r| &*r.info.name))
        .any(|n| n.eq_ignore_ascii_case(name))
    {
        return Err(Error::new(ErrorKind::Exists, format!("there is a filter '{name}' already")));
    }
    rows.push(Row { info: FilterInfo { name: name.into(), origin: Some(origin.into()) }, open });
    Ok(())
}

/// Takes a kind off the list.
pub(crate) fn unregister(name: &str) {
    ROWS.write().unwrap_or_else(PoisonError::into_inner).retain(|r| r.info.name != name);
}
