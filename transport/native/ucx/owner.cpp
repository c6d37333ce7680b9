#include "owner.hpp"

#include <arpa/inet.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <stdexcept>

namespace mf {
namespace {

constexpr uint64_t kWake = 0, kDoor = 1;
constexpr int kMaxEvents = 64;
constexpr size_t kMaxPeers = 4096;
constexpr int kMaxProgress = 64;  // calls before another connection gets its turn
// A forced close needs no answer from the client; this only bounds a fault of UCX.
constexpr size_t kMaxSending = 32;         // messages of up to kMessageBytes for one client
constexpr size_t kMaxWanted = 1 << 20;     // entries that one client may have asked for and not got yet
constexpr size_t kMaxBatches = 4096;       // of writes that one client may have begun and not flushed
constexpr auto kCloseLimit = std::chrono::seconds(2);

socklen_t parse_address(const std::string& text, uint16_t port, sockaddr_storage& out) {
    std::memset(&out, 0, sizeof out);
    auto* v4 = reinterpret_cast<sockaddr_in*>(&out);
    auto* v6 = reinterpret_cast<sockaddr_in6*>(&out);
    if (inet_pton(AF_INET, text.c_str(), &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET;
        v4->sin_port = htons(port);
        return sizeof *v4;
    }
    if (inet_pton(AF_INET6, text.c_str(), &v6->sin6_addr) == 1) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons(port);
        return sizeof *v6;
    }
    throw std::runtime_error("'" + text + "' is not a numeric IP address");
}

bool handle(const Library& api, ucp::Worker* worker, unsigned id, ucp::AmCallback callback, void* argument) {
    ucp::AmHandlerParam handler{};
    handler.field_mask = ucp::kAmId | ucp::kAmFlags | ucp::kAmCallback | ucp::kAmArgument;
    handler.id = id;
    handler.flags = ucp::kAmWholeMessage;
    handler.callback = callback;
    handler.argument = argument;
    return api.set_am_handler(worker, &handler) == ucp::kOk;
}

}  // namespace

// A message on its way out. UCX reads header and body until it is done with them.
struct Owner::Sent {
    Peer* peer;
    union {
        Welcome welcome;
        Message message;
    };
    size_t header_bytes;
    std::vector<uint8_t> body;
};

Owner::Owner(std::shared_ptr<UcxContext> context, const Nonce& nonce, const std::vector<std::string>& addresses,
             uint16_t port)
    : context_(std::move(context)), nonce_(nonce), pid_(getpid()) {
    std::random_device random;
    next_serial_ = (uint64_t{random()} << 32 | random()) >> 1;  // not that of an earlier life
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (epoll_ < 0 || wake_ < 0) throw std::runtime_error("no more file descriptors");
    watch(wake_, kWake);
    try {
        door_ = context_->make_worker();
        for (const auto& address : addresses) listen(address, port);
        int events = -1;
        if (context_->api().worker_get_efd(door_, &events) != ucp::kOk)
            throw std::runtime_error("UCX has no event descriptor for its worker");
        watch(events, kDoor);
    } catch (const UcxError& error) {
        close();
        throw std::runtime_error(error.what);
    } catch (...) {
        close();
        throw;
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] { run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Owner::~Owner() { close(); }

void Owner::listen(const std::string& address, uint16_t port) {
    sockaddr_storage storage;
    const socklen_t length = parse_address(address, port, storage);
    ucp::ListenerParams params{};
    params.field_mask = ucp::kListenerAddress | ucp::kListenerConnectionHandler;
    params.address = {reinterpret_cast<sockaddr*>(&storage), length};
    params.connection_handler.callback = &Owner::on_request;
    params.connection_handler.argument = this;
    ucp::Listener* listener = nullptr;
    ucp::Status status = context_->api().listener_create(door_, &params, &listener);
    if (status != ucp::kOk)
        throw std::runtime_error("UCX cannot listen on " + address + " port " + std::to_string(port) + ": " +
                                 context_->describe(status));
    doors_.push_back({listener});
    ucp::ListenerAttributes attributes{};
    attributes.field_mask = 1;
    status = context_->api().listener_query(listener, &attributes);
    if (status != ucp::kOk) throw std::runtime_error("UCX does not tell its port: " + context_->describe(status));
    ports_.push_back(ntohs(attributes.address.ss_family == AF_INET6
                               ? reinterpret_cast<sockaddr_in6*>(&attributes.address)->sin6_port
                               : reinterpret_cast<sockaddr_in*>(&attributes.address)->sin_port));
}

void Owner::watch(int descriptor, uint64_t number) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = number;
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, descriptor, &event) != 0) throw std::runtime_error("epoll refuses a descriptor");
}

