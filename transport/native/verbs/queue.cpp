#include "queue.hpp"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "../clock.hpp"

namespace mf::verbs {

namespace {

constexpr uint64_t kLargest = 1 << 20;  // of one work request, so that what a loss leaves unknown is bounded
constexpr size_t kChain = 16;           // work requests handed over at once
constexpr size_t kMostSegments = 16;
constexpr size_t kSpans = 8;            // staged work requests that fit the ring at least

}  // namespace

const Chunk& RemoteRegion::chunk_at(uint64_t offset) const {
    const auto after = std::upper_bound(chunks.begin(), chunks.end(), offset,
                                        [](uint64_t at, const Chunk& chunk) { return at < chunk.offset; });
    return *(after - 1);
}

const Memory* MemoryMap::find(uint64_t address, uint64_t length) const {
    const auto after = std::upper_bound(entries.begin(), entries.end(), address,
                                        [](uint64_t at, const auto& entry) { return at < entry->address(); });
    if (after == entries.begin()) return nullptr;
    const Memory& found = **(after - 1);
    return address + length <= found.address() + found.length() ? &found : nullptr;
}

Queue::Queue(std::shared_ptr<RdmaDevice> device, int depth, int segments, size_t staging_bytes)
    : pair_(device, depth, std::min<int>(segments, kMostSegments), true),
      depth_(static_cast<size_t>(depth)),
      staging_bytes_(staging_bytes),
      ring_(depth_) {
    wake_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (wake_ < 0) refuse("no eventfd can be made", errno);
    void* made = mmap(nullptr, staging_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) {
        ::close(wake_);
        refuse("no memory for staging", errno);
    }
    staging_ = static_cast<uint8_t*>(made);
    try {
        staging_memory_ = std::make_unique<Memory>(device, reinterpret_cast<uint64_t>(staging_), staging_bytes_,
                                                   ibv::kLocalWrite);
    } catch (...) {
        munmap(staging_, staging_bytes_);
        ::close(wake_);
        throw;
    }
}

Queue::~Queue() {
    pair_.sever();
    staging_memory_.reset();
    munmap(staging_, staging_bytes_);
    ::close(wake_);
}

bool Queue::open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return pair_.open();
}

// --- posting ---

void Queue::submit(Part& part) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (part.exhausted() || !pair_.open()) {
        if (!part.exhausted()) part.failure = {kNotDone, "the connection was lost before the batch began"};
        part.finished.store(true, std::memory_order_release);
        return;
    }
    parts_.push_back(&part);
    waiting_.push_back(&part);
    reap();
    pump();
}

bool Queue::stage(uint32_t length, Sent& sent) {
    const uint64_t at = stage_head_ % staging_bytes_;
    const uint64_t pad = at + length > staging_bytes_ ? staging_bytes_ - at : 0;
    if (pad + length > staging_bytes_ - (stage_head_ - stage_tail_)) return false;
    sent.at = pad ? 0 : at;
    sent.span = pad + length;
    stage_head_ += sent.span;
    return true;
}

// Between the ring and where the operations say.
void Queue::copy(const Sent& sent, bool out) {
    const Part& part = *sent.part;
    uint8_t* ring = staging_ + sent.at;
    uint64_t left = sent.length, skip = sent.skip;
    for (size_t at = sent.first; left > 0; ++at, skip = 0) {
        const uint32_t op = part.index[at];
        auto* local = reinterpret_cast<uint8_t*>(part.columns->local[op]) + skip;
        const uint64_t piece = std::min(left, part.columns->length[op] - skip);
        if (out)
            memcpy(local, ring, piece);
        else
            memcpy(ring, local, piece);
        ring += piece;
        left -= piece;
    }
    staged_total_.fetch_add(sent.length, std::memory_order_relaxed);
}

