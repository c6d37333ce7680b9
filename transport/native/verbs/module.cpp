// Python bindings of the verbs transport. Whatever waits or calls the library does so without the interpreter lock.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <mutex>
#include <stdexcept>

#include "../clock.hpp"
#include "../columns.hpp"
#include "client.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

PyObject* verbs_error = nullptr;  // VerbsError(errno: int, message: str)

// Runs without the interpreter lock; what the library refuses becomes an exception once it is held again.
template <typename F>
auto released(F&& call) -> decltype(call()) {
    std::unique_ptr<mf::verbs::VerbsError> failed;
    {
        nb::gil_scoped_release release;
        try {
            return call();
        } catch (mf::verbs::VerbsError& error) {
            failed = std::make_unique<mf::verbs::VerbsError>(std::move(error));
        }
    }
    PyErr_SetObject(verbs_error, nb::make_tuple(failed->code, failed->what).ptr());
    throw nb::python_error();
}

mf::ibv::Gid gid_of(const nb::bytes& raw) {
    mf::ibv::Gid gid{};
    if (raw.size() != sizeof gid.raw) throw nb::value_error("a GID is 16 bytes");
    std::memcpy(gid.raw, raw.data(), sizeof gid.raw);
    return gid;
}

nb::bytes bytes_of(const mf::ibv::Gid& gid) { return nb::bytes(reinterpret_cast<const char*>(gid.raw), sizeof gid.raw); }

nb::dict dict_of(const mf::verbs::DeviceFacts& facts) {
    nb::dict made;
    made["name"] = facts.name;
    made["firmware"] = facts.firmware;
    made["error"] = facts.error;
    made["max_registration_bytes"] = facts.limits.max_mr_size;
    made["max_work_requests"] = facts.limits.max_qp_wr;
    made["max_segments"] = facts.limits.max_sge;
    made["max_read_segments"] = facts.limits.max_sge_rd;
    made["max_queue_pairs"] = facts.limits.max_qp;
    made["max_registrations"] = facts.limits.max_mr;
    made["max_reads_answered"] = facts.limits.max_qp_rd_atom;
    made["max_reads_asked"] = facts.limits.max_qp_init_rd_atom;
    nb::list ports;
    for (const mf::verbs::PortFacts& each : facts.ports) {
        nb::dict port;
        port["number"] = each.number;
        port["state"] = each.state;
        port["link_layer"] = each.link_layer;
        port["mtu"] = each.mtu;
        port["lid"] = each.lid;
        port["max_message_bytes"] = each.max_message_bytes;
        nb::list gids;
        for (const mf::verbs::GidFacts& gid : each.gids) gids.append(nb::make_tuple(gid.index, bytes_of(gid.gid), gid.type));
        port["gids"] = gids;
        ports.append(port);
    }
    made["ports"] = ports;
    return made;
}

struct LibraryObject {
    std::shared_ptr<const mf::verbs::VerbsApi> api;

    explicit LibraryObject(const std::string& path) {
        nb::gil_scoped_release release;
        api = mf::verbs::open_verbs(path);
    }
};

struct DeviceObject {
    std::shared_ptr<mf::verbs::RdmaDevice> device;
};

// Either side's end of a connection; the client's is a whole queue. An owner's may be fenced while it is probed.
struct EndObject {
    std::shared_ptr<mf::verbs::Queue> queue;
    std::unique_ptr<mf::verbs::QueuePair> owned;
    std::unique_ptr<std::mutex> guard;

    mf::verbs::QueuePair& pair() { return queue ? queue->pair() : *owned; }
};

class BatchObject {
public:
    BatchObject(nb::object owner, mf::verbs::Client& client, bool write, nb::handle local, nb::handle region,
                nb::handle offset, nb::handle length, nb::handle status, uint64_t deadline_ns)
        : owner_(std::move(owner)) {
        local_.take(local, "local", false);
        if (!local_.held()) throw nb::value_error("column local is missing");
        const size_t count = local_.size();
        region_.take(region, "region", false, count);
        offset_.take(offset, "offset", false, count);
        length_.take(length, "length", false, count);
        status_.take(status, "status", true, count);
        const mf::verbs::Columns columns{count, local_.data(), region_.data(), offset_.data(), length_.data(), status_.data()};
        nb::gil_scoped_release release;
        batch_ = std::make_unique<mf::verbs::Batch>(client, columns, write, deadline_ns);
    }
    ~BatchObject() {
        nb::gil_scoped_release release;
        batch_.reset();
    }