// --- connections, in the thread and under the lock ---

void Owner::on_request(ucp::ConnectionRequest* request, void* argument) {
    // Not from inside UCX: a worker is made for it after this progress call.
    static_cast<Owner*>(argument)->waiting_.push_back(request);
}

void Owner::admit(ucp::ConnectionRequest* request) {
    const Library& api = context_->api();
    if (peers_.size() >= kMaxPeers) {
        api.listener_reject(doors_.front().listener, request);
        return;
    }
    auto peer = std::make_unique<Peer>();
    peer->owner = this;
    peer->number = next_peer_++;
    try {
        peer->worker = context_->make_worker();
    } catch (const UcxError&) {
        api.listener_reject(doors_.front().listener, request);
        return;
    }
    ucp::EndpointParams params{};
    params.field_mask = ucp::kEpConnectionRequest | ucp::kEpErrorMode | ucp::kEpErrorHandler;
    params.request = request;
    params.error_mode = ucp::kErrorModePeer;
    params.error_handler = {&Owner::on_error, peer.get()};
    const bool good = handle(api, peer->worker, kHelloId, &Owner::on_hello, peer.get()) &&
                      handle(api, peer->worker, kRequestId, &Owner::on_message, peer.get()) &&
                      api.ep_create(peer->worker, &params, &peer->endpoint) == ucp::kOk &&
                      api.worker_get_efd(peer->worker, &peer->events) == ucp::kOk;
    if (!good) {  // the request is UCX's again once an endpoint was tried with it
        api.worker_destroy(peer->worker);
        return;
    }
    watch(peer->events, peer->number);
    ++accepted_;
    peers_.emplace(peer->number, std::move(peer));
}

void Owner::on_error(void* argument, ucp::Endpoint*, ucp::Status) { static_cast<Peer*>(argument)->broken = true; }

ucp::Status Owner::on_hello(void* argument, const void* header, size_t header_bytes, void* data, size_t bytes,
                            const ucp::AmReceiveParam*) {
    auto* peer = static_cast<Peer*>(argument);
    peer->owner->answer(*peer, header, header_bytes, data, bytes);
    return ucp::kOk;
}

void Owner::answer(Peer& peer, const void* header, size_t header_bytes, const void* data, size_t bytes) {
    Hello hello{};
    auto sent = std::make_unique<Sent>();
    Answer answer = Answer::ok;
    if (header_bytes != sizeof hello) {
        answer = Answer::malformed;
    } else {
        std::memcpy(&hello, header, sizeof hello);
        if (hello.magic != kHandshakeMagic || hello.count > kMaxRegionsPerHello ||
            bytes != hello.count * sizeof(RegionName))
            answer = Answer::malformed;
        else if (hello.version != kHandshakeVersion)
            answer = Answer::other_version;
        else if (std::memcmp(hello.owner, nonce_.data(), kNonceBytes) != 0)
            answer = Answer::other_owner;
    }
    if (answer == Answer::ok) {
        std::memcpy(peer.identity.data(), hello.identity, kNonceBytes);
        peer.known = true;
        sent->body.resize(hello.count);
        for (uint32_t i = 0; i < hello.count; ++i) {
            RegionName name;
            std::memcpy(&name, static_cast<const uint8_t*>(data) + i * sizeof name, sizeof name);
            const auto found = regions_.find(name.serial);
            const bool there = found != regions_.end() && found->second.region_id == name.region_id;
            sent->body[i] = there;
            if (there) peer.regions.insert(name.serial);
        }
    }
    sent->welcome = {kHandshakeMagic, kHandshakeVersion, static_cast<uint16_t>(answer),
                     static_cast<uint32_t>(sent->body.size()), hello.number};
    sent->header_bytes = sizeof sent->welcome;
    const std::vector<uint8_t>& body = sent->body;
    send(peer, kWelcomeId, std::move(sent), body.data(), body.size());
}

