// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0

// Runs one model a number of times, in ours or in ONNX Runtime's library, in one thread:
//
//   infer MODEL.qcm RUNS NAME:DTYPE:1x3x32x32:FILE... NAME:FILE...
//   infer libonnxruntime.so:MODEL.onnx RUNS (the same)
//
// Inputs have four fields, outputs two.  Both runtimes get the same tensors and return new ones.
// With INFER_MAPS=FILE it copies its memory map there, so that addresses can be given names.
#include <dlfcn.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <memory>

#include "qcm.h"

namespace {

struct Input {
  std::string name, dtype;
  std::vector<int64_t> shape;
  std::vector<char> bytes;
};

struct Output {
  std::string name, path;
};

/*! One inference; the bytes of each output. */
using Bytes = std::vector<std::pair<const void*, size_t>>;
using Infer = std::function<Bytes()>;

std::vector<std::string> Split(const std::string& text, char by) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, by);) parts.push_back(part);
  return parts;
}

std::vector<char> Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

Infer Ours(const std::string& path, const std::vector<Input>& inputs) {
  auto model = std::make_shared<qcm::Model>(path);
  auto tensors = std::make_shared<std::vector<qcm::Tensor>>();
  for (const qcm::Spec& spec : model->inputs()) {
    tensors->push_back(qcm::NewTensor(spec.dtype, spec.shape));
    bool found = false;
    for (const Input& input : inputs) {
      if (input.name != spec.name) continue;
      found = input.bytes.size() == tvm::ffi::GetDataSize(tensors->back());
      if (found) {
        std::memcpy(tensors->back().data_ptr(), input.bytes.data(), input.bytes.size());
      }
    }
    if (!found) throw std::runtime_error("no input " + spec.name + " of the right size");
  }
  auto results = std::make_shared<std::vector<qcm::Tensor>>();
  return [=]() {
    *results = model->Run(*tensors);
    Bytes bytes;
    for (const qcm::Tensor& tensor : *results) {
      bytes.emplace_back(tensor.data_ptr(), tvm::ffi::GetDataSize(tensor));
    }
    return bytes;
  };
}

/*! ONNX Runtime by its C interface, a table of functions whose order never changes; the wheel
 *  brings no header.  Source: onnxruntime_c_api.h, struct OrtApi. */
class Ort {
 public:
  Ort(const std::string& library, const std::string& model, const std::vector<Input>& inputs,
      const std::vector<Output>& outputs) {
    void* handle = dlopen(library.c_str(), RTLD_NOW);
    if (handle == nullptr) throw std::runtime_error(dlerror());
    auto base = reinterpret_cast<const Base* (*)()>(dlsym(handle, "OrtGetApiBase"));
    if (base == nullptr) throw std::runtime_error(library + " is not ONNX Runtime");
    api_ = base()->get(/*version*/ 17);
    if (api_ == nullptr) throw std::runtime_error(library + " is too old");
    Check(Call<int, const char*, void**>(kCreateEnv, 3, "infer", &env_));
    void* options = nullptr;
    Check(Call<void**>(kCreateSessionOptions, &options));
    Check(Call<void*, int>(kSetIntraOpNumThreads, options, 1));
    Check(Call<void*, int>(kSetInterOpNumThreads, options, 1));
    Check(Call<void*, const char*, void*, void**>(kCreateSession, env_, model.c_str(), options,
                                                 &session_));
    void* memory = nullptr;
    Check(Call<int, int, void**>(kCreateCpuMemoryInfo, /*arena*/ 1, /*default*/ 0, &memory));
    for (const Input& input : inputs) {
      void* value = nullptr;
      bytes_.push_back(input.bytes);
      shapes_.push_back(input.shape);
      Check(Call<void*, void*, size_t, const int64_t*, size_t, int, void**>(
          kCreateTensorWithData, memory, bytes_.back().data(), bytes_.back().size(),
          shapes_.back().data(), shapes_.back().size(), Type(input.dtype), &value));
      values_.push_back(value);
      input_names_.push_back(input.name);
    }
    for (const Output& output : outputs) output_names_.push_back(output.name);
  }

  Bytes Run() {
    for (void* value : results_) Release(kReleaseValue, value);
    results_.assign(output_names_.size(), nullptr);
    std::vector<const char*> in, out;
    for (const std::string& name : input_names_) in.push_back(name.c_str());
    for (const std::string& name : output_names_) out.push_back(name.c_str());
    Check(Call<void*, void*, const char**, void**, size_t, const char**, size_t, void**>(
        kRun, session_, nullptr, in.data(), values_.data(), in.size(), out.data(), out.size(),
        results_.data()));
    Bytes bytes;
    for (void* value : results_) {
      void* data = nullptr;
      void* about = nullptr;
      size_t count = 0;
      int type = 0;
      Check(Call<void*, void**>(kGetTensorMutableData, value, &data));
      Check(Call<void*, void**>(kGetTensorTypeAndShape, value, &about));
      Check(Call<void*, size_t*>(kGetTensorShapeElementCount, about, &count));
      Check(Call<void*, int*>(kGetTensorElementType, about, &type));
      Release(kReleaseTensorTypeAndShape, about);
      bytes.emplace_back(data, count * Size(type));
    }
    return bytes;
  }