// The next work request: as many neighbouring bytes as fit one. False: there is no room for it now.
bool Queue::build(Part& part, ibv::SendWr& wr, ibv::Sge* segments, Sent& sent) {
    const Columns& ops = *part.columns;
    const uint32_t first = part.index[part.next];
    const RemoteRegion& region = *(*part.regions)[static_cast<size_t>(ops.region[first])];
    const uint64_t begin = ops.offset[first] + part.within;
    const Chunk& chunk = region.chunk_at(begin);
    uint64_t room = std::min<uint64_t>({kLargest, pair_.device().port().max_message_bytes,
                                        chunk.offset + chunk.length - begin});
    const Memory* memory =
        part.memory->find(ops.local[first] + part.within, std::min(ops.length[first] - part.within, room));
    const bool staged = memory == nullptr;
    if (staged) room = std::min<uint64_t>(room, staging_bytes_ / kSpans);

    size_t next = part.next;
    uint64_t within = part.within, total = 0;
    int count = 0;
    while (total < room && next < part.index.size()) {
        const uint32_t op = part.index[next];
        const uint64_t local = ops.local[op] + within;
        const uint64_t piece = std::min(ops.length[op] - within, room - total);
        if (total > 0 && (ops.region[op] != ops.region[first] || ops.offset[op] + within != begin + total)) break;
        const Memory* mine = part.memory->find(local, piece);
        if ((mine == nullptr) != staged) break;
        if (!staged) {
            ibv::Sge& last = segments[count > 0 ? count - 1 : 0];
            if (count > 0 && last.lkey == mine->lkey() && last.addr + last.length == local) {
                last.length += static_cast<uint32_t>(piece);
            } else {
                if (count == pair_.segments()) break;
                segments[count++] = {local, static_cast<uint32_t>(piece), mine->lkey()};
            }
        }
        total += piece;
        within += piece;
        if (within == ops.length[op]) {
            ++next;
            within = 0;
        }
    }
    sent = {&part, part.next, part.within, next - part.next + (within > 0), next, static_cast<uint32_t>(total),
            staged, 0, 0};
    if (staged) {
        if (!stage(sent.length, sent)) return false;
        if (part.write) copy(sent, false);
        segments[count++] = {reinterpret_cast<uint64_t>(staging_) + sent.at, sent.length, staging_memory_->lkey()};
    }
    part.next = next;
    part.within = within;
    wr = {};
    wr.sg_list = segments;
    wr.num_sge = count;
    wr.opcode = part.write ? ibv::kRdmaWrite : ibv::kRdmaRead;
    wr.remote_addr = chunk.address + (begin - chunk.offset);
    wr.rkey = chunk.rkey;
    return true;
}

void Queue::pump() {
    ibv::SendWr chain[kChain];
    ibv::Sge segments[kChain][kMostSegments];
    while (!waiting_.empty() && pair_.open()) {
        Part& part = *waiting_.front();
        size_t count = 0;
        while (count < kChain && tail_ - head_ < depth_ && !part.exhausted()) {
            Sent& sent = ring_[tail_ % depth_];
            if (!build(part, chain[count], segments[count], sent)) break;
            chain[count].wr_id = tail_++;
            ++part.outstanding;
            ++unsignalled_;
            unsignalled_span_ += sent.span;
            if (part.exhausted() || unsignalled_ >= std::min(kChain, depth_ / 4) ||
                unsignalled_span_ >= staging_bytes_ / 4) {
                chain[count].send_flags = ibv::kSignaled;
                unsignalled_ = 0;
                unsignalled_span_ = 0;
            }
            if (count > 0) chain[count - 1].next = &chain[count];
            ++count;
        }
        if (count == 0) return;
        ibv::SendWr* bad = nullptr;
        const int code = pair_.post(chain, &bad);
        if (code != 0) {
            const size_t posted = bad == nullptr ? 0 : static_cast<size_t>(bad - chain);
            const uint64_t end = tail_ - (count - posted);
            // What was not handed over did not begin, but for an operation whose first bytes went before.
            part.next = ring_[end % depth_].first;
            part.within = ring_[end % depth_].skip;
            tail_ = end;
            sever(nullptr, kPeerLost, false,
                  std::string("the device takes no work: ") + strerror(code > 0 ? code : errno));
            return;
        }
        if (part.exhausted()) waiting_.pop_front();
    }
}

// --- completion ---

bool Queue::reap() {
    bool any = false;
    ibv::Wc found[32];
    while (pair_.open()) {
        const int count = pair_.poll(found, 32);
        if (count < 0) {
            sever(nullptr, kPeerLost, false, "the completion queue is broken");
            return true;
        }
        for (int at = 0; at < count; ++at) {
            if (found[at].status != ibv::kSuccess) {
                fail(found[at]);
                return true;
            }
            complete_until(found[at].wr_id + 1);
        }
        any = any || count > 0;
        if (count < 32) break;
    }
    return any;
}

void Queue::complete_until(uint64_t end) {
    for (; head_ < end; ++head_) {
        Sent& sent = ring_[head_ % depth_];
        Part& part = *sent.part;
        if (sent.staged) {
            if (!part.write) copy(sent, true);
            stage_tail_ += sent.span;
        }
        for (; part.done < sent.done; ++part.done) part.columns->status[part.index[part.done]] = kDone;
        if (--part.outstanding == 0 && part.exhausted()) finish(part);
    }
}

