// Parallel loops.
#pragma once

namespace mlx_esm {

// Set the number of threads, at least 1. The default is one per core. Has no effect after the first loop.
void use_threads(int n);

int threads();  // the number that take part in a loop; less than requested if the system allowed fewer

// Call body(context, i) for each i in [0, tasks), in any order, and return when all are done. The calling thread takes
// part. A nested call, or a call while another thread runs a loop, uses the calling thread alone. If a task throws,
// tasks that have not started are skipped, and the first exception is rethrown here.
void parallel_for(long tasks, void (*body)(void*, long), void* context);

template <class F>
void parallel_for(long tasks, F body) {
  parallel_for(tasks, [](void* f, long i) { (*static_cast<F*>(f))(i); }, &body);
}

}  // namespace mlx_esm
