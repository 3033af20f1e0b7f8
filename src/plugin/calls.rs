//! The calls of a plug-in's functions: Rust values in, Rust values out, nothing of them believed yet.

use super::abi;
use super::text::{Text, count_of};
use crate::limits::META_PAGE_BYTES;
use std::ffi::{CString, c_char, c_void};
use std::fmt;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Steps of one plan.
const MAX_STEPS: u32 = 64;
/// Ranges of one round.
const MAX_RANGES: u32 = 64;

/// What a function answered: its code, and what it said about it.
pub(super) struct Answer {
    pub(super) code: i32,
    pub(super) why: Text,
}

/// A plan as it came.
pub(super) struct RawPlan {
    pub(super) steps: Vec<abi::Step>,
    /// It says that it has put more there than there was room for.
    pub(super) overrun: bool,
    pub(super) clean: u32,
    pub(super) token: Option<u64>,
}

/// A page as it came.
pub(super) struct RawPage {
    pub(super) file: u32,
    pub(super) off: u64,
    /// As it says; the bytes are as many as there was room for.
    pub(super) len: u32,
    pub(super) bytes: Vec<u8>,
}

/// What a check found: texts with their severities.
pub(super) struct RawReport {
    pub(super) blocks: u64,
    pub(super) allocated: u64,
    pub(super) findings: Vec<(u32, Result<String, &'static str>)>,
    /// Findings that were not kept any more.
    pub(super) more: u64,
}

/// What of a new file was said.
#[derive(Default)]
pub(super) struct RawFile {
    pub(super) len: u64,
    pub(super) reserve: Option<(u64, u64)>,
    pub(super) pieces: Vec<(u64, Vec<u8>)>,
    total: usize,
    /// An answer of a sink's function was not 0.
    pub(super) refused: bool,
}

/// Bytes of all pieces of a new file.
const MAX_PIECES_BYTES: usize = 64 << 20;
/// Findings that are kept: what is shown, and more.
const MAX_FINDINGS: usize = 1000;

/// A plug-in's functions for a format.
pub(super) struct Functions(abi::Format);

// SAFETY: the addresses in it are those of constants of the library, which are only read.
unsafe impl Send for Functions {}
// SAFETY: the same.
unsafe impl Sync for Functions {}

impl fmt::Debug for Functions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Functions")
    }
}

impl Functions {
    pub(super) fn new(functions: abi::Format) -> Functions {
        Functions(functions)
    }

    /// It has said so.
    pub(super) fn has(&self, flag: u32) -> bool {
        self.0.flags & flag != 0
    }
}

/// The same for a filter.
#[derive(Clone, Copy)]
pub(super) struct FilterFunctions(abi::Filter);

// SAFETY: as of formats.
unsafe impl Send for FilterFunctions {}
// SAFETY: as of formats.
unsafe impl Sync for FilterFunctions {}

impl FilterFunctions {
    pub(super) fn new(functions: abi::Filter) -> FilterFunctions {
        FilterFunctions(functions)
    }

    /// It has said so.
    pub(super) fn has(self, flag: u32) -> bool {
        self.0.flags & flag != 0
    }
}

/// An image of a plug-in: the address it gave us, and its functions.
pub(super) struct Image {
    image: *mut c_void,
    functions: abi::Format,
    turn: Option<Mutex<()>>,
}

// SAFETY: the address is only ever given back to the plug-in, whose functions, by the interface, may be called by any thread.
unsafe impl Send for Image {}
// SAFETY: calls are made one after the other (`turn`), unless the plug-in has said that it can do without (VDBLK_FORMAT_THREADS).
unsafe impl Sync for Image {}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Image").field(&self.image).finish()
    }
}

/// A function that [`super::library`] has seen to be there.
macro_rules! call {
    ($self:ident.$name:ident($($argument:expr),*)) => {{
        let f = $self.functions.$name.expect("looked at when the plug-in was loaded");
        let _turn = $self.turn();
        // SAFETY: the function is of this type by the interface; the image (or filter) is the plug-in's own and open; what else is passed is valid
        // for the call.
        unsafe { f($self.object(), $($argument),*) }
    }};
}

impl Image {
    pub(super) fn new(functions: &Functions) -> Image {
        let turn = (!functions.has(abi::FORMAT_THREADS)).then(Mutex::default);
        Image { image: ptr::null_mut(), functions: functions.0, turn }
    }

    fn object(&self) -> *mut c_void {
        self.image
    }

