//! The structures and constants of `include/vdblk_plugin.h`, whose comments say what they mean. `tests/plugin_abi.rs` holds one against
//! the other, by a C compiler.

use std::ffi::{c_char, c_void};
use std::mem::{offset_of, size_of};

/// The version of the interface: plug-ins are of the same major version, and of this minor one or a lower.
pub const ABI_VERSION: (u16, u16) = (1, 0);

/// Defines a structure, and lists its layout.
macro_rules! structures {
    ($($(#[$doc:meta])* $c_name:literal $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy)]
            pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }
        )*

        /// Size of each structure and offset of each of its fields, by the names in C.
        pub fn layout() -> Vec<(String, usize)> {
            let mut all = Vec::new();
            $(
                all.push(($c_name.to_string(), size_of::<$name>()));
                $(all.push((
                    format!("{}.{}", $c_name, stringify!($field).trim_start_matches("r#")),
                    offset_of!($name, $field),
                ));)*
            )*
            all
        }
    };
}

/// Defines constants, and lists their values.
macro_rules! constants {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: $type = $value;)*

        /// The value of each constant, by its name in C behind `VDBLK_`.
        pub fn constants() -> Vec<(&'static str, i128)> {
            vec![$((stringify!($name), i128::from($name)),)*]
        }
    };
}

constants! {
    /// The first bytes of what host and plug-in tell of themselves.
    PLUGIN_MAGIC: u64 = u64::from_le_bytes(*b"VDBLKPLG");
    /// Of [`ABI_VERSION`].
    ABI_MAJOR: u16 = ABI_VERSION.0;
    /// Of [`ABI_VERSION`].
    ABI_MINOR: u16 = ABI_VERSION.1;

    /// Done.
    OK: i32 = 0;
    /// Read what is asked for and call again.
    MORE: i32 = 1;
    /// [`crate::map::Miss::NeedsPlan`].
    NEEDS_PLAN: i32 = 2;
    /// [`crate::map::Miss::NeedsRoom`].
    NEEDS_ROOM: i32 = 3;
    /// [`crate::ErrorKind::NotThisFormat`].
    NOT_THIS_FORMAT: i32 = -1;
    /// [`crate::ErrorKind::Corrupt`].
    CORRUPT: i32 = -2;
    /// [`crate::ErrorKind::Unsupported`].
    UNSUPPORTED: i32 = -3;
    /// [`crate::ErrorKind::Limit`].
    LIMIT: i32 = -4;
    /// [`crate::ErrorKind::InvalidArgument`].
    INVALID_ARGUMENT: i32 = -5;
    /// [`crate::ErrorKind::ReadOnly`].
    READ_ONLY: i32 = -6;
    /// [`crate::ErrorKind::NoSpace`].
    NO_SPACE: i32 = -7;

    /// Bit of [`Round::how`].
    OPEN_READ_ONLY: u32 = 1;
    /// Bit of [`Round::how`].
    OPEN_INFO: u32 = 2;
    /// Bit of [`Round::how`].
    OPEN_CHECK: u32 = 4;

    /// Bit of [`Disk::flags`].
    DISK_DIFF: u32 = 1;

    /// Bit of [`Info::known`].
    INFO_ALLOCATED: u32 = 1;
    /// Bit of [`Info::known`].
    INFO_UUID: u32 = 2;
    /// Bit of [`Info::known`].
    INFO_MODIFICATION: u32 = 4;
    /// Bit of [`Info::known`].
    INFO_PARENT: u32 = 8;
    /// Bit of [`Info::known`].
    INFO_PARENT_MODIFICATION: u32 = 16;

    /// [`crate::map::ExtentKind::Data`].
    EXTENT_DATA: u32 = 0;
    /// [`crate::map::ExtentKind::Zero`].
    EXTENT_ZERO: u32 = 1;
    /// [`crate::map::ExtentKind::Parent`].
    EXTENT_PARENT: u32 = 2;
    /// [`crate::map::ExtentKind::Packed`].
    EXTENT_PACKED: u32 = 3;

    /// [`crate::map::Codec::Deflate`].
    CODEC_DEFLATE: u32 = 0;
    /// [`crate::map::Codec::Zlib`].
    CODEC_ZLIB: u32 = 1;
    /// [`crate::map::Codec::Zstd`].
    CODEC_ZSTD: u32 = 2;
    /// [`crate::map::Codec::Bzip2`].
    CODEC_BZIP2: u32 = 3;
    /// [`crate::map::Codec::Lzfse`].
    CODEC_LZFSE: u32 = 4;
    /// [`crate::map::Codec::Xz`].
    CODEC_XZ: u32 = 5;

    /// [`crate::map::Intent::Read`].
    INTENT_READ: u32 = 0;
    /// [`crate::map::Intent::Overwrite`].
    INTENT_OVERWRITE: u32 = 1;

    /// [`crate::map::MetaKey::Header`].
    KEY_HEADER: u32 = 0;
    /// [`crate::map::MetaKey::Page`].
    KEY_PAGE: u32 = 1;

    /// [`crate::map::MetaOp::Entry`].
    OP_ENTRY: u32 = 0;
    /// [`crate::map::MetaOp::Count`].
    OP_COUNT: u32 = 1;
    /// [`crate::map::MetaOp::Modification`].
    OP_MODIFICATION: u32 = 2;
    /// [`crate::map::MetaOp::InUse`].
    OP_IN_USE: u32 = 3;

    /// [`crate::map::Step::Guest`].
    STEP_GUEST: u32 = 0;
    /// [`crate::map::Step::Block`].
    STEP_BLOCK: u32 = 1;
    /// [`crate::map::Step::Meta`].
    STEP_META: u32 = 2;
    /// [`crate::map::Step::Extend`].
    STEP_EXTEND: u32 = 3;
    /// [`crate::map::Step::Truncate`].
    STEP_TRUNCATE: u32 = 4;
    /// [`crate::map::Step::Punch`].
    STEP_PUNCH: u32 = 5;
    /// [`crate::map::Step::Move`].
    STEP_MOVE: u32 = 6;
    /// [`crate::map::Step::Barrier`].
    STEP_BARRIER: u32 = 7;
    /// [`crate::map::Step::Sync`].
    STEP_SYNC: u32 = 8;

    /// [`crate::map::Change::Write`].
    CHANGE_WRITE: u32 = 0;
    /// [`crate::map::Change::Zero`].
    CHANGE_ZERO: u32 = 1;

    /// [`crate::format::Severity::Corruption`].
    FINDING_CORRUPTION: u32 = 0;
    /// [`crate::format::Severity::Leak`].
    FINDING_LEAK: u32 = 1;

    /// Bit of [`New::flags`].
    NEW_UUID: u32 = 1;
    /// Bit of [`New::flags`].
    NEW_DIFF: u32 = 2;
    /// Bit of [`New::flags`].
    NEW_PARENT_UUID: u32 = 4;
    /// Bit of [`New::flags`].
    NEW_PARENT_MODIFICATION: u32 = 8;

    /// Bit of [`Format::flags`].
    FORMAT_WRITES: u32 = 1;
    /// Bit of [`Format::flags`].
    FORMAT_THREADS: u32 = 2;
    /// Bit of [`Format::flags`].
    FORMAT_UUID: u32 = 4;
    /// Bit of [`Format::flags`].
    FORMAT_DIFF: u32 = 8;
    /// Bit of [`Format::flags`].
    FORMAT_COMMENT: u32 = 16;

    /// Bit of [`Filter::flags`].
    FILTER_THREADS: u32 = 1;
    /// Bit of [`Filter::flags`].
    FILTER_NEVER_ZEROS: u32 = 2;

    /// A line of the log.
    LOG_ERROR: u32 = 0;
    /// A line of the log.
    LOG_WARNING: u32 = 1;
    /// A line of the log.
    LOG_INFO: u32 = 2;
    /// A line of the log.
    LOG_DEBUG: u32 = 3;
}

