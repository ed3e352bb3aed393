// The Python module lgcn_fast_kernels._native: functions on batches of heatmaps (B, N, H, W), and the network.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <memory>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "fit.hpp"
#include "gaussian_sum.hpp"
#include "network.hpp"
#include "peaks.hpp"
#include "threads.hpp"

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

// Calls use with the matrix products of an instruction set.
template <typename Use>
void with_multiplier(const std::string& name, const Use& use) {
    const std::vector<std::string> known = lgcn::instruction_sets();
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

// Blurs the maps, each thread a part of them.
template <typename T>
void blur(const Batch& batch, const lgcn::Taps& taps, const lgcn::Multiplier<T>& multiplier, int num_threads,
          float* out) {
    using Blur = lgcn::detail::Blur<T>;
    const std::int64_t parts = std::max<std::int64_t>(std::min<std::int64_t>(batch.count(), lgcn::thread_count(num_threads)), 1);
    std::vector<Blur> blurs;
    std::vector<lgcn::Buffer<T>> maps;
    for (std::int64_t part = 0; part < parts; ++part) {
        blurs.emplace_back(taps, batch.height, batch.width);
        maps.emplace_back(blurs.back().elements);
    }
    lgcn::run_threads(parts, [&](std::int64_t part) {
        Blur& mine = blurs[static_cast<std::size_t>(part)];
        T* map = maps[static_cast<std::size_t>(part)].data();
        multiplier.begin();
        for (std::int64_t i = batch.count() * part / parts; i < batch.count() * (part + 1) / parts; ++i) {
            const float* values = batch.map(i).data;
            for (std::int64_t y = 0; y < batch.height; ++y)
                lgcn::detail::put_line(values + y * batch.width, batch.width, false, map + y * mine.stride);
            mine(multiplier, map, out + i * batch.pixels());
        }
        multiplier.end();
    });
}

lgcn::Taps checked_taps(const Points& taps) {
    if (taps.ndim() != 2 || taps.shape(0) == 0 || taps.shape(1) % 2 == 0) {
        throw py::value_error("taps: expected (S, kernel_size) with an odd size");
    }
    return {taps.data(), taps.shape(0), taps.shape(1)};
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

// Arrays for the fits of some faces.
struct Fits {
    Points points, shapes, coefficients, certainties, residuals;
    std::int64_t landmarks, modes;
    lgcn::FitResult first;

    Fits(py::ssize_t faces, const lgcn::Fitter& fitter)
        : points({faces, py::ssize_t{fitter.landmarks()}, py::ssize_t{2}}),
          shapes({faces, py::ssize_t{fitter.landmarks()}, py::ssize_t{2}}),
          coefficients({faces, py::ssize_t{fitter.modes()}}),
          certainties({faces, py::ssize_t{fitter.landmarks()}}),
          residuals(faces),
          landmarks(fitter.landmarks()),
          modes(fitter.modes()),
          first{points.mutable_data(), shapes.mutable_data(), coefficients.mutable_data(), certainties.mutable_data(),
                residuals.mutable_data()} {}

    lgcn::FitResult face(std::int64_t i) const {
        return {first.points + 2 * i * landmarks, first.shapes + 2 * i * landmarks, first.coefficients + i * modes,
                first.certainties + i * landmarks, first.residual + i};
    }
    py::tuple tuple() const { return py::make_tuple(points, shapes, coefficients, certainties, residuals); }
};

// points, shapes, coefficients, certainties, residuals of all faces.
py::tuple fit(const lgcn::Fitter& fitter, const Heatmaps& heatmaps, double stride, int num_threads) {
    const Batch batch(heatmaps);
    if (batch.landmarks != fitter.landmarks()) {
        throw py::value_error("heatmaps: expected " + std::to_string(fitter.landmarks()) + " landmarks, got " +
                              std::to_string(batch.landmarks));
    }
    const Fits fits(batch.faces, fitter);
    {
        py::gil_scoped_release unlocked;
        std::vector<lgcn::Fitter::Evidence> evidence(static_cast<std::size_t>(batch.count()));
        lgcn::parallel_for(batch.count(), batch.pixels(), num_threads, [&](std::int64_t i) {
            evidence[static_cast<std::size_t>(i)] = fitter.look(batch.map(i));
        });
        lgcn::parallel_for(batch.faces, batch.landmarks * 2000, num_threads, [&](std::int64_t i) {
            fitter.fit(batch.map(i * batch.landmarks), evidence.data() + i * batch.landmarks, stride, fits.face(i));
        });
    }
    return fits.tuple();
}

// LGCN.forward in eval mode, in the precision of an instruction set.
class Network {
public:
    using Layer = std::pair<Heatmaps, Heatmaps>;  // filters (out, in, kernel, kernel), biases (out,)

    Network(const std::string& instructions, const lgcn::Shape& shape, const std::vector<Layer>& local,
            const Layer& heads, const std::vector<Layer>& context, const Layer& refine) {
        if (local.empty()) throw py::value_error("local: expected at least one layer, got none");
        with_multiplier(instructions, [&](const auto& multiplier) {
            using T = typename std::decay_t<decltype(multiplier)>::Element;
            network_ = std::make_unique<lgcn::Network<T>>(shape, multiplier, filters(local), filters(heads),
                                                          filters(context), filters(refine));
        });
    }

    template <typename Pixel>
    using Images = py::array_t<Pixel, py::array::c_style>;

    template <typename Pixel>
    Heatmaps heatmaps(const Images<Pixel>& images, int num_threads) {
        return std::visit([&](auto& network) { return heatmaps(*network, images, num_threads); }, network_);
    }

    // Heatmaps and fit of each face in one go, while its heatmaps are in the cache.
    template <typename Pixel>
    py::tuple fit(const Images<Pixel>& images, const lgcn::Fitter& fitter, int num_threads) {
        return std::visit([&](auto& network) { return fit(*network, images, fitter, num_threads); }, network_);
    }

private:
    static lgcn::Filters filters(const Layer& layer) {
        const auto& [weight, bias] = layer;
        if (weight.ndim() != 4 || weight.shape(2) != weight.shape(3) || weight.shape(2) % 2 == 0 || bias.ndim() != 1 ||
            bias.shape(0) != weight.shape(0)) {
            throw py::value_error("layer: expected filters (out, in, k, k) with odd k and biases (out,)");
        }
        return {weight.data(), bias.data(), weight.shape(0), weight.shape(1), weight.shape(2)};
    }

    static std::vector<lgcn::Filters> filters(const std::vector<Layer>& layers) {
        std::vector<lgcn::Filters> all;
        for (const Layer& layer : layers) all.push_back(filters(layer));
        return all;
    }

    template <typename T, typename Pixel>
    static lgcn::Image<Pixel> checked(const lgcn::Network<T>& network, const Images<Pixel>& images) {
        if (images.ndim() != 4 || images.shape(1) != network.image_channels() || images.shape(2) == 0 ||
            images.shape(3) == 0) {
            throw py::value_error("images: expected (B, " + std::to_string(network.image_channels()) +
                                  ", H, W) without empty sides");
        }
        return {images.data(), images.shape(1), images.shape(2), images.shape(3)};
    }

    template <typename T, typename Pixel>
    static Heatmaps heatmaps(lgcn::Network<T>& network, const Images<Pixel>& images, int num_threads) {
        struct {
            float* out;
            std::int64_t size;

            float* place(std::int64_t face, float*) const { return out + face * size; }
            void use_maps(std::int64_t, const float*, lgcn::Range) const {}
            void use_face(std::int64_t, const float*) const {}
        } user;
        const lgcn::Image<Pixel> image = checked(network, images);
        const py::ssize_t height = network.heatmap_side(image.height), width = network.heatmap_side(image.width);
        Heatmaps heatmaps({images.shape(0), py::ssize_t{network.landmarks()}, height, width});
        user = {heatmaps.mutable_data(), network.landmarks() * height * width};
        const py::ssize_t count = images.shape(0);
        py::gil_scoped_release unlocked;
        network(image, count, num_threads, user);
        return heatmaps;
    }

    template <typename T, typename Pixel>
    static py::tuple fit(lgcn::Network<T>& network, const Images<Pixel>& images, const lgcn::Fitter& fitter,
                         int num_threads) {
        struct User {
            const lgcn::Fitter& fitter;
            const Fits& fits;
            std::int64_t height, width;
            double stride;
            std::vector<lgcn::Fitter::Evidence>& evidence;

            float* place(std::int64_t, float* buffer) const { return buffer; }
            lgcn::Fitter::Evidence* of(std::int64_t face) const { return evidence.data() + face * fitter.landmarks(); }
            void use_maps(std::int64_t face, const float* maps, lgcn::Range range) const {
                const lgcn::Heatmap first{maps, height, width};
                for (std::int64_t i = range.first; i < range.last; ++i) of(face)[i] = fitter.look(first.neighbour(i));
            }
            void use_face(std::int64_t face, const float* maps) const {
                fitter.fit({maps, height, width}, of(face), stride, fits.face(face));
            }
        };
        const lgcn::Image<Pixel> image = checked(network, images);
        if (fitter.landmarks() != network.landmarks()) {
            throw py::value_error("fitter: expected " + std::to_string(network.landmarks()) + " landmarks, got " +
                                  std::to_string(fitter.landmarks()));
        }
        const py::ssize_t count = images.shape(0);
        const Fits fits(count, fitter);
        {
            py::gil_scoped_release unlocked;
            std::vector<lgcn::Fitter::Evidence> evidence(static_cast<std::size_t>(count * fitter.landmarks()));
            network(image, count, num_threads,
                    User{fitter, fits, network.heatmap_side(image.height), network.heatmap_side(image.width),
                         static_cast<double>(network.stride()), evidence});
        }
        return fits.tuple();
    }

    std::variant<std::unique_ptr<lgcn::Network<float>>, std::unique_ptr<lgcn::Network<lgcn::Bf16>>> network_;
};

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native functions of lgcn_fast; see lgcn_fast_kernels for their documentation.";
    module.def("gaussian_sum", &gaussian_sum, py::arg("maps").noconvert(), py::arg("taps"), py::arg("num_threads"),
               py::arg("instructions"));
    module.def("peak_centroids", &peak_centroids, py::arg("heatmaps").noconvert(), py::arg("num_threads"));
    module.def("nearest_peaks", &nearest_peaks, py::arg("heatmaps").noconvert(), py::arg("targets"),
               py::arg("threshold"), py::arg("num_threads"));
    module.def("local_maxima", &local_maxima, py::arg("heatmaps").noconvert(), py::arg("threshold"),
               py::arg("num_threads"));
    module.def("window_moments", &window_moments, py::arg("heatmaps").noconvert(), py::arg("centres"),
               py::arg("radius"), py::arg("threshold"), py::arg("num_threads"));
    module.def("instruction_sets", &lgcn::instruction_sets);
    py::class_<lgcn::Shape>(module, "Shape")
        .def(py::init([](std::int64_t landmarks, std::int64_t side_channels, std::int64_t shuffle, std::int64_t stride,
                         std::int64_t dilation, const Points& taps) {
                 return lgcn::Shape{landmarks, side_channels, shuffle, stride, dilation, checked_taps(taps)};
             }),
             py::kw_only(), py::arg("landmarks"), py::arg("side_channels"), py::arg("shuffle"), py::arg("stride"),
             py::arg("dilation"), py::arg("taps"));
    py::class_<Network>(module, "Network")
        .def(py::init<const std::string&, const lgcn::Shape&, const std::vector<Network::Layer>&, const Network::Layer&,
                      const std::vector<Network::Layer>&, const Network::Layer&>(),
             py::arg("instructions"), py::arg("shape"), py::arg("local"), py::arg("heads"), py::arg("context"),
             py::arg("refine"))
        .def("heatmaps", &Network::heatmaps<std::uint8_t>, py::arg("images").noconvert(), py::arg("num_threads"))
        .def("heatmaps", &Network::heatmaps<float>, py::arg("images").noconvert(), py::arg("num_threads"))
        .def("fit", &Network::fit<std::uint8_t>, py::arg("images").noconvert(), py::arg("fitter"), py::arg("num_threads"))
        .def("fit", &Network::fit<float>, py::arg("images").noconvert(), py::arg("fitter"), py::arg("num_threads"));
    py::class_<lgcn::Fitter>(module, "Fitter")
        .def(py::init([](const Points& basis, const Points& variances, const std::vector<double>& radii, double certain,
                         std::int64_t fallback, double noise, double trust, double size_spread, double shift_spread,
                         double threshold, double nominal_size) {
                 if (basis.ndim() != 3 || basis.shape(2) != 2 || basis.shape(1) == 0 || variances.ndim() != 1 ||
                     variances.shape(0) + 4 != basis.shape(0) || radii.empty()) {
                     throw py::value_error("expected a basis (4 + K, N, 2), variances (K,) and radii");
                 }
                 return lgcn::Fitter(basis.data(), variances.data(), basis.shape(0), basis.shape(1),
                                     {radii, certain, noise, trust, size_spread, shift_spread, threshold, nominal_size,
                                      fallback});
             }),
             py::arg("basis"), py::arg("variances"), py::kw_only(), py::arg("radii"), py::arg("certain"),
             py::arg("fallback"), py::arg("noise"), py::arg("trust"), py::arg("size_spread"), py::arg("shift_spread"),
             py::arg("threshold"), py::arg("nominal_size"))
        .def("fit", &fit, py::arg("heatmaps").noconvert(), py::arg("stride"), py::arg("num_threads"));
}
