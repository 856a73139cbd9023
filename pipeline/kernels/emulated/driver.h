// What the three faces of the library (driver, cuBLAS, cuRAND) share.
#pragma once

#include <mutex>

// Names that a program may find; all others stay inside.
#define API extern "C" __attribute__((visibility("default"))) int

namespace emulated {

// Held by every call that touches memory or runs something: the device does one thing at a time.
std::mutex& device();

// One line on stderr about what the program did wrong; gives `code`, so that a call can end with it.
int refuse(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace emulated
