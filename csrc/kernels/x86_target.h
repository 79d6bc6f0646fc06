// What lies between CONFPRUNE_BEGIN_TARGET and CONFPRUNE_END_TARGET is compiled for x86 machines
// with these features, whatever the rest of a file is compiled for.
//
// The headers of the standard library come before: their inline functions may be merged with other
// files' copies, which must run everywhere. Hence they are all included here.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes its own headers' undefined operands for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#define CONFPRUNE_AVX2 "avx2,fma"
#define CONFPRUNE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define CONFPRUNE_AVX512 "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"
#define CONFPRUNE_AVX512_VBMI "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,bmi2"
#define CONFPRUNE_BEGIN_TARGET(features) \
  CONFPRUNE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define CONFPRUNE_END_TARGET _Pragma("clang attribute pop")
#else
#define CONFPRUNE_AVX512 "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"
#define CONFPRUNE_AVX512_VBMI \
  "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,bmi2,prefer-vector-width=512"
#define CONFPRUNE_BEGIN_TARGET(features) \
  _Pragma("GCC push_options") CONFPRUNE_PRAGMA(GCC target(features))
#define CONFPRUNE_END_TARGET _Pragma("GCC pop_options")
#endif
