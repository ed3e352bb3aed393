// The local-global context network in eval mode, image to heatmaps; the reference is LGCN.forward in lgcn_fast/model.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "convolution.hpp"
#include "gaussian_product.hpp"
#include "gaussian_sum.hpp"
#include "matrix.hpp"
#include "planes.hpp"
#include "threads.hpp"
#include "winograd.hpp"

namespace lgcn {

// What `LGCNConfig` says, without the factors: they are in the filters.
struct Shape {
    std::int64_t landmarks, side_channels, shuffle, stride, dilation;
    Taps taps;  // of the kernel convolution
};

// Pixels of one image, (channels, height, width).
template <typename Pixel>
struct Image {
    const Pixel* data;
    std::int64_t channels, height, width;
};

template <typename T>
class Network {
public:
    Network(const Shape& shape, const Multiplier<T>& multiplier, const std::vector<Filters>& local,
            const Filters& heads, const std::vector<Filters>& context, const Filters& refine)
        : shape_(shape),
          multiplier_(multiplier),
          in_channels_(local.front().in),
          map_channels_(round_up(shape.landmarks + shape.side_channels, kPanel)),
          channels_(round_up(local.front().out, kPanel)),
          step_(shape.shuffle / shape.stride),
          heads_(heads, channels_, step_, multiplier.inner_step),
          refine_(refine, channels_, step_, multiplier.inner_step) {
        if (step_ > kWide) throw std::invalid_argument("shuffle: expected at most 32 times the stride");
        for (const Filters& f : local) {
            local_.push_back(make_layer(multiplier_, f, local_.empty() ? in_channels_ : channels_));
            reach_ = std::max(reach_, f.kernel / 2);
        }
        for (const Filters& f : context)
            context_.push_back(make_layer(multiplier_, f, context_.empty() ? map_channels_ : channels_));
        for (const Layers* layers : {&local_, &context_})
            for (const auto& layer : *layers) scratch_ = std::max(scratch_, layer->scratch());
    }

    std::int64_t landmarks() const { return shape_.landmarks; }
    std::int64_t stride() const { return shape_.stride; }
    std::int64_t heatmap_side(std::int64_t side) const { return (side + shape_.stride - 1) / shape_.stride; }
    std::int64_t image_channels() const { return in_channels_ / (shape_.shuffle * shape_.shuffle); }

    // images: (count, channels, height, width), image describes the first. As many faces as there are threads go side by
    // side; then the threads share the rest, a team for each face. The user of the heatmaps (N, h, w) says where those of
    // face i go, place(i, buffer), with a reused buffer of that size where it wants_buffer(); and is told when some of
    // its maps are there, use_maps(i, heatmaps, maps), in the thread that made them, and when all are, use_face(i,
    // heatmaps, part, parts), in each thread of the team.
    template <typename Pixel, typename User>
    void operator()(const Image<Pixel>& image, std::int64_t count, int num_threads, const User& user) {
        const std::int64_t threads = thread_count(num_threads), rest = count % threads, alone = count - rest;
        const std::int64_t team_size = rest ? std::min(threads / rest, useful_threads(image)) : 1;
        const std::int64_t started = alone ? threads : rest * team_size;
        std::vector<std::unique_ptr<Workspace>> workspaces;
        for (std::int64_t t = 0; t < (alone ? threads : rest); ++t)
            workspaces.push_back(borrow(image.height, image.width, t < rest ? team_size : 1, user.wants_buffer()));
        std::deque<Team> teams;
        for (std::int64_t i = 0; i < rest; ++i) teams.emplace_back(team_size);
        Team everyone(started);
        run_threads(started, [&](std::int64_t t) {
            const auto run_face = [&](std::int64_t i, std::int64_t workspace, Team& team, std::int64_t member) {
                Image<Pixel> face = image;
                face.data += i * image.channels * image.height * image.width;
                run(face, *workspaces[static_cast<std::size_t>(workspace)], team, member, i, user);
            };
            const Ready<T> ready(multiplier_);
            try {
                Team self(1);
                for (std::int64_t i = t; i < alone; i += threads) run_face(i, t, self, 0);
                everyone.wait();
                const std::int64_t team = t / team_size;
                if (team < rest) run_face(alone + team, team, teams[static_cast<std::size_t>(team)], t % team_size);
            } catch (...) {
                everyone.fail(std::current_exception());
                for (Team& team : teams) team.fail(std::current_exception());
                throw;
            }
        });
        for (auto& workspace : workspaces) give_back(std::move(workspace), workspaces.size());
    }

private:
    using Layers = std::vector<std::unique_ptr<Layer<T>>>;

