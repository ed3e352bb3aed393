// The kernel convolution (Eq. 1) as matrix products in bf16; the reference is lgcn_fast/operators.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "convolution.hpp"
#include "gaussian_sum.hpp"
#include "matrix.hpp"
#include "planes.hpp"

namespace lgcn {

namespace detail {

// Rows of sums, two and two, to rows of pairs in bf16: the format of a panel.
LGCN_EVERY_SIMD inline void pair_rows(const float* c, std::int64_t row_stride, std::int64_t rows, Bf16* panel) {
    using Words = Integers<Lanes>::Words;
    for (std::int64_t y = 0; y < rows; y += 2) {
        const Words first = rounded<Words>(load(c + y * row_stride)) >> 16;
        const Words second = rounded<Words>(load(c + (y + 1) * row_stride)) & 0xffff0000u;
        const Words both = first | second;
        std::memcpy(panel + y * kPanel, &both, sizeof both);
    }
}

// Part of a result, in rows of `stride`, to its place.
LGCN_EVERY_SIMD inline void put_block(const float* c, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                                      float* out, std::int64_t row_stride) {
    for (std::int64_t y = 0; y < rows; ++y) {
        std::int64_t x = 0;
        for (; x + kLaneCount <= columns; x += kLaneCount) store(out + y * row_stride + x, load(c + y * stride + x));
        for (; x < columns; ++x) out[y * row_stride + x] = c[y * stride + x];
    }
}

}  // namespace detail

// K * map as matrix products in bf16, for maps of one size; holds the buffers of one thread. A zero-padded convolution
// along a line is a banded matrix T_s, K * X = sum_s T_s X T_s. Where bands are zero, nothing is multiplied.
class GaussianProduct {
public:
    GaussianProduct(const Taps& taps, std::int64_t height, std::int64_t width)
        : count_(static_cast<std::int64_t>(taps.reach.size())),
          height_(height),
          width_(width),
          depth_x_(round_up(width, kWide)),
          depth_y_(round_up(round_up(height, kRowGroup), kWide)),
          columns_(count_ * depth_x_ * depth_x_),
          rows_(depth_y_ * count_ * depth_y_),
          scratch_(count_ * depth_x_ * depth_y_) {
        for (std::int64_t s = 0; s < count_; ++s) {
            const float* line = taps.centre_of(static_cast<std::size_t>(s));
            const std::int64_t reach = taps.reach[static_cast<std::size_t>(s)];
            reach_.push_back(reach);
            for (std::int64_t i = 0; i < width; ++i)
                for (std::int64_t j = std::max<std::int64_t>(i - reach, 0); j <= std::min(i + reach, width - 1); ++j)
                    detail::put(columns_.data() + (s * depth_x_ + i / kPanel * kPanel) * depth_x_ +
                                    Convolution<Bf16>::packed_index(j, i % kPanel),
                                line[i - j]);
            for (std::int64_t i = 0; i < height; ++i)
                for (std::int64_t j = std::max<std::int64_t>(i - reach, 0); j <= std::min(i + reach, height - 1); ++j)
                    detail::put(rows_.data() + (i * count_ + s) * depth_y_ + j, line[i - j]);
        }
    }

    // A map has rows of `row_stride()`, padded with zeros to whole blocks, and a cache line more: the rows of many maps
    // must not all fall into the same few sets of the cache.
    std::int64_t row_stride() const { return depth_x_; }
    std::int64_t map_elements() const { return depth_y_ * depth_x_ + 32; }
    std::size_t bytes() const { return columns_.bytes() + rows_.bytes() + scratch_.bytes(); }

