// What the operations have in common.
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

// Throws std::invalid_argument.
void require(bool condition, const char* message);

// The stream of an operation, which is one of the CPU, on arrays of float32. Throws std::invalid_argument.
mx::Stream checked_stream(mx::StreamOrDevice s, const std::vector<Optional>& arrays);

// Row-major without gaps. A weight that is so already does not become a node of the graph.
array contiguous(const array& x, mx::Stream s);

// Put x, contiguous, behind the inputs. Returns its place there, or -1 where there is no x.
int append(Arrays& inputs, const Optional& x, mx::Stream s);

// The values of an input, or null where its place is -1.
const float* data(const Arrays& inputs, int place);

Arrays pick(const Arrays& arrays, const std::vector<int>& indices);

array rows_of(const array& x, mx::Stream s);  // [..., n] to [rows, n]

// One of the few places in MLX's queue that our operations may take, with their outputs allocated, before they have
// run. MLX itself allocates for a hundred operations ahead of the one at work, which are several layers of a large
// model. Whoever comes when all are taken waits; the end of this object's life gives the place back.
class Place {
 public:
  Place();
  ~Place();
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;
};

// An operation with a kernel, and the same in MLX's own operations for the transformations that have no rule here:
// jvp, vmap, and gradients of gradients.
class Operation : public mx::Primitive {
 public:
  using Function = std::function<Arrays(const Arrays&)>;

  Operation(mx::Stream stream, Function plain) : Primitive(stream), plain_(std::move(plain)) {}

  void eval_gpu(const Arrays&, Arrays&) override;
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override;

 protected:
  // Allocate the outputs, then let `make` read the arrays' addresses and return what is to be done when it is time.
  template <class Make>
  void run(Arrays& outputs, Make make) {
    auto place = std::make_shared<Place>();
    for (auto& output : outputs)
      if (!output.data_shared_ptr()) allocate(output);  // else it took over an input's
    mx::cpu::get_command_encoder(stream()).dispatch([work = make(), place = std::move(place)]() mutable {
      const auto until_done = std::move(place);  // also when the work throws; MLX may keep the task for a while
      work();
    });
  }

 private:
  // Throws std::runtime_error where there is no memory, which MLX itself does not notice.
  void allocate(array& output) const;

  // The plain function of the arguments `argnums` alone.
  Function of(const Arrays& primals, const std::vector<int>& argnums) const;

  Function plain_;
};

}  // namespace mlx_esm
