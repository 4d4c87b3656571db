// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0
//
// Matrix product and convolution on tensor cores.
//
// A convolution is a product whose rows are output pixels and whose K axis runs over (kernel row,
// kernel column, input channel): the rows of A are never materialised, every thread computes the
// addresses of its pieces (implicit GEMM, NHWC). A tile of A and a tile of B go through a ring of
// STAGES buffers in shared memory, filled by asynchronous copies while the tensor cores work on an
// older one. Rows in shared memory are split into 16-byte pieces, stored at piece ^ (row / ...), so
// that neither the copies nor ldmatrix meet bank conflicts.
//
// Everything is counted in bytes along K, so the same code serves 8-bit integers (32 elements per
// step of the tensor cores) and half precision (16 elements).
//
// P is a struct of constants:
//   A, B, OUT, RES              element types (B: qc_i8/qc_u8/qc_half)
//   HALF                        half precision with float32 accumulators, else int32
//   M, N, K                     rows, columns, depth of one group (elements)
//   KP, NP                      depth and columns as padded in B
//   BM, BN, BK, WM, WN, STAGES  tile of a block (BK in bytes), tile of a warp, buffers
//   IH, IW, C, CG               input extents; channels in all and per group
//   OH, OW, KH, KW, SH, SW, PH, PW, DH, DW
//   A_ROW                       elements between rows of A where there is no window (KH == 0)
//   A_PIECE, B_PIECE            bytes that one copy moves: 16, 8, 4, or 1 (byte by byte)
//   PACKED4                     B holds 4-bit weights, in the order of the fragments
//   B_PADDED                    B is packed to [NP][KP]: no bounds
//   ROW_SUMS, COLUMN_SUMS       subtract zero points of B, of A (see below)
//   ZA, CORRECTION              zero point of A (COLUMN_SUMS), constant added to each accumulator
//   BIAS, RESIDUAL, SCALE_ROW   whether given; whether there is one multiplier per column
//   TO_FLOAT                    OUT = float32(acc) * multiplier, else quantized
//   RES_ZERO, RES_SCALE, LO, HI, ZERO
//   a_offset(z), b_offset(z), c_offset(z), n_offset(z)   where group or batch z begins, elements
//   y_offset(z), x_offset(z)    where its windows begin, rows and columns of the image
//   SCALE                       multiplier of all columns where SCALE_ROW is false
//   GROUP_ROWS                  block rows that share columns in the order of the blocks
//   OUT_STRIDE, OUT_PIECE       elements between rows of the result; bytes moved at once there

template <class P>
struct qc_tile {
  static constexpr int WARPS_M = P::BM / P::WM, WARPS_N = P::BN / P::WN;
  static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int PIECES = P::BK / 16;  // of a row of A or B
  static constexpr int A_BYTES = P::BM * P::BK;
  static constexpr int B_BYTES = P::BN * P::BK / (P::PACKED4 ? 2 : 1);
  static constexpr int STAGE = A_BYTES + B_BYTES;
  static constexpr int ELEMENT = P::HALF ? 2 : 1;
  static constexpr int STEPS = (P::KP * ELEMENT) / P::BK;
  // Results of up to 2 bytes leave through shared memory, so that rows are written as wholes.
  static constexpr int OUT_SIZE = sizeof(typename P::OUT);
  static constexpr bool STAGED = OUT_SIZE <= 2;
  static constexpr int OUT_ROW = P::BN * OUT_SIZE + 16;
  static constexpr int RESULT_BYTES = STAGED ? P::BM * OUT_ROW : 0;
  static constexpr int SHARED = P::STAGES * STAGE > RESULT_BYTES ? P::STAGES * STAGE : RESULT_BYTES;
};

// Byte offset of a piece of a row in a tile; rows of 128 bytes or less share 128-byte lines.
template <int PIECES>
QC_DEVICE int qc_swizzled(int row, int piece) {
  constexpr int PER_LINE = PIECES >= 8 ? 1 : 8 / PIECES;
  constexpr int MASK = PIECES >= 8 ? 7 : PIECES - 1;
  return (row * PIECES + (piece ^ ((row / PER_LINE) & MASK))) * 16;
}

