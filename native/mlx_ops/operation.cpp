#include "operation.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

namespace mlx_esm {
namespace {

constexpr int SLOTS = 4;  // enough that the kernels never wait for the next operation
std::atomic<int> taken{0};

}  // namespace

Slot::Slot() {
  for (int n = taken.load();;) {
    if (n >= SLOTS) {
      taken.wait(n);
      n = taken.load();
    } else if (taken.compare_exchange_weak(n, n + 1)) {
      return;
    }
  }
}

Slot::~Slot() {
  taken.fetch_sub(1);
  taken.notify_one();
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

mx::Stream checked_stream(mx::StreamOrDevice s, const std::vector<Optional>& arrays) {
  for (auto& x : arrays) require(!x || x->dtype() == mx::float32, "the kernels take float32");
  auto stream = mx::to_stream(s);
  require(stream.device == mx::Device::cpu, "the kernels run on CPU streams only");
  return stream;
}

array contiguous(const array& x, mx::Stream s) {
  return x.is_available() && x.flags().row_contiguous ? x : mx::contiguous(x, false, s);
}

int append(Arrays& inputs, const Optional& x, mx::Stream s) {
  if (!x) return -1;
  inputs.push_back(contiguous(*x, s));
  return inputs.size() - 1;
}

const float* data(const Arrays& inputs, int index) { return index < 0 ? nullptr : inputs[index].data<float>(); }

Arrays pick(const Arrays& arrays, const std::vector<int>& indices) {
  Arrays picked;
  for (int i : indices) picked.push_back(arrays[i]);
  return picked;
}

array rows_of(const array& x, mx::Stream s) { return mx::reshape(x, {-1, x.shape(-1)}, s); }

void Operation::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error(std::string(name()) + ": the kernels run on CPU streams only");
}

Arrays Operation::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  return mx::jvp(of(primals, argnums), pick(primals, argnums), tangents).second;
}

Arrays Operation::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) {
  return mx::vjp(of(primals, argnums), pick(primals, argnums), cotangents).second;
}

std::pair<Arrays, std::vector<int>> Operation::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  Arrays outputs = mx::vmap(plain_, axes)(inputs);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

void Operation::allocate(array& output) const {
  auto memory = mx::allocator::malloc(output.nbytes());
  if (!memory.buffer().ptr())
    throw std::runtime_error(std::string(name()) + ": there is no memory for a result of " +
                             std::to_string(output.nbytes()) + " bytes");
  output.set_data(std::move(memory));
}

Operation::Function Operation::of(const Arrays& primals, const std::vector<int>& argnums) const {
  return [plain = plain_, primals, argnums](const Arrays& picked) {
    Arrays arguments = primals;
    for (size_t i = 0; i < argnums.size(); i++) arguments[argnums[i]] = picked[i];
    return plain(arguments);
  };
}

}  // namespace mlx_esm
