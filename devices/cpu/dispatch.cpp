// Selects the kernel tables that this machine can run; no other file queries the processor's features.
#include "../kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace edge_moe {

#if defined(__aarch64__)
static bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple processor that runs macOS
#endif
}

static bool has_matrix_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#else
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &size, nullptr, 0) == 0 && has;
#endif
}
#endif

const Kernels* const* available_kernels(int* count) {
  static const Kernels* tables[3];
  static const int found = [] {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni"))
      tables[n++] = &kAvx512Kernels;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      tables[n++] = &kAvx2Kernels;
#elif defined(__aarch64__)
    if (has_dot_product() && has_matrix_products()) tables[n++] = &kNeonI8mmKernels;
    if (has_dot_product()) tables[n++] = &kNeonKernels;
#endif
    tables[n++] = &kScalarKernels;
    return n;
  }();
  *count = found;
  return tables;
}

bool cpu_has_crc32c() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("sse4.2");
#else
  return true;  // a compiler flag guarantees it: see checksum.cpp
#endif
}

}  // namespace edge_moe
