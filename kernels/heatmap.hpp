// Pixels of heatmaps: windows, peaks and their centroids. For CPU and GPU, so without the standard library; the
// references are in lgcn_fast/peaks.py.
#pragma once

#ifdef __CUDACC_RTC__
#define INFINITY __int_as_float(0x7f800000)
#define LGCN_UNROLL _Pragma("unroll 24")  // loads that are on their way at once
#else
#define LGCN_UNROLL
#include <math.h>

#include <cstdint>
#endif

namespace lgcn {

#ifdef __CUDACC_RTC__
using Index = int;  // within a heatmap
using Sum = float;  // over its pixels, by several threads
#else
using Index = std::int64_t;
using Sum = double;
#endif

template <typename T>
T smaller(T a, T b) {
    return b < a ? b : a;
}

template <typename T>
T larger(T a, T b) {
    return a < b ? b : a;
}

// One heatmap: row-major pixels. NaN counts as minus infinity.
struct Heatmap {
    const float* data;
    Index height, width;

    // Of the same size, `index` heatmaps further in memory.
    Heatmap neighbour(long long index) const { return {data + index * height * width, height, width}; }

    float at(Index y, Index x) const {
        const float value = data[y * width + x];
        return value == value ? value : -INFINITY;
    }
};

struct Peak {
    float x, y;   // pixels, pixel centres at integers
    float value;  // of the peak's pixel
};

// Sums of w^2, w^2 x and w^2 y over pixels with value w.
struct Moments {
    double w2 = 0, w2x = 0, w2y = 0;
};

// The rows [y0, y1) and columns [x0, x1) of a heatmap.
struct Window {
    Index y0, y1, x0, x1;
};

// A whole number within [0, largest]; NaN becomes 0, by the order of the two.
inline Index bound(double v, Index largest) {
    return static_cast<Index>(smaller(larger(0.0, v), static_cast<double>(largest)));
}

// Pixels at most `radius` from a centre along x and along y.
inline Window window(const Heatmap& map, double centre_x, double centre_y, double radius) {
    return {bound(ceil(centre_y - radius), map.height), bound(floor(centre_y + radius) + 1, map.height),
            bound(ceil(centre_x - radius), map.width), bound(floor(centre_x + radius) + 1, map.width)};
}

// The window around a peak reaches this many pixels to each side.
constexpr Index kRadius = 2;

// Centroid of the window around a pixel: weights are the values minus the window's smallest, the window is cut at the
// border to one that is symmetric about the pixel. In a constant window, or one with an infinite value, the pixel.
inline Peak centroid(const Heatmap& map, Index y, Index x) {
    const Index dy = smaller(kRadius, smaller(y, map.height - 1 - y));
    const Index dx = smaller(kRadius, smaller(x, map.width - 1 - x));
    Peak peak{static_cast<float>(x), static_cast<float>(y), map.at(y, x)};
    // Loops of constant length, so that a GPU has all pixels on their way at once. Outside of the window stands the
    // peak's own value.
    constexpr int reach = static_cast<int>(kRadius), side = 2 * reach + 1;
    float values[side * side];
    float smallest = peak.value;
    for (int j = -reach; j <= reach; ++j)
        for (int i = -reach; i <= reach; ++i) {
            const bool inside = -dy <= j && j <= dy && -dx <= i && i <= dx;
            const float value = inside ? map.at(y + j, x + i) : peak.value;
            values[(j + reach) * side + i + reach] = value;
            smallest = smaller(smallest, value);
        }
    if (!(smallest > -INFINITY && peak.value < INFINITY)) return peak;
    double sum = 0, sum_x = 0, sum_y = 0;
    for (int j = -reach; j <= reach; ++j)
        for (int i = -reach; i <= reach; ++i) {
            if (j < -dy || j > dy || i < -dx || i > dx) continue;
            const double weight = static_cast<double>(values[(j + reach) * side + i + reach]) - smallest;
            sum += weight;
            sum_x += weight * i;
            sum_y += weight * j;
        }
    if (sum > 0 && sum < INFINITY) {
        peak.x = static_cast<float>(static_cast<double>(x) + sum_x / sum);
        peak.y = static_cast<float>(static_cast<double>(y) + sum_y / sum);
    }
    return peak;
}

// Larger than the neighbours before it (rows first), not smaller than those after it, of eight.
inline bool is_local_maximum(const Heatmap& map, Index y, Index x) {
    const float value = map.at(y, x);
    // No early end, and no condition on a load: a GPU has all neighbours on their way at once.
    bool is_maximum = value > -INFINITY;
    for (int j = -1; j <= 1; ++j)
        for (int i = -1; i <= 1; ++i) {
            const Index row = smaller(larger(y + j, Index{0}), map.height - 1);
            const Index column = smaller(larger(x + i, Index{0}), map.width - 1);
            const float nearest = map.at(row, column);
            const float neighbour = row == y + j && column == x + i ? nearest : -INFINITY;
            const bool before = j < 0 || (j == 0 && i < 0), itself = j == 0 && i == 0;
            is_maximum &= itself || (before ? value > neighbour : value >= neighbour);
        }
    return is_maximum;
}

}  // namespace lgcn
