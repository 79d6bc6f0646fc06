// What nvcc compiled the kernels for.
#pragma once

namespace confprune::cuda {

// Compute capabilities, as 100 * major + 10 * minor, and their number.
const int* architectures(int* count);

}  // namespace confprune::cuda
