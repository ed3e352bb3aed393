// Convolutions of 3 x 3 and 5 x 5 with fewer multiplications (Winograd; Lavin and Gray, "Fast algorithms for
// convolutional neural networks", 2015). Tiles of 6 x 6 pixels give 4 x 4 or 2 x 2 results for 36 products each, where
// the sum over the filter's taps takes 144 or 100.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "convolution.hpp"
#include "matrix.hpp"
#include "planes.hpp"
#include "simd.hpp"
#include "threads.hpp"

namespace lgcn {

namespace detail {

constexpr int kTile = 6, kProducts = kTile * kTile;

// The transforms evaluate polynomials at 0, a, -a, b, -b and infinity. With a = 1 / sqrt(2) and b = 1 / a, rounding errors
// are less than twice those of the sum over the taps; with the usual 1 and 2 five times. In bf16, where the tiles are
// rounded once more, they are four times as large.
constexpr float kA = 0.70710678f, kB = 1.41421356f;

// Six values of a line to the values that are multiplied.
template <typename Vector>
[[gnu::always_inline]] inline void transform_input(const Vector* d, std::int64_t step, Vector* v) {
    const Vector d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
    const Vector even_a = d4 - 2.0f * d2, odd_a = kA * d3 - kB * d1;
    const Vector even_b = d4 - 0.5f * d2, odd_b = kB * d3 - kA * d1;
    v[0] = d[0] - 2.5f * d2 + d4;
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = d1 - 2.5f * d3 + d[5 * step];
}

// Six products to kOut results of a line.
template <int kOut, typename Vector>
[[gnu::always_inline]] inline void transform_output(const Vector* m, std::int64_t step, Vector* y) {
    const Vector m1 = m[step], m2 = m[2 * step], m3 = m[3 * step], m4 = m[4 * step];
    const Vector even_a = m1 + m2, odd_a = kA * (m1 - m2), even_b = m3 + m4, odd_b = kB * (m3 - m4);
    y[0] = m[0] + even_a + even_b;
    y[1] = odd_a + odd_b;
    if constexpr (kOut == 4) {
        y[2] = 0.5f * even_a + 2.0f * even_b;
        y[3] = 0.5f * odd_a + 2.0f * odd_b;
    }
    y[kOut - 1] += m[5 * step];
}

// A tile of some channels: pixels of a plane, `row` and `channels` elements apart, to factors, `stride` elements apart.
struct TileInput {
    template <typename Vector, typename T>
    [[gnu::always_inline]] static void run(const T* in, std::int64_t row, std::int64_t channels, T* out,
                                           std::int64_t stride) {
        for (std::int64_t c = 0; c < channels; c += kLanesOf<Vector>) {
            Vector columns[kProducts], products[kTile];
#pragma GCC unroll 6
            for (int x = 0; x < kTile; ++x) {
                Vector pixels[kTile];
#pragma GCC unroll 6
                for (int y = 0; y < kTile; ++y) pixels[y] = get<Vector>(in + y * row + x * channels + c);
                transform_input(pixels, 1, columns + x * kTile);
            }
#pragma GCC unroll 6
            for (int y = 0; y < kTile; ++y) {
                transform_input(columns + y, kTile, products);
#pragma GCC unroll 6
                for (int x = 0; x < kTile; ++x) put(out + (y * kTile + x) * stride + c, products[x]);
            }
        }
    }
};

// A tile of 16 channels: products, `stride` floats apart, to pixels of a plane, of which the first `rows` and `columns` are
// in the image; bias and ReLU.
template <int kOut>
struct TileOutput {
    template <typename Vector, typename T>
    [[gnu::always_inline]] static void run(const float* products, std::int64_t stride, const float* bias, T* out,
                                           std::int64_t row, std::int64_t channels, std::int64_t rows,
                                           std::int64_t columns) {
        for (std::int64_t c = 0; c < kPanel; c += kLanesOf<Vector>) {
            Vector lines[kOut * kTile], pixels[kOut];
#pragma GCC unroll 6
            for (int x = 0; x < kTile; ++x) {
                Vector m[kTile];
#pragma GCC unroll 6
                for (int y = 0; y < kTile; ++y) m[y] = load<Vector>(products + (y * kTile + x) * stride + c);
                transform_output<kOut>(m, 1, lines + x * kOut);
            }
            const Vector offset = load<Vector>(bias + c);
            for (std::int64_t y = 0; y < rows; ++y) {
                transform_output<kOut>(lines + y, kOut, pixels);
                for (std::int64_t x = 0; x < columns; ++x) {
                    const Vector sum = pixels[x] + offset;
                    put(out + y * row + x * channels + c, sum <= 0 ? Vector{} : sum);  // NaN stays
                }
            }
        }
    }
};

}  // namespace detail

template <typename T>
class Winograd final : public Layer<T> {
public:
    // Whether it can take the place of a `Convolution`, and is worth it.
    static bool fits(const Filters& f, std::int64_t channels) {
        return (f.kernel == 3 || f.kernel == 5) && channels % kPanel == 0;
    }

