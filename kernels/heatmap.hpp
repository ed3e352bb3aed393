// Pixels of heatmaps: windows, and where in them a peak is. For CPU and GPU, so without the standard library; the
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

// Pixels at most `reach` from a centre along x and along y.
inline Window window(const Heatmap& map, double centre_x, double centre_y, double reach_x, double reach_y) {
    return {bound(ceil(centre_y - reach_y), map.height), bound(floor(centre_y + reach_y) + 1, map.height),
            bound(ceil(centre_x - reach_x), map.width), bound(floor(centre_x + reach_x) + 1, map.width)};
}

// The window that places a peak: of a radius, but at a border cut to one that is symmetric about the centre, so that the
// border does not pull the peak inwards. Without pixels about a centre outside.
inline Window peak_window(const Heatmap& map, double centre_x, double centre_y, double radius) {
    const double right = static_cast<double>(map.width - 1) - centre_x;
    const double below = static_cast<double>(map.height - 1) - centre_y;
    return window(map, centre_x, centre_y, smaller(radius, smaller(centre_x, right) + 0.5),
                  smaller(radius, smaller(centre_y, below) + 0.5));
}

// The centroid of the squares in a window, from their moments, and the value of the pixel nearest to it; where there are
// none, or they overflow, a centre and 0.
inline Peak centroid(const Heatmap& map, const Moments& moments, double centre_x, double centre_y) {
    if (!(moments.w2 > 0 && moments.w2 < INFINITY))
        return {static_cast<float>(centre_x), static_cast<float>(centre_y), 0.0f};
    const double x = moments.w2x / moments.w2, y = moments.w2y / moments.w2;
    const Index row = bound(floor(y + 0.5), map.height - 1), column = bound(floor(x + 0.5), map.width - 1);
    return {static_cast<float>(x), static_cast<float>(y), map.at(row, column)};
}

}  // namespace lgcn
