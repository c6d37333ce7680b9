// One kernel that gathers, scatters and digests: each operation's bytes are loaded once, stored where they shall go, and
// the registers that were stored are hashed. An operation without a target is only hashed, a stream without a sum only
// copied. The digest is the one that transport/native/digest.hpp defines, bit for bit.
//
// The same source is compiled three ways: by NVRTC when a CUDA device is first used (transport/gpu/cuda.py), by nvcc in a
// test, and as plain C++ for the processor (transport/native/gpu/module.cpp), where a warp is a loop over 32 lanes. So
// it has no includes, and all that differs between the three stands in the first section. What crosses lanes does so
// outside of MF_LANES, through `sum_lanes` and `all_lanes` alone; control flow around those is the same for a whole warp.
//
// How work is divided: the planner (transport/gpu/plan.py) lays the streams of a batch one after another in a virtual
// address space, each beginning at a multiple of 4096, so that every 4096 bytes of it are one chunk of the digest. A
// warp takes `chunks_per_warp` neighbouring chunks. Lane t of it handles 16 bytes of every 512: words 2i and 2i + 1 of a
// stripe, i = t % 4, which are the two lanes of the digest that exchange words; eight stripes at once.

#if defined(__CUDACC__)
#define MF_DEVICE __device__ __forceinline__
#define MF_LANES(lane) if (const unsigned lane = threadIdx.x % 32; true)
#define MF_UNROLL _Pragma("unroll")
#else
#define MF_DEVICE inline
#define MF_LANES(lane) for (unsigned lane = 0; lane < 32; ++lane)
#define MF_UNROLL
#endif

namespace mf_gpu {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
static_assert(sizeof(u64) == 8 && sizeof(void*) == 8, "addresses travel as 64-bit words");

// Sixteen bytes of a stream: words 2i and 2i + 1 of a stripe.
struct Unit {
    u64 even, odd;
};

#if defined(__CUDACC__)

// A value that each lane of a warp has of its own.
template <class T>
struct PerLane {
    T value;
    __device__ T& operator[](unsigned) { return value; }
};

// Adds to each lane's value those of the lanes whose numbers differ from its own in the bits from `first` to `last`.
MF_DEVICE void sum_lanes(PerLane<u64>& x, unsigned first, unsigned last) {
    for (unsigned bit = first; bit <= last; bit *= 2) x.value += __shfl_xor_sync(0xFFFFFFFFu, x.value, bit);
}

MF_DEVICE bool all_lanes(PerLane<bool>& x) { return __all_sync(0xFFFFFFFFu, x.value); }

MF_DEVICE u64 high_product(u64 a, u64 b) { return __umul64hi(a, b); }

MF_DEVICE void add_atomically(u64* at, u64 value) { atomicAdd(at, value); }

// Volatile: a value is loaded exactly once, so what is stored and what is hashed can't differ.
MF_DEVICE Unit load16(const u8* from) {
    Unit unit;
    asm volatile("ld.global.v2.u64 {%0, %1}, [%2];" : "=l"(unit.even), "=l"(unit.odd) : "l"(from));
    return unit;
}
MF_DEVICE u64 load8(const u8* from) {
    u64 value;
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(value) : "l"(from));
    return value;
}
MF_DEVICE u64 load4(const u8* from) {
    u32 value;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}
MF_DEVICE u64 load2(const u8* from) {
    u16 value;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(value) : "l"(from));
    return value;
}
MF_DEVICE u64 load1(const u8* from) {
    u32 value;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}
MF_DEVICE void store16(u8* to, Unit unit) {
    *reinterpret_cast<ulonglong2*>(to) = make_ulonglong2(unit.even, unit.odd);
}
template <class T>
MF_DEVICE void store(u8* to, u64 value) {
    *reinterpret_cast<T*>(to) = static_cast<T>(value);
}

#else

template <class T>
struct PerLane {
    T value[32];
    T& operator[](unsigned lane) { return value[lane]; }
};

inline void sum_lanes(PerLane<u64>& x, unsigned first, unsigned last) {
    for (unsigned bit = first; bit <= last; bit *= 2) {
        const PerLane<u64> before = x;
        for (unsigned lane = 0; lane < 32; ++lane) x.value[lane] += before.value[lane ^ bit];
    }
}

