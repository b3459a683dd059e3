// Numbers of a few channels at a time, for what happens once per channel.
#pragma once

#include <algorithm>
#include <cstdint>

namespace evennorm {

constexpr int64_t kTogether = 64;  // channels, whose numbers need no memory but the stack

template <class Body>
void each_block(int64_t channels, const Body& body) {
  for (int64_t from = 0; from < channels; from += kTogether) body(from, std::min(kTogether, channels - from));
}

}  // namespace evennorm
