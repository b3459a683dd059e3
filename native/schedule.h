// The order in which the chunks of one group are visited: sums, then the numbers computed from them, then the elements again.
//
// Where planes lie apart, one channel after the other, so that the second visit finds it in cache; else all chunks twice. Either
// way the chunks and the order in which their sums are added are the same, and so are the bits of the result.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>

#include "layout.h"

namespace evennorm::EVENNORM_ISA {

// Work has, for the channels [c, c + channels) of a chunk:
//   start(c, channels)                       what the sums need, before they are taken
//   sums(chunk, c, channels, first, second)  adds to doubles, one pair per channel
//   finish(c, channels, first, second, last)  takes the totals; true if they have to be taken again, which `last` forbids
//   apply(chunk, c, channels)                visits the elements
enum class Visit { sums, apply, both };

// Channels that are visited together, few enough to be found in cache again: what happens once per channel is then done for a vector
// of them, which on planes of 49 takes a quarter of the time.
constexpr int64_t kChannelsTogether = 64;
constexpr int64_t kElementsTogether = 8192;

template <class Work>
void visit_by_channel(Work& work, const Layout& layout, Visit visit, Workers& workers) {
  const int64_t chunks = layout.chunks();
  const int64_t shared = ceil_div(layout.channel, 4 * workers.count());  // so that no thread is left idle at the end
  const int64_t some = std::clamp(kElementsTogether / layout.count(), int64_t{1}, std::min(kChannelsTogether, shared));
  const int64_t block = layout.bundled ? round_up(some, kBundle) : some;
  workers.each(ceil_div(layout.channel, block), [&](int64_t task) {
    const int64_t c = task * block, n = std::min(block, layout.channel - c);
    if (visit != Visit::apply) work.start(c, n);
    for (int round = visit == Visit::apply ? 2 : 0; round < 2; ++round) {
      double first[kChannelsTogether], second[kChannelsTogether], more_first[kChannelsTogether], more_second[kChannelsTogether];
      for (int64_t k = 0; k < chunks; ++k) {
        double *const to_first = k == 0 ? first : more_first, *const to_second = k == 0 ? second : more_second;
        std::fill(to_first, to_first + n, 0.0);
        std::fill(to_second, to_second + n, 0.0);
        work.sums(layout.chunk(k), c, n, to_first, to_second);
        for (int64_t i = 0; k > 0 && i < n; ++i) first[i] += more_first[i], second[i] += more_second[i];
      }
      if (!work.finish(c, n, first, second, round == 1)) break;
    }
    if (visit == Visit::sums) return;
    for (int64_t k = chunks; k-- > 0;) work.apply(layout.chunk(k), c, n);  // what was read last is in cache
  });
}

constexpr int64_t kPart = 256;            // channels
constexpr int64_t kChannelWork = 16;      // what it costs to start or finish a channel, in additions
constexpr int64_t kWorthSharing = 24576;  // additions

// Calls body(c, channels) for parts of the channels, or for all at once where there is little `work` per channel. On one thread, what
// happens once per channel takes a tenth of the time of 392 rows of 2048, while the others wait.
template <class Body>
void each_part(const Layout& layout, int64_t work, Workers& workers, const Body& body) {
  const int64_t channel = layout.channel;
  if (work * channel < kWorthSharing) return body(0, channel);
  workers.each(ceil_div(channel, kPart), [&](int64_t task) {
    const int64_t c = task * kPart;
    body(c, c + kPart < channel ? kPart : channel - c);
  });
}

template <class Work>
void visit_by_chunk(Work& work, const Layout& layout, Visit visit, Workers& workers) {
  const int64_t chunks = layout.chunks(), channel = layout.channel;
  const int64_t block = layout.kind == Kind::rows ? channel : kStagedChannels, blocks = ceil_div(channel, block);
  const auto channels_from = [&](int64_t c) { return c + block < channel ? block : channel - c; };
  if (visit != Visit::apply) {
    each_part(layout, kChannelWork, workers, [&](int64_t c, int64_t n) { work.start(c, n); });
    Buffer<double> parts(chunks * channel * 2);
    Buffer<bool> finished(ceil_div(channel, kPart));
    std::fill(finished.get(), finished.get() + ceil_div(channel, kPart), false);
    for (int round = 0; round < 2; ++round) {
      workers.each(chunks * blocks, [&](int64_t task) {
        const int64_t k = task / blocks, c = task % blocks * block, n = channels_from(c);
        double *first = &parts[k * 2 * channel + c], *second = first + channel;
        for (int64_t i = 0; i < n; ++i) first[i] = second[i] = 0;
        work.sums(layout.chunk(k), c, n, first, second);
      });
      std::atomic<bool> again{false};
      each_part(layout, chunks + kChannelWork, workers, [&](int64_t c, int64_t n) {
        if (finished[c / kPart]) return;  // its shifts are gone
        double *const first = &parts[c], *const second = first + channel;
        for (int64_t k = 1; k < chunks; ++k) {
          const double* const part = first + k * 2 * channel;
          for (int64_t i = 0; i < n; ++i) first[i] += part[i];
          for (int64_t i = 0; i < n; ++i) second[i] += part[channel + i];
        }
        finished[c / kPart] = !work.finish(c, n, first, second, round == 1);
        if (!finished[c / kPart]) again.store(true, std::memory_order_relaxed);
      });
      if (!again.load(std::memory_order_relaxed)) break;
    }
  }
  if (visit == Visit::sums) return;
  workers.each(chunks * blocks, [&](int64_t task) {
    const int64_t c = task % blocks * block;
    work.apply(layout.chunk(task / blocks), c, channels_from(c));
  });
}

// The elements alone, as they lie in memory: planes of one channel lie too far apart to be foreseen, each on a page of its own.
template <class Work>
void visit_in_order(Work& work, const Layout& layout, Workers& workers) {
  const int64_t block = std::min(layout.channel, round_up(ceil_div(kElementsTogether, layout.inner), kBundle));
  const int64_t blocks = ceil_div(layout.channel, block);
  workers.each(layout.outer * blocks, [&](int64_t task) {
    const int64_t c = task % blocks * block;
    work.apply({task / blocks, 1, 0, layout.inner}, c, std::min(block, layout.channel - c));
  });
}

template <class Work>
void visit(Work& work, const Layout& layout, bool all_direct, Visit visit, Workers& workers) {
  // With few channels, one each would leave threads idle at the end.
  const bool by_channel =
      layout.kind == Kind::planes && all_direct && (workers.count() == 1 || layout.channel >= 4 * workers.count());
  if (visit == Visit::apply && layout.kind == Kind::planes && all_direct && layout.chunk_inners == layout.inner && layout.outer > 1) {
    return visit_in_order(work, layout, workers);
  }
  if (by_channel) visit_by_channel(work, layout, visit, workers);
  else visit_by_chunk(work, layout, visit, workers);
}

// Calls part(group, workers) for every group; small work stays on this thread. Fewer elements than `shared_from` do where the other threads
// are awake, fewer than kWorthWaking where they have to be woken up first.
template <class Part>
void each_group(const Shape& shape, int64_t shared_from, Workers& workers, const Part& part) {
  constexpr int64_t kWorthWaking = 1 << 17;  // elements
  Serial serial;
  const int64_t elements = shape.groups * shape.channel * (shape.outer * shape.inner + kChannelWork);
  const bool small = elements < shared_from || (elements < kWorthWaking && !workers.awake());
  if (small || workers.count() == 1) {
    for (int64_t g = 0; g < shape.groups; ++g) part(g, serial);
  } else if (shape.groups >= 4 * workers.count()) {
    workers.each(shape.groups, [&](int64_t g) {
      Serial alone;
      part(g, alone);
    });
  } else {
    for (int64_t g = 0; g < shape.groups; ++g) part(g, workers);
  }
}

// Coefficients of every channel, and of every element of a row that holds more than one of each, with room for a vector more.
template <class A>
class CoefficientBuffer {
 public:
  CoefficientBuffer(const Layout& layout, int arrays)
      : layout_(layout), repeats_(layout.in_rows() && layout.width() > layout.channel), stride_(padded(layout.channel)),
        row_stride_(repeats_ ? padded(layout.width()) : 0), memory_((stride_ + row_stride_) * arrays) {
    all = arrays_at(memory_.get(), stride_, layout.channel, arrays);
    in_row_ = repeats_ ? arrays_at(memory_.get() + arrays * stride_, row_stride_, layout.width(), arrays) : all;
  }

