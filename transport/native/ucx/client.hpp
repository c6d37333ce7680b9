// The client's side: handles, connections to owners, batches on their way.
//
// A connection is one UCX worker with one endpoint. It is cut, when a batch runs out of time or its owner is lost, by
// destroying the worker: after that nothing touches local memory any more. The next batch connects anew.
// Locking: a connection's lock is held for every call of UCX on its worker, so callbacks run under it. A group's lock is
// held while it connects. Never two connections' locks at once, and no group's lock inside a connection's.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "../digest.hpp"
#include "handshake.hpp"
#include "library.hpp"
#include "messages.hpp"
#include "owner.hpp"

namespace mf {

// Values of the status column; as in transport/base.py.
enum : uint8_t {
    kStDone = 0,
    kStNotDone = 1,
    kStOutOfBounds = 2,
    kStRegionGone = 3,
    kStNotWritable = 4,
    kStPeerLost = 5,
    kStDenied = 6,
    kStTimedOut = 7,
    kStSent = 100  // inside only: a write that UCX has finished with here, not yet known to have arrived
};

struct Target {
    std::string address;
    uint16_t port;
    bool operator==(const Target& other) const { return address == other.address && port == other.port; }
};

struct OwnerName {
    Nonce nonce{};
    std::vector<Target> targets;  // tried in order
};

struct RemoteRegion {
    uint64_t region_id;
    uint64_t serial;
    uint64_t base;
    uint64_t size_bytes;
    std::string key;
};

struct Failure {
    uint8_t status = kStDone;
    std::string why;
};

class Batch;
class Connection;
class Client;

// A part of a batch on one connection.
struct Share {
    Batch* batch = nullptr;
    std::shared_ptr<Connection> connection;
    size_t in_flight = 0;  // requests that UCX has
    bool posting = false;
    bool flushing = false;
    bool flushed = false;
    bool over = false;
    Failure failure;
    // By messages (see messages.hpp): what is not answered yet.
    struct Chunk {
        uint8_t* local;
        uint32_t length;
        uint32_t first, count;  // operations
    };
    uint32_t number = 0;
    size_t awaited = 0;
    bool refused = false;  // the owner refused some of it
    Digest digest;
    int32_t group = -1;  // that is being hashed
    std::vector<Chunk> chunks;
    std::vector<Message> headers;
    std::vector<std::vector<Entry>> requests;
    std::vector<std::vector<uint8_t>> packs;
};

// Neighbouring operations that travel as one.
struct Run {
    Share* share;
    uint32_t first, count;
};

class Connection : public std::enable_shared_from_this<Connection> {
public:
    Connection(std::shared_ptr<UcxContext> context, bool spin, bool one_sided);
    ~Connection();

    // Connects and says hello; throws UcxError. `regions` with their indices; `there` tells which the owner has.
    void open(const OwnerName& owner, const Nonce& identity, const std::vector<RegionName>& regions,
              std::vector<uint8_t>& there, uint64_t deadline_ns);
    // Asks about further regions; throws UcxError (and the connection is no good any more).
    void ask(const OwnerName& owner, const Nonce& identity, const std::vector<RegionName>& regions,
             std::vector<uint8_t>& there, uint64_t deadline_ns);
    void cut(uint8_t status, const std::string& why);
    bool usable() const { return worker_ != nullptr && !failed_; }
    // Usable, after a look whether anything has come that says otherwise.
    bool alive();
    std::string lanes();
    // Whether bytes travel as messages that the owner carries out.
    bool by_messages() const { return by_messages_; }
    // The handle at this index is going to mean another region.
    void forget(size_t index);

private:
    friend class Batch;

    static void on_error(void*, ucp::Endpoint*, ucp::Status);
    static ucp::Status on_reply(void*, const void*, size_t, void*, size_t, const ucp::AmReceiveParam*);
    static ucp::Status on_welcome(void*, const void*, size_t, void*, size_t, const ucp::AmReceiveParam*);
    void connect_to(const Target& target);
    bool try_all(const OwnerName& owner, const Nonce& identity, const std::vector<RegionName>& regions,
                 std::vector<uint8_t>& there, uint64_t deadline_ns, UcxError& last);
    void exchange(const OwnerName& owner, const Nonce& identity, const std::vector<RegionName>& regions,
                  std::vector<uint8_t>& there, uint64_t deadline_ns);
    void drop_endpoint();
    void decide_path();
    ucp::RemoteKey* key(size_t index, const std::string& packed);  // throws UcxError
    // Sleeps until something may have happened, or the deadline. The lock is given up meanwhile.
    void sleep(std::unique_lock<std::mutex>& guard, int also, uint64_t deadline_ns);

    std::shared_ptr<UcxContext> context_;
    bool spin_;
    std::mutex lock_;
    ucp::Worker* worker_ = nullptr;
    ucp::Endpoint* endpoint_ = nullptr;
    int events_ = -1;
    std::atomic<bool> failed_{false};
    ucp::Status why_ = ucp::kOk;
    std::vector<ucp::RemoteKey*> keys_;
    std::vector<Share*> shares_;
    std::unordered_map<uint32_t, Share*> awaited_;
    uint32_t next_number_ = 0;
    uint32_t next_sequence_ = 0;
    bool one_sided_;
    bool by_messages_ = true;
    uint32_t hello_number_ = 0;
    bool welcomed_ = false;
    Welcome welcome_{};
    std::vector<uint8_t> welcome_body_;
};

// All connections to one life of one owner.
struct Group {
    OwnerName owner;
    std::timed_mutex lock;
    std::vector<std::shared_ptr<Connection>> lanes;
    std::vector<size_t> handles;            // that belong to it


};

class Client {
public:
    // `one_sided`: the configuration has no transports but those with remote memory access of their own.
    Client(std::shared_ptr<UcxContext> context, const Nonce& identity, unsigned lanes, bool spin, bool one_sided,
           uint64_t limit_ns);
    ~Client();