    /// There is one.
    pub(super) fn is_open(&self) -> bool {
        !self.image.is_null()
    }

    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.turn.as_ref().map(|t| t.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A round of `open`: the ranges it needs now, and how many it says they are.
    pub(super) fn open(
        &mut self,
        number: u32,
        how: u32,
        file_bytes: u64,
        have: &[(abi::Range, Vec<u8>)],
    ) -> (Answer, Vec<abi::Range>, u32, abi::Disk) {
        let have: Vec<_> = have
            .iter()
            .map(|(r, bytes)| abi::Bytes {
                file: r.file,
                reserved: 0,
                off: r.off,
                len: r.len,
                data: bytes.as_ptr(),
            })
            .collect();
        let round = abi::Round {
            struct_size: abi::size::<abi::Round>(),
            number,
            file_bytes: &file_bytes,
            file_count: 1,
            have_count: u32::try_from(have.len()).expect("bounded"),
            have: have.as_ptr(),
            how,
            reserved: 0,
        };
        let mut ranges = vec![abi::Range { file: 0, reserved: 0, off: 0, len: 0 }; count_of(MAX_RANGES)];
        let mut needs = abi::Needs {
            struct_size: abi::size::<abi::Needs>(),
            room: MAX_RANGES,
            count: 0,
            reserved: 0,
            ranges: ranges.as_mut_ptr(),
        };
        let mut disk = abi::Disk {
            struct_size: abi::size::<abi::Disk>(),
            flags: 0,
            size_bytes: 0,
            block_bytes: 0,
            data_alignment: 0,
        };
        let mut why = Text::default();
        let f = self.functions.open.expect("looked at when the plug-in was loaded");
        // SAFETY: the function is of this type by the interface, and all that is passed is valid for the call; nobody else has the
        // image yet.
        let code = unsafe { f(&round, &mut self.image, &mut needs, &mut disk, why.as_mut_ptr()) };
        let count = needs.count;
        ranges.truncate(count_of(count));
        (Answer { code, why }, ranges, count, disk)
    }

    pub(super) fn info(&self) -> (i32, abi::Info) {
        // SAFETY: the structure is made of numbers and arrays of them, for which zeros are values.
        let mut info = unsafe { std::mem::zeroed::<abi::Info>() };
        info.struct_size = abi::size::<abi::Info>();
        (call!(self.info(&mut info)), info)
    }

    /// Fills `out`; says how many there are by the plug-in's word.
    pub(super) fn map(&self, start: u64, len: u64, intent: u32, out: &mut [abi::Extent]) -> (i32, u32) {
        let room = u32::try_from(out.len()).expect("bounded");
        let mut count = 0;
        let code = call!(self.map(start, len, intent, out.as_mut_ptr(), room, &mut count));
        (code, count)
    }

    pub(super) fn must_write(&self, at: u64) -> bool {
        call!(self.must_write(at)) != 0
    }

    pub(super) fn plan(&self, change: &abi::Change) -> (i32, RawPlan) {
        with_plan(|plan| call!(self.plan(change, plan)))
    }

    pub(super) fn room(&self, urgent: bool) -> (i32, RawPlan) {
        with_plan(|plan| call!(self.room(u32::from(urgent), plan)))
    }

    pub(super) fn begin(&self, modification: &[u8; 16]) -> (i32, RawPlan) {
        with_plan(|plan| call!(self.begin(modification.as_ptr(), plan)))
    }

    pub(super) fn end(&self) -> (i32, RawPlan) {
        with_plan(|plan| call!(self.end(plan)))
    }

    pub(super) fn settle(&self, token: u64, end: &abi::End) {
        call!(self.settle(token, end));
    }

    pub(super) fn compose(&self, key: &abi::Key, ops: &[abi::Op]) -> (i32, RawPage) {
        let room = usize::try_from(META_PAGE_BYTES).expect("small");
        let mut bytes = vec![0; room];
        let mut page = abi::Page {
            struct_size: abi::size::<abi::Page>(),
            file: 0,
            off: 0,
            room: u32::try_from(room).expect("small"),
            len: 0,
            bytes: bytes.as_mut_ptr(),
        };
        let count = u32::try_from(ops.len()).expect("bounded");
        let code = call!(self.compose(key, ops.as_ptr(), count, &mut page));
        (code, RawPage { file: page.file, off: page.off, len: page.len, bytes })
    }

    pub(super) fn publish(&self, key: &abi::Key, ops: &[abi::Op]) {
        let count = u32::try_from(ops.len()).expect("bounded");
        call!(self.publish(key, ops.as_ptr(), count));
    }

    pub(super) fn check(&self) -> (i32, RawReport) {
        let mut found = RawReport { blocks: 0, allocated: 0, findings: Vec::new(), more: 0 };
        let mut report = abi::Report {
            struct_size: abi::size::<abi::Report>(),
            reserved: 0,
            blocks: 0,
            allocated: 0,
            host: (&raw mut found).cast(),
            finding: Some(finding),
        };
        let code = call!(self.check(&mut report));
        (found.blocks, found.allocated) = (report.blocks, report.allocated);
        (code, found)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if !self.image.is_null() {
            call!(self.close());
        }
    }
}

fn with_plan(ask: impl FnOnce(&mut abi::Plan) -> i32) -> (i32, RawPlan) {
    let key = abi::Key { kind: 0, table: 0, number: 0 };
    let op = abi::Op { kind: 0, flag: 0, index: 0, value: 0, uuid: [0; 16] };
    let empty = abi::Step {
        // none that there is
        kind: u32::MAX,
        file: 0,
        guest_start: 0,
        guest_len: 0,
        from: 0,
        to: 0,
        len: 0,
        clean: 0,
        reserved: 0,
        key,
        op,
    };
    let mut steps = vec![empty; count_of(MAX_STEPS)];
    let mut plan = abi::Plan {
        struct_size: abi::size::<abi::Plan>(),
        room: MAX_STEPS,
        count: 0,
        clean: 0,
        has_token: 0,
        reserved: 0,
        token: 0,
        steps: steps.as_mut_ptr(),
    };
    let code = ask(&mut plan);
    let overrun = plan.count > MAX_STEPS;
    steps.truncate(count_of(plan.count));
    let token = (plan.has_token != 0).then_some(plan.token);
    (code, RawPlan { steps, overrun, clean: plan.clean, token })
}

/// `vdblk_report.finding`.
///
/// # Safety
/// `host` is what the report has, during the call of `check`; `text` NULL or a text.
unsafe extern "C" fn finding(host: *mut c_void, severity: u32, text: *const c_char) {
    // SAFETY: as the caller promises: it is the report of the check under way, which nobody else uses meanwhile.
    let (found, text) = unsafe { (host.cast::<RawReport>().as_mut(), text_of(text, 1024)) };
    let Some(found) = found else { return };
    if found.findings.len() < MAX_FINDINGS {
        found.findings.push((severity, text));
    } else {
        found.more += 1;
    }
}

/// Whether a file may be of the format.
pub(super) fn probe(functions: &Functions, head: &[u8], foot: &[u8], file_bytes: u64) -> i32 {
    let f = functions.0.probe.expect("looked at when the plug-in was loaded");
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a sector");
    // SAFETY: the function is of this type by the interface, and the bytes are there as long as the call.
    unsafe { f(head.as_ptr(), len(head), foot.as_ptr(), len(foot), file_bytes) }
}

/// The texts and numbers of a new image, for C.
#[derive(Default)]
pub(super) struct Wish {
    pub(super) flags: u32,
    pub(super) size_bytes: u64,
    pub(super) variant: Option<CString>,
    pub(super) uuid: [u8; 16],
    pub(super) modification_uuid: [u8; 16],
    pub(super) parent_uuid: [u8; 16],
    pub(super) parent_modification_uuid: [u8; 16],
    pub(super) parent_name: Option<CString>,
    pub(super) parent_format: Option<CString>,
    pub(super) comment: Option<CString>,
    pub(super) options: Vec<(CString, CString)>,
}

/// Has a new image described.
pub(super) fn create(functions: &Functions, wish: &Wish) -> (Answer, RawFile) {
    let text = |t: &Option<CString>| t.as_ref().map_or(ptr::null(), |t| t.as_ptr());
    let options: Vec<_> = wish
        .options
        .iter()
        .map(|(k, v)| abi::NewOption { key: k.as_ptr(), value: v.as_ptr(), is_number: 0, reserved: 0 })
        .collect();
    let new = abi::New {
        struct_size: abi::size::<abi::New>(),
        flags: wish.flags,
        size_bytes: wish.size_bytes,
        variant: text(&wish.variant),
        uuid: wish.uuid,
        modification_uuid: wish.modification_uuid,
        parent_uuid: wish.parent_uuid,
        parent_modification_uuid: wish.parent_modification_uuid,
        parent_name: text(&wish.parent_name),
        parent_format: text(&wish.parent_format),
        comment: text(&wish.comment),
        options: options.as_ptr(),
        option_count: u32::try_from(options.len()).expect("typed by somebody"),
        reserved: 0,
    };
    let mut file = RawFile::default();
    let sink = abi::Sink {
        struct_size: abi::size::<abi::Sink>(),
        reserved: 0,
        host: (&raw mut file).cast(),
        length: Some(sink_length),
        reserve: Some(sink_reserve),
        piece: Some(sink_piece),
    };
    let mut why = Text::default();
    let f = functions.0.create.expect("asked before");
    // SAFETY: the function is of this type by the interface; the wish and all it points to, and the sink, are there as long as the call.
    let code = unsafe { f(&new, &sink, why.as_mut_ptr()) };
    (Answer { code, why }, file)
}

/// `vdblk_sink.length`.
///
/// # Safety
/// `host` is what the sink has, during the call of `create`.
unsafe extern "C" fn sink_length(host: *mut c_void, len: u64) -> i32 {
    // SAFETY: as the caller promises: it is the file of the call under way, which nobody else uses meanwhile.
    let Some(file) = (unsafe { host.cast::<RawFile>().as_mut() }) else { return abi::INVALID_ARGUMENT };
    file.len = len;
    abi::OK
}

/// `vdblk_sink.reserve`.
///
/// # Safety
/// As [`sink_length`].
unsafe extern "C" fn sink_reserve(host: *mut c_void, off: u64, len: u64) -> i32 {
    // SAFETY: as the caller promises.
    let Some(file) = (unsafe { host.cast::<RawFile>().as_mut() }) else { return abi::INVALID_ARGUMENT };
    if file.reserve.replace((off, len)).is_some() {
        file.refused = true;
        return abi::INVALID_ARGUMENT;
    }
    abi::OK
}

/// `vdblk_sink.piece`.
///
/// # Safety
/// As [`sink_length`]; `data` has `len` bytes.
unsafe extern "C" fn sink_piece(host: *mut c_void, off: u64, data: *const c_void, len: u64) -> i32 {
    // SAFETY: as the caller promises.
    let Some(file) = (unsafe { host.cast::<RawFile>().as_mut() }) else { return abi::INVALID_ARGUMENT };
    let room = MAX_PIECES_BYTES - file.total;
    let Some(len) = usize::try_from(len).ok().filter(|n| *n <= room) else {
        file.refused = true;
        return abi::LIMIT;
    };
    if data.is_null() && len > 0 {
        file.refused = true;
        return abi::INVALID_ARGUMENT;
    }
    if len > 0 {
        // SAFETY: as the caller promises, and not NULL.
        let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len) };
        file.pieces.push((off, bytes.to_vec()));
        file.total += len;
    }
    abi::OK
}

