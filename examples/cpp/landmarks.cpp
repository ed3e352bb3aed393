// Landmarks of a face without Python: an exported network in ONNX Runtime, and behind it this project's own code for
// heatmaps, the headers csrc/peaks.hpp and csrc/fit.hpp. Prints JSON: points in pixels of the picture, scores 0..1.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <locale>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fit.hpp"
#include "peaks.hpp"

namespace {

struct Picture {
    std::int64_t width, height, channels;
    std::vector<std::uint8_t> pixels;  // (height, width, channels); three channels are red, green, blue

    float at(std::int64_t y, std::int64_t x, std::int64_t channel) const {
        y = std::clamp<std::int64_t>(y, 0, height - 1);  // beyond the picture its border's pixels repeat
        x = std::clamp<std::int64_t>(x, 0, width - 1);
        return pixels[static_cast<std::size_t>((y * width + x) * channels + channel)];
    }

    // channel 0 of a network for grayscale pictures
    float gray(std::int64_t y, std::int64_t x) const {
        if (channels == 1) return at(y, x, 0);
        return std::round(0.299f * at(y, x, 0) + 0.587f * at(y, x, 1) + 0.114f * at(y, x, 2));
    }
};

// A number of a picture's header, which may have comments.
std::int64_t header_number(std::istream& file) {
    std::int64_t number = 0;
    while ((file >> std::ws).peek() == '#') file.ignore(1 << 20, '\n');
    file >> number;
    return number;
}

// Reads a binary PGM or PPM file.
Picture read_picture(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + ": expected a picture, got no file that can be read");
    char magic[2] = {};
    file.read(magic, 2);
    const bool known = magic[0] == 'P' && (magic[1] == '5' || magic[1] == '6');
    Picture picture{};
    if (known) {
        picture.width = header_number(file);
        picture.height = header_number(file);
        picture.channels = magic[1] == '5' ? 1 : 3;
    }
    constexpr std::int64_t longest = 1 << 16;
    if (!known || header_number(file) != 255 || picture.width < 1 || picture.height < 1 || picture.width > longest ||
        picture.height > longest) {
        throw std::runtime_error(path + ": expected a binary PGM or PPM file with values up to 255");
    }
    file.get();
    // Row by row: what the header says is only believed as far as it is there.
    const std::int64_t row = picture.width * picture.channels;
    for (std::int64_t y = 0; y < picture.height; ++y) {
        picture.pixels.resize(static_cast<std::size_t>((y + 1) * row));
        if (!file.read(reinterpret_cast<char*>(picture.pixels.data() + y * row), row)) {
            throw std::runtime_error(path + ": expected a complete picture, got one cut short");
        }
    }
    return picture;
}

struct Box {
    std::int64_t x, y, side;
};

// The square of whole pixels around a box (x, y, width, height) that must meet the picture, as in
// lgcn_fast/images.py; halves round up.
Box square_box(const std::array<double, 4>& box, const Picture& picture) {
    const auto [x, y, width, height] = box;
    constexpr double longest = 16384;
    const bool meets = x < static_cast<double>(picture.width) && y < static_cast<double>(picture.height) &&
                       x + width > 0 && y + height > 0;
    if (!(meets && width > 0 && height > 0 && width <= longest && height <= longest)) {
        throw std::runtime_error("box: expected one that meets the picture, with sides of up to 16384 pixels");
    }
    const double side = std::max(std::floor(std::max(width, height) + 0.5), 1.0);
    return {static_cast<std::int64_t>(std::floor(x + (width - side) / 2 + 0.5)),
            static_cast<std::int64_t>(std::floor(y + (height - side) / 2 + 0.5)), static_cast<std::int64_t>(side)};
}

// What one pixel of a resized line is made of: these pixels of the line, times weights.
struct Mixture {
    std::int64_t first;
    std::vector<float> weights;
};

// How a line is resized: means of what the new pixels cover where it gets shorter, else linear interpolation.
std::vector<Mixture> resized_line(std::int64_t length, std::int64_t new_length) {
    const double scale = static_cast<double>(length) / static_cast<double>(new_length);
    const double last = static_cast<double>(length - 1);
    std::vector<Mixture> line;
    for (std::int64_t i = 0; i < new_length; ++i) {
        const auto place = static_cast<double>(i);
        if (scale > 1) {
            const double left = place * scale, right = std::min((place + 1) * scale, last + 1);
            Mixture mixture{static_cast<std::int64_t>(left), {}};
            for (double x = std::floor(left); x < right - 1e-6; ++x)
                mixture.weights.push_back(static_cast<float>((std::min(x + 1, right) - std::max(x, left)) / scale));
            line.push_back(mixture);
        } else {
            const double centre = std::clamp((place + 0.5) * scale - 0.5, 0.0, last);
            const auto share = static_cast<float>(centre - std::floor(centre));
            line.push_back({static_cast<std::int64_t>(centre), {1 - share, share}});
        }
    }
    return line;
}

