/*
 * vdblk's plug-ins: formats of disk images and filters that are added at run time.
 *
 * docs/plugins.md tells how one is written, loaded and used, which function may be called when, and what is promised
 * about this file. Two rules before all others:
 *
 *   - A plug-in neither reads nor writes files. It is given bytes, and answers with places, orders of writes and bytes.
 *   - Whatever it answers is checked as if it came from a file nobody vouches for. An answer that cannot be is an error of
 *     the image, never a read or write elsewhere.
 *
 * Integers are the machine's own. Texts are UTF-8 and end with a NUL. UUIDs are 16 bytes in the order in which they are
 * written (RFC 9562). Offsets and lengths are bytes. Structures only ever grow at their ends, and `struct_size` says how
 * much of one the other side knows: of one that the host has filled in, nothing behind it may be touched.
 *
 * SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
 */
#ifndef VDBLK_PLUGIN_H
#define VDBLK_PLUGIN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The bytes "VDBLKPLG" on a little-endian machine. */
#define VDBLK_PLUGIN_MAGIC UINT64_C(0x474c504b4c424456)
/* Of host and plug-in: this must be the same ... */
#define VDBLK_ABI_MAJOR 1
/* ... and the host's this or higher. */
#define VDBLK_ABI_MINOR 0

/* ---- answers of functions ------------------------------------------------------------------------------------- */

/* Done. */
#define VDBLK_OK 0
/* `open`: the ranges asked for are to be read; call again with them. */
#define VDBLK_MORE 1
/* `map` for overwriting: nothing is allocated there, ask for a plan. */
#define VDBLK_NEEDS_PLAN 2
/* `plan`: no prepared place is left; carry out `room` (urgent) and ask again. */
#define VDBLK_NEEDS_ROOM 3

/* The bytes are not of this format. */
#define VDBLK_NOT_THIS_FORMAT (-1)
/* The format's own rules are broken. */
#define VDBLK_CORRUPT (-2)
/* A version, feature or operation that is not supported. `plan` of VDBLK_CHANGE_ZERO: write zeros instead. */
#define VDBLK_UNSUPPORTED (-3)
/* A bound was reached: memory, the size of a table. */
#define VDBLK_LIMIT (-4)
/* A value the user gave is not usable. */
#define VDBLK_INVALID_ARGUMENT (-5)
/* A change of something that was opened for reading. */
#define VDBLK_READ_ONLY (-6)
/* `plan`: no room, as `settle` was told of the last extension (`vdblk_end.errno_value`). */
#define VDBLK_NO_SPACE (-7)

/* One line for people, without the file's name; empty: the code says enough. */
typedef struct vdblk_error {
    char text[256];
} vdblk_error;

/* ---- bytes of files ------------------------------------------------------------------------------------------- */

/* A range of a file. Images have one file so far, number 0. */
typedef struct vdblk_range {
    uint32_t file;
    uint32_t reserved;
    uint64_t off;
    uint64_t len;
} vdblk_range;

/* The bytes of a range that was asked for; they are there until the function returns. */
typedef struct vdblk_bytes {
    uint32_t file;
    uint32_t reserved;
    uint64_t off;
    uint64_t len;
    const uint8_t *data;
} vdblk_bytes;

/* A round of `open`: what was asked for in the one before, in the same order. */
typedef struct vdblk_round {
    uint32_t struct_size;
    /* 0 in the first, in which nothing is there yet. */
    uint32_t number;
    /* Length of each file. */
    const uint64_t *file_bytes;
    uint32_t file_count;
    uint32_t have_count;
    const vdblk_bytes *have;
    /* Opened read-only: nothing will be written. */
    uint32_t how;
    uint32_t reserved;
} vdblk_round;

/* vdblk_round.how */
/* Nothing will be written. */
#define VDBLK_OPEN_READ_ONLY 1
/* Only `info` will be asked: the table need not be read. Comes with VDBLK_OPEN_READ_ONLY. */
#define VDBLK_OPEN_INFO 2
/* Only `check` will be called: what is damaged is for its report, where it does not keep the image from being opened. Comes with
   VDBLK_OPEN_READ_ONLY. */
