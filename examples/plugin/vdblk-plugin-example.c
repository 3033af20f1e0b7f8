/*
 * An example of a plug-in of vdblk: the format BLKMAP and the filter ROT. docs/plugins.md explains what is done here, and why in this
 * order. Made by
 *
 *   cc -std=c99 -O2 -fPIC -shared -I ../../include -o vdblk-plugin-example.so vdblk-plugin-example.c
 *
 * BLKMAP, all numbers little-endian:
 *
 *      0  "BLKMAP\x1a\x01"                    4096  the table: 4 bytes for each block of the disk
 *      8  u32 version, 1                            0: nothing (the parent, or zeros)
 *     12  u32 bytes of a block                      1: zeros
 *     16  u64 bytes of the disk                     n: the block is at place n - 2
 *     24  u32 blocks of the disk
 *     28  u32 1: somebody writes              data  places of a block each, from the first multiple of 4096 behind
 *     32  UUID; 48 UUID of the contents             the table on
 *     64  the parent's UUID; 80 of its contents
 *     96  u32 1: it has a parent
 *    128  name of the parent's file, 1024 bytes; 1152 its format, 32 bytes; 1184 comment, 1024 bytes
 *
 * SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
 */
#include "vdblk_plugin.h"

#include <stdlib.h>
#include <string.h>

#define HEADER_BYTES 4096u
#define PAGE_BYTES 4096u
#define PAGE_ENTRIES (PAGE_BYTES / 4u)
#define MAX_BLOCKS (1u << 28)
#define MAX_BLOCK_BYTES (256u << 20)
#define ROUND_BYTES (8u << 20)
/* Places prepared ahead of need, in bytes of the file. */
#define PREPARED_BYTES (64u << 20)
/* Doubtful entries written again in one plan. */
#define REWRITTEN 32u

#define ENTRY_FREE 0u
#define ENTRY_ZERO 1u
#define ENTRY_PLACES 2u

/* For a test of ours that has to find the lie: other names, because two plug-ins cannot share theirs. */
#ifdef VDBLK_EXAMPLE_LIES
#define NAME "blklie"
#define FILTER "LIE"
#define LIES 1
#else
#define NAME "blkmap"
#define FILTER "ROT"
#define LIES 0
#endif

static const char MAGIC[8] = {'B', 'L', 'K', 'M', 'A', 'P', 0x1a, 1};

/* ---- bytes ---------------------------------------------------------------------------------------------------- */

