// The CUDA kernel of kernels/fit_face.hpp as it is, built and called by tests/test_cuda_fit.py, which puts kernel.cu
// where it is included from. What it needs of CUDA, on a CPU: its threads take turns, in another order each time, and
// pass a barrier when all are there. Values that one warp exchanges, it exchanges at a barrier of its own.
#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(threads, blocks)
#define __align__(bytes)

namespace {
struct Number {
    int x;
} threadIdx, blockIdx;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool done = false;
    long block_barriers = 0, warp_barriers = 0;  // passed or waited at
};
std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
long long slots[LGCN_THREADS];

// Waits until all threads of the block, or of the warp, have come as far.
void barrier(long Fiber::* count, int size) {
    const int me = threadIdx.x, first = me / size * size;
    const long mine = ++(fibers[me].get()->*count);
    const auto behind = [&](const auto& fiber) { return fiber.get()->*count < mine; };
    while (std::any_of(fibers.begin() + first, fibers.begin() + first + size, behind))
        swapcontext(&fibers[me]->context, &scheduler);
}

void __syncthreads() { barrier(&Fiber::block_barriers, LGCN_THREADS); }
void __syncwarp() { barrier(&Fiber::warp_barriers, 32); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    memcpy(&slots[threadIdx.x], &value, sizeof(T));
    __syncwarp();
    memcpy(&value, &slots[threadIdx.x / 32 * 32 + lane % 32], sizeof(T));
    __syncwarp();
    return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
    return __shfl_sync(mask, value, threadIdx.x % 32 ^ other);
}

float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
}  // namespace

#define __CUDACC_RTC__
#include "kernel.cu"

namespace lgcn {
double workspace[1 << 16];
}

std::function<void()> kernel;

extern "C" void fit_faces_on_device(long long faces, const float* heatmaps, const lgcn::Evidence<float>* evidence,
                                    const double* constants, long long windows, long long height, long long width,
                                    double stride, float* points, float* shapes, float* coefficients,
                                    float* certainties, float* residuals) {
    kernel = [=] {
        lgcn::fit_faces(heatmaps, evidence, constants, windows, height, width, stride, points, shapes, coefficients,
                        certainties, residuals);
    };
    std::mt19937 random;
    for (blockIdx.x = 0; blockIdx.x < faces; ++blockIdx.x) {
        std::fill(std::begin(lgcn::workspace), std::end(lgcn::workspace), NAN);
        std::vector<int> order;
        fibers.clear();
        for (int i = 0; i < LGCN_THREADS; ++i) {
            order.push_back(i);
            Fiber& fiber = *fibers.emplace_back(std::make_unique<Fiber>());
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &scheduler;
            makecontext(
                &fiber.context,
                +[] {
                    kernel();
                    fibers[threadIdx.x]->done = true;
                },
                0);
        }
        for (bool running = true; running;) {
            running = false;
            std::shuffle(order.begin(), order.end(), random);
            for (int i : order) {
                if (fibers[i]->done) continue;
                running = true;
                threadIdx.x = i;
                swapcontext(&scheduler, &fibers[i]->context);
            }
        }
    }
}
