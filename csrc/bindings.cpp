// The Python module lgcn_fast_kernels._native: functions on batches of heatmaps (B, N, H, W), and the network.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "gaussian_product.hpp"
#include "network_bindings.hpp"
#include "peaks.hpp"
#include "threads.hpp"

namespace {

void check_radius(double radius) {
    if (!(radius >= 0)) throw py::value_error("radius: expected 0 or more pixels, got " + std::to_string(radius));
}

py::tuple peak_centroids(const Heatmaps& heatmaps, double radius, int num_threads) {
    const Batch batch(heatmaps);
    check_radius(radius);
    py::array_t<float> points({batch.faces, batch.landmarks, py::ssize_t{2}});
    py::array_t<float> values({batch.faces, batch.landmarks});
    float* points_data = points.mutable_data();
    float* values_data = values.mutable_data();
    {
        py::gil_scoped_release unlocked;
        lgcn::parallel_for(batch.count(), batch.pixels(), num_threads, [&](std::int64_t i) {
            const lgcn::Peak peak = lgcn::peak_centroid(batch.map(i), radius);
            points_data[2 * i] = peak.x;
            points_data[2 * i + 1] = peak.y;
            values_data[i] = peak.value;
        });
    }
    return py::make_tuple(points, values);
}

py::tuple local_maxima(const Heatmaps& heatmaps, float threshold, int num_threads) {
    struct Pixel {
        std::int64_t x, y;
        float value;
    };
    const Batch batch(heatmaps);
    std::vector<std::vector<Pixel>> found(static_cast<std::size_t>(batch.count()));
    {
        py::gil_scoped_release unlocked;
        lgcn::parallel_for(batch.count(), batch.pixels(), num_threads, [&](std::int64_t i) {
            const lgcn::Heatmap map = batch.map(i);
            lgcn::for_each_local_maximum(map, threshold, [&](std::int64_t y, std::int64_t x) {
                found[static_cast<std::size_t>(i)].push_back({x, y, map.at(y, x)});
            });
        });
    }
    py::ssize_t total = 0;
    for (const auto& maxima : found) total += static_cast<py::ssize_t>(maxima.size());
    py::array_t<std::int64_t> maps({total, py::ssize_t{2}});
    py::array_t<std::int64_t> pixels({total, py::ssize_t{2}});
    py::array_t<float> values(total);
    std::int64_t* map_out = maps.mutable_data();
    std::int64_t* pixel_out = pixels.mutable_data();
    float* value_out = values.mutable_data();
    for (std::size_t i = 0; i < found.size(); ++i)
        for (const Pixel& pixel : found[i]) {
            *map_out++ = static_cast<std::int64_t>(i) / batch.landmarks;
            *map_out++ = static_cast<std::int64_t>(i) % batch.landmarks;
            *pixel_out++ = pixel.x;
            *pixel_out++ = pixel.y;
            *value_out++ = pixel.value;
        }
    return py::make_tuple(maps, pixels, values);
}

py::array_t<double> window_moments(const Heatmaps& heatmaps, const std::optional<Points>& centres, double radius,
                                   float threshold, int num_threads) {
    const Batch batch(heatmaps);
    const double* centre = centres ? checked_centres(*centres, batch) : nullptr;
    check_radius(radius);
    const double side = 2 * radius + 1;
    const auto pixels =
        centre ? static_cast<std::int64_t>(std::min(side * side, static_cast<double>(batch.pixels()))) : batch.pixels();
    py::array_t<double> moments({batch.faces, batch.landmarks, py::ssize_t{3}});
    double* out = moments.mutable_data();
    {
        py::gil_scoped_release unlocked;
        lgcn::parallel_for(batch.count(), pixels, num_threads, [&](std::int64_t i) {
            const lgcn::Heatmap map = batch.map(i);
            const lgcn::Window window = centre ? lgcn::window(map, centre[2 * i], centre[2 * i + 1], radius, radius)
                                               : lgcn::Window{0, map.height, 0, map.width};
            const lgcn::Moments m = lgcn::window_moments(map, window, threshold);
            out[3 * i] = m.w2;
            out[3 * i + 1] = m.w2x;
            out[3 * i + 2] = m.w2y;
        });
    }
    return moments;
}

py::array_t<float> face_votes(const Heatmaps& heatmaps, const Offsets& offsets, const std::vector<std::int64_t>& voters,
                              std::int64_t step, int num_threads) {
    const Batch batch(heatmaps);
    const lgcn::Ballot ballot = checked_ballot(offsets, voters, step, batch.landmarks);
    const std::int64_t height = ballot.side(batch.height), width = ballot.side(batch.width);
    py::array_t<float> votes({batch.faces, static_cast<py::ssize_t>(ballot.sizes()), static_cast<py::ssize_t>(height),
                              static_cast<py::ssize_t>(width)});
    float* out = votes.mutable_data();
    {
        py::gil_scoped_release unlocked;
        const std::int64_t rows = ballot.sizes() * height;
        lgcn::parallel_for(batch.faces * rows, width * ballot.voters(), num_threads, [&](std::int64_t i) {
            std::fill_n(out + i * width, width, 0.0f);
            const std::int64_t row = i % rows;
            ballot.add(batch.map(i / rows * batch.landmarks), row / height, row % height, out + i * width);
        });
    }
    return votes;
}

// Blurs the maps, each thread a part of them.
template <typename T>
void blur(const Batch& batch, const lgcn::Taps& taps, const lgcn::Multiplier<T>& multiplier, int num_threads,
          float* out) {
    using Blur = lgcn::Blur<T>;
    const std::int64_t parts = std::min<std::int64_t>(batch.count(), lgcn::thread_count(num_threads));
    std::vector<Blur> blurs;
    std::vector<lgcn::Buffer<T>> maps;
    for (std::int64_t part = 0; part < parts; ++part) {
        blurs.emplace_back(taps, batch.height, batch.width);
        maps.emplace_back(blurs.back().map_elements());
    }
    lgcn::run_threads(parts, [&](std::int64_t part) {
        Blur& mine = blurs[static_cast<std::size_t>(part)];
        T* map = maps[static_cast<std::size_t>(part)].data();
        const lgcn::Ready<T> ready(multiplier);
        const lgcn::Range share = lgcn::share(batch.count(), part, parts);
        for (std::int64_t i = share.first; i < share.last; ++i) {
            const float* values = batch.map(i).data;
            for (std::int64_t y = 0; y < batch.height; ++y)
                lgcn::in_registers<lgcn::detail::PutLine>(multiplier.registers, values + y * batch.width, batch.width,
                                                          false, map + y * mine.row_stride());
            mine(multiplier, map, out + i * batch.pixels());
        }
    });
}

Heatmaps gaussian_sum(const Heatmaps& maps, const Points& lines, int num_threads, const std::string& instructions) {
    const Batch batch(maps);
    const lgcn::Taps taps = checked_taps(lines);
    Heatmaps blurred({batch.faces, batch.landmarks, batch.height, batch.width});
    float* out = blurred.mutable_data();
    with_multiplier(instructions, [&](const auto& multiplier) {
        py::gil_scoped_release unlocked;
        blur(batch, taps, multiplier, num_threads, out);
    });
    return blurred;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native functions of lgcn_fast; see lgcn_fast_kernels for their documentation.";
    module.def("gaussian_sum", &gaussian_sum, py::arg("maps").noconvert(), py::arg("taps"), py::arg("num_threads"),
               py::arg("instructions"));
    module.def("peak_centroids", &peak_centroids, py::arg("heatmaps").noconvert(), py::arg("radius"),
               py::arg("num_threads"));
    module.def("local_maxima", &local_maxima, py::arg("heatmaps").noconvert(), py::arg("threshold"),
               py::arg("num_threads"));
    module.def("window_moments", &window_moments, py::arg("heatmaps").noconvert(), py::arg("centres"),
               py::arg("radius"), py::arg("threshold"), py::arg("num_threads"));
    module.def("face_votes", &face_votes, py::arg("heatmaps").noconvert(), py::arg("offsets"), py::arg("voters"),
               py::arg("step"), py::arg("num_threads"));
    module.def("instruction_sets", &lgcn::instruction_sets);
    bind_network(module);
}
