// Per-heatmap maximum with sub-pixel position. Plain C++17, no Python: the reference is lgcn_fast/peaks.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

namespace lgcn {

struct Peak {
    float x, y;   // pixels, pixel centres at integers
    float value;  // of the largest pixel
};

// The window around a peak reaches this many pixels to each side.
constexpr std::int64_t kRadius = 2;

namespace detail {

inline float rank(float value) { return std::isnan(value) ? -std::numeric_limits<float>::infinity() : value; }

// The first largest pixel, rows first. A maximum per row is a reduction that compilers vectorise; only a row that beats
// all rows before it is searched for the position.
inline std::int64_t first_maximum(const float* heatmap, std::int64_t height, std::int64_t width) {
    float best = -std::numeric_limits<float>::infinity();
    std::int64_t best_index = 0;
    for (std::int64_t y = 0; y < height; ++y) {
        const float* row = heatmap + y * width;
        float largest = -std::numeric_limits<float>::infinity();
        for (std::int64_t x = 0; x < width; ++x) largest = row[x] > largest ? row[x] : largest;
        if (largest > best) {
            best = largest;
            best_index = y * width + (std::find(row, row + width, largest) - row);
        }
    }
    return best_index;
}

}  // namespace detail

// Maximum of one heatmap and the centroid of the window around it: weights are the values minus the window's smallest,
// the window is cut at the border to one that is symmetric about the pixel. NaN counts as minus infinity.
inline Peak peak_centroid(const float* heatmap, std::int64_t height, std::int64_t width) {
    const std::int64_t index = detail::first_maximum(heatmap, height, width);
    const std::int64_t y = index / width, x = index % width;
    const std::int64_t dy = std::min({kRadius, y, height - 1 - y});
    const std::int64_t dx = std::min({kRadius, x, width - 1 - x});
    Peak peak{static_cast<float>(x), static_cast<float>(y), detail::rank(heatmap[index])};

    double smallest = peak.value;
    for (std::int64_t j = -dy; j <= dy; ++j)
        for (std::int64_t i = -dx; i <= dx; ++i)
            smallest = std::min<double>(smallest, detail::rank(heatmap[(y + j) * width + x + i]));
    if (!std::isfinite(smallest) || !std::isfinite(peak.value)) return peak;

    double sum = 0, sum_x = 0, sum_y = 0;
    for (std::int64_t j = -dy; j <= dy; ++j)
        for (std::int64_t i = -dx; i <= dx; ++i) {
            const double weight = heatmap[(y + j) * width + x + i] - smallest;
            sum += weight;
            sum_x += weight * i;
            sum_y += weight * j;
        }
    if (sum > 0) {
        peak.x += static_cast<float>(sum_x / sum);
        peak.y += static_cast<float>(sum_y / sum);
    }
    return peak;
}

// Peaks of `count` contiguous heatmaps; points gets x, y of each, values the largest pixels. Every heatmap is worked on
// by one thread, so the result does not depend on their number.
inline void peak_centroids(const float* heatmaps, std::int64_t count, std::int64_t height, std::int64_t width,
                           int num_threads, float* points, float* values) {
    const auto work = [=](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const Peak peak = peak_centroid(heatmaps + i * height * width, height, width);
            points[2 * i] = peak.x;
            points[2 * i + 1] = peak.y;
            values[i] = peak.value;
        }
    };
    const std::int64_t available = num_threads > 0 ? num_threads : std::thread::hardware_concurrency();
    // Starting a thread costs about as much as a hundred thousand pixels.
    const std::int64_t useful = count * height * width / 500000 + 1;
    const std::int64_t threads = std::clamp<std::int64_t>(available, 1, std::min(useful, std::max<std::int64_t>(count, 1)));
    std::vector<std::thread> pool;
    for (std::int64_t t = 1; t < threads; ++t) pool.emplace_back(work, count * t / threads, count * (t + 1) / threads);
    work(0, count / threads);
    for (std::thread& thread : pool) thread.join();
}

}  // namespace lgcn
