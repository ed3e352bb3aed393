// The fit of section 3.3 for one face: heatmaps to landmarks by weighted least squares with a shape model. One source
// for CPU and GPU, so without the standard library; the reference, with the equations, is lgcn_fast/fitting.py.
//
// A group of threads fits a face together. It consists of teams, each of which looks at one heatmap at a time:
//     lane(), lanes()         this thread's number in the group, of how many
//     team(), teams()         this thread's team, of how many
//     rank(), size()          this thread's number in its team, of how many
//     sync()                  what any thread of the group wrote before it, all see after it
//     sum(values), least(v)   over a team: sums of some numbers (double or Sum), in place, and the smallest number
// On a CPU the group is one thread, which replaces the steps that take its time by SIMD versions (csrc/fit.hpp). On a
// GPU what takes time is to wait, for memory and for each other: many loads are under way at once, and syncs are few.
#pragma once

#ifndef __CUDACC_RTC__  // CuPy puts the two files together: it keeps compiled kernels, and does not look into includes.
#include "heatmap.hpp"
#endif

namespace lgcn {

// What needs all pixels of a heatmap: its largest one, and the moments of those above the threshold.
template <typename Number>
struct Evidence {
    Number x, y, value, w2, w2x, w2y;
};

// The constants of lgcn_fast/fitting.py, in pixels of the image, and the face size at which one fills the heatmap.
struct FitOptions {
    double certain, fallback, noise, peak_radius, largest_move, size_spread, shift_spread, threshold, nominal_size;
};

// A shape model and the options: views of one array, which starts with the options.
struct FitModel {
    Index landmarks, parameters, windows;
    const FitOptions* options;
    const double* radii;       // (windows,) of the rounds behind the first, which sees all pixels
    const double* deviations;  // (parameters - 4,) of the modes
    const double* basis;       // (parameters, landmarks, 2), the mean shape first
    const double* transposed;  // (landmarks, 2, parameters), for a CPU
    const double* products;    // (landmarks, parameters * (parameters + 1) / 2): lower halves of B_i^T B_i, row by row

    FitModel(const double* constants, Index landmarks, Index parameters, Index windows)
        : landmarks(landmarks),
          parameters(parameters),
          windows(windows),
          options(reinterpret_cast<const FitOptions*>(constants)),
          radii(constants + sizeof(FitOptions) / sizeof(double)),
          deviations(radii + windows),
          basis(deviations + parameters - 4),
          transposed(basis + parameters * landmarks * 2),
          products(transposed + parameters * landmarks * 2) {}

