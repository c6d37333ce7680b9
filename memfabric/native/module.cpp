// memfabric._native: what the metadata server and the client do per block, in batches over columns.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_index(nb::module_ &m);   // index.cpp: key -> slot
void bind_recency(nb::module_ &m); // recency.cpp: recency lists and eviction scans
void bind_blocks(nb::module_ &m);  // blocks.cpp: operation plans and block headers

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false); // at interpreter exit, objects of still-running threads are not leaks
    m.doc() = "Batched native parts of memfabric; all functions work on C-contiguous numpy columns.";
    bind_index(m);
    bind_recency(m);
    bind_blocks(m);
}
