#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "client.hpp"
#include "../clock.hpp"

namespace mf {
namespace {

constexpr uint8_t kInFlight = 101;
constexpr uint64_t kMergeBytes = 4 << 20;  // neighbours travel as one up to this size
constexpr int kMostProgress = 1024;        // calls before the clock is looked at again
constexpr size_t kSendWindow = 64;         // messages at once
constexpr size_t kWindow = 512;            // requests at once on one connection: what UCX queues costs memory

// Wakes a thread whose batch another thread's progress has finished.
int sleeper_descriptor() {
    struct Descriptor {
        int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        ~Descriptor() { ::close(fd); }
    };
    thread_local Descriptor mine;
    return mine.fd;
}

}  // namespace

Batch::Batch(Client& client, const BatchColumns& columns, bool write, uint64_t deadline_ns, unsigned lanes,
             int memory_type)
    : client_(client), columns_(columns), write_(write),
      deadline_ns_(deadline_ns != 0 ? deadline_ns : now_ns() + client.limit_ns_), memory_type_(memory_type) {
    refusal_ = admit();
    if (refusal_ != 0) {
        finished_ = true;
        return;
    }
    std::memset(columns_.status, kStNotDone, columns_.count);
    post(lanes);
}

Batch::~Batch() { abandon(); }

// Pins the handles of the batch, or marks what is at fault.
uint8_t Batch::admit() {
    std::lock_guard guard(client_.lock_);
    const auto check = [&](size_t i) -> uint8_t {
        const int32_t handle = columns_.region[i];
        if (handle < 0 || static_cast<size_t>(handle) >= client_.handles_.size() || !client_.handles_[handle]->live)
            return kStRegionGone;
        const Client::Handle& found = *client_.handles_[handle];
        if (write_ && !found.writable) return kStNotWritable;
        const uint64_t length = columns_.length[i], size = found.region.size_bytes, local = columns_.local[i];
        if (length > size || columns_.offset[i] > size - length) return kStOutOfBounds;
        if (length != 0 && (local == 0 || local > UINTPTR_MAX - length)) return kStOutOfBounds;
        return kStDone;
    };
    for (size_t i = 0; i < columns_.count; ++i) {
        const uint8_t bad = check(i);
        if (bad == kStDone) continue;
        for (size_t k = 0; k < columns_.count; ++k) {
            const uint8_t each = check(k);
            columns_.status[k] = each == kStDone ? uint8_t{kStNotDone} : each;
        }
        return bad;
    }
    int32_t last = -1;
    for (size_t i = 0; i < columns_.count; ++i) {
        const int32_t handle = columns_.region[i];
        if (handle == last) continue;
        last = handle;
        if (static_cast<size_t>(handle) >= targets_.size()) targets_.resize(handle + 1, nullptr);
        if (targets_[handle] != nullptr) continue;
        targets_[handle] = client_.handles_[handle].get();
        ++targets_[handle]->users;
        pinned_.push_back(handle);
    }
    return 0;
}

void Batch::post(unsigned lanes) {
    if (now_ns() >= deadline_ns_) {
        failure_ = {kStNotDone, "the deadline had passed before anything was begun"};
        finish();
        return;
    }
    // Before anything is posted: from then on other threads' progress may look at it.
    if (std::any_of(columns_.length, columns_.length + columns_.count, [](uint64_t n) { return n > kMessageBytes; }))
        pieces_.assign(columns_.count, 0);
    // By owner, in the order given.
    std::map<Group*, std::vector<uint32_t>> parts;
    for (size_t i = 0; i < columns_.count; ++i) {
        if (columns_.length[i] == 0) {
            columns_.status[i] = kStDone;
            continue;
        }
        parts[targets_[columns_.region[i]]->group.get()].push_back(static_cast<uint32_t>(i));
    }
    // All connections first, then one look at the clock, then nothing but what there is: a writer whose time is over
    // may be fenced from then on, and must not come in again by a connection that was made after the fence.
    struct Post {
        Share* share;
        size_t begin, end;
        const std::vector<uint32_t>* order;
    };
    std::vector<Post> posts;
    open_shares_ = 1;  // ours, until all is posted
    for (auto& [group, order] : parts) {
        const size_t count = std::max<size_t>(1, std::min<size_t>({lanes, client_.lanes_, order.size()}));
        for (size_t k = 0; k < count; ++k) {
            Failure failure;
            auto connection = client_.lane(*group, k, deadline_ns_, failure);
            if (!connection) {
                if (failure_.status == kStDone) failure_ = failure;
                continue;  // its operations stay as not begun
            }
            auto share = std::make_unique<Share>();
            share->batch = this;
            share->connection = connection;
            ++open_shares_;
            posts.push_back({share.get(), order.size() * k / count, order.size() * (k + 1) / count, &order});
            shares_.push_back(std::move(share));
        }
    }
    const bool late = now_ns() >= deadline_ns_;
    for (const Post& each : posts) {
        if (late) {
            std::lock_guard guard(each.share->connection->lock_);
            each.share->failure = {kStNotDone, "the deadline passed while connecting"};
            settle(*each.share);
        } else {
            post_on(*each.share, each.begin, each.end, *each.order);
        }
    }
    if (--open_shares_ == 0) finish();
}

void Batch::post_on(Share& share, size_t begin, size_t end, const std::vector<uint32_t>& order) {
    Connection& connection = *share.connection;
    std::unique_lock guard(connection.lock_);
    if (!connection.usable()) {
        share.failure = {kStNotDone, "the connection failed before anything was begun"};
        settle(share);
        return;
    }
    connection.shares_.push_back(&share);
    share.posting = true;
    if (!connection.by_messages() || shares_.size() > 1) unhashed_ = true;
    if (connection.by_messages())
        send_messages(share, begin, end, order, guard);
    else
        put_or_get(share, begin, end, order, guard);
    share.posting = false;
    if (connection.failed_ || connection.worker_ == nullptr) {
        guard.unlock();
        connection.cut(kStPeerLost, "the connection failed: " + connection.context_->describe(connection.why_));
        guard.lock();
    }
    settle(share);
}

// Where the run of neighbours that begins at `at` ends; its bytes.
size_t Batch::merge(size_t at, size_t end, const std::vector<uint32_t>& order, uint64_t most, uint64_t& bytes) const {
    const uint32_t i = order[at];
    bytes = columns_.length[i];
    size_t stop = at + 1;
    for (; stop < end; ++stop) {
        const uint32_t before = order[stop - 1], k = order[stop];
        if (k != before + 1 || columns_.region[k] != columns_.region[i] ||
            columns_.local[k] != columns_.local[before] + columns_.length[before] ||
            columns_.offset[k] != columns_.offset[before] + columns_.length[before] ||
            bytes + columns_.length[k] > most)
            break;
        bytes += columns_.length[k];
    }
    return stop;
}

bool Batch::gone(uint32_t i) {
    if (!targets_[columns_.region[i]]->gone) return false;
    columns_.status[i] = kStDenied;
    if (failure_.status == kStDone) failure_ = {kStDenied, "the owner has withdrawn the region"};
    return true;
}

void Batch::put_or_get(Share& share, size_t begin, size_t end, const std::vector<uint32_t>& order,
                       std::unique_lock<std::mutex>& guard) {
    Connection& connection = *share.connection;
    const Library& api = connection.context_->api();
    auto runs = std::make_unique<Run[]>(end - begin + 1);  // the last one stays null
    Run* next = runs.get();
    runs_.push_back(std::move(runs));
    ucp::RequestParam param{};
    param.mask = ucp::kOpCallback | ucp::kOpUserData | (memory_type_ != 0 ? ucp::kOpMemoryType : 0);
    param.callback = &Batch::on_done;
    param.memory_type = memory_type_;
    for (size_t at = begin; at < end && share.failure.status == kStDone && !connection.failed_;) {
        const uint32_t i = order[at];
        if (gone(i)) {
            ++at;
            continue;
        }
        uint64_t bytes;
        const size_t stop = merge(at, end, order, kMergeBytes, bytes);
        Run* run = next++;
        *run = {&share, i, static_cast<uint32_t>(stop - at)};
        at = stop;
        const RemoteRegion& region = targets_[columns_.region[i]]->region;
        ucp::RemoteKey* key;
        try {
            key = connection.key(static_cast<size_t>(columns_.region[i]), region.key);
        } catch (const UcxError& error) {
            set(*run, kStDenied);
            if (failure_.status == kStDone) failure_ = {kStDenied, error.what};
            continue;
        }
        set(*run, kInFlight);
        param.user_data = run;
        auto* local = reinterpret_cast<uint8_t*>(columns_.local[i]);
        const uint64_t remote = region.base + columns_.offset[i];
        void* request = write_ ? api.put(connection.endpoint_, local, bytes, remote, key, &param)
                               : api.get(connection.endpoint_, local, bytes, remote, key, &param);
        if (ucp::is_request(request)) {
            ++share.in_flight;
        } else if (request == nullptr) {
            set(*run, write_ ? kStSent : kStDone);
        } else {
            share.failure = {kStPeerLost, "UCX could not send: " + connection.context_->describe(ucp::status_of(request))};
        }
        while (share.in_flight >= kWindow && !connection.failed_ && now_ns() < deadline_ns_)
            if (api.worker_progress(connection.worker_) == 0) connection.sleep(guard, -1, deadline_ns_);
    }
}

// --- by messages ---

// Neighbours in one chunk, long operations in several.
void Batch::cut_up(Share& share, size_t begin, size_t end, const std::vector<uint32_t>& order,
                   std::vector<uint64_t>& serials, std::vector<uint64_t>& offsets) {
    for (size_t at = begin; at < end;) {
        const uint32_t i = order[at];
        if (gone(i)) {
            ++at;
            continue;
        }
        uint64_t bytes;
        const size_t stop = merge(at, end, order, kMessageBytes, bytes);
        const auto count = static_cast<uint32_t>(stop - at);
        at = stop;
        std::memset(columns_.status + i, kInFlight, count);
        const uint64_t serial = targets_[columns_.region[i]]->region.serial;
        if (bytes > kMessageBytes) {
            pieces_[i] = static_cast<uint32_t>((bytes + kMessageBytes - 1) / kMessageBytes);
        }
        for (uint64_t from = 0; from < bytes; from += kMessageBytes) {
            const auto length = static_cast<uint32_t>(std::min<uint64_t>(kMessageBytes, bytes - from));
            share.chunks.push_back({reinterpret_cast<uint8_t*>(columns_.local[i]) + from, length, i, count});
            serials.push_back(serial);
            offsets.push_back(columns_.offset[i] + from);
        }
    }
}

void Batch::send_messages(Share& share, size_t begin, size_t end, const std::vector<uint32_t>& order,
                          std::unique_lock<std::mutex>& guard) {
    if (memory_type_ != 0) {
        share.failure = {kStNotDone, "GPU memory does not travel by messages; stage it through the host"};
        return;
    }
    Connection& connection = *share.connection;
    std::vector<uint64_t> serials, offsets;
    cut_up(share, begin, end, order, serials, offsets);
    const size_t count = share.chunks.size();
    if (count == 0) {
        share.flushed = true;
        return;
    }
    share.number = connection.next_number_++;
    connection.awaited_.emplace(share.number, &share);
    if (write_) {
        share.awaited = 1;
        share.headers.reserve(count + 1);
        share.packs.reserve(count);
        if (send_writes(share, serials, offsets, guard))
            send(share, {kFlush, kGood, share.number, 0, static_cast<uint32_t>(count), 0, 0, 0, 0}, nullptr, 0, guard);
        return;
    }
    share.awaited = count;
    const size_t messages = (count + kEntriesPerMessage - 1) / kEntriesPerMessage;
    share.headers.reserve(messages);
    share.requests.reserve(messages);
    for (size_t from = 0; from < count; from += kEntriesPerMessage) {
        auto& entries = share.requests.emplace_back();
        for (size_t k = from; k < std::min(count, from + kEntriesPerMessage); ++k)
            entries.push_back({serials[k], offsets[k], share.chunks[k].length, static_cast<uint32_t>(k)});
        const Message message{kRead, kGood, share.number, 0, static_cast<uint32_t>(entries.size()), 0, 0, 0, 0};
        if (!send(share, message, entries.data(), entries.size() * sizeof(Entry), guard)) return;
    }
}

// Large ones from where they are, small neighbours copied together; all in the order given.
bool Batch::send_writes(Share& share, const std::vector<uint64_t>& serials, const std::vector<uint64_t>& offsets,
                        std::unique_lock<std::mutex>& guard) {
    const auto& chunks = share.chunks;
    for (size_t k = 0; k < chunks.size();) {
        size_t end = k, total = 0;
        while (end < chunks.size() && chunks[end].length < kSmallBytes && total + packed_bytes(chunks[end].length) <= kMessageBytes)
            total += packed_bytes(chunks[end++].length);
        if (end <= k + 1) {
            const Message message{kWrite, kGood, share.number, static_cast<uint32_t>(k), 0, serials[k], offsets[k],
                                  chunks[k].length, 0};
            hash(share, chunks[k]);
            if (!send(share, message, chunks[k].local, chunks[k].length, guard)) return false;
            ++k;
            continue;
        }
        auto& pack = share.packs.emplace_back(total);
        size_t at = 0;
        const Message message{kPack, kGood, share.number, 0, static_cast<uint32_t>(end - k), 0, 0, 0, 0};
        for (; k < end; ++k) {
            const Entry entry{serials[k], offsets[k], chunks[k].length, static_cast<uint32_t>(k)};
            hash(share, chunks[k]);
            std::memcpy(pack.data() + at, &entry, sizeof entry);
            std::memcpy(pack.data() + at + sizeof entry, chunks[k].local, chunks[k].length);
            at += packed_bytes(chunks[k].length);
        }
        if (!send(share, message, pack.data(), pack.size(), guard)) return false;
    }
    if (share.group >= 0) columns_.digest[share.group] = share.digest.finish();
    return true;
}

// Chunks come in the order of operations, and the operations of a group follow each other.
void Batch::hash(Share& share, const Share::Chunk& chunk) {
    if (columns_.digest == nullptr || columns_.group == nullptr) return;
    const uint8_t* from = chunk.local;
    for (uint32_t i = chunk.first; i < chunk.first + chunk.count; ++i) {
        const size_t bytes = chunk.count == 1 ? chunk.length : columns_.length[i];  // one alone may be a piece
        const int32_t group = columns_.group[i];
        if (group >= 0) {
            if (group != share.group) {
                if (share.group >= 0) columns_.digest[share.group] = share.digest.finish();
                share.digest.reset();
                share.group = group;
            }
            share.digest.update(from, bytes);
        }
        from += bytes;
    }
}

// The message and the data stay where they are until UCX is done with them: in the share, in the caller's memory.
bool Batch::send(Share& share, Message message, const void* data, size_t bytes, std::unique_lock<std::mutex>& guard) {
    Connection& connection = *share.connection;
    const Library& api = connection.context_->api();
    message.sequence = connection.next_sequence_++;
    share.headers.push_back(message);  // reserved: it stays where it is
    ucp::RequestParam param{};
    param.mask = ucp::kOpCallback | ucp::kOpUserData | ucp::kOpFlags;
    param.flags = ucp::kAmSendEager;
    param.callback = &Batch::on_sent;
    param.user_data = &share;
    void* request =
        api.am_send(connection.endpoint_, kRequestId, &share.headers.back(), sizeof message, data, bytes, &param);
    if (ucp::is_request(request)) {
        ++share.in_flight;
    } else if (request != nullptr) {
        share.failure = {kStPeerLost, "UCX could not send: " + connection.context_->describe(ucp::status_of(request))};
        return false;
    }
    while (share.in_flight >= kSendWindow && !connection.failed_ && now_ns() < deadline_ns_)
        if (api.worker_progress(connection.worker_) == 0) connection.sleep(guard, -1, deadline_ns_);
    return !connection.failed_ && share.failure.status == kStDone && share.in_flight < kSendWindow;
}

void Batch::on_sent(void* request, ucp::Status status, void* data) {
    Share& share = *static_cast<Share*>(data);
    --share.in_flight;
    if (status != ucp::kOk && share.failure.status == kStDone)
        share.failure = {kStPeerLost, "the connection failed: " + share.connection->context_->describe(status)};
    share.connection->context_->api().request_free(request);
    share.batch->settle(share);
}

void Batch::refuse(Share& share, const Share::Chunk& chunk) {
    std::memset(columns_.status + chunk.first, kStDenied, chunk.count);
    share.refused = true;
}

bool Batch::arrived_one(Share& share, uint32_t number, bool good, const void* data, size_t bytes) {
    if (number >= share.chunks.size() || share.awaited == 0) return false;
    Share::Chunk& chunk = share.chunks[number];
    if (chunk.local == nullptr) return true;  // it was here before
    if (!good) {
        refuse(share, chunk);
    } else if (bytes != chunk.length) {
        return false;
    } else {
        std::memcpy(chunk.local, data, bytes);
        const bool pieces = !pieces_.empty() && pieces_[chunk.first] > 1;
        if (pieces)
            --pieces_[chunk.first];
        else if (columns_.status[chunk.first] == kInFlight)
            std::memset(columns_.status + chunk.first, kStDone, chunk.count);
    }
    chunk.local = nullptr;
    --share.awaited;
    return true;
}

// An answer of the owner, which may be anything: what does not fit is not believed.
void Batch::arrived(Share& share, const Message& message, const void* data, size_t bytes) {
    if (message.kind == kWritten && write_) {
        if (bytes != message.count * sizeof(uint32_t) || share.awaited == 0) return;
        for (uint32_t i = 0; i < message.count; ++i) {
            uint32_t number;
            std::memcpy(&number, static_cast<const uint8_t*>(data) + i * sizeof number, sizeof number);
            if (number < share.chunks.size()) refuse(share, share.chunks[number]);
        }
        share.flushed = true;
        share.awaited = 0;
    } else if (message.kind == kData && !write_) {
        arrived_one(share, message.chunk, message.status == kGood, data, bytes);
    } else if (message.kind == kPacked && !write_) {
        const auto* from = static_cast<const uint8_t*>(data);
        size_t at = 0;
        for (uint32_t i = 0; i < message.count; ++i) {
            Entry entry;
            if (bytes - at < sizeof entry) break;
            std::memcpy(&entry, from + at, sizeof entry);
            if (packed_bytes(entry.length) > bytes - at) break;
            if (!arrived_one(share, entry.chunk, entry.serial == kGood, from + at + sizeof entry, entry.length)) break;
            at += packed_bytes(entry.length);
        }
    }
    settle(share);
}

void Batch::set(const Run& run, uint8_t status) { std::memset(columns_.status + run.first, status, run.count); }

// In a callback of UCX, under the connection's lock.
void Batch::on_done(void* request, ucp::Status status, void* data) {
    auto* run = static_cast<Run*>(data);
    Share& share = *run->share;
    Batch& batch = *share.batch;
    const Library& api = share.connection->context_->api();
    --share.in_flight;
    if (status == ucp::kOk) {
        batch.set(*run, batch.write_ ? kStSent : kStDone);
    } else if (share.failure.status == kStDone) {
        share.failure = {kStPeerLost, "the connection failed: " + share.connection->context_->describe(status)};
    }
    api.request_free(request);
    batch.settle(share);
}

void Batch::on_flushed(void* request, ucp::Status status, void* data) {
    auto& share = *static_cast<Share*>(data);
    const Library& api = share.connection->context_->api();
    share.flushing = false;
    share.flushed = status == ucp::kOk;
    if (status != ucp::kOk && share.failure.status == kStDone)
        share.failure = {kStPeerLost, "the connection failed: " + share.connection->context_->describe(status)};
    api.request_free(request);
    share.batch->settle(share);
}

// Brings a share one step on, once UCX has nothing of it: writes are flushed, then it is over.
void Batch::settle(Share& share) {
    if (share.over || share.posting || share.in_flight != 0 || share.flushing) return;
    if (share.awaited != 0 && share.failure.status == kStDone) return;
    Connection& connection = *share.connection;
    if (!connection.by_messages() && write_ && share.failure.status == kStDone && !share.flushed && connection.usable()) {
        const Library& api = connection.context_->api();
        ucp::RequestParam param{};
        param.mask = ucp::kOpCallback | ucp::kOpUserData;
        param.callback = &Batch::on_flushed;
        param.user_data = &share;
        share.flushing = true;
        void* request = api.ep_flush(connection.endpoint_, &param);
        if (ucp::is_request(request)) return;
        share.flushing = false;
        share.flushed = request == nullptr;
        if (!share.flushed)
            share.failure = {kStPeerLost,
                             "the connection failed: " + connection.context_->describe(ucp::status_of(request))};
    }
    if (write_ && !share.flushed && share.failure.status == kStDone)
        share.failure = {kStPeerLost, "the connection failed"};
    share.over = true;
    const auto answered = connection.awaited_.find(share.number);
    if (answered != connection.awaited_.end() && answered->second == &share) connection.awaited_.erase(answered);
    auto& all = connection.shares_;
    all.erase(std::remove(all.begin(), all.end(), &share), all.end());
    const int sleeper = sleeper_;
    if (--open_shares_ == 0 && sleeper >= 0) {
        const uint64_t one = 1;
        (void)!::write(sleeper, &one, sizeof one);
    }
}

bool Batch::poll() {
    if (finished_) return true;
    for (auto& share : shares_) {
        Connection& connection = *share->connection;
        bool failed;
        {
            std::lock_guard guard(connection.lock_);
            if (share->over) continue;
            if (connection.worker_ != nullptr)
                for (int i = 0; i < kMostProgress && !share->over; ++i)
                    if (connection.context_->api().worker_progress(connection.worker_) == 0) break;
            failed = connection.failed_;
        }
        if (failed)
            connection.cut(kStPeerLost, "the connection failed: " + connection.context_->describe(connection.why_));
    }
    if (open_shares_ == 0)
        finish();
    else if (now_ns() >= deadline_ns_)
        cut(kStTimedOut, "the deadline passed; the connection was cut");
    return finished_;
}

void Batch::wait(uint64_t until_ns) {
    const int sleeper = sleeper_descriptor();
    sleeper_ = sleeper;
    std::vector<pollfd> fds;
    while (!poll()) {
        const uint64_t now = now_ns();
        if (until_ns != 0 && now >= until_ns) break;
        fds.assign(1, {sleeper, POLLIN, 0});
        bool busy = client_.spin_;
        for (auto& share : shares_) {
            Connection& connection = *share->connection;
            std::lock_guard guard(connection.lock_);
            if (share->over) continue;
            if (connection.worker_ == nullptr || connection.context_->api().worker_arm(connection.worker_) == ucp::kBusy)
                busy = true;
            else
                fds.push_back({connection.events_, POLLIN, 0});
        }
        if (busy || open_shares_ == 0) continue;
        uint64_t left = deadline_ns_ > now ? std::min(deadline_ns_ - now, kSliceNs) : 0;
        if (until_ns != 0) left = std::min(left, until_ns - now);
        const timespec limit{static_cast<time_t>(left / 1'000'000'000), static_cast<long>(left % 1'000'000'000)};
        ppoll(fds.data(), fds.size(), &limit, nullptr);
        if ((fds[0].revents & POLLIN) != 0) {
            uint64_t drained;
            (void)!::read(sleeper, &drained, sizeof drained);
        }
    }
    sleeper_ = -1;
}

void Batch::cut(uint8_t status, const char* why) {
    for (auto& share : shares_) {
        bool open;
        {
            std::lock_guard guard(share->connection->lock_);
            open = !share->over;
        }
        if (!open) continue;
        share->connection->cut(status, why);
        ++client_.cuts_;
    }
    finish();
}

void Batch::abandon() {
    if (!finished_) cut(kStPeerLost, "abandoned");
}

// Everything is terminal: final statuses, and the handles are free.
void Batch::finish() {
    for (auto& share : shares_) {
        std::lock_guard guard(share->connection->lock_);  // with whoever was in a callback
        if (share->failure.status != kStDone && failure_.status == kStDone) failure_ = share->failure;
        if (share->refused && failure_.status == kStDone)
            failure_ = {kStDenied, "the owner refused: the region was withdrawn, or the range is not in it"};
    }
    std::vector<const Share*> of;
    if (shares_.size() > 1) {
        // Only needed where something is not done: which share an operation was in.
        of.assign(columns_.count, nullptr);
        for (const auto& runs : runs_)
            for (const Run* run = runs.get(); run->share != nullptr; ++run)
                std::fill_n(of.begin() + run->first, run->count, run->share);
        for (const auto& share : shares_)
            for (const Share::Chunk& chunk : share->chunks)
                std::fill_n(of.begin() + chunk.first, chunk.count, share.get());
    }
    for (size_t i = 0; i < columns_.count; ++i) {
        uint8_t& status = columns_.status[i];
        if (status < kStSent) continue;
        const Share* share = shares_.size() == 1 ? shares_.front().get() : of[i];
        if (write_ && share->flushed)
            status = kStDone;
        else
            status = share->failure.status != kStDone ? share->failure.status : uint8_t{kStPeerLost};
    }
    finished_ = true;
    std::lock_guard guard(client_.lock_);
    bool idle = false;
    for (const int32_t handle : pinned_) idle |= --targets_[handle]->users == 0;
    pinned_.clear();
    if (idle) client_.idle_.notify_all();
}

size_t Batch::done() const {
    return refusal_ != 0 ? 0 : static_cast<size_t>(std::count(columns_.status, columns_.status + columns_.count, kStDone));
}

}  // namespace mf
