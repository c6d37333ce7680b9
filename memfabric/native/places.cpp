// PlaceTable: where blocks were last seen, so that a read needs no request; QuickReader: small reads from it.
//
// The table is bounded: when it is full, the oldest entries are overwritten. Nothing in it is ever trusted; the reader
// holds headers against it. All methods take the table's own lock for a short time and never wait for Python in between.
#include "blocks.hpp"

#include <mutex>

namespace {

inline uint64_t mix(const uint8_t *key) {
    uint64_t a, b;
    std::memcpy(&a, key, 8);
    std::memcpy(&b, key + 8, 8);
    uint64_t h = a * 0x9E3779B97F4A7C15ull ^ (b + 0xD6E8FEB86659FD93ull) * 0xC2B2AE3D27D4EB4Full;
    h ^= h >> 32;
    h *= 0xFF51AFD7ED558CCDull;
    return h ^ (h >> 29);
}

struct Entry {
    uint8_t key[16];
    int32_t slot; // of the region, in the client's numbering
    uint32_t block;
    uint64_t generation;
};

class PlaceTable {
  public:
    PlaceTable(size_t capacity, size_t touched_limit) : capacity_(capacity), touched_limit_(touched_limit) {
        if (capacity < 1 || capacity >= (size_t(1) << 31)) throw std::invalid_argument("PlaceTable: capacity");
        resize(64);
    }

    size_t size() {
        std::lock_guard<std::mutex> guard(lock_);
        return used_;
    }

    // Copies the place of a key; the caller holds the lock.
    const Entry *look(const uint8_t *key) const {
        for (size_t at = mix(key) & mask_; buckets_[at]; at = (at + 1) & mask_) {
            const Entry &entry = entries_[buckets_[at] - 1];
            if (std::memcmp(entry.key, key, 16) == 0) return &entry;
        }
        return nullptr;
    }

    nb::tuple find(Keys keys) {
        const size_t n = keys.shape(0);
        bool *known;
        int32_t *slot;
        uint32_t *block;
        uint64_t *generation;
        nb::object columns[] = {column<bool>({n}, known), column<int32_t>({n}, slot), column<uint32_t>({n}, block),
                                column<uint64_t>({n}, generation)};
        size_t found = 0;
        without_gil(n, [&] {
            std::lock_guard<std::mutex> guard(lock_);
            for (size_t i = 0; i < n; i++) {
                const Entry *entry = look(keys.data() + i * 16);
                known[i] = entry != nullptr;
                slot[i] = entry ? entry->slot : -1;
                block[i] = entry ? entry->block : 0;
                generation[i] = entry ? entry->generation : 0;
                found += entry != nullptr;
            }
        });
        return nb::make_tuple(found, columns[0], columns[1], columns[2], columns[3]);
    }

    void learn(Keys keys, Column<const int32_t> slot, Column<const uint32_t> block, Column<const uint64_t> generation) {
        const size_t n = keys.shape(0);
        require(slot.shape(0) == n && block.shape(0) == n && generation.shape(0) == n, "learn: columns differ in length");
        without_gil(n, [&] {
            std::lock_guard<std::mutex> guard(lock_);
            for (size_t i = 0; i < n; i++) {
                Entry *entry = const_cast<Entry *>(look(keys.data() + i * 16));
                if (entry == nullptr) entry = add(keys.data() + i * 16);
                entry->slot = slot.data()[i];
                entry->block = block.data()[i];
                entry->generation = generation.data()[i];
            }
        });
    }

    void forget(Keys keys) {
        const size_t n = keys.shape(0);
        without_gil(n, [&] {
            std::lock_guard<std::mutex> guard(lock_);
            for (size_t i = 0; i < n; i++) {
                const Entry *entry = look(keys.data() + i * 16);
                if (entry != nullptr) drop(size_t(entry - entries_.data()));
            }
        });
    }

    void forget_regions(Column<const int32_t> slots) {
        nb::gil_scoped_release release;
        std::lock_guard<std::mutex> guard(lock_);
        for (size_t at = 0; at < entries_.size(); at++)
            for (size_t i = 0; i < slots.shape(0); i++)
                if (live_[at] && entries_[at].slot == slots.data()[i]) drop(at);
    }

    void touch(Keys keys) {
        std::lock_guard<std::mutex> guard(lock_);
        note(keys.data(), keys.shape(0));
    }

    nb::bytes take_touched(size_t limit) {
        std::vector<uint8_t> out;
        {
            std::lock_guard<std::mutex> guard(lock_);
            const size_t bytes = std::min(touched_.size(), limit * 16);
            out.assign(touched_.begin(), touched_.begin() + ptrdiff_t(bytes));
            touched_.erase(touched_.begin(), touched_.begin() + ptrdiff_t(bytes));
        }
        return nb::bytes(reinterpret_cast<const char *>(out.data()), out.size());
    }

