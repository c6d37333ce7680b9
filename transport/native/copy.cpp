#include "copy.hpp"

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <string_view>

#include "pool.hpp"

namespace mf {
namespace {

constexpr uint64_t kDeadlineStep = 256 * 1024;  // bytes between two looks at the clock
constexpr uint64_t kStreamOperation = 1024;     // shorter operations gain nothing from streaming stores
constexpr size_t kMaxParts = 64;
constexpr unsigned kAutoThreads = 4;
// Source: as default_stream_bytes(). Two threads on 2 cores are slower than one up to 4 MiB when all is cached, equal
// at 8 MiB, and 1.2 times as fast from 32 MiB on, where memory limits.
constexpr uint64_t kParallelBytes = 8 * 1024 * 1024;
constexpr uint64_t kPartBytes = 256 * 1024;

uint64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(t.tv_nsec);
}

#if MF_X86
// Copies without a digest. A first unaligned vector brings dst to a line boundary; then whole lines; memcpy does the
// rest. glibc's memcpy is 1.05 times as fast when both sides lie alike in their lines (`alike`), but loses up to half
// (rep movsb) when they don't, as numpy's big arrays do, and never streams below some MiB per call. Going through both
// halves of an operation at once gains as much where blocks are scattered and loses a quarter where they follow each
// other, as the blocks of a chain do.
// Source: measured as in default_stream_bytes().
inline bool alike(const uint8_t* dst, const uint8_t* src) {
    return ((reinterpret_cast<uintptr_t>(dst) ^ reinterpret_cast<uintptr_t>(src)) & 63) == 0;
}

template <bool streaming>
__attribute__((target("avx512f"))) void copy_avx512(uint8_t* dst, const uint8_t* src, size_t bytes) {
    const size_t head = (64 - reinterpret_cast<uintptr_t>(dst) % 64) % 64;
    if (head != 0) _mm512_storeu_si512(dst, _mm512_loadu_si512(src));
    size_t at = head;
    for (; at + 256 <= bytes; at += 256) {
        if constexpr (streaming) {
            const size_t ahead = at + 256 + detail::kPrefetchBytes <= bytes ? at + detail::kPrefetchBytes : at;
            for (int line = 0; line < 4; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(src) + ahead + 64 * line, _MM_HINT_T0);
        }
        const __m512i a = _mm512_loadu_si512(src + at), b = _mm512_loadu_si512(src + at + 64);
        const __m512i c = _mm512_loadu_si512(src + at + 128), d = _mm512_loadu_si512(src + at + 192);
        auto* out = reinterpret_cast<__m512i*>(dst + at);
        if constexpr (streaming) {
            _mm512_stream_si512(out, a);
            _mm512_stream_si512(out + 1, b);
            _mm512_stream_si512(out + 2, c);
            _mm512_stream_si512(out + 3, d);
        } else {
            _mm512_store_si512(out, a);
            _mm512_store_si512(out + 1, b);
            _mm512_store_si512(out + 2, c);
            _mm512_store_si512(out + 3, d);
        }
    }
    std::memcpy(dst + at, src + at, bytes - at);
}

template <bool streaming>
__attribute__((target("avx2"))) void copy_avx2(uint8_t* dst, const uint8_t* src, size_t bytes) {
    const size_t head = (32 - reinterpret_cast<uintptr_t>(dst) % 32) % 32;
    if (head != 0)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
    size_t at = head;
    for (; at + 128 <= bytes; at += 128) {
        if constexpr (streaming) {
            const size_t ahead = at + 128 + detail::kPrefetchBytes <= bytes ? at + detail::kPrefetchBytes : at;
            _mm_prefetch(reinterpret_cast<const char*>(src) + ahead, _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(src) + ahead + 64, _MM_HINT_T0);
        }
        const auto* in = reinterpret_cast<const __m256i*>(src + at);
        const __m256i a = _mm256_loadu_si256(in), b = _mm256_loadu_si256(in + 1);
        const __m256i c = _mm256_loadu_si256(in + 2), d = _mm256_loadu_si256(in + 3);
        auto* out = reinterpret_cast<__m256i*>(dst + at);
        if constexpr (streaming) {
            _mm256_stream_si256(out, a);
            _mm256_stream_si256(out + 1, b);
            _mm256_stream_si256(out + 2, c);
            _mm256_stream_si256(out + 3, d);
        } else {
            _mm256_store_si256(out, a);
            _mm256_store_si256(out + 1, b);
            _mm256_store_si256(out + 2, c);
            _mm256_store_si256(out + 3, d);
        }
    }
    std::memcpy(dst + at, src + at, bytes - at);
}
#endif

using Copy = void (*)(uint8_t*, const uint8_t*, size_t);

void copy_libc(uint8_t* dst, const uint8_t* src, size_t bytes) { std::memcpy(dst, src, bytes); }

Copy plain_copy(const Implementation& implementation, bool streaming) {
#if MF_X86
    const std::string_view name = implementation.name;
    if (name == "avx512") return streaming ? copy_avx512<true> : copy_avx512<false>;
    if (name == "avx2") return streaming ? copy_avx2<true> : copy_avx2<false>;
#endif
    (void)implementation;
    (void)streaming;
    return copy_libc;
}

// The first lines of the next operation: hides its TLB misses and the restart of the hardware's prefetcher.
// Source: measured; 1.1 to 1.3 times for fragments of 4 to 64 KiB.
inline void prefetch(const uint8_t* dst, const uint8_t* src, uint64_t bytes, bool streaming) {
    const uint64_t ahead = bytes < 384 ? bytes : 384;
    for (uint64_t at = 0; at < ahead; at += 64) __builtin_prefetch(src + at, 0);
    if (dst == nullptr || streaming) return;
    for (uint64_t at = 0; at < ahead; at += 64) __builtin_prefetch(dst + at, 1);
}

struct Job {
    const Columns& columns;
    Direction direction;
    const Table* table;
    const CopyOptions& options;
    bool streaming;
    const size_t* bounds;
    std::atomic<size_t> done{0};
};

struct Ends {
    uint8_t* dst;
    const uint8_t* src;
};

template <Direction direction>
class Part {
public:
    Part(Job& job, size_t begin, size_t end)
        : job_(job), columns_(job.columns), at_(begin), end_(end), digest_(*job.options.implementation) {}

