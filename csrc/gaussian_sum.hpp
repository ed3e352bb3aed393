// The kernel convolution (Eq. 1) on heatmaps: a sum of separable Gaussians. C++17 with GCC's or Clang's vector types, no
// Python; the reference is lgcn_fast/operators.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "matrix.hpp"
#include "simd.hpp"

namespace lgcn {

constexpr std::int64_t kBlock = 2 * kLaneCount;
// Rows that a pass along y computes together: a row that is read serves all of them.
constexpr std::int64_t kRows = 4;

// 1-D kernels, symmetric, whose outer products add up to K.
struct Taps {
    std::int64_t radius;              // of the truncated kernel, pixels
    std::vector<std::int64_t> reach;  // of each: beyond it all taps are less than the rounding of fp32
    std::vector<float> lines;         // (S, 2 radius + 1 + 2 kRows), centred, zero beyond reach

    // taps: (count, size), size odd.
    Taps(const double* taps, std::int64_t count, std::int64_t size) : radius(size / 2) {
        double least = 0;
        for (std::int64_t i = 0; i < count * size; ++i) least = std::max(least, std::abs(taps[i]) / (1 << 25));
        for (std::int64_t s = 0; s < count; ++s) {
            const double* tap = taps + s * size + radius;
            std::int64_t furthest = radius;
            while (furthest > 0 && std::abs(tap[furthest]) < least) --furthest;
            std::vector<float> line(static_cast<std::size_t>(2 * (radius + kRows) + 1), 0.0f);
            for (std::int64_t k = -furthest; k <= furthest; ++k)
                line[static_cast<std::size_t>(radius + kRows + k)] = static_cast<float>(tap[k]);
            reach.push_back(furthest);
            lines.insert(lines.end(), line.begin(), line.end());
        }
    }

    const float* centre_of(std::size_t s) const {
        return lines.data() + static_cast<std::int64_t>(s) * (2 * (radius + kRows) + 1) + radius + kRows;
    }
};

namespace detail {

// pairs[k] = row shifted by k to the left + row shifted by k to the right (k = 0: the row): all Gaussians need the same.
struct AddPairs {
    template <typename Vector>
    [[gnu::always_inline]] static void run(const float* row, std::int64_t radius, std::int64_t width,
                                           std::int64_t stride, float* pairs) {
        for (std::int64_t x = 0; x < width; x += kLanesOf<Vector>) {
            store(pairs + x, load<Vector>(row + x));
            for (std::int64_t k = 1; k <= radius; ++k)
                store(pairs + k * stride + x, load<Vector>(row + x - k) + load<Vector>(row + x + k));
        }
    }
};

// Two to eight sums side by side, here and below, keep the arithmetic units busy while each waits for its last addition.
struct BlurAlongX {
    template <typename Vector>
    [[gnu::always_inline]] static void run(const float* pairs, const float* taps, std::int64_t reach,
                                           std::int64_t width, std::int64_t stride, float* out) {
        constexpr std::int64_t kLanes = kLanesOf<Vector>, kVectors = kBlock / kLanes;
        for (std::int64_t x = 0; x < width; x += kBlock) {
            Vector sums[kVectors] = {};
            for (std::int64_t k = 0; k <= reach; ++k)
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i)
                    sums[i] += taps[k] * load<Vector>(pairs + k * stride + x + i * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) store(out + x + i * kLanes, sums[i]);
        }
    }
};

// Adds kRows rows, blurred along y, to out.
struct BlurAlongY {
    template <typename Vector>
    [[gnu::always_inline]] static void run(const float* rows, const float* taps, std::int64_t reach, std::int64_t width,
                                           std::int64_t stride, float* out) {
        constexpr std::int64_t kLanes = kLanesOf<Vector>;
        for (std::int64_t x = 0; x < width; x += 2 * kLanes) {
            Vector left[kRows], right[kRows];
            for (std::int64_t r = 0; r < kRows; ++r) {
                left[r] = load<Vector>(out + r * stride + x);
                right[r] = load<Vector>(out + r * stride + x + kLanes);
            }
            for (std::int64_t j = -reach; j < reach + kRows; ++j) {
                const Vector row_left = load<Vector>(rows + j * stride + x);
                const Vector row_right = load<Vector>(rows + j * stride + x + kLanes);
                for (std::int64_t r = 0; r < kRows; ++r) {
                    left[r] += taps[j - r] * row_left;
                    right[r] += taps[j - r] * row_right;
                }
            }
            for (std::int64_t r = 0; r < kRows; ++r) {
                store(out + r * stride + x, left[r]);
                store(out + r * stride + x + kLanes, right[r]);
            }
        }
    }
};

}  // namespace detail

// K * map for maps of one size; holds the buffers of one thread.
class GaussianSum {
public:
    GaussianSum(const Taps& taps, std::int64_t height, std::int64_t width)
        : taps_(taps),
          height_(height),
          width_(width),
          stride_((width + kBlock - 1) / kBlock * kBlock),
          plane_((height + 2 * taps.radius + kRows) * stride_),
          row_(stride_ + 2 * taps.radius),
          pairs_((taps.radius + 1) * stride_),
          // Rows above and below the map are never written: the zero padding along y.
          blurred_(static_cast<std::int64_t>(taps.reach.size()) * plane_),
          sum_((height + kRows) * stride_) {}

    // What the caller needs to know of a map: elements from row to row, and in all.
    std::int64_t row_stride() const { return width_; }
    std::int64_t map_elements() const { return height_ * width_; }
    std::size_t bytes() const { return row_.bytes() + pairs_.bytes() + blurred_.bytes() + sum_.bytes(); }

    void operator()(const Multiplier<float>& multiplier, const float* map, float* out) {
        const std::int64_t radius = taps_.radius;
        const std::size_t width_bytes = static_cast<std::size_t>(width_) * sizeof(float);
        for (std::int64_t y = 0; y < height_; ++y) {
            std::memcpy(row_.data() + radius, map + y * width_, width_bytes);
            in_registers<detail::AddPairs>(multiplier.registers, row_.data() + radius, radius, width_, stride_,
                                           pairs_.data());
            for (std::size_t s = 0; s < taps_.reach.size(); ++s)
                in_registers<detail::BlurAlongX>(multiplier.registers, pairs_.data(), taps_.centre_of(s),
                                                 taps_.reach[s], width_, stride_, plane(s) + y * stride_);
        }
        std::fill_n(sum_.data(), (height_ + kRows) * stride_, 0.0f);
        for (std::int64_t y = 0; y < height_; y += kRows)
            for (std::size_t s = 0; s < taps_.reach.size(); ++s)
                in_registers<detail::BlurAlongY>(multiplier.registers, plane(s) + y * stride_, taps_.centre_of(s),
                                                 taps_.reach[s], width_, stride_, sum_.data() + y * stride_);
        for (std::int64_t y = 0; y < height_; ++y)
            std::memcpy(out + y * width_, sum_.data() + y * stride_, width_bytes);
    }

private:
    float* plane(std::size_t s) {
        return blurred_.data() + static_cast<std::int64_t>(s) * plane_ + taps_.radius * stride_;
    }

    const Taps& taps_;
    std::int64_t height_, width_, stride_, plane_;
    Buffer<float> row_, pairs_, blurred_, sum_;
};

}  // namespace lgcn
