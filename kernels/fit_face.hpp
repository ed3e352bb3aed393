// The fit of section 3.3 for one face: heatmaps to landmarks by weighted least squares with a shape model. One source
// for CPU and GPU, so without the standard library; the reference, with the equations, is lgcn_fast/fitting.py.
//
// A group of threads fits a face together. It consists of teams, each of which looks at one heatmap at a time:
//     lane(), lanes()         this thread's number in the group, of how many
//     team(), teams()         this thread's team, of how many
//     rank(), size()          this thread's number in its team, of how many
//     sync()                  what any thread of the group wrote before it, all see after it
//     sum(values), least(v)   over a team: sums of some numbers, in place, and the smallest number
// On a CPU the group is one thread, which replaces the three steps that take its time by SIMD versions (csrc/fit.hpp).
#pragma once

#ifndef __CUDACC_RTC__  // CuPy puts the two files together: it keeps compiled kernels, and does not look into includes.
#include "heatmap.hpp"
#endif

namespace lgcn {

// What needs all pixels of a heatmap: its largest one with its centroid, and the moments of those above the threshold.
template <typename Number>
struct Evidence {
    Number x, y, value, w2, w2x, w2y;
};

// The constants of lgcn_fast/fitting.py, in pixels of the image, and the face size at which one fills the heatmap.
struct FitOptions {
    double certain, fallback, noise, trust, size_spread, shift_spread, threshold, nominal_size;
};

// A shape model and the options: views of one array, which starts with the options.
struct FitModel {
    long long landmarks, parameters, windows;
    const FitOptions* options;
    const double* radii;       // (windows,) of the rounds behind the first, which sees all pixels
    const double* deviations;  // (parameters - 4,) of the modes
    const double* basis;       // (parameters, landmarks, 2), the mean shape first
    const double* transposed;  // (landmarks, 2, parameters)
    const double* products;    // (landmarks, parameters * (parameters + 1) / 2): lower halves of B_i^T B_i, row by row

    FitModel(const double* constants, long long landmarks, long long parameters, long long windows)
        : landmarks(landmarks),
          parameters(parameters),
          windows(windows),
          options(reinterpret_cast<const FitOptions*>(constants)),
          radii(constants + sizeof(FitOptions) / sizeof(double)),
          deviations(radii + windows),
          basis(deviations + parameters - 4),
          transposed(basis + parameters * landmarks * 2),
          products(transposed + parameters * landmarks * 2) {}

    long long half() const { return parameters * (parameters + 1) / 2; }
    // In doubles.
    long long constants() const { return products + landmarks * half() - reinterpret_cast<const double*>(options); }
    long long workspace() const { return half() + 2 * parameters + 5 * landmarks; }
};

template <typename Number>
struct FitResult {  // of one face
    Number *points, *shapes, *coefficients, *certainties, *residual;
};

// Where a face is thought to be: rotation of the shape model's frame against the image, size.
struct Guess {
    double cos, sin, size;
};

// sums (width,) = weights (count,) times rows (count, width), for the threads behind the first `busy` ones.
template <typename Group>
void combine(const Group& group, const double* weights, long long count, const double* rows, long long width,
             double* sums, long long busy) {
    const long long lanes = group.lanes();
    for (long long column = (group.lane() + lanes - busy % lanes) % lanes; column < width; column += lanes) {
        double sum = 0;
        LGCN_UNROLL_8
        for (long long row = 0; row < count; ++row) sum += weights[row] * rows[row * width + column];
        sums[column] = sum;
    }
}

// How the threads of a team share a window: in rows of up to 16 columns.
struct Share {
    Index across, down, column, row;

