// libucp, opened at run time, and a context of it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "abi.hpp"

namespace mf {

// What a call of UCX answered; `what` is for people.
struct UcxError {
    ucp::Status status;
    std::string what;
};

// The functions of one libucp. Never closed: UCX starts threads and hooks of its own.
struct Library {
    std::string path;
    std::string version;

    ucp::Status (*config_read)(const char*, const char*, ucp::Config**);
    void (*config_release)(ucp::Config*);
    ucp::Status (*config_modify)(ucp::Config*, const char*, const char*);
    const char* (*version_string)();
    ucp::Status (*init_version)(unsigned, unsigned, const ucp::Params*, const ucp::Config*, ucp::Context**);
    void (*cleanup)(ucp::Context*);
    void (*context_print_info)(ucp::Context*, FILE*);
    ucp::Status (*worker_create)(ucp::Context*, const ucp::WorkerParams*, ucp::Worker**);
    void (*worker_destroy)(ucp::Worker*);
    unsigned (*worker_progress)(ucp::Worker*);
    ucp::Status (*worker_get_efd)(ucp::Worker*, int*);
    ucp::Status (*worker_arm)(ucp::Worker*);
    ucp::Status (*listener_create)(ucp::Worker*, const ucp::ListenerParams*, ucp::Listener**);
    void (*listener_destroy)(ucp::Listener*);
    ucp::Status (*listener_query)(ucp::Listener*, ucp::ListenerAttributes*);
    ucp::Status (*listener_reject)(ucp::Listener*, ucp::ConnectionRequest*);
    ucp::Status (*ep_create)(ucp::Worker*, const ucp::EndpointParams*, ucp::Endpoint**);
    void* (*ep_close)(ucp::Endpoint*, const ucp::RequestParam*);
    void* (*ep_flush)(ucp::Endpoint*, const ucp::RequestParam*);
    ucp::Status (*ep_query)(ucp::Endpoint*, ucp::EndpointAttributes*);  // null before UCX 1.12
    ucp::Status (*mem_map)(ucp::Context*, const ucp::MapParams*, ucp::Memory**);
    ucp::Status (*mem_unmap)(ucp::Context*, ucp::Memory*);
    ucp::Status (*rkey_pack)(ucp::Context*, ucp::Memory*, void**, size_t*);
    void (*rkey_buffer_release)(void*);
    ucp::Status (*ep_rkey_unpack)(ucp::Endpoint*, const void*, ucp::RemoteKey**);
    void (*rkey_destroy)(ucp::RemoteKey*);
    ucp::Status (*set_am_handler)(ucp::Worker*, const ucp::AmHandlerParam*);
    void* (*am_send)(ucp::Endpoint*, unsigned, const void*, size_t, const void*, size_t, const ucp::RequestParam*);
    void* (*put)(ucp::Endpoint*, const void*, size_t, uint64_t, ucp::RemoteKey*, const ucp::RequestParam*);
    void* (*get)(ucp::Endpoint*, void*, size_t, uint64_t, ucp::RemoteKey*, const ucp::RequestParam*);
    ucp::Status (*request_check_status)(void*);
    void (*request_free)(void*);
    const char* (*status_string)(ucp::Status);
};

// Opens a libucp (once per path); throws std::runtime_error that says what is wrong with it.
std::shared_ptr<const Library> open_library(const std::string& path);

using Settings = std::vector<std::pair<std::string, std::string>>;

// A context: one configuration. Shared by the workers made from it.
class UcxContext {
public:
    // Throws std::runtime_error; a setting that this UCX does not know is named.
    UcxContext(std::shared_ptr<const Library> library, const Settings& settings);
    ~UcxContext();
    UcxContext(const UcxContext&) = delete;
    UcxContext& operator=(const UcxContext&) = delete;

    const Library& api() const { return *library_; }
    ucp::Context* get() const { return context_; }
    std::string describe(ucp::Status status) const { return api().status_string(status); }
    // Devices and transports as UCX prints them.
    std::string information() const;

    ucp::Worker* make_worker() const;  // throws UcxError

private:
    std::shared_ptr<const Library> library_;
    ucp::Context* context_ = nullptr;
};

}  // namespace mf
