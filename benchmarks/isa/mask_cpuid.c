/* SPDX-FileCopyrightText: The qcompiler authors */
/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lets a process see an older x86 CPU, so that runtimes which choose their kernels by CPUID are timed with
 * the kernels that they have for that CPU. Preload it (LD_PRELOAD) with MASK_CPUID set to what is left:
 *
 *   avx2        no AVX-512, AVX-VNNI and AMX (the default)
 *   avxvnni     no AVX-512 and AMX
 *   avx512vnni  no AMX and AVX512-FP16
 *
 * Linux 4.12 or newer on a CPU with CPUID faulting (`cpuid_fault` in /proc/cpuinfo): the instruction then
 * traps, and the handler answers with the masked bits. A trap takes a few microseconds; after the runtimes
 * have looked, nothing runs differently. Programs that are executed inherit the variables, threads the trap.
 * Nothing is emulated: code that does not ask CPUID goes on using every instruction.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012

/* Registers of leaf 7. Subleaf 0: ebx, ecx, edx; subleaf 1: eax, edx. */
enum { EBX, ECX, EDX, EAX1, EDX1, REGISTERS };

#define BIT(n) (1u << (n))
static const unsigned AVX512[REGISTERS] = {
    [EBX] = BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) |
            BIT(31),                                        /* f dq ifma pf er cd bw vl */
    [ECX] = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14),  /* vbmi vbmi2 vnni bitalg vpopcntdq */
    [EDX] = BIT(2) | BIT(3) | BIT(8),                       /* 4vnniw 4fmaps vp2intersect */
    [EAX1] = BIT(5),                                        /* bf16 */
    [EDX1] = BIT(19),                                       /* avx10 */
};
static const unsigned AMX[REGISTERS] = {
    [EDX] = BIT(22) | BIT(23) | BIT(24) | BIT(25), /* amx-bf16 avx512-fp16 amx-tile amx-int8 */
    [EAX1] = BIT(21),                              /* amx-fp16 */
    [EDX1] = BIT(8),                               /* amx-complex */
};
static const unsigned AVX_VNNI[REGISTERS] = {
    [EAX1] = BIT(4) | BIT(23),            /* avx-vnni avx-ifma */
    [EDX1] = BIT(4) | BIT(5) | BIT(10),   /* avx-vnni-int8 avx-ne-convert avx-vnni-int16 */
};
static unsigned hidden[REGISTERS];

static void hide(const unsigned *bits) {
  for (int i = 0; i < REGISTERS; i++) hidden[i] |= bits[i];
}

static int real_sigaction(int, const struct sigaction *, struct sigaction *);

static void answer(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *code = (const unsigned char *)registers[REG_RIP];
  /* A trapped CPUID comes without an address, from the kernel; anything else is the program's own fault. */
  if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
    struct sigaction none = {0};
    none.sa_handler = SIG_DFL;
    real_sigaction(number, &none, NULL);
    return;
  }
  unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX];
  unsigned a, b, c, d;
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  __cpuid_count(leaf, subleaf, a, b, c, d);
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
  if (leaf == 7 && subleaf == 0) {
    b &= ~hidden[EBX];
    c &= ~hidden[ECX];
    d &= ~hidden[EDX];
  } else if (leaf == 7 && subleaf == 1) {
    a &= ~hidden[EAX1];
    d &= ~hidden[EDX1];
  } else if (leaf == 0x1d || leaf == 0x1e) { /* tile information */
    a = b = c = d = 0;
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

/*
 * Libraries that install a handler of their own for SIGSEGV (to print a backtrace) would take ours away:
 * theirs is dropped.
 */
typedef int (*sigaction_function)(int, const struct sigaction *, struct sigaction *);

static int real_sigaction(int number, const struct sigaction *new, struct sigaction *old) {
  static sigaction_function next;
  if (!next) next = (sigaction_function)dlsym(RTLD_NEXT, "sigaction");
  return next(number, new, old);
}

int sigaction(int number, const struct sigaction *new, struct sigaction *old) {
  return real_sigaction(number, number == SIGSEGV ? NULL : new, old);
}

void (*signal(int number, void (*handler)(int)))(int) {
  struct sigaction new = {0}, old;
  new.sa_handler = handler;
  new.sa_flags = SA_RESTART;
  if (sigaction(number, &new, &old) != 0) return SIG_ERR;
  return old.sa_handler;
}

__attribute__((constructor)) static void install(void) {
  const char *level = getenv("MASK_CPUID");
  if (!level) level = "avx2";
  hide(AMX);
  if (strcmp(level, "avx512vnni") != 0) hide(AVX512);
  if (strcmp(level, "avx2") == 0) {
    hide(AVX_VNNI);
  } else if (strcmp(level, "avxvnni") != 0 && strcmp(level, "avx512vnni") != 0) {
    fprintf(stderr, "mask_cpuid: MASK_CPUID is %s, expected avx2, avxvnni or avx512vnni\n", level);
    _exit(64);
  }
  struct sigaction action = {0};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  real_sigaction(SIGSEGV, &action, NULL);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) != 0) {
    fputs("mask_cpuid: this CPU or kernel cannot trap CPUID\n", stderr);
    _exit(69);
  }
}
