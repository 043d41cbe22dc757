#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace mlx_esm {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// An idle worker checks for work this many times, about 50 µs, before it sleeps: longer than MLX takes between two
// operations of a model, and too short to slow down other programs.
constexpr int SPINS = 2000;

std::atomic<int> wanted = std::max(1u, std::thread::hardware_concurrency());

thread_local bool inside_loop = false;  // this thread is running tasks of a loop

class Pool {
 public:
  Pool() {
    try {
      for (int i = 1, n = wanted; i < n; i++) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
      // The system allows no more threads: use those that started.
    }
  }

  int threads() const { return workers_.size() + 1; }

  void run(long tasks, void (*body)(void*, long), void* context) {
    std::unique_lock<std::mutex> mine(running_, std::defer_lock);
    if (workers_.empty() || inside_loop || !mine.try_lock()) {
      for (long i = 0; i < tasks; i++) body(context, i);
      return;
    }
    body_ = body;
    context_ = context;
    tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    {
      // Odd while a loop is open. Changed under the lock, so that a worker about to sleep cannot miss it.
      std::lock_guard<std::mutex> lock(sleep_);
      loop_.fetch_add(1);
    }
    if (sleepers_.load()) wake_.notify_all();
    take();
    loop_.fetch_add(1);  // closed: no worker can enter; workers inside finish their current task
    for (int spin = 0; inside_.load(); spin++) spin < SPINS ? pause() : std::this_thread::yield();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void take() {
    inside_loop = true;
    try {
      for (long i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) body_(context_, i);
    } catch (...) {
      next_.store(tasks_, std::memory_order_relaxed);  // no thread starts another task
      std::lock_guard<std::mutex> lock(failing_);
      if (!error_) error_ = std::current_exception();
    }
    inside_loop = false;
  }

  void work() {
    unsigned seen = 0;
    for (;;) {
      unsigned loop = loop_.load();
      for (int spin = 0; !(loop & 1) || loop == seen; loop = loop_.load()) {
        if (spin++ < SPINS) {
          pause();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] {
          loop = loop_.load();
          return (loop & 1) && loop != seen;
        });
        sleepers_.fetch_sub(1);
      }
      seen = loop;
      inside_.fetch_add(1);
      // Enter only if the loop is still open. As soon as inside_ counts this worker, `run` waits for it.
      if (loop_.load() == loop) take();
      inside_.fetch_sub(1);
    }
  }

  std::mutex running_, sleep_, failing_;
  std::condition_variable wake_;
  std::atomic<unsigned> loop_{0};
  std::atomic<int> inside_{0}, sleepers_{0};
  std::atomic<long> next_{0};
  void (*body_)(void*, long) = nullptr;
  void* context_ = nullptr;
  long tasks_ = 0;
  std::exception_ptr error_;  // the first exception of the running loop
  std::vector<std::thread> workers_;
};

std::atomic<Pool*> pool_of_process{nullptr};

// Created at the first loop and never destroyed: MLX's threads may still run when the process exits. A forked child
// does not inherit the workers, so it creates a new pool.
Pool& pool() {
  Pool* pool = pool_of_process.load();
  if (!pool) {
    static std::mutex making;
    static bool forks = (pthread_atfork(nullptr, nullptr, [] { pool_of_process.store(nullptr); }), true);
    (void)forks;
    std::lock_guard<std::mutex> lock(making);
    pool = pool_of_process.load();
    if (!pool) pool_of_process.store(pool = new Pool);
  }
  return *pool;
}

}  // namespace

void use_threads(int n) { wanted = std::max(1, n); }

int threads() {
  Pool* pool = pool_of_process.load();
  return pool ? pool->threads() : wanted.load();
}

void parallel_for(long tasks, void (*body)(void*, long), void* context) {
  if (tasks > 1)
    pool().run(tasks, body, context);
  else if (tasks == 1)
    body(context, 0);  // without starting threads
}

}  // namespace mlx_esm
