// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0
//
// Operators along one axis: reductions, softmax, normalization. P has DEPTH, the extent of the
// axis, INNER, the distance between its elements, and THREADS. A row is one (outer, inner) pair.

template <class P>
struct qc_row {
  int base;
  __device__ __forceinline__ explicit qc_row(int row)
      : base(row / P::INNER * (P::DEPTH * P::INNER) + row % P::INNER) {}
  __device__ __forceinline__ int operator()(int i) const { return base + i * P::INNER; }
};

// P further: IN, ACC, OUT, ROWS, F; take(x), finish(acc); first(). A block per row.
template <class P>
QC_DEVICE void qc_reduce_block(const typename P::IN* __restrict__ in,
                               typename P::OUT* __restrict__ out) {
  QC_SHARED(shared);
  const qc_row<P> row(blockIdx.x);
  typename P::ACC acc = P::first();
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) {
    acc = typename P::F()(acc, P::take(in[row(i)]));
  }
  acc = qc_combine<P::THREADS>(acc, typename P::F(), shared);
  if (threadIdx.x == 0) out[blockIdx.x] = P::finish(acc);
}

// The same with a thread per row, for rows whose neighbours lie side by side in memory.
template <class P>
QC_DEVICE void qc_reduce_thread(const typename P::IN* __restrict__ in,
                                typename P::OUT* __restrict__ out) {
  const int index = blockIdx.x * P::THREADS + threadIdx.x;
  if (index >= P::ROWS) return;
  const qc_row<P> row(index);
  typename P::ACC acc = P::first();
  for (int i = 0; i < P::DEPTH; ++i) acc = typename P::F()(acc, P::take(in[row(i)]));
  out[index] = P::finish(acc);
}

// ---------------------------------------------------------------- softmax

// `numerics.exp_f32`, step by step. Source: Cephes expf.
QC_DEVICE float qc_exp(float x) {
  const float n = rintf(__fmul_rn(x, 0x1.715476p+0f));
  const float r =
      __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0x1.63p-1f)), __fmul_rn(n, -0x1.bd0106p-13f));
  float p = 0x1.a0d2cep-13f;
  p = __fadd_rn(__fmul_rn(p, r), 0x1.6e879cp-10f);
  p = __fadd_rn(__fmul_rn(p, r), 0x1.111210p-7f);
  p = __fadd_rn(__fmul_rn(p, r), 0x1.555382p-5f);
  p = __fadd_rn(__fmul_rn(p, r), 0x1.555554p-3f);
  p = __fadd_rn(__fmul_rn(p, r), 0x1p-1f);
  const float e = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
  return ldexpf(e, static_cast<int>(n));
}

// Quantized softmax; P further: IN, OUT; TABLE (8-bit operand), ONE_OVER_SCALE, finish(t, r).
template <class P>
QC_DEVICE void qc_softmax_exact(const typename P::IN* __restrict__ in,
                                const int* __restrict__ table,
                                typename P::OUT* __restrict__ out) {
  QC_SHARED(shared);
  typedef typename P::IN IN;
  typedef typename P::WIDE WIDE;  // int for 8-bit operands, float otherwise
  const qc_row<P> row(blockIdx.x);
  WIDE top = static_cast<WIDE>(in[row(0)]);
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) {
    const WIDE x = static_cast<WIDE>(in[row(i)]);
    top = x > top ? x : top;
  }
  top = qc_combine<P::THREADS>(top, qc_max(), shared);
  qc_i64 sum = 0;
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) sum += P::term(in[row(i)], top, table);
  sum = qc_combine<P::THREADS>(sum, qc_sum(), shared);
  const float r = __fdiv_rn(P::ONE_OVER_SCALE, __ll2float_rn(sum > 1 ? sum : 1));
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) {
    const int t = P::term(in[row(i)], top, table);
    out[row(i)] = P::finish(__fmul_rn(__int2float_rn(t), r));
  }
}

// e**(x - max) as an integer, for float32 scores.
QC_DEVICE int qc_score_term(float x, float top) {
  float below = __fsub_rn(x, top);
  below = below >= -87.0f ? below : -87.0f;  // NaN, from a row of -inf, too
  return __float2int_rn(__fmul_rn(qc_exp(below), 0x1p20f));
}

// Float softmax, or its logarithm.
template <class P>
QC_DEVICE void qc_softmax_float(const typename P::IN* __restrict__ in,
                                typename P::OUT* __restrict__ out) {
  QC_SHARED(shared);
  const qc_row<P> row(blockIdx.x);
  float top = qc_real(in[row(0)]);
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) {
    top = qc_max()(top, qc_real(in[row(i)]));
  }
  top = qc_combine<P::THREADS>(top, qc_max(), shared);
  float sum = 0;
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) sum += expf(qc_real(in[row(i)]) - top);
  sum = qc_combine<P::THREADS>(sum, qc_sum(), shared);
  const float log_sum = P::LOGARITHM ? logf(sum) : 0.0f;
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) {
    const float d = qc_real(in[row(i)]) - top;
    out[row(i)] = qc_as<typename P::OUT>::of(P::LOGARITHM ? d - log_sum : expf(d) / sum);
  }
}

