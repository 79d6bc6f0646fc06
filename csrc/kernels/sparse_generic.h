// What the sparse product does where an instruction set has nothing of its own for it.
#include <cstdint>

#include "kernels/elements.h"
#include "kernels/sparse_matrix.h"

namespace confprune {
namespace {

// Four values, each of which multiplies a vector of kBytes.
template <class T, int kBytes>
struct Four {
  const T* values;
  explicit Four(const T* values_) : values(values_) {}
  template <class Index>
  T get(Index index) const {
    return values[index()];
  }
};

// A block of x, whose elements are found by their index.
template <class T>
struct Lookup {
  const T* x;
  explicit Lookup(const T* x_) : x(x_) {}

  // Prepares a block of x, in place, for the constructor.
  static void arrange(T*) {}

  struct Sums {
    T rows[kSliceRows];
    T operator[](int row) const { return rows[row]; }
  };

  // sums[r] = Σ survivors of row r · x; returns the number of survivors.
  template <class Stored>
  int64_t sums(const Slice& slice, const Stored* values, const uint8_t* columns, Sums* sums) const {
    *sums = {};
    int64_t at = 0;
    for (int64_t step = 0; step < slice.full; ++step, at += kSliceRows)
      for (int64_t r = 0; r < kSliceRows; ++r)
        sums->rows[r] += T(widen(values[at + r])) * x[columns[at + r]];
    for (int64_t step = 0; step < slice.partial; ++step)
      for (int64_t r = 0; r < slice.step_rows[step]; ++r, ++at)
        sums->rows[r] += T(widen(values[at])) * x[columns[at]];
    return at;
  }
};

}  // namespace
}  // namespace confprune