/// A function of a plug-in or of the host; `None`: NULL.
macro_rules! function {
    ($($argument:ty),* => $answer:ty) => { Option<unsafe extern "C" fn($($argument),*) -> $answer> };
    ($($argument:ty),*) => { Option<unsafe extern "C" fn($($argument),*)> };
}

#[allow(missing_docs, reason = "the header tells")]
mod structures {
    use super::*;

    structures! {
        "vdblk_error" Error { text: [c_char; 256], }
        "vdblk_range" Range { file: u32, reserved: u32, off: u64, len: u64, }
        "vdblk_bytes" Bytes { file: u32, reserved: u32, off: u64, len: u64, data: *const u8, }
        "vdblk_round" Round {
            struct_size: u32,
            number: u32,
            file_bytes: *const u64,
            file_count: u32,
            have_count: u32,
            have: *const Bytes,
            how: u32,
            reserved: u32,
        }
        "vdblk_needs" Needs { struct_size: u32, room: u32, count: u32, reserved: u32, ranges: *mut Range, }
        "vdblk_disk" Disk {
            struct_size: u32,
            flags: u32,
            size_bytes: u64,
            block_bytes: u64,
            data_alignment: u64,
        }
        "vdblk_info" Info {
            struct_size: u32,
            known: u32,
            variant: u32,
            reserved: u32,
            allocated_blocks: u64,
            uuid: [u8; 16],
            modification_uuid: [u8; 16],
            parent_uuid: [u8; 16],
            parent_modification_uuid: [u8; 16],
            parent_name: [c_char; 1024],
            parent_format: [c_char; 32],
            comment: [c_char; 1024],
            version: [c_char; 32],
        }
        "vdblk_extent" Extent {
            kind: u32,
            file: u32,
            len: u64,
            off: u64,
            codec: u32,
            packed_len: u32,
            unit_len: u32,
            into: u32,
        }
        "vdblk_key" Key { kind: u32, table: u32, number: u64, }
        "vdblk_op" Op { kind: u32, flag: u32, index: u64, value: u64, uuid: [u8; 16], }
        "vdblk_step" Step {
            kind: u32,
            file: u32,
            guest_start: u64,
            guest_len: u64,
            from: u64,
            to: u64,
            len: u64,
            clean: u32,
            reserved: u32,
            key: Key,
            op: Op,
        }
        "vdblk_plan" Plan {
            struct_size: u32,
            room: u32,
            count: u32,
            clean: u32,
            has_token: u32,
            reserved: u32,
            token: u64,
            steps: *mut Step,
        }
        "vdblk_change" Change {
            struct_size: u32,
            kind: u32,
            guest_start: u64,
            guest_len: u64,
            beneath_zero: u32,
            reserved: u32,
        }
        "vdblk_end" End { struct_size: u32, errno_value: i32, clean: u32, entry_submitted: u32, }
        "vdblk_page" Page { struct_size: u32, file: u32, off: u64, room: u32, len: u32, bytes: *mut u8, }
        "vdblk_report" Report {
            struct_size: u32,
            reserved: u32,
            blocks: u64,
            allocated: u64,
            host: *mut c_void,
            finding: function!(*mut c_void, u32, *const c_char),
        }
        "vdblk_option" NewOption { key: *const c_char, value: *const c_char, is_number: u32, reserved: u32, }
        "vdblk_new" New {
            struct_size: u32,
            flags: u32,
            size_bytes: u64,
            variant: *const c_char,
            uuid: [u8; 16],
            modification_uuid: [u8; 16],
            parent_uuid: [u8; 16],
            parent_modification_uuid: [u8; 16],
            parent_name: *const c_char,
            parent_format: *const c_char,
            comment: *const c_char,
            options: *const NewOption,
            option_count: u32,
            reserved: u32,
        }
        "vdblk_sink" Sink {
            struct_size: u32,
            reserved: u32,
            host: *mut c_void,
            length: function!(*mut c_void, u64 => i32),
            reserve: function!(*mut c_void, u64, u64 => i32),
            piece: function!(*mut c_void, u64, *const c_void, u64 => i32),
        }
        "vdblk_format" Format {
            struct_size: u32,
            flags: u32,
            name: *const c_char,
            title: *const c_char,
            extensions: *const *const c_char,
            variants: *const *const c_char,
            extension_count: u32,
            variant_count: u32,
            options: *const NewOption,
            option_count: u32,
            reserved: u32,
            probe: function!(*const u8, u32, *const u8, u32, u64 => i32),
            open: function!(*const Round, *mut *mut c_void, *mut Needs, *mut Disk, *mut Error => i32),
            close: function!(*mut c_void),
            info: function!(*mut c_void, *mut Info => i32),
            map: function!(*mut c_void, u64, u64, u32, *mut Extent, u32, *mut u32 => i32),
            plan: function!(*mut c_void, *const Change, *mut Plan => i32),
            room: function!(*mut c_void, u32, *mut Plan => i32),
            settle: function!(*mut c_void, u64, *const End),
            must_write: function!(*mut c_void, u64 => i32),
            compose: function!(*mut c_void, *const Key, *const Op, u32, *mut Page => i32),
            publish: function!(*mut c_void, *const Key, *const Op, u32),
            begin: function!(*mut c_void, *const u8, *mut Plan => i32),
            end: function!(*mut c_void, *mut Plan => i32),
            check: function!(*mut c_void, *mut Report => i32),
            create: function!(*const New, *const Sink, *mut Error => i32),
        }
        "vdblk_filter" Filter {
            struct_size: u32,
            flags: u32,
            name: *const c_char,
            sector_bytes: u32,
            reserved: u32,
            open: function!(*const c_char, *mut *mut c_void, *mut Error => i32),
            close: function!(*mut c_void),
            on_write: function!(*mut c_void, u64, *mut u8, u64),
            on_read: function!(*mut c_void, u64, *mut u8, u64),
        }
        "vdblk_host" Host {
            magic: u64,
            abi_major: u16,
            abi_minor: u16,
            struct_size: u32,
            version: *const c_char,
            log: function!(u32, *const c_char),
        }
        "vdblk_plugin" Plugin {
            magic: u64,
            abi_major: u16,
            abi_minor: u16,
            struct_size: u32,
            name: *const c_char,
            version: *const c_char,
            formats: *const *const Format,
            filters: *const *const Filter,
            format_count: u32,
            filter_count: u32,
            unload: function!(),
        }
    }
}
pub use structures::*;

/// `vdblk_plugin_load`.
pub type LoadFn = unsafe extern "C" fn(*const Host, *mut *const Plugin, *mut Error) -> i32;

/// The size of a structure, as its own first field has it.
pub(super) fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("a few kilobytes")
}