void Owner::send(Peer& peer, unsigned id, std::unique_ptr<Sent> sent, const void* data, size_t bytes) {
    if (peer.broken) return;
    sent->peer = &peer;
    ucp::RequestParam param{};
    param.mask = ucp::kOpCallback | ucp::kOpUserData | ucp::kOpFlags;
    param.flags = ucp::kAmSendEager;
    param.callback = &Owner::on_sent;
    param.user_data = sent.get();
    void* request = context_->api().am_send(peer.endpoint, id, &sent->welcome, sent->header_bytes, data, bytes, &param);
    if (ucp::is_request(request)) {
        ++peer.sending;
        sent.release();  // until it has left
    } else if (request != nullptr) {
        peer.broken = true;
    }
}

void Owner::on_sent(void* request, ucp::Status status, void* data) {
    const std::unique_ptr<Sent> sent(static_cast<Sent*>(data));
    Peer& peer = *sent->peer;
    --peer.sending;
    if (status != ucp::kOk) peer.broken = true;
    peer.owner->context_->api().request_free(request);
}

// --- messages, in the thread and under the lock ---

ucp::Status Owner::on_message(void* argument, const void* header, size_t header_bytes, void* data, size_t bytes,
                              const ucp::AmReceiveParam*) {
    auto* peer = static_cast<Peer*>(argument);
    Message message;
    if (header_bytes != sizeof message || !peer->known) {
        peer->broken = true;  // nobody of ours
        return ucp::kOk;
    }
    std::memcpy(&message, header, sizeof message);
    if (message.sequence != peer->sequence++) {
        peer->broken = true;  // another order than they were sent in
        return ucp::kOk;
    }
    peer->owner->take(*peer, message, data, bytes);
    return ucp::kOk;
}

// The region, if the peer may touch this range of it.
const Owner::Region* Owner::reach(const Peer& peer, uint64_t serial, uint64_t offset, uint64_t length) const {
    const auto found = regions_.find(serial);
    if (found == regions_.end() || peer.regions.count(serial) == 0) return nullptr;
    const Region& region = found->second;
    return length <= region.bytes && offset <= region.bytes - length ? &region : nullptr;
}

void Owner::take(Peer& peer, const Message& message, const void* data, size_t bytes) {
    switch (message.kind) {
        case kRead: {
            if (bytes != message.count * sizeof(Entry) || peer.wanted.size() + message.count > kMaxWanted) break;
            const auto* entries = static_cast<const uint8_t*>(data);
            for (uint32_t i = 0; i < message.count; ++i) {
                Entry entry;
                std::memcpy(&entry, entries + i * sizeof entry, sizeof entry);
                peer.wanted.push_back({entry, message.batch});
            }
            return;
        }
        case kWrite: {
            if (bytes != message.length || peer.writes.size() > kMaxBatches) break;
            store(peer, peer.writes[message.batch], {message.serial, message.offset, message.length, message.chunk}, data);
            settle(peer, message.batch);
            return;
        }
        case kPack:
            if (peer.writes.size() > kMaxBatches || !unpack(peer, message, static_cast<const uint8_t*>(data), bytes)) break;
            settle(peer, message.batch);
            return;
        case kFlush:
            if (peer.writes.size() > kMaxBatches) break;
            peer.writes[message.batch].total = message.count;
            settle(peer, message.batch);
            return;
        default: break;
    }
    peer.broken = true;  // nobody of ours, or one that is out of its mind
}

void Owner::store(Peer& peer, Peer::Writes& writes, const Entry& entry, const void* data) {
    if (const Region* region = reach(peer, entry.serial, entry.offset, entry.length))
        std::memcpy(region->base + entry.offset, data, entry.length);
    else
        writes.refused.push_back(entry.chunk);
    ++writes.done;
    // One write's bytes before the next one's, also for those who map the same memory.
    std::atomic_thread_fence(std::memory_order_release);
}

bool Owner::unpack(Peer& peer, const Message& message, const uint8_t* data, size_t bytes) {
    Peer::Writes& writes = peer.writes[message.batch];
    size_t at = 0;
    for (uint32_t i = 0; i < message.count; ++i) {
        Entry entry;
        if (bytes - at < sizeof entry) return false;
        std::memcpy(&entry, data + at, sizeof entry);
        if (packed_bytes(entry.length) > bytes - at) return false;
        store(peer, writes, entry, data + at + sizeof entry);
        at += packed_bytes(entry.length);
    }
    return at == bytes;
}

