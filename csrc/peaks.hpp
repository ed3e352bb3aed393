// Heatmaps to points and moments. Plain C++17, no Python; the references are in lgcn_fast/peaks.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "heatmap.hpp"
#include "simd.hpp"

namespace lgcn {

typedef std::int32_t LaneIndices __attribute__((vector_size(64)));
typedef double WideLanes __attribute__((vector_size(128)));

// Largest value of a row; NaN is never larger.
LGCN_EVERY_SIMD inline float row_maximum(const float* row, std::int64_t width) {
    float largest = -std::numeric_limits<float>::infinity();
    std::int64_t x = 0;
    if (width >= kLaneCount) {
        Lanes lanes = largest - Lanes{};
        for (; x + kLaneCount <= width; x += kLaneCount) {
            const Lanes values = load(row + x);
            lanes = values > lanes ? values : lanes;
        }
        for (std::int64_t lane = 0; lane < kLaneCount; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    }
    for (; x < width; ++x) largest = row[x] > largest ? row[x] : largest;
    return largest;
}

// Index of the first largest of some values, 0 where none is larger than minus infinity.
LGCN_EVERY_SIMD inline std::int64_t first_maximum(const float* values, std::int64_t count) {
    // Each lane keeps its own first maximum and the block it was in.
    const float lowest = -std::numeric_limits<float>::infinity();
    float largest = lowest;
    Lanes best = lowest - Lanes{};
    LaneIndices best_block = {};
    std::int32_t block = 0;
    for (; (block + 1) * kLaneCount <= count; ++block) {
        const Lanes candidates = load(values + block * kLaneCount);
        const auto larger = candidates > best;
        best = larger ? candidates : best;
        best_block = larger ? block - LaneIndices{} : best_block;
    }
    std::int64_t index = 0;
    for (std::int64_t lane = 0; lane < kLaneCount; ++lane) {
        const std::int64_t its_index = best_block[lane] * kLaneCount + lane;
        if (best[lane] > largest || (best[lane] == largest && largest > lowest && its_index < index)) {
            largest = best[lane];
            index = its_index;
        }
    }
    for (std::int64_t i = block * kLaneCount; i < count; ++i)
        if (values[i] > largest) {
            largest = values[i];
            index = i;
        }
    return index;
}

// The first largest pixel, rows first, with its centroid.
inline Peak peak_centroid(const Heatmap& map) {
    const std::int64_t index = first_maximum(map.data, map.height * map.width);
    return centroid(map, index / map.width, index % map.width);
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

// The local maximum above the threshold nearest to a target, searched in squares that grow around it; the target
// itself, with value 0, where there is none.
inline Peak nearest_peak(const Heatmap& map, double target_x, double target_y, float threshold) {
    const auto clamped = [](double v, std::int64_t length) {
        return static_cast<std::int64_t>(std::clamp(std::round(v), 0.0, static_cast<double>(length - 1)));
    };
    const std::int64_t middle_y = clamped(target_y, map.height), middle_x = clamped(target_x, map.width);
    double best = std::numeric_limits<double>::infinity();
    std::int64_t best_y = -1, best_x = -1;
    const auto look = [&](std::int64_t y, std::int64_t x) {
        if (!(map.data[y * map.width + x] > threshold)) return;
        const double dy = static_cast<double>(y) - target_y, dx = static_cast<double>(x) - target_x;
        const double distance = dy * dy + dx * dx;
        const bool first = y < best_y || (y == best_y && x < best_x);
        if (distance > best || (distance == best && !first)) return;
        if (!may_be_local_maximum(map, y, x) || !is_local_maximum(map, y, x)) return;
        best = distance;
        best_y = y;
        best_x = x;
    };
    const std::int64_t furthest = std::max({middle_y, map.height - 1 - middle_y, middle_x, map.width - 1 - middle_x});
    for (std::int64_t ring = 0; ring <= furthest; ++ring) {
        // A pixel of this ring is at least this far from the middle's pixel, which is the one nearest to the target.
        const double reach = static_cast<double>(ring) - 0.5;
        if (reach > 0 && reach * reach > best) break;
        for (std::int64_t y = std::max<std::int64_t>(middle_y - ring, 0);
             y <= std::min(middle_y + ring, map.height - 1); ++y) {
            const bool edge = y == middle_y - ring || y == middle_y + ring;
            const std::int64_t step = edge || ring == 0 ? 1 : 2 * ring;
            for (std::int64_t x = middle_x - ring; x <= middle_x + ring; x += step)
                if (x >= 0 && x < map.width) look(y, x);
        }
    }
    if (best_y < 0) return {static_cast<float>(target_x), static_cast<float>(target_y), 0.0f};
    return centroid(map, best_y, best_x);
}

// Moments of the pixels with a value w above the threshold in a window. Lanes of a row add up in fp32, which is enough
// for so few pixels and for positions counted from x0; rows add up in double.
LGCN_EVERY_SIMD inline Moments window_moments(const Heatmap& map, const Window& window, float threshold) {
    const auto [y0, y1, x0, x1] = window;
    const std::int64_t width = x1 - x0;
    const Lanes lane_numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    WideLanes w2 = {}, w2x = {}, w2y = {};
    Moments moments;
    for (std::int64_t y = y0; y < y1; ++y) {
        const float* row = map.data + y * map.width + x0;
        Lanes sums = {}, sums_x = {}, position = lane_numbers;
        std::int64_t x = 0;
        for (; x + kLaneCount <= width; x += kLaneCount) {
            const Lanes values = load(row + x);
            const Lanes w = values > threshold ? values : Lanes{};
            sums += w * w;
            sums_x += w * w * position;
            position += static_cast<float>(kLaneCount);
        }
        if (x > 0 && x < width) {
            // The rest of the row, together with pixels that are counted already and left out.
            const Lanes values = load(row + width - kLaneCount);
            const Lanes again = lane_numbers + static_cast<float>(width - kLaneCount);
            const Lanes first = static_cast<float>(x) + Lanes{};
            const Lanes w = ((values > threshold) & (again >= first)) ? values : Lanes{};
            sums += w * w;
            sums_x += w * w * again;
            x = width;
        }
        const WideLanes wide = __builtin_convertvector(sums, WideLanes);
        w2 += wide;
        w2x += __builtin_convertvector(sums_x, WideLanes);
        w2y += wide * static_cast<double>(y);
        for (; x < width; ++x) {
            const double w = row[x] > threshold ? row[x] : 0.0f;
            moments.w2 += w * w;
            moments.w2x += w * w * static_cast<double>(x);
            moments.w2y += w * w * static_cast<double>(y);
        }
    }
    for (std::int64_t lane = 0; lane < kLaneCount; ++lane) {
        moments.w2 += w2[lane];
        moments.w2x += w2x[lane];
        moments.w2y += w2y[lane];
    }
    moments.w2x += moments.w2 * static_cast<double>(x0);
    return moments;
}

}  // namespace lgcn
