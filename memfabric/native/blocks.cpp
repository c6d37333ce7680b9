// Operation plans and block headers: what a client does per block, and what recovery reads.
//
// Nothing here trusts its input: addresses are computed in 128 bits and held against the extents of the caller's
// buffers, headers may be any bytes. The header's format is owned by memfabric/core/layout.py (HEADER_DTYPE).
#include "blocks.hpp"

namespace {

// A Py_buffer that is given back.
struct View {
    Py_buffer buffer;
    View(nb::handle object, int flags) {
        if (PyObject_GetBuffer(object.ptr(), &buffer, flags) != 0) throw nb::python_error();
    }
    ~View() { PyBuffer_Release(&buffer); }
    View(const View &) = delete;
    View &operator=(const View &) = delete;
};

uint64_t digest(nb::handle object) {
    View view(object, PyBUF_SIMPLE);
    const size_t bytes = static_cast<size_t>(view.buffer.len);
    return without_gil(bytes >> 9, [&] { return mf::digest(view.buffer.buf, bytes); });
}

// (address, bytes, item size, writable, contiguous, is a buffer of Python objects)
nb::tuple buffer_info(nb::handle object) {
    View view(object, PyBUF_STRIDES | PyBUF_FORMAT);
    const Py_buffer &b = view.buffer;
    const bool objects = b.format != nullptr && std::strchr(b.format, 'O') != nullptr;
    return nb::make_tuple(reinterpret_cast<uintptr_t>(b.buf), static_cast<size_t>(b.len),
                          static_cast<size_t>(b.itemsize), !b.readonly, PyBuffer_IsContiguous(&b, 'C') != 0, objects);
}

// Position of the first key that equals keys[i], for each i.
nb::ndarray<nb::numpy, int32_t, nb::ndim<1>> first_positions(Keys keys) {
    const size_t n = keys.shape(0);
    require(n <= INT32_MAX, "first_positions: too many keys");
    int32_t *out = new int32_t[n ? n : 1];
    nb::capsule owner(out, [](void *p) noexcept { delete[] static_cast<int32_t *>(p); });
    const uint8_t *raw = keys.data();
    without_gil(n, [&] {
        size_t buckets = 16;
        while (buckets < 2 * n) buckets *= 2;
        std::vector<int32_t> table(buckets, -1);
        for (size_t i = 0; i < n; i++) {
            uint64_t a, b;
            std::memcpy(&a, raw + i * 16, 8);
            std::memcpy(&b, raw + i * 16 + 8, 8);
            uint64_t h = (a ^ (b * 0x9E3779B97F4A7C15ull)) * 0xFF51AFD7ED558CCDull;
            h ^= h >> 31;
            size_t at = h & (buckets - 1);
            while (table[at] >= 0 && std::memcmp(raw + size_t(table[at]) * 16, raw + i * 16, 16) != 0)
                at = (at + 1) & (buckets - 1);
            if (table[at] < 0) table[at] = int32_t(i);
            out[i] = table[at];
        }
    });
    return nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>(out, {n}, owner);
}

// --- plans -----------------------------------------------------------------------------------------------------

struct Operations {
    uint64_t *local;
    int32_t *region;
    uint64_t *offset;
    uint64_t *length;
    int32_t *group;
    size_t capacity;
    size_t count = 0;

