// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0
//
// CUDA C++ on a CPU, for tests: enough of it to run the generated kernels and compare integers.
//
// Every thread of a block is a fiber. A fiber runs until it meets a barrier or an instruction of a
// whole warp (mma.sync, ldmatrix, shfl); the last one to arrive does the warp's work by the
// documented fragment layout (PTX ISA 8.7, sections 9.7.14 and 9.7.15). Asynchronous copies happen
// as late as their waits allow, so that a missing wait shows; shared memory starts as garbage.
// Deadlocks, misaligned accesses, bank conflicts of ldmatrix and divergence at warp instructions end
// the launch with an error.
//
// Included by the kernels' own text (QC_EMULATE); one launcher per kernel comes from QC_ENTRY.

#pragma once
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define QC_DEVICE static inline
#define QC_LAUNCH_BOUNDS(threads, blocks)
#define QC_EXPORT extern "C" __attribute__((visibility("default")))

namespace emulate {

struct Dim {
  unsigned x, y, z;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  unsigned group;
};

struct Warp {
  unsigned generation = 0;
  int arrived = 0, size = 0;
  void* at[32];
};

struct Fiber {
  void* stack_pointer = nullptr;
  Dim thread{};
  int lane = 0;
  Warp* warp = nullptr;
  bool done = false;
  unsigned groups = 0;
  std::vector<Copy> copies;
};

static Fiber* current;
static Dim block_index, block_extent, grid_extent;
static unsigned char* shared_memory;
static unsigned barrier_generation;
static int barrier_arrived, live;
static unsigned long progress;
static char problem[256];
static void* scheduler_stack;
static void (*entry)(void**);
static void** arguments;
static sigjmp_buf escape;

[[noreturn]] static inline void fail(const char* what) {
  std::snprintf(problem, sizeof problem, "%s (block %u,%u,%u thread %u)", what, block_index.x,
                block_index.y, block_index.z, current ? current->thread.x : 0u);
  siglongjmp(escape, 719);  // CUDA_ERROR_LAUNCH_FAILED
}

#if !defined(__x86_64__)
#error "the emulator switches fibers on x86-64 only"
#endif
extern "C" void qc_emulate_switch(void** save, void* to);
asm(R"(
.text
.type qc_emulate_switch, @function
qc_emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size qc_emulate_switch, .-qc_emulate_switch
)");

static inline void yield() { qc_emulate_switch(&current->stack_pointer, scheduler_stack); }

static void fiber_main() {
  entry(arguments);
  current->done = true;
  ++progress;
  --live;
  --current->warp->size;
  yield();
  std::abort();
}

// Run `work` once all live lanes of the warp are here; `mine` is what this lane brings.
template <class F>
static inline void together(void* mine, F work) {
  Fiber& me = *current;
  Warp& warp = *me.warp;
  const unsigned generation = warp.generation;
  warp.at[me.lane] = mine;
  if (++warp.arrived == warp.size) {
    if (warp.size != 32) fail("a warp instruction with lanes missing");
    work(warp.at);
    warp.arrived = 0;
    ++warp.generation;
    ++progress;
    return;
  }
  while (warp.generation == generation) yield();
}

static inline void barrier() {
  const unsigned generation = barrier_generation;
  if (++barrier_arrived == live) {
    barrier_arrived = 0;
    ++barrier_generation;
    ++progress;
    return;
  }
  while (barrier_generation == generation) yield();
}

static void on_fault(int) { siglongjmp(escape, 700); }  // CUDA_ERROR_ILLEGAL_ADDRESS

constexpr size_t STACK = 64 << 10;

static int launch(void (*kernel)(void**), void** args, Dim grid, Dim block, size_t shared_bytes,
                  int order) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  static std::vector<unsigned char> stacks, shared;
  static std::vector<Fiber> fibers;
  static std::vector<Warp> warps;
  stacks.resize(STACK * threads);
  shared.resize(shared_bytes + 256);
  fibers.resize(threads);
  shared_memory = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(shared.data()) + 127) & ~uintptr_t(127));
  entry = kernel;
  arguments = args;
  grid_extent = grid;
  block_extent = block;
  problem[0] = 0;
  struct sigaction action {}, before_segv{}, before_bus{}, before_fpe{};
  action.sa_handler = on_fault;
  action.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
  sigaction(SIGFPE, &action, &before_fpe);
  const int error = sigsetjmp(escape, 1);
  if (error == 0) {
    for (unsigned bz = 0; bz < grid.z; ++bz) {
      for (unsigned by = 0; by < grid.y; ++by) {
        for (unsigned bx = 0; bx < grid.x; ++bx) {
          block_index = {bx, by, bz};
          std::memset(shared.data(), 0xA5, shared.size());
          warps.assign((threads + 31) / 32, Warp());
          barrier_arrived = 0;
          live = threads;
          for (int i = 0; i < threads; ++i) {
            Fiber& f = fibers[i];
            f.thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
            f.lane = i % 32;
            f.warp = &warps[i / 32];
            ++f.warp->size;
            f.done = false;
            f.groups = 0;
            f.copies.clear();
            auto* top = reinterpret_cast<uintptr_t*>(
                (reinterpret_cast<uintptr_t>(stacks.data() + STACK * (i + 1))) & ~uintptr_t(15));
            *--top = 0;  // keeps the stack aligned as after a call
            *--top = reinterpret_cast<uintptr_t>(&fiber_main);
            for (int r = 0; r < 6; ++r) *--top = 0;
            f.stack_pointer = top;
          }
          while (live > 0) {
            const unsigned long before = progress;
            for (int i = 0; i < threads; ++i) {
              Fiber& f = fibers[order ? threads - 1 - i : i];
              if (f.done) continue;
              current = &f;
              qc_emulate_switch(&scheduler_stack, f.stack_pointer);
            }
            if (progress == before) fail("threads wait for each other for ever");
          }
        }
      }
    }
  }
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  sigaction(SIGFPE, &before_fpe, nullptr);
  if (error == 700) std::snprintf(problem, sizeof problem, "an access outside of memory");
  return error;
}

