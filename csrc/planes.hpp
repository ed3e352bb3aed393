// Where activations and maps lie in memory, and how values get from one place to another.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "matrix.hpp"
#include "simd.hpp"

namespace lgcn {

// Where the pixels of an image lie in a plane. Between the rows is a border of zeros that both share. For dilated
// convolutions the columns are sorted by `phase` (x mod phases), each phase a segment with its border: what a filter
// row sees is again one run.
struct Grid {
    static constexpr std::int64_t kOverhang = 4;  // rows (of each phase) and columns that tiles see beyond the border

    std::int64_t height = 0, width = 0, phases = 1;
    std::int64_t segment = 0, pitch = 0;  // pixels from one phase to the next, from one row to the next
    std::int64_t origin = 0;              // the first pixel
    std::int64_t span = 0;                // from the first pixel to behind the last, in whole blocks
    std::vector<std::uint8_t> inside;     // (span,): image, or border

    Grid(std::int64_t height, std::int64_t width, std::int64_t phases, std::int64_t border)
        : height(height), width(width), phases(phases) {
        segment = (width + phases - 1) / phases + border;
        pitch = phases * segment;
        origin = border * phases * pitch + border;
        span = round_up(height * pitch, kTall);
        inside.resize(static_cast<std::size_t>(span));
        for (std::int64_t y = 0; y < height; ++y)
            for (std::int64_t x = 0; x < width; ++x) inside[static_cast<std::size_t>(position(y, x))] = 1;
    }

    // Of a pixel, counted from the first.
    std::int64_t position(std::int64_t y, std::int64_t x) const {
        return y * pitch + x % phases * segment + x / phases;
    }