    void run() {
        const Copy copy = plain_copy(*job_.options.implementation, false);
        const Copy copy_streaming = plain_copy(*job_.options.implementation, true);
        const size_t begin = at_;
        for (Ends next = at_ < end_ ? ends(at_) : Ends{}; at_ < end_; ++at_) {
            const Ends now = next;
            const uint64_t bytes = columns_.length[at_];
            if (late(bytes)) break;
            if (at_ + 1 < end_) {
                next = ends(at_ + 1);
                prefetch(next.dst, next.src, columns_.length[at_ + 1], job_.streaming);
            }
            const bool streaming = job_.streaming && bytes >= kStreamOperation;
            const int32_t group = columns_.group == nullptr ? -1 : columns_.group[at_];
            if (group >= 0) {
                if (group != open_) turn_to(group);
                if constexpr (direction == Direction::hash)
                    digest_.update(now.src, bytes);
                else if (streaming)
                    digest_.copy_streaming(now.dst, now.src, bytes);
                else
                    digest_.copy(now.dst, now.src, bytes);
            } else if constexpr (direction != Direction::hash) {
                if (streaming)
                    copy_streaming(now.dst, now.src, bytes);
                else if (bytes >= kStreamOperation && !alike(now.dst, now.src))
                    copy(now.dst, now.src, bytes);
                else if (bytes != 0)
                    std::memcpy(now.dst, now.src, bytes);
            }
            // One operation's bytes become visible before the next one's: a fence for the streaming stores, and on
            // processors that reorder plain ones the general barrier (which is only for the compiler on x86).
            if (direction == Direction::write && streaming) stream_fence();
            std::atomic_thread_fence(std::memory_order_acq_rel);
            if (columns_.status != nullptr) columns_.status[at_] = kDone;
        }
        if (direction == Direction::read && job_.streaming) stream_fence();
        // A group that was cut off keeps digest 0.
        if (open_ >= 0 && !continues(open_)) columns_.digest[open_] = digest_.finish();
        job_.done.fetch_add(at_ - begin, std::memory_order_relaxed);
    }

private:
    Ends ends(size_t i) {
        auto* local = reinterpret_cast<uint8_t*>(columns_.local[i]);
        if constexpr (direction == Direction::hash) {
            return {nullptr, local};
        } else {
            if (columns_.region[i] != handle_) {
                handle_ = columns_.region[i];
                base_ = job_.table->base(handle_);
            }
            uint8_t* remote = base_ + columns_.offset[i];
            if constexpr (direction == Direction::read)
                return {local, remote};
            else
                return {remote, local};
        }
    }

    bool late(uint64_t bytes) {
        if (job_.options.deadline_ns == 0) return false;
        if (unchecked_ >= kDeadlineStep) {
            unchecked_ = 0;
            if (now_ns() >= job_.options.deadline_ns) return true;
        }
        unchecked_ += bytes < kDeadlineStep ? bytes : kDeadlineStep;
        return false;
    }

    void turn_to(int32_t group) {
        if (open_ >= 0) columns_.digest[open_] = digest_.finish();
        digest_.reset();
        open_ = group;
    }

    bool continues(int32_t group) const {
        for (size_t i = at_; i < end_; ++i)
            if (columns_.group[i] >= 0) return columns_.group[i] == group;
        return false;
    }