#define VDBLK_OPEN_CHECK 4

/* What `open` asks for, with VDBLK_MORE: at least one range, not empty, inside its file; at most 16 MiB in a round. */
typedef struct vdblk_needs {
    uint32_t struct_size;
    /* How many there is room for. */
    uint32_t room;
    /* How many were put there. */
    uint32_t count;
    uint32_t reserved;
    vdblk_range *ranges;
} vdblk_needs;

/* ---- images --------------------------------------------------------------------------------------------------- */

/* What the host has to know of an image, once it is open. */
typedef struct vdblk_disk {
    uint32_t struct_size;
    /* VDBLK_DISK_* */
    uint32_t flags;
    /* Size of the virtual disk: a multiple of 512 above 0. */
    uint64_t size_bytes;
    /* The unit of allocation: a multiple of 512, from 512 to 256 MiB. Changes are planned one unit at a time. */
    uint64_t block_bytes;
    /* Largest power of two to which metadata and blocks are aligned in the file, at least 512. */
    uint64_t data_alignment;
} vdblk_disk;

/* The image may have a parent, whose bytes show where `map` says VDBLK_EXTENT_PARENT. */
#define VDBLK_DISK_DIFF 1

/* What there is to tell about an image. The host has set everything to zero. */
typedef struct vdblk_info {
    uint32_t struct_size;
    /* Which of the others are known: VDBLK_INFO_* */
    uint32_t known;
    /* Number of its variant in vdblk_format.variants. */
    uint32_t variant;
    uint32_t reserved;
    /* Blocks that have a place. */
    uint64_t allocated_blocks;
    uint8_t uuid[16];
    uint8_t modification_uuid[16];
    uint8_t parent_uuid[16];
    uint8_t parent_modification_uuid[16];
    /* What the image calls its parent's file; empty: nothing. */
    char parent_name[1024];
    /* The parent's format, by its name; empty: unknown. */
    char parent_format[32];
    /* The user's comment; empty: none. */
    char comment[1024];
    /* Version of the format, as people write it; empty: it has none. */
    char version[32];
} vdblk_info;

#define VDBLK_INFO_ALLOCATED 1
#define VDBLK_INFO_UUID 2
#define VDBLK_INFO_MODIFICATION 4
#define VDBLK_INFO_PARENT 8
#define VDBLK_INFO_PARENT_MODIFICATION 16

/* A piece of the disk, and where it is. */
typedef struct vdblk_extent {
    /* VDBLK_EXTENT_* */
    uint32_t kind;
    /* DATA, PACKED: the file. */
    uint32_t file;
    /* Bytes of the disk; never 0. */
    uint64_t len;
    /* DATA: where the piece begins. PACKED: where the packed bytes begin. */
    uint64_t off;
    /* PACKED: VDBLK_CODEC_* */
    uint32_t codec;
    /* PACKED: packed bytes, at most 8 MiB. There may be more than the codec needs. */
    uint32_t packed_len;
    /* PACKED: bytes when unpacked, at most 4 MiB. */
    uint32_t unit_len;
    /* PACKED: where the piece begins in them. */
    uint32_t into;
} vdblk_extent;

/* Bytes in a file. */
#define VDBLK_EXTENT_DATA 0
/* Zeros, which hide what a parent has. */
#define VDBLK_EXTENT_ZERO 1
/* This image says nothing: the parent's bytes, or zeros. */
#define VDBLK_EXTENT_PARENT 2
/* A part of a unit that lies packed in a file. Never an answer for overwriting. */
#define VDBLK_EXTENT_PACKED 3

#define VDBLK_CODEC_DEFLATE 0
#define VDBLK_CODEC_ZLIB 1
#define VDBLK_CODEC_ZSTD 2
#define VDBLK_CODEC_BZIP2 3
#define VDBLK_CODEC_LZFSE 4
#define VDBLK_CODEC_XZ 5

/* Why `map` is asked. */
#define VDBLK_INTENT_READ 0
#define VDBLK_INTENT_OVERWRITE 1

