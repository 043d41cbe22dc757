// Scratch memory for a task.
//
// Compiled once, for all machines, not per instruction set like the kernels that use it (vec.h).
#pragma once

#include <vector>

namespace mlx_esm {

// A bump allocator: pieces are taken one after another and released all at once. The arena keeps its memory. After the
// first task it has a single block of the size that the task needs, and allocates no more.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // Release all pieces.
  void clear();

  // Return n uninitialised floats, aligned to a cache line. Throws std::bad_alloc.
  float* take(long n);

 private:
  struct Block {
    float* data;
    long size;
  };

  void allocate(long size);
  void release();

  std::vector<Block> blocks_;  // pieces are taken from the last one
  long used_ = 0;              // floats of the last block
};

}  // namespace mlx_esm
