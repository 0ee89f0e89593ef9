/*
 * QEMU TCG plugin: counts AArch64 instructions by class, and misses of a two-level LRU cache model, between marks.
 *
 * The guest marks a stretch with a system call that no kernel knows: MARKER(1, model) opens it, MARKER(2, model)
 * closes it and appends one line to the output file:
 *
 *     model=0 integer=… branch=… … l1d_access=… l1d_miss=… l2_miss=…
 *
 * Arguments: out=PATH marker=NUMBER [cache=on]. The cache model costs a call for every memory access.
 *
 * QEMU's plugin header is not part of Debian's package, so the few declarations that are needed stand here; they
 * follow version 1 of the plugin interface (QEMU 6.0 to 8.x).
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
typedef uint32_t qemu_plugin_meminfo_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct qemu_info_t qemu_info_t;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
enum qemu_plugin_mem_rw { QEMU_PLUGIN_MEM_R = 1, QEMU_PLUGIN_MEM_W, QEMU_PLUGIN_MEM_RW };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *,
                                      void (*)(unsigned int, qemu_plugin_meminfo_t, uint64_t, void *),
                                      enum qemu_plugin_cb_flags, enum qemu_plugin_mem_rw, void *);
unsigned int qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t,
                                          void (*)(qemu_plugin_id_t, unsigned int, int64_t, uint64_t, uint64_t,
                                                   uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);

EXPORT int qemu_plugin_version = 1;

enum { INTEGER, BRANCH, SYSTEM, MEMORY, MEMORY_SIMD, FP, SIMD, SIMD_DOT, OTHER, CLASSES };
static const char *const CLASS_NAMES[CLASSES] = {
    "integer", "branch", "system", "memory", "memory_simd", "fp", "simd", "simd_dot", "other",
};

/* Cortex-A76: 64 KiB L1D of 4 ways and, as most phones have it, 256 KiB private L2 of 8 ways; 64-byte lines. */
enum { LINE_SHIFT = 6, L1_SETS = 256, L1_WAYS = 4, L2_SETS = 512, L2_WAYS = 8 };

static uint64_t counts[CLASSES], at_begin[CLASSES];
static uint64_t l1_lines[L1_SETS][L1_WAYS], l2_lines[L2_SETS][L2_WAYS];
static uint64_t l1_access, l1_miss, l2_miss;
static bool active, with_cache;
static int64_t marker = -1;
static FILE *out;

/* Arm ARM, C4.1: bits 28..25 choose the main group; the finer splits are named where they are made. */
static int classify(uint32_t code)
{
    switch ((code >> 25) & 0xf) {
    case 0x8: case 0x9: /* data processing, immediate */
    case 0x5: case 0xd: /* data processing, register */
        return INTEGER;
    case 0xa: case 0xb:
        /* exception generation, hints, barriers and system registers, against true branches */
        return (code & 0xff000000) == 0xd4000000 || (code & 0xffc00000) == 0xd5000000 ? SYSTEM : BRANCH;
    case 0x4: case 0x6: case 0xc: case 0xe:
        return code & (1u << 26) ? MEMORY_SIMD : MEMORY;
    case 0x7: case 0xf:
        if ((code & 0x5f000000) == 0x1e000000 || (code & 0x5f000000) == 0x1f000000) {
            return FP;
        }
        /* SDOT and UDOT: vector form, then by element */
        if ((code & 0x9f20fc00) == 0x0e009400 || (code & 0x9f00f400) == 0x0f00e000) {
            return SIMD_DOT;
        }
        return SIMD;
    default:
        return OTHER;
    }
}

/* Looks a line up in one set, newest first, and makes it the newest. Tag 0 means empty, so tags are stored plus one. */
static bool touch(uint64_t *set, int ways, uint64_t line)
{
    uint64_t tag = line + 1;
    int at = 0;
    while (at < ways - 1 && set[at] != tag) {
        at++;
    }
    bool hit = set[at] == tag;
    memmove(set + 1, set, (size_t)at * sizeof *set);
    set[0] = tag;
    return hit;
}

static void access_line(uint64_t line)
{
    l1_access++;
    if (!touch(l1_lines[line % L1_SETS], L1_WAYS, line)) {
        l1_miss++;
        if (!touch(l2_lines[line % L2_SETS], L2_WAYS, line)) {
            l2_miss++;
        }
    }
}

static void on_memory(unsigned int cpu, qemu_plugin_meminfo_t info, uint64_t address, void *data)
{
    (void)cpu;
    (void)data;
    if (!active) {
        return;
    }
    uint64_t first = address >> LINE_SHIFT;
    uint64_t last = (address + (1u << qemu_plugin_mem_size_shift(info)) - 1) >> LINE_SHIFT;
    access_line(first);
    if (last != first) {
        access_line(last);
    }
}

/* A block runs from its first instruction to its last, so its classes are added up once, when it is translated. */
static void on_translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    uint64_t found[CLASSES] = {0};
    size_t length = qemu_plugin_tb_n_insns(tb);
    for (size_t index = 0; index < length; index++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, index);
        uint32_t code;
        memcpy(&code, qemu_plugin_insn_data(insn), sizeof code);
        int class = classify(code);
        found[class]++;
        if (with_cache && (class == MEMORY || class == MEMORY_SIMD)) {
            qemu_plugin_register_vcpu_mem_cb(insn, on_memory, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW, NULL);
        }
    }
    for (int class = 0; class < CLASSES; class++) {
        if (found[class]) {
            qemu_plugin_register_vcpu_tb_exec_inline(tb, QEMU_PLUGIN_INLINE_ADD_U64, &counts[class], found[class]);
        }
    }
}

static void on_syscall(qemu_plugin_id_t id, unsigned int cpu, int64_t number, uint64_t phase, uint64_t model,
                       uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)cpu, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != marker) {
        return;
    }
    if (phase == 1) {
        memcpy(at_begin, counts, sizeof counts);
        memset(l1_lines, 0, sizeof l1_lines);
        memset(l2_lines, 0, sizeof l2_lines);
        l1_access = l1_miss = l2_miss = 0;
        active = true;
    } else if (phase == 2 && active) {
        active = false;
        fprintf(out, "model=%llu", (unsigned long long)model);
        for (int class = 0; class < CLASSES; class++) {
            fprintf(out, " %s=%llu", CLASS_NAMES[class], (unsigned long long)(counts[class] - at_begin[class]));
        }
        if (with_cache) {
            fprintf(out, " l1d_access=%llu l1d_miss=%llu l2_miss=%llu", (unsigned long long)l1_access,
                    (unsigned long long)l1_miss, (unsigned long long)l2_miss);
        }
        fputc('\n', out);
        fflush(out);
    }
}

static void on_exit(qemu_plugin_id_t id, void *data)
{
    (void)id, (void)data;
    fclose(out);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    (void)info;
    const char *path = NULL;
    for (int index = 0; index < argc; index++) {
        if (!strncmp(argv[index], "out=", 4)) {
            path = argv[index] + 4;
        } else if (!strncmp(argv[index], "marker=", 7)) {
            marker = 0;
            for (const char *digit = argv[index] + 7; *digit >= '0' && *digit <= '9'; digit++) {
                marker = marker * 10 + (*digit - '0');
            }
        } else if (!strcmp(argv[index], "cache=on")) {
            with_cache = true;
        }
    }
    if (!path || marker < 0 || !(out = fopen(path, "w"))) {
        fprintf(stderr, "count: needs out=PATH, which can be written, and marker=NUMBER\n");
        return -1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    qemu_plugin_register_atexit_cb(id, on_exit, NULL);
    return 0;
}
