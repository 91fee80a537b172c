// The choice of an instruction set.
#include <cstdlib>
#include <cstring>
#include <string>

#include "engine.h"

namespace minw {
namespace {

const Isa* const kIsas[] = {&kAvx512, &kAvx2, &kNeon, &kPortable};  // Best first.

// Whether this CPU runs the kernels of an instruction set.
bool runs(const Isa& isa) {
  if (!isa.name) return false;  // The library was built for another architecture.
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&isa == &kAvx2) return __builtin_cpu_supports("avx2");
  if (&isa == &kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vpopcntdq") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return true;
}

// The string is made when the library is loaded. A fork during a first call could
// otherwise leave the child with a string that is half made.
const std::string all_names = [] {
  std::string names;
  for (const Isa* isa : kIsas)
    if (runs(*isa)) names += (names.empty() ? "" : " ") + std::string(isa->name);
  return names;
}();

}  // namespace

const char* isa_names() { return all_names.c_str(); }

const Isa& best_isa() {
  const char* forced = std::getenv("MINW_ISA");
  bool any = !forced || !*forced;
  for (const Isa* isa : kIsas)
    if (runs(*isa) && (any || !std::strcmp(forced, isa->name))) return *isa;
  throw Error(std::string("MINW_ISA=") + (any ? "" : forced) +
              " does not run on this CPU; these do: " + all_names);
}

}  // namespace minw
