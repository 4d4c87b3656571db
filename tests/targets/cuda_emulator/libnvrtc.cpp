// SPDX-FileCopyrightText: The qcompiler authors
// SPDX-License-Identifier: Apache-2.0
//
// NVRTC for tests: "compiles" CUDA C++ with the host compiler, for the emulated driver.
//
// Environment: QC_EMULATE_CXX (the compiler), QC_EMULATE_HEADER (path of emulate.hpp),
// QC_EMULATE_OPTIONS (default "-O1").

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#define API extern "C" __attribute__((visibility("default"))) int

struct Program {
  std::string source, log, image;
};

static std::string setting(const char* name, const char* otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? text : otherwise;
}

static std::string contents(const std::string& path) {
  std::string all;
  if (FILE* in = std::fopen(path.c_str(), "rb")) {
    char buffer[1 << 16];
    for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, in)) > 0;) all.append(buffer, n);
    std::fclose(in);
  }
  return all;
}

API nvrtcVersion(int* major, int* minor) { *major = 13, *minor = 0; return 0; }
API nvrtcCreateProgram(Program** p, const char* source, const char*, int, const char**, const char**) {
  *p = new Program{source, "", ""};
  return 0;
}
API nvrtcDestroyProgram(Program** p) { delete *p; *p = nullptr; return 0; }
API nvrtcCompileProgram(Program* p, int count, const char** options) {
  bool exact = false;
  for (int i = 0; i < count; ++i) exact |= std::strcmp(options[i], "--fmad=false") == 0;
  if (!exact) {
    p->log = "the kernels need --fmad=false";
    return 6;
  }
  char folder[] = "/tmp/qc-nvrtc-XXXXXX";
  if (!mkdtemp(folder)) return 6;
  const std::string base = std::string(folder) + "/kernels";
  if (FILE* out = std::fopen((base + ".cpp").c_str(), "wb")) {
    std::fwrite(p->source.data(), 1, p->source.size(), out);
    std::fclose(out);
  }
  const std::string command =
      setting("QC_EMULATE_CXX", "g++") +
      " -std=c++17 -shared -fPIC -w -ffp-contract=off -fno-strict-aliasing -fwrapv " +
      setting("QC_EMULATE_OPTIONS", "-O1") + " '-DQC_EMULATE=\"" +
      setting("QC_EMULATE_HEADER", "emulate.hpp") + "\"' -o " + base + ".so " + base + ".cpp >" +
      base + ".log 2>&1";
  const int status = std::system(command.c_str());
  p->log = contents(base + ".log");
  const std::string library = contents(base + ".so");
  const uint64_t size = library.size();
  p->image = std::string("QCEMU\0\0\0", 8) +
             std::string(reinterpret_cast<const char*>(&size), 8) + library;
  for (const char* end : {".cpp", ".so", ".log"}) unlink((base + end).c_str());
  rmdir(folder);
  return status ? 6 : 0;
}
API nvrtcGetProgramLogSize(Program* p, size_t* n) { *n = p->log.size() + 1; return 0; }
API nvrtcGetProgramLog(Program* p, char* to) { std::memcpy(to, p->log.c_str(), p->log.size() + 1); return 0; }
API nvrtcGetCUBINSize(Program* p, size_t* n) { *n = p->image.size(); return 0; }
API nvrtcGetCUBIN(Program* p, char* to) { std::memcpy(to, p->image.data(), p->image.size()); return 0; }
extern "C" __attribute__((visibility("default"))) const char* nvrtcGetErrorString(int e) {
  return e == 6 ? "NVRTC_ERROR_COMPILATION" : e ? "NVRTC_ERROR" : "NVRTC_SUCCESS";
}
