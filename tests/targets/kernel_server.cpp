// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0

// Calls compiled kernels on arrays that it reads from standard input, in a loop: what the tests run
// under an emulator, where a process for each call would take most of the time.
//
// Request: a line "LIBRARY FUNCTION COUNT", then for each array a line "DTYPE NDIM EXTENT..." and
// its bytes.  Answer: a line "ok" and the bytes of all arrays, or a line "error MESSAGE".
// With the function "vm:main", main runs in the virtual machine, and the answer is "ok COUNT" and
// its results, each in the form of a request's arrays.
#include <iostream>
#include <sstream>

#include "qcm.h"

namespace {

qcm::Tensor ReadTensor() {
  std::string line, dtype;
  std::getline(std::cin, line);
  std::istringstream words(line);
  size_t ndim = 0;
  words >> dtype >> ndim;
  std::vector<int64_t> shape(ndim);
  for (int64_t& extent : shape) words >> extent;
  qcm::Tensor tensor = qcm::NewTensor(dtype, shape);
  auto size = static_cast<std::streamsize>(tvm::ffi::GetDataSize(tensor));
  std::cin.read(static_cast<char*>(tensor.data_ptr()), size);
  return tensor;
}

void WriteBytes(const qcm::Tensor& tensor) {
  std::cout.write(static_cast<const char*>(tensor.data_ptr()),
                  static_cast<std::streamsize>(tvm::ffi::GetDataSize(tensor)));
}

void WriteTensor(const qcm::Tensor& tensor) {
  DLDataType type = tensor.dtype();
  const char* kind = type.code == kDLInt ? "int" : type.code == kDLUInt ? "uint" : "float";
  if (type.code == kDLBool) {
    std::cout << "bool";
  } else {
    std::cout << kind << static_cast<int>(type.bits);
  }
  std::cout << " " << tensor.ndim();
  for (int64_t extent : tensor.shape()) std::cout << " " << extent;
  std::cout << "\n";
  WriteBytes(tensor);
}

/*! A model's machine; the last one is kept, for a library is asked for many times in a row. */
qcm::Function MainOf(const std::string& library) {
  static std::string kept;
  static tvm::ffi::Optional<qcm::Module> module, machine;
  if (kept != library) {
    module = qcm::Module::LoadFromFile(library);
    machine = (*module)->GetFunction("vm_load_executable").value()().cast<qcm::Module>();
    (*machine)->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, 2);
    kept = library;
  }
  return (*machine)->GetFunction("main").value();
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string library, function;
    size_t count = 0;
    words >> library >> function >> count;
    std::vector<qcm::Tensor> tensors;
    for (size_t i = 0; i < count; ++i) tensors.push_back(ReadTensor());
    qcm::Any result;
    bool whole = function == "vm:main";
    std::vector<qcm::AnyView> arguments(tensors.begin(), tensors.end());
    try {
      qcm::Function callee;
      tvm::ffi::Optional<qcm::Module> module;
      if (whole) {
        callee = MainOf(library);
      } else {
        module = qcm::Module::LoadFromFile(library);
        auto found = (*module)->GetFunction(function);
        if (!found.has_value()) throw std::runtime_error("no function " + function);
        callee = found.value();
      }
      callee.CallPacked(arguments.data(), static_cast<int32_t>(count), &result);
    } catch (const std::exception& error) {
      std::string message = error.what();
      std::cout << "error " << message.substr(0, message.find('\n')) << std::endl;
      continue;
    }
    if (!whole) {
      std::cout << "ok\n";
      for (const qcm::Tensor& tensor : tensors) WriteBytes(tensor);
    } else if (auto one = result.as<qcm::Tensor>()) {
      std::cout << "ok 1\n";
      WriteTensor(*one);
    } else {
      auto several = result.cast<tvm::ffi::Array<qcm::Any>>();
      std::cout << "ok " << several.size() << "\n";
      for (const qcm::Any& item : several) WriteTensor(item.cast<qcm::Tensor>());
    }
    std::cout.flush();
  }
  return 0;
}
