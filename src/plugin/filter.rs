//! Filters of plug-ins.

use super::abi;
use super::calls::{FilterFunctions, OpenFilter};
use super::judge;
use super::registry::InUse;
use crate::error::{Error, ErrorKind, Result};
use crate::filter::Filter;
use crate::map::GuestOffset;
use std::ffi::CString;

/// Bytes around a buffer that nobody may touch.
const GUARD: usize = 64;

/// A filter that is open.
#[derive(Debug)]
pub(super) struct PluginFilter {
    // Closed before the plug-in may be unloaded.
    filter: OpenFilter,
    name: &'static str,
    never_zeros: bool,
    _in_use: InUse,
}

impl PluginFilter {
    /// Opens a filter and tries it: what it makes of some sectors comes back, whether they are taken together or one by one, and no byte
    /// beside them is touched.
    ///
    /// # Errors
    /// What it says of `config`; [`ErrorKind::Corrupt`] for one that cannot be used.
    pub(super) fn open(
        name: &'static str,
        functions: FilterFunctions,
        in_use: InUse,
        config: &str,
    ) -> Result<PluginFilter> {
        let config = CString::new(config)
            .map_err(|_| Error::new(ErrorKind::InvalidArgument, "a filter's text cannot contain NUL"))?;
        let (answer, filter) = OpenFilter::open(functions, &config);
        if answer.code != abi::OK {
            return Err(judge::refusal(answer.code, &answer.why));
        }
        let never_zeros = functions.has(abi::FILTER_NEVER_ZEROS);
        let open = PluginFilter { filter, name, never_zeros, _in_use: in_use };
        for at in [0, 512, 7 << 30, (1 << 52) - 2048] {
            open.try_out(at)?;
        }
        Ok(open)
    }

    fn try_out(&self, at: u64) -> Result<()> {
        let wrong = |what: &str| Err(judge::distrust(format!("the filter {} {what}", self.name)));
        let plain: Vec<u8> = (0..1536u32).map(|i| (i * 7 % 251) as u8).collect();
        let guarded = |bytes: &[u8]| [&[0xA5; GUARD], bytes, &[0xA5; GUARD]].concat();
        let mut together = guarded(&plain);
        let inside = GUARD..GUARD + plain.len();
        self.on_write(GuestOffset(at), &mut together[inside.clone()]);
        let written = together[inside.clone()].to_vec();
        for (n, sector) in (0..).zip(plain.chunks(512)) {
            let mut alone = guarded(sector);
            self.on_write(GuestOffset(at + n * 512), &mut alone[GUARD..GUARD + 512]);
            if alone != guarded(&written[512 * n as usize..][..512]) {
                return wrong("makes something else of a sector alone than of several");
            }
        }
        self.on_read(GuestOffset(at), &mut together[inside]);
        if together != guarded(&plain) {
            return wrong("does not give back what was written, or touches what is beside it");
        }
        Ok(())
    }
}

impl Filter for PluginFilter {
    fn name(&self) -> &'static str {
        self.name
    }

    fn on_write(&self, at: GuestOffset, bytes: &mut [u8]) {
        self.filter.on_write(at.0, bytes);
    }

    fn on_read(&self, at: GuestOffset, bytes: &mut [u8]) {
        self.filter.on_read(at.0, bytes);
    }

    fn may_write_zeros(&self) -> bool {
        !self.never_zeros
    }
}
