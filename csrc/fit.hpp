// The fit of section 3.3: heatmaps to landmarks by weighted least squares with a shape model. The reference, with the
// equations, is lgcn_fast/fitting.py.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "peaks.hpp"

namespace lgcn {

// The constants of lgcn_fast/fitting.py, in pixels of the image, and the face size at which one fills the heatmap.
struct FitOptions {
    std::vector<double> radii;  // of the windows of the rounds behind the first, which sees all pixels
    double certain, noise, trust, size_spread, shift_spread, threshold, nominal_size;
    std::int64_t fallback;
};

struct FitResult {  // of one face
    double *points, *shapes, *coefficients, *certainties, *residual;
};

namespace detail {

// sums += scale * values
LGCN_EVERY_SIMD inline void add_scaled(double scale, const double* values, std::int64_t count, double* sums) {
    for (std::int64_t i = 0; i < count; ++i) sums[i] += scale * values[i];
}

// Solves a x = x in place by Cholesky's algorithm; a: (count, count), symmetric and positive definite, its lower half.
inline void solve(double* a, double* x, std::int64_t count) {
    for (std::int64_t j = 0; j < count; ++j) {
        for (std::int64_t i = j; i < count; ++i) {
            double sum = a[i * count + j];
            for (std::int64_t k = 0; k < j; ++k) sum -= a[i * count + k] * a[j * count + k];
            a[i * count + j] = i == j ? std::sqrt(sum) : sum / a[j * count + j];
        }
        double sum = x[j];
        for (std::int64_t k = 0; k < j; ++k) sum -= a[j * count + k] * x[k];
        x[j] = sum / a[j * count + j];
    }
    for (std::int64_t j = count - 1; j >= 0; --j) {
        for (std::int64_t k = j + 1; k < count; ++k) x[j] -= a[k * count + j] * x[k];
        x[j] /= a[j * count + j];
    }
}

}  // namespace detail

class Fitter {
public:
    // basis: (parameters, landmarks, 2), the mean shape first; variances: (parameters - 4,).
    Fitter(const double* basis, const double* variances, std::int64_t parameters, std::int64_t landmarks,
           const FitOptions& options)
        : options_(options),
          count_(parameters),
          landmarks_(landmarks),
          basis_(basis, basis + parameters * landmarks * 2),
          variances_(variances, variances + parameters - 4),
          products_(static_cast<std::size_t>(landmarks * parameters * parameters)) {
        for (std::int64_t i = 0; i < landmarks; ++i)
            for (std::int64_t p = 0; p < parameters; ++p)
                for (std::int64_t q = 0; q < parameters; ++q) {
                    const double *a = row(p) + 2 * i, *b = row(q) + 2 * i;
                    products_[static_cast<std::size_t>((i * parameters + p) * parameters + q)] =
                        a[0] * b[0] + a[1] * b[1];
                }
    }

    std::int64_t landmarks() const { return landmarks_; }
    std::int64_t modes() const { return count_ - 4; }

    // What a heatmap says of its landmark.
    struct Evidence {
        Peak peak;
        Moments moments;
    };

    // What needs all pixels, in one pass over the heatmap.
    Evidence look(const Heatmap& map) const {
        const auto threshold = static_cast<float>(options_.threshold);
        return {peak_centroid(map), window_moments(map, 0, map.height, 0, map.width, threshold)};
    }

    // maps: the first of the face's (landmarks, height, width); evidence: of each, is changed; stride: side of their
    // pixels in pixels of the image.
    void fit(const Heatmap& maps, Evidence* evidence, double stride, const FitResult& result) const {
        const auto map = [&](std::int64_t i) { return maps.neighbour(i); };
        const auto threshold = static_cast<float>(options_.threshold);
        Guess guess = first_guess(evidence, static_cast<double>(std::max(maps.height, maps.width)));
        std::vector<double> theta(static_cast<std::size_t>(count_));
        for (std::size_t round = 0; round <= options_.radii.size(); ++round) {
            if (round > 0)
                for (std::int64_t i = 0; i < landmarks_; ++i)
                    evidence[i].moments = window_moments(map(i), result.shapes[2 * i], result.shapes[2 * i + 1],
                                                         options_.radii[round - 1] / stride, threshold);
            solve(guess, maps, evidence, stride, theta.data());
            place(guess, theta.data(), result.shapes);
            for (std::int64_t k = 0; k < count_ - 4; ++k)
                result.coefficients[k] = theta[static_cast<std::size_t>(4 + k)] / (guess.size * deviation(k));
            const double size = std::hypot(theta[0], theta[1]), cos = theta[0] / size, sin = theta[1] / size;
            guess = {guess.cos * cos - guess.sin * sin, guess.sin * cos + guess.cos * sin, size};
        }
        double total = 0, squared = 0;
        for (std::int64_t i = 0; i < landmarks_; ++i) {
            const double x = result.shapes[2 * i], y = result.shapes[2 * i + 1];
            const Peak peak = nearest_peak(map(i), x, y, threshold);
            const double dx = peak.x - x, dy = peak.y - y;
            // A maximum outside the last window is a false one, however high.
            const bool near = std::max(std::abs(dx), std::abs(dy)) <= options_.radii.back() / stride;
            const double certainty = near ? std::clamp<double>(peak.value, 0, 1) : 0;
            total += certainty;
            squared += certainty * (dx * dx + dy * dy);
            result.certainties[i] = certainty;
            result.points[2 * i] = x + options_.trust * certainty * dx;
            result.points[2 * i + 1] = y + options_.trust * certainty * dy;
        }
        *result.residual =
            total > 0 ? std::sqrt(squared / total) / guess.size : std::numeric_limits<double>::infinity();
    }

private:
    // Where a face is thought to be: rotation of the shape model's frame against the image, size.
    struct Guess {
        double cos, sin, size;
    };