    int refusal() const { return batch_->refusal(); }
    std::vector<uint64_t> missing() const { return batch_->missing(); }
    void begin(const std::string& why) {
        nb::gil_scoped_release release;
        batch_->begin(why);
    }
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
    mf::Column<int32_t> region_;
    mf::Column<uint8_t> status_;
    std::unique_ptr<mf::verbs::Batch> batch_;
};

using ChunkTuple = std::tuple<uint64_t, uint64_t, uint64_t, uint32_t>;

std::vector<mf::verbs::Chunk> chunks_of(const std::vector<ChunkTuple>& given) {
    std::vector<mf::verbs::Chunk> made;
    for (const auto& [offset, length, address, rkey] : given) made.push_back({offset, length, address, rkey});
    return made;
}

nb::dict layout() {
    using namespace mf::ibv;
    nb::dict made;
    made["ibv_device_attr"] = sizeof(DeviceAttr);
    made["ibv_port_attr"] = sizeof(PortAttr);
    made["ibv_wc"] = sizeof(Wc);
    made["ibv_mr"] = sizeof(Mr);
    made["ibv_qp_attr"] = sizeof(QpAttr);
    made["ibv_qp_init_attr"] = sizeof(QpInitAttr);
    made["ibv_send_wr"] = sizeof(SendWr);
    made["ibv_sge"] = sizeof(Sge);
    made["ibv_gid_entry"] = sizeof(GidEntry);
    made["ibv_context_ops"] = sizeof(ContextOps);
    made["ibv_context.ops"] = offsetof(Context, ops);
    made["ibv_context.async_fd"] = offsetof(Context, async_fd);
    made["ibv_context.ops.poll_cq"] = offsetof(Context, ops) + offsetof(ContextOps, poll_cq);
    made["ibv_context.ops.req_notify_cq"] = offsetof(Context, ops) + offsetof(ContextOps, req_notify_cq);
    made["ibv_context.ops.post_send"] = offsetof(Context, ops) + offsetof(ContextOps, post_send);
    made["ibv_qp.qp_num"] = offsetof(Qp, qp_num);
    made["ibv_mr.lkey"] = offsetof(Mr, lkey);
    made["ibv_mr.rkey"] = offsetof(Mr, rkey);
    made["ibv_comp_channel.fd"] = offsetof(CompChannel, fd);
    made["ibv_send_wr.wr.rdma.remote_addr"] = offsetof(SendWr, remote_addr);
    made["ibv_send_wr.wr.rdma.rkey"] = offsetof(SendWr, rkey);
    made["ibv_qp_attr.ah_attr"] = offsetof(QpAttr, ah_attr);
    made["ibv_qp_attr.timeout"] = offsetof(QpAttr, timeout);
    made["ibv_port_attr.link_layer"] = offsetof(PortAttr, link_layer);
    made["ibv_device_attr.max_qp_wr"] = offsetof(DeviceAttr, max_qp_wr);
    made["ibv_device_attr.phys_port_cnt"] = offsetof(DeviceAttr, phys_port_cnt);
    made["IBV_WC_WR_FLUSH_ERR"] = static_cast<size_t>(kFlushed);
    made["IBV_WC_REM_ACCESS_ERR"] = static_cast<size_t>(kRemoteAccess);
    made["IBV_WC_RETRY_EXC_ERR"] = static_cast<size_t>(kRetryExceeded);
    made["IBV_WR_RDMA_READ"] = static_cast<size_t>(kRdmaRead);
    made["IBV_QPT_RC"] = static_cast<size_t>(kReliableConnection);
    made["IBV_QP_DEST_QPN"] = static_cast<size_t>(kDestQpn);
    made["IBV_QP_MIN_RNR_TIMER"] = static_cast<size_t>(kMinRnrTimer);
    made["IBV_SEND_SIGNALED"] = static_cast<size_t>(kSignaled);
    return made;
}

}  // namespace