// The face as the network takes it: (channels, size, size).
std::vector<std::uint8_t> cut_out(const Picture& picture, const Box& box, std::int64_t size, std::int64_t channels) {
    const std::vector<Mixture> line = resized_line(box.side, size);
    std::vector<std::uint8_t> crop;
    for (std::int64_t channel = 0; channel < channels; ++channel)
        for (const Mixture& row : line)
            for (const Mixture& column : line) {
                float sum = 0;
                for (std::size_t j = 0; j < row.weights.size(); ++j)
                    for (std::size_t i = 0; i < column.weights.size(); ++i) {
                        const std::int64_t y = box.y + row.first + static_cast<std::int64_t>(j);
                        const std::int64_t x = box.x + column.first + static_cast<std::int64_t>(i);
                        const float value = channels == 1 ? picture.gray(y, x)
                                                          : picture.at(y, x, std::min(channel, picture.channels - 1));
                        sum += row.weights[j] * column.weights[i] * value;
                    }
                crop.push_back(static_cast<std::uint8_t>(std::lround(sum)));
            }
    return crop;
}

// A face in light that networks know, as `lit` of lgcn_fast/images.py makes it: a pale one gets more contrast, a dark or
// glaring one a medium level, others stay as they are.
void light(std::vector<std::uint8_t>& crop) {
    constexpr double least_contrast = 25, largest_gain = 12, darkest = 60, brightest = 170;
    const auto count = static_cast<double>(crop.size());
    const double mean = std::accumulate(crop.begin(), crop.end(), 0.0) / count;
    double squares = 0;
    for (const std::uint8_t value : crop) squares += (value - mean) * (value - mean);
    const double deviation = std::max(std::sqrt(squares / count), 1e-6);
    const double gain = std::clamp(least_contrast / deviation, 1.0, largest_gain);
    const double level = std::clamp(mean, darkest, brightest);
    for (std::uint8_t& value : crop) {
        const double changed = std::clamp((value - mean) * gain + level, 0.0, 255.0);
        value = static_cast<std::uint8_t>(std::nearbyint(changed));
    }
}

// An exported network, see lgcn_fast/export.py.
class Network {
public:
    explicit Network(const std::string& path)
        : session_(environment_, std::basic_string<ORTCHAR_T>(path.begin(), path.end()).c_str(), Ort::SessionOptions()),
          metadata_(session_.GetModelMetadata()) {}

    // A list of numbers in the file's metadata, empty where it has none of the name.
    std::vector<double> numbers(const char* name) const {
        Ort::AllocatorWithDefaultOptions allocator;
        const Ort::AllocatedStringPtr text = metadata_.LookupCustomMetadataMapAllocated(name, allocator);
        std::istringstream stream(text ? text.get() : "");
        stream.imbue(std::locale::classic());
        std::vector<double> values;
        for (double value; stream >> value;) values.push_back(value);
        return values;
    }

    double number(const char* name) const {
        const std::vector<double> values = numbers(name);
        if (values.size() != 1) throw std::runtime_error(std::string("expected ") + name + " in the file's metadata");
        return values[0];
    }

    // Heatmaps (1, landmarks, height, width) of an image (1, channels, size, size).
    Ort::Value heatmaps(std::vector<std::uint8_t>& image, std::int64_t channels, std::int64_t size) {
        const std::array<std::int64_t, 4> shape = {1, channels, size, size};
        const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        const Ort::Value images =
            Ort::Value::CreateTensor<std::uint8_t>(memory, image.data(), image.size(), shape.data(), shape.size());
        const char* input = "images";
        const char* output = "heatmaps";
        return std::move(session_.Run(Ort::RunOptions(), &input, &images, 1, &output, 1)[0]);
    }

private:
    Ort::Env environment_;
    Ort::Session session_;
    Ort::ModelMetadata metadata_;
};

struct Landmarks {
    std::vector<double> points, scores;  // (landmarks, 2) pixels of the heatmaps, (landmarks,)
};