 private:
  struct Base {
    void* const* (*get)(uint32_t version);
    const char* (*version)();
  };
  // Places in struct OrtApi.
  enum : size_t {
    kGetErrorMessage = 2,
    kCreateEnv = 3,
    kCreateSession = 7,
    kRun = 9,
    kCreateSessionOptions = 10,
    kSetIntraOpNumThreads = 24,
    kSetInterOpNumThreads = 25,
    kCreateTensorWithData = 49,
    kGetTensorMutableData = 51,
    kGetTensorElementType = 60,
    kGetTensorShapeElementCount = 64,
    kGetTensorTypeAndShape = 65,
    kCreateCpuMemoryInfo = 69,
    kReleaseValue = 96,
    kReleaseTensorTypeAndShape = 99,
  };

  template <typename... Args>
  void* Call(size_t place, Args... args) {
    return reinterpret_cast<void* (*)(Args...)>(api_[place])(args...);
  }
  void Release(size_t place, void* object) {
    reinterpret_cast<void (*)(void*)>(api_[place])(object);
  }
  void Check(void* status) {
    if (status == nullptr) return;
    throw std::runtime_error(
        reinterpret_cast<const char* (*)(void*)>(api_[kGetErrorMessage])(status));
  }
  static int Type(const std::string& name) {
    for (auto [type, id] : {std::pair<const char*, int>{"float32", 1}, {"uint8", 2}, {"int8", 3},
                            {"int32", 6}, {"int64", 7}, {"bool", 9}}) {
      if (name == type) return id;
    }
    throw std::runtime_error("unknown dtype " + name);
  }
  static size_t Size(int type) { return type == 7 ? 8 : type == 1 || type == 6 ? 4 : 1; }

  void* const* api_ = nullptr;
  void* env_ = nullptr;
  void* session_ = nullptr;
  std::vector<std::string> input_names_, output_names_;
  std::vector<std::vector<char>> bytes_;
  std::vector<std::vector<int64_t>> shapes_;
  std::vector<void*> values_, results_;
};

int Main(const std::vector<std::string>& arguments) {
  if (arguments.size() < 3) {
    std::cerr << "usage: infer [libonnxruntime.so:]MODEL RUNS NAME:DTYPE:SHAPE:FILE... NAME:FILE...\n";
    return 2;
  }
  std::vector<Input> inputs;
  std::vector<Output> outputs;
  for (size_t i = 2; i < arguments.size(); ++i) {
    std::vector<std::string> parts = Split(arguments[i], ':');
    if (parts.size() == 2) {
      outputs.push_back({parts[0], parts[1]});
    } else if (parts.size() == 4) {
      Input input{parts[0], parts[1], {}, Read(parts[3])};
      for (const std::string& extent : Split(parts[2], 'x')) {
        input.shape.push_back(std::stoll(extent));
      }
      inputs.push_back(std::move(input));
    } else {
      throw std::runtime_error("neither an input nor an output: " + arguments[i]);
    }
  }
  Infer infer;
  size_t colon = arguments[0].find(':');
  if (colon == std::string::npos) {
    infer = Ours(arguments[0], inputs);
  } else {
    auto ort = std::make_shared<Ort>(arguments[0].substr(0, colon), arguments[0].substr(colon + 1),
                                     inputs, outputs);
    infer = [ort]() { return ort->Run(); };
  }
  Bytes bytes;
  for (int left = std::stoi(arguments[1]); left > 0; --left) bytes = infer();
  if (bytes.size() != outputs.size()) throw std::runtime_error("another number of outputs");
  for (size_t i = 0; i < bytes.size(); ++i) {
    std::ofstream file(outputs[i].path, std::ios::binary);
    file.write(static_cast<const char*>(bytes[i].first),
               static_cast<std::streamsize>(bytes[i].second));
    if (!file) throw std::runtime_error("cannot write " + outputs[i].path);
  }
  if (const char* path = std::getenv("INFER_MAPS")) {
    std::ofstream(path) << std::ifstream("/proc/self/maps").rdbuf();
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  int status = 1;
  try {
    status = Main(std::vector<std::string>(arguments + 1, arguments + count));
  } catch (const std::exception& error) {
    std::cerr << "infer: " << error.what() << "\n";
  }
  std::cout.flush();
  // Neither runtime is taken down: its threads and tables are no part of an inference.
  std::_Exit(status);
}
