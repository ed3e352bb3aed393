// Vectors of floats, and functions compiled for the widest registers there are.
#pragma once

#include <cstdint>

// One binary for all x86-64 processors: the loader picks the version for the widest registers there are.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define LGCN_EVERY_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LGCN_EVERY_SIMD
#endif

namespace lgcn {

// Sixteen floats at any address (GCC's and Clang's vector type); compilers split them where registers are narrower.
typedef float Lanes __attribute__((vector_size(64), aligned(4)));
typedef std::int32_t LaneIndices __attribute__((vector_size(64)));
typedef double WideLanes __attribute__((vector_size(128)));
constexpr std::int64_t kLaneCount = 16;

inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline void store(float* p, Lanes lanes) { *reinterpret_cast<Lanes*>(p) = lanes; }

}  // namespace lgcn
