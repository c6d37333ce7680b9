#include "client.hpp"

#include <errno.h>

#include <algorithm>

namespace mf::verbs {

void Client::use(uint64_t connection, std::shared_ptr<Queue> queue) {
    std::shared_ptr<Queue> last;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (closed_) {
            last = std::move(queue);
        } else {
            std::swap(queues_[connection], queue);
            last = std::move(queue);
        }
        if (last) staged_before_ += last->staged_bytes();
    }
    if (last) last->cut(kPeerLost, "the connection was replaced");
}

void Client::drop(uint64_t connection) {
    std::shared_ptr<Queue> last;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto at = queues_.find(connection);
        if (at == queues_.end()) return;
        last = std::move(at->second);
        queues_.erase(at);
        staged_before_ += last->staged_bytes();
    }
}

std::shared_ptr<Queue> Client::queue_of(uint64_t connection) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = queues_.find(connection);
    return at == queues_.end() ? nullptr : at->second;
}

bool Client::alive(uint64_t connection) const {
    const auto queue = queue_of(connection);
    return queue && queue->open();
}

size_t Client::connections() const {
    std::vector<std::shared_ptr<Queue>> all;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const auto& [_, queue] : queues_) all.push_back(queue);
    }
    return static_cast<size_t>(std::count_if(all.begin(), all.end(), [](const auto& queue) { return queue->open(); }));
}

int Client::add(RemoteRegion region) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto next = std::make_shared<Regions>(*regions_);
    const auto free = std::find(next->begin(), next->end(), nullptr);
    const auto handle = static_cast<int>(free - next->begin());
    region.number = ++regions_added_;
    auto made = std::make_shared<const RemoteRegion>(std::move(region));
    if (free == next->end())
        next->push_back(std::move(made));
    else
        *free = std::move(made);
    regions_ = std::move(next);
    return handle;
}

void Client::replace(uint64_t connection, int handle, std::vector<Chunk> chunks) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (handle < 0 || static_cast<size_t>(handle) >= regions_->size()) return;
    auto next = std::make_shared<Regions>(*regions_);
    auto& slot = (*next)[static_cast<size_t>(handle)];
    if (!slot || slot->connection != connection) return;
    auto changed = std::make_shared<RemoteRegion>(*slot);
    changed->chunks = std::move(chunks);
    slot = std::move(changed);
    regions_ = std::move(next);
}

bool Client::remove(int handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (handle < 0 || static_cast<size_t>(handle) >= regions_->size() || !(*regions_)[static_cast<size_t>(handle)])
        return false;
    auto next = std::make_shared<Regions>(*regions_);
    (*next)[static_cast<size_t>(handle)] = nullptr;
    regions_ = std::move(next);
    return true;
}

uint64_t Client::size_of(int handle) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (handle < 0 || static_cast<size_t>(handle) >= regions_->size()) return 0;
    const auto& region = (*regions_)[static_cast<size_t>(handle)];
    return region ? region->size_bytes : 0;
}

void Client::prepare(uint64_t address, uint64_t length) {
    const auto clash = [&](const MemoryMap& map) {
        return std::any_of(map.entries.begin(), map.entries.end(), [&](const auto& entry) {
            return entry->address() < address + length && address < entry->address() + entry->length();
        });
    };
    if (clash(*snapshot().memory)) return;
    auto made = std::make_shared<Memory>(device_, address, length, ibv::kLocalWrite);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_ || clash(*memory_)) return;
    auto next = std::make_shared<MemoryMap>(*memory_);
    next->entries.insert(std::upper_bound(next->entries.begin(), next->entries.end(), address,
                                          [](uint64_t at, const auto& entry) { return at < entry->address(); }),
                         std::move(made));
    memory_ = std::move(next);
}

bool Client::forget(uint64_t address, uint64_t length) {
    std::shared_ptr<Memory> last;  // deregistered without the lock, when the last batch lets go
    const std::lock_guard<std::mutex> lock(mutex_);
    auto next = std::make_shared<MemoryMap>(*memory_);
    const auto at = std::find_if(next->entries.begin(), next->entries.end(), [&](const auto& entry) {
        return entry->address() == address && entry->length() == length;
    });
    if (at == next->entries.end()) return false;
    last = *at;
    next->entries.erase(at);
    memory_ = std::move(next);
    return true;
}

uint64_t Client::staged_bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    uint64_t sum = staged_before_;
    for (const auto& [_, queue] : queues_) sum += queue->staged_bytes();
    return sum;
}

Client::Snapshot Client::snapshot() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {regions_, memory_};
}

void Client::close() {
    std::map<uint64_t, std::shared_ptr<Queue>> queues;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
        queues.swap(queues_);
        regions_ = std::make_shared<Regions>();
        memory_ = std::make_shared<MemoryMap>();
    }
    for (const auto& [_, queue] : queues) queue->cut(kPeerLost, "this transport was closed");
}

}  // namespace mf::verbs