    template <typename Group>
    explicit Share(const Group& group)
        : across(smaller(static_cast<Index>(group.size()), static_cast<Index>(16))),
          down(static_cast<Index>(group.size()) / across),
          column(static_cast<Index>(group.rank()) % across),
          row(static_cast<Index>(group.rank()) / across) {}
};

// Moments of the pixels with a value above the threshold in a window, for all threads of a team.
template <typename Group>
Moments window_moments(const Group& group, const Heatmap& map, const Window& window, float threshold) {
    const Share share(group);
    // Each thread adds up few pixels, with positions counted from the corner: fp32 is enough.
    float w2 = 0, w2x = 0, w2y = 0;
    for (Index x = window.x0 + share.column; x < window.x1; x += share.across) {
        float column = 0;
        LGCN_UNROLL_8
        for (Index y = window.y0 + share.row; y < window.y1; y += share.down) {
            const float value = map.data[y * map.width + x];
            const float squared = value > threshold ? value * value : 0.0f;
            column += squared;
            w2y += squared * static_cast<float>(y - window.y0);
        }
        w2 += column;
        w2x += column * static_cast<float>(x - window.x0);
    }
    double sums[3] = {w2, w2x, w2y};
    group.sum(sums);
    return {sums[0], sums[1] + sums[0] * static_cast<double>(window.x0),
            sums[2] + sums[0] * static_cast<double>(window.y0)};
}

// The local maximum above the threshold nearest to a target, for all threads of a team, if its centroid is at most
// `radius` from the target along x and y; else a maximum that is not as near, or the target itself with value 0.
template <typename Group>
Peak nearest_peak(const Group& group, const Heatmap& map, double x, double y, double radius, float threshold) {
    // A centroid is at most kRadius from its pixel along x and y. So the pixel of a centroid within the radius is at
    // most sqrt(2) (radius + kRadius) from the target, and so is every pixel nearer to it: no others need be looked at.
    // As most maxima are close to their target, a small square is searched first; it holds all pixels up to `reach`.
    const double furthest = 1.4142136 * (radius + static_cast<double>(kRadius));
    const Share share(group);
    double best, place;
    for (double reach = smaller(3.0, furthest);; reach = furthest) {
        const Window square = window(map, x, y, reach);
        double mine = INFINITY, my_place = INFINITY;
        for (Index row = square.y0 + share.row; row < square.y1; row += share.down)
            for (Index column = square.x0 + share.column; column < square.x1; column += share.across) {
                const Index pixel = row * map.width + column;
                if (!(map.data[pixel] > threshold)) continue;
                const double dy = static_cast<double>(row) - y, dx = static_cast<double>(column) - x;
                const double distance = dy * dy + dx * dx;
                if (!(distance < mine) || !is_local_maximum(map, row, column)) continue;
                mine = distance;
                my_place = static_cast<double>(pixel);
            }
        best = group.least(mine);
        place = group.least(mine == best ? my_place : INFINITY);
        if (best <= reach * reach || reach == furthest) break;
    }
    if (best == INFINITY) return {static_cast<float>(x), static_cast<float>(y), 0.0f};
    const auto pixel = static_cast<Index>(place);
    return centroid(map, pixel / map.width, pixel % map.width);
}

// Rotation and size by Kabsch's algorithm from the certain maxima, or the best where fewer than two are. Every team
// works it out for itself, which needs no sync.
template <typename Group, typename Number>
Guess first_guess(const Group& group, const FitModel& model, const Evidence<Number>* evidence, double side) {
    const FitOptions& options = *model.options;
    double least = options.certain;
    double certain[1] = {};
    for (long long i = group.rank(); i < model.landmarks; i += group.size()) certain[0] += evidence[i].value >= least;
    group.sum(certain);
    if (certain[0] < 2) {
        // The smallest value that fewer than FALLBACK are above.
        double mine = INFINITY;
        for (long long i = group.rank(); i < model.landmarks; i += group.size()) {
            double above = 0;
            for (long long k = 0; k < model.landmarks; ++k) above += evidence[k].value > evidence[i].value;
            if (above < options.fallback) mine = smaller(mine, static_cast<double>(evidence[i].value));
        }
        least = group.least(mine);
    }
    double centre[5] = {};  // of the maxima, of the mean shape; their number
    for (long long i = group.rank(); i < model.landmarks; i += group.size()) {
        if (!(evidence[i].value >= least)) continue;
        centre[0] += evidence[i].x;
        centre[1] += evidence[i].y;
        centre[2] += model.basis[2 * i];
        centre[3] += model.basis[2 * i + 1];
        centre[4] += 1;
    }
    group.sum(centre);
    for (int k = 0; k < 4; ++k) centre[k] /= centre[4];
    double products[3] = {};  // of the two sets of points: along, across; of the mean shape with itself
    for (long long i = group.rank(); i < model.landmarks; i += group.size()) {
        if (!(evidence[i].value >= least)) continue;
        const double x = evidence[i].x - centre[0], y = evidence[i].y - centre[1];
        const double from_x = model.basis[2 * i] - centre[2], from_y = model.basis[2 * i + 1] - centre[3];
        products[0] += from_x * x + from_y * y;
        products[1] += from_x * y - from_y * x;
        products[2] += from_x * from_x + from_y * from_y;
    }
    group.sum(products);
    const double length = hypot(products[0], products[1]), nominal = side * options.nominal_size;
    const double scale = length / (products[2] > 0 ? products[2] : 1);
    const double size = smaller(larger(scale, nominal / 4), nominal * 2);
    return length > 1e-9 ? Guess{products[0] / length, products[1] / length, size} : Guess{1, 0, size};
}

// Adds the prior to the normal equations, see `solve_system`.
template <typename Group>
void add_prior(const Group& group, const FitModel& model, const Guess& guess, const Heatmap& map, double stride,
               double* left, double* right) {
    const FitOptions& options = *model.options;
    const double x = static_cast<double>(map.width - 1) / 2, y = static_cast<double>(map.height - 1) / 2;
    for (long long p = group.lane(); p < model.parameters; p += group.lanes()) {
        const double prior = p == 0   ? guess.size
                             : p == 2 ? guess.cos * x + guess.sin * y
                             : p == 3 ? guess.cos * y - guess.sin * x
                                      : 0;
        const double spread = p < 2   ? options.size_spread * guess.size
                              : p < 4 ? options.shift_spread * static_cast<double>(larger(map.height, map.width))
                                      : guess.size * model.deviations[p - 4];
        // Square pixels times a sum over pixels: both are fewer by the square of the stride.
        const double precision = options.noise / (spread * spread) / (stride * stride * stride * stride);
        left[p * (p + 3) / 2] += precision;
        right[p] += precision * prior;
    }
}

// Solves a symmetric positive definite system by Cholesky's algorithm without roots (a = L D L^T).
//   left: (count * (count + 1) / 2,), the lower half of a, row by row; is changed
//   right: (count,) behind it, so that it is the last row of the triangle; is changed
//   theta: (count,), the solution, which all threads see
template <typename Group>
void solve_system(const Group& group, double* left, double* right, long long count, double* theta) {
    const auto row = [&](long long i) { return left + i * (i + 1) / 2; };
    // Row i loses its share of every column j before it. Column j itself stays as it is: L times D.
    for (long long j = 0; j < count; ++j) {
        const double inverse = 1 / row(j)[j];
        if (group.lane() == 0) theta[j] = inverse;
        for (long long i = j + 1 + group.team(); i <= count; i += group.teams()) {
            const double factor = row(i)[j] * inverse;
            const long long end = smaller(i + 1, count);
            for (long long k = j + 1 + group.rank(); k < end; k += group.size()) row(i)[k] -= factor * row(k)[j];
        }
        group.sync();
    }
    for (long long j = count - 1; j > 0; --j) {
        const double solved = right[j] * theta[j];
        for (long long k = group.lane(); k < j; k += group.lanes()) right[k] -= row(j)[k] * solved;
        group.sync();
    }
    for (long long p = group.lane(); p < count; p += group.lanes()) theta[p] *= right[p];
    group.sync();
}

// The point of a shape in the frame of the model, in the image.
struct Placed {
    double x, y;

