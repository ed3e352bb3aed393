// Threads for the length of one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace lgcn {

inline std::int64_t thread_count(int num_threads) {
    return std::max<std::int64_t>(num_threads > 0 ? num_threads : std::thread::hardware_concurrency(), 1);
}

struct Range {
    std::int64_t first, last;
};

// The part of [0, count) that belongs to one of some threads.
inline Range share(std::int64_t count, std::int64_t thread, std::int64_t threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Calls work(t) for t in [0, threads) on a thread each, the first on the caller's.
template <typename Work>
void run_threads(std::int64_t threads, const Work& work) {
    if (threads < 1) return;
    std::vector<std::thread> pool;
    pool.reserve(static_cast<std::size_t>(threads));
    for (std::int64_t t = 1; t < threads; ++t) pool.emplace_back(work, t);
    work(0);
    for (std::thread& thread : pool) thread.join();
}

// Calls work(i) for i in [0, count) on several threads, each index on one of them, so that results do not depend on
// their number; `pixels` is the work behind one index. Starting a thread costs about as much as 200,000 pixels.
template <typename Work>
void parallel_for(std::int64_t count, std::int64_t pixels, int num_threads, const Work& work) {
    const std::int64_t useful = std::min(count, count * pixels / 200000 + 1);
    const std::int64_t threads = std::max<std::int64_t>(std::min(thread_count(num_threads), useful), 1);
    run_threads(threads, [&](std::int64_t t) {
        const Range mine = share(count, t, threads);
        for (std::int64_t i = mine.first; i < mine.last; ++i) work(i);
    });
}

// Threads that work on the same thing, step by step.
class Team {
public:
    explicit Team(std::int64_t size) : size_(size) {}

    // The part of [0, count) that belongs to one of them.
    Range share(std::int64_t count, std::int64_t member) const { return lgcn::share(count, member, size_); }

    // Returns when all have called it. Steps are short: who waits does not sleep.
    void wait() {
        if (size_ == 1) return;
        const std::int64_t step = step_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            step_.store(step + 1, std::memory_order_release);
            return;
        }
        for (int turns = 0; step_.load(std::memory_order_acquire) == step; ++turns)
            if (turns > 10000) std::this_thread::yield();  // Somebody else may need the core to arrive.
    }

private:
    const std::int64_t size_;
    std::atomic<std::int64_t> arrived_{0}, step_{0};
};

}  // namespace lgcn
