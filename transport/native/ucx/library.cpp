#include "library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

namespace mf {
namespace {

template <typename F>
void find(void* handle, const std::string& path, const char* name, F& out, bool optional = false) {
    out = reinterpret_cast<F>(dlsym(handle, name));
    if (out == nullptr && !optional)
        throw std::runtime_error(path + " has no " + name + ": it is no libucp, or one older than 1.11");
}

// UCX reads where its log goes when it is loaded, and its default is standard output, which is a program's own.
class LogToStandardError {
public:
    LogToStandardError() : ours_(getenv("UCX_LOG_FILE") == nullptr) {
        if (ours_) setenv("UCX_LOG_FILE", "stderr", 1);
    }
    ~LogToStandardError() {
        if (ours_) unsetenv("UCX_LOG_FILE");
    }

private:
    bool ours_;
};

std::shared_ptr<const Library> load(const std::string& path) {
    void* handle;
    {
        LogToStandardError scope;
        // RTLD_DEEPBIND is not used: UCX's parts must find one another's symbols.
        handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    }
    if (handle == nullptr) throw std::runtime_error(dlerror());
    auto api = std::make_shared<Library>();
    Library& a = *api;
    find(handle, path, "ucp_config_read", a.config_read);
    find(handle, path, "ucp_config_release", a.config_release);
    find(handle, path, "ucp_config_modify", a.config_modify);
    find(handle, path, "ucp_get_version_string", a.version_string);
    find(handle, path, "ucp_init_version", a.init_version);
    find(handle, path, "ucp_cleanup", a.cleanup);
    find(handle, path, "ucp_context_print_info", a.context_print_info);
    find(handle, path, "ucp_worker_create", a.worker_create);
    find(handle, path, "ucp_worker_destroy", a.worker_destroy);
    find(handle, path, "ucp_worker_progress", a.worker_progress);
    find(handle, path, "ucp_worker_get_efd", a.worker_get_efd);
    find(handle, path, "ucp_worker_arm", a.worker_arm);
    find(handle, path, "ucp_listener_create", a.listener_create);
    find(handle, path, "ucp_listener_destroy", a.listener_destroy);
    find(handle, path, "ucp_listener_query", a.listener_query);
    find(handle, path, "ucp_listener_reject", a.listener_reject);
    find(handle, path, "ucp_ep_create", a.ep_create);
    find(handle, path, "ucp_ep_close_nbx", a.ep_close);
    find(handle, path, "ucp_ep_flush_nbx", a.ep_flush);
    find(handle, path, "ucp_ep_query", a.ep_query, true);
    find(handle, path, "ucp_mem_map", a.mem_map);
    find(handle, path, "ucp_mem_unmap", a.mem_unmap);
    find(handle, path, "ucp_rkey_pack", a.rkey_pack);
    find(handle, path, "ucp_rkey_buffer_release", a.rkey_buffer_release);
    find(handle, path, "ucp_ep_rkey_unpack", a.ep_rkey_unpack);
    find(handle, path, "ucp_rkey_destroy", a.rkey_destroy);
    find(handle, path, "ucp_worker_set_am_recv_handler", a.set_am_handler);
    find(handle, path, "ucp_am_send_nbx", a.am_send);
    find(handle, path, "ucp_put_nbx", a.put);
    find(handle, path, "ucp_get_nbx", a.get);
    find(handle, path, "ucp_request_check_status", a.request_check_status);
    find(handle, path, "ucp_request_free", a.request_free);
    // In libucs, which libucp brings along.
    find(handle, path, "ucs_status_string", a.status_string);
    Dl_info found{};
    a.path = dladdr(reinterpret_cast<void*>(a.put), &found) != 0 && found.dli_fname != nullptr ? found.dli_fname : path;
    a.version = a.version_string();
    return api;
}

}  // namespace

std::shared_ptr<const Library> open_library(const std::string& path) {
    static std::mutex lock;
    static std::map<std::string, std::shared_ptr<const Library>> opened;
    std::lock_guard guard(lock);
    auto& found = opened[path];
    if (!found) found = load(path);
    return found;
}

UcxContext::UcxContext(std::shared_ptr<const Library> library, const Settings& settings) : library_(std::move(library)) {
    const Library& a = api();
    ucp::Config* config = nullptr;
    ucp::Status status = a.config_read(nullptr, nullptr, &config);
    if (status != ucp::kOk) throw std::runtime_error("UCX cannot read its configuration: " + describe(status));
    for (const auto& [name, value] : settings) {
        status = a.config_modify(config, name.c_str(), value.c_str());
        if (status != ucp::kOk) {
            a.config_release(config);
            throw std::runtime_error("UCX " + a.version + " does not take " + name + "=" + value + ": " +
                                     describe(status));
        }
    }
    ucp::Params params{};
    params.field_mask = ucp::kParamFeatures | ucp::kParamMtWorkersShared;
    params.features = ucp::kFeatureRma | ucp::kFeatureAm | ucp::kFeatureWakeup;
    params.mt_workers_shared = 1;
    // The oldest interface that has all that is used: newer libraries take it without a word.
    status = a.init_version(1, 11, &params, config, &context_);
    a.config_release(config);
    if (status != ucp::kOk)
        throw std::runtime_error("UCX " + a.version + " cannot start: " + describe(status) +
                                 " (no usable device for the transports that were asked for?)");
}

UcxContext::~UcxContext() { api().cleanup(context_); }

std::string UcxContext::information() const {
    char* text = nullptr;
    size_t size = 0;
    FILE* stream = open_memstream(&text, &size);
    if (stream == nullptr) return "";
    api().context_print_info(context_, stream);
    std::fclose(stream);
    std::string out(text, size);
    std::free(text);
    return out;
}

ucp::Worker* UcxContext::make_worker() const {
    ucp::WorkerParams params{};
    params.field_mask = ucp::kWorkerThreadMode | ucp::kWorkerFlags;
    params.thread_mode = ucp::kThreadSerialized;
    params.flags = ucp::kWorkerIgnoreRequestLeak;
    ucp::Worker* worker = nullptr;
    const ucp::Status status = api().worker_create(context_, &params, &worker);
    if (status != ucp::kOk) throw UcxError{status, "UCX cannot make a worker: " + describe(status)};
    return worker;
}

}  // namespace mf
