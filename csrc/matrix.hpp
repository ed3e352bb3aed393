// Small matrix products, the arithmetic of the network: 32 x 32 or 64 x 16 results in one call, in fp32 or bf16, for each
// instruction set that has something to give.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "simd.hpp"

#ifdef LGCN_X86
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lgcn {

// The upper half of a float.
using Bf16 = std::uint16_t;

// Zeroed memory on cache lines.
template <typename T>
class Buffer {
public:
    explicit Buffer(std::int64_t count = 0)
        : count_(count), data_(static_cast<T*>(::operator new(bytes(), std::align_val_t(64)))) {
        std::memset(data_.get(), 0, bytes());
    }
    std::int64_t count() const { return count_; }
    std::size_t bytes() const { return static_cast<std::size_t>(count_) * sizeof(T); }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }

private:
    struct Free {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::int64_t count_;
    std::unique_ptr<T, Free> data_;
};

inline std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

// Part of the inner dimension: where it starts in a row of A and in a panel of B, and its length.
struct Segment {
    std::int64_t a, b, length;
};

// C = sum over segments of A[:, a : a + length] B[b : b + length, :].
// A: rows of `row_stride` elements. B: panels of 16 columns, `panel_stride` elements apart, in fp32 (K, 16), in bf16
// (K / 2, 16, 2), so that element b of the inner dimension starts at 16 b in both. Lengths are multiples of the
// multiplier's inner step.
template <typename T>
struct Product {
    const T* a;
    std::int64_t row_stride;
    const T* b;
    std::int64_t panel_stride;
    const Segment* segments;
    std::int64_t count;
};

constexpr std::int64_t kPanel = 16;    // columns
constexpr std::int64_t kWide = 32;     // rows of a product with two panels
constexpr std::int64_t kTall = 64;     // rows of a product with one
constexpr std::int64_t kRowGroup = 6;  // rows of products with any number are a multiple of it

// The products of one instruction set. C is row-major, fp32.
template <typename T>
struct Multiplier {
    using Element = T;
    void (*wide)(const Product<T>&, float* c);  // C (32, 32)
    void (*tall)(const Product<T>&, float* c);  // C (64, 16)
    // C (count, rows, 16); AMX has none.
    void (*panels)(const Product<T>&, std::int64_t rows, std::int64_t count, float* c);
    Registers registers = Registers::bits128;
    std::int64_t inner_step = 1;  // what of the inner dimension is multiplied at once
    // Around all products of a thread, see Ready.
    void (*begin)() = [] {};
    void (*end)() = [] {};
};

// A thread that is ready for products, until its work ends or fails.
template <typename T>
class Ready {
public:
    explicit Ready(const Multiplier<T>& multiplier) : end_(multiplier.end) { multiplier.begin(); }
    ~Ready() { end_(); }
    Ready(const Ready&) = delete;
    Ready& operator=(const Ready&) = delete;

private:
    void (*end_)();
    NoDenormals no_denormals_;
};

namespace detail {

// As many sums as there are registers for: kRows rows of kColumns columns. C is (rows, kColumns), or (panels, rows, 16).
template <typename Vector, int kRows, int kColumns, bool kByPanel = false>
[[gnu::always_inline]] inline void multiply_fp32(const Product<float>& p, std::int64_t rows, float* c) {
    const std::int64_t stride = kByPanel ? kPanel : kColumns, next_panel = kByPanel ? rows * kPanel : kPanel;
    constexpr int kVectors = kColumns * sizeof(float) / sizeof(Vector), kLength = sizeof(Vector) / sizeof(float);
    for (std::int64_t row = 0; row < rows; row += kRows) {
        Vector sums[kRows][kVectors] = {};
        for (std::int64_t s = 0; s < p.count; ++s) {
            const float* a = p.a + row * p.row_stride + p.segments[s].a;
            const float* b = p.b + p.segments[s].b * kPanel;
            for (std::int64_t k = 0; k < p.segments[s].length; ++k) {
                Vector columns[kVectors];
                // What lies behind is the next panel, and not in the cache yet.
                if constexpr (kByPanel) __builtin_prefetch(b + k * kPanel + p.panel_stride);
#pragma GCC unroll 8
                for (int j = 0; j < kVectors; ++j)
                    columns[j] = *reinterpret_cast<const Vector*>(b + j * kLength / kPanel * p.panel_stride +
                                                                  k * kPanel + j * kLength % kPanel);
#pragma GCC unroll 8
                for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
                    for (int j = 0; j < kVectors; ++j) sums[i][j] += a[i * p.row_stride + k] * columns[j];
#if defined(__aarch64__) && !defined(__clang__)
                    asm volatile("");  // GCC would load all of a first, and keep two of the sums in memory.
#endif
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j)
                *reinterpret_cast<Vector*>(c + (row + i) * stride + j * kLength / kPanel * next_panel +
                                           j * kLength % kPanel) = sums[i][j];
    }
}

// kWidth panels at once.
template <typename Vector, int kRows, int kWidth>
[[gnu::always_inline]] inline void multiply_panels(Product<float> p, std::int64_t rows, std::int64_t count, float* c) {
    for (; count >= kWidth; count -= kWidth, p.b += kWidth * p.panel_stride, c += kWidth * rows * kPanel)
        multiply_fp32<Vector, kRows, kWidth * kPanel, true>(p, rows, c);
    if (count) multiply_fp32<Vector, kRows, kPanel, true>(p, rows, c);
}

// Two panels one after the other, for processors with few registers.
template <typename Vector, int kRows>
[[gnu::always_inline]] inline void multiply_halves(const Product<float>& p, float* c) {
    alignas(64) float part[kWide * kPanel];
    for (std::int64_t j = 0; j < 2; ++j) {
        const Product<float> one{p.a, p.row_stride, p.b + j * p.panel_stride, 0, p.segments, p.count};
        multiply_fp32<Vector, kRows, kPanel>(one, kWide, part);
        for (std::int64_t i = 0; i < kWide; ++i)
            std::memcpy(c + (2 * i + j) * kPanel, part + i * kPanel, kPanel * sizeof(float));
    }
}

#ifdef __aarch64__  // 32 registers of 128 bits
constexpr int kBaselineRows = 4, kBaselinePanelRows = 6;
#else  // 16 (SSE2)
constexpr int kBaselineRows = 2, kBaselinePanelRows = 2;
#endif
inline void wide_baseline(const Product<float>& p, float* c) { multiply_halves<Lanes4, kBaselineRows>(p, c); }
inline void tall_baseline(const Product<float>& p, float* c) {
    multiply_fp32<Lanes4, kBaselineRows, kPanel>(p, kTall, c);
}
inline void panels_baseline(const Product<float>& p, std::int64_t rows, std::int64_t count, float* c) {
    multiply_panels<Lanes4, kBaselinePanelRows, 1>(p, rows, count, c);
}

#ifdef LGCN_X86

#define LGCN_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define LGCN_AMX_BF16 __attribute__((target("avx512f,amx-tile,amx-bf16")))

LGCN_AVX2 inline void wide_avx2(const Product<float>& p, float* c) { multiply_halves<Lanes8, 4>(p, c); }
LGCN_AVX2 inline void tall_avx2(const Product<float>& p, float* c) { multiply_fp32<Lanes8, 4, kPanel>(p, kTall, c); }
LGCN_AVX2 inline void panels_avx2(const Product<float>& p, std::int64_t rows, std::int64_t count, float* c) {
    multiply_panels<Lanes8, 6, 1>(p, rows, count, c);
}
LGCN_AVX512 inline void wide_avx512(const Product<float>& p, float* c) {
    multiply_fp32<Lanes, 8, 2 * kPanel>(p, kWide, c);
}
LGCN_AVX512 inline void tall_avx512(const Product<float>& p, float* c) { multiply_fp32<Lanes, 8, kPanel>(p, kTall, c); }
LGCN_AVX512 inline void panels_avx512(const Product<float>& p, std::int64_t rows, std::int64_t count, float* c) {
    multiply_panels<Lanes, 6, 2>(p, rows, count, c);
}

// C is (rows, kPanels, 16), or (kPanels, rows, 16).
template <int kRows, int kPanels, bool kByPanel = false>
LGCN_AVX512_BF16 inline void multiply_avx512_bf16(const Product<Bf16>& p, std::int64_t rows, float* c) {
    const std::int64_t stride = (kByPanel ? 1 : kPanels) * kPanel, next_panel = (kByPanel ? rows : 1) * kPanel;
    for (std::int64_t row = 0; row < rows; row += kRows) {
        __m512 sums[kRows][kPanels];
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < kPanels; ++j) sums[i][j] = _mm512_setzero_ps();
        for (std::int64_t s = 0; s < p.count; ++s) {
            const Bf16* a = p.a + row * p.row_stride + p.segments[s].a;
            const Bf16* b = p.b + p.segments[s].b * kPanel;
            for (std::int64_t k = 0; k < p.segments[s].length; k += 2) {
                __m512bh columns[kPanels];
#pragma GCC unroll 2
                for (int j = 0; j < kPanels; ++j)
                    columns[j] = (__m512bh)_mm512_loadu_si512(b + j * p.panel_stride + k * kPanel);
#pragma GCC unroll 12
                for (int i = 0; i < kRows; ++i) {
                    std::int32_t pair;
                    std::memcpy(&pair, a + i * p.row_stride + k, sizeof pair);
                    const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
                    for (int j = 0; j < kPanels; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, columns[j]);
                }
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < kPanels; ++j) _mm512_storeu_ps(c + (row + i) * stride + j * next_panel, sums[i][j]);
    }
}

inline void wide_avx512_bf16(const Product<Bf16>& p, float* c) { multiply_avx512_bf16<8, 2>(p, kWide, c); }
inline void tall_avx512_bf16(const Product<Bf16>& p, float* c) { multiply_avx512_bf16<8, 1>(p, kTall, c); }
inline void panels_avx512_bf16(const Product<Bf16>& p, std::int64_t rows, std::int64_t count, float* c) {
    Product<Bf16> part = p;
    for (; count >= 2; count -= 2, part.b += 2 * p.panel_stride, c += 2 * rows * kPanel)
        multiply_avx512_bf16<kRowGroup, 2, true>(part, rows, c);
    if (!count) return;
    // With one panel it takes more rows to hide the latency.
    const std::int64_t paired = rows / (2 * kRowGroup) * 2 * kRowGroup;
    multiply_avx512_bf16<2 * kRowGroup, 1, true>(part, paired, c);
    part.a += paired * p.row_stride;
    multiply_avx512_bf16<kRowGroup, 1, true>(part, rows - paired, c + paired * kPanel);
}

// Four tiles of 16 x 16 sums at once hide the latency of the matrix unit: two by two with two panels, else one below
// the other.
template <int kPanels>
LGCN_AMX_BF16 inline void multiply_amx(const Product<Bf16>& p, float* c) {
    const std::int64_t stride = p.row_stride * 2, tile = 16 * p.row_stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t s = 0; s < p.count; ++s) {
        const Bf16* a = p.a + p.segments[s].a;
        const Bf16* b = p.b + p.segments[s].b * kPanel;
        for (std::int64_t k = 0; k < p.segments[s].length; k += 32) {
            _tile_loadd(6, b + k * kPanel, 64);
            _tile_loadd(4, a + k, stride);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (kPanels == 2) {
                _tile_loadd(7, b + p.panel_stride + k * kPanel, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a + k + tile, stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            } else {
                _tile_loadd(5, a + k + tile, stride);
                _tile_dpbf16ps(1, 5, 6);
                _tile_loadd(4, a + k + 2 * tile, stride);
                _tile_dpbf16ps(2, 4, 6);
                _tile_loadd(5, a + k + 3 * tile, stride);
                _tile_dpbf16ps(3, 5, 6);
            }
        }
    }
    constexpr std::int64_t kRowBytes = 64 * kPanels, kNext = kPanels == 2 ? kPanel : 16 * kPanel;
    _tile_stored(0, c, kRowBytes);
    _tile_stored(1, c + kNext, kRowBytes);
    _tile_stored(2, c + 512, kRowBytes);
    _tile_stored(3, c + 512 + kNext, kRowBytes);
}

LGCN_AMX_BF16 inline void begin_amx() {
    // Eight tiles of 16 rows of 64 bytes.
    static const struct alignas(64) {
        std::uint8_t palette, start_row, reserved[14];
        std::uint16_t row_bytes[16];
        std::uint8_t rows[16];
    } tiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&tiles);
}

LGCN_AMX_BF16 inline void end_amx() { _tile_release(); }

inline bool has_avx512_bf16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return widest_registers() == Registers::bits512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

inline bool has_amx_bf16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1))
        return false;
    // Linux gives the tile registers to processes that ask for them.
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

