// The Python module lgcn_fast_kernels._native.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "peaks.hpp"

namespace py = pybind11;

// c_style without forcecast: another dtype is the caller's mistake, not something to copy silently.
using Heatmaps = py::array_t<float, py::array::c_style>;

static py::tuple peak_centroids(const Heatmaps& heatmaps, int num_threads) {
    if (heatmaps.ndim() != 4) {
        throw py::value_error("heatmaps: expected (B, N, H, W), got " + std::to_string(heatmaps.ndim()) + " dimensions");
    }
    const py::ssize_t batch = heatmaps.shape(0), channels = heatmaps.shape(1);
    const py::ssize_t height = heatmaps.shape(2), width = heatmaps.shape(3);
    if (height == 0 || width == 0) {
        throw py::value_error("heatmaps: expected at least one pixel, got " + std::to_string(height) + " x " +
                              std::to_string(width));
    }
    py::array_t<float> points({batch, channels, py::ssize_t{2}});
    py::array_t<float> values({batch, channels});
    const float* source = heatmaps.data();
    float* points_data = points.mutable_data();
    float* values_data = values.mutable_data();
    {
        py::gil_scoped_release unlocked;
        lgcn::peak_centroids(source, batch * channels, height, width, num_threads, points_data, values_data);
    }
    return py::make_tuple(points, values);
}

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native functions of lgcn_fast.";
    module.def("peak_centroids", &peak_centroids, py::arg("heatmaps").noconvert(), py::arg("num_threads") = 0);
}
