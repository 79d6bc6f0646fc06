// The products of one cell of a packed matrix, over a vector width; part of sparse_algorithm.h.

namespace confprune {
namespace {

template <int... I, class Body>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, I...>, Body body) {
  (body(std::integral_constant<int, I>{}), ...);
}

// The values of a slice in the type that is computed with.
template <class T, class Stored>
const T* widened(const Stored* values, int64_t count, T* out) {
  if constexpr (std::is_same_v<T, Stored>) {
    return values;
  } else {
    for (int64_t i = 0; i < count; ++i)
      out[i] = T(widen(values[i]));
    return out;
  }
}

// Batches: y[place, lanes] += Σ survivors · x[column, lanes], kBytes of lanes; x is without gaps.

template <class T, int kBytes>
struct Tile {
  static constexpr int kVector = std::min(kBytes, CONFPRUNE_VECTOR_BYTES);
  static constexpr int kVectors = kBytes / kVector;
  static constexpr int kWidth = kVector / int(sizeof(T));
  static constexpr int kLanes = kBytes / int(sizeof(T));
  // Rows whose sums are in registers together: few, for those that a step lacks go one by one.
  static constexpr int kRows = std::clamp(8 / kVectors, 1, 4);
  typedef T Vector __attribute__((vector_size(kVector)));
  typedef T Unaligned __attribute__((vector_size(kVector), aligned(alignof(T)), may_alias));
  typedef Vector Sums[kRows][kVectors];