inline std::vector<std::string> find_instruction_sets() {
    std::vector<std::string> names;
#ifdef LGCN_X86
    if (has_amx_bf16()) names.push_back("amx_bf16");
    if (has_avx512_bf16()) names.push_back("avx512_bf16");
    if (widest_registers() >= Registers::bits512) names.push_back("avx512");
    if (widest_registers() >= Registers::bits256) names.push_back("avx2");
#endif
    names.push_back("baseline");
    return names;
}

}  // namespace detail

// Names of the instruction sets that this processor has, the fastest of each precision first.
inline const std::vector<std::string>& instruction_sets() {
    static const std::vector<std::string> names = detail::find_instruction_sets();
    return names;
}

// The products of an instruction set that is there; nothing where it has none in this precision.
inline bool find_multiplier(const std::string& name, Multiplier<float>& found) {
    found = {};
    if (name == "baseline") found = {detail::wide_baseline, detail::tall_baseline, detail::panels_baseline};
#ifdef LGCN_X86
    if (name == "avx512") found = {detail::wide_avx512, detail::tall_avx512, detail::panels_avx512, Registers::bits512};
    if (name == "avx2") found = {detail::wide_avx2, detail::tall_avx2, detail::panels_avx2, Registers::bits256};
#endif
    return found.wide != nullptr;
}

inline bool find_multiplier(const std::string& name, Multiplier<Bf16>& found) {
    found = {};
    (void)name;
#ifdef LGCN_X86
    if (name == "amx_bf16")
        found = {detail::multiply_amx<2>, detail::multiply_amx<1>, nullptr, Registers::bits512, 32,
                 detail::begin_amx,       detail::end_amx};
    if (name == "avx512_bf16")
        found = {detail::wide_avx512_bf16, detail::tall_avx512_bf16, detail::panels_avx512_bf16, Registers::bits512, 2};
#endif
    return found.wide != nullptr;
}

}  // namespace lgcn
