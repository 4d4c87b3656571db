// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0

// Runs a compiled model on raw arrays: qcm_run MODEL.qcm [-n RUNS] INPUT.bin... OUTPUT.bin...
//
// One file for each input and each output, in the model's order: the array's bytes, row-major,
// little-endian.  Without files it prints what the model takes and gives.  With -n it runs several
// times and prints the least and the median time.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>

#include "qcm.h"

namespace {

void Read(const std::string& path, const qcm::Tensor& tensor) {
  size_t size = tvm::ffi::GetDataSize(tensor);
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file || static_cast<size_t>(file.tellg()) != size) {
    throw std::runtime_error(path + ": expected a file of " + std::to_string(size) + " bytes");
  }
  file.seekg(0);
  file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(size));
}

void Write(const std::string& path, const qcm::Tensor& tensor) {
  std::ofstream file(path, std::ios::binary);
  size_t size = tvm::ffi::GetDataSize(tensor);
  file.write(static_cast<const char*>(tensor.data_ptr()), static_cast<std::streamsize>(size));
  if (!file) throw std::runtime_error("cannot write " + path);
}

void Print(const char* what, const std::vector<qcm::Spec>& specs) {
  for (const qcm::Spec& spec : specs) {
    std::cout << what << " " << spec.name << ": " << spec.dtype << "[";
    for (size_t i = 0; i < spec.shape.size(); ++i) std::cout << (i ? ", " : "") << spec.shape[i];
    std::cout << "]\n";
  }
}

int Main(std::vector<std::string> arguments) {
  int runs = 1;
  if (arguments.size() > 2 && arguments[1] == "-n") {
    runs = std::max(1, std::stoi(arguments[2]));
    arguments.erase(arguments.begin() + 1, arguments.begin() + 3);
  }
  if (arguments.empty()) {
    std::cerr << "usage: qcm_run MODEL.qcm [-n RUNS] INPUT.bin... OUTPUT.bin...\n";
    return 2;
  }
  qcm::Model model(arguments[0]);
  size_t files = model.inputs().size() + model.outputs().size();
  if (arguments.size() == 1) {
    Print("input", model.inputs());
    Print("output", model.outputs());
    return 0;
  }
  if (arguments.size() != 1 + files) {
    std::cerr << "expected " << files << " files: one for each input, then for each output\n";
    return 2;
  }
  std::vector<qcm::Tensor> inputs;
  for (const qcm::Spec& spec : model.inputs()) {
    inputs.push_back(qcm::NewTensor(spec.dtype, spec.shape));
    Read(arguments[inputs.size()], inputs.back());
  }
  std::vector<qcm::Tensor> outputs;
  std::vector<double> times;
  for (int run = 0; run < runs; ++run) {
    auto start = std::chrono::steady_clock::now();
    outputs = model.Run(inputs);
    std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    times.push_back(took.count());
  }
  for (size_t i = 0; i < outputs.size(); ++i) Write(arguments[1 + inputs.size() + i], outputs[i]);
  if (runs > 1) {
    std::sort(times.begin(), times.end());
    std::printf("min %.3f ms, median %.3f ms, %d runs\n", times[0], times[times.size() / 2], runs);
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return Main(std::vector<std::string>(arguments + 1, arguments + count));
  } catch (const std::exception& error) {
    std::cerr << "qcm_run: " << error.what() << "\n";
    return 1;
  }
}