  static const Unaligned& at(const T* lanes, int v) {
    return *reinterpret_cast<const Unaligned*>(lanes + v * kWidth);
  }
  static Unaligned& at(T* lanes, int v) {
    return *reinterpret_cast<Unaligned*>(lanes + v * kWidth);
  }
};

// sums[row, lanes] += one survivor of each row · x[its column, lanes].
template <class T, int kBytes>
inline __attribute__((always_inline)) void add_step(typename Tile<T, kBytes>::Sums& sums,
                                                    const T* values, const uint8_t* columns,
                                                    const T* x) {
  using L = Tile<T, kBytes>;
  const Four<T, L::kVector> four(values);
  uint32_t four_columns = 0;  // in one load
  std::memcpy(&four_columns, columns, L::kRows);
  unrolled(std::make_integer_sequence<int, L::kRows>{}, [&](auto i) {
    const T* lanes = x + ((four_columns >> (8 * i)) & 0xff) * L::kLanes;
    for (int v = 0; v < L::kVectors; ++v)
      sums[i][v] += four.get(i) * L::at(lanes, v);
  });
}

// y[row, lanes] += the first `steps` survivors of kRows rows of a slice, for each of them.
template <class T, int kBytes>
inline void multiply_rows(const uint8_t* places, const uint16_t* starts, int64_t steps,
                          const T* values, const uint8_t* columns, const T* x, T* y,
                          int64_t pitch) {
  using L = Tile<T, kBytes>;
  typename L::Sums sums;
  for (int r = 0; r < L::kRows; ++r)
    for (int v = 0; v < L::kVectors; ++v)
      sums[r][v] = L::at(y + places[r] * pitch, v);
  for (int64_t step = 0; step < steps; ++step)
    add_step<T, kBytes>(sums, values + starts[step], columns + starts[step], x);
  for (int r = 0; r < L::kRows; ++r)
    for (int v = 0; v < L::kVectors; ++v)
      L::at(y + places[r] * pitch, v) = sums[r][v];
}

template <class T, int kBytes, class Stored>
void multiply_cell(const SparseMatrix& weight, int64_t cell, const T* x, T* y, int64_t pitch) {
  using L = Tile<T, kBytes>;
  const int64_t* bounds = weight.cells + 2 * cell;
  const Stored* stored = static_cast<const Stored*>(weight.values) + bounds[0];
  const uint8_t* columns = weight.columns + bounds[0];
  const uint8_t* next = weight.slices + bounds[1];
  const uint8_t* end = weight.slices + bounds[3];
  uint16_t starts[kSparseBlock + 1];  // of the steps; those that all rows share come first
  for (int64_t step = 0; step <= kSparseBlock; ++step)
    starts[step] = uint16_t(step * kSliceRows);
  T wide_values[std::is_same_v<T, Stored> ? 1 : kSparseBlock * kSliceRows];
  while (next < end) {
    const Slice slice = read_slice(next);
    next = slice.next_slice;
    int64_t steps = slice.full + slice.partial;
    for (int64_t step = slice.full; step < steps; ++step)
      starts[step + 1] = uint16_t(starts[step] + slice.step_rows[step - slice.full]);
    const int64_t survivors = starts[steps];
    const T* values = widened<T>(stored, survivors, wide_values);
    for (int64_t first = 0; first + L::kRows <= slice.rows; first += L::kRows) {
      // A step is taken by rows that are there together.
      while (steps > slice.full && slice.step_rows[steps - 1 - slice.full] < first + L::kRows)
        --steps;
      multiply_rows<T, kBytes>(slice.places + first, starts, steps, values + first, columns + first,
                               x, y, pitch);
    }
    // Those that are left over of a step go one by one.
    for (int64_t step = slice.full; step < slice.full + slice.partial; ++step) {
      const int64_t rows = slice.step_rows[step - slice.full];
      for (int64_t r = rows / L::kRows * L::kRows; r < rows; ++r) {
        const int64_t at = starts[step] + r;
        for (int v = 0; v < L::kVectors; ++v)
          L::at(y + slice.places[r] * pitch, v) +=
              values[at] * L::at(x + columns[at] * L::kLanes, v);
      }
    }
    for (int64_t step = slice.full + 1; step <= slice.full + slice.partial; ++step)
      starts[step] = uint16_t(step * kSliceRows);
    stored += survivors;
    columns += survivors;
  }
}

// A single x: sums[place] = Σ survivors · x[column], sixteen rows in the lanes.

// sums[places[r]] = of_slice[r].
template <class T>
inline void place_sums(const typename Lookup<T>::Sums& of_slice, const uint8_t* places,
                       int64_t rows, T* sums) {
  if (rows == kSliceRows) {
    uint64_t all[kSliceRows / 8];  // two loads for sixteen
    std::memcpy(all, places, sizeof(all));
    unrolled(std::make_integer_sequence<int, kSliceRows>{},
             [&](auto r) { sums[uint8_t(all[r / 8] >> r % 8 * 8)] = of_slice[int(r)]; });
  } else {
    for (int r = 0; r < rows; ++r)
      sums[places[r]] = of_slice[r];
  }
}

template <class T, class Stored>
void multiply_cell_single(const SparseMatrix& weight, int64_t cell, const T* x, T* sums) {
  const int64_t* bounds = weight.cells + 2 * cell;
  const Stored* values = static_cast<const Stored*>(weight.values) + bounds[0];
  const uint8_t* columns = weight.columns + bounds[0];
  const uint8_t* next = weight.slices + bounds[1];
  const uint8_t* end = weight.slices + bounds[3];
  const Lookup<T> lookup(x);
  // A slice's sums are put in place while the next one's are on their way.
  typename Lookup<T>::Sums of_slice{};
  const uint8_t* places = nullptr;
  int64_t rows = 0;
  while (next < end) {
    const Slice slice = read_slice(next);
    next = slice.next_slice;
    typename Lookup<T>::Sums of_next;
    const int64_t survivors = lookup.sums(slice, values, columns, &of_next);
    values += survivors;
    columns += survivors;
    place_sums(of_slice, places, rows, sums);
    of_slice = of_next;
    places = slice.places;
    rows = slice.rows;
  }
  place_sums(of_slice, places, rows, sums);
}

}  // namespace
}  // namespace confprune