/* ---- changes -------------------------------------------------------------------------------------------------- */

/* A unit of metadata that is written as one: at most 4096 bytes, one write of it in flight at a time. */
typedef struct vdblk_key {
    /* VDBLK_KEY_* */
    uint32_t kind;
    /* Which table, 0 to 255. */
    uint32_t table;
    /* Which page of it. */
    uint64_t number;
} vdblk_key;

#define VDBLK_KEY_HEADER 0
#define VDBLK_KEY_PAGE 1

/* A change of metadata by name. Its bytes are asked for (`compose`) when the page is written, never before. */
typedef struct vdblk_op {
    /* VDBLK_OP_* */
    uint32_t kind;
    /* ENTRY: 1 if the value names a place in a file, else 0. IN_USE: 1 or 0. */
    uint32_t flag;
    /* ENTRY: its number in the table. COUNT: the number. */
    uint64_t index;
    /* ENTRY: what the table shall say, in the format's own coding. */
    uint64_t value;
    /* MODIFICATION. */
    uint8_t uuid[16];
} vdblk_op;

/* An entry of a table. */
#define VDBLK_OP_ENTRY 0
/* A count of blocks in the header. */
#define VDBLK_OP_COUNT 1
/* The UUID of the contents. */
#define VDBLK_OP_MODIFICATION 2
/* The mark that somebody writes to the image. */
#define VDBLK_OP_IN_USE 3

/* One step of a plan. Steps between two barriers may run at the same time. */
typedef struct vdblk_step {
    /* VDBLK_STEP_* */
    uint32_t kind;
    /* The file of all steps but META and BARRIER. */
    uint32_t file;
    /* GUEST, BLOCK: bytes of the disk. */
    uint64_t guest_start;
    uint64_t guest_len;
    /* EXTEND, PUNCH, MOVE: where it begins. */
    uint64_t from;
    /* GUEST, BLOCK, MOVE: where the bytes go. EXTEND, TRUNCATE: the file's new end. PUNCH: where it ends. */
    uint64_t to;
    /* BLOCK: bytes of a block in the file. MOVE: how many. */
    uint64_t len;
    /* BLOCK: 1 if the place reads as zeros now, so that zeros need not be written. */
    uint32_t clean;
    uint32_t reserved;
    /* META */
    vdblk_key key;
    vdblk_op op;
} vdblk_step;

/* The request's own bytes for a part of the unit, written in place. */
#define VDBLK_STEP_GUEST 0
/* The whole unit: what shows there now, the request's bytes over it. */
#define VDBLK_STEP_BLOCK 1
/* A change of metadata, visible to `map` once `publish` was called for it. */
#define VDBLK_STEP_META 2
/* The file grows by space that reads as zeros. Only in `begin` and `room`. */
#define VDBLK_STEP_EXTEND 3
/* The file is cut. Only in `begin` and `end`, behind a SYNC. */
#define VDBLK_STEP_TRUNCATE 4
/* The space goes back to the file system. Only in `end`, behind a SYNC. */
#define VDBLK_STEP_PUNCH 5
/* Bytes move inside the file; the ranges do not overlap. Only in `end`. */
#define VDBLK_STEP_MOVE 6
/* Everything before is complete before anything after begins. */
#define VDBLK_STEP_BARRIER 7
/* A sync of the file, submitted when everything before has completed. */
#define VDBLK_STEP_SYNC 8

/* An ordered change. The rule above all: an ENTRY that names a place stands behind a SYNC that stands behind the data (GUEST, BLOCK,
   MOVE) and the EXTEND, or the plan is `clean`. */
typedef struct vdblk_plan {
    uint32_t struct_size;
    /* Room for steps. */
    uint32_t room;
    /* How many were put there. */
    uint32_t count;
    /* 1: what the plan's entries name reads now, durably, as the unit does without them: zeros in a place that was extended and synced by
       this process, and nothing but zeros shows through. */
    uint32_t clean;
    /* 1: `settle` shall be called with the token. Of all plans with EXTEND, and of `begin`. */
    uint32_t has_token;
    uint32_t reserved;
    /* No other plan's under way. */
    uint64_t token;
    vdblk_step *steps;
} vdblk_plan;

