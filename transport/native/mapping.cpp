#include "mapping.hpp"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <stdexcept>
#include <system_error>

namespace mf {

Mapping::Mapping(int fd, size_t size_bytes, bool writable) : size_bytes_(size_bytes), writable_(writable) {
    void* at = mmap(nullptr, size_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    // Advice only: huge pages where the system offers them for shared memory.
    madvise(at, size_bytes, MADV_HUGEPAGE);
    base_ = static_cast<uint8_t*>(at);
}

Mapping::~Mapping() { munmap(base_, size_bytes_); }

bool Mapping::prefault(size_t offset, size_t length) const {
    if (offset > size_bytes_ || length > size_bytes_ - offset) return false;
#ifdef MADV_POPULATE_READ
    return madvise(base_ + offset, length, writable_ ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) == 0;
#else
    return false;
#endif
}

namespace {

std::mutex& tables_lock() {
    static auto* const lock = new std::mutex;  // never destroyed: detached threads may outlive static destructors
    return *lock;
}

std::vector<Table*>& tables() {
    static auto* const all = new std::vector<Table*>;
    return *all;
}

// A sum that stays at the maximum instead of wrapping.
uint64_t saturating_add(uint64_t a, uint64_t b) {
    uint64_t sum;
    return __builtin_add_overflow(a, b, &sum) ? UINT64_MAX : sum;
}

}  // namespace

Table::Table() {
    static const int hooked = pthread_atfork([] { tables_lock().lock(); }, [] { tables_lock().unlock(); },
                                             [] {
                                                 for (Table* table : tables()) {
                                                     // The threads that were copying don't exist in the child.
                                                     for (size_t i = 0; i < table->used_; ++i)
                                                         table->slot(static_cast<int32_t>(i)).users = 0;
                                                     new (&table->idle_) std::condition_variable;
                                                 }
                                                 tables_lock().unlock();
                                             });
    if (hooked != 0) throw std::bad_alloc();
    std::lock_guard guard(tables_lock());
    tables().push_back(this);
}

Table::~Table() {
    std::lock_guard guard(tables_lock());
    auto& all = tables();
    all.erase(std::find(all.begin(), all.end(), this));
}

int32_t Table::attach(std::shared_ptr<Mapping> mapping) {
    std::lock_guard guard(tables_lock());
    int32_t handle;
    if (!free_.empty()) {
        // The smallest free one, so that handles stay small.
        const auto smallest = std::min_element(free_.begin(), free_.end());
        handle = *smallest;
        free_.erase(smallest);
    } else {
        if (used_ == kChunks * kChunkSlots) throw std::length_error("too many connected regions");
        auto& chunk = chunks_[used_ / kChunkSlots];
        if (!chunk) chunk = std::make_unique<Slot[]>(kChunkSlots);
        handle = static_cast<int32_t>(used_++);
    }
    Slot& slot = this->slot(handle);
    slot.base = mapping->base();
    slot.size_bytes = mapping->size_bytes();
    slot.writable = mapping->writable();
    slot.users = 0;
    slot.live = true;
    slot.mapping = std::move(mapping);
    return handle;
}

bool Table::detach(int32_t handle) {
    std::shared_ptr<Mapping> last;  // unmaps, which takes long, after the lock is given back
    std::unique_lock guard(tables_lock());
    Slot* slot = live(handle);
    if (slot == nullptr) return false;
    slot->live = false;
    idle_.wait(guard, [&] { return slot->users == 0; });
    last = std::move(slot->mapping);
    slot->base = nullptr;
    slot->size_bytes = 0;
    free_.push_back(handle);
    return true;
}

std::shared_ptr<Mapping> Table::find(int32_t handle) const {
    std::lock_guard guard(tables_lock());
    const Slot* slot = live(handle);
    return slot == nullptr ? nullptr : slot->mapping;
}

Status Table::check(const Columns& columns, size_t i, bool write) const {
    const Slot* slot = live(columns.region[i]);
    if (slot == nullptr) return kRegionGone;
    if (write && !slot->writable) return kNotWritable;
    const uint64_t length = columns.length[i];
    const uint64_t local = columns.local[i];
    // Written so that no sum can wrap.
    if (length > slot->size_bytes || columns.offset[i] > slot->size_bytes - length) return kOutOfBounds;
    if (length != 0 && (local == 0 || local > UINTPTR_MAX - length)) return kOutOfBounds;
    return kDone;
}

Status Table::admit(const Columns& columns, bool write, std::vector<int32_t>& pins, uint64_t* total) {
    pins.clear();
    uint64_t bytes = 0;
    std::lock_guard guard(tables_lock());
    ++batch_;
    for (size_t i = 0; i < columns.count; ++i) {
        const Status status = check(columns, i, write);
        if (status != kDone) {
            for (size_t k = 0; k < columns.count; ++k) {
                const Status each = check(columns, k, write);
                columns.status[k] = each == kDone ? kNotDone : each;
            }
            return status;
        }
        Slot& slot = this->slot(columns.region[i]);
        if (slot.mark != batch_) {
            slot.mark = batch_;
            pins.push_back(columns.region[i]);
        }
        bytes = saturating_add(bytes, columns.length[i]);
    }
    for (const int32_t handle : pins) ++slot(handle).users;
    *total = bytes;
    return kDone;
}

void Table::release(const std::vector<int32_t>& pins) {
    bool wake = false;
    std::lock_guard guard(tables_lock());
    for (const int32_t handle : pins) {
        Slot& slot = this->slot(handle);
        --slot.users;
        wake |= slot.users == 0 && !slot.live;
    }
    if (wake) idle_.notify_all();
}

}  // namespace mf
