// The Python module lgcn_fast_kernels._native: the functions of peaks.hpp on batches of heatmaps (B, N, H, W).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "gaussian_sum.hpp"
#include "peaks.hpp"

namespace py = pybind11;

// c_style without forcecast: another dtype is the caller's mistake, not something to copy silently.
using Heatmaps = py::array_t<float, py::array::c_style>;
using Points = py::array_t<double, py::array::c_style>;

namespace {

struct Batch {
    const float* data;
    py::ssize_t faces, landmarks, height, width;

    explicit Batch(const Heatmaps& heatmaps) {
        if (heatmaps.ndim() != 4) {
            throw py::value_error("heatmaps: expected (B, N, H, W), got " + std::to_string(heatmaps.ndim()) +
                                  " dimensions");
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

const double* checked_points(const Points& points, const Batch& batch, const char* name) {
    if (points.ndim() != 3 || points.shape(0) != batch.faces || points.shape(1) != batch.landmarks ||
        points.shape(2) != 2) {
        throw py::value_error(std::string(name) + ": expected (" + std::to_string(batch.faces) + ", " +
                              std::to_string(batch.landmarks) + ", 2), one point for each heatmap");
    }
    const double* data = points.data();
    if (!std::all_of(data, data + points.size(), [](double v) { return std::isfinite(v); })) {
        throw py::value_error(std::string(name) + ": expected finite coordinates, got NaN or infinity");
    }
    return data;
}

// Runs find(i) -> Peak for every heatmap, without the GIL.
template <typename Find>
py::tuple peaks(const Batch& batch, std::int64_t pixels, int num_threads, const Find& find) {
    py::array_t<float> points({batch.faces, batch.landmarks, py::ssize_t{2}});
    py::array_t<float> values({batch.faces, batch.landmarks});
    float* points_data = points.mutable_data();
    float* values_data = values.mutable_data();
    {
        py::gil_scoped_release unlocked;
        lgcn::parallel_for(batch.count(), pixels, num_threads, [&](std::int64_t i) {
            const lgcn::Peak peak = find(i);
            points_data[2 * i] = peak.x;
            points_data[2 * i + 1] = peak.y;
            values_data[i] = peak.value;
        });
    }
    return py::make_tuple(points, values);
}

py::tuple peak_centroids(const Heatmaps& heatmaps, int num_threads) {
    const Batch batch(heatmaps);
    return peaks(batch, batch.pixels(), num_threads, [&](std::int64_t i) { return lgcn::peak_centroid(batch.map(i)); });
}

py::tuple nearest_peaks(const Heatmaps& heatmaps, const Points& targets, float threshold, int num_threads) {
    const Batch batch(heatmaps);
    const double* target = checked_points(targets, batch, "targets");
    // Where there is a peak nearby, few pixels are looked at.
    return peaks(batch, batch.pixels() / 8, num_threads, [&](std::int64_t i) {
        return lgcn::nearest_peak(batch.map(i), target[2 * i], target[2 * i + 1], threshold);
    });
}

py::tuple local_maxima(const Heatmaps& heatmaps, float threshold, int num_threads) {
    const Batch batch(heatmaps);
    std::vector<std::vector<lgcn::Peak>> found(static_cast<std::size_t>(batch.count()));
    {
        py::gil_scoped_release unlocked;
        lgcn::parallel_for(batch.count(), batch.pixels(), num_threads, [&](std::int64_t i) {
            const lgcn::Heatmap map = batch.map(i);
            lgcn::for_each_local_maximum(map, threshold, [&](std::int64_t y, std::int64_t x) {
                found[static_cast<std::size_t>(i)].push_back(lgcn::centroid(map, y, x));
            });
        });
    }
    py::ssize_t total = 0;
    for (const auto& peaks_of_map : found) total += static_cast<py::ssize_t>(peaks_of_map.size());
    py::array_t<std::int64_t> maps({total, py::ssize_t{2}});
    py::array_t<float> points({total, py::ssize_t{2}});
    py::array_t<float> values(total);
    std::int64_t* map_out = maps.mutable_data();
    float* point_out = points.mutable_data();
    float* value_out = values.mutable_data();
    for (std::size_t i = 0; i < found.size(); ++i)
        for (const lgcn::Peak& peak : found[i]) {
            *map_out++ = static_cast<std::int64_t>(i) / batch.landmarks;
            *map_out++ = static_cast<std::int64_t>(i) % batch.landmarks;
            *point_out++ = peak.x;
            *point_out++ = peak.y;
            *value_out++ = peak.value;
        }
    return py::make_tuple(maps, points, values);
}

py::array_t<double> window_moments(const Heatmaps& heatmaps, const std::optional<Points>& centres, double radius,
                                   float threshold, int num_threads) {
    const Batch batch(heatmaps);
    const double* centre = centres ? checked_points(*centres, batch, "centres") : nullptr;
    if (!(radius >= 0)) throw py::value_error("radius: expected 0 or more pixels, got " + std::to_string(radius));
    const double side = 2 * radius + 1;
    const auto pixels =
        centre ? static_cast<std::int64_t>(std::min(side * side, static_cast<double>(batch.pixels()))) : batch.pixels();
    py::array_t<double> moments({batch.faces, batch.landmarks, py::ssize_t{3}});
    double* out = moments.mutable_data();
    {
        py::gil_scoped_release unlocked;
        lgcn::parallel_for(batch.count(), pixels, num_threads, [&](std::int64_t i) {
            const lgcn::Heatmap map = batch.map(i);
            const lgcn::Moments m =
                centre ? lgcn::window_moments(map, centre[2 * i], centre[2 * i + 1], radius, threshold)
                       : lgcn::window_moments(map, 0, map.height, 0, map.width, threshold);
            out[3 * i] = m.w2;
            out[3 * i + 1] = m.w2x;
            out[3 * i + 2] = m.w2y;
        });
    }
    return moments;
}

Heatmaps gaussian_sum(const Heatmaps& maps, std::int64_t kernel_size, const std::vector<double>& sigmas,
                      int num_threads) {
    const Batch batch(maps);
    if (kernel_size < 1 || kernel_size % 2 == 0 || kernel_size > 1001) {
        throw py::value_error("kernel_size: expected an odd number of pixels up to 1001, got " +
                              std::to_string(kernel_size));
    }
    if (sigmas.empty() || !std::all_of(sigmas.begin(), sigmas.end(), [](double s) { return s > 0; })) {
        throw py::value_error("sigmas: expected one or more positive numbers");
    }
    Heatmaps blurred({batch.faces, batch.landmarks, batch.height, batch.width});
    float* out = blurred.mutable_data();
    {
        py::gil_scoped_release unlocked;
        const lgcn::Gaussians gaussians(kernel_size, sigmas);
        // A pixel of this is worth some hundred of the other functions; a part of the maps for each thread.
        const std::int64_t parts = std::min<std::int64_t>(batch.count(), lgcn::thread_count(num_threads));
        lgcn::parallel_for(parts, 1000000, num_threads, [&](std::int64_t part) {
            lgcn::GaussianSum blur(gaussians, batch.height, batch.width);
            for (std::int64_t i = batch.count() * part / parts; i < batch.count() * (part + 1) / parts; ++i)
                blur(batch.map(i).data, out + i * batch.pixels());
        });
    }
    return blurred;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native functions of lgcn_fast; see lgcn_fast_kernels for their documentation.";
    module.def("gaussian_sum", &gaussian_sum, py::arg("maps").noconvert(), py::arg("kernel_size"), py::arg("sigmas"),
               py::arg("num_threads"));
    module.def("peak_centroids", &peak_centroids, py::arg("heatmaps").noconvert(), py::arg("num_threads"));
    module.def("nearest_peaks", &nearest_peaks, py::arg("heatmaps").noconvert(), py::arg("targets"),
               py::arg("threshold"), py::arg("num_threads"));
    module.def("local_maxima", &local_maxima, py::arg("heatmaps").noconvert(), py::arg("threshold"),
               py::arg("num_threads"));
    module.def("window_moments", &window_moments, py::arg("heatmaps").noconvert(), py::arg("centres"),
               py::arg("radius"), py::arg("threshold"), py::arg("num_threads"));
}
