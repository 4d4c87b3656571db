// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolution and pooling, NHWC: a thread computes V channels of TX neighbouring pixels.
// Shared shape constants of P: BATCH, IH, IW, C (input channels), OH, OW, OC (result channels), KH,
// KW, SH, SW, PH, PW, DH, DW, V, TX.

template <class P>
struct qc_place {
  static constexpr int GROUPS = P::OC / P::V, STRIPS = (P::OW + P::TX - 1) / P::TX;
  static constexpr int TOTAL = P::BATCH * P::OH * STRIPS * GROUPS;
  int channel, x, y, batch;
  bool live;

  __device__ __forceinline__ qc_place() {
    int i = blockIdx.x * 128 + threadIdx.x;
    live = i < TOTAL;
    channel = i % GROUPS * P::V;
    i /= GROUPS;
    x = i % STRIPS * P::TX;
    i /= STRIPS;
    y = i % P::OH;
    batch = i / P::OH;
  }
  __device__ __forceinline__ int result(int t) const {
    return ((batch * P::OH + y) * P::OW + x + t) * P::OC + channel;
  }
};

// P further: IN, W, ACC, OUT, RES, BIAS_TYPE; MULTIPLY (result channels per input channel);
// ZX; BIAS, RESIDUAL; finish(acc, scale, residual). Weights are [KH][KW][OC], zero points taken off.
template <class P>
QC_DEVICE void qc_depthwise(const typename P::IN* __restrict__ in,
                            const typename P::W* __restrict__ weights,
                            const typename P::RES* __restrict__ residual,
                            const typename P::BIAS_TYPE* __restrict__ bias,
                            const float* __restrict__ multiplier, typename P::OUT* __restrict__ out) {
  typedef typename P::ACC ACC;
  const qc_place<P> at;
  if (!at.live) return;
  ACC acc[P::TX][P::V];
#pragma unroll
  for (int v = 0; v < P::V; ++v) {
    const ACC first = P::BIAS ? static_cast<ACC>(bias[at.channel + v]) : static_cast<ACC>(0);
#pragma unroll
    for (int t = 0; t < P::TX; ++t) acc[t][v] = first;
  }
  const int y0 = at.y * P::SH - P::PH, x0 = at.x * P::SW - P::PW;
  constexpr int SPAN = (P::TX - 1) * P::SW + (P::KW - 1) * P::DW + 1;
#pragma unroll
  for (int ky = 0; ky < P::KH; ++ky) {
    const int y = y0 + ky * P::DH;
    if (static_cast<unsigned>(y) >= static_cast<unsigned>(P::IH)) continue;
    const typename P::IN* row =
        in + (at.batch * P::IH + y) * P::IW * P::C + at.channel / P::MULTIPLY;
#pragma unroll
    for (int s = 0; s < SPAN; ++s) {
      const int x = x0 + s;
      // Columns that no tap of any pixel reads are left out at compile time.
      bool wanted = false;
#pragma unroll
      for (int t = 0; t < P::TX; ++t) {
        const int from = s - t * P::SW;
        wanted |= from >= 0 && from % P::DW == 0 && from / P::DW < P::KW;
      }
      if (!wanted || static_cast<unsigned>(x) >= static_cast<unsigned>(P::IW)) continue;
      const auto pixel = qc_load<P::V>(row + x * P::C);
#pragma unroll
      for (int t = 0; t < P::TX; ++t) {
        const int from = s - t * P::SW;
        if (from < 0 || from % P::DW || from / P::DW >= P::KW) continue;
        const auto w =
            qc_load<P::V>(weights + (ky * P::KW + from / P::DW) * P::OC + at.channel);
#pragma unroll
        for (int v = 0; v < P::V; ++v) {
          acc[t][v] = P::accumulate(acc[t][v], pixel.at[v], w.at[v]);
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < P::TX; ++t) {
    if (at.x + t >= P::OW) continue;
    const int index = at.result(t);
    qc_pack<typename P::RES, P::V> r;
    if (P::RESIDUAL) r = qc_load<P::V>(residual + index);
    qc_pack<typename P::OUT, P::V> y;
#pragma unroll
    for (int v = 0; v < P::V; ++v) {
      y.at[v] = P::finish(acc[t][v], P::SCALED ? multiplier[at.channel + v] : 0.0f, r.at[v]);
    }
    qc_store<P::V>(out + index, y);
  }
}

// P further: IN, ACC, OUT; FIRST; fold(acc, x); finish(acc, multiplier of the position).
template <class P>
QC_DEVICE void qc_pool(const typename P::IN* __restrict__ in, const float* __restrict__ multiplier,
                       typename P::OUT* __restrict__ out) {
  const qc_place<P> at;
  if (!at.live) return;
  typename P::ACC acc[P::V];
#pragma unroll
  for (int v = 0; v < P::V; ++v) acc[v] = P::first();
  const int y0 = at.y * P::SH - P::PH, x0 = at.x * P::SW - P::PW;
  for (int ky = 0; ky < P::KH; ++ky) {
    const int y = y0 + ky * P::DH;
    if (static_cast<unsigned>(y) >= static_cast<unsigned>(P::IH)) continue;
    for (int kx = 0; kx < P::KW; ++kx) {
      const int x = x0 + kx * P::DW;
      if (static_cast<unsigned>(x) >= static_cast<unsigned>(P::IW)) continue;
      const auto pixel =
          qc_load<P::V>(in + ((at.batch * P::IH + y) * P::IW + x) * P::C + at.channel);
#pragma unroll
      for (int v = 0; v < P::V; ++v) acc[v] = P::fold(acc[v], pixel.at[v]);
    }
  }
  qc_pack<typename P::OUT, P::V> result;
  const float scale = P::PER_POSITION ? multiplier[at.y * P::OW + at.x] : 0.0f;
#pragma unroll
  for (int v = 0; v < P::V; ++v) result.at[v] = P::finish(acc[v], scale);
  qc_store<P::V>(out + at.result(0), result);
}
