// NumPy arrays as the native functions take them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "gaussian_sum.hpp"
#include "matrix.hpp"
#include "peaks.hpp"
#include "votes.hpp"

namespace py = pybind11;

// Without forcecast: a dtype that would lose something is the caller's mistake, not something to copy silently. What lies
// at odd addresses, as behind a header in a buffer, is copied.
template <typename T>
using Array = py::array_t<T, py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_>;
using Heatmaps = Array<float>;
using Points = Array<double>;
using Offsets = Array<std::int64_t>;

// The shape of an array as NumPy writes it, for messages.
inline std::string shape_of(const py::array& array) { return py::str(array.attr("shape")); }

struct Batch {
    const float* data;
    py::ssize_t faces, landmarks, height, width;

    explicit Batch(const Heatmaps& heatmaps) {
        if (heatmaps.ndim() != 4) {
            throw py::value_error("heatmaps: expected (B, N, H, W), got " + shape_of(heatmaps));
        }
        faces = heatmaps.shape(0);
        landmarks = heatmaps.shape(1);
        height = heatmaps.shape(2);
        width = heatmaps.shape(3);
        if (height == 0 || width == 0) {
            throw py::value_error("heatmaps: expected at least one pixel, got " + std::to_string(height) + " x " +
                                  std::to_string(width));
        }
        data = heatmaps.data();
    }

    std::int64_t count() const { return faces * landmarks; }
    std::int64_t pixels() const { return height * width; }
    lgcn::Heatmap map(std::int64_t i) const { return {data + i * height * width, height, width}; }
};

inline const double* checked_centres(const Points& centres, const Batch& batch) {
    if (centres.ndim() != 3 || centres.shape(0) != batch.faces || centres.shape(1) != batch.landmarks ||
        centres.shape(2) != 2) {
        throw py::value_error("centres: expected (" + std::to_string(batch.faces) + ", " +
                              std::to_string(batch.landmarks) + ", 2), one point for each heatmap, got " +
                              shape_of(centres));
    }
    const double* data = centres.data();
    if (!std::all_of(data, data + centres.size(), [](double v) { return std::isfinite(v); })) {
        throw py::value_error("centres: expected finite coordinates, got NaN or infinity");
    }
    return data;
}

// Calls use with the matrix products of an instruction set.
template <typename Use>
void with_multiplier(const std::string& name, const Use& use) {
    const std::vector<std::string>& known = lgcn::instruction_sets();
    lgcn::Multiplier<float> fp32;
    lgcn::Multiplier<lgcn::Bf16> bf16;
    if (std::find(known.begin(), known.end(), name) == known.end()) {
        throw py::value_error("instructions: expected one of INSTRUCTION_SETS, got '" + name + "'");
    }
    if (lgcn::find_multiplier(name, bf16))
        use(bf16);
    else if (lgcn::find_multiplier(name, fp32))
        use(fp32);
}

inline lgcn::Taps checked_taps(const Points& taps) {
    if (taps.ndim() != 2 || taps.shape(0) == 0 || taps.shape(1) % 2 == 0) {
        throw py::value_error("taps: expected (S, kernel_size) with an odd size, got " + shape_of(taps));
    }
    return {taps.data(), taps.shape(0), taps.shape(1)};
}

inline lgcn::Ballot checked_ballot(const Offsets& offsets, const std::vector<std::int64_t>& voters, std::int64_t step,
                                   std::int64_t landmarks) {
    if (offsets.ndim() != 3 || offsets.shape(1) != landmarks || offsets.shape(2) != 2)
        throw py::value_error("offsets: expected (S, " + std::to_string(landmarks) + ", 2), got " + shape_of(offsets));
    const auto unknown =
        std::find_if(voters.begin(), voters.end(), [&](std::int64_t i) { return i < 0 || i >= landmarks; });
    if (unknown != voters.end())
        throw py::value_error("voters: expected landmarks from 0 to " + std::to_string(landmarks - 1) + ", got " +
                              std::to_string(*unknown));
    constexpr std::int64_t largest = std::int64_t{1} << 31;  // so that nothing overflows
    const std::int64_t* data = offsets.data();
    if (std::any_of(data, data + offsets.size(), [&](std::int64_t v) { return v < -largest || v > largest; }))
        throw py::value_error("offsets: expected numbers of pixels, got one beyond 2^31");
    if (step < 1) throw py::value_error("step: expected at least 1, got " + std::to_string(step));
    return {offsets.data(), offsets.shape(0), landmarks, voters, step};
}