// Bring `bytes` (a multiple of PIECE, 16 in all) of A from element k of a row.
// `pad` points at 16 bytes that stand for elements outside of the image or of K.
template <class P>
QC_DEVICE const void* qc_a_source(const typename P::A* a, int base, int y0, int x0, int k,
                                  const void* pad) {
  if (P::KH == 0) {  // a plain matrix; rows outside have y0 < 0
    return y0 >= 0 && (P::K % (P::BK / qc_tile<P>::ELEMENT) == 0 || k < P::K)
               ? static_cast<const void*>(a + base + k)
               : pad;
  }
  const int tap = k / P::CG, channel = k % P::CG;
  const int y = y0 + tap / (P::KW ? P::KW : 1) * P::DH;
  const int x = x0 + tap % (P::KW ? P::KW : 1) * P::DW;
  const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(P::IH) &&
                      static_cast<unsigned>(x) < static_cast<unsigned>(P::IW) &&
                      (P::KP == P::K || k < P::K);
  return inside ? static_cast<const void*>(a + base + (y * P::IW + x) * P::C + channel) : pad;
}

template <class T, int PIECE, class F>
QC_DEVICE void qc_copy_pieces(unsigned char* to, F source) {
  if (PIECE >= 4) {
#pragma unroll
    for (int i = 0; i < 16; i += PIECE) qc_copy_async<PIECE < 4 ? 4 : PIECE>(to + i, source(i));
  } else {  // elements that no aligned copy reaches: gathered in registers
    qc_pack<T, 16 / sizeof(T)> v;
#pragma unroll
    for (int i = 0; i < 16; i += static_cast<int>(sizeof(T))) {
      v.at[i / sizeof(T)] = *static_cast<const T*>(source(i));
    }
    *reinterpret_cast<qc_pack<T, 16 / sizeof(T)>*>(to) = v;
  }
}