    // Throws UcxError.
    int32_t connect(const OwnerName& owner, const RemoteRegion& region, bool writable, uint64_t deadline_ns);
    bool disconnect(int32_t handle);
    uint64_t size_of(int32_t handle) const;  // 0: not connected
    void close();
    uint64_t connects() const { return connects_; }
    uint64_t cuts() const { return cuts_; }
    size_t connections() const;
    // Whether there are connections, and every one carries messages: then operations are performed in order.
    bool in_order() const { return every_connection(true); }
    // Whether there are connections, and every one has remote memory access: then device memory can be moved.
    bool remote_access() const { return every_connection(false); }
    std::vector<std::string> lanes() const;

private:
    friend class Batch;
    bool every_connection(bool by_messages) const;
    struct Handle {
        std::shared_ptr<Group> group;
        RemoteRegion region;
        bool writable = false;
        bool live = false;
        std::atomic<bool> gone{false};  // the owner withdrew it
        size_t users = 0;
    };

    void tell_others(Group& group, const std::shared_ptr<Connection>& but, const RegionName& region,
                     uint64_t deadline_ns);
    std::shared_ptr<Connection> lane(Group& group, size_t number, uint64_t deadline_ns, Failure& failure);

    std::shared_ptr<UcxContext> context_;
    Nonce identity_;
    unsigned lanes_;
    bool spin_;
    bool one_sided_;
    uint64_t limit_ns_;
    mutable std::mutex lock_;
    std::condition_variable idle_;
    std::vector<std::unique_ptr<Handle>> handles_;
    std::vector<std::shared_ptr<Group>> groups_;
    std::atomic<uint64_t> connects_{0}, cuts_{0};
    bool closed_ = false;
    int pid_;
};

struct BatchColumns {
    size_t count = 0;
    const uint64_t* local = nullptr;
    const int32_t* region = nullptr;
    const uint64_t* offset = nullptr;
    const uint64_t* length = nullptr;
    uint8_t* status = nullptr;
    const int32_t* group = nullptr;  // or null: no digests
    uint64_t* digest = nullptr;
};

class Batch {
public:
    // Checks everything; `refusal()` is not 0 where the batch was refused. Otherwise it is on its way.
    Batch(Client& client, const BatchColumns& columns, bool write, uint64_t deadline_ns, unsigned lanes,
          int memory_type);
    ~Batch();
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    uint8_t refusal() const { return refusal_; }
    bool poll();
    // Until everything is terminal; returns the operations done. Ends a slice early at `until_ns` (0: never), then
    // `finished()` is false: for signals to be looked at.
    void wait(uint64_t until_ns);
    void abandon();
    bool finished() const { return finished_; }
    size_t done() const;
    const Failure& failure() const { return failure_; }
    // Whether the digest column was filled on the way: each part just before it was sent, which keeps both ends busy.
    bool hashed() const { return write_ && !shares_.empty() && !unhashed_; }

private:
    friend class Connection;
    static void on_done(void*, ucp::Status, void*);
    static void on_flushed(void*, ucp::Status, void*);

    uint8_t admit();
    void post(unsigned lanes);
    void post_on(Share& share, size_t begin, size_t end, const std::vector<uint32_t>& order);
    void put_or_get(Share& share, size_t begin, size_t end, const std::vector<uint32_t>& order,
                    std::unique_lock<std::mutex>& guard);
    void send_messages(Share& share, size_t begin, size_t end, const std::vector<uint32_t>& order,
                       std::unique_lock<std::mutex>& guard);
    void cut_up(Share& share, size_t begin, size_t end, const std::vector<uint32_t>& order,
                std::vector<uint64_t>& serials, std::vector<uint64_t>& offsets);
    bool send(Share& share, Message message, const void* data, size_t bytes, std::unique_lock<std::mutex>& guard);
    bool send_writes(Share& share, const std::vector<uint64_t>& serials, const std::vector<uint64_t>& offsets,
                     std::unique_lock<std::mutex>& guard);
    bool arrived_one(Share& share, uint32_t chunk, bool good, const void* data, size_t bytes);
    size_t merge(size_t at, size_t end, const std::vector<uint32_t>& order, uint64_t most, uint64_t& bytes) const;
    bool gone(uint32_t i);
    void hash(Share& share, const Share::Chunk& chunk);
    void refuse(Share& share, const Share::Chunk& chunk);
    void arrived(Share& share, const Message& message, const void* data, size_t bytes);
    static void on_sent(void*, ucp::Status, void*);
    void settle(Share& share);
    void fail(Share& share, uint8_t status, const std::string& why);
    void finish();
    void set(const Run& run, uint8_t status);
    void cut(uint8_t status, const char* why);

    Client& client_;
    BatchColumns columns_;
    bool write_;
    uint64_t deadline_ns_;
    int memory_type_;
    uint8_t refusal_ = 0;
    bool finished_ = false;
    std::atomic<size_t> open_shares_{0};
    std::atomic<int> sleeper_{-1};
    std::vector<std::unique_ptr<Share>> shares_;
    std::vector<std::unique_ptr<Run[]>> runs_;
    std::vector<int32_t> pinned_;
    std::vector<Client::Handle*> targets_;  // by handle; pinned, so they stay
    std::vector<uint32_t> pieces_;  // of operations that travel in several chunks: how many are missing
    bool unhashed_ = false;
    Failure failure_;
};

}  // namespace mf
