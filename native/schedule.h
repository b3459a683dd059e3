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
  const int64_t block = std::clamp(kElementsTogether / layout.count(), int64_t{1}, std::min(kChannelsTogether, shared));
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
  if (work * channel < kWorthSharing || layout.glue > 1) return body(0, channel);
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

template <class Work>
void visit(Work& work, const Layout& layout, bool all_direct, Visit visit, Workers& workers) {
  // With few channels, one each would leave threads idle at the end.
  const bool by_channel =
      layout.kind == Kind::planes && all_direct && (workers.count() == 1 || layout.channel >= 4 * workers.count());
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

// Coefficients of all channels, repeated for glued rows, with room for a vector more.
template <class A>
class CoefficientBuffer {
 public:
  CoefficientBuffer(const Layout& layout, int arrays)
      : layout_(layout), stride_(round_up(layout.width() + kLanes<A>, kLanes<A>)), memory_(stride_ * arrays) {
    A* at = memory_.get();
    for (int i = 0; i < arrays; ++i) std::fill(at + i * stride_ + layout.width(), at + (i + 1) * stride_, A{0});
    all = {at, at + stride_, at + 2 * stride_, arrays > 3 ? at + 3 * stride_ : nullptr, arrays > 3 ? at + 4 * stride_ : nullptr};
  }
  // Brings the coefficients of the first `channel` elements to the glued rows.
  void repeat() {
    for (A* array : {all.mean, all.scale, all.shift, all.slope, all.offset}) {
      for (int64_t i = layout_.channel; array != nullptr && i < layout_.width(); ++i) array[i] = array[i - layout_.channel];
    }
  }

  Coefficients<A> all;

 private:
  const Layout& layout_;
  int64_t stride_;
  Buffer<A> memory_;
};

// Calls body(runs, n, r) for the rows of `positions`, glued where the layout says so: `runs` rows of n elements from position r on.
template <class Body>
void over_rows(const Layout& layout, int64_t positions, const Body& body) {
  const int64_t whole = positions / layout.glue, rest = positions % layout.glue;
  if (whole > 0) body(whole, layout.width(), 0);
  if (rest > 0) body(1, rest * layout.channel, whole * layout.glue);
}

// Sums over glued rows come per element of the row; this adds them up per channel.
class RowTotals {
 public:
  RowTotals(const Layout& layout, double* first, double* second)
      : layout_(layout), first_(first), second_(second), glued_(layout.glue > 1 ? 2 * layout.width() : 0) {
    for (int64_t i = 0; layout.glue > 1 && i < 2 * layout.width(); ++i) glued_[i] = 0;
  }
  ~RowTotals() {
    if (layout_.glue == 1) return;
    for (int64_t i = 0; i < layout_.width(); ++i) {
      first_[i % layout_.channel] += glued_[i];
      second_[i % layout_.channel] += glued_[layout_.width() + i];
    }
  }
  double* first() const { return layout_.glue > 1 ? glued_.get() : first_; }
  double* second() const { return layout_.glue > 1 ? glued_.get() + layout_.width() : second_; }

 private:
  const Layout& layout_;
  double *first_, *second_;
  Buffer<double> glued_;
};

}  // namespace evennorm::EVENNORM_ISA
