// The client's end of a connection: posts the operations of batches as work requests, in order, and takes completions.
//
// Work requests of a reliable connection complete in the order of posting, so one completion stands for all before it,
// and what is outstanding is a ring. Whoever waits for a batch drives the queue: one thread sleeps on the completion
// channel and takes completions for everybody, the others sleep until it tells them. Local memory that is not
// registered travels through a ring of registered bytes that belongs to the queue.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "pair.hpp"

namespace mf::verbs {

// Statuses of operations; values as in transport.base.
enum Status : uint8_t {
    kDone = 0,
    kNotDone = 1,
    kOutOfBounds = 2,
    kRegionGone = 3,
    kNotWritable = 4,
    kPeerLost = 5,
    kDenied = 6,
    kTimedOut = 7,
};

// A piece of a region under one registration of its owner's.
struct Chunk {
    uint64_t offset, length, address;
    uint32_t rkey;
};

struct RemoteRegion {
    uint64_t connection, size_bytes;
    bool writable;
    std::vector<Chunk> chunks;  // by offset, without gaps; empty: withdrawn
    uint64_t number = 0;        // of this use of the handle; the client gives it

    const Chunk& chunk_at(uint64_t offset) const;
};

using Regions = std::vector<std::shared_ptr<const RemoteRegion>>;  // by handle

// Registered local memory, by address, without overlaps.
class MemoryMap {
public:
    // The registration that holds all of a range, or null.
    const Memory* find(uint64_t address, uint64_t length) const;
    std::vector<std::shared_ptr<Memory>> entries;
};

struct Columns {
    size_t count;
    const uint64_t* local;
    const int32_t* region;
    const uint64_t *offset, *length;
    uint8_t* status;
};

struct Failure {
    uint8_t status = kDone;
    std::string why;
};

// The operations of one batch on one queue.
struct Part {
    const Columns* columns;
    const Regions* regions;
    const MemoryMap* memory;
    bool write;
    std::vector<uint32_t> index;  // operations with bytes to move, in order
    size_t next = 0;              // position in `index` of the first byte that is not posted
    uint64_t within = 0;
    size_t done = 0;
    size_t outstanding = 0;  // work requests
    std::atomic<bool> finished{false};
    Failure failure;

    bool exhausted() const { return next == index.size(); }
};

class Queue {
public:
    Queue(std::shared_ptr<RdmaDevice> device, int depth, int segments, size_t staging_bytes);
    ~Queue();

    QueuePair& pair() { return pair_; }
    bool open();

    void submit(Part& part);
    // Takes completions and posts what there is room for; whether the part has finished.
    bool step(Part& part);
    // Ends a part: takes it back where nothing of it is under way, otherwise cuts the connection.
    void end(Part& part, uint8_t status, const std::string& why);
    void cut(uint8_t status, const std::string& why);

    // A thread that wants to sleep: whether it is the one that watches the channel. If so, `resign` follows.
    enum class Watch { kLeads, kFollows, kProgress };
    Watch watch(Part& part);
    void resign();
    void follow(const Part& part, uint64_t until_ns);
    int channel_fd() const { return pair_.channel_fd(); }
    int wake_fd() const { return wake_; }
    uint64_t staged_bytes() const { return staged_total_.load(std::memory_order_relaxed); }

private:
    struct Sent {
        Part* part;
        size_t first;    // position in the part's index
        uint64_t skip;   // bytes of the first operation that went before
        size_t touched;  // positions from `first` that it touches
        size_t done;     // positions of the part that are complete with it
        uint32_t length;
        bool staged;
        uint64_t at, span;  // in the staging ring; the span with what was skipped at its end
    };

    bool build(Part& part, ibv::SendWr& wr, ibv::Sge* segments, Sent& sent);
    bool stage(uint32_t length, Sent& sent);
    void copy(const Sent& sent, bool out);
    void pump();
    bool reap();
    void complete_until(uint64_t end);
    void fail(const ibv::Wc& wc);
    void sever(const Part* owner, uint8_t status, bool refused, const std::string& why);
    void finish(Part& part);

    std::mutex mutex_;
    std::condition_variable changed_;
    QueuePair pair_;
    const size_t depth_, staging_bytes_;
    std::vector<Sent> ring_;
    uint64_t head_ = 0, tail_ = 0;  // outstanding: [head, tail)
    size_t unsignalled_ = 0;
    uint64_t unsignalled_span_ = 0;
    std::deque<Part*> waiting_;
    std::vector<Part*> parts_;  // submitted and not finished
    bool led_ = false;
    int wake_ = -1;
    uint8_t* staging_ = nullptr;
    std::unique_ptr<Memory> staging_memory_;
    uint64_t stage_head_ = 0, stage_tail_ = 0;
    std::atomic<uint64_t> staged_total_{0};
};

}  // namespace mf::verbs
