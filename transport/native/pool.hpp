// A small persistent thread pool for splitting one batch. Started on first use, never at import; the workers sleep on
// a condition variable when idle. After a fork the child starts with an empty pool of its own.
#pragma once

#include <cstddef>

namespace mf {

// Runs part(context, k) once for every k < parts, on the calling thread and at most threads - 1 workers; returns
// when all are done. Parts are claimed one by one, so an idle thread takes over what a preempted one hasn't begun.
// If no worker can be started the caller does all of the work.
void run_parallel(size_t parts, unsigned threads, void (*part)(void* context, size_t k), void* context);

// Processors this thread may run on.
unsigned usable_cores();

}  // namespace mf
