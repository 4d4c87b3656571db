// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0
//
// A CUDA driver for tests: the functions that the executor calls, on this machine's memory.
//
// A "module image" is a shared library that a host compiler made of the kernels (see emulate.hpp).
// Environment: QC_EMULATE_DEVICES (default 1), QC_EMULATE_CAPABILITY ("90"), QC_EMULATE_MEMORY
// (bytes of the device, default 2^40), QC_EMULATE_ORDER (1: threads run in reverse order),
// QC_EMULATE_TRACE (a file that gets one line per launch). Allocations end at a page that
// nobody may touch.

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
       INVALID_IMAGE = 200, NO_BINARY = 209, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700,
       LAUNCH_FAILED = 719 };

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atol(text) : otherwise;
}

struct Module {
  void* library;
  int (*launch)(void (*)(void**), void**, const unsigned*, const unsigned*, size_t, int);
  const char* (*problem)();
};
struct Function {
  Module* module;
  void (*entry)(void**);
  std::string name;
  size_t argument_count;
  int shared_limit;
};
struct Stream {
  bool capturing = false;
  std::vector<std::function<int()>> captured;
};
struct Graph {
  std::vector<std::function<int()>> nodes;
};
struct Event {
  double at = 0;
};

std::mutex everything;  // the emulator's fibers are one machine
size_t used;
struct Allocation {
  void* map;
  size_t mapped, asked;
};
std::map<uintptr_t, Allocation> allocations;
std::string last_problem;
bool initialized;

int perform(Stream* s, std::function<int()> work) {
  if (s && s->capturing) {
    s->captured.push_back(std::move(work));
    return OK;
  }
  return work();
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

}  // namespace

API cuInit(unsigned) {
  if (setting("QC_EMULATE_DEVICES", 1) < 1) return NO_DEVICE;
  initialized = true;
  return OK;
}
API cuDriverGetVersion(int* v) { *v = 13000; return OK; }
API cuDeviceGetCount(int* n) { *n = setting("QC_EMULATE_DEVICES", 1); return initialized ? OK : NOT_INITIALIZED; }
API cuDeviceGet(int* d, int i) { *d = i; return i < setting("QC_EMULATE_DEVICES", 1) ? OK : INVALID_VALUE; }
API cuDeviceGetName(char* name, int n, int) { std::snprintf(name, n, "emulated GPU"); return OK; }
API cuDeviceGetAttribute(int* v, int what, int) {
  const long capability = setting("QC_EMULATE_CAPABILITY", 90);
  switch (what) {
    case 75: *v = capability / 10; return OK;
    case 76: *v = capability % 10; return OK;
    case 16: *v = 108; return OK;             // multiprocessors
    case 97: *v = 227 << 10; return OK;       // shared memory per block, opt-in
    default: return INVALID_VALUE;
  }
}
API cuDevicePrimaryCtxRetain(void** c, int) { *c = &everything; return OK; }
API cuDevicePrimaryCtxRelease_v2(int) { return OK; }
API cuCtxSetCurrent(void*) { return OK; }
API cuCtxPushCurrent_v2(void*) { return OK; }
API cuCtxPopCurrent_v2(void** c) { *c = &everything; return OK; }
API cuMemGetInfo_v2(size_t* free, size_t* total) {
  *total = setting("QC_EMULATE_MEMORY", 1L << 40);
  *free = *total - used;
  return OK;
}

API cuGetErrorName(int e, const char** s) {
  switch (e) {
    case OUT_OF_MEMORY: *s = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case NO_DEVICE: *s = "CUDA_ERROR_NO_DEVICE"; break;
    case ILLEGAL_ADDRESS: *s = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
    case LAUNCH_FAILED: *s = "CUDA_ERROR_LAUNCH_FAILED"; break;
    case NO_BINARY: *s = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
    case INVALID_IMAGE: *s = "CUDA_ERROR_INVALID_IMAGE"; break;
    case NOT_FOUND: *s = "CUDA_ERROR_NOT_FOUND"; break;
    default: *s = "CUDA_ERROR"; break;
  }
  return OK;
}
API cuGetErrorString(int e, const char** s) {
  cuGetErrorName(e, s);
  if (e >= 700 && !last_problem.empty()) *s = last_problem.c_str();
  return OK;
}

API cuMemAlloc_v2(uintptr_t* p, size_t n) {
  std::lock_guard<std::mutex> lock(everything);
  if (used + n > static_cast<size_t>(setting("QC_EMULATE_MEMORY", 1L << 40))) return OUT_OF_MEMORY;
  const size_t page = sysconf(_SC_PAGESIZE), rounded = (n + 255) / 256 * 256;
  const size_t body = (rounded + page - 1) / page * page;
  char* map = static_cast<char*>(mmap(nullptr, body + page, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (map == MAP_FAILED) return OUT_OF_MEMORY;
  mprotect(map + body, page, PROT_NONE);
  *p = reinterpret_cast<uintptr_t>(map + body - rounded);
  std::memset(reinterpret_cast<void*>(*p), 0xA5, rounded);  // device memory is not zeroed
  allocations[*p] = {map, body + page, n};
  used += n;
  return OK;
}
API cuMemFree_v2(uintptr_t p) {
  std::lock_guard<std::mutex> lock(everything);
  const auto found = allocations.find(p);
  if (found == allocations.end()) return INVALID_VALUE;
  munmap(found->second.map, found->second.mapped);
  used -= found->second.asked;
  allocations.erase(found);
  return OK;
}
API cuMemHostAlloc(void** p, size_t n, unsigned) { *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096); return *p ? OK : OUT_OF_MEMORY; }
API cuMemFreeHost(void* p) { std::free(p); return OK; }
API cuMemcpyHtoD_v2(uintptr_t to, const void* from, size_t n) { std::memcpy(reinterpret_cast<void*>(to), from, n); return OK; }
API cuMemcpyDtoH_v2(void* to, uintptr_t from, size_t n) { std::memcpy(to, reinterpret_cast<void*>(from), n); return OK; }
API cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t n, Stream* s) {
  return perform(s, [=] { std::memcpy(reinterpret_cast<void*>(to), from, n); return OK; });
}
API cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t n, Stream* s) {
  return perform(s, [=] { std::memcpy(to, reinterpret_cast<void*>(from), n); return OK; });
}
API cuMemsetD8Async(uintptr_t to, unsigned char v, size_t n, Stream* s) {
  return perform(s, [=] { std::memset(reinterpret_cast<void*>(to), v, n); return OK; });
}

