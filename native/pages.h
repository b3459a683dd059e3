// Memory that is written for the first time, made cheap: huge pages, and buffers that were used before.
//
// A tensor of 25 MB takes three times as long to write on fresh pages of 4 KB as the arithmetic takes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace evennorm {

// Asks the kernel to back the whole huge pages inside [data, data + bytes) by such. Nothing happens where it is too small, or the
// system has none.
void advise_huge(void* data, int64_t bytes);

// A buffer of at least `bytes`, aligned to a huge page where it is larger than one; null where there is no memory. It keeps what its
// last user wrote.
void* take_buffer(size_t bytes);

// Gives a buffer back. It is kept for the next one who asks, up to `buffer_limit` bytes altogether; what was unused longest goes first.
void give_buffer(void* data, size_t bytes);

void set_buffer_limit(size_t bytes);  // 0 gives everything back to the system, and keeps nothing
size_t buffered_bytes();              // kept, and used by nobody

// Bytes from which an output is written past the cache: little of it would still be there when the next operation comes. That saves
// reading it first, and leaves the cache to x and dy.
constexpr int64_t kPastCache = 16 << 20;
void write_past_cache_from(int64_t bytes);
int64_t past_cache_from();

}  // namespace evennorm
