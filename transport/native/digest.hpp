// The segment digest: one 64-bit checksum of a byte stream, used wherever memfabric checks bytes.
//
// Header-only; needs no special compile flags: the vector variants carry their own target attribute and are
// chosen at run time. The scalar code is the reference, every other variant gives the same bits.
//
// Definition (all arithmetic modulo 2^64, all words little-endian):
//   The stream is cut into chunks of 4096 bytes, a chunk into stripes of 64 bytes (8 lanes of 64 bits); the last
//   stripe of the stream is padded with zeros. Every chunk is hashed alone, so many can be hashed at once (threads,
//   a GPU). The constants are successive outputs of splitmix64 seeded with 0 ("Tables" below).
//     acc = init
//     for stripe number s, words d[0..8):
//         x = d[l] ^ key[s mod 16][l];  acc[l] += low32(x) * high32(x);  acc[l ^ 1] += d[l]
//         after each 16th stripe:  acc[l] = (acc[l] ^ acc[l] >> 47 ^ scramble[l]) * prime
//     m = sum over i < 4 of fold(acc[2i] ^ merge[2i], acc[2i+1] ^ merge[2i+1])    fold(a, b) = low64(a*b) ^ high64(a*b)
//     chunk = mix(m ^ mix(chunk_number * odd + chunk_length))
//   digest = mix(sum over chunks ^ mix(stream_length * odd + 1))        mix = finalizer of splitmix64
// A change confined to one word always changes an accumulator (the word is also added to its neighbour lane, and
// every later step is a bijection of that lane). It is a checksum against torn, stale and mixed bytes, not a MAC.
// Source: the lane step is that of XXH3 (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md), with keys that differ
// for every stripe of a scramble round.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
// GCC 12 warns about the deliberately undefined operands inside its own intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#define MF_X86 1
#else
#define MF_X86 0
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the digest is defined on little-endian words");

