// Memory-mapped arrays: the system reads a page of the file when it is used, and can drop it again.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>

#include "operation.h"
#include "ops.h"

namespace mlx_esm {
namespace {

class File {
 public:
  explicit File(const std::string& path) : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (descriptor_ < 0) throw std::system_error(errno, std::generic_category(), path);
  }
  ~File() { ::close(descriptor_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int descriptor() const { return descriptor_; }

  long size() const {
    struct stat found;
    return ::fstat(descriptor_, &found) == 0 ? long(found.st_size) : -1;
  }

 private:
  int descriptor_;
};

}  // namespace

array mapped(const std::string& path, long offset, const std::vector<int>& shape, mx::Dtype dtype) {
  // MLX keeps the size of a CPU buffer in the word before the data. Here that word is whatever the file has there. This
  // is safe because MLX reads the size only of buffers that it allocated.
  constexpr long before = sizeof(std::size_t);
  long bytes = mx::size_of(dtype);
  for (const int n : shape) bytes *= n;
  const File file(path);
  require(bytes > 0 && offset >= before && offset + bytes <= file.size(), "mapped: the file has no such part");
  require(offset % mx::size_of(dtype) == 0, "mapped: the numbers are not aligned");

  const long page = ::sysconf(_SC_PAGESIZE);
  const long first = (offset - before) / page * page;
  const std::size_t length = offset + bytes - first;
  // MAP_PRIVATE: a write, for example through NumPy, goes to a copy of the page. MAP_NORESERVE: the system would
  // otherwise reserve memory for all pages and refuse a file larger than memory.
  void* address =
      ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.descriptor(), first);
  if (address == MAP_FAILED) throw std::system_error(errno, std::generic_category(), path);

  mx::allocator::Buffer buffer(static_cast<char*>(address) + (offset - before - first));
  mx::allocator::Data data(buffer, [address, length](mx::allocator::Buffer) { ::munmap(address, length); });
  require(buffer.raw_ptr() == static_cast<char*>(address) + (offset - first),
          "mapped: this version of MLX has another buffer layout");
  return array(std::move(data), mx::Shape(shape.begin(), shape.end()), dtype);
}

}  // namespace mlx_esm