inline bool all_lanes(PerLane<bool>& x) {
    for (bool value : x.value)
        if (!value) return false;
    return true;
}

inline u64 high_product(u64 a, u64 b) {
    __extension__ typedef unsigned __int128 u128;
    return static_cast<u64>((static_cast<u128>(a) * b) >> 64);
}

inline void add_atomically(u64* at, u64 value) { __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

// A CUDA device faults where an address isn't a multiple of the access; the processor would not, so it is checked.
inline void check(const u8* at, unsigned long bytes) {
    if (reinterpret_cast<unsigned long>(at) % bytes != 0) __builtin_trap();
}
template <class T>
inline u64 load(const u8* from) {
    check(from, sizeof(T));
    return *reinterpret_cast<const volatile T*>(from);
}
template <class T>
inline void store(u8* to, u64 value) {
    check(to, sizeof(T));
    *reinterpret_cast<T*>(to) = static_cast<T>(value);
}
inline u64 load8(const u8* from) { return load<u64>(from); }
inline u64 load4(const u8* from) { return load<u32>(from); }
inline u64 load2(const u8* from) { return load<u16>(from); }
inline u64 load1(const u8* from) { return load<u8>(from); }
inline Unit load16(const u8* from) {
    check(from, 16);
    return Unit{load8(from), load8(from + 8)};
}
inline void store16(u8* to, Unit unit) {
    check(to, 16);
    store<u64>(to, unit.even);
    store<u64>(to + 8, unit.odd);
}

#endif

constexpr u64 kChunkBytes = 4096;
constexpr u64 kUnitBytes = 16;
constexpr unsigned kUnits = 8;        // per lane and chunk
constexpr unsigned kRoundStripes = 16;
constexpr u64 kNoSum = ~0ull;
constexpr u64 kOdd = 0x9E3779B97F4A7C15ull;
constexpr u64 kPrime = 0x9E3779B1ull;

// The layout of both is known to transport/gpu/plan.py.
struct Operation {
    u64 position;  // in the virtual address space; rising strictly
    u64 source;
    u64 target;  // 0: nowhere
    u64 stream;
};
struct Stream {
    u64 begin;        // in the virtual address space; a multiple of 4096
    u64 bytes;        // its operations', without gaps
    u64 first_chunk;  // number of its first chunk in the whole stream, of which this may be a part
    u64 sum;          // where in `sums` its chunks are added up; kNoSum: nowhere
};

MF_DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Output number `index` of splitmix64 seeded with 0: the digest's constants, in the order key[16][8], scramble[8],
// init[8], merge[8].
MF_DEVICE u64 constant(unsigned index) { return mix((index + 1) * kOdd); }

MF_DEVICE u64 product(u64 x) { return (x & 0xFFFFFFFFull) * (x >> 32); }

MF_DEVICE u64 scrambled(u64 acc, u64 mask) { return (acc ^ (acc >> 47) ^ mask) * kPrime; }

// What a lane knows of the digest: the constants of its two words.
struct Keys {
    Unit key[2], scramble, init, merge;
};

MF_DEVICE Keys keys_of(unsigned lane) {
    const unsigned word = lane % 4 * 2;
    Keys keys;
    for (unsigned half = 0; half < 2; ++half) {
        const unsigned at = (half * 8 + lane / 4) * 8 + word;
        keys.key[half] = Unit{constant(at), constant(at + 1)};
    }
    keys.scramble = Unit{constant(128 + word), constant(129 + word)};
    keys.init = Unit{constant(136 + word), constant(137 + word)};
    keys.merge = Unit{constant(144 + word), constant(145 + word)};
    return keys;
}

// The last operation that begins at or before `position`; the first one begins at 0.
MF_DEVICE u64 find(const Operation* operations, u64 count, u64 position) {
    u64 low = 0, high = count;
    while (high - low > 1) {
        const u64 middle = low + (high - low) / 2;
        if (operations[middle].position <= position)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// Up to 16 bytes from `position` on, below `end`, of whatever operations they belong to: loaded, stored, and returned
// with zeros behind. In steps as wide as alignment and the operation's end allow. `at` is the lane's operation.
MF_DEVICE Unit move_piecewise(const Operation* operations, u64 count, u64& at, u64 position, u64 end) {
    Unit unit{0, 0};
    if (end - position > kUnitBytes) end = position + kUnitBytes;
    for (unsigned filled = 0; position < end;) {
        while (at + 1 < count && operations[at + 1].position <= position) ++at;
        const Operation& operation = operations[at];
        u64 left = end - position;
        if (at + 1 < count && operations[at + 1].position - position < left) left = operations[at + 1].position - position;
        const u64 skip = position - operation.position;
        const u8* from = reinterpret_cast<const u8*>(operation.source + skip);
        u8* to = operation.target ? reinterpret_cast<u8*>(operation.target + skip) : nullptr;
        // The width divides both addresses, fits what is left, and does not cross from one word into the other.
        const u64 sides = (operation.source + skip) | (to ? operation.target + skip : 0) | filled | 8;
        unsigned width = 8;
        while (width > 1 && (sides % width != 0 || width > left)) width /= 2;
        u64 value;
        if (width == 8) {
            value = load8(from);
            if (to) store<u64>(to, value);
        } else if (width == 4) {
            value = load4(from);
            if (to) store<u32>(to, value);
        } else if (width == 2) {
            value = load2(from);
            if (to) store<u16>(to, value);
        } else {
            value = load1(from);
            if (to) store<u8>(to, value);
        }
        if (filled < 8)
            unit.even |= value << (8 * filled);
        else
            unit.odd |= value << (8 * (filled - 8));
        filled += width;
        position += width;
    }
    return unit;
}

// Moves one chunk; `unit` gets its bytes. `at` is the operation it begins in, `end` where it ends.
MF_DEVICE void move_chunk(const Operation* operations, u64 count, u64 at, u64 begin, u64 end,
                          PerLane<Unit[kUnits]>& unit) {
    // First where each lane's units lie. If all are whole, in one operation each, and aligned on both sides, as KV
    // caches have them, they are loaded at once, before the first of them is waited for.
    PerLane<const u8*[kUnits]> from;
    PerLane<u8*[kUnits]> to;
    PerLane<bool> simple;
    MF_LANES(lane) {
        simple[lane] = true;
        u64 which = at;
        MF_UNROLL
        for (unsigned i = 0; i < kUnits; ++i) {
            const u64 position = begin + i * 512 + lane * kUnitBytes;
            from[lane][i] = nullptr;
            to[lane][i] = nullptr;
            if (position >= end) continue;
            while (which + 1 < count && operations[which + 1].position <= position) ++which;
            const Operation& operation = operations[which];
            const u64 skip = position - operation.position;
            const u64 source = operation.source + skip, target = operation.target ? operation.target + skip : 0;
            const bool whole = position + kUnitBytes <= end &&
                               (which + 1 == count || position + kUnitBytes <= operations[which + 1].position);
            if (!whole || (source | target) % kUnitBytes != 0) simple[lane] = false;
            from[lane][i] = reinterpret_cast<const u8*>(source);
            to[lane][i] = reinterpret_cast<u8*>(target);
        }
    }
    if (all_lanes(simple)) {
        MF_LANES(lane) {
            MF_UNROLL
            for (unsigned i = 0; i < kUnits; ++i) {
                unit[lane][i] = Unit{0, 0};
                if (from[lane][i]) unit[lane][i] = load16(from[lane][i]);
            }
            MF_UNROLL
            for (unsigned i = 0; i < kUnits; ++i)
                if (to[lane][i]) store16(to[lane][i], unit[lane][i]);
        }
    } else {
        MF_LANES(lane) {
            u64 which = at;
            MF_UNROLL
            for (unsigned i = 0; i < kUnits; ++i) {
                const u64 position = begin + i * 512 + lane * kUnitBytes;
                unit[lane][i] = Unit{0, 0};
                if (position < end) unit[lane][i] = move_piecewise(operations, count, which, position, end);
            }
        }
    }
}

// The digest's value of one chunk, in every lane.
MF_DEVICE void hash_chunk(PerLane<Keys>& keys, PerLane<Unit[kUnits]>& unit, u64 number, u64 bytes, PerLane<u64>& out) {
    const unsigned stripes = static_cast<unsigned>((bytes + 63) / 64);
    PerLane<u64> even, odd, more_even, more_odd;
    MF_LANES(lane) {
        even[lane] = keys[lane].init.even;
        odd[lane] = keys[lane].init.odd;
    }
    MF_UNROLL
    for (unsigned round = 0; round < kUnits / 2; ++round) {
        if (round * kRoundStripes >= stripes) break;
        MF_LANES(lane) {
            more_even[lane] = more_odd[lane] = 0;
            MF_UNROLL
            for (unsigned half = 0; half < 2; ++half) {
                if (round * kRoundStripes + half * 8 + lane / 4 >= stripes) continue;
                const Unit d = unit[lane][2 * round + half];
                more_even[lane] += product(d.even ^ keys[lane].key[half].even) + d.odd;
                more_odd[lane] += product(d.odd ^ keys[lane].key[half].odd) + d.even;
            }
        }
        sum_lanes(more_even, 4, 16);
        sum_lanes(more_odd, 4, 16);
        MF_LANES(lane) {
            even[lane] += more_even[lane];
            odd[lane] += more_odd[lane];
            if ((round + 1) * kRoundStripes <= stripes) {
                even[lane] = scrambled(even[lane], keys[lane].scramble.even);
                odd[lane] = scrambled(odd[lane], keys[lane].scramble.odd);
            }
        }
    }
    MF_LANES(lane) {
        const u64 a = even[lane] ^ keys[lane].merge.even, b = odd[lane] ^ keys[lane].merge.odd;
        out[lane] = a * b ^ high_product(a, b);
    }
    sum_lanes(out, 1, 2);
    MF_LANES(lane) { out[lane] = mix(out[lane] ^ mix(number * kOdd + bytes)); }
}

// The work of one warp: chunks [first, last) of the virtual address space.
MF_DEVICE void move_chunks(const Operation* operations, u64 count, const Stream* streams, u64* sums, u64 first, u64 last) {
    PerLane<Keys> keys;
    PerLane<u64> value;
    PerLane<Unit[kUnits]> unit;
    u64 at = find(operations, count, first * kChunkBytes);
    MF_LANES(lane) { keys[lane] = keys_of(lane); }
    for (u64 chunk = first; chunk < last; ++chunk) {
        const u64 begin = chunk * kChunkBytes;
        while (at + 1 < count && operations[at + 1].position <= begin) ++at;
        const Stream stream = streams[operations[at].stream];
        u64 end = stream.begin + stream.bytes;
        if (end - begin > kChunkBytes) end = begin + kChunkBytes;
        move_chunk(operations, count, at, begin, end, unit);
        if (stream.sum == kNoSum) continue;
        hash_chunk(keys, unit, stream.first_chunk + (begin - stream.begin) / kChunkBytes, end - begin, value);
        MF_LANES(lane) {
            if (lane == 0) add_atomically(sums + stream.sum, value[lane]);
        }
    }
}

#if !defined(__CUDACC__)
// What a launch does, one warp after another.
inline void launch(const Operation* operations, u64 count, const Stream* streams, u64* sums, u64 chunks,
                   u64 chunks_per_warp) {
    for (u64 first = 0; first < chunks; first += chunks_per_warp) {
        const u64 last = first + chunks_per_warp < chunks ? first + chunks_per_warp : chunks;
        move_chunks(operations, count, streams, sums, first, last);
    }
}
#endif

}  // namespace mf_gpu

#if defined(__CUDACC__)
// Any number of blocks of 256 threads that make at least ceil(chunks / chunks_per_warp) warps.
extern "C" __global__ void __launch_bounds__(256)
    memfabric_move(const mf_gpu::Operation* operations, mf_gpu::u64 count, const mf_gpu::Stream* streams,
                   mf_gpu::u64* sums, mf_gpu::u64 chunks, mf_gpu::u64 chunks_per_warp) {
    const mf_gpu::u64 warp = (static_cast<mf_gpu::u64>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const mf_gpu::u64 first = warp * chunks_per_warp;
    if (first >= chunks) return;  // all of a warp or none
    const mf_gpu::u64 last = first + chunks_per_warp < chunks ? first + chunks_per_warp : chunks;
    mf_gpu::move_chunks(operations, count, streams, sums, first, last);
}
#endif