    // Appends, or extends the last operation when both sides go on where it ends.
    void add(uint64_t from, int32_t handle, uint64_t to, uint64_t bytes, int32_t in_group, uint64_t merge_bytes) {
        if (count) {
            const size_t last = count - 1;
            if (group[last] == in_group && region[last] == handle && local[last] + length[last] == from &&
                offset[last] + length[last] == to && length[last] + bytes <= merge_bytes) {
                length[last] += bytes;
                return;
            }
        }
        if (count == capacity) throw std::invalid_argument("plan: the operation columns are too short");
        local[count] = from;
        region[count] = handle;
        offset[count] = to;
        length[count] = bytes;
        group[count] = in_group;
        count++;
    }
};

enum FragmentField { kBase, kStride, kBytes, kSegment, kLow, kHigh };
// Row of the region table for a block; throws unless the block lies in a mapped region.
const int64_t *region_row(const Table &regions, int32_t slot, uint32_t block, size_t position) {
    if (slot < 0 || size_t(slot) >= regions.shape(0))
        throw std::out_of_range("plan: block " + std::to_string(position) + " is in a region that is not known");
    const int64_t *row = regions.data() + size_t(slot) * 3;
    if (row[kHandle] < 0)
        throw std::out_of_range("plan: block " + std::to_string(position) + " is in a region that is not mapped");
    if (int64_t(block) >= row[kBlockCount] || row[kDataOffset] < 0)
        throw std::out_of_range("plan: block " + std::to_string(position) + " lies outside its region");
    return row;
}

size_t plan(Fragments fragments, Table regions, Column<const int32_t> slot, Column<const uint32_t> block,
            std::optional<Column<const uint64_t>> block_base, std::optional<Column<const int64_t>> block_id,
            uint64_t block_bytes, uint64_t segment_bytes, size_t first_segment, size_t segment_count, bool groups,
            uint64_t merge_bytes, uint64_t header_local, uint64_t header_stride, uint64_t header_bytes,
            Column<uint64_t> local, Column<int32_t> region, Column<uint64_t> offset, Column<uint64_t> length,
            Column<int32_t> group) {
    const size_t n = slot.shape(0), parts = fragments.shape(0);
    require(block.shape(0) == n, "plan: slot and block differ in length");
    require(!block_base || block_base->shape(0) == n, "plan: block_base has another length");
    require(!block_id || block_id->shape(0) == n, "plan: block_id has another length");
    require(block_bytes <= (1u << 30) && segment_bytes && block_bytes % segment_bytes == 0, "plan: sizes");
    require(header_stride <= 4096 * 16 && header_bytes <= header_stride, "plan: header sizes");
    const size_t segments = block_bytes / segment_bytes;
    require(segment_count <= segments && first_segment <= segments - segment_count, "plan: segments");
    require(n * segment_count <= INT32_MAX, "plan: too many groups");
    const size_t capacity = local.shape(0);
    require(region.shape(0) >= capacity && offset.shape(0) >= capacity && length.shape(0) >= capacity &&
                group.shape(0) >= capacity,
            "plan: operation columns differ in length");
    Operations out{local.data(), region.data(), offset.data(), length.data(), group.data(), capacity};
    const int64_t *fragment = fragments.data();

    auto payload = [&] {
        for (size_t i = 0; i < n; i++) {
            const int64_t *row = region_row(regions, slot.data()[i], block.data()[i], i);
            const wide base = block_base ? wide(block_base->data()[i]) : wide(0);
            const int64_t id = block_id ? block_id->data()[i] : int64_t(i);
            const uint64_t start = uint64_t(row[kDataOffset]) + uint64_t(block.data()[i]) * block_bytes;
            uint64_t done = 0;
            int64_t segment = -1;
            for (size_t f = 0; f < parts; f++) {
                const int64_t *p = fragment + f * 6;
                const wide at = wide(p[kBase]) + wide(id) * p[kStride];
                if (p[kBytes] < 0 || at < p[kLow] || at + p[kBytes] > p[kHigh])
                    throw std::out_of_range("block id " + std::to_string(id) + " (position " + std::to_string(i) +
                                            ") puts fragment " + std::to_string(f) + " outside its tensor");
                const wide address = base + at;
                if (address < 0 || address + p[kBytes] > wide(UINT64_MAX))
                    throw std::out_of_range("plan: an address does not fit 64 bits");
                if (p[kSegment] != segment) {
                    segment = p[kSegment];
                    done = 0;
                    if (segment < int64_t(first_segment) || segment >= int64_t(first_segment + segment_count))
                        throw std::invalid_argument("plan: fragment of a segment that is not selected");
                }
                if (uint64_t(p[kBytes]) > segment_bytes - done)
                    throw std::invalid_argument("plan: fragments are longer than their segment");
                if (p[kBytes] == 0) continue;
                const int32_t in_group =
                    groups ? int32_t(i * segment_count + size_t(segment) - first_segment) : -1;
                out.add(uint64_t(address), int32_t(row[kHandle]), start + uint64_t(segment) * segment_bytes + done,
                        uint64_t(p[kBytes]), in_group, merge_bytes);
                done += uint64_t(p[kBytes]);
            }
        }
        if (!header_bytes) return out.count;
        for (size_t i = 0; i < n; i++) {
            const int64_t *row = region_row(regions, slot.data()[i], block.data()[i], i);
            // Never merged with payload, never past the stride: the caller's header buffer has n × stride bytes.
            if (out.count == out.capacity) throw std::invalid_argument("plan: the operation columns are too short");
            const size_t at = out.count++;
            out.local[at] = header_local + i * header_stride;
            out.region[at] = int32_t(row[kHandle]);
            out.offset[at] = kSuperblockBytes + uint64_t(block.data()[i]) * header_stride;
            out.length[at] = header_bytes;
            out.group[at] = -1;
        }
        return out.count;
    };
    return without_gil(n * parts, payload);
}

// --- headers ---------------------------------------------------------------------------------------------------

void pack_headers(Column<uint8_t> out, size_t stride, size_t segments, Keys keys, Keys parents,
                  Column<const uint64_t> generation, Column<const uint32_t> tokens, uint32_t payload_bytes,
                  uint8_t state, std::optional<Column<const uint64_t>> digests) {
    const size_t n = keys.shape(0);
    check_shape(out.shape(0), n, stride, segments);
    require(parents.shape(0) == n && generation.shape(0) == n && tokens.shape(0) == n,
            "pack_headers: columns differ in length");
    require(!digests || digests->shape(0) == n * segments, "pack_headers: one digest per block and segment");
    without_gil(n, [&] {
        for (size_t i = 0; i < n; i++) {
            uint8_t *raw = out.data() + i * stride;
            std::memset(raw, 0, stride);
            Header header{};
            header.state = state;
            header.version = kLayoutVersion;
            header.segments = uint16_t(segments);
            header.generation = generation.data()[i];
            std::memcpy(header.key, keys.data() + i * 16, 16);
            std::memcpy(header.parent, parents.data() + i * 16, 16);
            header.payload_bytes = payload_bytes;
            header.token_count = tokens.data()[i];
            std::memcpy(raw, &header, sizeof header);
            if (digests) std::memcpy(raw + offsetof(Header, digest0), digests->data() + i * segments, 8 * segments);
            const uint32_t crc = header_crc(raw, segments);
            std::memcpy(raw, &crc, 4);
        }
    });
}

size_t check_headers(Column<const uint8_t> headers, size_t stride, size_t segments, uint32_t payload_bytes, Keys keys,
                     Column<const uint64_t> generation, size_t first_segment, size_t segment_count,
                     std::optional<Column<const uint64_t>> digests, Column<uint8_t> status) {
    const size_t n = keys.shape(0);
    check_shape(headers.shape(0), n, stride, segments);
    require(generation.shape(0) == n && status.shape(0) == n, "check_headers: columns differ in length");
    require(segment_count <= segments && first_segment <= segments - segment_count, "check_headers: segments");
    require(!digests || digests->shape(0) >= n * segment_count, "check_headers: one digest per block and segment");
    return without_gil(n, [&] {
        size_t good = 0;
        for (size_t i = 0; i < n; i++) {
            const Check check = check_header(headers.data() + i * stride, segments, payload_bytes, keys.data() + i * 16,
                                             generation.data()[i], first_segment, segment_count,
                                             digests ? digests->data() + i * segment_count : nullptr);
            status.data()[i] = check;
            good += check == kOk;
        }
        return good;
    });
}

nb::dict parse_headers(nb::handle table, size_t stride, size_t count) {
    View view(table, PyBUF_SIMPLE);
    require(stride >= kHeaderBytes && stride % 64 == 0 && stride <= 4096 * 16, "parse_headers: stride");
    require(count <= size_t(view.buffer.len) / stride, "parse_headers: the table is shorter than count × stride");
    uint8_t *state, *keys, *parents;
    bool *valid;
    uint16_t *segments;
    uint32_t *payload_bytes, *tokens;
    uint64_t *generation;
    nb::dict out;
    out["state"] = column<uint8_t>({count}, state);
    out["segments"] = column<uint16_t>({count}, segments);
    out["generation"] = column<uint64_t>({count}, generation);
    out["keys"] = column<uint8_t>({count, 16}, keys);
    out["parents"] = column<uint8_t>({count, 16}, parents);
    out["payload_bytes"] = column<uint32_t>({count}, payload_bytes);
    out["tokens"] = column<uint32_t>({count}, tokens);
    out["valid"] = column<bool>({count}, valid);
    const uint8_t *raw = static_cast<const uint8_t *>(view.buffer.buf);
    const size_t most_segments = (stride - kHeaderBytes) / 8 + 1;
    without_gil(count, [&] {
        // A private copy first: the table may be memory that a writer changes between two looks.
        std::vector<uint8_t> copy(stride);
        for (size_t i = 0; i < count; i++) {
            std::memcpy(copy.data(), raw + i * stride, stride);
            Header header;
            std::memcpy(&header, copy.data(), sizeof header);
            static const uint8_t zeros[kHeaderBytes] = {};
            const bool fresh = std::memcmp(&header, zeros, sizeof header) == 0;
            const size_t own = header.segments;
            const bool fits = own >= 1 && own <= most_segments && (used_bytes(own) + 63) / 64 * 64 == stride;
            valid[i] = fresh || (fits && header.version == kLayoutVersion && header.state <= kComplete &&
                                 header.crc == header_crc(copy.data(), own));
            if (!valid[i]) header = Header{};
            state[i] = header.state;
            segments[i] = header.segments;
            generation[i] = header.generation;
            std::memcpy(keys + i * 16, header.key, 16);
            std::memcpy(parents + i * 16, header.parent, 16);
            payload_bytes[i] = header.payload_bytes;
            tokens[i] = header.token_count;
        }
    });
    return out;
}

} // namespace

