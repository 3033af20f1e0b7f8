//! Every bound in one place. Nothing that comes from a guest, a front-end or a file sizes an
//! allocation or a loop without one of these in between.

/// The unit of virtio-blk and of VirtualBox, whatever the disk's logical block size.
pub const SECTOR_BYTES: u64 = 512;

/// Virtqueues one device offers at most (the crates underneath use 64-bit queue masks).
pub const MAX_QUEUES: u16 = 64;
/// Entries of one virtqueue at most: QEMU's own limit. crosvm asks for more unless told not to (README).
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Smallest `--queue-size` worth offering: header, data and status without indirect tables.
pub const MIN_QUEUE_SIZE: u16 = 16;
/// Descriptors of one chain, indirect tables included.
pub const MAX_CHAIN_DESCRIPTORS: usize = 1024;
/// Data segments a driver may put into one request (`seg_max`). 126 and a header and a status fill a ring of 128, the
/// default of QEMU: chains longer than the ring are against the specification, and the ring's size is not known when
/// the driver asks.
pub const MAX_SEGMENTS: u32 = 126;
/// Data bytes of one request. Larger ones are answered with IOERR.
pub const MAX_REQUEST_BYTES: u64 = 1 << 30;
/// Segments of one DISCARD or WRITE_ZEROES request.
pub const MAX_DISCARD_SEGMENTS: u32 = 256;
/// Sectors of one segment of a DISCARD or WRITE_ZEROES request: 1 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Memory regions a front-end may announce; QEMU must never see this shrink over a reconnect.
pub const MAX_MEM_SLOTS: usize = 509;
/// Bytes of a log of dirty pages: enough for a guest of 32 TiB.
pub const MAX_LOG_BYTES: u64 = 1 << 30;

/// Images of one chain.
pub const MAX_CHAIN_IMAGES: usize = 256;
/// Files of one chain (an image may consist of several).
pub const MAX_FILES: usize = 4096;
/// Files looked at when parents are searched by UUID.
pub const MAX_PARENT_SEARCH_FILES: usize = 10_000;
/// Folder levels descended when parents are searched by UUID.
pub const MAX_PARENT_SEARCH_DEPTH: usize = 4;

/// Largest virtual disk: 4 PiB, VirtualBox's limit for VDI.
pub const MAX_DISK_BYTES: u64 = 4 << 50;
/// Largest block table kept in memory.
pub const MAX_TABLE_BYTES: u64 = 1 << 30;
/// Largest disk of a VHD: of what its sectors hold, a bit each 2 MiB is kept. 2040 GiB is what Microsoft allows.
pub const MAX_VHD_DISK_BYTES: u64 = 64 << 40;
/// Largest block table of a VHD: 4 bytes for each block of a disk of 2 TiB.
pub const MAX_VHD_TABLE_BYTES: u64 = 64 << 20;
/// Largest log of a VHDX that is replayed; Hyper-V and QEMU make 1 MiB.
pub const MAX_VHDX_LOG_BYTES: u64 = 64 << 20;
/// Pages of tables that are too large to be kept whole, of one image: with what belongs to them, 32 MiB.
pub const MAX_PAGE_CACHE_BYTES: u64 = 24 << 20;
/// Block sizes of BAT formats.
pub const MIN_BLOCK_BYTES: u64 = 4 << 10;
/// Block sizes of BAT formats.
pub const MAX_BLOCK_BYTES: u64 = 256 << 20;

