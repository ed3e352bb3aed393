// What examples/cpp/landmarks.cpp uses of ONNX Runtime, declared for compilers only: where its headers are not installed,
// test_cpp_example.py can still tell whether the example compiles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

using ORTCHAR_T = char;
enum OrtAllocatorType { OrtArenaAllocator };
enum OrtMemType { OrtMemTypeDefault };

namespace Ort {

struct Exception : std::exception {};
struct Env {};
struct SessionOptions {};
struct RunOptions {};
struct AllocatorWithDefaultOptions {};
using AllocatedStringPtr = std::unique_ptr<char>;

struct MemoryInfo {
    static MemoryInfo CreateCpu(OrtAllocatorType, OrtMemType);
};

struct TensorTypeAndShapeInfo {
    std::vector<std::int64_t> GetShape() const;
};

struct Value {
    Value(Value&&);
    template <typename T>
    static Value CreateTensor(const MemoryInfo&, T*, std::size_t, const std::int64_t*, std::size_t);
    TensorTypeAndShapeInfo GetTensorTypeAndShapeInfo() const;
    template <typename T>
    const T* GetTensorData() const;
};

struct ModelMetadata {
    AllocatedStringPtr LookupCustomMetadataMapAllocated(const char*, const AllocatorWithDefaultOptions&) const;
};

struct Session {
    Session(Env&, const ORTCHAR_T*, const SessionOptions&);
    ModelMetadata GetModelMetadata() const;
    std::vector<Value> Run(const RunOptions&, const char* const*, const Value*, std::size_t, const char* const*,
                           std::size_t);
};

}  // namespace Ort