/* A change that needs a plan. It concerns one unit, and no other change of that unit is under way. */
typedef struct vdblk_change {
    uint32_t struct_size;
    /* VDBLK_CHANGE_* */
    uint32_t kind;
    /* WRITE: the bytes that are written. ZERO: the whole unit. */
    uint64_t guest_start;
    uint64_t guest_len;
    /* WRITE: nothing but zeros shows through in the whole unit. */
    uint32_t beneath_zero;
    uint32_t reserved;
} vdblk_change;

/* Bytes are written. GUEST and BLOCK steps of the plan have to cover all of them. */
#define VDBLK_CHANGE_WRITE 0
/* The unit shall read as zeros and hide the parent. */
#define VDBLK_CHANGE_ZERO 1

/* How a plan with a token has ended. */
typedef struct vdblk_end {
    uint32_t struct_size;
    /* 0: every step is done. Otherwise the number of an error of the system, and steps behind the one that failed were not begun. */
    int32_t errno_value;
    /* Done: what EXTEND has made reads as zeros, durably if a SYNC stood behind it. */
    uint32_t clean;
    /* Failed: an ENTRY that names a place was handed to the kernel. The disk may say so although `publish` was never called: the place
       must not be given to another block. */
    uint32_t entry_submitted;
} vdblk_end;

/* Where a page of metadata goes. */
typedef struct vdblk_page {
    uint32_t struct_size;
    uint32_t file;
    uint64_t off;
    /* Room for its bytes: 4096. */
    uint32_t room;
    /* Bytes that were put there. */
    uint32_t len;
    uint8_t *bytes;
} vdblk_page;

/* ---- checks, new images --------------------------------------------------------------------------------------- */

/* What `check` finds. */
typedef struct vdblk_report {
    uint32_t struct_size;
    uint32_t reserved;
    /* To be set: blocks of the disk, and how many have a place. */
    uint64_t blocks;
    uint64_t allocated;
    void *host;
    /* One finding, in one line: VDBLK_FINDING_* */
    void (*finding)(void *host, uint32_t severity, const char *text);
} vdblk_report;

/* Data is lost or will be once somebody writes. */
#define VDBLK_FINDING_CORRUPTION 0
/* Space nobody uses. */
#define VDBLK_FINDING_LEAK 1

/* An option of new images, as the user has given it, or as a format takes it. */
typedef struct vdblk_option {
    /* In any case. */
    const char *key;
    /* Given: its value. In vdblk_format: what is taken if it is not given, or NULL. */
    const char *value;
    /* In vdblk_format: its value is a number of bytes. */
    uint32_t is_number;
    uint32_t reserved;
} vdblk_option;

/* What a new image shall be like. What the format has no place for is refused. */
typedef struct vdblk_new {
    uint32_t struct_size;
    /* VDBLK_NEW_* */
    uint32_t flags;
    /* A multiple of 512 above 0. */
    uint64_t size_bytes;
    /* A name, or NULL: the usual one. */
    const char *variant;
    uint8_t uuid[16];
    uint8_t modification_uuid[16];
    uint8_t parent_uuid[16];
    uint8_t parent_modification_uuid[16];
    /* NULL: not known. */
    const char *parent_name;
    const char *parent_format;
    /* NULL: none. */
    const char *comment;
    const vdblk_option *options;
    uint32_t option_count;
    uint32_t reserved;
} vdblk_new;

/* It gets this UUID; otherwise the modification UUID will do for one. */
#define VDBLK_NEW_UUID 1
/* It has a parent. */
#define VDBLK_NEW_DIFF 2
/* The parent's UUIDs are known. */
#define VDBLK_NEW_PARENT_UUID 4
#define VDBLK_NEW_PARENT_MODIFICATION 8