/// Extents one look-up returns; a request that needs more is mapped in turns.
pub const MAX_EXTENTS: usize = 32;
/// I/O operations one request keeps in flight.
pub const MAX_REQUEST_OPS: u16 = 64;
/// A piece of a copy through a bounce buffer.
pub const BOUNCE_BYTES: usize = 256 << 10;
/// All bounce buffers together.
pub const BOUNCE_POOL_BYTES: usize = 32 << 20;
/// A page of a table: what one metadata write covers at most.
pub const META_PAGE_BYTES: u64 = 4096;
/// Bytes of a packed unit, packed: what no codec makes of [`MAX_UNIT_BYTES`] is not read.
pub const MAX_PACKED_BYTES: u32 = 2 * MAX_UNIT_BYTES;
/// Bytes of a packed unit, unpacked.
pub const MAX_UNIT_BYTES: u32 = 4 << 20;
/// Unpacked units that one disk keeps, all together.
pub const UNIT_CACHE_BYTES: usize = 16 << 20;
/// Packed units of one disk that are on their way at a time; others wait.
pub const MAX_UNITS_LOADING: usize = 8;
/// Places of a cache image: 256 GiB in blocks of 64 KiB, and 64 MiB of memory.
pub const MAX_CACHE_PLACES: u64 = 4 << 20;
/// Blocks that one channel copies into a cache image at a time.
pub const MAX_CACHE_FILLS: u16 = 4;
/// Blocks that one channel has still to copy into a cache image; of what comes meanwhile nothing is kept.
pub const MAX_CACHE_WISHES: usize = 64;
/// Places of a cache image that one request reads from; the rest of it comes from the base.
pub const MAX_CACHE_PINS: usize = 1024;
/// Largest property list of a DMG: chunks of 256 KiB for 150 GiB.
pub const MAX_PLIST_BYTES: u64 = 32 << 20;
/// Bytes of the window a packed unit may ask for to be unpacked.
pub const MAX_UNPACK_WINDOW: u64 = 8 << 20;
/// First-level tables that are kept whole and pages of second-level ones, of one image: with what belongs to them, 32 MiB.
pub const TABLE_CACHE_BYTES: u64 = 20 << 20;
/// Clean blocks prepared ahead of need, in bytes of the file.
pub const POOL_STEP_BYTES: u64 = 64 << 20;
/// Largest buffered write done by the queue's own thread rather than handed to the engine.
pub const INLINE_WRITE_BYTES: u64 = 64 << 10;
/// Iovecs of one operation (the kernel's UIO_MAXIOV).
pub const MAX_IOVECS: usize = 1024;
/// A piece of a table read or written at a time while opening, creating or checking.
pub const TABLE_PIECE_BYTES: usize = 256 << 10;
/// Bytes that belong to no block and are looked at by a repair, to say whether they are zeros.
pub const MAX_ORPHAN_LOOK_BYTES: u64 = 1 << 30;
/// Bytes a repair copies for blocks that share their places, if that is more than the file has: a table of 1 MiB can
/// name one place a quarter of a million times.
pub const MAX_SEPARATED_BYTES: u64 = 64 << 20;
/// Bytes a repair lengthens a file by at a time, and zeros it writes at most where the file system cannot allocate: four of
/// the largest blocks.
pub const MAX_ZEROS_BYTES: u64 = 1 << 30;
/// Lines a check prints; what it counts is not bounded.
pub const MAX_CHECK_LINES: usize = 200;
/// Operations one engine has in flight at most, whatever is asked for.
pub const MAX_ENGINE_DEPTH: u32 = 4096;
/// Threads of the process-wide pool behind the thread engine.
pub const POOL_THREADS: usize = 8;
/// Chains taken before the device is asked again what has ended.
pub const BATCH_CHAINS: u16 = 64;
/// Answers that a driver waits for before it sees the first while more is to be done: at least and at most. A signal costs as much as
/// several requests, and a driver that sees nothing asks for nothing.
pub const PUBLISH_COMPLETIONS: [u16; 2] = [4, 32];
/// Microseconds that a driver waits for at most before it sees the first answer while more is to be done.
pub const PUBLISH_MICROS: u64 = 50;
/// Longest time, in microseconds, a worker looks at its ring before it goes to sleep (`--poll-us`).
pub const MAX_POLL_MICROS: u32 = 1000;
