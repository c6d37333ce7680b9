// transport._gpu_host: the CUDA kernel, compiled for the processor. It stands in for a device in tests, and is how the
// kernel is held against the digest that everything else uses.
#include <nanobind/nanobind.h>

#include "../../gpu/move.cu"

namespace nb = nanobind;

namespace {

// As a launch of `memfabric_move`; addresses are of this process. Without the interpreter lock.
void move(uintptr_t operations, uint64_t count, uintptr_t streams, uintptr_t sums, uint64_t chunks,
          uint64_t chunks_per_warp) {
    if (chunks == 0) return;
    if (operations == 0 || streams == 0 || count == 0 || chunks_per_warp == 0)
        throw nb::value_error("move: chunks without operations, streams or chunks_per_warp");
    mf_gpu::launch(reinterpret_cast<const mf_gpu::Operation*>(operations), count,
                   reinterpret_cast<const mf_gpu::Stream*>(streams), reinterpret_cast<mf_gpu::u64*>(sums), chunks,
                   chunks_per_warp);
}

}  // namespace

NB_MODULE(_gpu_host, m) {
    m.def("move", &move, nb::arg("operations"), nb::arg("count"), nb::arg("streams"), nb::arg("sums"),
          nb::arg("chunks"), nb::arg("chunks_per_warp"), nb::call_guard<nb::gil_scoped_release>());
}
