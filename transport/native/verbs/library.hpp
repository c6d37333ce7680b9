// libibverbs, opened at run time: its functions, its devices, memory registered with one of them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "abi.hpp"

namespace mf::verbs {

// What the library or the kernel refused; `code` is an errno.
struct VerbsError {
    int code;
    std::string what;
};

[[noreturn]] void refuse(const std::string& what, int code);

struct VerbsApi {
    std::string path;
    ibv::Device** (*get_device_list)(int*);
    void (*free_device_list)(ibv::Device**);
    const char* (*get_device_name)(ibv::Device*);
    ibv::Context* (*open_device)(ibv::Device*);
    int (*close_device)(ibv::Context*);
    int (*query_device)(ibv::Context*, ibv::DeviceAttr*);
    int (*query_port)(ibv::Context*, uint8_t, ibv::PortAttr*);
    int (*query_gid)(ibv::Context*, uint8_t, int, ibv::Gid*);
    int (*query_gid_ex)(ibv::Context*, uint32_t, uint32_t, ibv::GidEntry*, uint32_t, size_t);  // may be missing
    ibv::Pd* (*alloc_pd)(ibv::Context*);
    int (*dealloc_pd)(ibv::Pd*);
    ibv::Mr* (*reg_mr)(ibv::Pd*, void*, size_t, int);
    ibv::Mr* (*reg_dmabuf_mr)(ibv::Pd*, uint64_t, size_t, uint64_t, int, int);  // may be missing
    int (*dereg_mr)(ibv::Mr*);
    ibv::CompChannel* (*create_comp_channel)(ibv::Context*);
    int (*destroy_comp_channel)(ibv::CompChannel*);
    ibv::Cq* (*create_cq)(ibv::Context*, int, void*, ibv::CompChannel*, int);
    int (*destroy_cq)(ibv::Cq*);
    int (*get_cq_event)(ibv::CompChannel*, ibv::Cq**, void**);
    void (*ack_cq_events)(ibv::Cq*, unsigned int);
    ibv::Qp* (*create_qp)(ibv::Pd*, ibv::QpInitAttr*);
    int (*modify_qp)(ibv::Qp*, ibv::QpAttr*, int);
    int (*destroy_qp)(ibv::Qp*);
    const char* (*wc_status_str)(int);
};

// Opens a library; the same path again gives the same one. Throws std::runtime_error with the reason.
std::shared_ptr<const VerbsApi> open_verbs(const std::string& path);

struct GidFacts {
    int index;
    ibv::Gid gid;
    int type;  // 0 InfiniBand, 1 RoCE v1, 2 RoCE v2, -1 not known
};

struct PortFacts {
    int number, state, link_layer, mtu, lid;
    uint32_t max_message_bytes;
    std::vector<GidFacts> gids;
};

struct DeviceFacts {
    std::string name, firmware, error;  // error: why it can't be opened; empty otherwise
    ibv::DeviceAttr limits{};
    std::vector<PortFacts> ports;
};

std::vector<DeviceFacts> list_devices(const VerbsApi& api);

// An open device with a protection domain.
class RdmaDevice {
public:
    RdmaDevice(std::shared_ptr<const VerbsApi> api, const std::string& name, int port, int gid_index);
    ~RdmaDevice();
    RdmaDevice(const RdmaDevice&) = delete;
    RdmaDevice& operator=(const RdmaDevice&) = delete;

    const VerbsApi& api() const { return *api_; }
    ibv::Context* context() const { return context_; }
    ibv::Pd* pd() const { return pd_; }
    const DeviceFacts& facts() const { return facts_; }
    const PortFacts& port() const { return facts_.ports.front(); }
    const ibv::Gid& gid() const { return gid_; }
    int gid_index() const { return gid_index_; }
    bool ethernet() const { return port().link_layer == ibv::kLinkEthernet; }

private:
    std::shared_ptr<const VerbsApi> api_;
    ibv::Context* context_ = nullptr;
    ibv::Pd* pd_ = nullptr;
    DeviceFacts facts_;
    ibv::Gid gid_{};
    int gid_index_;
};

// One memory registration. When `close` has returned, its keys open nothing any more.
class Memory {
public:
    Memory(std::shared_ptr<RdmaDevice> device, uint64_t address, size_t length, int access);
    // GPU or other device memory behind a dma-buf; `address` is what remote accesses count from.
    Memory(std::shared_ptr<RdmaDevice> device, int fd, uint64_t offset, size_t length, uint64_t address, int access);
    ~Memory() { close(); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    uint64_t address() const { return address_; }
    size_t length() const { return length_; }
    uint32_t lkey() const { return lkey_; }
    uint32_t rkey() const { return rkey_; }
    int close() noexcept;  // an errno, 0: done or closed before

private:
    std::shared_ptr<RdmaDevice> device_;
    ibv::Mr* mr_ = nullptr;
    uint64_t address_;
    size_t length_;
    uint32_t lkey_ = 0, rkey_ = 0;
};

}  // namespace mf::verbs
