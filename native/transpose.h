// Copies between planes and rows: what is contiguous in one array lies apart in the other.
#pragma once

#include "vector.h"

namespace evennorm::EVENNORM_ISA {

// Sides of a block that is transposed in registers; 1 where there is no such.
template <class S>
constexpr int64_t kTile =
#if defined(__AVX2__)
    sizeof(S) == 4 ? 8 : 1;
#elif defined(__SSE2__)
    sizeof(S) == 4 ? 4 : 1;
#else
    1;
#endif

// to[i * n + j] = from[i + j * stride], for one tile.
inline void transpose_tile([[maybe_unused]] float* to, [[maybe_unused]] int64_t n, [[maybe_unused]] const float* from,
                           [[maybe_unused]] int64_t stride) {
#if defined(__AVX2__)
  __m256 a[8], b[8];
  for (int j = 0; j < 8; ++j) a[j] = _mm256_loadu_ps(from + j * stride);
  for (int j = 0; j < 8; j += 2) {
    b[j] = _mm256_unpacklo_ps(a[j], a[j + 1]);
    b[j + 1] = _mm256_unpackhi_ps(a[j], a[j + 1]);
  }
  for (int j = 0; j < 8; j += 4) {
    a[j] = _mm256_shuffle_ps(b[j], b[j + 2], 0x44);
    a[j + 1] = _mm256_shuffle_ps(b[j], b[j + 2], 0xee);
    a[j + 2] = _mm256_shuffle_ps(b[j + 1], b[j + 3], 0x44);
    a[j + 3] = _mm256_shuffle_ps(b[j + 1], b[j + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * n, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * n, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
#elif defined(__SSE2__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + stride), c = _mm_loadu_ps(from + 2 * stride), d = _mm_loadu_ps(from + 3 * stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + n, b);
  _mm_storeu_ps(to + 2 * n, c);
  _mm_storeu_ps(to + 3 * n, d);
#endif
}

// to[i * n + j] = from[i * along_i + j * along_j] for all i < m and j < n, in blocks that fit in the first cache.
template <class S>
void gather(S* to, int64_t m, int64_t n, const S* from, int64_t along_i, int64_t along_j) {
  constexpr int64_t kBlock = 16, kSide = kTile<S>;
  const auto one_by_one = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    for (int64_t j = j0; j < j1; ++j) {
      for (int64_t i = i0; i < i1; ++i) to[i * n + j] = from[i * along_i + j * along_j];
    }
  };
  if (along_j == 1) {
    for (int64_t i = 0; i < m; ++i) std::memcpy(to + i * n, from + i * along_i, static_cast<size_t>(n) * sizeof(S));
    return;
  }
  for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
    const int64_t j1 = j0 + kBlock < n ? j0 + kBlock : n;
    for (int64_t i0 = 0; i0 < m; i0 += kBlock) {
      const int64_t i1 = i0 + kBlock < m ? i0 + kBlock : m;
      if constexpr (kSide > 1) {
        if (along_i == 1 && i1 - i0 == kBlock && j1 - j0 == kBlock) {
          for (int64_t j = j0; j < j1; j += kSide) {
            for (int64_t i = i0; i < i1; i += kSide) transpose_tile(to + i * n + j, n, from + i + j * along_j, along_j);
          }
          continue;
        }
      }
      one_by_one(i0, i1, j0, j1);
    }
  }
}

}  // namespace evennorm::EVENNORM_ISA