  // Brings those of the channels [c, c + channels) to the elements of a row.
  void repeat(int64_t c, int64_t channels) const {
    if (!repeats_) return;
    repeat(all.mean, in_row_.mean, c, channels);
    repeat(all.scale, in_row_.scale, c, channels);
    repeat(all.shift, in_row_.shift, c, channels);
    if (all.slope == nullptr) return;
    repeat(all.slope, in_row_.slope, c, channels);
    repeat(all.offset, in_row_.offset, c, channels);
  }

  // Of the elements of a row from channel c on.
  Coefficients<A> in_row(int64_t c) const { return in_row_.from(layout_.bundled ? c * layout_.inner : c); }

  Coefficients<A> all;

 private:
  static int64_t padded(int64_t n) { return round_up(n + kLanes<A>, kLanes<A>); }
  static Coefficients<A> arrays_at(A* at, int64_t stride, int64_t n, int arrays) {
    for (int i = 0; i < arrays; ++i) std::fill(at + i * stride + n, at + (i + 1) * stride, A{0});
    return {at, at + stride, at + 2 * stride, arrays > 3 ? at + 3 * stride : nullptr, arrays > 3 ? at + 4 * stride : nullptr};
  }
  void repeat(const A* from, A* to, int64_t c, int64_t channels) const {
    if (!layout_.bundled) {
      for (int64_t g = 0; g < layout_.glue; ++g) std::copy(from + c, from + c + channels, to + g * layout_.channel + c);
      return;
    }
    const int64_t inner = layout_.inner, end = (c + channels) * inner;
    for (int64_t i = c; i < c + channels; ++i) {
      const Vec<A> value = splat(from[i]);
      for (int64_t at = i * inner; at < (i + 1) * inner; at += kLanes<A>) {  // what is too much, the next channel writes over
        if (at + kLanes<A> <= end) store(to + at, value);
        else store_some(to + at, value, end - at);
      }
    }
  }