    Winograd(const Filters& f, std::int64_t channels)
        : kernel_(f.kernel),
          channels_(channels),
          panels_(round_up(f.out, kPanel) / kPanel),
          packed_(detail::kProducts * panels_ * panel_stride()),
          bias_(panels_ * kPanel) {
        std::copy(f.bias, f.bias + f.out, bias_.data());
        for (std::int64_t o = 0; o < f.out; ++o)
            for (std::int64_t i = 0; i < f.in; ++i) pack(f.weight + (o * f.in + i) * kernel_ * kernel_, o, i);
    }

    std::int64_t scratch() const override {
        return detail::kProducts * (kBlock * (channels_ + panels_ * kPanel) + 2 * kSkew);  // enough for bf16, too
    }

    void operator()(const Multiplier<T>& multiplier, const Grid& grid, const T* in, T* out, const Team& team,
                    std::int64_t member, float* scratch) const override {
        const std::int64_t side = detail::kTile - kernel_ + 1;
        const Tiles tiles(grid, side);
        const Range groups = team.share(round_up(tiles.count, kRowGroup) / kRowGroup, member);
        const std::int64_t last = std::min(groups.last * kRowGroup, tiles.count);
        for (std::int64_t first = groups.first * kRowGroup; first < last; first += kBlock)
            run_block(multiplier, grid, tiles, {first, std::min(first + kBlock, last)}, in, out, scratch);
    }

private:
    static constexpr std::int64_t kBlock = 36;  // tiles at a time: what is between the transforms stays in the cache
    // Floats between products, which else compete for a few lines of the cache.
    static constexpr std::int64_t kSkew = 16;

    // The tiles of a plane. Of a dilated convolution each phase, of rows and of columns, is an image of its own.
    struct Tiles {
        Tiles(const Grid& grid, std::int64_t side)
            : side(side),
              phases(grid.phases),
              across((grid.width + side * phases - 1) / (side * phases)),
              down((grid.height + side * phases - 1) / (side * phases)),
              count(across * down * phases * phases) {}
        // First row and column of a tile.
        std::int64_t y(std::int64_t tile) const { return tile / across % down * side * phases + row_phase(tile); }
        std::int64_t x(std::int64_t tile) const {
            return tile % across * side * phases + tile / (across * down) % phases;
        }
        std::int64_t row_phase(std::int64_t tile) const { return tile / (across * down * phases); }

        std::int64_t side, phases, across, down, count;
    };

