// Python bindings of the native transport parts: mapped regions, batched copies, the segment digest.
//
// Columns arrive as any object with the buffer protocol (numpy arrays); their type, length and contiguity are checked
// here, so that Python need not. Whatever copies or waits does so without the interpreter lock.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <system_error>
#include <vector>

#include "columns.hpp"
#include "copy.hpp"
#include "digest.hpp"
#include "mapping.hpp"
#include "pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using mf::Buffer;
using mf::Column;

const mf::Implementation& implementation_named(const std::string& name) {
    if (name.empty()) return mf::best_implementation();
    size_t count = 0;
    const mf::Implementation* all = mf::implementations(&count);
    for (size_t i = 0; i < count; ++i)
        if (name == all[i].name && all[i].supported) return all[i];
    throw nb::value_error(("digest implementation \"" + name + "\" isn't available on this processor").c_str());
}

unsigned checked_threads(int threads) {
    if (threads < 0 || threads > 64) throw nb::value_error("threads must be between 0 (automatic) and 64");
    return static_cast<unsigned>(threads);
}

class Mappings {
public:
    Mappings(const std::string& implementation, uint64_t stream_bytes)
        : implementation_(&implementation_named(implementation)), stream_bytes_(stream_bytes) {}

    int32_t attach(std::shared_ptr<mf::Mapping> mapping) { return table_.attach(std::move(mapping)); }

    bool detach(int32_t handle) {
        nb::gil_scoped_release release;
        return table_.detach(handle);
    }

    std::shared_ptr<mf::Mapping> find(int32_t handle) const { return table_.find(handle); }

    // Operations done, or minus the Status that refused the whole batch.
    int64_t copy(bool write, nb::handle local, nb::handle region, nb::handle offset, nb::handle length,
                 nb::handle group, nb::handle digest, nb::handle status, uint64_t deadline_ns, int threads) {
        Column<uint64_t> local_column, offset_column, length_column, digest_column;
        Column<int32_t> region_column, group_column;
        Column<uint8_t> status_column;
        local_column.take(local, "local", false);
        if (!local_column.held()) throw nb::value_error("column local is missing");
        mf::Columns columns;
        columns.count = local_column.size();
        region_column.take(region, "region", false, columns.count);
        offset_column.take(offset, "offset", false, columns.count);
        length_column.take(length, "length", false, columns.count);
        status_column.take(status, "status", true, columns.count);
        group_column.take(group, "group", false);
        if (group_column.held()) group_column.check("group", columns.count);
        digest_column.take(digest, "digest", true);
        columns.local = local_column.data();
        columns.region = region_column.data();
        columns.offset = offset_column.data();
        columns.length = length_column.data();
        columns.group = group_column.data();
        columns.digest = digest_column.data();
        columns.group_count = digest_column.size();
        columns.status = status_column.data();
        mf::CopyOptions options;
        options.deadline_ns = deadline_ns;
        options.threads = checked_threads(threads);
        options.implementation = implementation_;
        options.stream_bytes = stream_bytes_;

        bool groups_valid = false;
        mf::Status refused = mf::kDone;
        size_t done = 0;
        {
            nb::gil_scoped_release release;
            // Kept per thread, so that a batch allocates nothing.
            static thread_local std::vector<int32_t> pins;
            uint64_t total_bytes = 0;
            groups_valid = mf::groups_valid(columns);
            if (groups_valid) refused = table_.admit(columns, write, pins, &total_bytes);
            if (groups_valid && refused == mf::kDone) {
                struct Release {
                    mf::Table& table;
                    ~Release() { table.release(pins); }
                } const release_pins{table_};
                done = mf::run_batch(columns, write ? mf::Direction::write : mf::Direction::read, &table_, total_bytes,
                                     options);
            }
        }
        if (!groups_valid)
            throw nb::value_error("column group must be non-decreasing (or -1) and below the length of column digest");
        return refused != mf::kDone ? -static_cast<int64_t>(refused) : static_cast<int64_t>(done);
    }

private:
    mf::Table table_;
    const mf::Implementation* implementation_;
    uint64_t stream_bytes_;
};

uint64_t digest_with(const std::string& implementation, nb::handle object) {
    const Buffer data(object, PyBUF_SIMPLE);
    mf::Digest stream(implementation_named(implementation));
    nb::gil_scoped_release release;
    stream.update(data.data(), data.size());
    return stream.finish();
}

void digest_batch(nb::handle address, nb::handle length, nb::handle group, nb::handle out, int threads) {
    Column<uint64_t> address_column, length_column, out_column;
    Column<int32_t> group_column;
    address_column.take(address, "address", false);
    if (!address_column.held()) throw nb::value_error("column address is missing");
    mf::Columns columns;
    columns.count = address_column.size();
    length_column.take(length, "length", false, columns.count);
    group_column.take(group, "group", false, columns.count);
    out_column.take(out, "out", true);
    if (!out_column.held()) throw nb::value_error("column out is missing");
    columns.local = address_column.data();
    columns.length = length_column.data();
    columns.group = group_column.data();
    columns.digest = out_column.data();
    columns.group_count = out_column.size();
    uint64_t total_bytes = 0;
    for (size_t i = 0; i < columns.count; ++i) {
        const uint64_t bytes = columns.length[i];
        if (bytes != 0 && (columns.local[i] == 0 || columns.local[i] > UINTPTR_MAX - bytes))
            throw nb::value_error(("address out of range in operation " + std::to_string(i)).c_str());
        if (__builtin_add_overflow(total_bytes, bytes, &total_bytes)) total_bytes = UINT64_MAX;
    }
    if (!mf::groups_valid(columns))
        throw nb::value_error("column group must be non-decreasing (or -1) and below the length of column out");
    mf::CopyOptions options;
    options.threads = checked_threads(threads);
    nb::gil_scoped_release release;
    mf::run_batch(columns, mf::Direction::hash, nullptr, total_bytes, options);
}

