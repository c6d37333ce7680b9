// KeyIndex: from 16-byte block keys to slots, for millions of keys.
//
// Open addressing with linear probing and backward-shift deletion. An entry is a 32-bit tag and a slot; the keys themselves
// stay in the caller's column, so a key costs 8 bytes / load here. Deterministic: no seed, no address.
// Keys are mixed before use, because callers may bring keys that are not digests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

namespace {

using Keys = nb::ndarray<const uint8_t, nb::shape<-1, 16>, nb::c_contig, nb::device::cpu>;
using Slots = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutSlots = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;

struct Entry {
    uint32_t tag;
    int32_t slot; // -1: empty
};

inline uint64_t mix(const uint8_t *key) {
    uint64_t a, b;
    std::memcpy(&a, key, 8);
    std::memcpy(&b, key + 8, 8);
    uint64_t h = a * 0x9E3779B97F4A7C15ull ^ (b + 0xD6E8FEB86659FD93ull) * 0xC2B2AE3D27D4EB4Full;
    h ^= h >> 32;
    h *= 0xFF51AFD7ED558CCDull;
    h ^= h >> 29;
    return h;
}

inline bool same(const uint8_t *x, const uint8_t *y) { return std::memcmp(x, y, 16) == 0; }

class KeyIndex {
  public:
    explicit KeyIndex(size_t capacity_hint) { resize(bucket_count(capacity_hint)); }

    size_t size() const { return used_; }
    size_t memory_bytes() const { return entries_.size() * sizeof(Entry); }

    OutSlots find(Keys keys, Keys column) const {
        const size_t n = keys.shape(0);
        int32_t *out = new int32_t[n ? n : 1];
        nb::capsule owner(out, [](void *p) noexcept { delete[] static_cast<int32_t *>(p); });
        {
            nb::gil_scoped_release release;
            find_all(keys.data(), n, column.data(), column.shape(0), out);
        }
        return OutSlots(out, {n}, owner);
    }

    void insert(Keys column, Slots slots) {
        const size_t n = slots.shape(0);
        check(slots, column.shape(0));
        if ((used_ + n) * 4 > entries_.size() * 3) grow(column.data(), bucket_count(used_ + n));
        for (size_t i = 0; i < n; i++) {
            const int32_t slot = slots.data()[i];
            const uint8_t *key = column.data() + size_t(slot) * 16;
            const uint64_t h = mix(key);
            const uint32_t tag = uint32_t(h >> 32);
            size_t at = h & mask_;
            while (entries_[at].slot >= 0) {
                if (entries_[at].tag == tag && same(column.data() + size_t(entries_[at].slot) * 16, key))
                    throw std::invalid_argument("KeyIndex.insert: the key is there already");
                at = (at + 1) & mask_;
            }
            entries_[at] = {tag, slot};
            used_++;
        }
    }

    // Slots whose key is not in the index under that slot are left alone; returns how many were erased.
    size_t erase(Keys column, Slots slots) {
        check(slots, column.shape(0));
        size_t erased = 0;
        for (size_t i = 0; i < slots.shape(0); i++) {
            const int32_t slot = slots.data()[i];
            const uint64_t h = mix(column.data() + size_t(slot) * 16);
            size_t at = h & mask_;
            while (entries_[at].slot >= 0 && entries_[at].slot != slot) at = (at + 1) & mask_;
            if (entries_[at].slot < 0) continue;
            shift_back(column.data(), at);
            used_--;
            erased++;
        }
        return erased;
    }

    void clear() {
        used_ = 0;
        resize(bucket_count(0));
    }

  private:
    std::vector<Entry> entries_;
    size_t mask_ = 0;
    size_t used_ = 0;

    static size_t bucket_count(size_t keys) {
        size_t buckets = 64;
        while (buckets * 3 < keys * 4 + 4) buckets *= 2;
        return buckets;
    }

    void resize(size_t buckets) {
        entries_.assign(buckets, Entry{0, -1});
        mask_ = buckets - 1;
    }

    void grow(const uint8_t *column, size_t buckets) {
        if (buckets <= entries_.size()) return;
        std::vector<Entry> old;
        old.swap(entries_);
        resize(buckets);
        for (const Entry &entry : old) {
            if (entry.slot < 0) continue;
            size_t at = mix(column + size_t(entry.slot) * 16) & mask_;
            while (entries_[at].slot >= 0) at = (at + 1) & mask_;
            entries_[at] = entry;
        }
    }

    void shift_back(const uint8_t *column, size_t hole) {
        size_t at = hole;
        for (;;) {
            at = (at + 1) & mask_;
            if (entries_[at].slot < 0) break;
            const size_t home = mix(column + size_t(entries_[at].slot) * 16) & mask_;
            // Move the entry into the hole unless its home lies cyclically in (hole, at].
            if (((at - home) & mask_) >= ((at - hole) & mask_)) {
                entries_[hole] = entries_[at];
                hole = at;
            }
        }
        entries_[hole] = {0, -1};
    }

    static void check(const Slots &slots, size_t capacity) {
        for (size_t i = 0; i < slots.shape(0); i++)
            if (slots.data()[i] < 0 || size_t(slots.data()[i]) >= capacity)
                throw std::out_of_range("KeyIndex: slot outside the key column");
    }

    void find_all(const uint8_t *keys, size_t n, const uint8_t *column, size_t capacity, int32_t *out) const {
        // Hash a group of keys first and prefetch its buckets, then the key lines: two misses per key overlap over the group.
        constexpr size_t group = 16;
        uint64_t hashes[group];
        for (size_t base = 0; base < n; base += group) {
            const size_t m = n - base < group ? n - base : group;
            for (size_t j = 0; j < m; j++) {
                hashes[j] = mix(keys + (base + j) * 16);
                __builtin_prefetch(&entries_[hashes[j] & mask_]);
            }
            for (size_t j = 0; j < m; j++) {
                const Entry &entry = entries_[hashes[j] & mask_];
                if (entry.slot >= 0) __builtin_prefetch(column + size_t(entry.slot) * 16);
            }
            for (size_t j = 0; j < m; j++) {
                const uint32_t tag = uint32_t(hashes[j] >> 32);
                size_t at = hashes[j] & mask_;
                int32_t found = -1;
                while (entries_[at].slot >= 0) {
                    const size_t slot = size_t(entries_[at].slot);
                    if (entries_[at].tag == tag && slot < capacity &&
                        same(column + slot * 16, keys + (base + j) * 16)) {
                        found = int32_t(slot);
                        break;
                    }
                    at = (at + 1) & mask_;
                }
                out[base + j] = found;
            }
        }
    }
};

} // namespace

void bind_index(nb::module_ &m) {
    nb::class_<KeyIndex>(m, "KeyIndex")
        .def(nb::init<size_t>(), nb::arg("capacity_hint") = 0)
        .def("__len__", &KeyIndex::size)
        .def("memory_bytes", &KeyIndex::memory_bytes)
        .def("find", &KeyIndex::find, nb::arg("keys"), nb::arg("column"))
        .def("insert", &KeyIndex::insert, nb::arg("column"), nb::arg("slots"))
        .def("erase", &KeyIndex::erase, nb::arg("column"), nb::arg("slots"))
        .def("clear", &KeyIndex::clear);
}
