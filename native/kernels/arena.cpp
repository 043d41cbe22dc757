#include "arena.h"

#include <cstdlib>
#include <new>

#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h>  // its macros do nothing without the sanitizer
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace mlx_esm {
namespace {

constexpr long LINE = 64 / sizeof(float);  // floats in a cache line, which is also the longest vector

}  // namespace

Arena::~Arena() { release(); }

void Arena::clear() {
  used_ = 0;
  if (blocks_.size() > 1) {
    long size = 0;
    for (const Block& block : blocks_) size += block.size;
    release();
    allocate(size);
  }
  for (const Block& block : blocks_) ASAN_POISON_MEMORY_REGION(block.data, block.size * sizeof(float));
}

float* Arena::take(long n) {
  const long size = (n + LINE - 1) / LINE * LINE + LINE;  // plus a poisoned line, for the address sanitizer
  if (blocks_.empty() || used_ + size > blocks_.back().size) {
    allocate(size);
    used_ = 0;
  }
  float* piece = blocks_.back().data + used_;
  used_ += size;
  ASAN_UNPOISON_MEMORY_REGION(piece, n * sizeof(float));
  return piece;
}

void Arena::allocate(long size) {
  blocks_.reserve(blocks_.size() + 1);  // so that push_back cannot throw and leak the block
  auto data = static_cast<float*>(std::aligned_alloc(LINE * sizeof(float), size * sizeof(float)));
  if (!data) throw std::bad_alloc();
  blocks_.push_back({data, size});
  ASAN_POISON_MEMORY_REGION(data, size * sizeof(float));
}

void Arena::release() {
  for (const Block& block : blocks_) {
    ASAN_UNPOISON_MEMORY_REGION(block.data, block.size * sizeof(float));
    std::free(block.data);
  }
  blocks_.clear();
}

}  // namespace mlx_esm
