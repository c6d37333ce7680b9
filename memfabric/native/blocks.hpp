// What the native files about blocks share: column types, the header's format, its check.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "digest.hpp"

namespace nb = nanobind;

template <typename T> using Column = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<const uint8_t, nb::shape<-1, 16>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;
using Fragments = nb::ndarray<const int64_t, nb::shape<-1, 6>, nb::c_contig, nb::device::cpu>;
__extension__ typedef __int128 wide;

// Below this many blocks, giving the GIL away and back costs more than the work.
constexpr size_t kReleaseBlocks = 32;

template <typename F> auto without_gil(size_t blocks, F &&work) {
    if (blocks < kReleaseBlocks) return work();
    nb::gil_scoped_release release;
    return work();
}

inline void require(bool ok, const char *what) {
    if (!ok) throw std::invalid_argument(what);
}

enum RegionField { kHandle, kDataOffset, kBlockCount };

constexpr uint64_t kSuperblockBytes = 4096;
constexpr size_t kHeaderBytes = 64;
constexpr uint8_t kLayoutVersion = 1;
constexpr uint8_t kComplete = 2;

struct Header {
    uint32_t crc;
    uint8_t state;
    uint8_t version;
    uint16_t segments;
    uint64_t generation;
    uint8_t key[16];
    uint8_t parent[16];
    uint32_t payload_bytes;
    uint32_t token_count;
    uint64_t digest0;
};
static_assert(sizeof(Header) == kHeaderBytes, "mirrors core/layout.py HEADER_DTYPE");

inline size_t used_bytes(size_t segments) { return kHeaderBytes + 8 * (segments - 1); }

inline uint32_t header_crc(const uint8_t *raw, size_t segments) {
    return uint32_t(mf::digest(raw + 4, used_bytes(segments) - 4));
}

inline void check_shape(size_t bytes, size_t n, size_t stride, size_t segments) {
    require(segments >= 1 && segments <= 4096, "headers: segments must be 1 to 4096");
    require(stride >= used_bytes(segments), "headers: stride too small for that many segments");
    require(stride <= SIZE_MAX / (n + 1) && n * stride <= bytes, "headers: the buffer is too small");
}

enum Check : uint8_t { kOk, kTorn, kNotComplete, kGeneration, kKey, kSize, kDigest };


// Holds a header (any bytes) against what is expected; `digests` of the selected segments, or null to leave them out.
inline Check check_header(const uint8_t *raw, size_t segments, uint32_t payload_bytes, const uint8_t *key,
                          uint64_t generation, size_t first_segment, size_t segment_count, const uint64_t *digests) {
    Header header;
    std::memcpy(&header, raw, sizeof header);
    if (header.crc != header_crc(raw, segments)) return kTorn;
    if (header.version != kLayoutVersion || header.segments != segments || header.payload_bytes != payload_bytes)
        return kSize;
    if (header.state != kComplete) return kNotComplete;
    if (header.generation != generation) return kGeneration;
    if (std::memcmp(header.key, key, 16) != 0) return kKey;
    if (digests != nullptr &&
        std::memcmp(raw + offsetof(Header, digest0) + 8 * first_segment, digests, 8 * segment_count) != 0)
        return kDigest;
    return kOk;
}

template <typename T> nb::object column(std::vector<size_t> shape, T *&data) {
    size_t items = 1;
    for (size_t side : shape) items *= side;
    data = new T[items ? items : 1];
    nb::capsule owner(data, [](void *p) noexcept { delete[] static_cast<T *>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T>(data, shape.size(), shape.data(), owner));
}