namespace mf {

inline constexpr size_t kStripeBytes = 64;
inline constexpr size_t kChunkBytes = 4096;
inline constexpr unsigned kRoundStripes = 16;  // stripes between two scrambles
inline constexpr unsigned kChunkStripes = kChunkBytes / kStripeBytes;

namespace detail {

inline constexpr uint64_t kPrime = 0x9E3779B1u;  // 32 bits and odd: a 64x32 multiply, a bijection
inline constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;

constexpr uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

struct alignas(64) Tables {
    uint64_t key[kRoundStripes][8] = {};
    uint64_t scramble[8] = {};
    uint64_t init[8] = {};
    uint64_t merge[8] = {};
    constexpr Tables() {
        uint64_t state = 0;
        for (auto& row : key)
            for (auto& word : row) word = mix(state += kOdd);
        for (auto& word : scramble) word = mix(state += kOdd);
        for (auto& word : init) word = mix(state += kOdd);
        for (auto& word : merge) word = mix(state += kOdd);
    }
};
inline constexpr Tables kTables{};

inline uint64_t fold(uint64_t a, uint64_t b) {
    __extension__ typedef unsigned __int128 u128;
    const u128 product = static_cast<u128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t merge_chunk(const uint64_t* acc, uint64_t chunk_number, uint64_t chunk_bytes) {
    const uint64_t* key = kTables.merge;
    uint64_t m = 0;
    for (int i = 0; i < 8; i += 2) m += fold(acc[i] ^ key[i], acc[i + 1] ^ key[i + 1]);
    return mix(m ^ mix(chunk_number * kOdd + chunk_bytes));
}

// What a kernel carries from call to call. `stripe` is the number of the next stripe in its chunk, 0..63.
struct alignas(64) State {
    uint64_t acc[8];
    uint64_t sum;
    uint64_t chunk;
    unsigned stripe;
};

// How a kernel treats the destination. `stream` passes the caches by (dst must be 64-byte aligned; the caller
// fences), `stream16` is the same for a destination aligned to 16 bytes only.
enum class Store { none, normal, stream, stream16 };

// Each kernel hashes `count` whole stripes from src and, unless Store::none, stores the very registers it hashed.
using Kernel = void (*)(State&, uint8_t* dst, const uint8_t* src, size_t count);

// The empty asm makes a loaded value opaque, so that the compiler can't load it a second time from a source that
// another process may be writing: what is stored and what is hashed are one value.
template <Store store>
void run_scalar(State& state, uint8_t* dst, const uint8_t* src, size_t count) {
    uint64_t acc[8];
    std::memcpy(acc, state.acc, sizeof acc);
    unsigned stripe = state.stripe;
    while (count != 0) {
        const uint64_t* key = kTables.key[stripe % kRoundStripes];
        uint64_t d[8];
        std::memcpy(d, src, sizeof d);
        asm("" : "+m"(d));
        if constexpr (store != Store::none) {
            std::memcpy(dst, d, sizeof d);
            dst += kStripeBytes;
        }
        for (int lane = 0; lane < 8; ++lane) {
            const uint64_t x = d[lane] ^ key[lane];
            acc[lane] += (x & 0xFFFFFFFFu) * (x >> 32) + d[lane ^ 1];
        }
        src += kStripeBytes;
        --count;
        if (++stripe % kRoundStripes == 0) {
            for (int lane = 0; lane < 8; ++lane)
                acc[lane] = (acc[lane] ^ (acc[lane] >> 47) ^ kTables.scramble[lane]) * kPrime;
            if (stripe == kChunkStripes) {
                state.sum += merge_chunk(acc, state.chunk++, kChunkBytes);
                std::memcpy(acc, kTables.init, sizeof acc);
                stripe = 0;
            }
        }
    }
    std::memcpy(state.acc, acc, sizeof acc);
    state.stripe = stripe;
}

#if MF_X86
// How far streaming copies fetch ahead, never beyond the end of what they copy: that would waste half the bandwidth of
// 4 KiB fragments. Source: measured on Zen 4; 1.1 times for batches far larger than the L3.
inline constexpr size_t kPrefetchBytes = 2048;

template <Store store>
__attribute__((target("avx2"))) void run_avx2(State& state, uint8_t* dst, const uint8_t* src, size_t count) {
    const __m256i prime = _mm256_set1_epi64x(static_cast<long long>(kPrime));
    __m256i acc0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(state.acc));
    __m256i acc1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(state.acc) + 1);
    unsigned stripe = state.stripe;
    while (count != 0) {
        const unsigned at = stripe % kRoundStripes;
        const unsigned run = count < kRoundStripes - at ? static_cast<unsigned>(count) : kRoundStripes - at;
        const uint64_t* key = kTables.key[at];
        const size_t ahead = count > kRoundStripes + kPrefetchBytes / kStripeBytes ? kPrefetchBytes : 0;
        for (unsigned i = 0; i < run; ++i, key += 8) {
            if constexpr (store == Store::stream || store == Store::stream16)
                _mm_prefetch(reinterpret_cast<const char*>(src) + ahead, _MM_HINT_T0);
            __m256i d0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
            __m256i d1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src) + 1);
            asm("" : "+x"(d0), "+x"(d1));
            src += kStripeBytes;
            if constexpr (store == Store::normal) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), d0);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst) + 1, d1);
            } else if constexpr (store == Store::stream) {
                _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), d0);
                _mm256_stream_si256(reinterpret_cast<__m256i*>(dst) + 1, d1);
            } else if constexpr (store == Store::stream16) {
                auto* out = reinterpret_cast<__m128i*>(dst);
                _mm_stream_si128(out, _mm256_castsi256_si128(d0));
                _mm_stream_si128(out + 1, _mm256_extracti128_si256(d0, 1));
                _mm_stream_si128(out + 2, _mm256_castsi256_si128(d1));
                _mm_stream_si128(out + 3, _mm256_extracti128_si256(d1, 1));
            }
            if constexpr (store != Store::none) dst += kStripeBytes;
            const __m256i x0 = _mm256_xor_si256(d0, _mm256_load_si256(reinterpret_cast<const __m256i*>(key)));
            const __m256i x1 = _mm256_xor_si256(d1, _mm256_load_si256(reinterpret_cast<const __m256i*>(key) + 1));
            const __m256i p0 = _mm256_mul_epu32(x0, _mm256_srli_epi64(x0, 32));
            const __m256i p1 = _mm256_mul_epu32(x1, _mm256_srli_epi64(x1, 32));
            acc0 = _mm256_add_epi64(acc0, _mm256_add_epi64(p0, _mm256_shuffle_epi32(d0, 0x4E)));
            acc1 = _mm256_add_epi64(acc1, _mm256_add_epi64(p1, _mm256_shuffle_epi32(d1, 0x4E)));
        }
        count -= run;
        stripe += run;
        if (stripe % kRoundStripes == 0) {
            const auto* mask = reinterpret_cast<const __m256i*>(kTables.scramble);
            acc0 = _mm256_xor_si256(_mm256_xor_si256(acc0, _mm256_srli_epi64(acc0, 47)), _mm256_load_si256(mask));
            acc1 = _mm256_xor_si256(_mm256_xor_si256(acc1, _mm256_srli_epi64(acc1, 47)), _mm256_load_si256(mask + 1));
            acc0 = _mm256_add_epi64(
                _mm256_mul_epu32(acc0, prime),
                _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(acc0, 32), prime), 32));
            acc1 = _mm256_add_epi64(
                _mm256_mul_epu32(acc1, prime),
                _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(acc1, 32), prime), 32));
            if (stripe == kChunkStripes) {
                alignas(32) uint64_t acc[8];
                _mm256_store_si256(reinterpret_cast<__m256i*>(acc), acc0);
                _mm256_store_si256(reinterpret_cast<__m256i*>(acc) + 1, acc1);
                state.sum += merge_chunk(acc, state.chunk++, kChunkBytes);
                acc0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTables.init));
                acc1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTables.init) + 1);
                stripe = 0;
            }
        }
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(state.acc), acc0);
    _mm256_store_si256(reinterpret_cast<__m256i*>(state.acc) + 1, acc1);
    state.stripe = stripe;
}

