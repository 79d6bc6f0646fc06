// How inputs get into the lanes and outputs out of them, [lane][element] to [element][lane] and
// back, over a vector width; part of sparse_algorithm.h.

namespace confprune {
namespace {

constexpr int64_t kSegment = 64;  // elements that are turned together
constexpr int64_t kMostLanes = kTileBytes / int64_t(sizeof(float));

// turned[i] = the i-th elements of four quads.
template <class Quad>
inline void turn_quads(const Quad (&r)[4], Quad (&turned)[4]) {
#if defined(__clang__)
#define CONFPRUNE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef decltype(r[0] < r[0]) Index;
#define CONFPRUNE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif
  const Quad low01 = CONFPRUNE_SHUFFLE(r[0], r[1], 0, 4, 1, 5);
  const Quad high01 = CONFPRUNE_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
  const Quad low23 = CONFPRUNE_SHUFFLE(r[2], r[3], 0, 4, 1, 5);
  const Quad high23 = CONFPRUNE_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  turned[0] = CONFPRUNE_SHUFFLE(low01, low23, 0, 1, 4, 5);
  turned[1] = CONFPRUNE_SHUFFLE(low01, low23, 2, 3, 6, 7);
  turned[2] = CONFPRUNE_SHUFFLE(high01, high23, 0, 1, 4, 5);
  turned[3] = CONFPRUNE_SHUFFLE(high01, high23, 2, 3, 6, 7);
#undef CONFPRUNE_SHUFFLE
}

// to[j, i] = from[i, j] for i < rows, j < columns.
template <class T>
void turn(const T* from, int64_t from_pitch, int64_t rows, int64_t columns, T* to,
          int64_t to_pitch) {
  typedef T Quad __attribute__((vector_size(4 * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      Quad quads[4], turned[4];
      for (int k = 0; k < 4; ++k)
        quads[k] = *reinterpret_cast<const Unaligned*>(from + (i + k) * from_pitch + j);
      turn_quads(quads, turned);
      for (int k = 0; k < 4; ++k)
        *reinterpret_cast<Unaligned*>(to + (j + k) * to_pitch + i) = turned[k];
    }
    for (; j < columns; ++j)
      for (int64_t k = i; k < i + 4; ++k)
        to[j * to_pitch + k] = from[k * from_pitch + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      to[j * to_pitch + i] = from[i * from_pitch + j];
}

// Lines are short, a call of memcpy for each would show.
template <class T>
inline void copy_line(const T* from, int64_t count, T* to) {
  constexpr int64_t kPiece = 64 / int64_t(sizeof(T));
  for (; count >= kPiece; count -= kPiece, from += kPiece, to += kPiece)
    std::memcpy(to, from, 64);
  for (int64_t piece = kPiece / 2; piece > 0; piece /= 2)
    if (count & piece) {
      switch (piece * sizeof(T)) {
        case 32:
          std::memcpy(to, from, 32);
          break;
        case 16:
          std::memcpy(to, from, 16);
          break;
        case 8:
          std::memcpy(to, from, 8);
          break;
        default:
          std::memcpy(to, from, sizeof(T));
      }
      from += piece;
      to += piece;
    }
}

template <class T, class Input>
inline void widen_line(const Input* from, int64_t step, int64_t count, T* to) {
  if constexpr (std::is_same_v<T, Input>)
    if (step == 1)
      return copy_line(from, count, to);
  const auto each = [=](auto by) {
    for (int64_t i = 0; i < count; ++i)
      to[i] = T(widen(from[i * by]));
  };
  if (step == 1)
    each(std::integral_constant<int64_t, 1>{});
  else if (step == 2)
    each(std::integral_constant<int64_t, 2>{});
  else
    each(step);
}

template <class T, class Output>
inline void narrow_line(const T* from, int64_t count, Output* to, int64_t step) {
  if constexpr (std::is_same_v<T, Output>)
    if (step == 1)
      return copy_line(from, count, to);
  if (step == 1)
    for (int64_t i = 0; i < count; ++i)
      narrow(from[i], to + i);
  else
    for (int64_t i = 0; i < count; ++i)
      narrow(from[i], to + i * step);
}

// to[i, lane] = from[lane · lane_step + i · step]; lanes past `valid` are 0. A segment at a time,
// so that lines are whole in the cache when they are left.
template <class T, class Input>
void gather_lanes(const Input* from, int64_t lane_step, int64_t step, int64_t valid, int64_t count,
                  T* to, int64_t lanes) {
  if (valid < lanes)
    for (int64_t i = 0; i < count; ++i)
      std::fill(to + i * lanes + valid, to + (i + 1) * lanes, T(0));
  T segment[kMostLanes * kSegment];
  for (int64_t first = 0; first < count; first += kSegment) {
    const int64_t size = std::min(kSegment, count - first);
    if constexpr (std::is_same_v<T, Input>)
      if (step == 1) {
        turn(from + first, lane_step, valid, size, to + first * lanes, lanes);
        continue;
      }
    for (int64_t lane = 0; lane < valid; ++lane)
      widen_line(from + lane * lane_step + first * step, step, size, segment + lane * kSegment);
    turn(segment, kSegment, valid, size, to + first * lanes, lanes);
  }
}

// to[lane · lane_step + i · step] = from[i, lane] for the valid lanes, four of them at a time: more
// lines of the output, often a power of two apart, would drive each other out of the cache.
template <class T, class Output>
void scatter_lanes(const T* from, int64_t pitch, int64_t valid, int64_t count, Output* to,
                   int64_t lane_step, int64_t step) {
  T segment[kMostLanes * kSegment];
  for (int64_t first = 0; first < count; first += kSegment) {
    const int64_t size = std::min(kSegment, count - first);
    if constexpr (std::is_same_v<T, Output>)
      if (step == 1) {
        for (int64_t lane = 0; lane < valid; lane += 4)
          turn(from + first * pitch + lane, pitch, size, std::min<int64_t>(4, valid - lane),
               to + lane * lane_step + first, lane_step);
        continue;
      }
    turn(from + first * pitch, pitch, size, valid, segment, kSegment);
    for (int64_t lane = 0; lane < valid; ++lane)
      narrow_line(segment + lane * kSegment, size, to + lane * lane_step + first * step, step);
  }
}

}  // namespace
}  // namespace confprune
