// The batched copy: every transport's data path between mapped memory and the caller's buffers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "digest.hpp"
#include "mapping.hpp"

namespace mf {

enum class Direction { read, write, hash };

struct CopyOptions {
    uint64_t deadline_ns = 0;  // CLOCK_MONOTONIC; 0: none
    unsigned threads = 0;      // 0: decide by size
    const Implementation* implementation = &best_implementation();
    uint64_t stream_bytes = 0;  // batches larger than this pass the caches by; 0: default_stream_bytes()
};

// Source: tests on one Zen 4 core with 32 MiB of L3, blocks of 4 KiB to 2 MiB in random order, warm. Streaming stores
// win from 12 MiB per batch on (1.1 to 1.8 times memcpy), lose below 4 MiB (0.7) and break even about 8 MiB, that is
// where sources and destinations together fill half of the L3.
uint64_t default_stream_bytes();

// True where the group column is non-decreasing apart from -1, and below group_count.
bool groups_valid(const Columns& columns);

// Performs an admitted batch and fills the status and digest columns; returns the number of operations done.
// Direction::hash only digests local memory; `table` isn't used then.
size_t run_batch(const Columns& columns, Direction direction, const Table* table, uint64_t total_bytes,
                 const CopyOptions& options);

// The benchmarks' limit: one memcpy for each operation, nothing else, over the same pool.
void run_memcpy(size_t count, const uint64_t* dst, const uint64_t* src, const uint64_t* length, unsigned threads);

}  // namespace mf