/* Takes the new file. Each function answers 0, or an error that `create` has to give back. */
typedef struct vdblk_sink {
    uint32_t struct_size;
    uint32_t reserved;
    void *host;
    /* The file's length. What no piece covers reads as zeros. */
    int32_t (*length)(void *host, uint64_t len);
    /* Space to be reserved, not only spanned. Once at most. */
    int32_t (*reserve)(void *host, uint64_t off, uint64_t len);
    /* Bytes, in the order in which they are written: what makes the file an image comes last. At most 64 MiB together. */
    int32_t (*piece)(void *host, uint64_t off, const void *data, uint64_t len);
} vdblk_sink;

/* ---- formats -------------------------------------------------------------------------------------------------- */

/* A format. All functions that are not marked with a star have to be there; those with two, for a format that is written. */
typedef struct vdblk_format {
    uint32_t struct_size;
    /* VDBLK_FORMAT_* */
    uint32_t flags;
    /* Lower-case letters, digits, '-' and '_', at most 31; no other format's. For options and output. */
    const char *name;
    /* As people write it in a sentence, at most 63 bytes. */
    const char *title;
    /* Lower case, without the dot, at most 15 bytes each, the usual one first; no other format's. 1 to 8. */
    const char *const *extensions;
    /* Names of its variants, the usual one first, at most 31 bytes each. 1 to 16. */
    const char *const *variants;
    uint32_t extension_count;
    uint32_t variant_count;
    const vdblk_option *options;
    uint32_t option_count;
    uint32_t reserved;

    /* Whether a file may be one: 1 or 0. The file's first and last 512 bytes, or all of a shorter one; and its length. */
    int32_t (*probe)(const uint8_t *head, uint32_t head_len, const uint8_t *foot, uint32_t foot_len, uint64_t file_bytes);
    /* Opens an image, round by round. In the first `*image` is NULL; what is put there is passed to all the others. VDBLK_OK: it is
       open, and `disk` filled in. After any other answer than VDBLK_MORE `close` is called, if there is an image. */
    int32_t (*open)(const vdblk_round *round, void **image, vdblk_needs *needs, vdblk_disk *disk, vdblk_error *why);
    /* Gives the image's memory back. The last call for it. */
    void (*close)(void *image);
    int32_t (*info)(void *image, vdblk_info *info);
    /* The extents of a range from its start on: as many as there is room for and as are known, at least one. With
       VDBLK_INTENT_OVERWRITE only VDBLK_EXTENT_DATA, or VDBLK_NEEDS_PLAN if the first byte has no place. */
    int32_t (*map)(void *image, uint64_t start, uint64_t len, uint32_t intent, vdblk_extent *out, uint32_t room, uint32_t *count);

    /* ** What has to happen for a change. */
    int32_t (*plan)(void *image, const vdblk_change *change, vdblk_plan *plan);
    /* ** Prepares places ahead of need; no step: none is wanted now, or one is under way. `urgent`: a request waits. */
    int32_t (*room)(void *image, uint32_t urgent, vdblk_plan *plan);
    /* ** A plan with a token has ended. */
    void (*settle)(void *image, uint64_t token, const vdblk_end *end);
    /* ** 1: after a failed change of the unit around `at` the disk may say something else of it than the image here: it has to be
       written even if that seems to change nothing. */
    int32_t (*must_write)(void *image, uint64_t at);
    /* ** The bytes of a page of metadata, as it is published, with `ops` over it. */
    int32_t (*compose)(void *image, const vdblk_key *key, const vdblk_op *ops, uint32_t op_count, vdblk_page *page);
    /* ** The kernel has accepted a write of the page with `ops` in it: from here on `map` shows them. */
    void (*publish)(void *image, const vdblk_key *key, const vdblk_op *ops, uint32_t op_count);
    /* ** Before the first change: a new UUID of the contents, and whatever else has to be on disk first. A plan with steps has a token;
       if it fails `begin` is called again with the next change, otherwise never. */
    int32_t (*begin)(void *image, const uint8_t modification_uuid[16], vdblk_plan *plan);
    /* ** At a clean close, with nothing in flight. Called again when that plan is done, until one has no step; none from the first if
       nothing was changed. */
    int32_t (*end)(void *image, vdblk_plan *plan);

    /* * What is wrong with an image that was opened with VDBLK_OPEN_CHECK. */
    int32_t (*check)(void *image, vdblk_report *report);
    /* * A new image. */
    int32_t (*create)(const vdblk_new *wish, const vdblk_sink *sink, vdblk_error *why);
} vdblk_format;