    const double* row(std::int64_t p) const { return basis_.data() + p * landmarks_ * 2; }

    double deviation(std::int64_t mode) const { return std::sqrt(variances_[static_cast<std::size_t>(mode)]); }

    // Rotation and size by Kabsch's algorithm from the certain maxima, or the best where fewer than two are.
    Guess first_guess(const Evidence* evidence, double side) const {
        std::vector<float> values(static_cast<std::size_t>(landmarks_));
        for (std::int64_t i = 0; i < landmarks_; ++i) values[static_cast<std::size_t>(i)] = evidence[i].peak.value;
        const auto rank = values.begin() + (std::min(options_.fallback, landmarks_) - 1);
        std::nth_element(values.begin(), rank, values.end(), std::greater<float>());
        double least = options_.certain;
        if (std::count_if(evidence, evidence + landmarks_, [&](const Evidence& e) { return e.peak.value >= least; }) <
            2)
            least = *rank;
        const double* mean = row(0);
        std::array<double, 4> centre{};  // of the maxima, of the mean shape
        double count = 0, along = 0, across = 0, spread = 0;
        const auto each_chosen = [&](const auto& use) {
            for (std::int64_t i = 0; i < landmarks_; ++i)
                if (evidence[i].peak.value >= least) use(evidence[i].peak, mean[2 * i], mean[2 * i + 1]);
        };
        each_chosen([&](const Peak& p, double x, double y) {
            centre = {centre[0] + p.x, centre[1] + p.y, centre[2] + x, centre[3] + y};
            count += 1;
        });
        for (double& sum : centre) sum /= count;
        each_chosen([&](const Peak& p, double mean_x, double mean_y) {
            const double x = p.x - centre[0], y = p.y - centre[1];
            const double from_x = mean_x - centre[2], from_y = mean_y - centre[3];
            along += from_x * x + from_y * y;
            across += from_x * y - from_y * x;
            spread += from_x * from_x + from_y * from_y;
        });
        const double length = std::hypot(along, across), nominal = side * options_.nominal_size;
        const double size = std::clamp(length / (spread > 0 ? spread : 1), nominal / 4, nominal * 2);
        return length > 1e-9 ? Guess{along / length, across / length, size} : Guess{1, 0, size};
    }

    // The normal equations of a round.
    void solve(const Guess& guess, const Heatmap& maps, const Evidence* evidence, double stride, double* theta) const {
        const double x = static_cast<double>(maps.width - 1) / 2, y = static_cast<double>(maps.height - 1) / 2;
        const double prior[4] = {guess.size, 0, guess.cos * x + guess.sin * y, guess.cos * y - guess.sin * x};
        const double shift = options_.shift_spread * static_cast<double>(std::max(maps.height, maps.width));
        std::vector<double> left(static_cast<std::size_t>(count_ * count_));
        for (std::int64_t p = 0; p < count_; ++p) {
            const double spread = p < 2   ? options_.size_spread * guess.size
                                  : p < 4 ? shift
                                          : guess.size * deviation(p - 4);
            // Square pixels times a sum over pixels: both are fewer by the square of the stride.
            const double precision = options_.noise / (spread * spread) / std::pow(stride, 4);
            left[static_cast<std::size_t>(p * count_ + p)] = precision;
            theta[p] = p < 4 ? precision * prior[p] : 0;
        }
        for (std::int64_t i = 0; i < landmarks_; ++i) {
            const Moments& m = evidence[i].moments;
            detail::add_scaled(m.w2, products_.data() + i * count_ * count_, count_ * count_, left.data());
            const double along = guess.cos * m.w2x + guess.sin * m.w2y, across = guess.cos * m.w2y - guess.sin * m.w2x;
            for (std::int64_t p = 0; p < count_; ++p) theta[p] += row(p)[2 * i] * along + row(p)[2 * i + 1] * across;
        }
        detail::solve(left.data(), theta, count_);
    }

    // Points in the image.
    void place(const Guess& guess, const double* theta, double* shape) const {
        for (std::int64_t i = 0; i < landmarks_; ++i) {
            double x = 0, y = 0;
            for (std::int64_t p = 0; p < count_; ++p) {
                x += theta[p] * row(p)[2 * i];
                y += theta[p] * row(p)[2 * i + 1];
            }
            shape[2 * i] = guess.cos * x - guess.sin * y;
            shape[2 * i + 1] = guess.sin * x + guess.cos * y;
        }
    }

    FitOptions options_;
    std::int64_t count_, landmarks_;
    std::vector<double> basis_, variances_, products_;
};

}  // namespace lgcn
