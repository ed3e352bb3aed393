// Convolutions as products of small matrices, in fp32 and bf16. Activations are channels-last in planes with borders of
// zeros, so that the filter taps of a row are one run of memory and zero padding costs nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "matrix.hpp"
#include "planes.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace lgcn {

namespace detail {

// Results of a block of pixels, (rows, 16 panels): bias and ReLU; the border stays zero.
template <int kPanels>
struct Finish {
    template <typename Vector, typename T>
    [[gnu::always_inline]] static void run(const float* c, std::int64_t rows, const float* bias,
                                           const std::uint8_t* inside, std::int64_t channels, T* out) {
        constexpr int kLanes = kLanesOf<Vector>, kVectors = kPanels * kPanel / kLanes;
        Vector offset[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) offset[j] = load<Vector>(bias + j * kLanes);
        for (std::int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
                const Vector sum = load<Vector>(c + (i * kVectors + j) * kLanes) + offset[j];
                put(out + i * channels + j * kLanes, sum <= 0 || !inside[i] ? Vector{} : sum);  // NaN stays
            }
    }
};

}  // namespace detail

// Of a convolution: (out, in, kernel, kernel) and (out,).
struct Filters {
    const float *weight, *bias;
    std::int64_t out, in, kernel;
};

// Convolution, bias, ReLU, from plane to plane of a grid.
template <typename T>
class Layer {
public:
    virtual ~Layer() = default;
    // A member of the team does its share, in `scratch()` floats of its own.
    virtual void operator()(const Multiplier<T>& multiplier, const Grid& grid, const T* in, T* out, const Team& team,
                            std::int64_t member, float* scratch) const = 0;
    virtual std::int64_t scratch() const { return 0; }
};

// As products of the plane's pixels with the filters' taps.
template <typename T>
class Convolution final : public Layer<T> {
public:
    // `channels` >= f.in is what the input's plane has; the output's has whole panels. `inner_step` is the multiplier's.
    Convolution(const Filters& f, std::int64_t channels, std::int64_t inner_step)
        : kernel_(f.kernel),
          channels_(channels),
          run_(round_up(f.kernel * channels, inner_step)),
          panels_(round_up(f.out, kPanel) / kPanel),
          packed_(panels_ * f.kernel * run_ * kPanel),
          bias_(panels_ * kPanel) {
        std::copy(f.bias, f.bias + f.out, bias_.data());
        const float* weight = f.weight;
        for (std::int64_t o = 0; o < f.out; ++o)
            for (std::int64_t i = 0; i < f.in; ++i)
                for (std::int64_t y = 0; y < kernel_; ++y)
                    for (std::int64_t x = 0; x < kernel_; ++x) {
                        T* panel = packed_.data() + o / kPanel * panel_stride();
                        detail::put(panel + packed_index(y * run_ + x * channels + i, o % kPanel), *weight++);
                    }
    }

    void operator()(const Multiplier<T>& multiplier, const Grid& grid, const T* in, T* out, const Team& team,
                    std::int64_t member, float*) const override {
        const Range blocks = team.share(grid.span / kTall, member);
        const std::int64_t reach = kernel_ / 2, row = grid.phases * grid.pitch * channels_;
        const std::int64_t out_channels = panels_ * kPanel;
        std::vector<Segment> rows;
        for (std::int64_t y = 0; y < kernel_; ++y) rows.push_back({(y - reach) * row, y * run_, run_});
        for (std::int64_t panel = 0; panel < panels_;) {
            const bool wide = panel + 1 < panels_;
            const std::int64_t step = wide ? kWide : kTall;
            const float* bias = bias_.data() + panel * kPanel;
            for (std::int64_t p = blocks.first * kTall; p < blocks.last * kTall; p += step) {
                const T* first = in + (grid.origin + p - reach) * channels_;
                const Product<T> product{first,          channels_,   packed_.data() + panel * panel_stride(),
                                         panel_stride(), rows.data(), kernel_};
                alignas(64) float c[kTall * kPanel];
                (wide ? multiplier.wide : multiplier.tall)(product, c);
                T* pixels = out + (grid.origin + p) * out_channels + panel * kPanel;
                const std::uint8_t* inside = grid.inside.data() + p;
                if (wide)
                    in_registers<detail::Finish<2>>(multiplier.registers, c, step, bias, inside, out_channels, pixels);
                else
                    in_registers<detail::Finish<1>>(multiplier.registers, c, step, bias, inside, out_channels, pixels);
            }
            panel += wide ? 2 : 1;
        }
    }

