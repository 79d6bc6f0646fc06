#include "kernels/instruction_set.h"

#include <cstdlib>
#include <cstring>

namespace confprune {
namespace {

const InstructionSet& choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("CONFPRUNE_ISA");
  const auto allowed = [&](const char* name) {  // asking for "avx2" leaves avx512 out
    return asked == nullptr || std::strcmp(asked, "avx512") == 0 || std::strcmp(asked, name) == 0;
  };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return avx512_set();
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return avx2_set();
#endif
  return baseline_set();
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& set = choose();
  return set;
}

}  // namespace confprune
