// What the library says of itself, before XLA is told of it.

#include <cstdint>

#include "xla/ffi/api/ffi.h"

// What this library and cpu_library.py agree on: to be raised with the arguments of any handler.
extern "C" int32_t normax_interface() { return 2; }

// A runtime older than the headers refuses their handlers, and then has no devices at all: so it
// is asked first.
extern "C" void normax_ffi_version(int32_t* major, int32_t* minor) {
  *major = XLA_FFI_API_MAJOR;
  *minor = XLA_FFI_API_MINOR;
}
