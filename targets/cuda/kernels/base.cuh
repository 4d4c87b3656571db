// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0
//
// What every kernel uses: the few instructions that CUDA C++ has no name for, and exact rounding.
//
// The text is self-contained (no #include), so that NVRTC compiles it without any header. With
// QC_EMULATE defined, as the name of a header, a host C++ compiler builds it instead: that header
// gives every wrapper below its documented meaning (tests/targets/cuda_emulator).

#ifdef QC_EMULATE
#include QC_EMULATE
#else
#define QC_DEVICE static __device__ __forceinline__
#define QC_ENTRY(name)
#define QC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define QC_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define QC_ALIGNED(pointer, bytes)

// ---------------------------------------------------------------- asynchronous copies

QC_DEVICE unsigned qc_shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Copy BYTES (4, 8 or 16) from global to shared memory; complete after the group was waited for.
template <int BYTES>
QC_DEVICE void qc_copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(qc_shared_address(to)),
                 "l"(from));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(qc_shared_address(to)),
                 "l"(from), "n"(BYTES));
  }
#else
  if (BYTES == 16) {
    *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
  } else if (BYTES == 8) {
    *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
  } else {
    *static_cast<unsigned*>(to) = *static_cast<const unsigned*>(from);
  }
#endif
}

// Close the group of copies that this thread issued since the last commit.
QC_DEVICE void qc_copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most PENDING groups of this thread are still under way.
template <int PENDING>
QC_DEVICE void qc_copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---------------------------------------------------------------- tensor cores

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8 and
// gets bytes 4 * (i % 4).. of row i / 4 of each.
QC_DEVICE void qc_load_matrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(qc_shared_address(row)));
}

#define QC_MMA_16832(A, B)                                                                       \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." A "." B                                   \
               ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#define QC_MMA_8816(A, B, i, x, y)                                                               \
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32." A "." B                                    \
               ".s32 {%0, %1}, {%2}, {%3}, {%0, %1};"                                             \
               : "+r"(c[i]), "+r"(c[i + 1])                                                       \
               : "r"(x), "r"(y))

// c[16][8] += a[16][32] * b[32][8] on 8-bit integers; int32 accumulators that wrap.
template <bool A_SIGNED, bool B_SIGNED>
QC_DEVICE void qc_mma_int8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  if (A_SIGNED && B_SIGNED) {
    QC_MMA_16832("s8", "s8");
  } else if (A_SIGNED) {
    QC_MMA_16832("s8", "u8");
  } else if (B_SIGNED) {
    QC_MMA_16832("u8", "s8");
  } else {
    QC_MMA_16832("u8", "u8");
  }
#else
  // Turing has m8n8k16; its fragments are quarters of the larger shape's.
#pragma unroll
  for (int k = 0; k < 2; ++k) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (A_SIGNED && B_SIGNED) {
        QC_MMA_8816("s8", "s8", 2 * m, a[2 * k + m], b[k]);
      } else if (A_SIGNED) {
        QC_MMA_8816("s8", "u8", 2 * m, a[2 * k + m], b[k]);
      } else if (B_SIGNED) {
        QC_MMA_8816("u8", "s8", 2 * m, a[2 * k + m], b[k]);
      } else {
        QC_MMA_8816("u8", "u8", 2 * m, a[2 * k + m], b[k]);
      }
    }
  }
#endif
}

// c[16][8] += a[16][16] * b[16][8] on half-precision floats, float32 accumulators.
QC_DEVICE void qc_mma_half(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
  }
#endif
}

// ---------------------------------------------------------------- lanes, half precision

template <class T>
QC_DEVICE T qc_from_lane_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

QC_DEVICE unsigned short qc_half_bits(float x) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}

QC_DEVICE float qc_half_value(unsigned short h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
}

#endif  // QC_EMULATE

typedef signed char qc_i8;
typedef unsigned char qc_u8;
typedef short qc_i16;
typedef unsigned short qc_u16;
typedef int qc_i32;
typedef unsigned qc_u32;
typedef long long qc_i64;
typedef unsigned long long qc_u64;

// A half-precision float in memory; arithmetic is in float32.
struct qc_half {
  unsigned short bits;
};

template <class T>
QC_DEVICE float qc_real(T x) {
  return static_cast<float>(x);
}
template <>
__device__ __forceinline__ float qc_real(qc_half x) {
  return qc_half_value(x.bits);
}

template <class T>
struct qc_as {
  template <class S>
  static __device__ __forceinline__ T of(S x) {
    return static_cast<T>(x);
  }
};
template <>
struct qc_as<qc_half> {
  static __device__ __forceinline__ qc_half of(float x) { return qc_half{qc_half_bits(x)}; }
};

// V consecutive elements, moved by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) qc_pack {
  T at[V];
};

template <int V, class T>
QC_DEVICE qc_pack<T, V> qc_load(const T* p) {
  QC_ALIGNED(p, sizeof(T) * V);
  return *reinterpret_cast<const qc_pack<T, V>*>(p);
}

template <int V, class T>
QC_DEVICE void qc_store(T* p, const qc_pack<T, V>& v) {
  QC_ALIGNED(p, sizeof(T) * V);
  *reinterpret_cast<qc_pack<T, V>*>(p) = v;
}

// rint(t) + zero, clamped; lo and hi are the bounds less the zero point. NaN becomes the lower
// bound. Clamping first gives the same integer, because the bounds are integers.
QC_DEVICE int qc_quantized(float t, float lo, float hi, int zero) {
  return __float2int_rn(fminf(fmaxf(t, lo), hi)) + zero;
}

// Arithmetic on accumulators wraps; signed overflow would be undefined.
QC_DEVICE int qc_wrap_add(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
}
QC_DEVICE int qc_wrap_mul(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) * static_cast<unsigned>(b));
}

struct qc_sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
struct qc_max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a > b || a != a ? a : b; }
};
struct qc_min {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a < b || a != a ? a : b; }
};
struct qc_product_of {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a * b; }
};

// Combine one value per thread of a block of THREADS (a multiple of 32); every thread gets the
// result. `scratch` holds THREADS / 32 values and may be used again after the call.
template <int THREADS, class F, class T>
QC_DEVICE T qc_combine(T v, F f, void* scratch) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) v = f(v, qc_from_lane_xor(v, mask));
  if (THREADS == 32) return v;
  T* parts = static_cast<T*>(scratch);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  v = parts[0];
#pragma unroll
  for (int i = 1; i < THREADS / 32; ++i) v = f(v, parts[i]);
  __syncthreads();
  return v;
}
