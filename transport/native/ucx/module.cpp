// Python bindings of the UCX transport. Whatever waits or calls UCX does so without the interpreter lock.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "../columns.hpp"
#include "client.hpp"
#include "../clock.hpp"
#include "owner.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

PyObject* ucx_error = nullptr;  // UcxError(status: int, message: str)

[[noreturn]] void raise(const mf::UcxError& error) {
    PyErr_SetObject(ucx_error, nb::make_tuple(static_cast<int>(error.status), error.what).ptr());
    throw nb::python_error();
}

// Runs without the interpreter lock; UCX's refusals become exceptions once it is held again.
template <typename F>
auto released(F&& call) {
    std::unique_ptr<mf::UcxError> failed;
    using Result = decltype(call());
    if constexpr (std::is_void_v<Result>) {
        {
            nb::gil_scoped_release release;
            try {
                call();
            } catch (mf::UcxError& error) {
                failed = std::make_unique<mf::UcxError>(std::move(error));
            }
        }
        if (failed) raise(*failed);
    } else {
        Result result{};
        {
            nb::gil_scoped_release release;
            try {
                result = call();
            } catch (mf::UcxError& error) {
                failed = std::make_unique<mf::UcxError>(std::move(error));
            }
        }
        if (failed) raise(*failed);
        return result;
    }
}

mf::Nonce nonce_of(const nb::bytes& raw) {
    if (raw.size() != mf::kNonceBytes) throw nb::value_error("a nonce is 16 bytes");
    mf::Nonce nonce;
    std::memcpy(nonce.data(), raw.data(), nonce.size());
    return nonce;
}

struct ContextObject {
    std::shared_ptr<mf::UcxContext> context;

    ContextObject(const std::string& path, const mf::Settings& settings) {
        nb::gil_scoped_release release;
        context = std::make_shared<mf::UcxContext>(mf::open_library(path), settings);
    }
};

class BatchObject {
public:
    BatchObject(nb::object owner, mf::Client& client, bool write, nb::handle local, nb::handle region, nb::handle offset,
            nb::handle length, nb::handle status, nb::handle group, nb::handle digest, uint64_t deadline_ns,
            unsigned lanes, int memory_type)
        : owner_(std::move(owner)) {
        local_.take(local, "local", false);
        if (!local_.held()) throw nb::value_error("column local is missing");
        const size_t count = local_.size();
        region_.take(region, "region", false, count);
        offset_.take(offset, "offset", false, count);
        length_.take(length, "length", false, count);
        status_.take(status, "status", true, count);
        if (!group.is_none()) group_.take(group, "group", false, count);
        digest_.take(digest, "digest", true);
        const mf::BatchColumns columns{count,          local_.data(),  region_.data(),
                                       offset_.data(), length_.data(), status_.data(),
                                       group_.data(),  digest_.data()};
        nb::gil_scoped_release release;
        batch_ = std::make_unique<mf::Batch>(client, columns, write, deadline_ns, lanes, memory_type);
    }
    ~BatchObject() {
        nb::gil_scoped_release release;
        batch_.reset();
    }

    int refusal() const { return batch_->refusal(); }
    bool hashed() const { return batch_->hashed(); }
    bool finished() const { return batch_->finished(); }
    bool poll() {
        nb::gil_scoped_release release;
        return batch_->poll();
    }
    size_t wait() {
        while (!batch_->finished()) {
            {
                nb::gil_scoped_release release;
                batch_->wait(mf::now_ns() + mf::kSliceNs);
            }
            if (PyErr_CheckSignals() != 0) throw nb::python_error();
        }
        return batch_->done();
    }
    size_t abandon() {
        nb::gil_scoped_release release;
        batch_->abandon();
        return batch_->done();
    }
    std::pair<int, std::string> failure() const { return {batch_->failure().status, batch_->failure().why}; }

private:
    nb::object owner_;
    mf::Column<uint64_t> local_, offset_, length_;
    mf::Column<uint64_t> digest_;
    mf::Column<int32_t> region_, group_;
    mf::Column<uint8_t> status_;
    std::unique_ptr<mf::Batch> batch_;
};

}  // namespace