    // The caller holds the lock.
    void note(const uint8_t *keys, size_t n) {
        if (n == 0) return;
        // The same batch again and again is the usual case: it is reported once per ping.
        if (touched_.size() >= n * 16 && std::memcmp(touched_.data() + touched_.size() - n * 16, keys, n * 16) == 0) return;
        if (touched_.size() + n * 16 <= touched_limit_ * 16) touched_.insert(touched_.end(), keys, keys + n * 16);
    }

    std::mutex lock_;
    uint64_t quick_gets = 0, quick_blocks = 0;

  private:
    size_t capacity_, touched_limit_, used_ = 0, hand_ = 0, mask_ = 0;
    std::vector<uint32_t> buckets_; // entry + 1, 0: empty
    std::vector<Entry> entries_;
    std::vector<uint8_t> live_;
    std::vector<uint8_t> touched_;

    void resize(size_t count) {
        buckets_.assign(count, 0);
        mask_ = count - 1;
        for (size_t at = 0; at < entries_.size(); at++)
            if (live_[at]) enter(at);
    }

    void enter(size_t entry) {
        size_t at = mix(entries_[entry].key) & mask_;
        while (buckets_[at]) at = (at + 1) & mask_;
        buckets_[at] = uint32_t(entry + 1);
    }

    Entry *add(const uint8_t *key) {
        if (hand_ == capacity_) hand_ = 0;
        if (hand_ == entries_.size()) {
            entries_.emplace_back();
            live_.push_back(0);
        } else if (live_[hand_]) {
            drop(hand_);
        }
        if ((used_ + 1) * 2 > buckets_.size()) resize(buckets_.size() * 2);
        Entry *entry = &entries_[hand_];
        std::memcpy(entry->key, key, 16);
        live_[hand_] = 1;
        used_++;
        enter(hand_++);
        return entry;
    }

    void drop(size_t entry) {
        size_t hole = mix(entries_[entry].key) & mask_;
        while (buckets_[hole] != entry + 1) hole = (hole + 1) & mask_;
        for (size_t at = (hole + 1) & mask_; buckets_[at]; at = (at + 1) & mask_) {
            const size_t home = mix(entries_[buckets_[at] - 1].key) & mask_;
            if (((at - home) & mask_) >= ((at - hole) & mask_)) {
                buckets_[hole] = buckets_[at];
                hole = at;
            }
        }
        buckets_[hole] = 0;
        live_[entry] = 0;
        used_--;
    }
};

// A read of exactly n blocks into contiguous memory, all of known places, with everything allocated beforehand.
// Used by one thread at a time. The columns are those of the caller's transport batches: with `verify` one operation for each
// segment and then one for each header; without, one for each block and then the headers.
class QuickReader {
  public:
    QuickReader(PlaceTable *table, size_t n, uint64_t block_bytes, size_t segments, size_t header_stride, bool verify,
                Column<uint64_t> local, Column<int32_t> region, Column<uint64_t> offset, Column<uint64_t> length,
                Column<int32_t> group, Column<uint8_t> headers, Column<uint64_t> digests)
        : table_(table), n_(n), block_bytes_(block_bytes), segments_(segments), stride_(header_stride), verify_(verify),
          parts_(verify ? segments : 1), local_(local), region_(region), offset_(offset), length_(length), group_(group),
          headers_(headers), digests_(digests), expected_(n), keys_(n * 16) {
        require(n >= 1 && n <= (1u << 20) && segments >= 1 && segments <= 4096 && block_bytes % segments == 0 &&
                    block_bytes && block_bytes <= (1u << 30),
                "QuickReader: sizes");
        const size_t count = n * (parts_ + 1);
        require(local.shape(0) == count && region.shape(0) == count && offset.shape(0) == count &&
                    length.shape(0) == count && group.shape(0) == count,
                "QuickReader: the operation columns have another length");
        check_shape(headers.shape(0), n, stride_, segments);
        require(digests.shape(0) == n * segments, "QuickReader: one digest per block and segment");
        const uint64_t size = block_bytes / parts_;
        for (size_t i = 0; i < n * parts_; i++) {
            length.data()[i] = size;
            group.data()[i] = verify ? int32_t(i) : -1;
        }
        for (size_t i = 0; i < n; i++) {
            local.data()[n * parts_ + i] = reinterpret_cast<uintptr_t>(headers.data()) + i * stride_;
            length.data()[n * parts_ + i] = used_bytes(segments);
            group.data()[n * parts_ + i] = -1;
        }
    }