// Tells the client once all writes of a batch were carried out.
void Owner::settle(Peer& peer, uint32_t batch) {
    const auto found = peer.writes.find(batch);
    if (found == peer.writes.end() || found->second.done < found->second.total) return;
    auto sent = std::make_unique<Sent>();
    const auto& refused = found->second.refused;
    sent->message = {kWritten, kGood, batch, 0, static_cast<uint32_t>(refused.size()), 0, 0, 0, 0};
    sent->header_bytes = sizeof sent->message;
    sent->body.resize(refused.size() * sizeof(uint32_t));
    if (!refused.empty()) std::memcpy(sent->body.data(), refused.data(), sent->body.size());
    peer.writes.erase(found);
    const std::vector<uint8_t>& body = sent->body;
    send(peer, kReplyId, std::move(sent), body.data(), body.size());
}

// Sends small entries of one batch together.
void Owner::pump_small(Peer& peer) {
    auto sent = std::make_unique<Sent>();
    const uint32_t batch = peer.wanted.front().batch;
    std::vector<uint8_t>& body = sent->body;
    uint32_t count = 0;
    size_t total = 0;
    for (const auto& each : peer.wanted) {  // how much it will be
        if (each.batch != batch || each.entry.length >= kSmallBytes || total + packed_bytes(each.entry.length) > kMessageBytes)
            break;
        total += packed_bytes(each.entry.length);
        ++count;
    }
    body.resize(total);
    size_t at = 0;
    for (uint32_t i = 0; i < count; ++i) {
        Entry entry = peer.wanted.front().entry;
        peer.wanted.pop_front();
        const Region* region = reach(peer, entry.serial, entry.offset, entry.length);
        const uint64_t offset = entry.offset;
        const size_t room = packed_bytes(entry.length);
        entry.serial = region != nullptr ? kGood : kRefused;
        std::memcpy(body.data() + at, &entry, sizeof entry);
        if (region != nullptr) std::memcpy(body.data() + at + sizeof entry, region->base + offset, entry.length);
        at += room;
    }
    sent->message = {kPacked, kGood, batch, 0, count, 0, 0, 0, 0};
    sent->header_bytes = sizeof sent->message;
    send(peer, kReplyId, std::move(sent), body.data(), body.size());
}

// Sends what was asked for, a bounded amount at a time; true when there is more and room for it.
bool Owner::pump(Peer& peer) {
    while (!peer.wanted.empty() && peer.sending < kMaxSending && !peer.broken) {
        const Peer::Wanted wanted = peer.wanted.front();
        if (wanted.entry.length < kSmallBytes) {
            pump_small(peer);
            continue;
        }
        peer.wanted.pop_front();
        const Entry& entry = wanted.entry;
        const Region* region = entry.length <= kMessageBytes ? reach(peer, entry.serial, entry.offset, entry.length) : nullptr;
        auto sent = std::make_unique<Sent>();
        sent->message = {kData, region != nullptr ? kGood : kRefused, wanted.batch, entry.chunk, 0, 0, 0, 0, 0};
        sent->header_bytes = sizeof sent->message;
        send(peer, kReplyId, std::move(sent), region != nullptr ? region->base + entry.offset : nullptr,
             region != nullptr ? entry.length : 0);
    }
    return !peer.wanted.empty() && peer.sending < kMaxSending && !peer.broken;
}

// Destroying the worker is what ends the connection; the forced close before it lets UCX take leave of its requests.
void Owner::end(Peer& peer) {
    const Library& api = context_->api();
    epoll_ctl(epoll_, EPOLL_CTL_DEL, peer.events, nullptr);
    if (peer.endpoint != nullptr) {
        ucp::RequestParam param{};
        param.mask = ucp::kOpFlags;
        param.flags = ucp::kCloseForce;
        void* request = api.ep_close(peer.endpoint, &param);
        if (ucp::is_request(request)) {
            const auto limit = std::chrono::steady_clock::now() + kCloseLimit;
            while ((api.request_check_status(request) == ucp::kInProgress || peer.sending != 0) &&
                   std::chrono::steady_clock::now() < limit)
                api.worker_progress(peer.worker);
            api.request_free(request);
        }
    }
    api.worker_destroy(peer.worker);
    peer.worker = nullptr;
    peer.endpoint = nullptr;
}

void Owner::reap() {
    for (auto at = peers_.begin(); at != peers_.end();) {
        if (at->second->broken) {
            end(*at->second);
            at = peers_.erase(at);
        } else {
            ++at;
        }
    }
}