static uint32_t get32(const uint8_t *b) {
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

static uint64_t get64(const uint8_t *b) {
    return (uint64_t)get32(b) | (uint64_t)get32(b + 4) << 32;
}

static void put32(uint8_t *b, uint32_t v) {
    for (int i = 0; i < 4; i++) b[i] = (uint8_t)(v >> 8 * i);
}

static void put64(uint8_t *b, uint64_t v) {
    put32(b, (uint32_t)v);
    put32(b + 4, (uint32_t)(v >> 32));
}

static void say(vdblk_error *why, const char *text) {
    strncpy(why->text, text, sizeof why->text - 1);
    why->text[sizeof why->text - 1] = 0;
}

/* A text into a field that keeps its last byte 0. */
static int keep_text(uint8_t *field, size_t room, const char *text) {
    size_t len = text ? strlen(text) : 0;
    if (len >= room) return 0;
    if (len) memcpy(field, text, len);
    return 1;
}

static int bit(const uint8_t *bits, uint32_t n) {
    return bits[n / 8] >> n % 8 & 1;
}

static void set_bit(uint8_t *bits, uint32_t n, int on) {
    if (on) bits[n / 8] |= (uint8_t)(1u << n % 8);
    else bits[n / 8] &= (uint8_t) ~(1u << n % 8);
}

/* ---- images --------------------------------------------------------------------------------------------------- */

/* What a plan with a token is about. */
enum about { ABOUT_BEGIN = 1, ABOUT_ROOM, ABOUT_WRITE, ABOUT_ENTRY };

struct pending {
    uint64_t token;
    enum about about;
    uint32_t block;
    uint32_t place;
    /* ROOM: how many places; ENTRY: 1 if the block had the place until now. */
    uint32_t count;
    struct pending *next;
};

/* Places to be taken. */
struct stack {
    uint32_t *places;
    uint32_t count, room;
};

struct image {
    uint8_t header[HEADER_BYTES];
    uint64_t size_bytes, file_bytes, data_at;
    uint32_t block_bytes, blocks, how;
    /* As the kernel has accepted it. */
    uint32_t *table;
    uint64_t table_read;
    /* For writing. */
    struct stack clean, unclean;
    /* Place + 2 that a block had, or may have by the disk: it is nobody else's. */
    uint32_t *kept;
    /* Blocks of which the disk may say something else than the table here. */
    uint8_t *doubt;
    uint32_t doubts;
    /* Places of the file. */
    uint32_t places;
    /* Places the next extension adds. */
    uint32_t step;
    int grows_unclean, refused, extending, begun, ended;
    uint64_t next_token;
    struct pending *pending;
};

static int push(struct stack *s, uint32_t place) {
    if (s->count == s->room) {
        uint32_t room = s->room ? 2 * s->room : 64;
        uint32_t *more = realloc(s->places, room * sizeof *more);
        if (!more) return 0; /* the place is lost until the image is opened again */
        s->places = more;
        s->room = room;
    }
    s->places[s->count++] = place;
    return 1;
}

static int pop(struct stack *s, uint32_t *place) {
    if (!s->count) return 0;
    *place = s->places[--s->count];
    return 1;
}

static uint64_t place_at(const struct image *im, uint32_t place) {
    return im->data_at + (uint64_t)place * im->block_bytes;
}

static uint64_t data_at(uint32_t blocks) {
    uint64_t end = HEADER_BYTES + 4 * (uint64_t)blocks;
    return (end + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
}

static int is_diff(const struct image *im) {
    return get32(im->header + 96) & 1;
}

static int32_t probe(const uint8_t *head, uint32_t head_len, const uint8_t *foot, uint32_t foot_len, uint64_t file_bytes) {
    (void)foot, (void)foot_len, (void)file_bytes;
    return head_len >= sizeof MAGIC && memcmp(head, MAGIC, sizeof MAGIC) == 0;
}

static int32_t read_header(struct image *im, const uint8_t *bytes, vdblk_error *why) {
    memcpy(im->header, bytes, HEADER_BYTES);
    if (memcmp(bytes, MAGIC, sizeof MAGIC) != 0) return VDBLK_NOT_THIS_FORMAT;
    if (get32(bytes + 8) != 1) {
        say(why, "its version is another than 1");
        return VDBLK_UNSUPPORTED;
    }
    im->block_bytes = get32(bytes + 12);
    im->size_bytes = get64(bytes + 16);
    im->blocks = get32(bytes + 24);
    if (!im->block_bytes || im->block_bytes % 512 || im->block_bytes > MAX_BLOCK_BYTES || !im->size_bytes || im->size_bytes % 512
        || im->blocks > MAX_BLOCKS || im->size_bytes / im->block_bytes + (im->size_bytes % im->block_bytes != 0) != im->blocks) {
        say(why, "its sizes contradict each other");
        return VDBLK_CORRUPT;
    }
    im->data_at = data_at(im->blocks);
    if (im->file_bytes < im->data_at) {
        say(why, "the file ends within its table");
        return VDBLK_CORRUPT;
    }
    return VDBLK_OK;
}

/* Looks at the whole table, and finds out which places are free. */
static int32_t look_at_table(struct image *im, vdblk_error *why) {
    uint64_t held = (im->file_bytes - im->data_at) / im->block_bytes;
    uint32_t high = 0;
    for (uint32_t b = 0; b < im->blocks; b++) {
        uint32_t v = im->table[b];
        if (v < ENTRY_PLACES) continue;
        if (v - ENTRY_PLACES >= held) {
            say(why, "a block is behind the end of the file");
            return VDBLK_CORRUPT;
        }
        if (v - ENTRY_PLACES >= high) high = v - ENTRY_PLACES + 1;
    }
    im->places = high;
    if (im->how & VDBLK_OPEN_READ_ONLY) return VDBLK_OK;
    uint8_t *used = calloc(high / 8 + 1, 1);
    im->kept = calloc(im->blocks, sizeof *im->kept);
    im->doubt = calloc(im->blocks / 8 + 1, 1);
    int32_t answer = used && im->kept && im->doubt ? VDBLK_OK : VDBLK_LIMIT;
    for (uint32_t b = 0; answer == VDBLK_OK && b < im->blocks; b++) {
        uint32_t v = im->table[b];
        if (v < ENTRY_PLACES) continue;
        if (bit(used, v - ENTRY_PLACES)) {
            say(why, "two blocks share their place");
            answer = VDBLK_CORRUPT;
        }
        set_bit(used, v - ENTRY_PLACES, 1);
    }
    for (uint32_t p = high; answer == VDBLK_OK && p-- > 0;)
        if (!bit(used, p)) push(&im->unclean, p);
    free(used);
    return answer;
}

static int32_t image_is_open(struct image *im, vdblk_disk *disk) {
    uint64_t both = im->data_at | im->block_bytes;
    disk->size_bytes = im->size_bytes;
    disk->block_bytes = im->block_bytes;
    disk->data_alignment = both & (~both + 1);
    disk->flags = is_diff(im) ? VDBLK_DISK_DIFF : 0;
    return VDBLK_OK;
}

static int32_t open_image(const vdblk_round *round, void **image, vdblk_needs *needs, vdblk_disk *disk, vdblk_error *why) {
    struct image *im = *image;
    if (!im) {
        im = calloc(1, sizeof *im);
        if (!im) return VDBLK_LIMIT;
        *image = im;
        im->file_bytes = round->file_bytes[0];
        im->how = round->how;
        im->step = 4;
        if (im->file_bytes < HEADER_BYTES) {
            say(why, "the file ends within its header");
            return VDBLK_CORRUPT;
        }
        needs->ranges[0].off = 0;
        needs->ranges[0].len = HEADER_BYTES;
        needs->count = 1;
        return VDBLK_MORE;
    }
    const vdblk_bytes *have = round->have;
    if (!im->table) {
        int32_t answer = read_header(im, have->data, why);
        if (answer != VDBLK_OK) return answer;
        im->table = malloc(4 * (size_t)im->blocks);
        if (!im->table) return VDBLK_LIMIT;
    } else {
        uint64_t first = im->table_read / 4;
        for (uint64_t n = 0; n < have->len / 4; n++) im->table[first + n] = get32(have->data + 4 * n);
        im->table_read += have->len;
    }
    uint64_t left = 4 * (uint64_t)im->blocks - im->table_read;
    if (left) {
        needs->ranges[0].off = HEADER_BYTES + im->table_read;
        needs->ranges[0].len = left < ROUND_BYTES ? left : ROUND_BYTES;
        needs->count = 1;
        return VDBLK_MORE;
    }
    if (!(im->how & (VDBLK_OPEN_CHECK | VDBLK_OPEN_INFO))) {
        int32_t answer = look_at_table(im, why);
        if (answer != VDBLK_OK) return answer;
    }
    return image_is_open(im, disk);
}

static void close_image(void *image) {
    struct image *im = image;
    while (im->pending) {
        struct pending *p = im->pending;
        im->pending = p->next;
        free(p);
    }
    free(im->table);
    free(im->clean.places);
    free(im->unclean.places);
    free(im->kept);
    free(im->doubt);
    free(im);
}

static int32_t info(void *image, vdblk_info *info) {
    struct image *im = image;
    static const uint8_t nil[16];
    const uint8_t *h = im->header;
    memcpy(info->uuid, h + 32, 16);
    memcpy(info->modification_uuid, h + 48, 16);
    memcpy(info->parent_uuid, h + 64, 16);
    memcpy(info->parent_modification_uuid, h + 80, 16);
    info->known = VDBLK_INFO_UUID | VDBLK_INFO_MODIFICATION;
    if (memcmp(info->parent_uuid, nil, 16)) info->known |= VDBLK_INFO_PARENT;
    if (memcmp(info->parent_modification_uuid, nil, 16)) info->known |= VDBLK_INFO_PARENT_MODIFICATION;
    memcpy(info->parent_name, h + 128, sizeof info->parent_name - 1);
    memcpy(info->parent_format, h + 1152, sizeof info->parent_format - 1);
    memcpy(info->comment, h + 1184, sizeof info->comment - 1);
    strcpy(info->version, "1");
    info->variant = is_diff(im) ? 1 : 0;
    for (uint32_t b = 0; b < im->blocks; b++) info->allocated_blocks += im->table[b] >= ENTRY_PLACES;
    info->known |= VDBLK_INFO_ALLOCATED;
    return VDBLK_OK;
}

static int32_t map(void *image, uint64_t start, uint64_t len, uint32_t intent, vdblk_extent *out, uint32_t room, uint32_t *count) {
    struct image *im = image;
    uint32_t n = 0;
    for (; len && n < room; n++) {
        uint64_t block = start / im->block_bytes, into = start % im->block_bytes;
        uint64_t part = im->block_bytes - into < len ? im->block_bytes - into : len;
        uint32_t v = im->table[block];
        if (intent == VDBLK_INTENT_OVERWRITE && v < ENTRY_PLACES) break;
        out[n].len = part;
        out[n].kind = v == ENTRY_FREE ? VDBLK_EXTENT_PARENT : v == ENTRY_ZERO ? VDBLK_EXTENT_ZERO : VDBLK_EXTENT_DATA;
        out[n].file = 0;
        out[n].off = v < ENTRY_PLACES ? 0 : place_at(im, v - ENTRY_PLACES) + into;
        start += part;
        len -= part;
    }
    *count = n;
    return n ? VDBLK_OK : VDBLK_NEEDS_PLAN;
}

/* ---- changes -------------------------------------------------------------------------------------------------- */

static vdblk_step *step(vdblk_plan *plan, uint32_t kind) {
    vdblk_step *s = &plan->steps[plan->count++];
    memset(s, 0, sizeof *s);
    s->kind = kind;
    return s;
}

/* An entry of the table. The page it is in is the unit of writing. */
static void entry(vdblk_plan *plan, uint32_t block, uint32_t value) {
    vdblk_step *s = step(plan, VDBLK_STEP_META);
    s->key.kind = VDBLK_KEY_PAGE;
    s->key.number = block / PAGE_ENTRIES;
    s->op.kind = VDBLK_OP_ENTRY;
    s->op.flag = value >= ENTRY_PLACES;
    s->op.index = block;
    s->op.value = value;
}

static vdblk_step *header_step(vdblk_plan *plan, uint32_t op, uint32_t flag) {
    vdblk_step *s = step(plan, VDBLK_STEP_META);
    s->key.kind = VDBLK_KEY_HEADER;
    s->op.kind = op;
    s->op.flag = flag;
    return s;
}

static struct pending *pend(struct image *im, vdblk_plan *plan, enum about about) {
    struct pending *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->token = im->next_token++;
    p->about = about;
    p->next = im->pending;
    im->pending = p;
    plan->token = p->token;
    plan->has_token = 1;
    return p;
}

static void set_doubt(struct image *im, uint32_t block, int on) {
    im->doubts += (uint32_t)on - (uint32_t)bit(im->doubt, block);
    set_bit(im->doubt, block, on);
}

/* A place for a block. */
static int32_t take(struct image *im, int beneath_zero, uint32_t *place, int *clean) {
    *clean = 1;
    if (LIES && pop(&im->unclean, place)) return VDBLK_OK;
    if (beneath_zero && pop(&im->clean, place)) return VDBLK_OK;
    if (im->refused) {
        im->refused = 0;
        *clean = 0;
        return pop(&im->unclean, place) ? VDBLK_OK : VDBLK_NO_SPACE;
    }
    /* A clean place saves the sync and the rest of the block. */
    if (beneath_zero && !im->grows_unclean) return VDBLK_NEEDS_ROOM;
    *clean = 0;
    if (pop(&im->unclean, place)) return VDBLK_OK;
    *clean = 1;
    return pop(&im->clean, place) ? VDBLK_OK : VDBLK_NEEDS_ROOM;
}

static int32_t plan_write(struct image *im, const vdblk_change *change, vdblk_plan *plan) {
    uint32_t block = (uint32_t)(change->guest_start / im->block_bytes);
    uint64_t unit = (uint64_t)block * im->block_bytes, into = change->guest_start - unit;
    uint32_t v = im->table[block];
    if (v >= ENTRY_PLACES) {
        if (bit(im->doubt, block)) {
            struct pending *p = pend(im, plan, ABOUT_ENTRY);
            if (!p) return VDBLK_LIMIT;
            p->block = block;
            entry(plan, block, v);
        }
        vdblk_step *s = step(plan, VDBLK_STEP_GUEST);
        s->guest_start = change->guest_start;
        s->guest_len = change->guest_len;
        s->to = place_at(im, v - ENTRY_PLACES) + into;
        return VDBLK_OK;
    }
    uint32_t place;
    int clean = 0;
    if (im->kept[block]) {
        place = im->kept[block] - ENTRY_PLACES;
    } else {
        int32_t answer = take(im, change->beneath_zero != 0, &place, &clean);
        if (answer != VDBLK_OK) return answer;
    }
    struct pending *p = pend(im, plan, ABOUT_WRITE);
    if (!p) {
        if (!im->kept[block]) push(&im->unclean, place);
        return VDBLK_LIMIT;
    }
    p->block = block;
    p->place = place;
    im->kept[block] = 0;
    if (change->beneath_zero && clean) {
        /* Whatever of the two survives a crash, the block reads as before or as written. */
        vdblk_step *s = step(plan, VDBLK_STEP_GUEST);
        s->guest_start = change->guest_start;
        s->guest_len = change->guest_len;
        s->to = place_at(im, place) + into;
        plan->clean = 1;
    } else {
        vdblk_step *s = step(plan, VDBLK_STEP_BLOCK);
        s->guest_start = unit;
        s->guest_len = im->size_bytes - unit < im->block_bytes ? im->size_bytes - unit : im->block_bytes;
        s->to = place_at(im, place);
        s->len = im->block_bytes;
        s->clean = (uint32_t)clean;
        step(plan, VDBLK_STEP_SYNC);
    }
    entry(plan, block, place + ENTRY_PLACES);
    return VDBLK_OK;
}

static int32_t plan_zero(struct image *im, const vdblk_change *change, vdblk_plan *plan) {
    uint32_t block = (uint32_t)(change->guest_start / im->block_bytes), v = im->table[block];
    if (!bit(im->doubt, block) && (v == ENTRY_ZERO || (v == ENTRY_FREE && !is_diff(im)))) return VDBLK_OK;
    struct pending *p = pend(im, plan, ABOUT_ENTRY);
    if (!p) return VDBLK_LIMIT;
    p->block = block;
    if (v >= ENTRY_PLACES) {
        p->count = 1;
        p->place = v - ENTRY_PLACES;
    }
    entry(plan, block, ENTRY_ZERO);
    return VDBLK_OK;
}

static int32_t plan(void *image, const vdblk_change *change, vdblk_plan *plan) {
    struct image *im = image;
    if (!im->begun || im->ended) return VDBLK_READ_ONLY;
    return change->kind == VDBLK_CHANGE_ZERO ? plan_zero(im, change, plan) : plan_write(im, change, plan);
}

static int32_t room(void *image, uint32_t urgent, vdblk_plan *plan) {
    struct image *im = image;
    if (im->extending || !im->begun || im->ended || (!urgent && im->grows_unclean)) return VDBLK_OK;
    uint64_t most = PREPARED_BYTES / im->block_bytes, have = im->clean.count, n = im->step;
    if (most < 1) most = 1;
    if (n > most) n = most;
    if (n + have > im->blocks) n = im->blocks > have ? im->blocks - have : 0;
    if (urgent && !n) n = 1;
    if (!n || (!urgent && have >= n) || im->places + n > UINT32_MAX - ENTRY_PLACES) return VDBLK_OK;
    struct pending *p = pend(im, plan, ABOUT_ROOM);
    if (!p) return VDBLK_LIMIT;
    p->count = (uint32_t)n;
    p->place = urgent;
    im->extending = 1;
    vdblk_step *s = step(plan, VDBLK_STEP_EXTEND);
    s->from = place_at(im, im->places);
    s->to = place_at(im, im->places + (uint32_t)n);
    step(plan, VDBLK_STEP_SYNC);
    return VDBLK_OK;
}

static void room_settled(struct image *im, const struct pending *p, const vdblk_end *end) {
    im->extending = 0;
    if (end->errno_value) {
        if (p->place && im->step == 1) im->refused = 1;
        im->step = im->step > 1 ? im->step / 2 : 1;
        return;
    }
    im->grows_unclean = !end->clean;
    /* The lowest is taken first. */
    for (uint32_t n = p->count; n-- > 0;) push(end->clean ? &im->clean : &im->unclean, im->places + n);
    im->places += p->count;
    if (im->step < (1u << 20)) im->step *= 2;
}

static void settle(void *image, uint64_t token, const vdblk_end *end) {
    struct image *im = image;
    struct pending **at = &im->pending;
    while (*at && (*at)->token != token) at = &(*at)->next;
    struct pending *p = *at;
    if (!p) return;
    *at = p->next;
    int failed = end->errno_value != 0;
    switch (p->about) {
    case ABOUT_BEGIN:
        im->begun = !failed;
        break;
    case ABOUT_ROOM:
        room_settled(im, p, end);
        break;
    case ABOUT_WRITE:
        if (!failed || end->entry_submitted) set_doubt(im, p->block, failed);
        /* The disk may name the place: it stays this block's. */
        if (failed && end->entry_submitted) im->kept[p->block] = p->place + ENTRY_PLACES;
        else if (failed) push(&im->unclean, p->place);
        break;
    case ABOUT_ENTRY:
        set_doubt(im, p->block, failed);
        /* Until the drop of the entry is durable the disk may name it: it stays this block's. */
        if (!failed && p->count) im->kept[p->block] = p->place + ENTRY_PLACES;
        break;
    }
    free(p);
}

static int32_t must_write(void *image, uint64_t at) {
    struct image *im = image;
    return bit(im->doubt, (uint32_t)(at / im->block_bytes));
}

static void apply(uint8_t *header, const vdblk_op *op) {
    if (op->kind == VDBLK_OP_MODIFICATION) memcpy(header + 48, op->uuid, 16);
    if (op->kind == VDBLK_OP_IN_USE) put32(header + 28, op->flag);
}

static int32_t compose(void *image, const vdblk_key *key, const vdblk_op *ops, uint32_t op_count, vdblk_page *page) {
    struct image *im = image;
    if (key->kind == VDBLK_KEY_HEADER) {
        memcpy(page->bytes, im->header, HEADER_BYTES);
        for (uint32_t n = 0; n < op_count; n++) apply(page->bytes, &ops[n]);
        page->off = 0;
        page->len = HEADER_BYTES;
        return VDBLK_OK;
    }
    uint64_t first = key->number * PAGE_ENTRIES;
    if (first >= im->blocks) return VDBLK_CORRUPT;
    for (uint32_t n = 0; n < PAGE_ENTRIES; n++) put32(page->bytes + 4 * n, first + n < im->blocks ? im->table[first + n] : 0);
    for (uint32_t n = 0; n < op_count; n++) put32(page->bytes + 4 * (ops[n].index - first), (uint32_t)ops[n].value);
    page->off = HEADER_BYTES + key->number * PAGE_BYTES;
    page->len = PAGE_BYTES;
    return VDBLK_OK;
}

static void publish(void *image, const vdblk_key *key, const vdblk_op *ops, uint32_t op_count) {
    struct image *im = image;
    for (uint32_t n = 0; n < op_count; n++) {
        if (key->kind == VDBLK_KEY_HEADER) apply(im->header, &ops[n]);
        else im->table[ops[n].index] = (uint32_t)ops[n].value;
    }
}

/* The mark and the new UUID; and behind their sync the tail that no entry names is cut, so that what is added there reads as zeros. */
static int32_t begin(void *image, const uint8_t modification_uuid[16], vdblk_plan *plan) {
    struct image *im = image;
    if (im->begun) return VDBLK_OK;
    if (!pend(im, plan, ABOUT_BEGIN)) return VDBLK_LIMIT;
    memcpy(header_step(plan, VDBLK_OP_MODIFICATION, 0)->op.uuid, modification_uuid, 16);
    header_step(plan, VDBLK_OP_IN_USE, 1);
    step(plan, VDBLK_STEP_SYNC);
    if (im->file_bytes > place_at(im, im->places)) step(plan, VDBLK_STEP_TRUNCATE)->to = place_at(im, im->places);
    return VDBLK_OK;
}

/* Doubtful entries once more, the file without slack, the mark off. */
static int32_t end(void *image, vdblk_plan *plan) {
    struct image *im = image;
    if (!im->begun || im->ended) return VDBLK_OK;
    for (uint32_t b = 0, n = 0; b < im->blocks && im->doubts && n < REWRITTEN; b++) {
        if (!bit(im->doubt, b)) continue;
        entry(plan, b, im->table[b]);
        set_doubt(im, b, 0);
        n++;
    }
    step(plan, VDBLK_STEP_SYNC);
    if (im->doubts) return VDBLK_OK;
    uint32_t high = 0;
    for (uint32_t b = 0; b < im->blocks; b++)
        if (im->table[b] >= ENTRY_PLACES + high) high = im->table[b] - ENTRY_PLACES + 1;
    step(plan, VDBLK_STEP_TRUNCATE)->to = place_at(im, high);
    header_step(plan, VDBLK_OP_IN_USE, 0);
    im->ended = 1;
    return VDBLK_OK;
}

/* ---- checks, new images --------------------------------------------------------------------------------------- */

static int32_t check(void *image, vdblk_report *report) {
    struct image *im = image;
    uint64_t held = (im->file_bytes - im->data_at) / im->block_bytes;
    if (held > UINT32_MAX) held = UINT32_MAX;
    uint8_t *used = calloc(held / 8 + 1, 1);
    if (!used) return VDBLK_LIMIT;
    report->blocks = im->blocks;
    for (uint32_t b = 0; b < im->blocks; b++) {
        uint32_t v = im->table[b];
        if (v < ENTRY_PLACES) continue;
        report->allocated++;
        if (v - ENTRY_PLACES >= held) {
            report->finding(report->host, VDBLK_FINDING_CORRUPTION, "a block is behind the end of the file");
        } else if (bit(used, v - ENTRY_PLACES)) {
            report->finding(report->host, VDBLK_FINDING_CORRUPTION, "two blocks share their place");
        } else {
            set_bit(used, v - ENTRY_PLACES, 1);
        }
    }
    /* Places between others will be taken; what is behind the last is left from somebody who did not end in order. */
    if (held && !bit(used, (uint32_t)held - 1))
        report->finding(report->host, VDBLK_FINDING_LEAK, "the file is longer than its blocks need");
    free(used);
    return VDBLK_OK;
}

static int is_word(const char *a, const char *b) {
    for (; *a && *b; a++, b++)
        if ((*a | 0x20) != (*b | 0x20)) return 0;
    return *a == *b;
}

static int32_t create(const vdblk_new *wish, const vdblk_sink *sink, vdblk_error *why) {
    static uint8_t zeros[HEADER_BYTES];
    uint8_t header[HEADER_BYTES];
    uint64_t block_bytes = 1 << 20;
    for (uint32_t n = 0; n < wish->option_count; n++) {
        char *rest;
        if (!is_word(wish->options[n].key, "block_size")) return VDBLK_INVALID_ARGUMENT;
        block_bytes = strtoull(wish->options[n].value, &rest, 10);
        if (*rest == 'k' || *rest == 'K') block_bytes <<= 10, rest++;
        else if (*rest == 'm' || *rest == 'M') block_bytes <<= 20, rest++;
        if (*rest || !block_bytes || block_bytes % 512 || block_bytes > MAX_BLOCK_BYTES) {
            say(why, "the block size is no multiple of 512 up to 256 MiB");
            return VDBLK_INVALID_ARGUMENT;
        }
    }
    uint64_t blocks = wish->size_bytes / block_bytes + (wish->size_bytes % block_bytes != 0);
    if (blocks > MAX_BLOCKS) {
        say(why, "the disk has too many blocks; take larger ones");
        return VDBLK_INVALID_ARGUMENT;
    }
    int diff = (wish->flags & VDBLK_NEW_DIFF) != 0;
    if (wish->variant && (strcmp(wish->variant, "diff") == 0) != diff) {
        say(why, "an image is a diff if and only if it has a parent");
        return VDBLK_INVALID_ARGUMENT;
    }
    memcpy(header, zeros, sizeof header);
    memcpy(header, MAGIC, sizeof MAGIC);
    put32(header + 8, 1);
    put32(header + 12, (uint32_t)block_bytes);
    put64(header + 16, wish->size_bytes);
    put32(header + 24, (uint32_t)blocks);
    memcpy(header + 32, wish->flags & VDBLK_NEW_UUID ? wish->uuid : wish->modification_uuid, 16);
    memcpy(header + 48, wish->modification_uuid, 16);
    memcpy(header + 64, wish->parent_uuid, 16);
    memcpy(header + 80, wish->parent_modification_uuid, 16);
    put32(header + 96, (uint32_t)diff);
    if (!keep_text(header + 128, 1024, wish->parent_name) || !keep_text(header + 1152, 32, wish->parent_format)
        || !keep_text(header + 1184, 1024, wish->comment)) {
        say(why, "the parent's name or the comment is too long");
        return VDBLK_INVALID_ARGUMENT;
    }
    int32_t answer = sink->length(sink->host, data_at((uint32_t)blocks));
    return answer == VDBLK_OK ? sink->piece(sink->host, 0, header, sizeof header) : answer;
}

static const char *const extensions[] = {NAME};
static const char *const variants[] = {"dynamic", "diff"};
static const vdblk_option options[] = {{.key = "block_size", .value = "1048576", .is_number = 1}};

static const vdblk_format blkmap = {
    .struct_size = sizeof blkmap,
    .flags = VDBLK_FORMAT_WRITES | VDBLK_FORMAT_UUID | VDBLK_FORMAT_DIFF | VDBLK_FORMAT_COMMENT,
    .name = NAME,
    .title = NAME,
    .extensions = extensions,
    .extension_count = 1,
    .variants = variants,
    .variant_count = 2,
    .options = options,
    .option_count = 1,
    .probe = probe,
    .open = open_image,
    .close = close_image,
    .info = info,
    .map = map,
    .plan = plan,
    .room = room,
    .settle = settle,
    .must_write = must_write,
    .compose = compose,
    .publish = publish,
    .begin = begin,
    .end = end,
    .check = check,
    .create = create,
};

/* ---- the filter ------------------------------------------------------------------------------------------------ */

/* Each byte plus a key, which is another one in each sector. No encryption: an example. */
static int32_t rot_open(const char *config, void **filter, vdblk_error *why) {
    char *rest;
    unsigned long key = strtoul(*config ? config : "13", &rest, 10);
    if (*rest || key > 255) {
        say(why, "ROT takes a number up to 255");
        return VDBLK_INVALID_ARGUMENT;
    }
    uint8_t *state = malloc(1);
    if (!state) return VDBLK_LIMIT;
    *state = (uint8_t)key;
    *filter = state;
    return VDBLK_OK;
}

static void rot_write(void *filter, uint64_t at, uint8_t *bytes, uint64_t len) {
    for (uint64_t n = 0; n < len; n++) bytes[n] = (uint8_t)(bytes[n] + *(uint8_t *)filter + (at + n) / 512);
}

static void rot_read(void *filter, uint64_t at, uint8_t *bytes, uint64_t len) {
    for (uint64_t n = 0; n < len; n++) bytes[n] = (uint8_t)(bytes[n] - *(uint8_t *)filter - (at + n) / 512);
}

static const vdblk_filter rot = {
    .struct_size = sizeof rot,
    .flags = VDBLK_FILTER_THREADS,
    .name = FILTER,
    .sector_bytes = 512,
    .open = rot_open,
    .close = free,
    .on_write = rot_write,
    .on_read = rot_read,
};

/* ---- the plug-in ----------------------------------------------------------------------------------------------- */

static const vdblk_format *const formats[] = {&blkmap};
static const vdblk_filter *const filters[] = {&rot};

static const vdblk_plugin plugin = {
    .magic = VDBLK_PLUGIN_MAGIC,
    .abi_major = VDBLK_ABI_MAJOR,
    .abi_minor = VDBLK_ABI_MINOR,
    .struct_size = sizeof plugin,
    .name = "example",
    .version = "1.0",
    .formats = formats,
    .format_count = 1,
    .filters = filters,
    .filter_count = 1,
};

int32_t vdblk_plugin_load(const vdblk_host *host, const vdblk_plugin **out, vdblk_error *why) {
    if (host->abi_major != VDBLK_ABI_MAJOR) {
        say(why, "this vdblk is another one");
        return VDBLK_UNSUPPORTED;
    }
    *out = &plugin;
    return VDBLK_OK;
}