NB_MODULE(_verbs, m) {
    m.doc() = "libibverbs: devices, registrations, queue pairs, batches.";
    verbs_error = PyErr_NewException("transport._verbs.VerbsError", PyExc_Exception, nullptr);
    m.attr("VerbsError") = nb::borrow(verbs_error);
    m.attr("LOCAL_WRITE") = static_cast<int>(mf::ibv::kLocalWrite);
    m.attr("REMOTE_WRITE") = static_cast<int>(mf::ibv::kRemoteWrite);
    m.attr("REMOTE_READ") = static_cast<int>(mf::ibv::kRemoteRead);
    m.def("layout", &layout);

    nb::class_<LibraryObject>(m, "Library")
        .def(nb::init<const std::string&>(), "path"_a)
        .def_prop_ro("path", [](const LibraryObject& self) { return self.api->path; })
        .def("devices", [](const LibraryObject& self) {
            nb::list made;
            for (const mf::verbs::DeviceFacts& each : released([&] { return mf::verbs::list_devices(*self.api); }))
                made.append(dict_of(each));
            return made;
        });

    nb::class_<DeviceObject>(m, "Device")
        .def("__init__",
             [](DeviceObject* self, const LibraryObject& library, const std::string& name, int port, int gid_index) {
                 auto made = released([&] { return std::make_shared<mf::verbs::RdmaDevice>(library.api, name, port, gid_index); });
                 new (self) DeviceObject{std::move(made)};
             },
             "library"_a, "name"_a, "port"_a, "gid_index"_a)
        .def_prop_ro("gid", [](const DeviceObject& self) { return bytes_of(self.device->gid()); });

    nb::class_<mf::verbs::Memory>(m, "Memory")
        .def("__init__",
             [](mf::verbs::Memory* self, const DeviceObject& device, uint64_t address, size_t length, int access) {
                 released([&] { new (self) mf::verbs::Memory(device.device, address, length, access); });
             },
             "device"_a, "address"_a, "length"_a, "access"_a)
        .def_static("from_dmabuf",
                    [](const DeviceObject& device, int fd, uint64_t offset, size_t length, uint64_t address, int access) {
                        return released([&] {
                            return std::make_unique<mf::verbs::Memory>(device.device, fd, offset, length, address, access);
                        });
                    },
                    "device"_a, "fd"_a, "offset"_a, "length"_a, "address"_a, "access"_a)
        .def_prop_ro("rkey", &mf::verbs::Memory::rkey)
        .def_prop_ro("address", &mf::verbs::Memory::address)
        .def_prop_ro("length", &mf::verbs::Memory::length)
        .def("close", &mf::verbs::Memory::close, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<EndObject>(m, "End")
        .def_static("of_owner",
                    [](const DeviceObject& device) {
                        return released([&] {
                            return EndObject{nullptr, std::make_unique<mf::verbs::QueuePair>(device.device, 16, 1, false), std::make_unique<std::mutex>()};
                        });
                    },
                    "device"_a)
        .def_static("of_client", [](const mf::verbs::Client& client) {
            return released([&] { return EndObject{client.make_queue(), nullptr, std::make_unique<std::mutex>()}; });
        }, "client"_a)
        .def_prop_ro("number", [](EndObject& self) { return self.pair().number(); })
        .def_prop_ro("sequence", [](EndObject& self) { return self.pair().sequence(); })
        .def("join",
             [](EndObject& self, uint32_t queue, uint32_t sequence, uint16_t lid, const nb::bytes& gid, int mtu,
                int access, int timeout, int retries, int reads, int service_level, int traffic_class, int hop_limit) {
                 const mf::verbs::Remote remote{queue, sequence, lid, gid_of(gid), mtu};
                 const mf::verbs::LinkOptions options{timeout, retries, reads, service_level, traffic_class, hop_limit};
                 released([&] { self.pair().join(remote, options, access); });
             },
             "queue"_a, "sequence"_a, "lid"_a, "gid"_a, "mtu"_a, "access"_a, "timeout"_a, "retries"_a, "reads"_a,
             "service_level"_a, "traffic_class"_a, "hop_limit"_a)
        .def("probe",
             [](EndObject& self) {
                 // A write of no bytes touches nothing and needs no key, but the other end must answer it.
                 nb::gil_scoped_release release;
                 const std::lock_guard<std::mutex> lock(*self.guard);
                 if (!self.pair().open()) return false;
                 mf::ibv::Wc done{};
                 while (self.pair().poll(&done, 1) > 0)
                     if (done.status != mf::ibv::kSuccess) return false;
                 mf::ibv::SendWr wr{};
                 wr.opcode = mf::ibv::kRdmaWrite;
                 wr.send_flags = mf::ibv::kSignaled;
                 mf::ibv::SendWr* bad = nullptr;
                 self.pair().post(&wr, &bad);  // no room: earlier ones are still without an answer
                 return true;
             })
        .def("sever", [](EndObject& self) {
            nb::gil_scoped_release release;
            const std::lock_guard<std::mutex> lock(*self.guard);
            self.pair().sever();
        });

    nb::class_<mf::verbs::Client>(m, "Client")
        .def("__init__",
             [](mf::verbs::Client* self, const DeviceObject& device, int depth, int segments, size_t staging_bytes, bool spin,
                uint64_t limit_ns) {
                 new (self) mf::verbs::Client(device.device, depth, segments, staging_bytes, spin, limit_ns);
             },
             "device"_a, "depth"_a, "segments"_a, "staging_bytes"_a, "spin"_a, "limit_ns"_a)
        .def("use",
             [](mf::verbs::Client& self, uint64_t connection, EndObject& end) {
                 nb::gil_scoped_release release;
                 self.use(connection, end.queue);
             },
             "connection"_a, "end"_a)
        .def("drop", &mf::verbs::Client::drop, "connection"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("alive", &mf::verbs::Client::alive, "connection"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("connections", &mf::verbs::Client::connections, nb::call_guard<nb::gil_scoped_release>())
        .def("add",
             [](mf::verbs::Client& self, uint64_t connection, uint64_t size_bytes, bool writable,
                const std::vector<ChunkTuple>& chunks) {
                 return self.add({connection, size_bytes, writable, chunks_of(chunks)});
             },
             "connection"_a, "size_bytes"_a, "writable"_a, "chunks"_a)
        .def("replace",
             [](mf::verbs::Client& self, uint64_t connection, int handle, const std::vector<ChunkTuple>& chunks) {
                 self.replace(connection, handle, chunks_of(chunks));
             },
             "connection"_a, "handle"_a, "chunks"_a)
        .def("remove", &mf::verbs::Client::remove, "handle"_a)
        .def("size_of", &mf::verbs::Client::size_of, "handle"_a)
        .def("prepare",
             [](mf::verbs::Client& self, uint64_t address, uint64_t length) {
                 released([&] { self.prepare(address, length); });
             },
             "address"_a, "length"_a)
        .def("forget", &mf::verbs::Client::forget, "address"_a, "length"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("staged_bytes", &mf::verbs::Client::staged_bytes, nb::call_guard<nb::gil_scoped_release>())
        .def("post",
             [](nb::object self, bool write, nb::handle local, nb::handle region, nb::handle offset, nb::handle length,
                nb::handle status, uint64_t deadline_ns) {
                 auto& client = nb::cast<mf::verbs::Client&>(self);
                 return std::make_unique<BatchObject>(std::move(self), client, write, local, region, offset, length,
                                                      status, deadline_ns);
             },
             "write"_a, "local"_a, "region"_a, "offset"_a, "length"_a, "status"_a, "deadline_ns"_a)
        .def("close", &mf::verbs::Client::close, nb::call_guard<nb::gil_scoped_release>());

    nb::class_<BatchObject>(m, "Batch")
        .def_prop_ro("refusal", &BatchObject::refusal)
        .def("missing", &BatchObject::missing)
        .def("begin", &BatchObject::begin, "why"_a)
        .def("poll", &BatchObject::poll)
        .def("wait", &BatchObject::wait)
        .def("abandon", &BatchObject::abandon)
        .def_prop_ro("failure", &BatchObject::failure);
}