    Job& job_;
    const Columns& columns_;
    size_t at_;
    size_t end_;
    Digest digest_;
    int32_t open_ = -1;
    int32_t handle_ = -1;
    uint8_t* base_ = nullptr;
    uint64_t unchecked_ = kDeadlineStep;  // so the first operation looks at the clock
};

void run_part(void* context, size_t k) {
    Job& job = *static_cast<Job*>(context);
    const size_t begin = job.bounds[k];
    const size_t end = job.bounds[k + 1];
    switch (job.direction) {
        case Direction::read: return Part<Direction::read>(job, begin, end).run();
        case Direction::write: return Part<Direction::write>(job, begin, end).run();
        case Direction::hash: return Part<Direction::hash>(job, begin, end).run();
    }
}

unsigned thread_count(unsigned wanted, uint64_t total_bytes) {
    if (wanted != 0) return wanted;
    if (total_bytes < kParallelBytes) return 1;
    static const unsigned cores = std::min(usable_cores(), kAutoThreads);
    return cores;
}

// Cuts the batch into parts of about equal bytes, never inside a digest group. Returns the number of parts.
size_t cut(const Columns& columns, uint64_t total_bytes, unsigned threads, size_t* bounds) {
    const size_t wanted = std::min<size_t>(kMaxParts, size_t{threads} * 4);
    const uint64_t step = std::max(total_bytes / wanted + 1, kPartBytes);
    size_t parts = 0;
    uint64_t bytes = 0;
    int32_t open = -1;
    bounds[0] = 0;
    for (size_t i = 0; i < columns.count; ++i) {
        const int32_t group = columns.group == nullptr ? -1 : columns.group[i];
        const bool allowed = open < 0 || (group >= 0 && group != open);
        if (allowed && bytes >= step && parts + 1 < kMaxParts) {
            bounds[++parts] = i;
            bytes = 0;
        }
        if (group >= 0) open = group;
        bytes += columns.length[i];
    }
    bounds[++parts] = columns.count;
    return parts;
}

// Groups without an operation have the digest of the empty stream; the others 0 until they are complete.
void prepare_digests(const Columns& columns) {
    if (columns.digest == nullptr) return;
    static const uint64_t empty = digest(nullptr, 0);
    std::fill_n(columns.digest, columns.group_count, empty);
    if (columns.group == nullptr) return;
    for (size_t i = 0; i < columns.count; ++i)
        if (columns.group[i] >= 0) columns.digest[columns.group[i]] = 0;
}

}  // namespace

uint64_t default_stream_bytes() {
    static const uint64_t bytes = [] {
        // Not sysconf(_SC_LEVEL3_CACHE_SIZE): glibc 2.36 reports 320 MiB on a Zen 4 guest that has 32 MiB.
        unsigned long kib = 0;
        if (FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "re")) {
            if (std::fscanf(file, "%luK", &kib) != 1) kib = 0;
            std::fclose(file);
        }
        return kib != 0 ? uint64_t{kib} * 1024 / 4 : uint64_t{8} << 20;
    }();
    return bytes;
}

bool groups_valid(const Columns& columns) {
    if (columns.group == nullptr) return true;
    int64_t last = 0;
    for (size_t i = 0; i < columns.count; ++i) {
        const int64_t group = columns.group[i];
        if (group == -1) continue;
        if (group < last || group >= static_cast<int64_t>(columns.group_count)) return false;
        last = group;
    }
    return true;
}

size_t run_batch(const Columns& columns, Direction direction, const Table* table, uint64_t total_bytes,
                 const CopyOptions& options) {
    // Pairs with the release at the end of whatever wrote the bytes before telling us of them.
    std::atomic_thread_fence(std::memory_order_acquire);
    prepare_digests(columns);
    if (columns.status != nullptr) std::memset(columns.status, kNotDone, columns.count);
    const uint64_t stream_bytes = options.stream_bytes != 0 ? options.stream_bytes : default_stream_bytes();
    size_t bounds[kMaxParts + 1] = {0, columns.count};
    const unsigned threads = thread_count(options.threads, total_bytes);
    const size_t parts = threads > 1 ? cut(columns, total_bytes, threads, bounds) : 1;
    Job job{columns, direction, table, options, total_bytes > stream_bytes, bounds};
    if (parts == 1)
        run_part(&job, 0);
    else
        run_parallel(parts, threads, run_part, &job);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    return job.done.load(std::memory_order_relaxed);
}

namespace {
struct MemcpyJob {
    const uint64_t* dst;
    const uint64_t* src;
    const uint64_t* length;
    size_t count;
    size_t step;
};

void memcpy_part(void* context, size_t k) {
    const auto& job = *static_cast<const MemcpyJob*>(context);
    const size_t end = std::min(job.count, (k + 1) * job.step);
    for (size_t i = k * job.step; i < end; ++i)
        std::memcpy(reinterpret_cast<void*>(job.dst[i]), reinterpret_cast<const void*>(job.src[i]), job.length[i]);
}
}  // namespace

void run_memcpy(size_t count, const uint64_t* dst, const uint64_t* src, const uint64_t* length, unsigned threads) {
    uint64_t total = 0;
    for (size_t i = 0; i < count; ++i) total += length[i];
    threads = thread_count(threads, total);
    MemcpyJob job{dst, src, length, count, count};
    if (threads > 1) job.step = std::max<size_t>(1, (count + threads * 4 - 1) / (threads * 4));
    const size_t parts = job.step == 0 ? 0 : (count + job.step - 1) / job.step;
    if (parts <= 1)
        memcpy_part(&job, 0);
    else
        run_parallel(parts, threads, memcpy_part, &job);
}

}  // namespace mf