    static std::int64_t packed_index(std::int64_t k, std::int64_t column) {
        return sizeof(T) == 2 ? (k / 2 * kPanel + column) * 2 + k % 2 : k * kPanel + column;
    }

private:
    std::int64_t panel_stride() const { return kernel_ * run_ * kPanel; }

    std::int64_t kernel_, channels_, run_, panels_;
    Buffer<T> packed_;
    Buffer<float> bias_;
};

// Linear 1 x 1 convolution from a plane to maps: here the pixels are the columns of the product. Where the maps are
// finer than the plane, by `step`, channels (n, j, i) are pixels (step y + j, step x + i) of map n: pixel-shuffle.
template <typename T>
class Head {
public:
    Head(const Filters& f, std::int64_t channels, std::int64_t step, std::int64_t inner_step)
        : step_(step),
          channels_(channels),
          depth_(round_up(channels, inner_step)),
          weight_((f.out + kWide) * depth_),
          bias_(f.bias, f.bias + f.out) {
        for (std::int64_t o = 0; o < f.out; ++o)
            for (std::int64_t i = 0; i < f.in; ++i)
                detail::put(weight_.data() + o * depth_ + i, f.weight[o * f.in + i]);
    }

    // Calls emit(n, y, x, values, count) for all lines of some maps.
    template <typename Emit>
    void operator()(const Multiplier<T>& multiplier, const Grid& grid, const T* in, Range maps, Emit emit) const {
        const Segment all{0, 0, depth_};
        const std::int64_t block = kWide / step_ * step_;  // of channels: the parts of a line together
        const std::int64_t first = maps.first * step_ * step_, last = maps.last * step_ * step_;
        Buffer<T> panels(kWide * depth_);
        Buffer<float> line(kWide * step_);
        for (std::int64_t y = 0; y < grid.height; ++y)
            for (std::int64_t x = 0; x < grid.width; x += kWide) {
                pack(grid, in, y, x, panels.data());
                for (std::int64_t o = first; o < last; o += block) {
                    const Product<T> product{
                        weight_.data() + o * depth_, depth_, panels.data(), kPanel * depth_, &all, 1};
                    alignas(64) float c[kWide * kWide];
                    multiplier.wide(product, c);
                    for (std::int64_t i = o; i < std::min(o + block, last); i += step_) {
                        detail::interleave(c + (i - o) * kWide, bias_.data() + i, step_, line.data());
                        emit(i / (step_ * step_), y * step_ + i / step_ % step_, x * step_, line.data(),
                             std::min(kWide, grid.width - x) * step_);
                    }
                }
            }
    }

private:
    void pack(const Grid& grid, const T* in, std::int64_t y, std::int64_t x, T* panels) const {
        const void* pixels[kWide];
        for (std::int64_t i = 0; i < kWide; ++i) {
            const std::int64_t column = std::min(x + i, grid.width - 1);
            pixels[i] = in + (grid.origin + grid.position(y, column)) * channels_;
        }
        const std::int64_t words = channels_ * static_cast<std::int64_t>(sizeof(T)) / 4;
        detail::transpose16(pixels, words, panels);
        detail::transpose16(pixels + kPanel, words, panels + kPanel * depth_);
    }

    std::int64_t step_, channels_, depth_;
    Buffer<T> weight_;
    std::vector<float> bias_;
};

}  // namespace lgcn