template <Store store>
__attribute__((target("avx512f"))) void run_avx512(State& state, uint8_t* dst, const uint8_t* src, size_t count) {
    const __m512i prime = _mm512_set1_epi64(static_cast<long long>(kPrime));
    __m512i acc = _mm512_load_si512(state.acc);
    unsigned stripe = state.stripe;
    while (count != 0) {
        const unsigned at = stripe % kRoundStripes;
        const unsigned run = count < kRoundStripes - at ? static_cast<unsigned>(count) : kRoundStripes - at;
        const uint64_t* key = kTables.key[at];
        const size_t ahead = count > kRoundStripes + kPrefetchBytes / kStripeBytes ? kPrefetchBytes : 0;
        for (unsigned i = 0; i < run; ++i, key += 8) {
            if constexpr (store == Store::stream || store == Store::stream16)
                _mm_prefetch(reinterpret_cast<const char*>(src) + ahead, _MM_HINT_T0);
            __m512i d = _mm512_loadu_si512(src);
            asm("" : "+v"(d));
            src += kStripeBytes;
            if constexpr (store == Store::normal) {
                _mm512_storeu_si512(dst, d);
            } else if constexpr (store == Store::stream) {
                _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), d);
            } else if constexpr (store == Store::stream16) {
                auto* out = reinterpret_cast<__m128i*>(dst);
                _mm_stream_si128(out, _mm512_castsi512_si128(d));
                _mm_stream_si128(out + 1, _mm512_extracti32x4_epi32(d, 1));
                _mm_stream_si128(out + 2, _mm512_extracti32x4_epi32(d, 2));
                _mm_stream_si128(out + 3, _mm512_extracti32x4_epi32(d, 3));
            }
            if constexpr (store != Store::none) dst += kStripeBytes;
            const __m512i x = _mm512_xor_si512(d, _mm512_load_si512(key));
            const __m512i product = _mm512_mul_epu32(x, _mm512_srli_epi64(x, 32));
            acc = _mm512_add_epi64(
                acc, _mm512_add_epi64(product, _mm512_shuffle_epi32(d, static_cast<_MM_PERM_ENUM>(0x4E))));
        }
        count -= run;
        stripe += run;
        if (stripe % kRoundStripes == 0) {
            acc = _mm512_xor_si512(_mm512_xor_si512(acc, _mm512_srli_epi64(acc, 47)),
                                   _mm512_load_si512(kTables.scramble));
            acc = _mm512_add_epi64(
                _mm512_mul_epu32(acc, prime),
                _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(acc, 32), prime), 32));
            if (stripe == kChunkStripes) {
                alignas(64) uint64_t words[8];
                _mm512_store_si512(words, acc);
                state.sum += merge_chunk(words, state.chunk++, kChunkBytes);
                acc = _mm512_load_si512(kTables.init);
                stripe = 0;
            }
        }
    }
    _mm512_store_si512(state.acc, acc);
    state.stripe = stripe;
}
#endif

}  // namespace detail

// One implementation of the digest: a kernel per way of storing.
struct Implementation {
    const char* name;
    bool supported;  // by this processor
    detail::Kernel hash, copy, stream, stream16;
};

// Best first; the last one, the scalar reference, works everywhere.
inline const Implementation* implementations(size_t* count) {
    using detail::Store;
#if MF_X86
    static const Implementation all[] = {
        {"avx512", __builtin_cpu_supports("avx512f") != 0, detail::run_avx512<Store::none>,
         detail::run_avx512<Store::normal>, detail::run_avx512<Store::stream>, detail::run_avx512<Store::stream16>},
        {"avx2", __builtin_cpu_supports("avx2") != 0, detail::run_avx2<Store::none>, detail::run_avx2<Store::normal>,
         detail::run_avx2<Store::stream>, detail::run_avx2<Store::stream16>},
        {"scalar", true, detail::run_scalar<Store::none>, detail::run_scalar<Store::normal>,
         detail::run_scalar<Store::normal>, detail::run_scalar<Store::normal>},
    };
#else
    static const Implementation all[] = {
        {"scalar", true, detail::run_scalar<Store::none>, detail::run_scalar<Store::normal>,
         detail::run_scalar<Store::normal>, detail::run_scalar<Store::normal>},
    };
#endif
    *count = sizeof all / sizeof all[0];
    return all;
}

