// The part of libucp's binary interface that is used here, declared anew: the library is chosen at run time, and neither
// its headers nor the library need be there when this is built. UCX keeps these layouts stable over releases: fields
// are added at the end and announced by mask bits.
// Source: ucp/api/ucp.h and ucs/type/status.h of UCX 1.13 to 1.22; tests/transport/test_ucx_abi.py holds every size,
// offset and constant against the headers of the `libucx` wheel.
#pragma once

#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace mf::ucp {

using Status = int8_t;  // a packed enum
inline constexpr Status kOk = 0, kInProgress = 1, kNoMemory = -4, kUnreachable = -6, kInvalidAddress = -7, kBusy = -15,
                        kCanceled = -16, kExceedsLimit = -21, kUnsupported = -22, kRejected = -23, kNotConnected = -24,
                        kConnectionReset = -25, kEndpointTimeout = -80, kLast = -100;

inline bool is_error(const void* p) { return reinterpret_cast<uintptr_t>(p) >= static_cast<uintptr_t>(intptr_t{kLast}); }
inline bool is_request(const void* p) { return p != nullptr && !is_error(p); }
inline Status status_of(const void* p) {
    return is_request(p) ? kInProgress : static_cast<Status>(reinterpret_cast<intptr_t>(p));
}

struct Context;
struct Config;
struct Worker;
struct Endpoint;
struct Listener;
struct Memory;
struct RemoteKey;
struct ConnectionRequest;

enum Feature : uint64_t { kFeatureRma = 1 << 1, kFeatureWakeup = 1 << 4, kFeatureAm = 1 << 6 };

struct Params {
    uint64_t field_mask;
    uint64_t features;
    size_t request_size;
    void (*request_init)(void*);
    void (*request_cleanup)(void*);
    uint64_t tag_sender_mask;
    int mt_workers_shared;
    size_t estimated_num_eps;
    size_t estimated_num_ppn;
    const char* name;
};
inline constexpr uint64_t kParamFeatures = 1 << 0, kParamMtWorkersShared = 1 << 5, kParamName = 1 << 8;

struct WorkerParams {
    uint64_t field_mask;
    int thread_mode;
    unsigned long cpu_mask[1024 / (8 * sizeof(unsigned long))];
    unsigned events;
    void* user_data;
    int event_fd;
    uint64_t flags;
    const char* name;
    size_t am_alignment;
    uint64_t client_id;
};
inline constexpr uint64_t kWorkerThreadMode = 1 << 0, kWorkerFlags = 1 << 5;
inline constexpr uint64_t kWorkerIgnoreRequestLeak = 1;
inline constexpr int kThreadSerialized = 1;

struct SocketAddress {
    const sockaddr* address;
    socklen_t length;
};

struct ErrorHandler {
    void (*callback)(void* argument, Endpoint*, Status);
    void* argument;
};

struct EndpointParams {
    uint64_t field_mask;
    const void* address;
    int error_mode;
    ErrorHandler error_handler;
    void* user_data;
    unsigned flags;
    SocketAddress remote;
    ConnectionRequest* request;
    const char* name;
    SocketAddress local;
};
inline constexpr uint64_t kEpErrorMode = 1 << 1, kEpErrorHandler = 1 << 2, kEpSocketAddress = 1 << 4, kEpFlags = 1 << 5,
                          kEpConnectionRequest = 1 << 6;
inline constexpr unsigned kEpClientServer = 1;
inline constexpr int kErrorModePeer = 1;
inline constexpr uint32_t kCloseForce = 1;

struct ListenerParams {
    uint64_t field_mask;
    SocketAddress address;
    struct {
        void (*callback)(Endpoint*, void*);
        void* argument;
    } accept_handler;
    struct {
        void (*callback)(ConnectionRequest*, void*);
        void* argument;
    } connection_handler;
};
inline constexpr uint64_t kListenerAddress = 1 << 0, kListenerConnectionHandler = 1 << 2;

struct ListenerAttributes {
    uint64_t field_mask;
    sockaddr_storage address;
};

struct MapParams {
    uint64_t field_mask;
    void* address;
    size_t length;
    unsigned flags;
    unsigned protection;
    int memory_type;
    const void* exported;
};
inline constexpr uint64_t kMapAddress = 1 << 0, kMapLength = 1 << 1, kMapMemoryType = 1 << 4;

using SendCallback = void (*)(void* request, Status, void* user_data);

struct RequestParam {
    uint32_t mask;
    uint32_t flags;
    void* request;
    SendCallback callback;
    uint64_t datatype;
    void* user_data;
    void* reply_buffer;
    int memory_type;
    void* recv_info;
    Memory* memory;
};
inline constexpr uint32_t kOpCallback = 1 << 1, kOpUserData = 1 << 2, kOpFlags = 1 << 4, kOpMemoryType = 1 << 6,
                          kOpMemory = 1 << 8;

struct AmReceiveParam {
    uint64_t mask;
    Endpoint* reply;
};
using AmCallback = Status (*)(void* argument, const void* header, size_t header_length, void* data, size_t length,
                              const AmReceiveParam*);
struct AmHandlerParam {
    uint64_t field_mask;
    unsigned id;
    uint32_t flags;
    AmCallback callback;
    void* argument;
};
inline constexpr uint64_t kAmId = 1 << 0, kAmFlags = 1 << 1, kAmCallback = 1 << 2, kAmArgument = 1 << 3;
inline constexpr uint32_t kAmWholeMessage = 1;
inline constexpr uint32_t kAmSendEager = 1 << 1;

struct TransportEntry {
    const char* transport;
    const char* device;
};
struct EndpointAttributes {
    uint64_t field_mask;
    char name[32];
    sockaddr_storage local;
    sockaddr_storage remote;
    struct {
        TransportEntry* entries;
        unsigned count;
        size_t entry_bytes;
    } transports;
    void* user_data;
};
inline constexpr uint64_t kEpTransports = 1 << 3;

}  // namespace mf::ucp
