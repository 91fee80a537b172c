// The choice of an instruction set.
#include <cstdlib>
#include <cstring>
#include <string>

#include "engine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace minw {
namespace {

// Best first.
const Isa* const kIsas[] = {&kAmx,  &kVbmi, &kAvx512,  &kAvx2,
                            &kNeon, &kWasm, &kPortable};

#if defined(__x86_64__)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vpopcntdq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool runs_vbmi() { return runs_avx512() && __builtin_cpu_supports("avx512vbmi"); }

// Whether the CPU has int8 tiles and the system lets this process use them. Linux
// reserves the registers' memory for processes that have asked for it.
bool runs_amx() {
#if defined(__linux__)
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25;  // Bits of EDX.
  constexpr long kRequest = 0x1023, kTileData = 18;        // See arch_prctl(2).
  unsigned a, b, c, d;
  if (!runs_vbmi() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kTiles) && (d & kInt8) && !syscall(SYS_arch_prctl, kRequest, kTileData);
#else
  return false;
#endif
}
#endif

// Whether this CPU runs the kernels of an instruction set.
bool runs(const Isa& isa) {
  if (!isa.name) return false;  // The library was built for another architecture.
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&isa == &kAvx2) return __builtin_cpu_supports("avx2");
  if (&isa == &kAvx512) return runs_avx512();
  if (&isa == &kVbmi) return runs_vbmi();
  if (&isa == &kAmx) return runs_amx();
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
  char text[64] = "";  // All names together have 35 characters.
};

// The names are put together when the library is loaded. A fork during a first call
// could otherwise leave the child with names that are half made.
const Names names;

// The value of MINW_ISA, or null. WebAssembly has no environment.
const char* forced_isa() {
#ifdef __wasm__
  return nullptr;
#else
  return std::getenv("MINW_ISA");
#endif
}

}  // namespace

const char* isa_names() { return names.text; }

IsaChoice best_isa() {
  const char* forced = forced_isa();
  bool any = !forced || !*forced;
  for (const Isa* isa : kIsas)
    if (runs(*isa) && (any || !std::strcmp(forced, isa->name))) return {*isa, !any};
  throw Error(std::string("MINW_ISA=") + (any ? "" : forced) +
              " does not run on this CPU; these do: " + names.text);
}

}  // namespace minw
