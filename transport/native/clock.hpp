// The clock of deadlines: CLOCK_MONOTONIC, as time.monotonic_ns.
#pragma once

#include <time.h>

#include <cstdint>

namespace mf {

inline constexpr uint64_t kSliceNs = 200'000'000;  // the longest sleep before signals get their turn

inline uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(t.tv_nsec);
}

}  // namespace mf
