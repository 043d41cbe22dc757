// A loop over tasks on several threads.
#pragma once

namespace mlx_esm {

// Take n threads, at least one, from the first loop on; by default, one for each core. Once a loop has run it has no
// effect.
void use_threads(int n);

int threads();  // that take part in a loop; fewer than were asked for if the system did not allow so many

// Call body(context, i) for each i in [0, tasks), in any order, and return when all are done. The calling thread takes
// part. A call while another thread's loop is running, or from inside one, runs on the calling thread alone. When a
// task throws, those not yet begun are left out, and the first exception is thrown again here.
void parallel_for(long tasks, void (*body)(void*, long), void* context);

template <class F>
void parallel_for(long tasks, F body) {
  parallel_for(tasks, [](void* f, long i) { (*static_cast<F*>(f))(i); }, &body);
}

}  // namespace mlx_esm
