// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0
//
// Float32 matrix product and convolution (implicit GEMM) for layers that stay in float: 64 x 64
// tiles, 16 of K at a time, 4 x 4 results per thread. P as in product.cuh, in elements; B is [N][K].

template <class P>
QC_DEVICE void qc_float_product(const float* __restrict__ a, const float* __restrict__ b,
                                const float* __restrict__ residual, const float* __restrict__ bias,
                                float* __restrict__ out) {
  QC_SHARED(shared);
  float* at_a = reinterpret_cast<float*>(shared);  // [16][64 + 4]
  float* at_b = at_a + 16 * 68;
  const int thread = threadIdx.x, z = blockIdx.z;
  const int m0 = blockIdx.x * 64, n0 = blockIdx.y * 64;
  a += P::a_offset(z);
  b += P::b_offset(z);
  // This thread brings 4 neighbours along K of one row of A, and of B.
  const int row = thread / 4, k4 = thread % 4 * 4, m = m0 + row, n = n0 + row;
  int base = 0, y0 = 0, x0 = 0;
  if (P::KH == 0) {
    base = m * P::A_ROW;
  } else {
    const int pixel = m % (P::OH * P::OW);
    base = m / (P::OH * P::OW) * (P::IH * P::IW * P::C);
    y0 = pixel / P::OW * P::SH - P::PH;
    x0 = pixel % P::OW * P::SW - P::PW;
  }
  float acc[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
  }
  const int tm = thread / 16 * 4, tn = thread % 16 * 4;
  for (int k0 = 0; k0 < P::K; k0 += 16) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int k = k0 + k4 + e;
      float x = 0.0f, w = 0.0f;
      if (m < P::M && k < P::K) {
        if (P::KH == 0) {
          x = a[base + k];
        } else {
          const int tap = k / P::CG;
          const int y = y0 + tap / (P::KW ? P::KW : 1) * P::DH;
          const int u = x0 + tap % (P::KW ? P::KW : 1) * P::DW;
          if (static_cast<unsigned>(y) < static_cast<unsigned>(P::IH) &&
              static_cast<unsigned>(u) < static_cast<unsigned>(P::IW)) {
            x = a[base + (y * P::IW + u) * P::C + k % P::CG];
          }
        }
      }
      if (n < P::N && k < P::K) w = b[n * P::K + k];
      at_a[(k4 + e) * 68 + row] = x;
      at_b[(k4 + e) * 68 + row] = w;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const auto x = qc_load<4>(at_a + k * 68 + tm);
      const auto w = qc_load<4>(at_b + k * 68 + tn);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(x.at[i], w.at[j], acc[i][j]);
      }
    }
    __syncthreads();
  }
  out += P::c_offset(z);
  if (P::RESIDUAL) residual += P::c_offset(z);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = m0 + tm + i, c = n0 + tn + j;
      if (r >= P::M || c >= P::N) continue;
      float t = acc[i][j];
      if (P::BIAS) t = __fadd_rn(t, bias[P::n_offset(z) + c]);
      if (P::RESIDUAL) t = __fadd_rn(t, residual[r * P::OUT_STRIDE + c]);
      if (P::CLAMP_LOW) t = qc_max()(t, P::LO);
      if (P::CLAMP_HIGH) t = qc_min()(t, P::HI);
      out[r * P::OUT_STRIDE + c] = t;
    }
  }
}
