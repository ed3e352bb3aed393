// The Python classes Network, Shape and Fitter.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "arrays.hpp"
#include "fit.hpp"
#include "network.hpp"
#include "threads.hpp"

// Arrays for the fits of some faces.
struct Fits {
    Points points, shapes, coefficients, certainties, residuals;
    std::int64_t landmarks, modes;
    lgcn::FitResult<double> first;

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

    lgcn::FitResult<double> face(std::int64_t i) const {
        return {first.points + 2 * i * landmarks, first.shapes + 2 * i * landmarks, first.coefficients + i * modes,
                first.certainties + i * landmarks, first.residual + i};
    }
    py::tuple tuple() const { return py::make_tuple(points, shapes, coefficients, certainties, residuals); }
};

// points, shapes, coefficients, certainties, residuals of all faces.
inline py::tuple fit(const lgcn::Fitter& fitter, const Heatmaps& heatmaps, double stride, int num_threads) {
    const Batch batch(heatmaps);
    if (batch.landmarks != fitter.landmarks()) {
        throw py::value_error("heatmaps: expected " + std::to_string(fitter.landmarks()) + " landmarks, got " +
                              std::to_string(batch.landmarks));
    }
    if (!(stride > 0)) throw py::value_error("stride: expected a positive number, got " + std::to_string(stride));
    const Fits fits(batch.faces, fitter);
    {
        py::gil_scoped_release unlocked;
        std::vector<lgcn::Fitter::Evidence> evidence(static_cast<std::size_t>(batch.count()));
        lgcn::parallel_for(batch.count(), batch.pixels(), num_threads,
                           [&](std::int64_t i) { evidence[static_cast<std::size_t>(i)] = fitter.look(batch.map(i)); });
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
        check(shape, local, heads, context, refine);
        with_multiplier(instructions, [&](const auto& multiplier) {
            using T = typename std::decay_t<decltype(multiplier)>::Element;
            network_ = std::make_unique<lgcn::Network<T>>(shape, multiplier, filters(local), filters(heads),
                                                          filters(context), filters(refine));
        });
    }

    template <typename Pixel>
    Heatmaps heatmaps(const Array<Pixel>& images, int num_threads) {
        return std::visit([&](auto& network) { return heatmaps(*network, images, num_threads); }, network_);
    }

    // Heatmaps and fit of each face in one go, while its heatmaps are in the cache.
    template <typename Pixel>
    py::tuple fit(const Array<Pixel>& images, const lgcn::Fitter& fitter, int num_threads) {
        return std::visit([&](auto& network) { return fit(*network, images, fitter, num_threads); }, network_);
    }

    // Votes for the middles of faces, without heatmaps on the way out.
    template <typename Pixel>
    py::array_t<float> votes(const Array<Pixel>& images, const Offsets& offsets,
                             const std::vector<std::int64_t>& voters, std::int64_t step, int num_threads) {
        return std::visit(
            [&](auto& network) {
                const lgcn::Ballot ballot = checked_ballot(offsets, voters, step, network->landmarks());
                return votes(*network, images, ballot, num_threads);
            },
            network_);
    }

private:
    // Layers that do not fit together would read beyond their arrays.
    static void check(const lgcn::Shape& shape, const std::vector<Layer>& local, const Layer& heads,
                      const std::vector<Layer>& context, const Layer& refine) {
        constexpr std::int64_t largest = 1 << 16;  // so that products of them do not overflow
        if (shape.landmarks < 1 || shape.side_channels < 0 || shape.stride < 1 || shape.shuffle < 1 ||
            shape.shuffle % shape.stride || shape.dilation < 1 ||
            std::max({shape.landmarks, shape.side_channels, shape.shuffle, shape.dilation}) > largest) {
            throw py::value_error(
                "shape: expected positive numbers up to 65536, and a shuffle that is a multiple of the stride");
        }
        if (local.empty() || context.empty()) throw py::value_error("local, context: expected at least one layer each");
        const std::int64_t maps = shape.landmarks + shape.side_channels, step = shape.shuffle / shape.stride;
        const std::int64_t width = filters(local[0]).out, inputs = filters(local[0]).in;
        const auto expect = [](const char* name, const Layer& layer, std::int64_t out, std::int64_t in,
                               std::int64_t kernel) {
            const lgcn::Filters f = filters(layer);
            if (f.out == out && f.in == in && (kernel == 0 || f.kernel == kernel)) return;
            const auto four = [](std::int64_t o, std::int64_t i, const std::string& k) {
                return "(" + std::to_string(o) + ", " + std::to_string(i) + ", " + k + ", " + k + ")";
            };
            throw py::value_error(std::string(name) + ": expected filters " +
                                  four(out, in, kernel ? std::to_string(kernel) : "k") + ", got " +
                                  four(f.out, f.in, std::to_string(f.kernel)));
        };
        if (inputs % (shape.shuffle * shape.shuffle)) {
            throw py::value_error("local[0]: expected inputs for whole images, got " + std::to_string(inputs));
        }
        for (std::size_t i = 1; i < local.size(); ++i) expect("local", local[i], width, width, 0);
        expect("heads", heads, maps * step * step, width, 1);
        for (std::size_t i = 0; i < context.size(); ++i) expect("context", context[i], width, i ? width : maps, 3);
        expect("refine", refine, shape.landmarks * step * step, width, 1);
    }

    static lgcn::Filters filters(const Layer& layer) {
        const auto& [weight, bias] = layer;
        if (weight.ndim() != 4 || weight.shape(2) != weight.shape(3) || weight.shape(2) % 2 == 0 || bias.ndim() != 1 ||
            bias.shape(0) != weight.shape(0)) {
            throw py::value_error("layer: expected filters (out, in, k, k) with odd k and biases (out,), got " +
                                  shape_of(weight) + " and " + shape_of(bias));
        }
        return {weight.data(), bias.data(), weight.shape(0), weight.shape(1), weight.shape(2)};
    }

    static std::vector<lgcn::Filters> filters(const std::vector<Layer>& layers) {
        std::vector<lgcn::Filters> all;
        for (const Layer& layer : layers) all.push_back(filters(layer));
        return all;
    }

    template <typename T, typename Pixel>
    static lgcn::Image<Pixel> checked(const lgcn::Network<T>& network, const Array<Pixel>& images) {
        if (images.ndim() != 4 || images.shape(1) != network.image_channels() || images.shape(2) == 0 ||
            images.shape(3) == 0) {
            throw py::value_error("images: expected (B, " + std::to_string(network.image_channels()) +
                                  ", H, W) without empty sides, got " + shape_of(images));
        }
        return {images.data(), images.shape(1), images.shape(2), images.shape(3)};
    }

    template <typename T, typename Pixel>
    static Heatmaps heatmaps(lgcn::Network<T>& network, const Array<Pixel>& images, int num_threads) {
        struct User {
            float* out;
            std::int64_t size;

            bool wants_buffer() const { return false; }
            float* place(std::int64_t face, float*) const { return out + face * size; }
            void use_maps(std::int64_t, const float*, lgcn::Range) const {}
            void use_face(std::int64_t, const float*, std::int64_t, std::int64_t) const {}
        };
        const lgcn::Image<Pixel> image = checked(network, images);
        const py::ssize_t height = network.heatmap_side(image.height), width = network.heatmap_side(image.width);
        const py::ssize_t count = images.shape(0);
        Heatmaps heatmaps({count, static_cast<py::ssize_t>(network.landmarks()), height, width});
        const User user{heatmaps.mutable_data(), network.landmarks() * height * width};
        py::gil_scoped_release unlocked;
        network(image, count, num_threads, user);
        return heatmaps;
    }

    template <typename T, typename Pixel>
    static py::tuple fit(lgcn::Network<T>& network, const Array<Pixel>& images, const lgcn::Fitter& fitter,
                         int num_threads) {
        struct User {
            const lgcn::Fitter& fitter;
            const Fits& fits;
            std::int64_t height, width;
            double stride;
            std::vector<lgcn::Fitter::Evidence>& evidence;

            bool wants_buffer() const { return true; }
            float* place(std::int64_t, float* buffer) const { return buffer; }
            lgcn::Fitter::Evidence* of(std::int64_t face) const { return evidence.data() + face * fitter.landmarks(); }
            void use_maps(std::int64_t face, const float* maps, lgcn::Range range) const {
                const lgcn::Heatmap first{maps, height, width};
                for (std::int64_t i = range.first; i < range.last; ++i) of(face)[i] = fitter.look(first.neighbour(i));
            }
            void use_face(std::int64_t face, const float* maps, std::int64_t part, std::int64_t) const {
                if (part == 0) fitter.fit({maps, height, width}, of(face), stride, fits.face(face));
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

    template <typename T, typename Pixel>
    static py::array_t<float> votes(lgcn::Network<T>& network, const Array<Pixel>& images, const lgcn::Ballot& ballot,
                                    int num_threads) {
        struct User {
            const lgcn::Ballot& ballot;
            std::int64_t height, width;
            float* out;

            bool wants_buffer() const { return true; }
            float* place(std::int64_t, float* buffer) const { return buffer; }
            void use_maps(std::int64_t, const float*, lgcn::Range) const {}
            // Each a part of the rows: sums of all landmarks in one order, however many threads there are.
            void use_face(std::int64_t face, const float* maps, std::int64_t part, std::int64_t parts) const {
                const std::int64_t rows = ballot.side(height), columns = ballot.side(width);
                const lgcn::Range mine = lgcn::share(ballot.sizes() * rows, part, parts);
                for (std::int64_t i = mine.first; i < mine.last; ++i)
                    ballot.add({maps, height, width}, i / rows, i % rows,
                               out + (face * ballot.sizes() * rows + i) * columns);
            }
        };
        const lgcn::Image<Pixel> image = checked(network, images);
        const std::int64_t height = network.heatmap_side(image.height), width = network.heatmap_side(image.width);
        const py::ssize_t count = images.shape(0);
        const auto size = [](std::int64_t n) { return static_cast<py::ssize_t>(n); };
        py::array_t<float> votes({count, size(ballot.sizes()), size(ballot.side(height)), size(ballot.side(width))});
        float* out = votes.mutable_data();
        py::gil_scoped_release unlocked;
        std::fill_n(out, votes.size(), 0.0f);
        network(image, count, num_threads, User{ballot, height, width, out});
        return votes;
    }

    std::variant<std::unique_ptr<lgcn::Network<float>>, std::unique_ptr<lgcn::Network<lgcn::Bf16>>> network_;
};

inline void bind_network(py::module_& module) {
    py::class_<lgcn::Shape>(module, "Shape",
                            "What `LGCNConfig` says of a network, without the factors; taps (S, kernel_size) float64 "
                            "are the lines of the kernel convolution, see `kernel_taps`.")
        .def(py::init([](std::int64_t landmarks, std::int64_t side_channels, std::int64_t shuffle, std::int64_t stride,
                         std::int64_t dilation, const Points& taps) {
                 return lgcn::Shape{landmarks, side_channels, shuffle, stride, dilation, checked_taps(taps)};
             }),
             py::kw_only(), py::arg("landmarks"), py::arg("side_channels"), py::arg("shuffle"), py::arg("stride"),
             py::arg("dilation"), py::arg("taps"));
    py::class_<Network>(
        module, "Network",
        "LGCN.forward in eval mode, in the precision of an instruction set; safe to call from several "
        "threads.\n\nLayers are pairs of filters (out, in, k, k) and biases (out,), float32, with norms "
        "and factors folded in; a ReLU follows those of `local` and `context`. Raises ValueError where "
        "they do not fit together.")
        .def(py::init<const std::string&, const lgcn::Shape&, const std::vector<Network::Layer>&, const Network::Layer&,
                      const std::vector<Network::Layer>&, const Network::Layer&>(),
             py::arg("instructions"), py::arg("shape"), py::arg("local"), py::arg("heads"), py::arg("context"),
             py::arg("refine"))
        .def("heatmaps", &Network::heatmaps<std::uint8_t>, py::arg("images").noconvert(), py::arg("num_threads"),
             "Heatmaps (B, N, h, w) float32 of images (B, C, H, W), uint8 or float32 in 0..255.")
        .def("heatmaps", &Network::heatmaps<float>, py::arg("images").noconvert(), py::arg("num_threads"))
        .def("fit", &Network::fit<std::uint8_t>, py::arg("images").noconvert(), py::arg("fitter"),
             py::arg("num_threads"), "What `fitter.fit` makes of the heatmaps of images, which stay in the cache.")
        .def("fit", &Network::fit<float>, py::arg("images").noconvert(), py::arg("fitter"), py::arg("num_threads"))
        .def("votes", &Network::votes<std::uint8_t>, py::arg("images").noconvert(), py::arg("offsets"),
             py::arg("voters"), py::arg("step"), py::arg("num_threads"),
             "What `face_votes` makes of the heatmaps of images, which stay in memory that is used again.")
        .def("votes", &Network::votes<float>, py::arg("images").noconvert(), py::arg("offsets"), py::arg("voters"),
             py::arg("step"), py::arg("num_threads"));
    py::class_<lgcn::Fitter>(module, "Fitter",
                             "The fit of section 3.3 with a shape model: basis (4 + K, N, 2) and variances (K,) "
                             "float64; the constants are those of `lgcn_fast.fitting`, which is the reference.")
        .def(py::init([](const Points& basis, const Points& variances, const std::vector<double>& radii, double certain,
                         double fallback, double noise, double peak_radius, double largest_move, double size_spread,
                         double shift_spread, double threshold, double nominal_size) {
                 if (basis.ndim() != 3 || basis.shape(2) != 2 || basis.shape(1) == 0 || variances.ndim() != 1 ||
                     variances.shape(0) + 4 != basis.shape(0) || radii.empty()) {
                     throw py::value_error("basis: expected (4 + K, N, 2), with variances (K,) and some radii, got " +
                                           shape_of(basis) + ", " + shape_of(variances) + " and " +
                                           std::to_string(radii.size()) + " radii");
                 }
                 return lgcn::Fitter(basis.data(), variances.data(), basis.shape(0), basis.shape(1), radii,
                                     {certain, fallback, noise, peak_radius, largest_move, size_spread, shift_spread,
                                      threshold, nominal_size});
             }),
             py::arg("basis"), py::arg("variances"), py::kw_only(), py::arg("radii"), py::arg("certain"),
             py::arg("fallback"), py::arg("noise"), py::arg("peak_radius"), py::arg("largest_move"),
             py::arg("size_spread"), py::arg("shift_spread"), py::arg("threshold"), py::arg("nominal_size"))
        .def("fit", &fit, py::arg("heatmaps").noconvert(), py::arg("stride"), py::arg("num_threads"),
             "Points (B, N, 2), shapes (B, N, 2), coefficients (B, K), certainties (B, N), residuals (B,), float64, of "
             "heatmaps (B, N, H, W) float32; see `lgcn_fast.fitting.Fit`.")
        .def_property_readonly("landmarks", &lgcn::Fitter::landmarks)
        .def_property_readonly("modes", &lgcn::Fitter::modes)
        .def_property_readonly("windows", &lgcn::Fitter::windows, "Rounds that see windows.")
        .def_property_readonly(
            "constants",
            [](const lgcn::Fitter& fitter) {
                return Points(static_cast<py::ssize_t>(fitter.constants().size()), fitter.constants().data());
            },
            "(M,) float64: all that `fit_face.hpp` needs of the model and the options, see `FitModel`.")
        .def_property_readonly(
            "workspace", [](const lgcn::Fitter& fitter) { return fitter.model().workspace(); },
            "float64 numbers that a fit needs to work with, see `FitModel`.");
}
