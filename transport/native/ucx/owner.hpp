// The owner's side: regions lent, and the clients that are connected.
//
// Every connection has a UCX worker of its own, so that ending one is complete: destroying the worker closes its sockets
// or queue pairs, and nothing that the client sent before is carried out afterwards. One thread, which never holds the
// interpreter lock, sleeps in epoll and makes progress where UCX needs the target's processor (TCP).
#pragma once

#include <array>
#include <deque>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "handshake.hpp"
#include "library.hpp"
#include "messages.hpp"

namespace mf {

using Nonce = std::array<uint8_t, kNonceBytes>;

class Owner {
public:
    // Listens on every address (numeric; IPv4 or IPv6), all with the same or a free port (0). Throws std::runtime_error.
    Owner(std::shared_ptr<UcxContext> context, const Nonce& nonce, const std::vector<std::string>& addresses,
          uint16_t port);
    ~Owner();
    Owner(const Owner&) = delete;
    Owner& operator=(const Owner&) = delete;

    // One port for each address.
    const std::vector<uint16_t>& ports() const { return ports_; }

    struct Registration {
        uint64_t serial;
        std::string key;  // packed remote key
    };
    // Throws UcxError.
    Registration register_memory(uint64_t region_id, void* memory, size_t bytes, int memory_type);
    // Ends every connection that was told of the region, then unmaps it. False: no such registration.
    bool unregister(uint64_t region_id, uint64_t serial);
    // Ends all connections of a client; returns how many.
    size_t fence(const Nonce& identity);
    size_t connections() const;
    uint64_t accepted() const { return accepted_; }
    void close();

private:
    struct Peer {
        Owner* owner = nullptr;
        uint64_t number = 0;
        ucp::Worker* worker = nullptr;
        ucp::Endpoint* endpoint = nullptr;
        int events = -1;
        bool broken = false;
        bool known = false;  // said a valid hello
        Nonce identity{};
        std::set<uint64_t> regions;  // serials it was told of
        // Messages (see there).
        struct Wanted {
            Entry entry;
            uint32_t batch;
        };
        struct Writes {
            uint32_t done = 0, total = UINT32_MAX;
            std::vector<uint32_t> refused;
        };
        std::deque<Wanted> wanted;
        std::map<uint32_t, Writes> writes;
        size_t sending = 0;
        uint32_t sequence = 0;  // of the next message
    };
    struct Region {
        uint64_t region_id;
        ucp::Memory* memory;
        uint8_t* base;
        uint64_t bytes;
    };
    struct Sent;
    struct Door {
        ucp::Listener* listener;
    };

    static void on_request(ucp::ConnectionRequest*, void*);
    static void on_error(void*, ucp::Endpoint*, ucp::Status);
    static ucp::Status on_hello(void*, const void*, size_t, void*, size_t, const ucp::AmReceiveParam*);
    static ucp::Status on_message(void*, const void*, size_t, void*, size_t, const ucp::AmReceiveParam*);
    static void on_sent(void*, ucp::Status, void*);

    void listen(const std::string& address, uint16_t port);
    void admit(ucp::ConnectionRequest* request);
    void answer(Peer& peer, const void* header, size_t header_bytes, const void* data, size_t bytes);
    void take(Peer& peer, const Message& message, const void* data, size_t bytes);
    const Region* reach(const Peer& peer, uint64_t serial, uint64_t offset, uint64_t length) const;
    void settle(Peer& peer, uint32_t batch);
    bool pump(Peer& peer);
    void pump_small(Peer& peer);
    bool unpack(Peer& peer, const Message& message, const uint8_t* data, size_t bytes);
    void store(Peer& peer, Peer::Writes& writes, const Entry& entry, const void* data);
    void send(Peer& peer, unsigned id, std::unique_ptr<Sent> sent, const void* data, size_t bytes);
    void end(Peer& peer);
    void run();
    bool progress(ucp::Worker* worker, Peer* peer);
    void watch(int descriptor, uint64_t number);
    void reap();

    std::shared_ptr<UcxContext> context_;
    Nonce nonce_;
    mutable std::mutex lock_;  // everything below; all calls of UCX
    ucp::Worker* door_ = nullptr;
    std::vector<Door> doors_;
    std::vector<uint16_t> ports_;
    std::map<uint64_t, std::unique_ptr<Peer>> peers_;
    std::map<uint64_t, Region> regions_;  // by serial
    std::vector<ucp::ConnectionRequest*> waiting_;
    uint64_t next_peer_ = 16;
    uint64_t next_serial_;
    std::atomic<uint64_t> accepted_{0};
    int epoll_ = -1;
    int wake_ = -1;
    std::atomic<bool> stopping_{false};
    std::thread thread_;
    int pid_;
};

}  // namespace mf