// True when the worker has more to do.
bool Owner::progress(ucp::Worker* worker, Peer* peer) {
    const Library& api = context_->api();
    for (int i = 0; i < kMaxProgress; ++i) {
        const unsigned count = api.worker_progress(worker);
        if (peer != nullptr && pump(*peer)) continue;
        if (count == 0) return api.worker_arm(worker) == ucp::kBusy;
    }
    return true;
}

void Owner::run() {
    epoll_event events[kMaxEvents];
    std::set<uint64_t> busy{kDoor};  // once before the first sleep: a worker must be armed
    while (!stopping_) {
        const int count = epoll_wait(epoll_, events, kMaxEvents, busy.empty() ? -1 : 0);
        for (int i = 0; i < count; ++i) busy.insert(events[i].data.u64);
        std::lock_guard guard(lock_);
        if (stopping_) return;
        if (busy.erase(kWake) != 0) {
            uint64_t drained;
            (void)!read(wake_, &drained, sizeof drained);
        }
        std::set<uint64_t> again;
        for (const uint64_t number : busy) {
            if (number == kDoor) {
                if (progress(door_, nullptr)) again.insert(kDoor);
            } else if (const auto found = peers_.find(number); found != peers_.end()) {
                if (progress(found->second->worker, found->second.get())) again.insert(number);
            }
        }
        for (ucp::ConnectionRequest* request : std::exchange(waiting_, {})) {
            const uint64_t number = next_peer_;
            admit(request);
            if (peers_.count(number) != 0) again.insert(number);
        }
        reap();
        busy.swap(again);
    }
}

// --- from Python, without the interpreter lock ---

Owner::Registration Owner::register_memory(uint64_t region_id, void* memory, size_t bytes, int memory_type) {
    const Library& api = context_->api();
    ucp::MapParams params{};
    params.field_mask = ucp::kMapAddress | ucp::kMapLength | ucp::kMapMemoryType;
    params.address = memory;
    params.length = bytes;
    params.memory_type = memory_type;
    std::lock_guard guard(lock_);
    ucp::Memory* mapped = nullptr;
    ucp::Status status = api.mem_map(context_->get(), &params, &mapped);
    if (status != ucp::kOk) throw UcxError{status, context_->describe(status)};
    void* packed = nullptr;
    size_t size = 0;
    status = api.rkey_pack(context_->get(), mapped, &packed, &size);
    if (status != ucp::kOk) {
        api.mem_unmap(context_->get(), mapped);
        throw UcxError{status, context_->describe(status)};
    }
    Registration made{next_serial_++, std::string(static_cast<char*>(packed), size)};
    api.rkey_buffer_release(packed);
    regions_.emplace(made.serial, Region{region_id, mapped, static_cast<uint8_t*>(memory), bytes});
    return made;
}

bool Owner::unregister(uint64_t region_id, uint64_t serial) {
    std::lock_guard guard(lock_);
    const auto found = regions_.find(serial);
    if (found == regions_.end() || found->second.region_id != region_id) return false;
    for (auto& [number, peer] : peers_)
        if (peer->regions.count(serial) != 0) peer->broken = true;
    reap();
    context_->api().mem_unmap(context_->get(), found->second.memory);
    regions_.erase(found);
    return true;
}

size_t Owner::fence(const Nonce& identity) {
    std::lock_guard guard(lock_);
    size_t count = 0;
    for (auto& [number, peer] : peers_)
        if (peer->known && peer->identity == identity) {
            peer->broken = true;
            ++count;
        }
    reap();
    return count;
}

size_t Owner::connections() const {
    std::lock_guard guard(lock_);
    return peers_.size();
}

void Owner::close() {
    if (getpid() != pid_) {  // a forked child: nothing of this is its own
        if (thread_.joinable()) thread_.detach();
        return;
    }
    stopping_ = true;
    if (thread_.joinable()) {
        const uint64_t one = 1;
        (void)!write(wake_, &one, sizeof one);
        thread_.join();
    }
    std::lock_guard guard(lock_);
    const Library& api = context_->api();
    for (auto& [number, peer] : peers_) end(*peer);
    peers_.clear();
    for (const Door& door : doors_) api.listener_destroy(door.listener);
    doors_.clear();
    if (door_ != nullptr) api.worker_destroy(std::exchange(door_, nullptr));
    for (auto& [serial, region] : regions_) api.mem_unmap(context_->get(), region.memory);
    regions_.clear();
    if (wake_ >= 0) ::close(std::exchange(wake_, -1));
    if (epoll_ >= 0) ::close(std::exchange(epoll_, -1));
}

}  // namespace mf