template <class... Args, size_t... I>
static inline void apply(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Args>*>(args[I])...);
}
template <class... Args>
static inline void call(void (*kernel)(Args...), void** args) {
  apply(kernel, args, std::index_sequence_for<Args...>{});
}

// ---------------------------------------------------------------- half precision

static inline float half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  float x;
  if (exponent == 31) {
    x = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    x = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    x = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return h & 0x8000 ? -x : x;
}

static inline uint16_t half_bits(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00;
  if (x >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(x, &exponent);
  if (x == 0.0f) return sign;
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  const float scaled = std::nearbyint(std::ldexp(x, -unit));
  const int whole = static_cast<int>(scaled);
  if (unit == -24) return static_cast<uint16_t>(sign | whole);  // rounding up may reach normal
  return static_cast<uint16_t>(sign + ((unit + 25) << 10) + (whole - 1024));
}

}  // namespace emulate

#define threadIdx emulate::current->thread
#define blockIdx emulate::block_index
#define blockDim emulate::block_extent
#define gridDim emulate::grid_extent
#define QC_SHARED(name) unsigned char* const name = emulate::shared_memory
#define QC_ENTRY(name) \
  QC_EXPORT void qc_emulate_entry_##name(void** args) { emulate::call(&name, args); }

QC_EXPORT int qc_emulate_launch(void (*kernel)(void**), void** args, const unsigned* grid,
                                const unsigned* block, size_t shared_bytes, int order) {
  return emulate::launch(kernel, args, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                         shared_bytes, order);
}
QC_EXPORT const char* qc_emulate_problem() { return emulate::problem; }

#define QC_ALIGNED(pointer, bytes)                                 \
  if (reinterpret_cast<uintptr_t>(pointer) % (bytes)) {            \
    emulate::fail("a misaligned access of several elements");      \
  }

static inline void __syncthreads() { emulate::barrier(); }

template <int BYTES>
static inline void qc_copy_async(void* to, const void* from) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async moves 4, 8 or 16 bytes");
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % BYTES) {
    emulate::fail("a misaligned asynchronous copy");
  }
  emulate::current->copies.push_back({to, from, BYTES, emulate::current->groups});
}

static inline void qc_copy_commit() { ++emulate::current->groups; }

template <int PENDING>
static inline void qc_copy_wait() {
  emulate::Fiber& me = *emulate::current;
  std::vector<emulate::Copy> later;
  for (const emulate::Copy& c : me.copies) {
    if (c.group + PENDING < me.groups) {
      std::memcpy(c.to, c.from, c.bytes);
    } else {
      later.push_back(c);
    }
  }
  me.copies.swap(later);
}

struct emulate_matrix_lane {
  unsigned* r;
  const unsigned char* row;
};