template <class P>
QC_DEVICE void qc_product(const typename P::A* __restrict__ a, const void* __restrict__ b_any,
                          const typename P::RES* __restrict__ residual,
                          const void* __restrict__ bias_any,
                          const float* __restrict__ multiplier, const int* __restrict__ b_zero,
                          const void* __restrict__ pad, typename P::OUT* __restrict__ out) {
  typedef qc_tile<P> T;
  typedef typename P::OUT OUT;
  constexpr int E = T::ELEMENT;
  constexpr int MI = P::WM / 16, NI = P::WN / 8, KS = P::BK / 32;
  QC_SHARED(shared);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_m = warp / T::WARPS_N * P::WM, warp_n = warp % T::WARPS_N * P::WN;

  // Blocks in bands of GROUP_ROWS block rows: neighbours in time share tiles of A and B in cache.
  constexpr int TILES_M = (P::M + P::BM - 1) / P::BM, TILES_N = (P::N + P::BN - 1) / P::BN;
  const int block = blockIdx.x, z = blockIdx.y;
  const int band = block / (P::GROUP_ROWS * TILES_N), in_band = block % (P::GROUP_ROWS * TILES_N);
  const int left = TILES_M - band * P::GROUP_ROWS;
  const int rows_here = left < P::GROUP_ROWS ? left : P::GROUP_ROWS;
  const int m0 = (band * P::GROUP_ROWS + in_band % rows_here) * P::BM;
  const int n0 = in_band / rows_here * P::BN;

  a += P::a_offset(z);
  const unsigned char* b = static_cast<const unsigned char*>(b_any) + P::b_offset(z);
  const int columns = P::n_offset(z);  // of this group, in the arrays per column

  // ------------------------------------------------------------ what this thread copies
  constexpr int A_COPIES = P::BM * T::PIECES / T::THREADS;
  static_assert(P::BM * T::PIECES % T::THREADS == 0, "tile of A and threads do not fit");
  int base[A_COPIES], y0[A_COPIES], x0[A_COPIES];
  const int first_y = P::y_offset(z) - P::PH, first_x = P::x_offset(z) - P::PW;
#pragma unroll
  for (int i = 0; i < A_COPIES; ++i) {
    const int m = m0 + (thread + i * T::THREADS) / T::PIECES;
    if (P::KH == 0) {
      y0[i] = m < P::M ? 0 : -1;
      x0[i] = 0;
      base[i] = m * P::A_ROW;
    } else {
      const int pixel = m % (P::OH * P::OW);
      base[i] = m / (P::OH * P::OW) * (P::IH * P::IW * P::C);
      y0[i] = m < P::M ? pixel / P::OW * P::SH + first_y : -(1 << 28);
      x0[i] = pixel % P::OW * P::SW + first_x;
    }
  }

  auto copy_step = [&](int step, unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < A_COPIES; ++i) {
      const int piece = thread + i * T::THREADS;
      const int row = piece / T::PIECES, c = piece % T::PIECES;
      const int k = (step * P::BK + c * 16) / E;
      qc_copy_pieces<typename P::A, P::A_PIECE>(
          stage + qc_swizzled<T::PIECES>(row, c), [&](int byte) {
            return qc_a_source<P>(a, base[i], y0[i], x0[i], k + byte / E, pad);
          });
    }
    unsigned char* to = stage + T::A_BYTES;
    if (P::PACKED4) {
      // 16-byte pieces in the order of memory: 8 columns hold BK / 32 * 128 bytes per step.
      constexpr int RUN = KS * 8, COPIES = P::BN / 8 * RUN;
#pragma unroll
      for (int j = 0; j < (COPIES + T::THREADS - 1) / T::THREADS; ++j) {
        const int i = thread + j * T::THREADS;
        if (COPIES % T::THREADS && i >= COPIES) break;
        const int tile = n0 / 8 + i / RUN;
        qc_copy_async<16>(to + i * 16,
                          b + (tile * (P::KP / 32) + step * KS) * 128 + i % RUN * 16);
      }
    } else {
      constexpr int COPIES = P::BN * T::PIECES;
#pragma unroll
      for (int j = 0; j < (COPIES + T::THREADS - 1) / T::THREADS; ++j) {
        const int i = thread + j * T::THREADS;
        if (COPIES % T::THREADS && i >= COPIES) break;
        const int row = i / T::PIECES, c = i % T::PIECES, n = n0 + row;
        const int at = step * P::BK + c * 16;  // byte along K
        unsigned char* place = to + qc_swizzled<T::PIECES>(row, c);
        if (P::B_PADDED) {
          qc_copy_async<16>(place, b + n * (P::KP * E) + at);
        } else {
          qc_copy_pieces<typename P::B, P::B_PIECE>(place, [&](int byte) -> const void* {
            const bool inside = n < P::N && (P::KP == P::K || at + byte < P::K * E);
            return inside ? b + n * (P::K * E) + at + byte
                          : static_cast<const unsigned char*>(pad) + 16;
          });
        }
      }
    }
  };

  // ------------------------------------------------------------ the products
  typedef typename P::ACC ACC;
  ACC acc[MI][NI][4];
  int row_sums[MI][4], column_sums[NI][4];
#pragma unroll
  for (int i = 0; i < MI; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) row_sums[i][e] = 0;
#pragma unroll
    for (int j = 0; j < NI; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
    }
  }
#pragma unroll
  for (int j = 0; j < NI; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) column_sums[j][e] = 0;
  }

#pragma unroll
  for (int s = 0; s < P::STAGES - 1; ++s) {
    if (s < T::STEPS) copy_step(s, shared + s * T::STAGE);
    qc_copy_commit();
  }
  int filling = P::STAGES - 1, reading = 0;
