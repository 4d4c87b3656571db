// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0

/*! Runs a compiled model (.qcm) with TVM's runtime library: no Python, no TVM compiler.
 *
 * Needs the headers and libraries of the packages apache-tvm-ffi (libtvm_ffi.so) and apache-tvm
 * (libtvm_runtime.so), of the versions that compiled the model.
 */
#ifndef QCM_H_
#define QCM_H_

#include <fcntl.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace qcm {

using tvm::ffi::Any;
using tvm::ffi::AnyView;
using tvm::ffi::Function;
using tvm::ffi::Module;
using tvm::ffi::String;
using tvm::ffi::Tensor;

/*! What the model says of one of its inputs or outputs. */
struct Spec {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
};

/*! A file that is mapped for as long as this lives. */
class Mapped {
 public:
  explicit Mapped(const std::string& path) {
    int file = open(path.c_str(), O_RDONLY);
    struct stat about {};
    if (file < 0 || fstat(file, &about) != 0) {
      if (file >= 0) close(file);
      throw std::runtime_error("cannot read " + path);
    }
    size_ = static_cast<size_t>(about.st_size);
    // Private and writable: parameters are handed to TVM, which takes no read-only memory.
    void* at = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    close(file);
    if (at == MAP_FAILED) throw std::runtime_error("cannot map " + path);
    data_ = static_cast<char*>(at);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() { munmap(data_, size_); }
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

/*! An aligned tensor of its own. */
struct HeapAllocator {
  void AllocData(DLTensor* tensor) {
    size_t size = (tvm::ffi::GetDataSize(*tensor) + 63) / 64 * 64;
    tensor->data = std::aligned_alloc(64, size == 0 ? 64 : size);
    if (tensor->data == nullptr) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

/*! A tensor over memory that somebody else keeps. */
struct BorrowingAllocator {
  void* data;
  void AllocData(DLTensor* tensor) { tensor->data = data; }
  void FreeData(DLTensor*) {}
};

inline DLDataType TypeNamed(const std::string& name) {
  if (name == "bool") return DLDataType{kDLBool, 8, 1};
  size_t digits = name.find_first_of("0123456789");
  std::string kind = name.substr(0, digits);
  DLDataType type{kDLFloat, 0, 1};
  if (digits == std::string::npos || (kind != "float" && kind != "int" && kind != "uint")) {
    throw std::runtime_error("unknown dtype " + name);
  }
  if (kind != "float") type.code = kind == "int" ? kDLInt : kDLUInt;
  type.bits = static_cast<uint8_t>(std::stoi(name.substr(digits)));
  return type;
}

inline Tensor NewTensor(const std::string& dtype, const std::vector<int64_t>& shape) {
  return Tensor::FromNDAlloc(HeapAllocator(), tvm::ffi::Shape(shape), TypeNamed(dtype),
                             DLDevice{kDLCPU, 0});
}

/*! The members of an archive whose members are stored, as those of a .qcm are. */
class Archive {
 public:
  explicit Archive(const std::string& path) : path_(path), file_(path) {
    const char* base = file_.data();
    size_t size = file_.size(), end = size < 22 ? 0 : size - 22;
    while (end > 0 && Word<uint32_t>(end) != 0x06054b50) --end;
    if (size < 22 || Word<uint32_t>(end) != 0x06054b50) Fail("is no archive");
    size_t at = Word<uint32_t>(end + 16);
    for (unsigned left = Word<uint16_t>(end + 10); left > 0; --left) {
      if (at + 46 > size || Word<uint32_t>(at) != 0x02014b50) Fail("has a damaged directory");
      if (Word<uint16_t>(at + 10) != 0) Fail("has a compressed member");
      size_t bytes = Word<uint32_t>(at + 24), name = Word<uint16_t>(at + 28);
      size_t extra = Word<uint16_t>(at + 30), comment = Word<uint16_t>(at + 32);
      size_t header = Word<uint32_t>(at + 42);
      if (at + 46 + name > size || header + 30 > size) Fail("is cut short");
      size_t start = header + 30 + Word<uint16_t>(header + 26) + Word<uint16_t>(header + 28);
      if (start + bytes > size) Fail("is cut short");
      members_[std::string(base + at + 46, name)] = {file_.data() + start, bytes};
      at += 46 + name + extra + comment;
    }
  }

  std::pair<char*, size_t> Member(const std::string& name) const {
    auto found = members_.find(name);
    if (found == members_.end()) Fail("has no member " + name);
    return found->second;
  }

 private:
  template <typename T>
  T Word(size_t at) const {
    T value{};
    if (at + sizeof(T) > file_.size()) Fail("is cut short");
    std::memcpy(&value, file_.data() + at, sizeof(T));
    return value;
  }
  [[noreturn]] void Fail(const std::string& what) const {
    throw std::runtime_error(path_ + " " + what);
  }

  std::string path_;
  Mapped file_;
  std::map<std::string, std::pair<char*, size_t>> members_;
};

/*! A compiled model.  One call at a time; `Run` may be called any number of times. */
class Model {
 public:
  explicit Model(const std::string& path) : archive_(path) {
    auto [text, size] = archive_.Member("manifest.json");
    auto manifest = tvm::ffi::json::Parse(String(text, size)).cast<tvm::ffi::json::Object>();
    CheckMachine(manifest[String("target")].cast<tvm::ffi::json::Object>());
    inputs_ = Specs(manifest, "inputs");
    outputs_ = Specs(manifest, "outputs");
    auto [data, bytes] = archive_.Member("params.bin");
    for (const Any& item : manifest[String("params")].cast<tvm::ffi::json::Array>()) {
      auto entry = item.cast<tvm::ffi::json::Object>();
      Spec spec = OneSpec(entry);
      size_t offset = static_cast<size_t>(entry[String("offset")].cast<int64_t>());
      if (offset > bytes) throw std::runtime_error(path + " has a parameter outside params.bin");
      // Kernels rely on 64-byte alignment, which a member of an archive does not have.
      Tensor tensor = NewTensor(spec.dtype, spec.shape);
      std::memcpy(tensor.data_ptr(), data + offset, tvm::ffi::GetDataSize(tensor));
      params_.push_back(tensor);
    }
    Load(archive_.Member("lib.so"));
  }

  const std::vector<Spec>& inputs() const { return inputs_; }
  const std::vector<Spec>& outputs() const { return outputs_; }

  /*! Runs the model on inputs in the order of `inputs()`; the outputs are in that of `outputs()`. */
  std::vector<Tensor> Run(const std::vector<Tensor>& inputs) {
    if (inputs.size() != inputs_.size()) throw std::runtime_error("wrong number of inputs");
    std::vector<AnyView> arguments(inputs.begin(), inputs.end());
    arguments.insert(arguments.end(), params_.begin(), params_.end());
    Any result;
    main_->CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
    if (auto one = result.as<Tensor>()) return {*one};
    std::vector<Tensor> found;
    for (const Any& item : result.cast<tvm::ffi::Array<Any>>()) found.push_back(item.cast<Tensor>());
    return found;
  }

 private:
  /*! Throws where the code would meet an instruction that this CPU lacks. */
  static void CheckMachine(const tvm::ffi::json::Object& target) {
    std::set<std::string> found = CpuFeatures();
    if (found.empty()) return;  // nothing tells
    std::string missing;
    for (const Any& item : target[String("cpu_features")].cast<tvm::ffi::json::Array>()) {
      std::string feature = item.cast<std::string>();
      if (found.count(feature) == 0) missing += " " + feature;
#if defined(__x86_64__)
      // Linux lets a process use the tile registers only after it has asked (XTILEDATA is 18).
      if (feature == "amx_tile" && syscall(SYS_arch_prctl, /*ARCH_REQ_XCOMP_PERM*/ 0x1023, 18) != 0) {
        missing += " permission_for_amx";
      }
#endif
    }
    if (!missing.empty()) {
      throw std::runtime_error("the model needs what this machine lacks:" + missing);
    }
  }

  /*! The CPU's features by the kernel's names; empty where nothing tells. */
  static std::set<std::string> CpuFeatures() {
    std::set<std::string> found;
#if defined(__aarch64__)
    // Numbers of the Linux ABI (asm/hwcap.h), which an older C library may not name.
    const std::pair<const char*, unsigned> first[] = {
        {"fp", 0}, {"asimd", 1}, {"fphp", 9}, {"asimdhp", 10}, {"asimddp", 20}, {"sve", 22}};
    const std::pair<const char*, unsigned> second[] = {{"i8mm", 13}, {"bf16", 14}};
    for (auto [name, bit] : first) {
      if (getauxval(AT_HWCAP) >> bit & 1) found.insert(name);
    }
    for (auto [name, bit] : second) {
      if (getauxval(AT_HWCAP2) >> bit & 1) found.insert(name);
    }
#else
    std::ifstream file("/proc/cpuinfo");
    std::string line, feature;
    while (found.empty() && std::getline(file, line)) {
      if (line.rfind("flags", 0) != 0) continue;
      std::istringstream words(line.substr(line.find(':') + 1));
      while (words >> feature) found.insert(feature);
    }
#endif
    return found;
  }

  static Spec OneSpec(tvm::ffi::json::Object entry) {
    Spec spec;
    spec.name = entry[String("name")].cast<std::string>();
    spec.dtype = entry[String("dtype")].cast<std::string>();
    for (const Any& extent : entry[String("shape")].cast<tvm::ffi::json::Array>()) {
      spec.shape.push_back(extent.cast<int64_t>());
    }
    return spec;
  }

  static std::vector<Spec> Specs(const tvm::ffi::json::Object& manifest, const char* key) {
    std::vector<Spec> specs;
    for (const Any& item : manifest[String(key)].cast<tvm::ffi::json::Array>()) {
      specs.push_back(OneSpec(item.cast<tvm::ffi::json::Object>()));
    }
    return specs;
  }

  /*! TVM loads libraries from files: from one that is gone as soon as it is mapped. */
  void Load(std::pair<char*, size_t> library) {
    const char* folder = std::getenv("TMPDIR");
    std::string path = std::string(folder != nullptr ? folder : "/tmp") + "/qcm-XXXXXX.so";
    int file = mkstemps(path.data(), 3);
    if (file < 0) throw std::runtime_error("cannot write " + path);
    size_t done = 0;
    while (done < library.second) {
      ssize_t count = write(file, library.first + done, library.second - done);
      if (count <= 0) break;
      done += static_cast<size_t>(count);
    }
    close(file);
    try {
      if (done < library.second) throw std::runtime_error("no room for " + path);
      module_ = Module::LoadFromFile(path);
    } catch (...) {
      unlink(path.c_str());
      throw;
    }
    unlink(path.c_str());
    machine_ = Call(*module_, "vm_load_executable").cast<Module>();
    Call(*machine_, "vm_initialization", static_cast<int>(kDLCPU), 0, /*pooled memory*/ 2);
    main_ = (*machine_)->GetFunction("main").value();
  }

  template <typename... Args>
  static Any Call(Module module, const char* name, Args... args) {
    auto function = module->GetFunction(name);
    if (!function.has_value()) throw std::runtime_error(std::string("no function ") + name);
    return function.value()(args...);
  }

  Archive archive_;
  std::vector<Spec> inputs_, outputs_;
  std::vector<Tensor> params_;
  tvm::ffi::Optional<Module> module_, machine_;
  Function main_;
};

}  // namespace qcm

#endif  // QCM_H_