static inline void qc_load_matrix_x4(unsigned (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulate::fail("a misaligned row of ldmatrix");
  emulate_matrix_lane mine{r, static_cast<const unsigned char*>(row)};
  emulate::together(&mine, [](void** at) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;  // of 16 bytes: eight rows that share none are read at once
      for (int row = 0; row < 8; ++row) {
        const auto* from = static_cast<emulate_matrix_lane*>(at[matrix * 8 + row]);
        banks |= 1u << (reinterpret_cast<uintptr_t>(from->row) / 16 % 8);
      }
      if (banks != 255) emulate::fail("a bank conflict in ldmatrix");
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto* from = static_cast<emulate_matrix_lane*>(at[matrix * 8 + lane / 4]);
        std::memcpy(&static_cast<emulate_matrix_lane*>(at[lane])->r[matrix],
                    from->row + lane % 4 * 4, 4);
      }
    }
  });
}

struct emulate_mma_lane {
  void* c;
  const unsigned* a;
  const unsigned* b;
};

// Fragments of m16n8k32 on bytes (and, in pairs of bytes, of m16n8k16 on halves): with g = lane / 4
// and t = lane % 4, register i of A holds row g + 8 * (i % 2), bytes 16 * (i / 2) + 4 t..; register
// i of B holds column g, bytes 16 i + 4 t..; register i of C is row g + 8 * (i / 2), column 2 t + i
// % 2.
static inline void emulate_gather(void** at, unsigned char (&a)[16][32], unsigned char (&b)[8][32]) {
  for (int lane = 0; lane < 32; ++lane) {
    const auto* from = static_cast<emulate_mma_lane*>(at[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) std::memcpy(&a[g + 8 * (i % 2)][16 * (i / 2) + 4 * t], &from->a[i], 4);
    for (int i = 0; i < 2; ++i) std::memcpy(&b[g][16 * i + 4 * t], &from->b[i], 4);
  }
}

template <class T, class F>
static inline void emulate_scatter(void** at, F value) {
  for (int lane = 0; lane < 32; ++lane) {
    T* c = static_cast<T*>(static_cast<emulate_mma_lane*>(at[lane])->c);
    for (int i = 0; i < 4; ++i) c[i] = value(c[i], lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2);
  }
}

template <bool A_SIGNED, bool B_SIGNED>
static inline void qc_mma_int8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulate_mma_lane mine{c, a, b};
  emulate::together(&mine, [](void** at) {
    unsigned char fa[16][32], fb[8][32];
    emulate_gather(at, fa, fb);
    int wa[16][32], wb[8][32];
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 32; ++k) wa[i][k] = A_SIGNED ? static_cast<int8_t>(fa[i][k]) : fa[i][k];
    for (int j = 0; j < 8; ++j)
      for (int k = 0; k < 32; ++k) wb[j][k] = B_SIGNED ? static_cast<int8_t>(fb[j][k]) : fb[j][k];
    emulate_scatter<int>(at, [&](int c0, int i, int j) {
      int sum = 0;
      for (int k = 0; k < 32; ++k) sum += wa[i][k] * wb[j][k];
      return static_cast<int>(static_cast<unsigned>(c0) + static_cast<unsigned>(sum));
    });
  });
}

static inline void qc_mma_half(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulate_mma_lane mine{c, a, b};
  emulate::together(&mine, [](void** at) {
    unsigned char fa[16][32], fb[8][32];
    emulate_gather(at, fa, fb);
    float wa[16][16], wb[8][16];
    uint16_t h;
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k) std::memcpy(&h, &fa[i][2 * k], 2), wa[i][k] = emulate::half_value(h);
    for (int j = 0; j < 8; ++j)
      for (int k = 0; k < 16; ++k) std::memcpy(&h, &fb[j][2 * k], 2), wb[j][k] = emulate::half_value(h);
    emulate_scatter<float>(at, [&](float c0, int i, int j) {
      // The order of these sums is not documented; tests of halves allow a tolerance.
      for (int k = 0; k < 16; ++k) c0 += wa[i][k] * wb[j][k];
      return c0;
    });
  });
}

template <class T>
static inline T qc_from_lane_xor(T v, int mask) {
  struct Lane {
    T in, out;
    int mask;
  } mine{v, v, mask};
  emulate::together(&mine, [](void** at) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Lane*>(at[lane]);
      to->out = static_cast<Lane*>(at[lane ^ to->mask])->in;
    }
  });
  return mine.out;
}

static inline unsigned short qc_half_bits(float x) { return emulate::half_bits(x); }
static inline float qc_half_value(unsigned short h) { return emulate::half_value(h); }

// ---------------------------------------------------------------- CUDA's own functions

static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }
static inline float __int2float_rn(int a) { return static_cast<float>(a); }
static inline float __ll2float_rn(long long a) { return static_cast<float>(a); }
static inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
static inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
using std::fabs;
using std::ldexp;
static inline int atomicMax(int* at, int value) {
  const int old = *at;
  if (value > old) *at = value;
  return old;
}