    // More than these have too few blocks each to be worth their start.
    template <typename Pixel>
    std::int64_t useful_threads(const Image<Pixel>& image) const {
        const std::int64_t area = shape_.shuffle * shape_.shuffle;
        return std::max<std::int64_t>(image.height * image.width / area / (2 * kTall), 1);
    }

    // What a member of a team has for itself.
    struct Member {
        Blur<T> blur;
        Buffer<float> side;  // maps of the side branch, behind the blur
        Buffer<float> scratch;
    };

    // So many (and all of a call), and bytes, are kept for the next images of their sizes: a pyramid has several. The
    // last is kept, however large.
    static constexpr std::size_t kIdle = 12, kIdleBytes = std::size_t{1} << 29;

    // What one image needs.
    struct Workspace {
        Workspace(const Network& n, std::int64_t image_height, std::int64_t image_width)
            : image_height(image_height),
              image_width(image_width),
              height(n.heatmap_side(image_height)),
              width(n.heatmap_side(image_width)),
              grid(side(image_height, n), side(image_width, n), 1, n.reach_),
              context_grid(grid.height, grid.width, n.shape_.dilation, 1),
              input(grid.elements(n.in_channels_)),
              context(context_grid.elements(n.map_channels_)) {
            for (Buffer<T>& plane : local) plane = Buffer<T>(grid.elements(n.channels_));
            for (Buffer<T>& plane : global) plane = Buffer<T>(context_grid.elements(n.channels_));
        }
        // For a team of so many.
        void prepare(const Network& n, std::int64_t threads) {
            while (static_cast<std::int64_t>(members.size()) < threads) {
                Blur<T> blur(n.shape_.taps, height, width);
                Buffer<float> side_maps(n.shape_.side_channels ? kPanel * height * width : 0);
                members.push_back({std::move(blur), std::move(side_maps), Buffer<float>(n.scratch_)});
            }
            const std::int64_t most = std::max(n.shape_.landmarks, n.shape_.side_channels);
            maps_each = (most + threads - 1) / threads;
            const std::int64_t needed = threads * maps_each * members.front().blur.map_elements();
            if (maps.count() < needed) maps = Buffer<T>(needed);
        }
        std::size_t bytes() const {
            std::size_t sum = input.bytes() + context.bytes() + maps.bytes() + (heatmaps ? heatmaps->bytes() : 0);
            for (int i = 0; i < 2; ++i) sum += local[i].bytes() + global[i].bytes();
            for (const Member& member : members)
                sum += member.blur.bytes() + member.side.bytes() + member.scratch.bytes();
            return sum;
        }
        static std::int64_t side(std::int64_t pixels, const Network& n) {
            return (pixels + n.shape_.shuffle - 1) / n.shape_.shuffle;
        }

        std::int64_t image_height, image_width, height, width;
        Grid grid, context_grid;
        Buffer<T> input, context;
        Buffer<T> local[2], global[2];
        std::optional<Buffer<float>> heatmaps;
        std::vector<Member> members;
        Buffer<T> maps;  // before the blur, `maps_each` of each member
        std::int64_t maps_each = 0;
    };

    std::unique_ptr<Workspace> borrow(std::int64_t height, std::int64_t width, std::int64_t threads, bool buffer) {
        std::unique_ptr<Workspace> found;
        if (const auto lock = lock_idle()) {
            // The latest: the likeliest to be in the cache.
            const auto same = std::find_if(idle_.rbegin(), idle_.rend(), [&](const auto& w) {
                return w->image_height == height && w->image_width == width;
            });
            if (same != idle_.rend()) {
                found = std::move(*same);
                idle_.erase(std::next(same).base());
            }
        }
        if (!found) found = std::make_unique<Workspace>(*this, height, width);
        found->prepare(*this, threads);
        if (buffer && !found->heatmaps) found->heatmaps.emplace(shape_.landmarks * found->height * found->width);
        return found;
    }

