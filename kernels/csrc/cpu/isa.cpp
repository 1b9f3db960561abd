#include <cstdlib>
#include <cstring>

#include "common.h"

namespace fastambient {

static int detect() {
  int level = 0;
#ifdef FA_HAVE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    level = 2;
#endif
  // FASTAMBIENT_ISA=base|avx2|avx512 lowers the choice, for tests and comparisons; it never raises it.
  if (const char* wanted = std::getenv("FASTAMBIENT_ISA")) {
    const int cap = std::strcmp(wanted, "base") == 0 ? 0 : std::strcmp(wanted, "avx2") == 0 ? 1 : 2;
    if (cap < level) level = cap;
  }
  return level;
}

int isa_level() {
  static const int level = detect();
  return level;
}

}  // namespace fastambient