Landmarks maxima(const lgcn::Heatmap& first, std::int64_t count, double radius) {
    Landmarks found;
    for (std::int64_t i = 0; i < count; ++i) {
        const lgcn::Peak peak = lgcn::peak_centroid(first.neighbour(i), radius);
        found.points.insert(found.points.end(), {peak.x, peak.y});
        found.scores.push_back(peak.value);
    }
    return found;
}

// Section 3.3 of the paper, with the shape model that the file brings.
Landmarks fitted(const Network& network, const lgcn::Heatmap& first, std::int64_t count, double stride) {
    const std::vector<double> basis = network.numbers("fit_basis"), variances = network.numbers("fit_variances");
    const std::vector<double> radii = network.numbers("fit_radii"), values = network.numbers("fit_options");
    const std::size_t parameters = variances.size() + 4;
    if (radii.empty() || values.size() != 9 || basis.size() != parameters * static_cast<std::size_t>(2 * count)) {
        throw std::runtime_error("expected a shape model in the file's metadata (export with one, or use --no-fit)");
    }
    const lgcn::FitOptions options{values[0], values[1], values[2], values[3], values[4],
                                   values[5], values[6], values[7], values[8]};
    const lgcn::Fitter fitter(basis.data(), variances.data(), static_cast<std::int64_t>(parameters), count, radii,
                              options);
    std::vector<lgcn::Fitter::Evidence> evidence;
    for (std::int64_t i = 0; i < count; ++i) evidence.push_back(fitter.look(first.neighbour(i)));
    const auto landmarks = static_cast<std::size_t>(count);
    Landmarks found{std::vector<double>(2 * landmarks), std::vector<double>(landmarks)};
    std::vector<double> shape(2 * landmarks), coefficients(variances.size());
    double residual = 0;
    fitter.fit(first, evidence.data(), stride,
               {found.points.data(), shape.data(), coefficients.data(), found.scores.data(), &residual});
    return found;
}

double number_of(const std::string& word) {
    char* end = nullptr;
    const double number = std::strtod(word.c_str(), &end);
    if (word.empty() || *end) throw std::runtime_error("box: expected four numbers, got '" + word + "'");
    return number;
}

void run(const std::string& model, const std::string& path, const std::array<double, 4>& where, bool fit) {
    const Picture picture = read_picture(path);
    const Box box = square_box(where, picture);
    Network network(model);
    const auto whole = [&](const char* name) { return static_cast<std::int64_t>(network.number(name)); };
    const std::int64_t size = whole("input_size"), channels = whole("in_channels"), count = whole("num_landmarks");
    std::vector<std::uint8_t> crop = cut_out(picture, box, size, channels);
    light(crop);
    const Ort::Value heatmaps = network.heatmaps(crop, channels, size);
    const std::vector<std::int64_t> shape = heatmaps.GetTensorTypeAndShapeInfo().GetShape();
    if (shape.size() != 4 || shape[1] != count) throw std::runtime_error("expected as many heatmaps as num_landmarks");
    const lgcn::Heatmap first{heatmaps.GetTensorData<float>(), shape[2], shape[3]};
    const double step = network.number("stride"), radius = network.number("peak_radius") / step;
    const Landmarks found = fit ? fitted(network, first, count, step) : maxima(first, count, radius);

    const double scale = static_cast<double>(box.side) * step / static_cast<double>(size);
    std::ostringstream points, scores;
    for (std::ostringstream* numbers : {&points, &scores}) numbers->precision(9);
    for (std::size_t i = 0; i < found.scores.size(); ++i) {
        const double x = (found.points[2 * i] + 0.5) * scale + static_cast<double>(box.x) - 0.5;
        const double y = (found.points[2 * i + 1] + 0.5) * scale + static_cast<double>(box.y) - 0.5;
        points << (i ? ", [" : "[") << x << ", " << y << "]";
        scores << (i ? ", " : "") << std::clamp(found.scores[i], 0.0, 1.0);
    }
    std::printf("{\"points\": [%s],\n \"scores\": [%s]}\n", points.str().c_str(), scores.str().c_str());
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<std::string> words(argv, argv + argc);
    const bool fit = words.back() != "--no-fit";
    if (words.size() != (fit ? 7u : 8u)) {
        std::fprintf(stderr, "usage: %s MODEL.onnx PICTURE.ppm X Y WIDTH HEIGHT [--no-fit]\n", argv[0]);
        return 2;
    }
    try {
        std::array<double, 4> box;
        for (std::size_t i = 0; i < 4; ++i) box[i] = number_of(words[3 + i]);
        run(words[1], words[2], box, fit);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
        return 2;
    }
    return 0;
}
