// Runs a CUDA kernel's device branch on the processor, lane by lane: each of a warp's 32 threads has a stack of its own
// and runs until it needs the others. So it sees what the loop over lanes in the plain C++ branch can't: lanes that do not
// meet at the same shuffle, or a lane that ends before.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

struct Dim {
    unsigned x;
};
static Dim threadIdx, blockIdx, blockDim;
struct ulonglong2 {
    unsigned long long x, y;
};
static inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

namespace simt {

struct Warp {
    ucontext_t scheduler, lane[32];
    std::vector<char> stacks = std::vector<char>(32 * 65536);
    unsigned long long slot[32], tag[32];
    bool ended[32];
    unsigned now = 0;
};
static Warp warp;

[[noreturn]] static void fail(const char* why) {
    std::fprintf(stderr, "simt: %s\n", why);
    std::abort();
}

// All lanes come here with the same tag; from then on each sees what the others brought.
static void meet(unsigned long long value, unsigned long long tag) {
    warp.slot[warp.now] = value;
    warp.tag[warp.now] = tag;
    swapcontext(&warp.lane[warp.now], &warp.scheduler);
}

// A warp's 32 threads, in turn, each until its next meeting.
template <class Kernel>
void run(unsigned first_thread, const Kernel& kernel) {
    static const Kernel* what;
    what = &kernel;
    for (unsigned lane = 0; lane < 32; ++lane) {
        warp.ended[lane] = false;
        getcontext(&warp.lane[lane]);
        warp.lane[lane].uc_stack = {warp.stacks.data() + lane * 65536, 0, 65536};
        warp.lane[lane].uc_link = &warp.scheduler;
        makecontext(&warp.lane[lane], reinterpret_cast<void (*)()>(+[] {
                        (*what)();
                        warp.ended[warp.now] = true;
                    }),
                    0);
    }
    do {
        for (unsigned lane = 0; lane < 32; ++lane) {
            warp.now = lane;
            threadIdx.x = first_thread + lane;
            swapcontext(&warp.scheduler, &warp.lane[lane]);
        }
        for (unsigned lane = 1; lane < 32; ++lane)
            if (warp.ended[lane] != warp.ended[0] || (!warp.ended[0] && warp.tag[lane] != warp.tag[0]))
                fail("lanes do not meet at the same place");
    } while (!warp.ended[0]);
}

template <class T>
T load(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) fail("a load that is not aligned");
    return *static_cast<const T*>(from);
}

}  // namespace simt

static inline unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, unsigned bit) {
    if (mask != 0xFFFFFFFFu) simt::fail("a mask without all lanes");
    const unsigned lane = simt::warp.now;
    simt::meet(value, 2 * bit);
    const unsigned long long found = simt::warp.slot[lane ^ bit];
    simt::meet(value, 2 * bit + 1);  // nobody goes on before all have looked
    return found;
}

static inline bool __all_sync(unsigned mask, bool value) {
    if (mask != 0xFFFFFFFFu) simt::fail("a mask without all lanes");
    simt::meet(value, 1000);
    bool all = true;
    for (unsigned long long each : simt::warp.slot) all = all && each != 0;
    simt::meet(value, 1001);
    return all;
}

static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    __extension__ typedef unsigned __int128 u128;
    return static_cast<unsigned long long>((static_cast<u128>(a) * b) >> 64);
}

static inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
    const unsigned long long before = *at;
    *at += value;
    return before;
}

#define __CUDACC__ 1
#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(threads)
