#include "instruction_sets.h"

#include <atomic>
#include <stdexcept>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace mlx_esm {
namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) tables.push_back(avx512vnni_kernels());
  if (avx512) tables.push_back(avx512_kernels());
  if (avx2 && __builtin_cpu_supports("avxvnni")) tables.push_back(avxvnni_kernels());
  if (avx2) tables.push_back(avx2_kernels());
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) tables.push_back(neondotprod_kernels());
#endif
  tables.push_back(portable_kernels());
  return tables;
}

std::atomic<const Kernels*> chosen = supported().front();  // atomic: MLX's stream threads read it

}  // namespace

const Kernels& kernels() { return *chosen.load(); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (auto table : supported()) names.push_back(table->name);
  return names;
}

void choose(const std::string& name) {
  for (auto table : supported())
    if (name == table->name) {
      chosen.store(table);
      return;
    }
  throw std::invalid_argument("This machine has no kernels called " + name);
}

}  // namespace mlx_esm
