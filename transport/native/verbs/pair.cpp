#include "pair.hpp"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/random.h>

#include <algorithm>

namespace mf::verbs {

QueuePair::QueuePair(std::shared_ptr<RdmaDevice> device, int work_requests, int segments, bool channel)
    : device_(std::move(device)), segments_(segments) {
    const VerbsApi& api = device_->api();
    if (getrandom(&sequence_, sizeof sequence_, 0) != sizeof sequence_) sequence_ = number_;
    sequence_ &= 0xffffff;
    try {
        if (channel) {
            channel_ = api.create_comp_channel(device_->context());
            if (channel_ == nullptr) refuse("no completion channel can be made", errno);
            fcntl(channel_->fd, F_SETFL, fcntl(channel_->fd, F_GETFL) | O_NONBLOCK);
        }
        // In an error every work request completes, signalled or not.
        cq_ = api.create_cq(device_->context(), work_requests + 1, nullptr, channel_, 0);
        if (cq_ == nullptr) refuse("no completion queue can be made", errno);
        ibv::QpInitAttr init{};
        init.send_cq = init.recv_cq = cq_;
        init.cap = {static_cast<uint32_t>(work_requests), 1, static_cast<uint32_t>(segments), 1, 0};
        init.qp_type = ibv::kReliableConnection;
        qp_ = api.create_qp(device_->pd(), &init);
        if (qp_ == nullptr) refuse("no queue pair can be made", errno);
        number_ = qp_->qp_num;
    } catch (...) {
        release();
        throw;
    }
}

void QueuePair::modify(ibv::QpAttr& attr, int mask, const char* what) {
    const int code = device_->api().modify_qp(qp_, &attr, mask);
    if (code != 0) refuse(std::string("the queue pair does not get ") + what, code > 0 ? code : errno);
}

void QueuePair::join(const Remote& remote, const LinkOptions& options, int access) {
    ibv::QpAttr attr{};
    attr.qp_state = ibv::kInit;
    attr.port_num = static_cast<uint8_t>(device_->port().number);
    attr.qp_access_flags = static_cast<unsigned int>(access);
    modify(attr, ibv::kState | ibv::kPkeyIndex | ibv::kPort | ibv::kAccessFlags, "ready to begin");

    attr = {};
    attr.qp_state = ibv::kReadyToReceive;
    attr.path_mtu = path_mtu_ = std::min(remote.mtu, device_->port().mtu);
    attr.dest_qp_num = remote.queue;
    attr.rq_psn = remote.sequence;
    attr.max_dest_rd_atomic = static_cast<uint8_t>(options.reads);
    attr.min_rnr_timer = 12;  // unused: nothing is sent that needs a receive
    attr.ah_attr.port_num = static_cast<uint8_t>(device_->port().number);
    attr.ah_attr.dlid = remote.lid;
    attr.ah_attr.sl = static_cast<uint8_t>(options.service_level);
    // On Ethernet always; on InfiniBand where the other end is in another subnet (the upper half of the GID).
    if (device_->ethernet() || memcmp(remote.gid.raw, device_->gid().raw, 8) != 0) {
        attr.ah_attr.is_global = 1;
        attr.ah_attr.grh.dgid = remote.gid;
        attr.ah_attr.grh.sgid_index = static_cast<uint8_t>(std::max(device_->gid_index(), 0));
        attr.ah_attr.grh.hop_limit = static_cast<uint8_t>(options.hop_limit);
        attr.ah_attr.grh.traffic_class = static_cast<uint8_t>(options.traffic_class);
    }
    modify(attr,
           ibv::kState | ibv::kAv | ibv::kPathMtu | ibv::kDestQpn | ibv::kRqPsn | ibv::kMaxDestRdAtomic |
               ibv::kMinRnrTimer,
           "ready to receive");

    attr = {};
    attr.qp_state = ibv::kReadyToSend;
    attr.timeout = static_cast<uint8_t>(options.timeout);
    attr.retry_cnt = static_cast<uint8_t>(options.retries);
    attr.rnr_retry = 0;
    attr.sq_psn = sequence_;
    attr.max_rd_atomic = static_cast<uint8_t>(options.reads);
    modify(attr,
           ibv::kState | ibv::kTimeout | ibv::kRetryCnt | ibv::kRnrRetry | ibv::kSqPsn | ibv::kMaxRdAtomic,
           "ready to send");
}

void QueuePair::drain_events() {
    ibv::Cq* cq = nullptr;
    void* context = nullptr;
    while (device_->api().get_cq_event(channel_, &cq, &context) == 0) device_->api().ack_cq_events(cq, 1);
}

void QueuePair::sever() noexcept {
    if (qp_ != nullptr) device_->api().destroy_qp(qp_);
    qp_ = nullptr;
}

void QueuePair::release() noexcept {
    sever();
    if (cq_ != nullptr) device_->api().destroy_cq(cq_);
    if (channel_ != nullptr) device_->api().destroy_comp_channel(channel_);
}

QueuePair::~QueuePair() { release(); }

}  // namespace mf::verbs