void bind_places(nb::module_ &m); // places.cpp

void bind_blocks(nb::module_ &m) {
    bind_places(m);
    // An array of another type is refused, never converted: results would go to the copy.
    const auto array = [](const char *name) { return nb::arg(name).noconvert(); };
    using nb::arg;
    m.def("digest", &digest, arg("buffer"));
    m.def("buffer_info", &buffer_info, arg("buffer"));
    m.def("first_positions", &first_positions, array("keys"));
    m.def("plan", &plan, array("fragments"), array("regions"), array("slot"), array("block"),
          array("block_base").none(), array("block_id").none(), arg("block_bytes"), arg("segment_bytes"),
          arg("first_segment"), arg("segment_count"), arg("groups"), arg("merge_bytes"), arg("header_local"),
          arg("header_stride"), arg("header_bytes"), array("local"), array("region"), array("offset"),
          array("length"), array("group"));
    m.def("pack_headers", &pack_headers, array("out"), arg("stride"), arg("segments"), array("keys"),
          array("parents"), array("generation"), array("tokens"), arg("payload_bytes"), arg("state"),
          array("digests").none() = nb::none());
    m.def("check_headers", &check_headers, array("headers"), arg("stride"), arg("segments"), arg("payload_bytes"),
          array("keys"), array("generation"), arg("first_segment"), arg("segment_count"), array("digests").none(),
          array("status"));
    m.def("parse_headers", &parse_headers, arg("table"), arg("stride"), arg("count"));
}