API cuStreamCreate(Stream** s, unsigned) { *s = new Stream; return OK; }
API cuStreamDestroy_v2(Stream* s) { delete s; return OK; }
API cuStreamSynchronize(Stream*) { return OK; }
API cuStreamBeginCapture_v2(Stream* s, int) { s->capturing = true; s->captured.clear(); return OK; }
API cuStreamEndCapture(Stream* s, Graph** g) {
  s->capturing = false;
  *g = new Graph{std::move(s->captured)};
  return OK;
}
API cuGraphInstantiateWithFlags(Graph** exec, Graph* g, unsigned long long) { *exec = new Graph(*g); return OK; }
API cuGraphDestroy(Graph* g) { delete g; return OK; }
API cuGraphExecDestroy(Graph* g) { delete g; return OK; }
API cuGraphLaunch(Graph* g, Stream*) {
  for (auto& node : g->nodes) {
    if (const int error = node()) return error;
  }
  return OK;
}
API cuEventCreate(Event** e, unsigned) { *e = new Event; return OK; }
API cuEventDestroy_v2(Event* e) { delete e; return OK; }
API cuEventRecord(Event* e, Stream*) { e->at = now(); return OK; }
API cuEventSynchronize(Event*) { return OK; }
API cuEventElapsedTime(float* ms, Event* a, Event* b) { *ms = static_cast<float>(b->at - a->at); return OK; }
API cuEventElapsedTime_v2(float* ms, Event* a, Event* b) { return cuEventElapsedTime(ms, a, b); }

API cuModuleLoadData(Module** m, const void* image) {
  const auto* bytes = static_cast<const unsigned char*>(image);
  if (std::memcmp(bytes, "QCEMU", 5) != 0) {
    last_problem = "not an emulated image";
    return NO_BINARY;  // a fatbin: real machine code, which no emulator runs
  }
  uint64_t size;
  std::memcpy(&size, bytes + 8, 8);
  char path[] = "/tmp/qc-emulate-XXXXXX";
  const int file = mkstemp(path);
  if (file < 0 || write(file, bytes + 16, size) != static_cast<ssize_t>(size)) return INVALID_IMAGE;
  close(file);
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) std::fprintf(stderr, "%s\n", dlerror());
  unlink(path);
  if (!library) return INVALID_IMAGE;
  auto* module = new Module{library, nullptr, nullptr};
  *reinterpret_cast<void**>(&module->launch) = dlsym(library, "qc_emulate_launch");
  *reinterpret_cast<void**>(&module->problem) = dlsym(library, "qc_emulate_problem");
  *m = module;
  return OK;
}
API cuModuleUnload(Module* m) { dlclose(m->library); delete m; return OK; }
API cuModuleGetFunction(Function** f, Module* m, const char* name) {
  void* entry = dlsym(m->library, (std::string("qc_emulate_entry_") + name).c_str());
  if (!entry) return NOT_FOUND;
  *f = new Function{m, reinterpret_cast<void (*)(void**)>(entry), name, 0, 48 << 10};
  return OK;
}
API cuFuncSetAttribute(Function* f, int what, int value) {
  if (what != 8 || value > (227 << 10)) return INVALID_VALUE;
  f->shared_limit = value;
  return OK;
}
API cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared_bytes, Stream* s, void** args, void** extra) {
  if (extra || static_cast<int>(shared_bytes) > f->shared_limit) return INVALID_VALUE;
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !bx || bx * by * bz > 1024) return INVALID_VALUE;
  // Every kernel's arguments are pointers, in one array that ends with a null entry.
  std::vector<uintptr_t> values;
  for (void** a = args; *a; ++a) values.push_back(*static_cast<uintptr_t*>(*a));
  return perform(s, [=]() mutable {
    std::lock_guard<std::mutex> lock(everything);
    std::vector<void*> pointers;
    for (auto& v : values) pointers.push_back(&v);
    const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    if (const char* trace = std::getenv("QC_EMULATE_TRACE")) {
      if (FILE* out = std::fopen(trace, "a")) {
        std::fprintf(out, "%s %u %u %u %u\n", f->name.c_str(), gx, gy, gz, bx);
        std::fclose(out);
      }
    }
    const int error = f->module->launch(f->entry, pointers.data(), grid, block, shared_bytes,
                                        static_cast<int>(setting("QC_EMULATE_ORDER", 0)));
    if (error) last_problem = f->name + ": " + f->module->problem();
    return error;
  });
}