/// A filter of a plug-in that is open.
pub(super) struct OpenFilter {
    filter: *mut c_void,
    functions: abi::Filter,
    turn: Option<Mutex<()>>,
}

// SAFETY: as of images.
unsafe impl Send for OpenFilter {}
// SAFETY: as of images: one call after the other, unless VDBLK_FILTER_THREADS.
unsafe impl Sync for OpenFilter {}

impl fmt::Debug for OpenFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OpenFilter").field(&self.filter).finish()
    }
}

impl OpenFilter {
    /// Opens it; whatever the answer, dropping it closes it if there is something to close.
    pub(super) fn open(functions: FilterFunctions, config: &CString) -> (Answer, OpenFilter) {
        let turn = (!functions.has(abi::FILTER_THREADS)).then(Mutex::default);
        let functions = functions.0;
        let mut open = OpenFilter { filter: ptr::null_mut(), functions, turn };
        let mut why = Text::default();
        let f = functions.open.expect("looked at when the plug-in was loaded");
        // SAFETY: the function is of this type by the interface; all that is passed is valid for the call.
        let code = unsafe { f(config.as_ptr(), &mut open.filter, why.as_mut_ptr()) };
        (Answer { code, why }, open)
    }

    fn object(&self) -> *mut c_void {
        self.filter
    }

    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.turn.as_ref().map(|t| t.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn on_write(&self, at: u64, bytes: &mut [u8]) {
        call!(self.on_write(at, bytes.as_mut_ptr(), bytes.len() as u64));
    }

    pub(super) fn on_read(&self, at: u64, bytes: &mut [u8]) {
        call!(self.on_read(at, bytes.as_mut_ptr(), bytes.len() as u64));
    }
}

impl Drop for OpenFilter {
    fn drop(&mut self) {
        if !self.filter.is_null() {
            call!(self.close());
        }
    }
}

/// The text at an address, of `most` bytes.
///
/// # Errors
/// What is wrong with it.
///
/// # Safety
/// The address is NULL, or that of a text of at most `most` bytes and a NUL, or of memory that is at least so long.
pub(super) unsafe fn text_of(text: *const c_char, most: usize) -> Result<String, &'static str> {
    if text.is_null() {
        return Err("is missing");
    }
    let mut bytes = Vec::new();
    for n in 0..=most {
        // SAFETY: no NUL was met before this byte, so it belongs to the text.
        let byte = unsafe { text.add(n).read() }.cast_unsigned();
        if byte == 0 {
            return String::from_utf8(bytes).map_err(|_| "is no UTF-8");
        }
        bytes.push(byte);
    }
    Err("is too long")
}
