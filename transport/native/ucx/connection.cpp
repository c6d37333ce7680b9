#include <arpa/inet.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "client.hpp"
#include "../clock.hpp"

namespace mf {
namespace {

// A forced close needs no answer from the owner; this only bounds a fault of UCX. The worker is destroyed in any case.
constexpr uint64_t kCloseLimitNs = 1'000'000'000;
constexpr int kTries = 4;
constexpr int kLooks = 16;
constexpr uint64_t kPauseNs = 10'000'000;

UcxError lost(const UcxContext& context, ucp::Status status, const std::string& what) {
    return {status, what + ": " + context.describe(status)};
}

}  // namespace

Connection::Connection(std::shared_ptr<UcxContext> context, bool spin, bool one_sided)
    : context_(std::move(context)), spin_(spin), one_sided_(one_sided) {}

Connection::~Connection() { cut(kStPeerLost, "closed"); }

void Connection::on_error(void* argument, ucp::Endpoint*, ucp::Status status) {
    auto* self = static_cast<Connection*>(argument);
    self->why_ = status;
    self->failed_ = true;
}

ucp::Status Connection::on_welcome(void* argument, const void* header, size_t header_bytes, void* data, size_t bytes,
                                   const ucp::AmReceiveParam*) {
    auto* self = static_cast<Connection*>(argument);
    if (header_bytes != sizeof self->welcome_) return ucp::kOk;
    std::memcpy(&self->welcome_, header, header_bytes);
    if (self->welcome_.number != self->hello_number_) return ucp::kOk;
    const auto* body = static_cast<const uint8_t*>(data);
    self->welcome_body_.assign(body, body + bytes);
    self->welcomed_ = true;
    return ucp::kOk;
}

void Connection::connect_to(const Target& target) {
    const Library& api = context_->api();
    worker_ = context_->make_worker();
    next_sequence_ = 0;
    ucp::Status status;
    for (const auto& [id, callback] : {std::pair{kWelcomeId, &Connection::on_welcome}, {kReplyId, &Connection::on_reply}}) {
        ucp::AmHandlerParam handler{};
        handler.field_mask = ucp::kAmId | ucp::kAmFlags | ucp::kAmCallback | ucp::kAmArgument;
        handler.id = id;
        handler.flags = ucp::kAmWholeMessage;
        handler.callback = callback;
        handler.argument = this;
        status = api.set_am_handler(worker_, &handler);
        if (status != ucp::kOk) throw lost(*context_, status, "UCX takes no handler");
    }
    status = api.worker_get_efd(worker_, &events_);
    if (status != ucp::kOk) throw lost(*context_, status, "UCX has no event descriptor");
    sockaddr_storage storage{};
    socklen_t length;
    if (inet_pton(AF_INET, target.address.c_str(), &reinterpret_cast<sockaddr_in*>(&storage)->sin_addr) == 1) {
        reinterpret_cast<sockaddr_in*>(&storage)->sin_family = AF_INET;
        reinterpret_cast<sockaddr_in*>(&storage)->sin_port = htons(target.port);
        length = sizeof(sockaddr_in);
    } else if (inet_pton(AF_INET6, target.address.c_str(), &reinterpret_cast<sockaddr_in6*>(&storage)->sin6_addr) == 1) {
        reinterpret_cast<sockaddr_in6*>(&storage)->sin6_family = AF_INET6;
        reinterpret_cast<sockaddr_in6*>(&storage)->sin6_port = htons(target.port);
        length = sizeof(sockaddr_in6);
    } else {
        throw UcxError{ucp::kInvalidAddress, "'" + target.address + "' is not a numeric IP address"};
    }
    ucp::EndpointParams params{};
    params.field_mask = ucp::kEpSocketAddress | ucp::kEpFlags | ucp::kEpErrorMode | ucp::kEpErrorHandler;
    params.remote = {reinterpret_cast<sockaddr*>(&storage), length};
    params.flags = ucp::kEpClientServer;
    params.error_mode = ucp::kErrorModePeer;
    params.error_handler = {&Connection::on_error, this};
    status = api.ep_create(worker_, &params, &endpoint_);
    if (status != ucp::kOk) {
        endpoint_ = nullptr;
        throw lost(*context_, status, "UCX cannot connect");
    }
}

void Connection::open(const OwnerName& owner, const Nonce& identity, const std::vector<RegionName>& regions,
                      std::vector<uint8_t>& there, uint64_t deadline_ns) {
    UcxError last{ucp::kUnreachable, "the owner has no address"};
    // Some tries: UCX's set-up of a connection fails now and then while the owner takes down the one before.
    for (int attempt = 0; attempt < kTries; ++attempt) {
        if (attempt != 0) {
            const uint64_t now = now_ns();
            if (last.status == ucp::kRejected || now >= deadline_ns) break;
            const uint64_t pause = std::min<uint64_t>(kPauseNs << attempt, deadline_ns - now);
            const timespec limit{0, static_cast<long>(pause)};
            nanosleep(&limit, nullptr);
        }
        if (try_all(owner, identity, regions, there, deadline_ns, last)) return;
    }
    throw last;
}

bool Connection::try_all(const OwnerName& owner, const Nonce& identity, const std::vector<RegionName>& regions,
                         std::vector<uint8_t>& there, uint64_t deadline_ns, UcxError& last) {
    for (size_t i = 0; i < owner.targets.size(); ++i) {
        const uint64_t now = now_ns();
        if (now >= deadline_ns) break;
        const Target& target = owner.targets[i];
        const std::string where = target.address + " port " + std::to_string(target.port);
        // What is left is shared among the addresses: one that swallows packets must not starve the others.
        const uint64_t limit_ns = now + (deadline_ns - now) / (owner.targets.size() - i);
        try {
            {
                std::lock_guard guard(lock_);
                failed_ = false;
                connect_to(target);
            }
            exchange(owner, identity, regions, there, limit_ns);
            decide_path();
            return true;
        } catch (const UcxError& error) {
            last = {error.status, where + ": " + error.what};
            cut(kStPeerLost, error.what);
            if (error.status == ucp::kRejected) break;  // it answered: it is another owner
        }
    }
    return false;
}

void Connection::ask(const OwnerName& owner, const Nonce& identity, const std::vector<RegionName>& regions,
                     std::vector<uint8_t>& there, uint64_t deadline_ns) {
    try {
        exchange(owner, identity, regions, there, deadline_ns);
    } catch (const UcxError& error) {
        cut(kStPeerLost, error.what);
        throw;
    }
}

void Connection::exchange(const OwnerName& owner, const Nonce& identity, const std::vector<RegionName>& regions,
                          std::vector<uint8_t>& there, uint64_t deadline_ns) {
    const Library& api = context_->api();
    std::unique_lock guard(lock_);
    if (!usable()) throw UcxError{ucp::kNotConnected, "not connected"};
    Hello hello{};
    hello.magic = kHandshakeMagic;
    hello.version = kHandshakeVersion;
    std::memcpy(hello.owner, owner.nonce.data(), kNonceBytes);
    std::memcpy(hello.identity, identity.data(), kNonceBytes);
    hello.count = static_cast<uint32_t>(regions.size());
    hello.number = ++hello_number_;
    welcomed_ = false;
    ucp::RequestParam param{};
    param.mask = ucp::kOpFlags;
    param.flags = ucp::kAmSendEager;
    void* request = api.am_send(endpoint_, kHelloId, &hello, sizeof hello, regions.data(),
                                regions.size() * sizeof(RegionName), &param);
    if (ucp::is_error(request)) throw lost(*context_, ucp::status_of(request), "UCX cannot send");
    const auto sent = [&] { return !ucp::is_request(request) || api.request_check_status(request) != ucp::kInProgress; };
    while (!(welcomed_ && sent()) && !failed_ && now_ns() < deadline_ns) {
        if (api.worker_progress(worker_) == 0) sleep(guard, -1, deadline_ns);
    }
    if (ucp::is_request(request) && sent()) api.request_free(request);  // else it goes with the worker
    if (failed_) throw lost(*context_, why_, "the connection failed");
    if (!welcomed_) throw UcxError{ucp::kEndpointTimeout, "no answer in time"};
    if (!sent()) throw UcxError{ucp::kEndpointTimeout, "the greeting did not leave in time"};
    if (welcome_.magic != kHandshakeMagic)
        throw UcxError{ucp::kRejected, "whoever answers there is not memfabric"};
    switch (static_cast<Answer>(welcome_.answer)) {
        case Answer::ok: break;
        case Answer::other_owner:
            throw UcxError{ucp::kRejected, "another owner answers there now; the one that the descriptor names is gone"};
        case Answer::other_version:
            throw UcxError{ucp::kRejected, "the owner speaks version " + std::to_string(welcome_.version) +
                                               " of the handshake, this client version " +
                                               std::to_string(kHandshakeVersion)};
        default: throw UcxError{ucp::kRejected, "the owner did not understand the greeting"};
    }
    if (welcome_body_.size() != regions.size()) throw UcxError{ucp::kRejected, "the owner's answer is malformed"};
    there = welcome_body_;
}

void Connection::sleep(std::unique_lock<std::mutex>& guard, int also, uint64_t deadline_ns) {
    if (spin_ || context_->api().worker_arm(worker_) == ucp::kBusy) return;
    pollfd fds[2] = {{events_, POLLIN, 0}, {also, POLLIN, 0}};
    const uint64_t now = now_ns();
    const uint64_t left = deadline_ns > now ? std::min<uint64_t>(deadline_ns - now, kSliceNs) : 0;
    guard.unlock();
    const timespec limit{static_cast<time_t>(left / 1'000'000'000), static_cast<long>(left % 1'000'000'000)};
    ppoll(fds, also >= 0 ? 2 : 1, &limit, nullptr);
    guard.lock();
}

// Ends everything on this connection. When it has returned nothing of it touches local memory any more: the requests
// were given back, and what UCX might still have had went with the worker.
void Connection::cut(uint8_t status, const std::string& why) {
    std::unique_lock guard(lock_);
    if (worker_ == nullptr) return;
    const Library& api = context_->api();
    failed_ = true;
    for (Share* share : shares_)
        if (share->failure.status == kStDone) share->failure = {status, why};
    if (endpoint_ != nullptr) {
        drop_endpoint();
        const uint64_t limit = now_ns() + kCloseLimitNs;
        const auto open = [&] {
            return std::any_of(shares_.begin(), shares_.end(),
                               [](const Share* share) { return share->in_flight != 0 || share->flushing; });
        };
        while (open() && now_ns() < limit) api.worker_progress(worker_);
    }
    api.worker_destroy(std::exchange(worker_, nullptr));
    events_ = -1;
    awaited_.clear();
    const std::vector<Share*> left = std::exchange(shares_, {});
    for (Share* share : left) {
        share->in_flight = 0;
        share->flushing = false;
        share->batch->settle(*share);
    }
}

bool Connection::alive() {
    std::lock_guard guard(lock_);
    if (!usable()) return false;
    for (int i = 0; i < kLooks && !failed_; ++i)
        if (context_->api().worker_progress(worker_) == 0) break;
    return usable();
}

void Connection::drop_endpoint() {
    const Library& api = context_->api();
    for (ucp::RemoteKey*& each : keys_)
        if (each != nullptr) api.rkey_destroy(std::exchange(each, nullptr));
    keys_.clear();
    ucp::RequestParam param{};
    param.mask = ucp::kOpFlags;
    param.flags = ucp::kCloseForce;
    void* request = api.ep_close(std::exchange(endpoint_, nullptr), &param);
    if (!ucp::is_request(request)) return;
    const uint64_t limit = now_ns() + kCloseLimitNs;
    while (api.request_check_status(request) == ucp::kInProgress && now_ns() < limit) api.worker_progress(worker_);
    api.request_free(request);
}

ucp::RemoteKey* Connection::key(size_t index, const std::string& packed) {
    if (index >= keys_.size()) keys_.resize(index + 1, nullptr);
    if (keys_[index] == nullptr) {
        const ucp::Status status = context_->api().ep_rkey_unpack(endpoint_, packed.data(), &keys_[index]);
        if (status != ucp::kOk) {
            keys_[index] = nullptr;
            throw lost(*context_, status, "UCX does not take the region's remote key");
        }
    }
    return keys_[index];
}

void Connection::forget(size_t index) {
    std::lock_guard guard(lock_);
    if (index < keys_.size() && keys_[index] != nullptr)
        context_->api().rkey_destroy(std::exchange(keys_[index], nullptr));
}

// Remote memory access is used where every lane has it; in doubt the owner carries operations out.
void Connection::decide_path() {
    const std::string found = lanes();
    const auto any = [&](std::initializer_list<const char*> names) {
        return std::any_of(names.begin(), names.end(),
                           [&](const char* name) { return found.find(std::string(name)) != std::string::npos; });
    };
    std::lock_guard guard(lock_);
    by_messages_ = found.empty() ? !one_sided_ : !any({"rc_", "dc_", "cma", "posix", "sysv", "cuda_ipc"});
}

ucp::Status Connection::on_reply(void* argument, const void* header, size_t header_bytes, void* data, size_t bytes,
                                 const ucp::AmReceiveParam*) {
    auto* self = static_cast<Connection*>(argument);
    Message message;
    if (header_bytes != sizeof message) return ucp::kOk;
    std::memcpy(&message, header, sizeof message);
    const auto found = self->awaited_.find(message.batch);  // not there: a batch that has ended meanwhile
    if (found != self->awaited_.end()) found->second->batch->arrived(*found->second, message, data, bytes);
    return ucp::kOk;
}

std::string Connection::lanes() {
    std::lock_guard guard(lock_);
    const Library& api = context_->api();
    if (!usable() || endpoint_ == nullptr || api.ep_query == nullptr) return "";
    ucp::TransportEntry entries[16] = {};  // a UCX that does not know the field yet leaves them as they are
    ucp::EndpointAttributes attributes{};
    attributes.field_mask = ucp::kEpTransports;
    attributes.transports = {entries, 16, sizeof entries[0]};
    if (api.ep_query(endpoint_, &attributes) != ucp::kOk) return "";
    std::string out;
    for (unsigned i = 0; i < attributes.transports.count && i < 16; ++i) {
        if (entries[i].transport == nullptr || entries[i].device == nullptr) break;
        const std::string each = std::string(entries[i].transport) + "/" + entries[i].device;
        if (out.find(each) != std::string::npos) continue;
        out += (out.empty() ? "" : ", ") + each;
    }
    return out;
}

}  // namespace mf
