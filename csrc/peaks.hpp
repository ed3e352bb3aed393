// Heatmaps to points and moments. Plain C++17, no Python; the references are in lgcn_fast/peaks.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "heatmap.hpp"
#include "simd.hpp"

namespace lgcn {

namespace detail {

struct RowMaximum {
    template <typename Vector>
    [[gnu::always_inline]] static float run(const float* row, std::int64_t width) {
        constexpr std::int64_t kLanes = kLanesOf<Vector>;
        float largest = -std::numeric_limits<float>::infinity();
        std::int64_t x = 0;
        if (width >= kLanes) {
            Vector lanes = largest - Vector{};
            for (; x + kLanes <= width; x += kLanes) {
                const Vector values = load<Vector>(row + x);
                lanes = values > lanes ? values : lanes;
            }
            for (std::int64_t lane = 0; lane < kLanes; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
        }
        for (; x < width; ++x) largest = row[x] > largest ? row[x] : largest;
        return largest;
    }
};

struct FirstMaximum {
    template <typename Vector>
    [[gnu::always_inline]] static std::int64_t run(const float* values, std::int64_t count) {
        using Indices = decltype(Vector{} > Vector{});
        constexpr std::int64_t kLanes = kLanesOf<Vector>;
        // Each lane keeps its own first maximum and the block it was in.
        const float lowest = -std::numeric_limits<float>::infinity();
        float largest = lowest;
        Vector best = lowest - Vector{};
        Indices best_block = {};
        std::int32_t block = 0;
        for (; (block + 1) * kLanes <= count; ++block) {
            const Vector candidates = load<Vector>(values + block * kLanes);
            const Indices larger = candidates > best;
            best = larger ? candidates : best;
            best_block = larger ? block - Indices{} : best_block;
        }
        std::int64_t index = 0;
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            const std::int64_t its_index = best_block[lane] * kLanes + lane;
            if (best[lane] > largest || (best[lane] == largest && largest > lowest && its_index < index)) {
                largest = best[lane];
                index = its_index;
            }
        }
        for (std::int64_t i = block * kLanes; i < count; ++i)
            if (values[i] > largest) {
                largest = values[i];
                index = i;
            }
        return index;
    }
};

}  // namespace detail

// Largest value of a row; NaN is never larger.
inline float row_maximum(const float* row, std::int64_t width) {
    return in_registers<detail::RowMaximum>(widest_registers(), row, width);
}

// Index of the first largest of some values, 0 where none is larger than minus infinity.
inline std::int64_t first_maximum(const float* values, std::int64_t count) {
    return in_registers<detail::FirstMaximum>(widest_registers(), values, count);
}

// Larger than the neighbours before it (rows first), not smaller than those after it, of eight.
inline bool is_local_maximum(const Heatmap& map, std::int64_t y, std::int64_t x) {
    const float value = map.at(y, x);
    for (std::int64_t j = std::max<std::int64_t>(y - 1, 0); j <= std::min(y + 1, map.height - 1); ++j)
        for (std::int64_t i = std::max<std::int64_t>(x - 1, 0); i <= std::min(x + 1, map.width - 1); ++i) {
            if (j == y && i == x) continue;
            const bool before = j < y || (j == y && i < x);
            if (before ? value <= map.at(j, i) : value < map.at(j, i)) return false;
        }
    return true;
}

// What most pixels that are no local maximum fail already: a look at the neighbours in their row.
inline bool may_be_local_maximum(const Heatmap& map, std::int64_t y, std::int64_t x) {
    const float* pixel = map.data + y * map.width + x;
    return !(x + 1 < map.width && pixel[1] > *pixel) && !(x > 0 && pixel[-1] >= *pixel);
}

// Calls found(y, x) for every local maximum above the threshold, rows first.
template <typename Found>
void for_each_local_maximum(const Heatmap& map, float threshold, Found found) {
    for (std::int64_t y = 0; y < map.height; ++y) {
        const float* row = map.data + y * map.width;
        // Cheap tests first: most rows and pixels fail one of them.
        if (!(row_maximum(row, map.width) > threshold)) continue;
        for (std::int64_t x = 0; x < map.width; ++x) {
            if (!(row[x] > threshold)) continue;
            if (may_be_local_maximum(map, y, x) && is_local_maximum(map, y, x)) found(y, x);
        }
    }
}

namespace detail {

typedef double WideLanes4 __attribute__((vector_size(32)));

// Sums of lanes in double. (Eight at once would not fit the registers of AVX2.)
[[gnu::always_inline]] inline WideLanes4 wide(Lanes4 v) { return __builtin_convertvector(v, WideLanes4); }
[[gnu::always_inline]] inline WideLanes4 wide(Lanes8 v) {
    return wide(Lanes4{v[0], v[1], v[2], v[3]} + Lanes4{v[4], v[5], v[6], v[7]});
}

struct WindowMoments {
    template <typename Widest>
    [[gnu::always_inline]] static Moments run(const Heatmap& map, const Window& window, float threshold) {
        // Windows are narrow; and of vectors of 512 bits GCC would join two comparisons lane by lane, in memory.
        using Vector = std::conditional_t<std::is_same_v<Widest, Lanes>, Lanes8, Widest>;
        using Wide = WideLanes4;
        constexpr std::int64_t kLanes = kLanesOf<Vector>;
        const auto [y0, y1, x0, x1] = window;
        const std::int64_t width = x1 - x0;
        Vector lane_numbers;
        for (int lane = 0; lane < kLanes; ++lane) lane_numbers[lane] = static_cast<float>(lane);
        Wide w2 = {}, w2x = {}, w2y = {};
        Moments moments;
        for (std::int64_t y = y0; y < y1; ++y) {
            const float* row = map.data + y * map.width + x0;
            Vector sums = {}, sums_x = {}, position = lane_numbers;
            std::int64_t x = 0;
            for (; x + kLanes <= width; x += kLanes) {
                const Vector values = load<Vector>(row + x);
                const Vector w = values > threshold ? values : Vector{};
                sums += w * w;
                sums_x += w * w * position;
                position += static_cast<float>(kLanes);
            }
            if (x > 0 && x < width) {
                // The rest of the row, together with pixels that are counted already and left out.
                const Vector values = load<Vector>(row + width - kLanes);
                const Vector again = lane_numbers + static_cast<float>(width - kLanes);
                const Vector first = static_cast<float>(x) + Vector{};
                const Vector w = ((values > threshold) & (again >= first)) ? values : Vector{};
                sums += w * w;
                sums_x += w * w * again;
                x = width;
            }
            w2 += wide(sums);
            w2x += wide(sums_x);
            w2y += wide(sums) * static_cast<double>(y);
            for (; x < width; ++x) {
                const double w = row[x] > threshold ? row[x] : 0.0f;
                moments.w2 += w * w;
                moments.w2x += w * w * static_cast<double>(x);
                moments.w2y += w * w * static_cast<double>(y);
            }
        }
        for (std::size_t lane = 0; lane < sizeof(Wide) / sizeof(double); ++lane) {
            moments.w2 += w2[lane];
            moments.w2x += w2x[lane];
            moments.w2y += w2y[lane];
        }
        moments.w2x += moments.w2 * static_cast<double>(x0);
        return moments;
    }
};

}  // namespace detail

// Moments of the pixels with a value w above the threshold in a window. Lanes of a row add up in fp32, which is enough
// for so few pixels and for positions counted from x0; rows add up in double.
inline Moments window_moments(const Heatmap& map, const Window& window, float threshold) {
    return in_registers<detail::WindowMoments>(widest_registers(), map, window, threshold);
}

// The first largest pixel, rows first, placed by a window around it: where that window's values above 0 put it.
inline Peak peak_centroid(const Heatmap& map, double radius) {
    const std::int64_t index = first_maximum(map.data, map.height * map.width);
    const auto y = static_cast<double>(index / map.width), x = static_cast<double>(index % map.width);
    const Peak found = centroid(map, window_moments(map, peak_window(map, x, y, radius), 0), x, y);
    return {found.x, found.y, map.at(index / map.width, index % map.width)};
}

}  // namespace lgcn