/* Images are written, not only read. */
#define VDBLK_FORMAT_WRITES 1
/* Functions of one image may be called by several threads at a time. Otherwise the host calls one after the other. */
#define VDBLK_FORMAT_THREADS 2
/* New images take a UUID, ... */
#define VDBLK_FORMAT_UUID 4
/* ... a parent, ... */
#define VDBLK_FORMAT_DIFF 8
/* ... a comment. */
#define VDBLK_FORMAT_COMMENT 16

/* ---- filters -------------------------------------------------------------------------------------------------- */

/* A transformation of sectors and its reverse, between what a disk shows and what its images hold. */
typedef struct vdblk_filter {
    uint32_t struct_size;
    /* VDBLK_FILTER_* */
    uint32_t flags;
    /* As a format's, but upper case is allowed, and no other filter's in any case. */
    const char *name;
    /* Offsets and lengths are multiples of it: 512. */
    uint32_t sector_bytes;
    uint32_t reserved;
    /* `config` is what the user has given it, maybe empty. */
    int32_t (*open)(const char *config, void **filter, vdblk_error *why);
    void (*close)(void *filter);
    /* What is written at `at` into what the images hold, in place. Depends on nothing but `config`, `at` and the bytes, sector by sector;
       cannot fail. */
    void (*on_write)(void *filter, uint64_t at, uint8_t *bytes, uint64_t len);
    /* The reverse. */
    void (*on_read)(void *filter, uint64_t at, uint8_t *bytes, uint64_t len);
} vdblk_filter;

/* As VDBLK_FORMAT_THREADS. */
#define VDBLK_FILTER_THREADS 1
/* It makes a sector of zeros of nothing a guest is likely to write (a cipher): sectors of zeros in an image were never written, and show
   as zeros. Without it they show as what `on_read` makes of them. */
#define VDBLK_FILTER_NEVER_ZEROS 2

/* ---- plug-ins ------------------------------------------------------------------------------------------------- */

/* What the host is. It stays until the plug-in is unloaded. */
typedef struct vdblk_host {
    uint64_t magic;
    uint16_t abi_major;
    uint16_t abi_minor;
    uint32_t struct_size;
    /* Its version, for people. */
    const char *version;
    /* One line for the host's log: VDBLK_LOG_* */
    void (*log)(uint32_t level, const char *text);
} vdblk_host;

#define VDBLK_LOG_ERROR 0
#define VDBLK_LOG_WARNING 1
#define VDBLK_LOG_INFO 2
#define VDBLK_LOG_DEBUG 3

/* What a plug-in is. All of it stays where it is until `unload` returns. */
typedef struct vdblk_plugin {
    uint64_t magic;
    /* The version of this file that it was made for. */
    uint16_t abi_major;
    uint16_t abi_minor;
    uint32_t struct_size;
    /* For people, at most 63 bytes each. */
    const char *name;
    const char *version;
    const vdblk_format *const *formats;
    const vdblk_filter *const *filters;
    /* At most 16 each, at least one of both together. */
    uint32_t format_count;
    uint32_t filter_count;
    /* The last call, or NULL. */
    void (*unload)(void);
} vdblk_plugin;

/* The one symbol of a plug-in. It puts the address of its description into `*plugin` and answers VDBLK_OK. */
int32_t vdblk_plugin_load(const vdblk_host *host, const vdblk_plugin **plugin, vdblk_error *why);
#define VDBLK_PLUGIN_ENTRY "vdblk_plugin_load"

typedef int32_t vdblk_plugin_load_fn(const vdblk_host *host, const vdblk_plugin **plugin, vdblk_error *why);

#ifdef __cplusplus
}
#endif

#endif