    // Of a plane, with what blocks and tiles read beyond the last pixel's filter taps.
    std::int64_t elements(std::int64_t channels) const {
        return (2 * origin + span + kOverhang * (phases * pitch + 1)) * channels + 64 * kPanel;
    }
};

namespace detail {

// Words of whatever there is, floats or pairs of bf16, in squares as large as GCC has shuffles for: wider vectors it takes
// apart, word by word.
#ifdef LGCN_X86
constexpr int kSquare = 8;
#else
constexpr int kSquare = 4;
#endif
typedef std::uint32_t Row __attribute__((vector_size(4 * kSquare), aligned(4), may_alias));

// Bits of floats, their upper half rounded to nearest, ties to even.
template <typename Bits, typename Floats>
[[gnu::always_inline]] inline Bits rounded(Floats v) {
    Bits bits;
    static_assert(sizeof bits == sizeof v);
    std::memcpy(&bits, &v, sizeof bits);
    return bits + 0x7fff + (bits >> 16 & 1);
}

// Vectors of as many integers. (GCC forgets the size of a vector type that is made of a template's argument.)
template <typename Vector>
struct Integers;
template <>
struct Integers<Lanes4> {
    typedef std::uint32_t Words __attribute__((vector_size(16)));
    typedef Bf16 Halves __attribute__((vector_size(8)));
};
template <>
struct Integers<Lanes8> {
    typedef std::uint32_t Words __attribute__((vector_size(32)));
    typedef Bf16 Halves __attribute__((vector_size(16)));
};
template <>
struct Integers<Lanes> {
    typedef std::uint32_t Words __attribute__((vector_size(64)));
    typedef Bf16 Halves __attribute__((vector_size(32)));
};

[[gnu::always_inline]] inline void put(float* p, float v) { *p = v; }
[[gnu::always_inline]] inline void put(Bf16* p, float v) { *p = static_cast<Bf16>(rounded<std::uint32_t>(v) >> 16); }
template <typename Vector>
[[gnu::always_inline]] inline Vector get(const float* p) {
    return load<Vector>(p);
}
template <typename Vector>
[[gnu::always_inline]] inline Vector get(const Bf16* p) {
    using Words = typename Integers<Vector>::Words;
    const Words bits = __builtin_convertvector(load<typename Integers<Vector>::Halves>(p), Words) << 16;
    Vector v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
template <typename Vector>
[[gnu::always_inline]] inline void put(float* p, Vector v) {
    store(p, v);
}
template <typename Vector>
[[gnu::always_inline]] inline void put(Bf16* p, Vector v) {
    using Halves = typename Integers<Vector>::Halves;
    const Halves halves = __builtin_convertvector(rounded<typename Integers<Vector>::Words>(v) >> 16, Halves);
    std::memcpy(p, &halves, sizeof halves);
}

#ifdef __clang__
#define LGCN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LGCN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Row{__VA_ARGS__})
#endif

// A square of words, rows to columns of (..., kPanel): in pairs, in fours, in halves.
[[gnu::always_inline]] inline void transpose(const void* const* rows, std::int64_t column, std::uint32_t* out) {
    Row v[kSquare], w[kSquare];
#pragma GCC unroll 8
    for (int i = 0; i < kSquare; ++i)
        v[i] = *reinterpret_cast<const Row*>(static_cast<const std::uint32_t*>(rows[i]) + column);
#ifdef LGCN_X86
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        w[i] = LGCN_SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        w[i + 1] = LGCN_SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            v[i + 2 * j] = LGCN_SHUFFLE(w[i + j], w[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
            v[i + 2 * j + 1] = LGCN_SHUFFLE(w[i + j], w[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<Row*>(out + i * kPanel) = LGCN_SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *reinterpret_cast<Row*>(out + (i + 4) * kPanel) = LGCN_SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
        w[i] = LGCN_SHUFFLE(v[i], v[i + 1], 0, 4, 1, 5);
        w[i + 1] = LGCN_SHUFFLE(v[i], v[i + 1], 2, 6, 3, 7);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<Row*>(out + 2 * i * kPanel) = LGCN_SHUFFLE(w[i], w[i + 2], 0, 1, 4, 5);
        *reinterpret_cast<Row*>(out + (2 * i + 1) * kPanel) = LGCN_SHUFFLE(w[i], w[i + 2], 2, 3, 6, 7);
    }
#endif
}

#undef LGCN_SHUFFLE

// Sixteen rows of `count` words (a multiple of 8) to (count, 16). A word is a float or two neighbouring bf16: the format
// of a panel.
LGCN_EVERY_SIMD inline void transpose16(const void* const* rows, std::int64_t count, void* out) {
    auto* columns = static_cast<std::uint32_t*>(out);
    for (std::int64_t k = 0; k < count; k += kSquare)
        for (int i = 0; i < kPanel; i += kSquare) transpose(rows + i, k, columns + k * kPanel + i);
}

template <int kStep>
[[gnu::always_inline]] inline void interleave(const float* rows, const float* bias, float* line) {
    for (std::int64_t x = 0; x < kWide; ++x)
        for (int i = 0; i < kStep; ++i) line[x * kStep + i] = rows[i * kWide + x] + bias[i];
}

// Rows of kWide values and their biases to one line: value 0 of each, value 1 of each, ...
LGCN_EVERY_SIMD inline void interleave(const float* rows, const float* bias, std::int64_t count, float* line) {
    if (count == 1) return interleave<1>(rows, bias, line);
    if (count == 2) return interleave<2>(rows, bias, line);
    for (std::int64_t x = 0; x < kWide; ++x)
        for (std::int64_t i = 0; i < count; ++i) line[x * count + i] = rows[i * kWide + x] + bias[i];
}

struct PutLine {
    template <typename Vector, typename T>
    [[gnu::always_inline]] static void run(const float* values, std::int64_t count, bool relu, T* out) {
        const float least = relu ? 0.0f : -std::numeric_limits<float>::infinity();
        std::int64_t x = 0;
        for (; x + kLanesOf<Vector> <= count; x += kLanesOf<Vector>) {
            const Vector v = load<Vector>(values + x);
            put(out + x, v < least ? least - Vector{} : v);  // NaN stays
        }
        for (; x < count; ++x) put(out + x, values[x] < least ? least : values[x]);
    }
};

LGCN_EVERY_SIMD inline void add_line(const float* values, std::int64_t count, float* out) {
    for (std::int64_t x = 0; x < count; ++x) out[x] += values[x];
}

// Means of 2 x 2 pixels of two lines.
LGCN_EVERY_SIMD inline void halve(const float* first, const float* second, std::int64_t count, float* out) {
    for (std::int64_t x = 0; x < count; ++x)
        out[x] = 0.25f * (first[2 * x] + first[2 * x + 1] + second[2 * x] + second[2 * x + 1]);
}

// Values (pixels, 16) of some channels to pixels in a plane.
template <typename T>
[[gnu::always_inline]] inline void put_pixels_as(const float* values, T* const* pixels, std::int64_t count,
                                                 std::int64_t channels) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (channels == kLaneCount)
            put(pixels[i], load(values + i * kLaneCount));
        else
            for (std::int64_t c = 0; c < channels; ++c) put(pixels[i] + c, values[i * kLaneCount + c]);
    }
}

LGCN_EVERY_SIMD inline void put_pixels(const float* values, float* const* pixels, std::int64_t count,
                                       std::int64_t channels) {
    put_pixels_as(values, pixels, count, channels);
}
LGCN_EVERY_SIMD inline void put_pixels(const float* values, Bf16* const* pixels, std::int64_t count,
                                       std::int64_t channels) {
    put_pixels_as(values, pixels, count, channels);
}

}  // namespace detail

}  // namespace lgcn
