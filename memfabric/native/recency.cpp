// Recency: intrusive lists over slots, most recently used first, and the eviction scan that takes leaves first.
//
// A slot is in at most one list. Owned here: 12 bytes a slot. What makes a slot evictable (pins, children) is in the caller's
// columns. Deterministic.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

namespace {

using Slots = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutSlots = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;
template <class T> using Column = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

OutSlots to_array(const std::vector<int32_t> &values) {
    int32_t *out = new int32_t[values.empty() ? 1 : values.size()];
    for (size_t i = 0; i < values.size(); i++) out[i] = values[i];
    nb::capsule owner(out, [](void *p) noexcept { delete[] static_cast<int32_t *>(p); });
    return OutSlots(out, {values.size()}, owner);
}

class Recency {
  public:
    void resize(size_t slots) {
        if (slots < links_.size()) throw std::invalid_argument("Recency.resize: can only grow");
        links_.resize(slots, Link{-1, -1, -1});
    }

    int32_t add_list() {
        lists_.push_back(List{-1, -1, 0});
        return int32_t(lists_.size() - 1);
    }

    size_t count(int32_t list) const { return at(list).count; }
    int32_t oldest(int32_t list) const { return at(list).tail; }

    // Which list each slot is in; -1 for none.
    OutSlots list_of(Slots slots) const {
        check(slots);
        std::vector<int32_t> out(slots.shape(0));
        for (size_t i = 0; i < out.size(); i++) out[i] = links_[slots.data()[i]].list;
        return to_array(out);
    }

    // Move slots (in whatever list they are, or none) to the front of `list`, last one first: of a chain given from head to tail, the
    // head ends up most recent, so that plain order already takes leaves before their parents.
    void touch(int32_t list, Slots slots) {
        at(list);
        check(slots);
        for (size_t i = slots.shape(0); i-- > 0;) {
            unlink(slots.data()[i]);
            push_front(list, slots.data()[i]);
        }
    }

    void remove(Slots slots) {
        check(slots);
        for (size_t i = 0; i < slots.shape(0); i++) unlink(slots.data()[i]);
    }

    // All slots of a list from least to most recently used.
    OutSlots order(int32_t list) const {
        std::vector<int32_t> out;
        for (int32_t slot = at(list).tail; slot >= 0; slot = links_[slot].newer) out.push_back(slot);
        return to_array(out);
    }

    // Take up to `want` victims out of the list, least recently used first: unpinned, without children, last used before `before_ns`.
    // A victim's parent loses a child, and may become a victim in the same call (also when it is older: another pass follows).
    OutSlots evict(int32_t list, size_t want, uint64_t before_ns, Column<const uint64_t> last_use,
                   Column<const uint32_t> pins, Column<int32_t> children, Column<int32_t> parent,
                   Column<const uint64_t> parent_generation, Column<const uint64_t> generation) {
        at(list);
        const size_t n = links_.size();
        if (last_use.shape(0) < n || pins.shape(0) < n || children.shape(0) < n || parent.shape(0) < n ||
            parent_generation.shape(0) < n || generation.shape(0) < n)
            throw std::invalid_argument("Recency.evict: a column is shorter than the table");
        std::vector<int32_t> victims;
        bool older_freed = true;
        while (older_freed && victims.size() < want) {
            older_freed = false;
            int32_t slot = lists_[list].tail;
            while (slot >= 0 && victims.size() < want) {
                const int32_t newer = links_[slot].newer;
                if (last_use.data()[slot] >= before_ns) break; // the rest was used later
                if (pins.data()[slot] == 0 && children.data()[slot] == 0) {
                    unlink(slot);
                    victims.push_back(slot);
                    const int32_t up = parent.data()[slot];
                    if (up >= 0 && size_t(up) < n && generation.data()[up] == parent_generation.data()[slot]) {
                        if (--children.data()[up] == 0 && links_[up].list == list &&
                            last_use.data()[up] <= last_use.data()[slot])
                            older_freed = true;
                    }
                    parent.data()[slot] = -1;
                }
                slot = newer;
            }
        }
        return to_array(victims);
    }

  private:
    struct Link {
        int32_t newer, older, list;
    };
    struct List {
        int32_t head, tail;
        size_t count;
    };
    std::vector<Link> links_;
    std::vector<List> lists_;

