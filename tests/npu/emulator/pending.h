// Work that a stream has accepted and not done yet. Everything in the emulator is done when the call returns, except
// copies between host and device that the caller asked to be asynchronous, and those only in the delayed-copy mode
// (CANN_EMULATOR_DELAY_COPIES=1): they land before later work on the same stream, or when the host synchronises. A
// host that reads the result, or overwrites the source, before it has synchronised is then caught by wrong numbers.
//
// Served by libascendcl.so, used by libopapi.so.
#pragma once
#include <cstdint>
#include <functional>

namespace emulator {

// A stream as torch names it; the runtime's own handles are not known where copies are made.
struct StreamKey {
  int device;
  int64_t id;
  bool operator<(const StreamKey& other) const {
    return device != other.device ? device < other.device : id < other.id;
  }
};

bool delaysCopies();
void defer(StreamKey stream, std::function<void()> work);
void finish(StreamKey stream);  // before later work on this stream
void finishAll();               // at any synchronisation: which stream it names is not told apart

}  // namespace emulator
