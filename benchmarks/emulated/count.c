// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0

// A plugin of qemu's user mode that counts executed instructions: -plugin count.so,out=FILE
//
// At exit it writes a line "ADDRESS INSTRUCTIONS DOTS EXECUTIONS" for each translated block to FILE,
// where DOTS are those of the instructions that multiply 8-bit integers and add to 32 bits (SDOT,
// UDOT, USDOT, SUDOT, SMMLA, UMMLA, USMMLA); times EXECUTIONS it is what was executed.  A block is
// entered at its start and left at its end, unless an instruction in it faults, which ends the
// programs that are counted here.  One thread.
//
// The functions of qemu that it calls are declared here: Debian ships the emulator without the
// header.  Source: qemu's documentation, "QEMU TCG Plugins", interface version 1.
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { QEMU_PLUGIN_INLINE_ADD_U64 = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                           void (*call)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *tb, int op, void *ptr,
                                              uint64_t imm);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*call)(qemu_plugin_id_t, void *),
                                    void *userdata);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t idx);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

struct block {
  uint64_t address, instructions, dots, executions;
  struct block *next;
};

static struct block *blocks;
static const char *path;

// Whether an A64 instruction is one of those counted apart, by the fixed bits of its encoding.
static int is_dot(uint32_t word) {
  return (word & 0x9fe0fc00) == 0x0e809400     // SDOT, UDOT: vectors
         || (word & 0x9fc0f400) == 0x0f80e000  // SDOT, UDOT: by element
         || (word & 0xbfe0fc00) == 0x0e809c00  // USDOT: vectors
         || (word & 0xbf40f400) == 0x0f00f000  // USDOT, SUDOT: by element
         || (word & 0xdfe0fc00) == 0x4e80a400  // SMMLA, UMMLA
         || (word & 0xffe0fc00) == 0x4e80ac00; // USMMLA
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  struct block *block = calloc(1, sizeof *block);
  if (block == NULL) abort();
  block->address = qemu_plugin_tb_vaddr(tb);
  block->instructions = qemu_plugin_tb_n_insns(tb);
  for (size_t i = 0; i < block->instructions; ++i) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), sizeof word);
    block->dots += (uint64_t)is_dot(word);
  }
  block->next = blocks;
  blocks = block;
  qemu_plugin_register_vcpu_tb_exec_inline(tb, QEMU_PLUGIN_INLINE_ADD_U64, &block->executions, 1);
}

static void leaving(qemu_plugin_id_t id, void *unused) {
  (void)id;
  (void)unused;
  FILE *file = fopen(path, "w");
  if (file == NULL) {
    perror(path);
    return;
  }
  for (const struct block *block = blocks; block != NULL; block = block->next) {
    if (block->executions == 0) continue;
    fprintf(file, "%" PRIx64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", block->address,
            block->instructions, block->dots, block->executions);
  }
  if (fclose(file) != 0) perror(path);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id,
                                                               const void *info, int argc,
                                                               char **argv) {
  (void)info;
  for (int i = 0; i < argc; ++i) {
    if (strncmp(argv[i], "out=", 4) == 0) path = argv[i] + 4;
  }
  if (path == NULL) {
    fprintf(stderr, "count: expected out=FILE\n");
    return -1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, leaving, NULL);
  return 0;
}
