// The kernels that exist once for each instruction set, and the choice among them.
#pragma once

#include <cstdint>

#include "kernels/key_window.h"

namespace confprune {

struct Attention;
struct GridDetails;
struct MlpDetails;

struct InstructionSet {
  const char* name;
  // Lanes of one tile of the grid product, and one of its tasks.
  int64_t (*lanes)(bool wide);
  void (*run)(const GridDetails& details, int64_t task, void* scratch);
  void (*run_mlp)(const MlpDetails& details, int64_t part, void* scratch);
  void (*attend)(const Attention& attention, int64_t begin, int64_t end, void* scratch);
  KeyFilter filter;  // or null, where a table serves as well
};

// What this machine runs, unless the variable CONFPRUNE_ISA ("avx512", "avx2", "baseline") asks for
// less; chosen once.
const InstructionSet& instruction_set();

const InstructionSet& baseline_set();
#if defined(__x86_64__)
const InstructionSet& avx2_set();
const InstructionSet& avx512_set();
#endif

}  // namespace confprune