    void run_block(const Multiplier<T>& multiplier, const Grid& grid, const Tiles& tiles, Range block, const T* in,
                   T* out, float* scratch) const {
        const std::int64_t rows = round_up(block.last - block.first, kRowGroup), reach = kernel_ / 2;
        const std::int64_t step = grid.phases * grid.pitch;  // from a row of a tile to the next
        const std::int64_t panel_results = rows * kPanel;
        const std::int64_t next_input = rows * channels_ + kSkew, next_product = panels_ * panel_results + kSkew;
        T* inputs = reinterpret_cast<T*>(scratch);
        float* products = scratch + detail::kProducts * next_input * static_cast<std::int64_t>(sizeof(T)) / 4;
        for (std::int64_t t = block.first; t < block.last; ++t) {
            const std::int64_t corner = grid.origin + grid.position(tiles.y(t), tiles.x(t)) - reach * (step + 1);
            in_registers<detail::TileInput>(multiplier.registers, in + corner * channels_, step * channels_, channels_,
                                            inputs + (t - block.first) * channels_, next_input);
        }
        const Segment all{0, 0, channels_};
        for (std::int64_t i = 0; i < detail::kProducts; ++i) {
            const Product<T> product{inputs + i * next_input, channels_, packed_.data() + i * panels_ * panel_stride(),
                                     panel_stride(),          &all,      1};
            multiplier.panels(product, rows, panels_, products + i * next_product);
        }
        for (std::int64_t t = block.first; t < block.last; ++t) {
            const std::int64_t y = tiles.y(t), x = tiles.x(t), out_channels = panels_ * kPanel;
            const std::int64_t rows_inside = std::min(tiles.side, (grid.height - y + grid.phases - 1) / grid.phases);
            const std::int64_t columns_inside = std::min(tiles.side, (grid.width - x + grid.phases - 1) / grid.phases);
            T* pixels = out + (grid.origin + grid.position(y, x)) * out_channels;
            for (std::int64_t panel = 0; panel < panels_; ++panel) {
                const float* results = products + panel * panel_results + (t - block.first) * kPanel;
                const auto finish = [&](auto tile_output) {
                    in_registers<decltype(tile_output)>(multiplier.registers, results, next_product,
                                                        bias_.data() + panel * kPanel, pixels + panel * kPanel,
                                                        step * out_channels, out_channels, rows_inside, columns_inside);
                };
                kernel_ == 3 ? finish(detail::TileOutput<4>()) : finish(detail::TileOutput<2>());
            }
        }
    }

    // The transform of a filter: its polynomial's values at the points, over what the other transforms leave out.
    void pack(const float* weight, std::int64_t out, std::int64_t in) {
        static const double a = std::sqrt(0.5), b = 2 * a, points[] = {0, a, -a, b, -b};
        static const double scales[] = {1, -2 / 3.0, -2 / 3.0, 1 / 6.0, 1 / 6.0};
        const auto evaluate = [&](const double* taps, double* values) {
            for (int i = 0; i < 5; ++i) {
                double sum = 0;
                for (std::int64_t tap = kernel_; tap-- > 0;) sum = sum * points[i] + taps[tap];
                values[i] = scales[i] * sum;
            }
            values[5] = taps[kernel_ - 1];
        };
        double rows[5][detail::kTile], column[5], values[detail::kTile];
        for (std::int64_t y = 0; y < kernel_; ++y) {
            std::copy(weight + y * kernel_, weight + (y + 1) * kernel_, column);
            evaluate(column, rows[y]);
        }
        for (int x = 0; x < detail::kTile; ++x) {
            for (std::int64_t y = 0; y < kernel_; ++y) column[y] = rows[y][x];
            evaluate(column, values);
            for (int y = 0; y < detail::kTile; ++y) {
                const std::int64_t panel = (y * detail::kTile + x) * panels_ + out / kPanel;
                detail::put(packed_.data() + panel * panel_stride() + Convolution<T>::packed_index(in, out % kPanel),
                            static_cast<float>(values[y]));
            }
        }
    }

    std::int64_t panel_stride() const { return channels_ * kPanel; }

    std::int64_t kernel_, channels_, panels_;
    Buffer<T> packed_;
    Buffer<float> bias_;
};

// The fastest way to run a layer.
template <typename T>
std::unique_ptr<Layer<T>> make_layer(const Multiplier<T>& multiplier, const Filters& f, std::int64_t channels) {
    if (multiplier.panels && Winograd<T>::fits(f, channels)) return std::make_unique<Winograd<T>>(f, channels);
    return std::make_unique<Convolution<T>>(f, channels, multiplier.inner_step);
}

}  // namespace lgcn
