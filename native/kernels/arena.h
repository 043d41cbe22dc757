// Memory for the intermediate results of a task.
//
// It is compiled once, for every machine, and not with the instruction sets of the kernels that use it (vec.h).
#pragma once

#include <vector>

namespace mlx_esm {

// Pieces are taken one after another and given back all at once. The memory stays with the arena: one that has been
// through a task has a single block of the size that such a task needs, and allocates no more.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // Give back every piece.
  void clear();

  // n floats, aligned for any vector, with whatever was in them. Throws std::bad_alloc.
  float* take(long n);

 private:
  struct Block {
    float* data;
    long size;
  };

  void allocate(long size);
  void release();

  std::vector<Block> blocks_;  // pieces come from the last one
  long used_ = 0;              // floats of it
};

}  // namespace mlx_esm