NB_MODULE(_ucx, m) {
    m.doc() = "UCX: contexts, the owner's side, the client's side, batches.";
    ucx_error = PyErr_NewException("transport._ucx.UcxError", PyExc_Exception, nullptr);
    m.attr("UcxError") = nb::borrow(ucx_error);

    nb::class_<ContextObject>(m, "Context")
        .def(nb::init<const std::string&, const mf::Settings&>(), "path"_a, "settings"_a)
        .def_prop_ro("path", [](const ContextObject& self) { return self.context->api().path; })
        .def_prop_ro("version", [](const ContextObject& self) { return self.context->api().version; })
        .def("information", [](const ContextObject& self) { return self.context->information(); });

    nb::class_<mf::Owner>(m, "Owner")
        .def("__init__",
             [](mf::Owner* self, const ContextObject& context, const nb::bytes& nonce,
                const std::vector<std::string>& addresses, uint16_t port) {
                 const mf::Nonce parsed = nonce_of(nonce);
                 nb::gil_scoped_release release;
                 new (self) mf::Owner(context.context, parsed, addresses, port);
             },
             "context"_a, "nonce"_a, "addresses"_a, "port"_a)
        .def_prop_ro("ports", &mf::Owner::ports)
        .def("register",
             [](mf::Owner& self, uint64_t region_id, uintptr_t address, size_t bytes, int memory_type) {
                 const auto made = released([&] {
                     return self.register_memory(region_id, reinterpret_cast<void*>(address), bytes, memory_type);
                 });
                 return nb::make_tuple(made.serial, nb::bytes(made.key.data(), made.key.size()));
             },
             "region_id"_a, "address"_a, "bytes"_a, "memory_type"_a = 0)
        .def("unregister", &mf::Owner::unregister, "region_id"_a, "serial"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("fence",
             [](mf::Owner& self, const nb::bytes& identity) {
                 const mf::Nonce parsed = nonce_of(identity);
                 nb::gil_scoped_release release;
                 return self.fence(parsed);
             },
             "identity"_a)
        .def("connections", &mf::Owner::connections, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("accepted", &mf::Owner::accepted)
        .def("close", &mf::Owner::close, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<mf::Client>(m, "Client")
        .def("__init__",
             [](mf::Client* self, const ContextObject& context, const nb::bytes& identity, unsigned lanes, bool spin,
                bool one_sided, uint64_t limit_ns) {
                 new (self) mf::Client(context.context, nonce_of(identity), lanes, spin, one_sided, limit_ns);
             },
             "context"_a, "identity"_a, "lanes"_a, "spin"_a, "one_sided"_a, "limit_ns"_a)
        .def("connect",
             [](mf::Client& self, const nb::bytes& nonce, const std::vector<std::pair<std::string, uint16_t>>& targets,
                uint64_t region_id, uint64_t serial, uint64_t base, uint64_t size_bytes, const nb::bytes& key,
                bool writable, uint64_t deadline_ns) {
                 mf::OwnerName owner{nonce_of(nonce), {}};
                 for (const auto& [address, port] : targets) owner.targets.push_back({address, port});
                 const mf::RemoteRegion region{region_id, serial, base, size_bytes,
                                               std::string(key.c_str(), key.size())};
                 return released([&] { return self.connect(owner, region, writable, deadline_ns); });
             },
             "nonce"_a, "targets"_a, "region_id"_a, "serial"_a, "base"_a, "size_bytes"_a, "key"_a, "writable"_a,
             "deadline_ns"_a)
        .def("disconnect", &mf::Client::disconnect, "handle"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("size_of", &mf::Client::size_of, "handle"_a)
        .def("post",
             [](nb::object self, bool write, nb::handle local, nb::handle region, nb::handle offset, nb::handle length,
                nb::handle status, nb::handle group, nb::handle digest, uint64_t deadline_ns, unsigned lanes,
                int memory_type) {
                 auto& client = nb::cast<mf::Client&>(self);
                 return std::make_unique<BatchObject>(std::move(self), client, write, local, region, offset, length, status,
                                                  group, digest, deadline_ns, lanes, memory_type);
             },
             "write"_a, "local"_a, "region"_a, "offset"_a, "length"_a, "status"_a, "group"_a.none(), "digest"_a.none(), "deadline_ns"_a, "lanes"_a,
             "memory_type"_a)
        .def("connections", &mf::Client::connections, nb::call_guard<nb::gil_scoped_release>())
        .def("in_order", &mf::Client::in_order, nb::call_guard<nb::gil_scoped_release>())
        .def("remote_access", &mf::Client::remote_access, nb::call_guard<nb::gil_scoped_release>())
        .def("lanes", &mf::Client::lanes, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("connects", &mf::Client::connects)
        .def_prop_ro("cuts", &mf::Client::cuts)
        .def("close", &mf::Client::close, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<BatchObject>(m, "Batch")
        .def_prop_ro("refusal", &BatchObject::refusal)
        .def_prop_ro("hashed", &BatchObject::hashed)
        .def_prop_ro("finished", &BatchObject::finished)
        .def("poll", &BatchObject::poll)
        .def("wait", &BatchObject::wait)
        .def("abandon", &BatchObject::abandon)
        .def_prop_ro("failure", &BatchObject::failure);
}
