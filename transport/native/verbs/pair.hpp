// A queue pair of reliable connection, as both sides have one.
#pragma once

#include <cstdint>
#include <memory>

#include "library.hpp"

namespace mf::verbs {

// Where the other end is; travels in hellos and welcomes.
struct Remote {
    uint32_t queue, sequence;  // queue pair number, first packet sequence number (24 bits each)
    uint16_t lid;
    ibv::Gid gid;
    int mtu;  // as libibverbs counts: 1 is 256 bytes, 5 is 4096
};

struct LinkOptions {
    int timeout;  // local acknowledgement timeout: 4.096 us * 2^timeout (InfiniBand specification, 9.7.6.1.3)
    int retries;  // 0 to 6; 7 would be a promise to fail some day, but Soft-RoCE takes it as for ever
    int reads;    // reads outstanding at once
    int service_level, traffic_class, hop_limit;
};

class QueuePair {
public:
    // `work_requests` may be outstanding at once. With `channel`, completions can be waited for.
    QueuePair(std::shared_ptr<RdmaDevice> device, int work_requests, int segments, bool channel);
    ~QueuePair();
    QueuePair(const QueuePair&) = delete;
    QueuePair& operator=(const QueuePair&) = delete;

    uint32_t number() const { return number_; }
    uint32_t sequence() const { return sequence_; }
    int segments() const { return segments_; }
    bool open() const { return qp_ != nullptr; }
    uint32_t packet_bytes() const { return 128u << path_mtu_; }  // of what is joined
    int channel_fd() const { return channel_->fd; }

    // To the state in which it sends and answers. `access`: what the other end may do.
    void join(const Remote& remote, const LinkOptions& options, int access);
    // When it has returned, nothing that either end had posted on it touches memory any more. (Measured on Soft-RoCE:
    // destroying holds; the error state does not, a packet under way is still carried out.)
    void sever() noexcept;

    int post(ibv::SendWr* first, ibv::SendWr** bad) { return device_->context()->ops.post_send(qp_, first, bad); }
    int poll(ibv::Wc* found, int most) { return device_->context()->ops.poll_cq(cq_, most, found); }
    int arm() { return device_->context()->ops.req_notify_cq(cq_, 0); }
    void drain_events();
    const RdmaDevice& device() const { return *device_; }

private:
    void release() noexcept;
    void modify(ibv::QpAttr& attr, int mask, const char* what);

    std::shared_ptr<RdmaDevice> device_;
    ibv::CompChannel* channel_ = nullptr;
    ibv::Cq* cq_ = nullptr;
    ibv::Qp* qp_ = nullptr;
    uint32_t number_ = 0, sequence_ = 0;
    int segments_, path_mtu_ = 1;
};

}  // namespace mf::verbs
