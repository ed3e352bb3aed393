// A GPU's thread block on CPU threads, to prove that the phases of kernels/fit_face.hpp are properly separated: built
// and called by tests/test_cuda_fit.py.
#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#include "fit_face.hpp"

namespace {

// The block: `lanes` threads in teams of `size`.
struct Block {
    int lanes, size;
    std::barrier<> all;
    std::vector<std::unique_ptr<std::barrier<>>> teams;
    std::vector<double> slots;  // a number of each thread

    Block(int lanes, int size) : lanes(lanes), size(size), all(lanes), slots(static_cast<std::size_t>(lanes)) {
        for (int team = 0; team < lanes / size; ++team) teams.push_back(std::make_unique<std::barrier<>>(size));
    }
};

// One of its threads.
struct Thread {
    Block& block;
    int number;

    int lane() const { return number; }
    int lanes() const { return block.lanes; }
    int team() const { return number / block.size; }
    int teams() const { return block.lanes / block.size; }
    int rank() const { return number % block.size; }
    int size() const { return block.size; }
    void sync() const { block.all.arrive_and_wait(); }

    // What the shuffles of a warp do.
    template <typename Merge>
    double merged(double value, const Merge& merge) const {
        std::barrier<>& team_barrier = *block.teams[static_cast<std::size_t>(team())];
        const auto slot = [&](int rank) -> double& {
            return block.slots[static_cast<std::size_t>(team() * block.size + rank)];
        };
        slot(rank()) = value;
        team_barrier.arrive_and_wait();
        double result = slot(0);
        for (int other = 1; other < block.size; ++other) result = merge(result, slot(other));
        team_barrier.arrive_and_wait();
        return result;
    }

    template <int count>
    void sum(double (&values)[count]) const {
        for (double& value : values) value = merged(value, [](double a, double b) { return a + b; });
    }

    double least(double value) const {
        return merged(value, [](double a, double b) { return lgcn::smaller(a, b); });
    }
};

}  // namespace

// Arguments as of the kernel `fit_faces`, in `lanes` threads in teams of `size`.
extern "C" void fit_faces(int lanes, int size, long long faces, const float* heatmaps,
                          const lgcn::Evidence<float>* evidence, const double* constants, long long landmarks,
                          long long parameters, long long windows, long long height, long long width, double stride,
                          float* points, float* shapes, float* coefficients, float* certainties, float* residuals) {
    const lgcn::FitModel model(constants, landmarks, parameters, windows);
    for (long long face = 0; face < faces; ++face) {
        const long long first = face * landmarks;
        Block block(lanes, size);
        // Memory of its own: AddressSanitizer and ThreadSanitizer see what goes beyond it.
        std::vector<double> workspace(static_cast<std::size_t>(model.workspace()));
        std::vector<std::thread> threads;
        for (int lane = 0; lane < lanes; ++lane)
            threads.emplace_back([&, lane] {
                lgcn::fit_face(Thread{block, lane}, model,
                               lgcn::Heatmap{heatmaps + first * height * width, height, width}, evidence + first,
                               stride, workspace.data(),
                               lgcn::FitResult<float>{points + 2 * first, shapes + 2 * first,
                                                      coefficients + face * (parameters - 4), certainties + first,
                                                      residuals + face});
            });
        for (std::thread& thread : threads) thread.join();
    }
}