  const Layout& layout_;
  bool repeats_;
  int64_t stride_, row_stride_;
  Buffer<A> memory_;
  Coefficients<A> in_row_;
};

// Rows of a chunk that are taken together: where they begin, and how far they lie apart.
struct Rows {
  int64_t outer, position, glue;
  bool bundled;

  template <class S>
  S* data(const Placed<S>& p) const {
    return p.data == nullptr || bundled ? p.data : p.data + outer * p.outer + position * p.inner;
  }
  template <class S>
  int64_t stride(const Placed<S>& p) const {
    return bundled ? p.outer : p.inner * glue;
  }
};

// Calls body(number, n, rows) for the rows of a chunk, glued or bundled as the layout says: `number` of them, of n elements.
template <class Body>
void over_rows(const Layout& layout, const Chunk& chunk, int64_t channels, const Body& body) {
  if (layout.bundled) return body(chunk.outers, channels * layout.inner, Rows{0, 0, 1, true});
  const int64_t whole = chunk.inners / layout.glue, rest = chunk.inners % layout.glue;
  for (int64_t o = 0; o < chunk.outers; ++o) {
    if (whole > 0) body(whole, layout.width(), Rows{o, 0, layout.glue, false});
    if (rest > 0) body(int64_t{1}, rest * layout.channel, Rows{o, whole * layout.glue, layout.glue, false});
  }
}

// Sums over rows come per element; this adds them up for each of `channels`.
class RowTotals {
 public:
  RowTotals(const Layout& layout, int64_t channels, double* first, double* second)
      : layout_(layout),
        channels_(channels),
        repeated_(layout.bundled ? layout.inner : layout.glue),
        first_(first),
        second_(second),
        elements_(repeated_ > 1 ? 2 * channels * repeated_ : 0) {
    if (repeated_ > 1) std::fill(elements_.get(), elements_.get() + 2 * channels * repeated_, 0.0);
  }
  ~RowTotals() {
    if (repeated_ == 1) return;
    const int64_t along_channels = layout_.bundled ? repeated_ : 1, along_repeats = layout_.bundled ? 1 : channels_;
    const double *const first = elements_.get(), *const second = first + channels_ * repeated_;
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t i = 0; i < repeated_; ++i) {
        first_[c] += first[c * along_channels + i * along_repeats];
        second_[c] += second[c * along_channels + i * along_repeats];
      }
    }
  }
  double* first() const { return repeated_ > 1 ? elements_.get() : first_; }
  double* second() const { return repeated_ > 1 ? elements_.get() + channels_ * repeated_ : second_; }

 private:
  const Layout& layout_;
  int64_t channels_, repeated_;
  double *first_, *second_;
  Buffer<double> elements_;
};

}  // namespace evennorm::EVENNORM_ISA