    Placed(const Guess& frame, const double* point)
        : x(frame.cos * point[0] - frame.sin * point[1]), y(frame.sin * point[0] + frame.cos * point[1]) {}
};

// From the last round's solution to the result.
//   frame, theta, shape: of the last round; size: that it found
//   certainties, squares: (landmarks,), to work with
template <typename Group, typename Out>
void finish(const Group& group, const FitModel& model, const Heatmap& maps, double stride, const Guess& frame,
            double size, const double* theta, const double* shape, double* certainties, double* squares,
            const FitResult<Out>& result) {
    const FitOptions& options = *model.options;
    for (long long k = group.lane(); k < model.parameters - 4; k += group.lanes())
        result.coefficients[k] = static_cast<Out>(theta[4 + k] / (frame.size * model.deviations[k]));
    const double radius = model.radii[model.windows - 1] / stride;
    for (long long i = group.team(); i < model.landmarks; i += group.teams()) {
        const auto [x, y] = Placed(frame, shape + 2 * i);
        const auto threshold = static_cast<float>(options.threshold);
        const Peak peak = nearest_peak(group, maps.neighbour(i), x, y, radius, threshold);
        if (group.rank() > 0) continue;
        const double dx = peak.x - x, dy = peak.y - y;
        // A maximum outside the last window is a false one, however high.
        const bool near = larger(fabs(dx), fabs(dy)) <= radius;
        const double certainty = near ? smaller(larger(0.0, static_cast<double>(peak.value)), 1.0) : 0;
        certainties[i] = certainty;
        squares[i] = dx * dx + dy * dy;
        result.certainties[i] = static_cast<Out>(certainty);
        result.shapes[2 * i] = static_cast<Out>(x);
        result.shapes[2 * i + 1] = static_cast<Out>(y);
        result.points[2 * i] = static_cast<Out>(x + options.trust * certainty * dx);
        result.points[2 * i + 1] = static_cast<Out>(y + options.trust * certainty * dy);
    }
    group.sync();
    double totals[2] = {};  // of the certainties; of the squared distances, weighted by them
    for (long long i = group.rank(); i < model.landmarks; i += group.size()) {
        totals[0] += certainties[i];
        totals[1] += certainties[i] * squares[i];
    }
    group.sum(totals);
    if (group.lane() == 0)
        *result.residual = static_cast<Out>(totals[0] > 0 ? sqrt(totals[1] / totals[0]) / size : INFINITY);
}

// Fits a face.
//   maps: the first of the face's (landmarks, height, width)
//   evidence: (landmarks,)
//   stride: side of a heatmap's pixel in pixels of the image
//   workspace: (model.workspace(),), for all threads of the group
template <typename Group, typename In, typename Out>
void fit_face(const Group& group, const FitModel& model, const Heatmap& maps, const Evidence<In>* evidence,
              double stride, double* workspace, const FitResult<Out>& result) {
    const auto threshold = static_cast<float>(model.options->threshold);
    const long long landmarks = model.landmarks, parameters = model.parameters, half = model.half();
    double* left = workspace;
    double* right = left + half;
    double* theta = right + parameters;
    double* weights = theta + parameters;    // (landmarks,): sums of w^2
    double* turned = weights + landmarks;    // (landmarks, 2): sums of w^2 x, turned into the frame of the model
    double* shape = turned + 2 * landmarks;  // (landmarks, 2), in that frame

    Guess frame{};  // of the shape
    Guess guess = first_guess(group, model, evidence, static_cast<double>(larger(maps.height, maps.width)));
    for (long long round = 0; round <= model.windows; ++round) {
        for (long long i = group.team(); i < landmarks; i += group.teams()) {
            Moments m{evidence[i].w2, evidence[i].w2x, evidence[i].w2y};
            if (round > 0) {
                const Heatmap map = maps.neighbour(i);
                const auto [x, y] = Placed(frame, shape + 2 * i);
                m = window_moments(group, map, window(map, x, y, model.radii[round - 1] / stride), threshold);
            }
            if (group.rank() > 0) continue;
            weights[i] = m.w2;
            turned[2 * i] = guess.cos * m.w2x + guess.sin * m.w2y;
            turned[2 * i + 1] = guess.cos * m.w2y - guess.sin * m.w2x;
        }
        group.sync();
        combine(group, weights, landmarks, model.products, half, left, 0);
        combine(group, turned, 2 * landmarks, model.transposed, parameters, right, half);
        group.sync();
        add_prior(group, model, guess, maps, stride, left, right);
        group.sync();
        solve_system(group, left, right, parameters, theta);
        combine(group, theta, parameters, model.basis, 2 * landmarks, shape, 0);
        frame = guess;
        const double size = hypot(theta[0], theta[1]), cos = theta[0] / size, sin = theta[1] / size;
        guess = {frame.cos * cos - frame.sin * sin, frame.sin * cos + frame.cos * sin, size};
        group.sync();
    }
    finish(group, model, maps, stride, frame, guess.size, theta, shape, weights, turned, result);
}

#ifdef __CUDACC_RTC__

// A thread block; its teams are its warps.
struct Block {
    __device__ int lane() const { return threadIdx.x; }
    __device__ int lanes() const { return blockDim.x; }
    __device__ int team() const { return threadIdx.x / 32; }
    __device__ int teams() const { return blockDim.x / 32; }
    __device__ int rank() const { return threadIdx.x % 32; }
    __device__ int size() const { return 32; }
    __device__ void sync() const { __syncthreads(); }