inline const Implementation& best_implementation() {
    static const Implementation* const best = [] {
        size_t count = 0;
        const Implementation* all = implementations(&count);
        while (!all->supported) ++all;
        return all;
    }();
    return *best;
}

// Streaming digest: fragments of any length and alignment, in order, give the digest of their concatenation.
class Digest {
public:
    explicit Digest(const Implementation& implementation = best_implementation()) : implementation_(&implementation) {
        reset();
    }

    void reset() {
        std::memcpy(state_.acc, detail::kTables.init, sizeof state_.acc);
        state_.sum = 0;
        state_.chunk = 0;
        state_.stripe = 0;
        tail_bytes_ = 0;
    }

    void update(const void* data, size_t bytes) { run<false>(nullptr, data, bytes, implementation_->hash); }

    // Copies and hashes in one pass; the digest is of exactly the bytes stored at dst. Ranges must not overlap.
    void copy(void* dst, const void* src, size_t bytes) { run<true>(dst, src, bytes, implementation_->copy); }

    // The same with stores that pass the caches by where dst's alignment allows; the caller issues stream_fence()
    // before anything that must come after these stores.
    void copy_streaming(void* dst, const void* src, size_t bytes) {
        // Whole stripes start where the pending partial stripe ends.
        const auto first = reinterpret_cast<uintptr_t>(dst) + (tail_bytes_ ? kStripeBytes - tail_bytes_ : 0);
        run<true>(dst, src, bytes,
                  first % 64 == 0   ? implementation_->stream
                  : first % 16 == 0 ? implementation_->stream16
                                    : implementation_->copy);
    }

    // The digest of everything so far; more may follow.
    uint64_t finish() const {
        const uint64_t chunk_bytes = uint64_t{state_.stripe} * kStripeBytes + tail_bytes_;
        uint64_t sum = state_.sum;
        if (chunk_bytes != 0) {
            detail::State last = state_;
            if (tail_bytes_ != 0) {
                uint8_t padded[kStripeBytes] = {};
                std::memcpy(padded, tail_, tail_bytes_);
                // The 64th stripe closes the chunk inside the kernel, with a full chunk's length: not this one.
                if (last.stripe == kChunkStripes - 1) last.stripe -= kChunkStripes / 2;
                implementation_->hash(last, nullptr, padded, 1);
            }
            sum += detail::merge_chunk(last.acc, state_.chunk, chunk_bytes);
        }
        const uint64_t bytes = state_.chunk * kChunkBytes + chunk_bytes;
        return detail::mix(sum ^ detail::mix(bytes * detail::kOdd + 1));
    }

private:
    template <bool copying>
    void run(void* to, const void* from, size_t bytes, detail::Kernel kernel) {
        auto* dst = static_cast<uint8_t*>(to);
        auto* src = static_cast<const uint8_t*>(from);
        if (bytes == 0) return;
        if (tail_bytes_ != 0) {
            const size_t want = kStripeBytes - tail_bytes_;
            const size_t part = bytes < want ? bytes : want;
            take<copying>(dst, src, part);
            bytes -= part;
            src += part;
            if constexpr (copying) dst += part;
            if (tail_bytes_ != kStripeBytes) return;
            tail_bytes_ = 0;
            implementation_->hash(state_, nullptr, tail_, 1);
        }
        if (const size_t stripes = bytes / kStripeBytes; stripes != 0) {
            kernel(state_, dst, src, stripes);
            src += stripes * kStripeBytes;
            if constexpr (copying) dst += stripes * kStripeBytes;
            bytes -= stripes * kStripeBytes;
        }
        if (bytes != 0) take<copying>(dst, src, bytes);
    }

    // Appends to the partial stripe; what is stored at dst is read back from there, never from src again.
    template <bool copying>
    void take(uint8_t* dst, const uint8_t* src, size_t bytes) {
        std::memcpy(tail_ + tail_bytes_, src, bytes);
        if constexpr (copying) {
            asm volatile("" ::: "memory");
            std::memcpy(dst, tail_ + tail_bytes_, bytes);
        }
        tail_bytes_ += static_cast<unsigned>(bytes);
    }

    detail::State state_;
    uint8_t tail_[kStripeBytes];
    unsigned tail_bytes_;
    const Implementation* implementation_;
};

// The digest of one contiguous run.
inline uint64_t digest(const void* data, size_t bytes) {
    Digest stream;
    stream.update(data, bytes);
    return stream.finish();
}

// Copies src to dst and adds the bytes that landed to `stream`, in one pass over memory.
inline void copy_digest(void* dst, const void* src, size_t bytes, Digest& stream) { stream.copy(dst, src, bytes); }

// Orders non-temporal stores before whatever this thread stores next.
inline void stream_fence() {
#if MF_X86
    _mm_sfence();
#endif
}

}  // namespace mf
