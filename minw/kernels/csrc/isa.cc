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

// Names of the instruction sets that run, best first.
struct Names {
  Names() noexcept {
    for (const Isa* isa : kIsas) {
      if (!runs(*isa)) continue;
      if (*text) std::strcat(text, " ");
      std::strcat(text, isa->name);
    }
  }
  char text[64] = "";  // All names together have 26 characters.
};

// The names are put together when the library is loaded. A fork during a first call
// could otherwise leave the child with names that are half made.
const Names names;

}  // namespace

const char* isa_names() { return names.text; }

const Isa& best_isa() {
  const char* forced = std::getenv("MINW_ISA");
  bool any = !forced || !*forced;
  for (const Isa* isa : kIsas)
    if (runs(*isa) && (any || !std::strcmp(forced, isa->name))) return *isa;
  throw Error(std::string("MINW_ISA=") + (any ? "" : forced) +
              " does not run on this CPU; these do: " + names.text);
}

}  // namespace minw
