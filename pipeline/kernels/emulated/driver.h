// What the four faces of the library (driver, cuBLAS, cuRAND, NCCL) share.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

// Names that a program may find; all others stay inside.
#define API extern "C" __attribute__((visibility("default"))) int

namespace emulated {

// The device does one thing at a time.
std::mutex& device();

// A sum over several ranks: the one thing that is not done when the call for it returns. It is on the stream once it is launched, and what
// the stream is given later waits until it is over.
struct Collective {
    std::atomic<bool> launched{false}, over{false};
};

// The last one of this thread, or null. Ranks may be threads of one process, which share the one stream that is emulated; what each of them
// gives it waits for its own sums alone.
std::shared_ptr<Collective>& last_collective();

// Returns when this thread's stream has nothing left to do.
void settle();

// Held by every call that touches memory or runs something.
class Turn {
  public:
    Turn() {
        settle();
        device().lock();
    }
    ~Turn() { device().unlock(); }
    Turn(const Turn&) = delete;
};

// One line on stderr about what the program did wrong; gives `code`, so that a call can end with it.
int refuse(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace emulated
