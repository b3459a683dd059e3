// The C library told to keep memory that was freed, for the whole process, so that the next who asks gets pages that are there.
//
// XLA takes the memory of each program's results and intermediate arrays from malloc, and frees it after. glibc maps large pieces
// from the system and unmaps them, and each new page is filled with zeros first.
#pragma once

#include <cstdint>
#include <string>

namespace evennorm {

// The C library's name and version where its settings can be changed: glibc, and no other malloc in its place. Else why not.
struct Allocator {
  std::string name;
  bool settable;
};

Allocator allocator();

// Keep freed memory, or give it back as glibc does where nothing was set; then what is free is given back at once. Returns whether
// glibc took the settings; nothing is done where the allocator is another.
bool keep_memory(bool keep);

// How many heaps the threads of this process have taken memory from so far; 0 where the allocator is another.
int arenas();

}  // namespace evennorm
