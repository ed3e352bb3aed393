// Vectors of floats, and functions compiled for each kind of registers.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#if defined(__x86_64__) && defined(__gnu_linux__)
#define LGCN_X86 1
// The levels x86-64-v3 and v4, feature by feature: "arch=..." would take away what a program's own -march adds, and GCC
// inlines nothing that has more than its caller.
#define LGCN_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,f16c,lzcnt,movbe")))
#define LGCN_AVX512 \
    __attribute__((target("avx2,fma,bmi,bmi2,f16c,lzcnt,movbe,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")))
#endif

// For loops that the compiler vectorises. One binary for all x86-64 processors: the loader picks the version for the
// widest registers there are. (Sanitizers are not there yet when the loader does.)
#if defined(LGCN_X86) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#if __GNUC__ >= 12
#define LGCN_EVERY_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // that does not choose by levels
#define LGCN_EVERY_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define LGCN_EVERY_SIMD
#endif

namespace lgcn {

// GCC's and Clang's vector types. GCC keeps vectors that are wider than the registers in memory, which makes sums in them
// many times slower: what computes with them is a template over their type, for `in_registers`.
typedef float Lanes4 __attribute__((vector_size(16)));
typedef float Lanes8 __attribute__((vector_size(32)));
typedef float Lanes __attribute__((vector_size(64)));
constexpr std::int64_t kLaneCount = 16;

template <typename Vector>
constexpr std::int64_t kLanesOf = sizeof(Vector) / sizeof(float);

// At any address.
template <typename Vector = Lanes, typename T>
[[gnu::always_inline]] inline Vector load(const T* p) {
    Vector lanes;
    std::memcpy(&lanes, p, sizeof lanes);
    return lanes;
}
template <typename Vector>
[[gnu::always_inline]] inline void store(float* p, Vector lanes) {
    std::memcpy(p, &lanes, sizeof lanes);
}

// While there is one, its thread takes numbers below 1e-38 for zero: on x86 sums with them take a hundred times as long.
class NoDenormals {
#ifdef __SSE2__
public:
    NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // of results and operands
    ~NoDenormals() { _mm_setcsr(before_); }
    NoDenormals(const NoDenormals&) = delete;
    NoDenormals& operator=(const NoDenormals&) = delete;

private:
    unsigned before_;
#endif
};

enum class Registers { bits128, bits256, bits512 };

inline Registers widest_registers() {
#ifdef LGCN_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return Registers::bits512;
    if (avx2) return Registers::bits256;
#endif
    return Registers::bits128;
}

namespace detail {

#ifdef LGCN_X86
template <typename Function, typename... Arguments>
LGCN_AVX512 auto in_512_bits(Arguments... arguments) {
    return Function::template run<Lanes>(arguments...);
}
template <typename Function, typename... Arguments>
LGCN_AVX2 auto in_256_bits(Arguments... arguments) {
    return Function::template run<Lanes8>(arguments...);
}
#endif

}  // namespace detail

// Function::run<Vector>(arguments...), which is always inlined, with the vectors of some registers, compiled for them.
template <typename Function, typename... Arguments>
auto in_registers(Registers registers, Arguments... arguments) {
#ifdef LGCN_X86
    if (registers == Registers::bits512) return detail::in_512_bits<Function>(arguments...);
    if (registers == Registers::bits256) return detail::in_256_bits<Function>(arguments...);
#endif
    (void)registers;
    return Function::template run<Lanes4>(arguments...);
}

}  // namespace lgcn