    Index half() const { return parameters * (parameters + 1) / 2; }
    // In doubles.
    Index constants() const { return products + landmarks * half() - reinterpret_cast<const double*>(options); }
    Index workspace() const { return half() + 2 * parameters + 5 * landmarks; }
};

template <typename Number>
struct FitResult {  // of one face
    Number *points, *shapes, *coefficients, *certainties, *residual;
};

// Where a face is thought to be: rotation of the shape model's frame against the image, size.
struct Guess {
    double cos, sin, size;
};

// sums (width,) = weights (count,) times rows (count, width).
template <typename Group>
void combine(const Group& group, const double* weights, Index count, const double* rows, Index width, double* sums) {
    for (Index column = group.lane(); column < width; column += group.lanes()) {
        double sum = 0;
        LGCN_UNROLL
        for (Index row = 0; row < count; ++row) sum += weights[row] * rows[row * width + column];
        sums[column] = sum;
    }
}

// right (parameters,) = basis (parameters, landmarks, 2) times turned (landmarks, 2), by the teams that are idle while
// the others combine `half` columns.
template <typename Group>
void project(const Group& group, const FitModel& model, const double* turned, double* right) {
    const Index count = 2 * model.landmarks, size = group.size();
    const Index busy = (model.half() + size - 1) / size % group.teams();
    if (group.team() < busy) return;
    for (Index p = group.team() - busy; p < model.parameters; p += group.teams() - busy) {
        double sum[1] = {};
        LGCN_UNROLL
        for (Index first = 0; first < count; first += size) {
            const Index i = first + group.rank();
            sum[0] += i < count ? turned[i] * model.basis[p * count + i] : 0;
        }
        group.sum(sum);
        if (group.rank() == 0) right[p] = sum[0];
    }
}

// Moments of the pixels with a value above the threshold in a window, for all threads of a team, of which each has
// `columns` times `rows` pixels on their way at once.
template <Index columns, Index rows, typename Group>
Moments window_moments_of(const Group& group, const Heatmap& map, const Window& window, float threshold) {
    // The threads share the window in rows of up to 16 columns.
    const Index size = group.size(), rank = group.rank(), across = smaller(size, Index{16}), down = size / across;
    // A thread adds up few pixels, and a team few threads, with positions counted from the corner: fp32 is enough.
    float w2 = 0, w2x = 0, w2y = 0;
    for (Index x0 = window.x0 + rank % across; x0 < window.x1; x0 += columns * across)
        for (Index y0 = window.y0 + rank / across; y0 < window.y1; y0 += rows * down) {
            float values[columns][rows];
            LGCN_UNROLL
            for (Index i = 0; i < columns; ++i) {
                LGCN_UNROLL
                for (Index j = 0; j < rows; ++j) {
                    const Index x = x0 + i * across, y = y0 + j * down;
                    values[i][j] = x < window.x1 && y < window.y1 ? map.data[y * map.width + x] : threshold;
                }
            }
            LGCN_UNROLL
            for (Index i = 0; i < columns; ++i) {
                float column = 0;
                LGCN_UNROLL
                for (Index j = 0; j < rows; ++j) {
                    const float value = values[i][j], squared = value > threshold ? value * value : 0.0f;
                    column += squared;
                    w2y += squared * static_cast<float>(y0 + j * down - window.y0);
                }
                w2 += column;
                w2x += column * static_cast<float>(x0 + i * across - window.x0);
            }
        }
    Sum sums[3] = {w2, w2x, w2y};
    group.sum(sums);
    const double total = sums[0];
    return {total, sums[1] + total * static_cast<double>(window.x0), sums[2] + total * static_cast<double>(window.y0)};
}

// The same, with as many loads at once as the window of a round or of a peak needs (up to 16, 26 and 42 rows in a warp).
template <typename Group>
Moments window_moments(const Group& group, const Heatmap& map, const Window& window, float threshold) {
    const Index side = larger(window.y1 - window.y0, window.x1 - window.x0);
    return side <= 16   ? window_moments_of<1, 8>(group, map, window, threshold)
           : side <= 26 ? window_moments_of<2, 13>(group, map, window, threshold)
                        : window_moments_of<3, 21>(group, map, window, threshold);
}

// Rotation and size by Kabsch's algorithm from the certain maxima, or the best where fewer than two are. Every team
// works it out for itself, which needs no sync.
template <typename Group, typename Number>
Guess first_guess(const Group& group, const FitModel& model, const Evidence<Number>* evidence, double side) {
    const FitOptions& options = *model.options;
    double least = options.certain;
    double centre[5];  // of the maxima, of the mean shape; their number
    const auto add_up = [&] {
        for (double& sum : centre) sum = 0;
        LGCN_UNROLL
        for (Index first = 0; first < model.landmarks; first += group.size()) {
            const Index k = first + group.rank(), i = smaller(k, model.landmarks - 1);
            const double chosen = k == i && evidence[i].value >= least ? 1 : 0;
            centre[0] += chosen * evidence[i].x;
            centre[1] += chosen * evidence[i].y;
            centre[2] += chosen * model.basis[2 * i];
            centre[3] += chosen * model.basis[2 * i + 1];
            centre[4] += chosen;
        }
        group.sum(centre);
    };
    add_up();
    if (centre[4] < 2) {
        // The smallest value that fewer than FALLBACK are above.
        double mine = INFINITY;
        for (Index i = group.rank(); i < model.landmarks; i += group.size()) {
            double above = 0;
            for (Index k = 0; k < model.landmarks; ++k) above += evidence[k].value > evidence[i].value;
            if (above < options.fallback) mine = smaller(mine, static_cast<double>(evidence[i].value));
        }
        least = group.least(mine);
        add_up();
    }
    const double share = 1 / centre[4];
    for (int k = 0; k < 4; ++k) centre[k] *= share;
    double products[3] = {};  // of the two sets of points: along, across; of the mean shape with itself
    LGCN_UNROLL
    for (Index first = 0; first < model.landmarks; first += group.size()) {
        const Index k = first + group.rank(), i = smaller(k, model.landmarks - 1);
        const double chosen = k == i && evidence[i].value >= least ? 1 : 0;
        const double x = evidence[i].x - centre[0], y = evidence[i].y - centre[1];
        const double from_x = chosen * (model.basis[2 * i] - centre[2]);
        const double from_y = chosen * (model.basis[2 * i + 1] - centre[3]);
        products[0] += from_x * x + from_y * y;
        products[1] += from_x * y - from_y * x;
        products[2] += from_x * from_x + from_y * from_y;
    }
    group.sum(products);
    const double length = sqrt(products[0] * products[0] + products[1] * products[1]);
    const double nominal = side * options.nominal_size;
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
    for (Index p = group.lane(); p < model.parameters; p += group.lanes()) {
        const double prior = p == 0   ? guess.size
                             : p == 2 ? guess.cos * x + guess.sin * y
                             : p == 3 ? guess.cos * y - guess.sin * x
                                      : 0;
        const double spread = p < 2   ? options.size_spread * guess.size
                              : p < 4 ? options.shift_spread * static_cast<double>(larger(map.height, map.width))
                                      : guess.size * model.deviations[p - 4];
        // Square pixels times a sum over pixels: both are fewer by the square of the stride.
        const double precision = options.noise / (spread * spread * stride * stride * stride * stride);
        left[p * (p + 3) / 2] += precision;
        right[p] += precision * prior;
    }
}

// Solves a symmetric positive definite system by Cholesky's algorithm without roots (a = L D L^T).
//   left: (count * (count + 1) / 2,), the lower half of a, row by row; is changed
//   right: (count,) behind it, so that it is the last row of the triangle; is changed
//   theta: (count,), the solution, which all threads see
template <typename Group>
void solve_system(const Group& group, double* left, double* right, Index count, double* theta) {
    const auto row = [&](Index i) { return left + i * (i + 1) / 2; };
    // Row i loses its share of every column j before it. Column j itself stays as it is: L times D.
    for (Index j = 0; j < count; ++j) {
        const double inverse = 1 / row(j)[j];
        if (group.lane() == 0) theta[j] = inverse;
        for (Index i = j + 1 + group.team(); i <= count; i += group.teams()) {
            const double factor = row(i)[j] * inverse;
            const Index end = smaller(i + 1, count);
            for (Index k = j + 1 + group.rank(); k < end; k += group.size()) row(i)[k] -= factor * row(k)[j];
        }
        group.sync();
    }
    for (Index j = count - 1; j > 0; --j) {
        const double solved = right[j] * theta[j];
        for (Index k = group.lane(); k < j; k += group.lanes()) right[k] -= row(j)[k] * solved;
        group.sync();
    }
    for (Index p = group.lane(); p < count; p += group.lanes()) theta[p] *= right[p];
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
//   weights: (landmarks,), sums: (landmarks, 2), to work with: moments, then certainties, and squared distances times them
template <typename Group, typename Out>
void finish(const Group& group, const FitModel& model, const Heatmap& maps, double stride, const Guess& frame,
            double size, const double* theta, const double* shape, double* weights, double* sums,
            const FitResult<Out>& result) {
    const FitOptions& options = *model.options;
    for (Index k = group.lane(); k < model.parameters - 4; k += group.lanes())
        result.coefficients[k] = static_cast<Out>(theta[4 + k] / (frame.size * model.deviations[k]));
    const double radius = options.peak_radius / stride, largest_move = options.largest_move / stride;
    const auto threshold = static_cast<float>(options.threshold);
    for (Index i = group.team(); i < model.landmarks; i += group.teams()) {
        const auto [x, y] = Placed(frame, shape + 2 * i);
        const Heatmap map = maps.neighbour(i);
        const Moments moments = window_moments(group, map, peak_window(map, x, y, radius), threshold);
        if (group.rank() > 0) continue;
        weights[i] = moments.w2;
        sums[2 * i] = moments.w2x;
        sums[2 * i + 1] = moments.w2y;
    }
    group.sync();
    // What is left is to wait, for divisions and a pixel: all landmarks do so at once.
    for (Index i = group.lane(); i < model.landmarks; i += group.lanes()) {
        const auto [x, y] = Placed(frame, shape + 2 * i);
        const Peak peak = centroid(maps.neighbour(i), {weights[i], sums[2 * i], sums[2 * i + 1]}, x, y);
        const double dx = peak.x - x, dy = peak.y - y;
        // What is further away is a false peak, however high.
        const bool near = larger(fabs(dx), fabs(dy)) <= largest_move;
        const double certainty = near ? smaller(larger(0.0, static_cast<double>(peak.value)), 1.0) : 0;
        weights[i] = certainty;
        sums[2 * i] = certainty * (dx * dx + dy * dy);
        result.certainties[i] = static_cast<Out>(certainty);
        result.shapes[2 * i] = static_cast<Out>(x);
        result.shapes[2 * i + 1] = static_cast<Out>(y);
        result.points[2 * i] = static_cast<Out>(x + certainty * dx);
        result.points[2 * i + 1] = static_cast<Out>(y + certainty * dy);
    }
    group.sync();
    double totals[2] = {};  // of the certainties; of the squared distances, weighted by them
    for (Index i = group.rank(); i < model.landmarks; i += group.size()) {
        totals[0] += weights[i];
        totals[1] += sums[2 * i];
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
    const Index landmarks = model.landmarks, parameters = model.parameters, half = model.half();
    double* left = workspace;
    double* right = left + half;
    double* theta = right + parameters;
    double* weights = theta + parameters;    // (landmarks,): sums of w^2
    double* turned = weights + landmarks;    // (landmarks, 2): sums of w^2 x, turned into the frame of the model
    double* shape = turned + 2 * landmarks;  // (landmarks, 2), in that frame

    Guess frame{};  // of the shape
    Guess guess = first_guess(group, model, evidence, static_cast<double>(larger(maps.height, maps.width)));
    for (Index round = 0; round <= model.windows; ++round) {
        const double radius = round > 0 ? model.radii[round - 1] / stride : 0;
        for (Index i = group.team(); i < landmarks; i += group.teams()) {
            Moments m{evidence[i].w2, evidence[i].w2x, evidence[i].w2y};
            if (round > 0) {
                const Heatmap map = maps.neighbour(i);
                const auto [x, y] = Placed(frame, shape + 2 * i);
                m = window_moments(group, map, window(map, x, y, radius, radius), threshold);
            }
            if (group.rank() > 0) continue;
            weights[i] = m.w2;
            turned[2 * i] = guess.cos * m.w2x + guess.sin * m.w2y;
            turned[2 * i + 1] = guess.cos * m.w2y - guess.sin * m.w2x;
        }
        group.sync();
        combine(group, weights, landmarks, model.products, half, left);
        project(group, model, turned, right);
        group.sync();
        add_prior(group, model, guess, maps, stride, left, right);
        group.sync();
        solve_system(group, left, right, parameters, theta);
        combine(group, theta, parameters, model.basis, 2 * landmarks, shape);
        frame = guess;
        const double size = sqrt(theta[0] * theta[0] + theta[1] * theta[1]), inverse = 1 / size;
        const double cos = theta[0] * inverse, sin = theta[1] * inverse;
        guess = {frame.cos * cos - frame.sin * sin, frame.sin * cos + frame.cos * sin, size};
        group.sync();
    }
    finish(group, model, maps, stride, frame, guess.size, theta, shape, weights, turned, result);
}

#ifdef __CUDACC_RTC__

// Compiled with LGCN_LANDMARKS and LGCN_PARAMETERS of the model, and LGCN_THREADS of a block.

// A thread block; its teams are its warps.
struct Block {
    __device__ int lane() const { return threadIdx.x; }
    __device__ int lanes() const { return LGCN_THREADS; }
    __device__ int team() const { return threadIdx.x / 32; }
    __device__ int teams() const { return LGCN_THREADS / 32; }
    __device__ int rank() const { return threadIdx.x % 32; }
    __device__ int size() const { return 32; }
    __device__ void sync() const { __syncthreads(); }

    template <typename T, int count>
    __device__ void sum(T (&values)[count]) const {
        for (int other = 16; other > 0; other /= 2)
            for (int i = 0; i < count; ++i) values[i] += __shfl_xor_sync(~0u, values[i], other);
    }

    __device__ double least(double value) const {
        for (int other = 16; other > 0; other /= 2) value = smaller(value, __shfl_xor_sync(~0u, value, other));
        return value;
    }
};

#if LGCN_PARAMETERS <= 32

// 1 / x to about the last bit, without a division's branches for numbers that are not normal.
inline double reciprocal(double x) {
#ifdef __CUDA_ARCH__
    double y;
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
#else
    double y = 1 / static_cast<float>(x);
#endif
    const double error = 1 - x * y;
    return y + y * (error + error * error);
}

// In the place of the general one: one warp alone, with row i of the system in the registers of lane i, takes each
// unknown out of all rows but its own (Gauss and Jordan). The rows move on: the unknown's column is their first.
inline void solve_system(const Block& group, double* left, double* right, Index, double* theta) {
    constexpr int count = LGCN_PARAMETERS;
    if (group.team() == 0) {
        const int lane = group.rank(), i = smaller(lane, count - 1);  // lanes to spare have the last row too
        double row[count + 1], value = right[i], own = 0;
#pragma unroll
        for (int k = 0; k < count; ++k) {
            const double lower = left[i * (i + 1) / 2 + k], upper = left[k * (k + 1) / 2 + i];
            row[k] = k <= i ? lower : upper;
        }
        row[count] = 0;
        double inverse = reciprocal(__shfl_sync(~0u, row[0], 0));
        __syncwarp();
        // This column and the next stand where the matrix was; what is read behind their ends is never used.
        if (lane < count) left[lane] = row[0];
        __syncwarp();
#pragma unroll 2
        for (int j = 0; j < count; ++j) {
            // As the matrix is symmetric, the row of the unknown is the column of it.
            const double* own_row = left + j % 2 * count + j;
            const double factor = lane == j ? 0 : row[0] * inverse;
            if (lane == j) own = inverse;
            // The next unknown's division first, as it takes longest.
            row[0] = row[1] - factor * own_row[1];
            if (lane < count) left[(j + 1) % 2 * count + lane] = row[0];
            inverse = reciprocal(__shfl_sync(~0u, row[0], j + 1));
            value -= factor * __shfl_sync(~0u, value, j);
#pragma unroll
            for (int k = 1; k < count; ++k) row[k] = row[k + 1] - factor * own_row[k + 1];
            __syncwarp();
        }
        if (lane < count) theta[lane] = value * own;
    }
    group.sync();
}

#endif

// One block a face; workspace in shared memory.
extern "C" __global__ void __launch_bounds__(LGCN_THREADS, 1)
    fit_faces(const float* heatmaps, const Evidence<float>* evidence, const double* constants, long long windows,
              long long height, long long width, double stride, float* points, float* shapes, float* coefficients,
              float* certainties, float* residuals) {
    extern __shared__ __align__(16) double workspace[];
    constexpr Index landmarks = LGCN_LANDMARKS, parameters = LGCN_PARAMETERS;
    const FitModel model(constants, landmarks, parameters, static_cast<Index>(windows));
    const long long face = blockIdx.x, first = face * landmarks;
    const Heatmap maps{heatmaps + first * height * width, static_cast<Index>(height), static_cast<Index>(width)};
    fit_face(Block{}, model, maps, evidence + first, stride, workspace,
             FitResult<float>{points + 2 * first, shapes + 2 * first, coefficients + face * (parameters - 4),
                              certainties + first, residuals + face});
}

#endif

}  // namespace lgcn