    // Without the lock if it is not to be had: in a forked process nobody opens it whose thread was not taken along.
    std::unique_lock<std::mutex> lock_idle() {
        std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        for (int turns = 0; !lock && turns < 1000; ++turns) {
            std::this_thread::yield();
            lock.try_lock();
        }
        return lock;
    }

    // One of `together` that a call had.
    void give_back(std::unique_ptr<Workspace> workspace, std::size_t together) {
        std::vector<std::unique_ptr<Workspace>> old;  // freed when others may borrow again
        const auto lock = lock_idle();
        if (!lock) return;
        idle_.push_back(std::move(workspace));
        std::size_t bytes = 0;
        for (const auto& idle : idle_) bytes += idle->bytes();
        while (idle_.size() > std::max(kIdle, together) || (bytes > kIdleBytes && idle_.size() > 1)) {
            bytes -= idle_.front()->bytes();
            old.push_back(std::move(idle_.front()));
            idle_.pop_front();
        }
    }

    template <typename Pixel, typename User>
    void run(const Image<Pixel>& image, Workspace& w, Team& team, std::int64_t member, std::int64_t index,
             const User& user) const {
        float* out = user.place(index, w.heatmaps ? w.heatmaps->data() : nullptr);
        fill_input(image, w, team.share(w.grid.height, member));
        team.wait();
        float* scratch = w.members[static_cast<std::size_t>(member)].scratch.data();
        const T* plane = convolve(local_, w.grid, w.input.data(), w.local, team, member, scratch);
        // Each member has its own part of the maps: they stay in its cache.
        const Range heatmaps = team.share(shape_.landmarks, member), side = team.share(shape_.side_channels, member);
        make_maps(plane, heatmaps, w, member, out);
        make_maps(plane, {shape_.landmarks + side.first, shape_.landmarks + side.last}, w, member, out);
        team.wait();
        plane = convolve(context_, w.context_grid, w.context.data(), w.global, team, member, scratch);
        add_refined(plane, heatmaps, w, out);
        user.use_maps(index, out, heatmaps);
        team.wait();
        user.use_face(index, out, member, team.size());
    }

    // Ends with a plane that all members have finished.
    const T* convolve(const Layers& layers, const Grid& grid, const T* in, Buffer<T>* planes, Team& team,
                      std::int64_t member, float* scratch) const {
        for (std::size_t i = 0; i < layers.size(); ++i) {
            T* result = planes[i % 2].data();
            (*layers[i])(multiplier_, grid, in, result, team, member, scratch);
            in = result;
            team.wait();
        }
        return in;
    }

    // Pixel-unshuffle; beyond the image the border's pixels repeat. 128 is the network's zero.
    template <typename Pixel>
    void fill_input(const Image<Pixel>& image, Workspace& w, Range rows) const {
        const std::int64_t step = shape_.shuffle;
        for (std::int64_t y = rows.first; y < rows.last; ++y)
            for (std::int64_t x = 0; x < w.grid.width; ++x) {
                T* pixel = w.input.data() + (w.grid.origin + w.grid.position(y, x)) * in_channels_;
                for (std::int64_t c = 0; c < image.channels; ++c)
                    for (std::int64_t j = 0; j < step; ++j) {
                        const std::int64_t row = std::min(y * step + j, image.height - 1);
                        const Pixel* line = image.data + (c * image.height + row) * image.width;
                        for (std::int64_t i = 0; i < step; ++i)
                            detail::put(pixel++,
                                        static_cast<float>(line[std::min(x * step + i, image.width - 1)]) - 128);
                    }
            }
    }

