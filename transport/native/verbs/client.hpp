// The client's side: connections to owners, regions by handle, registered local memory, and batches over them.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "queue.hpp"

namespace mf::verbs {

class Client {
public:
    Client(std::shared_ptr<RdmaDevice> device, int depth, int segments, size_t staging_bytes, bool spin,
           uint64_t limit_ns)
        : device_(std::move(device)),
          depth_(depth),
          segments_(segments),
          staging_bytes_(staging_bytes),
          limit_ns_(limit_ns),
          spin_(spin) {}

    // A queue that is not joined yet.
    std::shared_ptr<Queue> make_queue() const {
        return std::make_shared<Queue>(device_, depth_, segments_, staging_bytes_);
    }
    // From now on `connection` travels over this queue; what travelled over its last one is cut.
    void use(uint64_t connection, std::shared_ptr<Queue> queue);
    // Forgets it; batches under way keep it until they end.
    void drop(uint64_t connection);
    bool alive(uint64_t connection) const;
    size_t connections() const;

    int add(RemoteRegion region);
    // New rights of a handle, if it is still this connection's.
    void replace(uint64_t connection, int handle, std::vector<Chunk> chunks);
    bool remove(int handle);
    uint64_t size_of(int handle) const;

    void prepare(uint64_t address, uint64_t length);
    bool forget(uint64_t address, uint64_t length);
    uint64_t staged_bytes() const;

    void close();
    uint64_t limit_ns() const { return limit_ns_; }
    bool spin() const { return spin_; }

    struct Snapshot {
        std::shared_ptr<const Regions> regions;
        std::shared_ptr<const MemoryMap> memory;
    };
    Snapshot snapshot() const;
    std::shared_ptr<Queue> queue_of(uint64_t connection) const;

private:
    const std::shared_ptr<RdmaDevice> device_;
    const int depth_, segments_;
    const size_t staging_bytes_;
    const uint64_t limit_ns_;
    const bool spin_;
    mutable std::mutex mutex_;
    std::map<uint64_t, std::shared_ptr<Queue>> queues_;
    std::shared_ptr<const Regions> regions_ = std::make_shared<Regions>();
    std::shared_ptr<const MemoryMap> memory_ = std::make_shared<MemoryMap>();
    uint64_t staged_before_ = 0, regions_added_ = 0;
    bool closed_ = false;
};

// One batch, from its checks to its end.
class Batch {
public:
    // Checks all operations; `refusal` tells the worst.
    Batch(Client& client, const Columns& columns, bool write, uint64_t deadline_ns);
    ~Batch();

    uint8_t refusal() const { return refusal_; }
    // Connections that it needs and that are down.
    std::vector<uint64_t> missing() const;
    // Posts. Operations whose connection is down stay `kNotDone`; `why` says so.
    void begin(const std::string& why);

    bool poll();
    bool wait(uint64_t until_ns);
    void abandon();
    bool finished() const { return finished_; }
    size_t done() const { return done_; }
    const Failure& failure() const { return failure_; }

private:
    struct Lane {
        std::shared_ptr<Queue> queue;
        std::unique_ptr<Part> part;
    };
    uint8_t check() const;
    void finish();
    void sleep(uint64_t until_ns);

    Client& client_;
    const Columns columns_;
    const Client::Snapshot held_;
    std::shared_ptr<const Regions> rights_;  // as they were when the batch began
    const uint64_t deadline_ns_;
    const bool write_;
    uint8_t refusal_;
    bool begun_ = false, finished_ = false;
    size_t done_ = 0;
    Failure failure_;
    std::vector<Lane> lanes_;
};

}  // namespace mf::verbs
