#include "library.hpp"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>

#include <map>
#include <mutex>
#include <stdexcept>

namespace mf::verbs {

void refuse(const std::string& what, int code) {
    throw VerbsError{code, what + ": " + strerror(code) + " (errno " + std::to_string(code) + ")"};
}

namespace {

template <typename F>
void find(void* handle, const char* name, F& function, bool optional = false) {
    function = reinterpret_cast<F>(dlsym(handle, name));
    if (function == nullptr && !optional) throw std::runtime_error(std::string("it has no function ") + name);
}

PortFacts facts_of_port(const VerbsApi& api, ibv::Context* context, int number) {
    ibv::PortAttr attr{};
    if (const int code = api.query_port(context, static_cast<uint8_t>(number), &attr); code != 0)
        refuse("port " + std::to_string(number) + " can't be queried", code > 0 ? code : errno);
    PortFacts port{number, attr.state, attr.link_layer, attr.active_mtu, attr.lid, attr.max_msg_sz, {}};
    if (port.link_layer == ibv::kLinkUnspecified) port.link_layer = ibv::kLinkInfiniband;
    for (int index = 0; index < attr.gid_tbl_len; ++index) {
        GidFacts found{index, {}, -1};
        if (api.query_gid_ex != nullptr) {
            ibv::GidEntry entry{};
            if (api.query_gid_ex(context, static_cast<uint32_t>(number), static_cast<uint32_t>(index), &entry, 0,
                                 sizeof entry) != 0)
                continue;  // an empty entry
            found.gid = entry.gid;
            found.type = static_cast<int>(entry.gid_type);
        } else if (api.query_gid(context, static_cast<uint8_t>(number), index, &found.gid) != 0) {
            continue;
        }
        static const uint8_t none[16] = {};
        if (memcmp(found.gid.raw, none, sizeof none) != 0) port.gids.push_back(found);
    }
    return port;
}

DeviceFacts facts_of(const VerbsApi& api, ibv::Context* context, const std::string& name, int only_port) {
    DeviceFacts facts;
    facts.name = name;
    if (const int code = api.query_device(context, &facts.limits); code != 0)
        refuse("device " + name + " can't be queried", code > 0 ? code : errno);
    facts.firmware.assign(facts.limits.fw_ver, strnlen(facts.limits.fw_ver, sizeof facts.limits.fw_ver));
    for (int number = 1; number <= facts.limits.phys_port_cnt; ++number)
        if (only_port == 0 || number == only_port) facts.ports.push_back(facts_of_port(api, context, number));
    return facts;
}

// The library's list of devices, freed at the end.
class DeviceList {
public:
    explicit DeviceList(const VerbsApi& api) : api_(api), list_(api.get_device_list(&count_)) {
        if (list_ == nullptr && errno != ENOSYS && errno != ENOENT) refuse("RDMA devices can't be listed", errno);
    }
    ~DeviceList() {
        if (list_ != nullptr) api_.free_device_list(list_);
    }
    int size() const { return list_ == nullptr ? 0 : count_; }
    ibv::Device* operator[](int at) const { return list_[at]; }

private:
    const VerbsApi& api_;
    int count_ = 0;
    ibv::Device** list_;
};

}  // namespace

std::shared_ptr<const VerbsApi> open_verbs(const std::string& path) {
    static std::mutex guard;
    static std::map<std::string, std::shared_ptr<const VerbsApi>> opened;
    const std::lock_guard<std::mutex> lock(guard);
    if (const auto at = opened.find(path); at != opened.end()) return at->second;
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw std::runtime_error(dlerror());
    auto api = std::make_shared<VerbsApi>();
    api->path = path;
    find(handle, "ibv_get_device_list", api->get_device_list);
    find(handle, "ibv_free_device_list", api->free_device_list);
    find(handle, "ibv_get_device_name", api->get_device_name);
    find(handle, "ibv_open_device", api->open_device);
    find(handle, "ibv_close_device", api->close_device);
    find(handle, "ibv_query_device", api->query_device);
    find(handle, "ibv_query_port", api->query_port);
    find(handle, "ibv_query_gid", api->query_gid);
    find(handle, "_ibv_query_gid_ex", api->query_gid_ex, true);
    find(handle, "ibv_alloc_pd", api->alloc_pd);
    find(handle, "ibv_dealloc_pd", api->dealloc_pd);
    find(handle, "ibv_reg_mr", api->reg_mr);
    find(handle, "ibv_reg_dmabuf_mr", api->reg_dmabuf_mr, true);
    find(handle, "ibv_dereg_mr", api->dereg_mr);
    find(handle, "ibv_create_comp_channel", api->create_comp_channel);
    find(handle, "ibv_destroy_comp_channel", api->destroy_comp_channel);
    find(handle, "ibv_create_cq", api->create_cq);
    find(handle, "ibv_destroy_cq", api->destroy_cq);
    find(handle, "ibv_get_cq_event", api->get_cq_event);
    find(handle, "ibv_ack_cq_events", api->ack_cq_events);
    find(handle, "ibv_create_qp", api->create_qp);
    find(handle, "ibv_modify_qp", api->modify_qp);
    find(handle, "ibv_destroy_qp", api->destroy_qp);
    find(handle, "ibv_wc_status_str", api->wc_status_str);
    // A child that is forked must not take registered pages with it. Kernels from 5.12 on see to that themselves, and
    // the call does nothing there. It has to come before any other.
    int (*fork_init)() = nullptr;
    find(handle, "ibv_fork_init", fork_init, true);
    if (fork_init != nullptr) fork_init();
    opened.emplace(path, api);
    return api;
}

std::vector<DeviceFacts> list_devices(const VerbsApi& api) {
    const DeviceList list(api);
    std::vector<DeviceFacts> found;
    for (int at = 0; at < list.size(); ++at) {
        const std::string name = api.get_device_name(list[at]);
        ibv::Context* context = api.open_device(list[at]);
        if (context == nullptr) {
            DeviceFacts closed;
            closed.name = name;
            closed.error = std::string("it can't be opened: ") + strerror(errno);
            found.push_back(std::move(closed));
            continue;
        }
        try {
            found.push_back(facts_of(api, context, name, 0));
        } catch (const VerbsError& error) {
            DeviceFacts broken;
            broken.name = name;
            broken.error = error.what;
            found.push_back(std::move(broken));
        }
        api.close_device(context);
    }
    return found;
}

RdmaDevice::RdmaDevice(std::shared_ptr<const VerbsApi> api, const std::string& name, int port, int gid_index)
    : api_(std::move(api)), gid_index_(gid_index) {
    {
        const DeviceList list(*api_);
        for (int at = 0; at < list.size() && context_ == nullptr; ++at) {
            if (name != api_->get_device_name(list[at])) continue;
            context_ = api_->open_device(list[at]);
            if (context_ == nullptr) refuse("device " + name + " can't be opened", errno);
        }
    }
    if (context_ == nullptr) refuse("there is no RDMA device " + name, ENODEV);
    try {
        facts_ = facts_of(*api_, context_, name, port);
        if (facts_.ports.empty()) refuse("device " + name + " has no port " + std::to_string(port), ENODEV);
        if (ethernet() || gid_index >= 0) {
            const int index = gid_index < 0 ? 0 : gid_index;
            if (api_->query_gid(context_, static_cast<uint8_t>(port), index, &gid_) != 0)
                refuse("device " + name + " has no GID " + std::to_string(index), ENODEV);
            gid_index_ = index;
        }
        pd_ = api_->alloc_pd(context_);
        if (pd_ == nullptr) refuse("device " + name + " gives no protection domain", errno);
    } catch (...) {
        api_->close_device(context_);
        throw;
    }
}

RdmaDevice::~RdmaDevice() {
    api_->dealloc_pd(pd_);
    api_->close_device(context_);
}

Memory::Memory(std::shared_ptr<RdmaDevice> device, uint64_t address, size_t length, int access)
    : device_(std::move(device)), address_(address), length_(length) {
    mr_ = device_->api().reg_mr(device_->pd(), reinterpret_cast<void*>(address), length, access);
    if (mr_ == nullptr) refuse("memory can't be registered", errno);
    lkey_ = mr_->lkey;
    rkey_ = mr_->rkey;
}

Memory::Memory(std::shared_ptr<RdmaDevice> device, int fd, uint64_t offset, size_t length, uint64_t address, int access)
    : device_(std::move(device)), address_(address), length_(length) {
    if (device_->api().reg_dmabuf_mr == nullptr)
        refuse("this libibverbs can't register dma-bufs (rdma-core 34 or later can)", ENOSYS);
    mr_ = device_->api().reg_dmabuf_mr(device_->pd(), offset, length, address, fd, access);
    if (mr_ == nullptr) refuse("the dma-buf can't be registered", errno);
    lkey_ = mr_->lkey;
    rkey_ = mr_->rkey;
}

int Memory::close() noexcept {
    if (mr_ == nullptr) return 0;
    const int code = device_->api().dereg_mr(mr_);
    if (code == 0) mr_ = nullptr;
    return code;
}

}  // namespace mf::verbs