    // Heads, blur and context of some maps.
    void make_maps(const T* plane, Range maps, Workspace& w, std::int64_t member, float* out) const {
        Member& mine = w.members[static_cast<std::size_t>(member)];
        const std::int64_t pixels = w.height * w.width;
        const auto place = [&](std::int64_t map) {
            return w.maps.data() + (member * w.maps_each + map - maps.first) * mine.blur.map_elements();
        };
        heads_(multiplier_, w.grid, plane, maps,
               [&](std::int64_t map, std::int64_t y, std::int64_t x, const float* line, std::int64_t count) {
                   T* result = place(map) + y * mine.blur.row_stride() + x;
                   if (y < w.height)
                       in_registers<detail::PutLine>(multiplier_.registers, line, std::min(count, w.width - x),
                                                     map >= shape_.landmarks, result);
               });
        // Few at a time, so that they are still in the cache when the context is made of them.
        for (std::int64_t first = maps.first; first < maps.last; first += kPanel) {
            const std::int64_t count = std::min(kPanel, maps.last - first);
            const float* blurred[kPanel];
            for (std::int64_t i = 0; i < count; ++i) {
                // The landmarks' maps are needed again, those of the side branch are not.
                const bool heatmap = first + i < shape_.landmarks;
                float* result = heatmap ? out + (first + i) * pixels : mine.side.data() + i * pixels;
                mine.blur(multiplier_, place(first + i), result);
                blurred[i] = result;
            }
            fill_context(w, blurred, first, count);
        }
    }

    void add_refined(const T* plane, Range maps, const Workspace& w, float* out) const {
        refine_(multiplier_, w.context_grid, plane, maps,
                [&](std::int64_t map, std::int64_t y, std::int64_t x, const float* line, std::int64_t count) {
                    float* heatmap = out + (map * w.height + y) * w.width + x;
                    if (y < w.height) detail::add_line(line, std::min(count, w.width - x), heatmap);
                });
    }

    // Means of step x step pixels of some blurred maps, channels-last.
    void fill_context(Workspace& w, const float* const* blurred, std::int64_t first, std::int64_t maps) const {
        const Grid& grid = w.context_grid;
        alignas(64) float means[kPanel * kPanel] = {}, turned[kPanel * kPanel];
        const void* lines[kPanel];
        for (std::int64_t i = 0; i < kPanel; ++i) lines[i] = means + i * kPanel;
        for (std::int64_t y = 0; y < grid.height; ++y)
            for (std::int64_t x = 0; x < grid.width; x += kPanel) {
                const std::int64_t count = std::min(kPanel, grid.width - x);
                for (std::int64_t i = 0; i < maps; ++i)
                    lines[i] = average(blurred[i], w, y, x, count, means + i * kPanel);
                detail::transpose16(lines, kPanel, turned);
                T* pixels[kPanel];
                for (std::int64_t i = 0; i < count; ++i)
                    pixels[i] = w.context.data() + (grid.origin + grid.position(y, x + i)) * map_channels_ + first;
                detail::put_pixels(turned, pixels, count, maps);
            }
    }

    // A line of `count` means; may be the map itself.
    const float* average(const float* map, const Workspace& w, std::int64_t y, std::int64_t x, std::int64_t count,
                         float* means) const {
        const float* first = map + y * step_ * w.width + x * step_;
        const bool inside = (y + 1) * step_ <= w.height && (x + count) * step_ <= w.width;
        if (step_ == 1 && count == kPanel) return first;
        if (step_ == 2 && inside) {
            detail::halve(first, first + w.width, count, means);
        } else {
            for (std::int64_t i = 0; i < count; ++i) {
                means[i] = 0;
                for (std::int64_t j = 0; j < step_ * step_; ++j)
                    means[i] += map[std::min(y * step_ + j / step_, w.height - 1) * w.width +
                                    std::min((x + i) * step_ + j % step_, w.width - 1)];
                means[i] /= static_cast<float>(step_ * step_);
            }
        }
        return means;
    }

    Shape shape_;
    Multiplier<T> multiplier_;
    std::int64_t in_channels_, map_channels_, channels_, step_, reach_ = 0, scratch_ = 0;
    Layers local_, context_;
    Head<T> heads_, refine_;
    std::mutex mutex_;
    std::deque<std::unique_ptr<Workspace>> idle_;  // the latest last
};

}  // namespace lgcn