void copy_limit(nb::handle dst, nb::handle src, nb::handle length, int threads) {
    Column<uint64_t> dst_column, src_column, length_column;
    dst_column.take(dst, "dst_addresses", false);
    if (!dst_column.held()) throw nb::value_error("column dst_addresses is missing");
    src_column.take(src, "src_addresses", false, dst_column.size());
    length_column.take(length, "lengths", false, dst_column.size());
    const unsigned thread_count = checked_threads(threads);
    nb::gil_scoped_release release;
    mf::run_memcpy(dst_column.size(), dst_column.data(), src_column.data(), length_column.data(), thread_count);
}

std::vector<std::string> available_implementations() {
    size_t count = 0;
    const mf::Implementation* all = mf::implementations(&count);
    std::vector<std::string> names;
    for (size_t i = 0; i < count; ++i)
        if (all[i].supported) names.emplace_back(all[i].name);
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // at interpreter exit, objects of still-running threads are not leaks
    m.doc() = "Native parts of the transports: mapped regions, batched copies, the segment digest.";

    nb::register_exception_translator([](const std::exception_ptr& raised, void*) {
        try {
            std::rethrow_exception(raised);
        } catch (const std::system_error& error) {
            errno = error.code().value();
            PyErr_SetFromErrno(PyExc_OSError);
        }
    });

    nb::class_<mf::Mapping>(m, "Mapping")
        .def(nb::init<int, size_t, bool>(), "fd"_a, "size_bytes"_a, "writable"_a)
        .def_prop_ro("address", [](const mf::Mapping& self) { return reinterpret_cast<uintptr_t>(self.base()); })
        .def_prop_ro("size_bytes", &mf::Mapping::size_bytes)
        .def_prop_ro("writable", &mf::Mapping::writable)
        .def("prefault", &mf::Mapping::prefault, "offset"_a, "length"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("array",
             [](nb::handle self, bool writable) -> nb::object {
                 auto& mapping = nb::cast<mf::Mapping&>(self);
                 if (!writable)
                     return nb::cast(nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(
                         mapping.base(), {mapping.size_bytes()}, self));
                 if (!mapping.writable()) throw nb::value_error("the mapping is read-only");
                 return nb::cast(
                     nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(mapping.base(), {mapping.size_bytes()}, self));
             },
             "writable"_a);

    nb::class_<Mappings>(m, "Mappings")
        .def(nb::init<const std::string&, uint64_t>(), "implementation"_a = "", "stream_bytes"_a = 0)
        .def("attach", &Mappings::attach, "mapping"_a)
        .def("detach", &Mappings::detach, "handle"_a)
        .def("find", &Mappings::find, "handle"_a)
        .def("copy", &Mappings::copy, "write"_a, "local"_a, "region"_a, "offset"_a, "length"_a, "group"_a.none(),
             "digest"_a.none(), "status"_a, "deadline_ns"_a, "threads"_a);

    nb::class_<mf::Digest>(m, "Digest")
        .def("__init__",
             [](mf::Digest* self, const std::string& implementation) {
                 new (self) mf::Digest(implementation_named(implementation));
             },
             "implementation"_a = "")
        .def("update",
             [](mf::Digest& self, nb::handle data) {
                 const Buffer buffer(data, PyBUF_SIMPLE);
                 self.update(buffer.data(), buffer.size());
             },
             "data"_a)
        .def("copy",
             [](mf::Digest& self, nb::handle dst, nb::handle src, bool streaming) {
                 const Buffer to(dst, PyBUF_WRITABLE), from(src, PyBUF_SIMPLE);
                 if (to.size() != from.size()) throw nb::value_error("dst and src must have one length");
                 if (streaming)
                     self.copy_streaming(to.data(), from.data(), from.size());
                 else
                     self.copy(to.data(), from.data(), from.size());
                 mf::stream_fence();
             },
             "dst"_a, "src"_a, "streaming"_a = false)
        .def("reset", &mf::Digest::reset)
        .def("finish", &mf::Digest::finish);

    m.def("digest", [](nb::handle data) { return digest_with("", data); }, "data"_a);
    m.def("digest_with", &digest_with, "implementation"_a, "data"_a);
    m.def("digest_batch", &digest_batch, "address"_a, "length"_a, "group"_a, "out"_a, "threads"_a = 0);
    m.def("copy_limit", &copy_limit, "dst_addresses"_a, "src_addresses"_a, "lengths"_a, "threads"_a = 0);
    m.def("implementations", &available_implementations);
    m.def("default_stream_bytes", &mf::default_stream_bytes);
    m.def("usable_cores", &mf::usable_cores);
}
