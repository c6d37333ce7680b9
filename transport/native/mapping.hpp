// Mapped regions and the table that gives out handles for them.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace mf {

// One shared mapping of a file; unmapped when its last holder (a handle, a numpy view) is gone.
class Mapping {
public:
    Mapping(int fd, size_t size_bytes, bool writable);  // throws std::system_error; keeps no reference to fd
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    uint8_t* base() const { return base_; }
    size_t size_bytes() const { return size_bytes_; }
    bool writable() const { return writable_; }

    // Enters a range (offset a multiple of the page size) into this process's page tables, and zeroes what was only
    // allocated so far. Best effort: false where the kernel can't (before 5.14) or a signal came.
    bool prefault(size_t offset, size_t length) const;

private:
    uint8_t* base_;
    size_t size_bytes_;
    bool writable_;
};

// The operations of a batch, as pointers into the caller's columns.
struct Columns {
    size_t count = 0;
    const uint64_t* local = nullptr;
    const int32_t* region = nullptr;
    const uint64_t* offset = nullptr;
    const uint64_t* length = nullptr;
    const int32_t* group = nullptr;  // or null: no digests
    uint64_t* digest = nullptr;
    size_t group_count = 0;
    uint8_t* status = nullptr;
};

// Values of the status column.
enum Status : uint8_t { kDone = 0, kNotDone = 1, kOutOfBounds = 2, kRegionGone = 3, kNotWritable = 4 };

// Handles are small integers, used again only after detach. All tables share one lock, held for the check of a batch
// but never during a copy; a fork can therefore take it and leave the child with a usable table.
class Table {
public:
    Table();
    ~Table();

    int32_t attach(std::shared_ptr<Mapping> mapping);
    // Waits for the batches that use the handle; false: unknown handle (or another thread is detaching it).
    bool detach(int32_t handle);
    std::shared_ptr<Mapping> find(int32_t handle) const;  // null: unknown handle

    // Checks every operation and pins the regions they name, or pins nothing and marks the operations at fault in
    // the status column. On success *total is the number of bytes (saturated). `pins` must be given to release().
    Status admit(const Columns& columns, bool write, std::vector<int32_t>& pins, uint64_t* total);
    void release(const std::vector<int32_t>& pins);

    // The base of a pinned region; needs no lock, as a pinned slot doesn't change.
    uint8_t* base(int32_t handle) const { return slot(handle).base; }

private:
    struct Slot {
        uint8_t* base = nullptr;
        uint64_t size_bytes = 0;
        uint64_t mark = 0;  // number of the last batch that pinned it
        uint32_t users = 0;
        bool live = false;  // may be named by new batches
        bool writable = false;
        std::shared_ptr<Mapping> mapping;
    };
    // Slots never move: a copy reads them without the lock while attach() adds more.
    static constexpr size_t kChunkSlots = 64;
    static constexpr size_t kChunks = 1024;

    Slot& slot(int32_t handle) const { return chunks_[handle / kChunkSlots][handle % kChunkSlots]; }
    Slot* live(int32_t handle) const {
        return handle >= 0 && static_cast<size_t>(handle) < used_ && slot(handle).live ? &slot(handle) : nullptr;
    }
    Status check(const Columns& columns, size_t i, bool write) const;

    std::unique_ptr<Slot[]> chunks_[kChunks];
    size_t used_ = 0;
    std::vector<int32_t> free_;
    uint64_t batch_ = 0;
    std::condition_variable idle_;
};

}  // namespace mf