    // Fills the operations; false when this is not a case for it (the caller then takes the long way, which also says
    // what is wrong).
    bool prepare(Keys keys, nb::handle out, Table regions) {
        if (keys.shape(0) != n_) return false;
        Py_buffer view;
        if (PyObject_GetBuffer(out.ptr(), &view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE | PyBUF_FORMAT) != 0) {
            PyErr_Clear();
            return false;
        }
        const bool fits = size_t(view.len) == n_ * block_bytes_ &&
                          (view.format == nullptr || std::strchr(view.format, 'O') == nullptr);
        const uint64_t base = reinterpret_cast<uintptr_t>(view.buf);
        PyBuffer_Release(&view);
        if (!fits) return false;
        {
            std::lock_guard<std::mutex> guard(table_->lock_);
            for (size_t i = 0; i < n_; i++) {
                const Entry *entry = table_->look(keys.data() + i * 16);
                if (entry == nullptr) return false;
                expected_[i] = *entry;
            }
        }
        std::memcpy(keys_.data(), keys.data(), n_ * 16);
        const uint64_t size = block_bytes_ / parts_;
        for (size_t i = 0; i < n_; i++) {
            const Entry &place = expected_[i];
            if (place.slot < 0 || size_t(place.slot) >= regions.shape(0)) return false;
            const int64_t *row = regions.data() + size_t(place.slot) * 3;
            if (row[kHandle] < 0 || row[kDataOffset] < 0 || int64_t(place.block) >= row[kBlockCount]) return false;
            const uint64_t start = uint64_t(row[kDataOffset]) + uint64_t(place.block) * block_bytes_;
            for (size_t part = 0; part < parts_; part++) {
                const size_t at = i * parts_ + part;
                local_.data()[at] = base + i * block_bytes_ + part * size;
                region_.data()[at] = int32_t(row[kHandle]);
                offset_.data()[at] = start + part * size;
            }
            region_.data()[n_ * parts_ + i] = int32_t(row[kHandle]);
            offset_.data()[n_ * parts_ + i] = kSuperblockBytes + uint64_t(place.block) * stride_;
        }
        return true;
    }

    // Whether everything that was read is what the places promise; notes the use if so.
    bool check() {
        for (size_t i = 0; i < n_; i++) {
            const Entry &place = expected_[i];
            const uint64_t *digests = verify_ ? digests_.data() + i * segments_ : nullptr;
            if (check_header(headers_.data() + i * stride_, segments_, uint32_t(block_bytes_), place.key,
                             place.generation, 0, segments_, digests) != kOk)
                return false;
        }
        std::lock_guard<std::mutex> guard(table_->lock_);
        table_->note(keys_.data(), n_);
        table_->quick_gets++;
        table_->quick_blocks += n_;
        return true;
    }

  private:
    PlaceTable *table_; // kept alive by the Python object
    size_t n_;
    uint64_t block_bytes_;
    size_t segments_, stride_;
    bool verify_;
    size_t parts_;
    Column<uint64_t> local_;
    Column<int32_t> region_;
    Column<uint64_t> offset_, length_;
    Column<int32_t> group_;
    Column<uint8_t> headers_;
    Column<uint64_t> digests_;
    std::vector<Entry> expected_;
    std::vector<uint8_t> keys_; // of expected_, contiguous
};

} // namespace

void bind_places(nb::module_ &m) {
    const auto array = [](const char *name) { return nb::arg(name).noconvert(); };
    using nb::arg;
    nb::class_<PlaceTable>(m, "PlaceTable")
        .def(nb::init<size_t, size_t>(), arg("capacity"), arg("touched_limit"))
        .def("__len__", &PlaceTable::size)
        .def("find", &PlaceTable::find, array("keys"))
        .def("learn", &PlaceTable::learn, array("keys"), array("slot"), array("block"), array("generation"))
        .def("forget", &PlaceTable::forget, array("keys"))
        .def("forget_regions", &PlaceTable::forget_regions, array("slots"))
        .def("touch", &PlaceTable::touch, array("keys"))
        .def("take_touched", &PlaceTable::take_touched, arg("limit"))
        .def_ro("quick_gets", &PlaceTable::quick_gets)
        .def_ro("quick_blocks", &PlaceTable::quick_blocks);
    nb::class_<QuickReader>(m, "QuickReader")
        .def(nb::init<PlaceTable *, size_t, uint64_t, size_t, size_t, bool, Column<uint64_t>, Column<int32_t>,
                      Column<uint64_t>, Column<uint64_t>, Column<int32_t>, Column<uint8_t>, Column<uint64_t>>(),
             nb::keep_alive<1, 2>(), arg("table"), arg("n"), arg("block_bytes"), arg("segments"),
             arg("header_stride"), arg("verify"), array("local"), array("region"), array("offset"), array("length"),
             array("group"), array("headers"), array("digests"))
        .def("prepare", &QuickReader::prepare, array("keys"), arg("out"), array("regions"))
        .def("check", &QuickReader::check);
}