void Queue::fail(const ibv::Wc& wc) {
    complete_until(wc.wr_id);
    const bool refused = wc.status == ibv::kRemoteAccess || wc.status == ibv::kRemoteInvalidRequest ||
                         wc.status == ibv::kRemoteOperation;
    std::string why;
    if (wc.status == ibv::kRetryExceeded)
        why = "the other side does not answer any more";
    else if (refused)
        why = "the other side refused it: the region was withdrawn or its key is stale";
    else
        why = "the connection broke";
    why += std::string(" (") + pair_.device().api().wc_status_str(wc.status) + ", vendor code " +
           std::to_string(wc.vendor_err) + ")";
    sever(nullptr, kPeerLost, refused, why);
}

// Ends everything on this connection. What is under way becomes unknown, `status` for the owner's operations where
// there is one. `refused`: the other side refused the oldest work request, and so never performed those after it.
void Queue::sever(const Part* owner, uint8_t status, bool refused, const std::string& why) {
    pair_.sever();
    for (uint64_t at = head_; at < tail_; ++at) {
        const Sent& sent = ring_[at % depth_];
        Part& part = *sent.part;
        const bool foreign = owner != nullptr && owner != &part;
        // A long message may have been refused in its middle: then some of it was applied.
        const bool whole = sent.skip == 0 && (sent.length <= pair_.packet_bytes() || (!part.write && sent.staged));
        uint8_t mark = foreign ? kPeerLost : status;
        if (refused && at == head_) mark = whole ? kDenied : kPeerLost;
        if (refused && at > head_) mark = kNotDone;
        for (size_t n = sent.first; n < sent.first + sent.touched; ++n) {
            uint8_t& now = part.columns->status[part.index[n]];
            if (now == kNotDone) now = mark;
        }
        if (part.failure.status == kDone)
            part.failure = {mark, foreign ? "the connection was cut because another batch ran out of time" : why};
    }
    for (Part* part : parts_) {
        if (part->within > 0) {
            uint8_t& now = part->columns->status[part->index[part->next]];
            if (now == kNotDone) now = owner == part ? status : static_cast<uint8_t>(kPeerLost);
        }
        if (part->failure.status == kDone && part->done < part->index.size())
            part->failure = {kNotDone, "the connection was lost before: " + why};
        part->finished.store(true, std::memory_order_release);
    }
    parts_.clear();
    waiting_.clear();
    head_ = tail_ = 0;
    stage_head_ = stage_tail_ = 0;
    changed_.notify_all();
    const uint64_t one = 1;
    if (write(wake_, &one, sizeof one) < 0) return;  // full: it is readable already
}

void Queue::finish(Part& part) {
    parts_.erase(std::find(parts_.begin(), parts_.end(), &part));
    part.finished.store(true, std::memory_order_release);
    changed_.notify_all();
}

bool Queue::step(Part& part) {
    const std::lock_guard<std::mutex> lock(mutex_);
    reap();
    pump();
    return part.finished.load(std::memory_order_acquire);
}

void Queue::end(Part& part, uint8_t status, const std::string& why) {
    const std::lock_guard<std::mutex> lock(mutex_);
    reap();
    if (part.finished.load(std::memory_order_acquire)) return;
    if (part.outstanding > 0 || part.within > 0) {
        sever(&part, status, false, why);
        return;
    }
    waiting_.erase(std::find(waiting_.begin(), waiting_.end(), &part));
    part.failure = {kNotDone, why};
    finish(part);
}

void Queue::cut(uint8_t status, const std::string& why) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (pair_.open()) sever(nullptr, status, false, why);
}

// --- waiting ---

Queue::Watch Queue::watch(Part& part) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (part.finished.load(std::memory_order_acquire) || !pair_.open()) return Watch::kProgress;
    if (led_) return Watch::kFollows;
    pair_.drain_events();
    pair_.arm();
    if (reap()) {  // came before the channel was armed
        pump();
        return Watch::kProgress;
    }
    led_ = true;
    return Watch::kLeads;
}

void Queue::resign() {
    const std::lock_guard<std::mutex> lock(mutex_);
    led_ = false;
    changed_.notify_all();
}

void Queue::follow(const Part& part, uint64_t until_ns) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (part.finished.load(std::memory_order_acquire) || !led_) return;
    const uint64_t now = now_ns();
    if (now < until_ns) changed_.wait_for(lock, std::chrono::nanoseconds(until_ns - now));
}

}  // namespace mf::verbs
