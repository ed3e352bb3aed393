// Votes of heatmaps for the middle of a face; the reference is in lgcn_fast/peaks.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "peaks.hpp"
#include "simd.hpp"

namespace lgcn {

namespace detail {

// sums[x] += share * values[x * step], the values cut to 0..1; NaN counts as 0.
LGCN_EVERY_SIMD inline void add_clipped(const float* values, std::int64_t step, float share, std::int64_t count,
                                        float* sums) {
    for (std::int64_t x = 0; x < count; ++x) {
        const float value = values[x * step];
        sums[x] += share * (value > 0 ? (value < 1 ? value : 1) : 0);
    }
}

}  // namespace detail

// Which landmarks vote, and where they sit from the middle of faces of several sizes.
class Ballot {
public:
    // offsets: (sizes, landmarks, 2), x and y in pixels of the votes, of which there is one for step x step pixels.
    Ballot(const std::int64_t* offsets, std::int64_t sizes, std::int64_t landmarks,
           const std::vector<std::int64_t>& voters, std::int64_t step)
        : offsets_(offsets, offsets + sizes * landmarks * 2),
          voters_(voters),
          sizes_(sizes),
          landmarks_(landmarks),
          step_(step) {}

    std::int64_t sizes() const { return sizes_; }
    std::int64_t voters() const { return static_cast<std::int64_t>(voters_.size()); }
    std::int64_t side(std::int64_t pixels) const { return (pixels - 1) / step_ + 1; }

    // Adds what the maps of a face, the first of them `maps`, give to a row of the votes for one size.
    void add(const Heatmap& maps, std::int64_t size, std::int64_t y, float* votes) const {
        const std::int64_t height = side(maps.height), width = side(maps.width);
        const float share = 1 / static_cast<float>(voters_.size());
        for (const std::int64_t landmark : voters_) {
            const std::int64_t* offset = offsets_.data() + (size * landmarks_ + landmark) * 2;
            const std::int64_t dx = offset[0], row = y + offset[1];
            const std::int64_t from = std::max<std::int64_t>(-dx, 0), to = std::min(width - dx, width);
            if (row < 0 || row >= height || from >= to) continue;
            const float* values = maps.neighbour(landmark).data + row * step_ * maps.width;
            detail::add_clipped(values + (from + dx) * step_, step_, share, to - from, votes + from);
        }
    }

private:
    std::vector<std::int64_t> offsets_, voters_;
    std::int64_t sizes_, landmarks_, step_;
};

}  // namespace lgcn