    const List &at(int32_t list) const {
        if (list < 0 || size_t(list) >= lists_.size()) throw std::out_of_range("Recency: no such list");
        return lists_[list];
    }

    void check(const Slots &slots) const {
        for (size_t i = 0; i < slots.shape(0); i++)
            if (slots.data()[i] < 0 || size_t(slots.data()[i]) >= links_.size())
                throw std::out_of_range("Recency: slot outside the table");
    }

    void push_front(int32_t list, int32_t slot) {
        List &l = lists_[list];
        links_[slot] = Link{-1, l.head, list};
        if (l.head >= 0) links_[l.head].newer = slot;
        else l.tail = slot;
        l.head = slot;
        l.count++;
    }

    void unlink(int32_t slot) {
        Link &link = links_[slot];
        if (link.list < 0) return;
        List &l = lists_[link.list];
        if (link.newer >= 0) links_[link.newer].older = link.older;
        else l.head = link.older;
        if (link.older >= 0) links_[link.older].newer = link.newer;
        else l.tail = link.newer;
        l.count--;
        link = Link{-1, -1, -1};
    }
};

// pins[slot] += 1 for each slot, repeated slots counted each time.
void pin(Column<uint32_t> pins, Slots slots) {
    for (size_t i = 0; i < slots.shape(0); i++) {
        const int32_t slot = slots.data()[i];
        if (slot < 0 || size_t(slot) >= pins.shape(0)) throw std::out_of_range("pin: slot outside the column");
        pins.data()[slot]++;
    }
}

// pins[slot] -= 1 where the slot still has the generation that was pinned; returns the slots whose pins became 0.
OutSlots unpin(Column<uint32_t> pins, Slots slots, Column<const uint64_t> pinned_generation,
               Column<const uint64_t> generation) {
    std::vector<int32_t> freed;
    if (pinned_generation.shape(0) != slots.shape(0)) throw std::invalid_argument("unpin: columns differ in length");
    for (size_t i = 0; i < slots.shape(0); i++) {
        const int32_t slot = slots.data()[i];
        if (slot < 0 || size_t(slot) >= pins.shape(0) || size_t(slot) >= generation.shape(0))
            throw std::out_of_range("unpin: slot outside the column");
        if (generation.data()[slot] != pinned_generation.data()[i]) continue;
        if (pins.data()[slot] == 0) throw std::logic_error("unpin: the slot is not pinned");
        if (--pins.data()[slot] == 0) freed.push_back(slot);
    }
    return to_array(freed);
}

// children[parent] += delta for each slot whose parent link is valid.
void count_children(Column<int32_t> children, Slots parents, int32_t delta) {
    for (size_t i = 0; i < parents.shape(0); i++) {
        const int32_t up = parents.data()[i];
        if (up < 0) continue;
        if (size_t(up) >= children.shape(0)) throw std::out_of_range("count_children: slot outside the column");
        children.data()[up] += delta;
    }
}

} // namespace

void bind_recency(nb::module_ &m) {
    nb::class_<Recency>(m, "Recency")
        .def(nb::init<>())
        .def("resize", &Recency::resize, nb::arg("slots"))
        .def("add_list", &Recency::add_list)
        .def("count", &Recency::count, nb::arg("list"))
        .def("oldest", &Recency::oldest, nb::arg("list"))
        .def("list_of", &Recency::list_of, nb::arg("slots"))
        .def("touch", &Recency::touch, nb::arg("list"), nb::arg("slots"))
        .def("remove", &Recency::remove, nb::arg("slots"))
        .def("order", &Recency::order, nb::arg("list"))
        .def("evict", &Recency::evict, nb::arg("list"), nb::arg("want"), nb::arg("before_ns"), nb::arg("last_use"),
             nb::arg("pins").noconvert(), nb::arg("children").noconvert(), nb::arg("parent").noconvert(), nb::arg("parent_generation"),
             nb::arg("generation"));
    m.def("pin", &pin, nb::arg("pins").noconvert(), nb::arg("slots"));
    m.def("unpin", &unpin, nb::arg("pins").noconvert(), nb::arg("slots"), nb::arg("pinned_generation"), nb::arg("generation"));
    m.def("count_children", &count_children, nb::arg("children").noconvert(), nb::arg("parents"), nb::arg("delta"));
}