    // out: (height, width).
    void operator()(const Multiplier<Bf16>& multiplier, const Bf16* map, float* out) {
        // The narrower a block, the fewer pixels it sees; a matrix unit has blocks of one size.
        const Block along_x = multiplier.panels ? kAlongX : kMatrixUnit;
        const Block along_y = multiplier.panels ? kAlongY : kMatrixUnit;
        Bf16* scratch = scratch_.data();
        alignas(64) float c[kLargest];
        for (std::int64_t x = 0; x < width_; x += along_x.columns())
            for (std::int64_t s = 0; s < count_; ++s) {
                const Segment band = near(x, along_x.columns(), s, width_, multiplier.inner_step);
                for (std::int64_t y = 0; y < height_; y += along_x.rows) {
                    const Product<Bf16> product{
                        map + y * depth_x_, depth_x_, columns_.data() + (s * depth_x_ + x) * depth_x_,
                        kPanel * depth_x_,  &band,    1};
                    const Result sums =
                        multiply(multiplier, product, std::min(along_x.rows, height_ - y), along_x.panels, c);
                    for (std::int64_t panel = 0; panel < along_x.panels; ++panel)
                        detail::pair_rows(
                            c + panel * sums.next_panel, sums.stride, sums.rows,
                            scratch + ((x + panel * kPanel) * count_ + s * kPanel) * depth_y_ + y * kPanel);
                }
            }
        std::vector<Segment> bands(static_cast<std::size_t>(count_));
        for (std::int64_t y = 0; y < height_; y += along_y.rows) {
            const std::int64_t rows = std::min(along_y.rows, height_ - y);
            for (std::int64_t s = 0; s < count_; ++s) {
                const Segment band = near(y, along_y.rows, s, height_, multiplier.inner_step);
                bands[static_cast<std::size_t>(s)] = {s * depth_y_ + band.a, s * depth_y_ + band.b, band.length};
            }
            for (std::int64_t x = 0; x < width_; x += along_y.columns()) {
                const std::int64_t columns = std::min(along_y.columns(), width_ - x);
                const Product<Bf16> product{
                    rows_.data() + y * count_ * depth_y_, count_ * depth_y_, scratch + x * count_ * depth_y_,
                    kPanel * count_ * depth_y_,           bands.data(),      count_};
                const Result sums = multiply(multiplier, product, rows, round_up(columns, kPanel) / kPanel, c);
                for (std::int64_t i = 0; i < columns; i += kPanel)
                    detail::put_block(c + i / kPanel * sums.next_panel, sums.stride, rows,
                                      std::min(kPanel, columns - i), out + y * width_ + x + i, width_);
            }
        }
    }

private:
    struct Block {
        std::int64_t rows, panels;
        std::int64_t columns() const { return panels * kPanel; }
    };
    static constexpr Block kMatrixUnit{kWide, kWide / kPanel}, kAlongX{96, 1}, kAlongY{24, 4};
    static constexpr std::int64_t kLargest = std::max({kMatrixUnit.rows * kMatrixUnit.panels,
                                                       kAlongX.rows * kAlongX.panels, kAlongY.rows * kAlongY.panels}) *
                                             kPanel;

    // Where the sums of a product are: rows are `stride` apart, panels `next_panel`.
    struct Result {
        std::int64_t rows, stride, next_panel;
    };

    // At least `rows` and `panels`.
    static Result multiply(const Multiplier<Bf16>& multiplier, const Product<Bf16>& product, std::int64_t rows,
                           std::int64_t panels, float* c) {
        if (multiplier.panels) {
            rows = round_up(rows, kRowGroup);
            multiplier.panels(product, rows, panels, c);
            return {rows, kPanel, rows * kPanel};
        }
        multiplier.wide(product, c);
        return {kWide, kWide, kPanel};
    }

    // What the pixels [i, i + count) of a line of `length` see of it.
    Segment near(std::int64_t i, std::int64_t count, std::int64_t s, std::int64_t length, std::int64_t step) const {
        const std::int64_t reach = reach_[static_cast<std::size_t>(s)];
        const std::int64_t first = std::max<std::int64_t>(i - reach, 0) / step * step;
        return {first, first, round_up(std::min(i + count + reach, length), step) - first};
    }

    std::int64_t count_, height_, width_, depth_x_, depth_y_;
    std::vector<std::int64_t> reach_;
    Buffer<Bf16> columns_, rows_, scratch_;
};

// The kernel convolution of each precision.
template <typename T>
using Blur = std::conditional_t<std::is_same_v<T, Bf16>, GaussianProduct, GaussianSum>;

}  // namespace lgcn
