// Gives WebAssembly what it lacks here: exceptions, an allocator that reports errors,
// and functions through which JavaScript allocates memory. It replaces choice.cc.
#ifdef __wasm__

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <typeinfo>

#include "engine.h"

#define MINW_IMPORT(name) __attribute__((import_module("env"), import_name(name)))
#define MINW_EXPORT(name) __attribute__((export_name(name)))

extern "C" {

// Throws a JavaScript Error with the message, out of the instance. The instance must
// not be used again, because nothing that it was doing is undone.
[[noreturn]] MINW_IMPORT("minw_throw") void minw_throw(const char* message,
                                                       size_t length);

// Memory for arguments and results. Throws if there is not enough.
MINW_EXPORT("minw_allocate") void* minw_allocate(size_t bytes) {
  return ::operator new(bytes);
}

MINW_EXPORT("minw_release") void minw_release(void* memory) {
  ::operator delete(memory);
}

}  // extern "C"

namespace {

constexpr char kOutOfMemory[] = "out of memory";  // The text of interface.cc.

[[noreturn]] void fail(const char* message) {
  minw_throw(message, std::strlen(message));
}

void* allocated(void* memory) {
  if (!memory) fail(kOutOfMemory);
  return memory;
}

}  // namespace

// ---- Memory.

void* operator new(size_t bytes) { return allocated(std::malloc(bytes ? bytes : 1)); }

void* operator new(size_t bytes, std::align_val_t align) {
  void* memory = nullptr;
  const int failed = posix_memalign(&memory, static_cast<size_t>(align), bytes);
  return allocated(failed ? nullptr : memory);
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }

// ---- Instruction sets. There is one, and nothing to measure (choice.cc).

const minw::Isa* minw::fastest_isa(const Isa* best, int, int, int) { return best; }

// ---- Exceptions. Compiled code calls these functions where C++ has `throw`. All
// exceptions here derive from std::exception. None can be caught: code in `catch` never
// runs.

extern "C" {

void* __cxa_allocate_exception(size_t bytes) noexcept { return ::operator new(bytes); }

void __cxa_free_exception(void*) noexcept {}

[[noreturn]] void __cxa_throw(void* thrown, std::type_info* type, void (*)(void*)) {
  if (*type == typeid(std::bad_alloc)) fail(kOutOfMemory);
  fail(static_cast<std::exception*>(thrown)->what());
}

}  // extern "C"

// The standard library itself is compiled without exceptions, and calls this instead.
// Its own function prints the message, for which it needs files.
_LIBCPP_BEGIN_NAMESPACE_STD
[[noreturn]] void __libcpp_verbose_abort(const char* format, ...) noexcept {
  fail(format);
}
_LIBCPP_END_NAMESPACE_STD

#endif