    template <int count>
    __device__ void sum(double (&values)[count]) const {
        for (int other = 16; other > 0; other /= 2)
            for (int i = 0; i < count; ++i) values[i] += __shfl_xor_sync(~0u, values[i], other);
    }

    __device__ double least(double value) const {
        for (int other = 16; other > 0; other /= 2) value = smaller(value, __shfl_xor_sync(~0u, value, other));
        return value;
    }
};

// One block a face; workspace in shared memory.
extern "C" __global__ void __launch_bounds__(512, 1)
    fit_faces(const float* heatmaps, const Evidence<float>* evidence, const double* constants, long long landmarks,
              long long parameters, long long windows, long long height, long long width, double stride, float* points,
              float* shapes, float* coefficients, float* certainties, float* residuals) {
    extern __shared__ double workspace[];
    const FitModel model(constants, landmarks, parameters, windows);
    const long long face = blockIdx.x, first = face * landmarks;
    const Heatmap maps{heatmaps + first * height * width, static_cast<Index>(height), static_cast<Index>(width)};
    fit_face(Block{}, model, maps, evidence + first, stride, workspace,
             FitResult<float>{points + 2 * first, shapes + 2 * first, coefficients + face * (parameters - 4),
                              certainties + first, residuals + face});
}

#endif

}  // namespace lgcn
