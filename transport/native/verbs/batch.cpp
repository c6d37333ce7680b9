#include <errno.h>
#include <poll.h>
#include <sched.h>

#include <algorithm>
#include <map>

#include "../clock.hpp"
#include "client.hpp"

namespace mf::verbs {

namespace {

constexpr uint64_t kFollowSliceNs = 2'000'000;  // where one thread watches some queues and follows another on others
constexpr uint64_t kGraceNs = 20'000'000;       // for what is under way, before an abandoned batch cuts it

}  // namespace

Batch::Batch(Client& client, const Columns& columns, bool write, uint64_t deadline_ns)
    : client_(client),
      columns_(columns),
      held_(client.snapshot()),
      deadline_ns_(deadline_ns ? deadline_ns : now_ns() + client.limit_ns()),
      write_(write),
      refusal_(check()) {
    if (refusal_ != kDone) finished_ = true;
}

Batch::~Batch() {
    if (begun_ && !finished_) abandon();
}

// Statuses of what is at fault; everything else stays `kNotDone`.
uint8_t Batch::check() const {
    uint8_t worst = kDone;
    for (size_t at = 0; at < columns_.count; ++at) {
        uint8_t status = kNotDone;
        const auto handle = static_cast<uint32_t>(columns_.region[at]);
        const RemoteRegion* region = handle < held_.regions->size() ? (*held_.regions)[handle].get() : nullptr;
        const uint64_t length = columns_.length[at], offset = columns_.offset[at], local = columns_.local[at];
        if (region == nullptr)
            status = kRegionGone;
        else if (write_ && !region->writable)
            status = kNotWritable;
        else if (offset > region->size_bytes || length > region->size_bytes - offset ||
                 (length > 0 && (local == 0 || local + length < local)))
            status = kOutOfBounds;
        columns_.status[at] = status;
        if (status != kNotDone && worst == kDone) worst = status;
    }
    return worst;
}

std::vector<uint64_t> Batch::missing() const {
    std::vector<uint64_t> found;
    if (refusal_ != kDone) return found;
    const RemoteRegion* last = nullptr;
    for (size_t at = 0; at < columns_.count; ++at) {
        const RemoteRegion* region = (*held_.regions)[static_cast<size_t>(columns_.region[at])].get();
        if (region == last) continue;
        last = region;
        if (std::find(found.begin(), found.end(), region->connection) == found.end()) found.push_back(region->connection);
    }
    found.erase(std::remove_if(found.begin(), found.end(), [&](uint64_t each) { return client_.alive(each); }),
                found.end());
    return found;
}

void Batch::begin(const std::string& why) {
    begun_ = true;
    if (now_ns() >= deadline_ns_) {
        failure_ = {kNotDone, "the deadline had passed before the batch began"};
        return finish();
    }
    // Rights may have come anew with a connection that was made for this batch; a handle may have been disconnected.
    rights_ = client_.snapshot().regions;
    std::map<uint64_t, size_t> lane_of;
    uint64_t last_connection = ~0ull;
    size_t lane = 0;
    for (size_t at = 0; at < columns_.count; ++at) {
        if (columns_.length[at] == 0) {
            columns_.status[at] = kDone;
            continue;
        }
        const auto handle = static_cast<size_t>(columns_.region[at]);
        const RemoteRegion& region = *(*held_.regions)[handle];
        const RemoteRegion* now = handle < rights_->size() ? (*rights_)[handle].get() : nullptr;
        if (now == nullptr || now->number != region.number || now->chunks.empty()) {
            columns_.status[at] = kDenied;
            if (failure_.status == kDone) failure_ = {kDenied, "the region was withdrawn by its owner, or disconnected"};
            continue;
        }
        if (lanes_.empty() || region.connection != last_connection) {
            last_connection = region.connection;
            const auto [found, added] = lane_of.emplace(region.connection, lanes_.size());
            lane = found->second;
            if (added) {
                lanes_.push_back({client_.queue_of(region.connection), std::make_unique<Part>()});
                Part& part = *lanes_.back().part;
                part.columns = &columns_;
                part.regions = rights_.get();
                part.memory = held_.memory.get();
                part.write = write_;
                part.index.reserve(columns_.count - at);
            }
        }
        lanes_[lane].part->index.push_back(static_cast<uint32_t>(at));
    }
    for (Lane& each : lanes_) {
        if (each.queue) {
            each.queue->submit(*each.part);
        } else {
            each.part->failure = {kNotDone, why.empty() ? "there is no connection" : why};
            each.part->finished.store(true);
        }
        if (each.part->failure.status == kNotDone && !why.empty()) each.part->failure.why = why;
    }
    poll();
}

void Batch::finish() {
    finished_ = true;
    for (const Lane& lane : lanes_)
        if (failure_.status == kDone && lane.part->failure.status != kDone) failure_ = lane.part->failure;
    done_ = static_cast<size_t>(std::count(columns_.status, columns_.status + columns_.count, kDone));
}

bool Batch::poll() {
    if (finished_) return true;
    bool all = true;
    for (Lane& lane : lanes_)
        if (!lane.part->finished.load(std::memory_order_acquire) && !lane.queue->step(*lane.part)) all = false;
    if (!all && now_ns() >= deadline_ns_) {
        for (Lane& lane : lanes_)
            if (!lane.part->finished.load(std::memory_order_acquire))
                lane.queue->end(*lane.part, kTimedOut, "the deadline passed");
        all = true;
    }
    if (all) finish();
    return all;
}

// Sleeps until something may have changed on a queue that the batch waits for.
void Batch::sleep(uint64_t until_ns) {
    if (client_.spin()) {
        sched_yield();
        return;
    }
    std::vector<Queue*> led;
    std::vector<pollfd> descriptors;
    Lane* followed = nullptr;
    bool progress = false;
    for (Lane& lane : lanes_) {
        if (lane.part->finished.load(std::memory_order_acquire)) continue;
        const Queue::Watch watch = lane.queue->watch(*lane.part);
        if (watch == Queue::Watch::kLeads) {
            led.push_back(lane.queue.get());
            descriptors.push_back({lane.queue->channel_fd(), POLLIN, 0});
            descriptors.push_back({lane.queue->wake_fd(), POLLIN, 0});
        } else if (watch == Queue::Watch::kFollows) {
            followed = &lane;
        } else {
            progress = true;
            break;
        }
    }
    if (!progress && !led.empty()) {
        const uint64_t now = now_ns();
        const uint64_t until = followed ? std::min(until_ns, now + kFollowSliceNs) : until_ns;
        const uint64_t left = until > now ? until - now : 0;
        const timespec time{static_cast<time_t>(left / 1'000'000'000u), static_cast<long>(left % 1'000'000'000u)};
        ppoll(descriptors.data(), descriptors.size(), &time, nullptr);
        for (size_t at = 0; at < led.size(); ++at)
            if ((descriptors[2 * at].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0)
                led[at]->cut(kPeerLost, "the RDMA device is gone");
    } else if (!progress && followed) {
        followed->queue->follow(*followed->part, until_ns);
    }
    for (Queue* queue : led) queue->resign();
}

bool Batch::wait(uint64_t until_ns) {
    while (!poll()) {
        if (now_ns() >= until_ns) return false;
        sleep(std::min(until_ns, deadline_ns_));
    }
    return true;
}

void Batch::abandon() {
    if (!begun_ || finished_) return;
    if (wait(std::min(deadline_ns_, now_ns() + kGraceNs))) return;
    for (Lane& lane : lanes_)
        if (!lane.part->finished.load(std::memory_order_acquire))
            lane.queue->end(*lane.part, kPeerLost, "the batch was abandoned");
    finish();
}

}  // namespace mf::verbs
