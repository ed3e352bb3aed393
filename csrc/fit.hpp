// The fit of section 3.3 on a CPU: kernels/fit_face.hpp with one thread a face.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "fit_face.hpp"
#include "peaks.hpp"

namespace lgcn {

// One thread, with SIMD for the steps that take its time: the overloads below.
struct Alone {
    static constexpr int lane() { return 0; }
    static constexpr int lanes() { return 1; }
    static constexpr int team() { return 0; }
    static constexpr int teams() { return 1; }
    static constexpr int rank() { return 0; }
    static constexpr int size() { return 1; }
    static void sync() {}
    template <int count>
    static void sum(double (&)[count]) {}
    static double least(double value) { return value; }
};

LGCN_EVERY_SIMD inline void combine(const Alone&, const double* weights, Index count, const double* rows, Index width,
                                    double* sums) {
    std::fill(sums, sums + width, 0.0);
    for (Index row = 0; row < count; ++row)
        for (Index i = 0; i < width; ++i) sums[i] += weights[row] * rows[row * width + i];
}

inline void project(const Alone& alone, const FitModel& model, const double* turned, double* right) {
    combine(alone, turned, 2 * model.landmarks, model.transposed, model.parameters, right);
}

inline Moments window_moments(const Alone&, const Heatmap& map, const Window& window, float threshold) {
    return window_moments(map, window, threshold);
}

class Fitter {
public:
    using Evidence = lgcn::Evidence<double>;

    // basis: (parameters, landmarks, 2), the mean shape first; variances: (parameters - 4,); radii: of the windows of
    // the rounds behind the first, at least one.
    Fitter(const double* basis, const double* variances, std::int64_t parameters, std::int64_t landmarks,
           const std::vector<double>& radii, const FitOptions& options)
        : landmarks_(landmarks), parameters_(parameters), windows_(static_cast<std::int64_t>(radii.size())) {
        constants_ = {options.certain,      options.fallback,     options.noise,
                      options.peak_radius,  options.largest_move, options.size_spread,
                      options.shift_spread, options.threshold,    options.nominal_size};
        constants_.reserve(static_cast<std::size_t>(model().constants()));
        const auto add = [&](double value) { constants_.push_back(value); };
        std::for_each(radii.begin(), radii.end(), add);
        for (std::int64_t k = 0; k < modes(); ++k) add(std::sqrt(variances[k]));
        std::for_each(basis, basis + parameters * landmarks * 2, add);
        const auto at = [&](std::int64_t p, std::int64_t column) { return basis[p * landmarks * 2 + column]; };
        for (std::int64_t column = 0; column < landmarks * 2; ++column)
            for (std::int64_t p = 0; p < parameters; ++p) add(at(p, column));
        for (std::int64_t i = 0; i < landmarks; ++i)
            for (std::int64_t p = 0; p < parameters; ++p)
                for (std::int64_t q = 0; q <= p; ++q)
                    add(at(p, 2 * i) * at(q, 2 * i) + at(p, 2 * i + 1) * at(q, 2 * i + 1));
    }

    std::int64_t landmarks() const { return landmarks_; }
    std::int64_t modes() const { return parameters_ - 4; }
    std::int64_t windows() const { return windows_; }
    const std::vector<double>& constants() const { return constants_; }
    FitModel model() const { return FitModel(constants_.data(), landmarks_, parameters_, windows_); }

    // What needs all pixels of the heatmap.
    Evidence look(const Heatmap& map) const {
        const Peak peak = peak_centroid(map, 0);
        const auto threshold = static_cast<float>(model().options->threshold);
        const Moments moments = window_moments(map, Window{0, map.height, 0, map.width}, threshold);
        return {peak.x, peak.y, peak.value, moments.w2, moments.w2x, moments.w2y};
    }

    // maps: the first of the face's (landmarks, height, width); evidence: of each; stride: side of their pixels in
    // pixels of the image.
    void fit(const Heatmap& maps, const Evidence* evidence, double stride, const FitResult<double>& result) const {
        std::vector<double> workspace(static_cast<std::size_t>(model().workspace()));
        fit_face(Alone{}, model(), maps, evidence, stride, workspace.data(), result);
    }

private:
    std::int64_t landmarks_, parameters_, windows_;
    std::vector<double> constants_;  // see FitModel
};

}  // namespace lgcn
