// The base of all operations, and helpers.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace mlx_esm {

namespace mx = mlx::core;
using mx::array;
using Arrays = std::vector<array>;
using Optional = std::optional<array>;

// Throws std::invalid_argument with the message unless the condition holds.
void require(bool condition, const char* message);

// Returns the stream of an operation. Throws std::invalid_argument unless it is a CPU stream and all arrays are
// float32.
mx::Stream checked_stream(mx::StreamOrDevice s, const std::vector<Optional>& arrays);

// Returns x in contiguous row-major layout. An evaluated array that already has it, such as a weight, adds no node to
// the graph.
array contiguous(const array& x, mx::Stream s);

// Append x, made contiguous, to the inputs. Returns its index, or -1 if there is no x.
int append(Arrays& inputs, const Optional& x, mx::Stream s);

// The data of an input, or null if its index is -1.
const float* data(const Arrays& inputs, int index);

Arrays pick(const Arrays& arrays, const std::vector<int>& indices);

array rows_of(const array& x, mx::Stream s);  // [..., n] to [rows, n]

// A slot for an operation that is queued with its outputs allocated. Few slots exist: MLX would otherwise allocate the
// outputs of a hundred operations ahead of the running one, which are several layers of a large model. The constructor
// waits for a free slot, and the destructor releases it.
class Slot {
 public:
  Slot();
  ~Slot();
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
};

// An operation with a kernel. `plain` computes the same with MLX's own operations; it serves the transformations that
// have no rule of their own: jvp, vmap and second derivatives.
class Operation : public mx::Primitive {
 public:
  using Function = std::function<Arrays(const Arrays&)>;

  Operation(mx::Stream stream, Function plain) : Primitive(stream), plain_(std::move(plain)) {}

  void eval_gpu(const Arrays&, Arrays&) override;
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;

 protected:
  // Allocate the outputs, then queue the work that `make` returns. `make` reads the addresses of the arrays.
  template <class Make>
  void run(Arrays& outputs, Make make) {
    auto slot = std::make_shared<Slot>();
    for (auto& output : outputs)
      if (!output.data_shared_ptr()) allocate(output);  // else it reuses the memory of an input
    mx::cpu::get_command_encoder(stream()).dispatch([work = make(), slot = std::move(slot)]() mutable {
      const auto until_done = std::move(slot);  // releases the slot even if the work throws or MLX keeps the task
      work();
    });
  }

 private:
  // Throws std::runtime_error if there is not enough memory, which MLX does not check.
  void allocate(array& output) const;

  // The plain function, restricted to the arguments `argnums`; the others are fixed.
  Function of(const Arrays& primals, const std::vector<int>& argnums) const;

  Function plain_;
};

}  // namespace mlx_esm