// ---------------------------------------------------------------- normalization

// Layer norm of integers, exact up to the last steps; P further: IN, OUT, VARIANCE_SCALE, EPSILON,
// MEAN_SCALE, finish(y).
template <class P>
QC_DEVICE void qc_layer_norm_exact(const typename P::IN* __restrict__ in,
                                   const float* __restrict__ gamma, const float* __restrict__ beta,
                                   typename P::OUT* __restrict__ out) {
  QC_SHARED(shared);
  const qc_row<P> row(blockIdx.x);
  qc_i64 c1 = 0, c2 = 0;
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) {
    const qc_i64 q = in[row(i)];
    c1 += q;
    c2 += q * q;
  }
  c1 = qc_combine<P::THREADS>(c1, qc_sum(), shared);
  c2 = qc_combine<P::THREADS>(c2, qc_sum(), shared);
  const qc_i64 spread = P::DEPTH * c2 - c1 * c1;
  const float v = __fadd_rn(__fmul_rn(__ll2float_rn(spread), P::VARIANCE_SCALE), P::EPSILON);
  const float s = __fmul_rn(__fdiv_rn(1.0f, __fsqrt_rn(v)), P::MEAN_SCALE);
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) {
    const qc_i64 centred = P::DEPTH * static_cast<qc_i64>(in[row(i)]) - c1;
    const float t = __fmul_rn(__ll2float_rn(centred), s);
    out[row(i)] = P::finish(__fadd_rn(__fmul_rn(t, gamma[i]), beta[i]));
  }
}

// Float layer norm (gamma and beta per element of the row) or instance norm (per row).
template <class P>
QC_DEVICE void qc_norm_float(const typename P::IN* __restrict__ in, const float* __restrict__ gamma,
                             const float* __restrict__ beta, typename P::OUT* __restrict__ out) {
  QC_SHARED(shared);
  const qc_row<P> row(blockIdx.x);
  float sum = 0;
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) sum += qc_real(in[row(i)]);
  const float mean = qc_combine<P::THREADS>(sum, qc_sum(), shared) / P::DEPTH;
  float square = 0;
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) {
    const float d = qc_real(in[row(i)]) - mean;
    square += d * d;
  }
  const float variance = qc_combine<P::THREADS>(square, qc_sum(), shared) / P::DEPTH;
  const float s = sqrtf(variance + P::EPSILON);
  for (int i = threadIdx.x; i < P::DEPTH; i += P::THREADS) {
    const int at = P::PER_ROW ? static_cast<int>(blockIdx.x) % P::CHANNELS : i;
    const float y = (qc_real(in[row(i)]) - mean) / s * gamma[at] + beta[at];
    out[row(i)] = qc_as<typename P::OUT>::of(y);
  }
}

// ---------------------------------------------------------------- scans

// P further: IN, ROWS, LARGEST, LAST. A thread per row.
template <class P>
QC_DEVICE void qc_arg(const typename P::IN* __restrict__ in, qc_i64* __restrict__ out) {
  const int index = blockIdx.x * P::THREADS + threadIdx.x;
  if (index >= P::ROWS) return;
  const qc_row<P> row(index);
  typename P::IN best = in[row(0)];
  int where = 0;
  for (int i = 1; i < P::DEPTH; ++i) {
    const typename P::IN x = in[row(i)];
    const bool better = (P::LARGEST ? x > best : x < best) || (x != x && best == best);
    if (better || (P::LAST && x == best)) best = x, where = i;
  }
  out[index] = where;
}

// P further: IN, ROWS, EXCLUSIVE, REVERSE. A thread per row.
template <class P>
QC_DEVICE void qc_cumulate(const typename P::IN* __restrict__ in,
                           typename P::IN* __restrict__ out) {
  const int index = blockIdx.x * P::THREADS + threadIdx.x;
  if (index >= P::ROWS) return;
  const qc_row<P> row(index);
  typename P::IN sum = 0;
  for (int k = 0; k < P::DEPTH; ++k) {
    const int i = row(P::REVERSE ? P::DEPTH - 1 - k : k);
    const typename P::IN x = in[i];
    out[i] = P::EXCLUSIVE ? sum : static_cast<typename P::IN>(sum + x);
    sum = static_cast<typename P::IN>(sum + x);
  }
}