#pragma unroll 1
  for (int step = 0; step < T::STEPS; ++step) {
    qc_copy_wait<P::STAGES - 2>();
    // After this, the copies of every thread are visible, and nobody reads the oldest buffer.
    __syncthreads();
    if (step + P::STAGES - 1 < T::STEPS) {
      copy_step(step + P::STAGES - 1, shared + filling * T::STAGE);
    }
    qc_copy_commit();
    filling = filling + 1 == P::STAGES ? 0 : filling + 1;
    const unsigned char* at_a = shared + reading * T::STAGE;
    const unsigned char* at_b = at_a + T::A_BYTES;
    reading = reading + 1 == P::STAGES ? 0 : reading + 1;
#pragma unroll
    for (int ks = 0; ks < KS; ++ks) {
      unsigned fa[MI][4], fb[NI][2];
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        qc_load_matrix_x4(fa[i], at_a + qc_swizzled<T::PIECES>(warp_m + i * 16 + lane % 16,
                                                               ks * 2 + lane / 16));
      }
      if (P::PACKED4) {
        // One word holds the eight 4-bit weights that a lane needs. Moved to the upper half of its
        // byte, a weight counts 16 times; the epilogue divides.
#pragma unroll
        for (int j = 0; j < NI; ++j) {
          const unsigned w = *reinterpret_cast<const unsigned*>(
              at_b + (((warp_n / 8 + j) * KS + ks) * 32 + lane) * 4);
          fb[j][0] = (w << 4) & 0xf0f0f0f0u;
          fb[j][1] = w & 0xf0f0f0f0u;
        }
      } else {
#pragma unroll
        for (int j = 0; j < NI; j += 2) {
          unsigned r[4];
          qc_load_matrix_x4(
              r, at_b + qc_swizzled<T::PIECES>(warp_n + j * 8 + lane / 16 * 8 + lane % 8,
                                               ks * 2 + lane / 8 % 2));
          fb[j][0] = r[0], fb[j][1] = r[1], fb[j + 1][0] = r[2], fb[j + 1][1] = r[3];
        }
      }
#pragma unroll
      for (int i = 0; i < MI; ++i) {
#pragma unroll
        for (int j = 0; j < NI; ++j) P::multiply(acc[i][j], fa[i], fb[j]);
      }
      // Sums along K, by the same instruction with a matrix of ones: they land where they are
      // needed, next to the accumulators of their row or column.
      if (P::ROW_SUMS) {
        const unsigned ones[2] = {0x01010101u, 0x01010101u};
#pragma unroll
        for (int i = 0; i < MI; ++i) {
          qc_mma_int8<P::A_SIGNED, true>(row_sums[i], fa[i], ones);
        }
      }
      if (P::COLUMN_SUMS) {
        const unsigned ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
#pragma unroll
        for (int j = 0; j < NI; ++j) {
          qc_mma_int8<true, P::B_SIGNED>(column_sums[j], ones, fb[j]);
        }
      }
    }
  }
  qc_copy_wait<0>();
  __syncthreads();  // the buffers are free for the results

  // ------------------------------------------------------------ the epilogue
  // Whole pieces of rows move between memory and `shared`; OUT_PIECE divides every row.
  constexpr int PER_ROW = P::BN * T::OUT_SIZE / P::OUT_PIECE;
  constexpr int OUT_PIECES = P::BM * PER_ROW;
  out += P::c_offset(z);
  residual += P::c_offset(z);
  auto each_piece = [&](auto move) {
#pragma unroll 4
    for (int j = 0; j < (OUT_PIECES + T::THREADS - 1) / T::THREADS; ++j) {
      const int i = thread + j * T::THREADS;
      if (OUT_PIECES % T::THREADS && i >= OUT_PIECES) break;
      const int row = i / PER_ROW, byte = i % PER_ROW * P::OUT_PIECE;
      const int m = m0 + row, n = n0 + byte / T::OUT_SIZE;
      if (m < P::M && n < P::N) move(shared + row * T::OUT_ROW + byte, m * P::OUT_STRIDE + n);
    }
  };
  if (T::STAGED && P::RESIDUAL) {
    each_piece([&](unsigned char* at, int index) {
      qc_store<P::OUT_PIECE>(at, qc_load<P::OUT_PIECE>(reinterpret_cast<const qc_u8*>(residual + index)));
    });
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < NI; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // columns 2 t and 2 t + 1 of the 8
      const int column = warp_n + j * 8 + lane % 4 * 2 + half, n = n0 + column;
      const bool inside = n < P::N;
      const float scale = P::SCALE_ROW ? (inside ? multiplier[columns + n] : 0.0f) : P::SCALE;
      const typename P::BIAS_TYPE bias =
          P::BIAS && inside ? static_cast<const typename P::BIAS_TYPE*>(bias_any)[columns + n] : 0;
      const int zero_b = P::ROW_SUMS && inside ? b_zero[columns + n] : 0;
#pragma unroll
      for (int i = 0; i < MI; ++i) {
#pragma unroll
        for (int low = 0; low < 2; ++low) {  // rows g and g + 8 of the 16
          const int e = low * 2 + half;
          const int row = warp_m + i * 16 + lane / 4 + low * 8, m = m0 + row;
          unsigned char* at = shared + row * T::OUT_ROW + column * T::OUT_SIZE;
          typename P::RES r = typename P::RES();
          if (P::RESIDUAL && T::STAGED) r = *reinterpret_cast<typename P::RES*>(at);
          if (P::RESIDUAL && !T::STAGED && inside && m < P::M) r = residual[m * P::OUT_STRIDE + n];
          const OUT y = P::result(acc[i][j][e], row_sums[i][e], column_sums[j][half], zero_b, bias,
                                  scale, r);
          if (T::STAGED) {
            *reinterpret_cast<OUT*>(at) = y;
          } else if (inside && m < P::M) {
            out[m * P::OUT_STRIDE + n] = y;
          }
        }
      }
    }
  }
  if (T::STAGED) {
    __syncthreads();
    each_piece([&](unsigned char* at, int index) {
      qc_store<P::OUT_PIECE>(reinterpret_cast<qc_u8*>(out + index), qc_load<P::OUT_PIECE>(at));
    });
  }
}

