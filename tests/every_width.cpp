// csrc/peaks.hpp with the vectors of any registers: the widest that a processor has is what the extension takes by itself.
#include "peaks.hpp"

extern "C" int widest() { return static_cast<int>(lgcn::widest_registers()); }

extern "C" float row_maximum(int registers, const float* row, std::int64_t width) {
    return lgcn::in_registers<lgcn::detail::RowMaximum>(static_cast<lgcn::Registers>(registers), row, width);
}

extern "C" std::int64_t first_maximum(int registers, const float* values, std::int64_t count) {
    return lgcn::in_registers<lgcn::detail::FirstMaximum>(static_cast<lgcn::Registers>(registers), values, count);
}

extern "C" void moments(int registers, const float* map, std::int64_t height, std::int64_t width,
                        const std::int64_t* window, float threshold, double* out) {
    const lgcn::Window part{window[0], window[1], window[2], window[3]};
    const lgcn::Moments found = lgcn::in_registers<lgcn::detail::WindowMoments>(
        static_cast<lgcn::Registers>(registers), lgcn::Heatmap{map, height, width}, part, threshold);
    out[0] = found.w2, out[1] = found.w2x, out[2] = found.w2y;
}
