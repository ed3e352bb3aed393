// Threads for the length of one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
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

// The first of the exceptions that several threads may throw.
class FirstError {
public:
    bool there() const { return there_.load(std::memory_order_acquire); }
    void keep(const std::exception_ptr& error) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = error;
        there_.store(true, std::memory_order_release);
    }
    void rethrow() const {
        if (there()) std::rethrow_exception(error_);
    }

private:
    std::mutex mutex_;
    std::exception_ptr error_;
    std::atomic<bool> there_{false};
};

// Calls work(t) for t in [0, threads) on a thread each, the first on the caller's, once all have started. What one of
// them throws is thrown here, when all have ended.
template <typename Work>
void run_threads(std::int64_t threads, const Work& work) {
    if (threads < 1) return;
    enum { kWait, kGo, kLeave };
    std::atomic<int> signal{kWait};
    FirstError error;
    const auto call = [&](std::int64_t t) {
        try {
            work(t);
        } catch (...) {
            error.keep(std::current_exception());
        }
    };
    std::vector<std::thread> pool;
    const auto join = [&] {
        for (std::thread& thread : pool) thread.join();
    };
    const auto leave = [&] {
        signal.store(kLeave, std::memory_order_release);
        join();
    };
    pool.reserve(static_cast<std::size_t>(threads));
    try {
        for (std::int64_t t = 1; t < threads; ++t)
            pool.emplace_back([&, t] {
                while (signal.load(std::memory_order_acquire) == kWait) std::this_thread::yield();
                if (signal.load(std::memory_order_acquire) == kGo) call(t);
            });
    } catch (const std::bad_alloc&) {
        leave();
        throw;
    } catch (const std::system_error& failure) {
        leave();
        throw std::invalid_argument("num_threads: expected as many threads as may be started, got " +
                                    std::to_string(threads) + " (" + failure.what() + ")");
    }
    signal.store(kGo, std::memory_order_release);
    call(0);
    join();
    error.rethrow();
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

    std::int64_t size() const { return size_; }

    // The part of [0, count) that belongs to one of them.
    Range share(std::int64_t count, std::int64_t member) const { return lgcn::share(count, member, size_); }

    // All who wait, or will, throw what one of them has thrown: it does not come any more.
    void fail(const std::exception_ptr& error) { error_.keep(error); }

    // Returns when all have called it. Steps are short: who waits does not sleep.
    void wait() {
        if (size_ == 1) return;
        const std::int64_t step = step_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            step_.store(step + 1, std::memory_order_release);
            return;
        }
        int turns = 0;
        while (step_.load(std::memory_order_acquire) == step) {
            error_.rethrow();
            if (turns < 10000) {
                ++turns;
            } else {
                std::this_thread::yield();  // Somebody else may need the core to arrive.
            }
        }
    }

private:
    const std::int64_t size_;
    std::atomic<std::int64_t> arrived_{0}, step_{0};
    FirstError error_;
};

}  // namespace lgcn
