// How the arrays of one operation lie in memory, and the fixed chunks that the work is cut into.
//
// Either every channel's elements lie in contiguous planes, or the channels of one position lie in contiguous rows. Neighbouring
// planes that are shorter than a vector or two are bundled: read as one row. An array that lies the other way, or in neither, is
// gathered chunk by chunk into scratch memory of the right kind, while it is in cache.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>

#include "batch_norm.h"
#include "pages.h"
#include "runs.h"
#include "transpose.h"

namespace evennorm::EVENNORM_ISA {

enum class Kind { planes, rows };

constexpr int64_t kPlaneChunk = 8192;   // positions; each chunk of a channel ends in one reduction
constexpr int64_t kStagedChunk = 1024;  // the same where channels are gathered first, so that all of them stay in cache
constexpr int64_t kRowChunk = 32768;    // elements; each chunk ends in one pair of doubles per channel
constexpr int64_t kStagedChannels = 16;  // channels gathered together, so that every cache line is used whole
constexpr int64_t kLongestBundled = 36;  // elements of a plane; coefficients for every element pay if many planes use them
constexpr int64_t kBundle = 16;          // channels taken together are a multiple of it: whole vectors, and whole bytes of the mask

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Uninitialized memory for one call. A little of it lies on the stack, where it costs nothing.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(reinterpret_cast<T*>(little_)) {
    if (n <= kLittle) return;
    data_ = static_cast<T*>(std::malloc(sizeof(T) * static_cast<size_t>(n)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() {
    if (data_ != reinterpret_cast<T*>(little_)) std::free(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr int64_t kLittle = 1024 / sizeof(T);

  alignas(kVectorBytes) unsigned char little_[kLittle * sizeof(T)];
  T* data_;
};

// Whether an output of this shape is written past the cache.
template <class S>
bool goes_past_cache(const Shape& shape) {
  return shape.groups * shape.outer * shape.channel * shape.inner * static_cast<int64_t>(sizeof(S)) >= past_cache_from();
}

struct Chunk {
  int64_t outer, outers, inner, inners;  // first and number, of each

  int64_t positions() const { return outers * inners; }
};

// A part of an array from some (outer, channel, inner) on.
template <class S>
struct Placed {
  S* data;
  int64_t outer, channel, inner;
};

struct Layout {
  Kind kind;
  int64_t outer, channel, inner;
  int64_t chunk_outers, chunk_inners;
  int64_t glue;  // dense short rows are taken `glue` at a time
  bool bundled;  // planes are read as rows of channel * inner elements

  bool in_rows() const { return kind == Kind::rows || bundled; }
  int64_t count() const { return outer * inner; }
  int64_t chunks() const { return ceil_div(outer, chunk_outers) * ceil_div(inner, chunk_inners); }
  Chunk chunk(int64_t k) const {
    const int64_t per_outer = ceil_div(inner, chunk_inners);
    const int64_t o = k / per_outer * chunk_outers, i = k % per_outer * chunk_inners;
    return {o, o + chunk_outers < outer ? chunk_outers : outer - o, i, i + chunk_inners < inner ? chunk_inners : inner - i};
  }
  int64_t width() const { return channel * (bundled ? inner : glue); }

  // Where the activation mask of a position, or of a channel's plane, begins: each run on a byte of its own.
  int64_t mask_bytes() const { return mask_run_bytes() * (bundled ? outer : kind == Kind::rows ? count() : outer * channel); }
  int64_t mask_run_bytes() const { return ceil_div(bundled ? channel * inner : kind == Kind::rows ? channel : inner, 8); }
  Placed<uint8_t> mask(uint8_t* mask, const Chunk& chunk, int64_t c) const {
    if (mask == nullptr) return {nullptr, 0, 0, 0};
    if (bundled) return {mask + chunk.outer * mask_run_bytes() + c * inner / 8, mask_run_bytes(), 0, 0};
    if (kind == Kind::rows) {
      return {mask + (chunk.outer * inner + chunk.inner) * mask_run_bytes(), inner * mask_run_bytes(), 0, mask_run_bytes()};
    }
    return {mask + (chunk.outer * channel + c) * mask_run_bytes() + chunk.inner / 8, channel * mask_run_bytes(), mask_run_bytes(), 0};
  }
};

// Whether an array can be read where it lies.
inline bool direct(const Layout& layout, const View& v) {
  if (v.data == nullptr) return true;
  if (layout.bundled) return v.inner == 1 && v.channel == layout.inner;
  return layout.kind == Kind::rows ? v.channel == 1 || layout.channel == 1 : v.inner == 1 || layout.inner == 1;
}

inline bool mergeable(const View& v, int64_t inner) { return v.data == nullptr || v.outer == v.inner * inner; }

// The layout that serves all `views`, the first of which leads: it is dense, if it is written to. Their strides are brought into
// its order.
inline Layout layout_of(const Shape& shape, View* const* views, int count, bool has_mask) {
  int64_t outer = shape.outer, inner = shape.inner;
  const View& leader = *views[0];
  const auto swap = [&] {
    for (int i = 0; i < count; ++i) {
      const int64_t stride = views[i]->outer;
      views[i]->outer = views[i]->inner;
      views[i]->inner = stride;
    }
    const int64_t size = outer;
    outer = inner;
    inner = size;
  };
  if (inner == 1 && outer > 1) swap();
  for (int i = 0; i < count; ++i) {
    if (outer == 1) views[i]->outer = views[i]->inner * inner;  // of a single one the stride may be anything
  }
  const bool rows = shape.channel > 1 && leader.channel == 1 && (leader.inner != 1 || inner == 1);
  if (!rows && leader.inner != 1 && leader.outer == 1) swap();
  bool merge = true, dense = true;
  for (int i = 0; i < count; ++i) {
    merge = merge && mergeable(*views[i], inner);
    dense = dense && (views[i]->data == nullptr || (views[i]->channel == 1 && views[i]->inner == shape.channel));
  }
  // The bits of planes are counted by run, and the backward pass may see other strides of its other arrays.
  if (merge && (rows || !has_mask)) {
    for (int i = 0; i < count; ++i) views[i]->outer = views[i]->inner * inner * outer;
    inner *= outer;
    outer = 1;
  }
  // With an activation mask by the leader's order and a plane's length alone: its bits have to lie where others look for them.
  const bool in_order = !rows && leader.inner == 1 && leader.channel == inner && shape.channel > 1;
  const int64_t longest = has_mask ? kBundledPlane : outer > 1 ? std::clamp(outer + outer / 2, kBundledPlane, kLongestBundled) : 0;
  const bool bundled = in_order && inner <= longest;
  Layout layout{rows ? Kind::rows : Kind::planes, outer, shape.channel, inner, 1, inner, 1, bundled};
  bool all_direct = true;
  for (int i = 0; i < count; ++i) all_direct = all_direct && direct(layout, *views[i]);
  const int64_t plane_chunk = all_direct ? kPlaneChunk : kStagedChunk;
  if (rows) {
    int64_t positions = kRowChunk / shape.channel;
    positions = positions < kFlush ? kFlush : positions > 64 ? round_up(positions, 64) : positions;
    if (inner >= positions) layout.chunk_inners = positions;
    else layout.chunk_outers = positions / (inner > 0 ? inner : 1);
    const int64_t lanes = kVectorBytes / 4;
    if (dense && merge && shape.channel <= 256 && (!has_mask || shape.channel % 8 == 0)) {
      while (layout.glue < 16 && (layout.width() % lanes != 0 || layout.width() < 4 * lanes)) ++layout.glue;
    }
  } else if (inner >= 2 * plane_chunk) {
    layout.chunk_inners = round_up(ceil_div(inner, inner / plane_chunk), 64);
  } else {
    layout.chunk_outers = plane_chunk / (inner > 0 ? inner : 1);
  }
  if (layout.chunk_outers < 1) layout.chunk_outers = 1;
  if (layout.chunk_outers > outer && outer > 0) layout.chunk_outers = outer;
  if (layout.chunk_inners < 1) layout.chunk_inners = 1;
  return layout;
}

// The channels [c, c + channels) of a chunk, where they lie or gathered into `scratch`.
template <class S>
Placed<S> place(const Layout& layout, const View& v, const Chunk& chunk, int64_t c, int64_t channels, S* scratch) {
  if (v.data == nullptr) return {nullptr, 0, 0, 0};
  S* data = static_cast<S*>(v.data) + chunk.outer * v.outer + c * v.channel + chunk.inner * v.inner;
  if (direct(layout, v)) return {data, v.outer, v.channel, v.inner};
  if (layout.kind == Kind::rows) {
    for (int64_t o = 0; o < chunk.outers; ++o) {
      gather<S>(scratch + o * chunk.inners * channels, chunk.inners, channels, data + o * v.outer, v.inner, v.channel);
    }
    return {scratch, chunk.inners * channels, 1, channels};
  }
  for (int64_t o = 0; o < chunk.outers; ++o) {
    gather<S>(scratch + o * channels * chunk.inners, channels, chunk.inners, data + o * v.outer, v.channel, v.inner);
  }
  return {scratch, channels * chunk.inners, chunk.inners, 1};
}

}  // namespace evennorm::EVENNORM_ISA