// Integer accumulators to the result: what `numerics.requantize` does, step by step.
template <class P>
struct qc_int_epilogue {
  typedef int ACC;
  typedef int BIAS_TYPE;
  template <class F>
  static __device__ __forceinline__ void multiply(int (&c)[4], const unsigned (&a)[4],
                                                  const F& b) {
    qc_mma_int8<P::A_SIGNED, P::B_SIGNED>(c, a, b);
  }
  template <class R>
  static __device__ __forceinline__ auto result(int acc, int row_sum, int column_sum, int zero_b,
                                                int bias, float scale, R r) {
    typedef typename P::OUT_TYPE OUT;
    if (P::PACKED4) acc >>= 4;
    // sum (a - za) (b - zb) = sum ab - zb sum a - za sum b + KP za zb: A is za in its padding
    if (P::ROW_SUMS) acc = qc_wrap_add(acc, qc_wrap_mul(-zero_b, row_sum));
    if (P::COLUMN_SUMS) acc = qc_wrap_add(acc, qc_wrap_mul(-P::ZA, column_sum));
    acc = qc_wrap_add(acc, qc_wrap_add(bias, P::CORRECTION));
    float t = __fmul_rn(__int2float_rn(acc), scale);
    if (P::RESIDUAL) {
      const int centred = static_cast<int>(r) - P::RES_ZERO;
      t = __fadd_rn(t, __fmul_rn(__int2float_rn(centred), P::RES_SCALE));
    }
    if (P::TO_FLOAT) return static_cast<OUT>(t);
    return static_cast<OUT>(qc_quantized(t, P::LO, P::HI, P::ZERO));
  }
};

template <class P>
struct qc_half_epilogue {
  typedef float ACC;
  typedef float BIAS_TYPE;
  template <class F>
  static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4],
                                                  const F& b) {
    qc_mma_half(c, a, b);
  }
  template <class R>
  static __device__ __forceinline__ auto result(float acc, int, int, int, float bias, float, R r) {
    float t = __fadd_rn(acc, bias);
    if (P::RESIDUAL) t = __fadd_rn(t, qc_real(r));
    t = fminf(fmaxf(t, P::LO), P::HI);
    return qc_as<typename P::OUT_TYPE>::of(t);
  }
};
