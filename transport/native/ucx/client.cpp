#include "client.hpp"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "../clock.hpp"

namespace mf {

Client::Client(std::shared_ptr<UcxContext> context, const Nonce& identity, unsigned lanes, bool spin, bool one_sided,
               uint64_t limit_ns)
    : context_(std::move(context)), identity_(identity), lanes_(lanes), spin_(spin), one_sided_(one_sided), limit_ns_(limit_ns),
      pid_(getpid()) {}

Client::~Client() { close(); }

// A usable connection of the group; null with the reason where there is none by the deadline.
std::shared_ptr<Connection> Client::lane(Group& group, size_t number, uint64_t deadline_ns, Failure& failure) {
    std::unique_lock guard(group.lock, std::defer_lock);
    const uint64_t now = now_ns();
    if (!guard.try_lock_for(std::chrono::nanoseconds(deadline_ns > now ? deadline_ns - now : 0))) {
        failure = {kStNotDone, "another thread was still connecting when the deadline passed"};
        return nullptr;
    }
    if (number >= group.lanes.size()) group.lanes.resize(number + 1);
    auto& found = group.lanes[number];
    if (found && found->alive()) return found;
    if (found) found->cut(kStPeerLost, "the connection failed");
    found = nullptr;
    std::vector<RegionName> names;
    std::vector<size_t> handles;
    {
        std::lock_guard table(lock_);
        for (const size_t handle : group.handles) {
            names.push_back({handles_[handle]->region.region_id, handles_[handle]->region.serial});
            handles.push_back(handle);
        }
    }
    auto made = std::make_shared<Connection>(context_, spin_, one_sided_);
    std::vector<uint8_t> there;
    try {
        made->open(group.owner, identity_, names, there, deadline_ns);
    } catch (const UcxError& error) {
        failure = {kStNotDone, "no connection to the owner: " + error.what};
        return nullptr;
    }
    ++connects_;
    {
        std::lock_guard table(lock_);
        for (size_t i = 0; i < handles.size(); ++i)
            if (handles_[handles[i]]->live && handles_[handles[i]]->region.serial == names[i].serial)
                handles_[handles[i]]->gone = there[i] == 0;
    }
    found = made;
    return made;
}

int32_t Client::connect(const OwnerName& owner, const RemoteRegion& region, bool writable, uint64_t deadline_ns) {
    if (deadline_ns == 0) deadline_ns = now_ns() + limit_ns_;
    std::shared_ptr<Group> group;
    size_t handle = 0;
    {
        std::lock_guard guard(lock_);
        if (closed_) throw UcxError{ucp::kNotConnected, "this transport is closed"};
        for (const auto& each : groups_)
            if (each->owner.nonce == owner.nonce && each->owner.targets == owner.targets) group = each;
        if (!group) {
            group = std::make_shared<Group>();
            group->owner = owner;
            groups_.push_back(group);
        }
        while (handle < handles_.size() && handles_[handle]->group) ++handle;
        if (handle == handles_.size()) handles_.push_back(std::make_unique<Handle>());
        Handle& made = *handles_[handle];
        made.group = group;
        made.region = region;
        made.writable = writable;
        made.gone = false;
        made.live = false;
        made.users = 0;
        group->handles.push_back(handle);
    }
    // A connection that there was may have died unnoticed: then one more try, with a new one.
    for (int attempt = 0;; ++attempt) {
        Failure failure;
        const uint64_t before = connects_;
        auto connection = lane(*group, 0, deadline_ns, failure);
        bool there = false;
        std::string why = failure.why;
        ucp::Status status = ucp::kUnreachable;
        if (connection) {
            std::vector<uint8_t> answer;
            try {
                connection->ask(owner, identity_, {{region.region_id, region.serial}}, answer, deadline_ns);
                there = answer.at(0) != 0;
                // Connections that there are beside it are told too; those that are made later say it by themselves.
                if (there) tell_others(*group, connection, {region.region_id, region.serial}, deadline_ns);
                why = there ? "" : "the owner has withdrawn that region";
                status = there ? ucp::kOk : ucp::kRejected;
            } catch (const UcxError& error) {
                why = error.what;
                status = error.status;
                if (attempt == 0 && connects_ == before && now_ns() < deadline_ns) continue;
            }
        }
        std::lock_guard guard(lock_);
        if (there && !closed_) {
            handles_[handle]->live = true;
            return static_cast<int32_t>(handle);
        }
        auto& mine = group->handles;
        mine.erase(std::remove(mine.begin(), mine.end(), handle), mine.end());
        handles_[handle]->group = nullptr;
        if (mine.empty()) groups_.erase(std::remove(groups_.begin(), groups_.end(), group), groups_.end());
        throw UcxError{status, why.empty() ? "this transport is closed" : why};
    }
}

void Client::tell_others(Group& group, const std::shared_ptr<Connection>& but, const RegionName& region,
                         uint64_t deadline_ns) {
    std::vector<std::shared_ptr<Connection>> lanes;
    {
        std::lock_guard guard(group.lock);
        lanes = group.lanes;
    }
    for (const auto& each : lanes) {
        if (!each || each == but || !each->usable()) continue;
        std::vector<uint8_t> answer;
        try {
            each->ask(group.owner, identity_, {region}, answer, deadline_ns);
        } catch (const UcxError&) {
            // It is cut now; whoever needs it connects anew and names all regions.
        }
    }
}

bool Client::disconnect(int32_t handle) {
    std::shared_ptr<Group> group;
    std::vector<std::shared_ptr<Connection>> lanes;
    bool last = false;
    {
        std::unique_lock guard(lock_);
        if (handle < 0 || static_cast<size_t>(handle) >= handles_.size() || !handles_[handle]->live) return false;
        Handle& found = *handles_[handle];
        found.live = false;
        idle_.wait(guard, [&] { return found.users == 0; });
        group = found.group;
        auto& mine = group->handles;
        mine.erase(std::remove(mine.begin(), mine.end(), static_cast<size_t>(handle)), mine.end());
        last = mine.empty();
        if (last) groups_.erase(std::remove(groups_.begin(), groups_.end(), group), groups_.end());
    }
    {
        std::lock_guard guard(group->lock);
        lanes = group->lanes;
        if (last) group->lanes.clear();
    }
    for (const auto& each : lanes) {
        if (!each) continue;
        if (last)
            each->cut(kStPeerLost, "disconnected");
        else
            each->forget(static_cast<size_t>(handle));
    }
    std::lock_guard guard(lock_);
    handles_[handle]->group = nullptr;  // from here on the number may be given out again
    return true;
}

uint64_t Client::size_of(int32_t handle) const {
    std::lock_guard guard(lock_);
    if (handle < 0 || static_cast<size_t>(handle) >= handles_.size() || !handles_[handle]->live) return 0;
    return handles_[handle]->region.size_bytes;
}

size_t Client::connections() const {
    size_t count = 0;
    std::vector<std::shared_ptr<Group>> groups;
    {
        std::lock_guard guard(lock_);
        groups = groups_;
    }
    for (const auto& group : groups) {
        std::unique_lock guard(group->lock, std::try_to_lock);
        if (!guard) continue;  // it is connecting just now
        for (const auto& each : group->lanes) count += each && each->usable();
    }
    return count;
}

bool Client::every_connection(bool by_messages) const {
    std::vector<std::shared_ptr<Group>> groups;
    {
        std::lock_guard guard(lock_);
        groups = groups_;
    }
    size_t count = 0;
    for (const auto& group : groups) {
        std::unique_lock guard(group->lock, std::try_to_lock);
        if (!guard) return false;  // it is connecting just now
        for (const auto& each : group->lanes) {
            if (!each || !each->usable()) continue;
            if (each->by_messages() != by_messages) return false;
            ++count;
        }
    }
    return count != 0;
}

std::vector<std::string> Client::lanes() const {
    std::vector<std::shared_ptr<Group>> groups;
    {
        std::lock_guard guard(lock_);
        groups = groups_;
    }
    std::vector<std::string> out;
    for (const auto& group : groups) {
        std::unique_lock guard(group->lock, std::try_to_lock);
        if (!guard) continue;
        for (const auto& each : group->lanes)
            if (each) out.push_back(each->lanes());
    }
    return out;
}

void Client::close() {
    if (getpid() != pid_) {  // a forked child: UCX's state is the parent's; leaked on purpose
        for (const auto& group : groups_)
            for (auto& each : group->lanes) new std::shared_ptr<Connection>(std::move(each));
        groups_.clear();
        return;
    }
    std::vector<std::shared_ptr<Group>> groups;
    {
        std::lock_guard guard(lock_);
        closed_ = true;
        for (auto& each : handles_) each->live = false;
        groups = groups_;
    }
    for (const auto& group : groups) {
        std::vector<std::shared_ptr<Connection>> lanes;
        {
            std::lock_guard guard(group->lock);
            lanes = group->lanes;
        }
        for (const auto& each : lanes)
            if (each) each->cut(kStPeerLost, "this transport was closed");
    }
}

}  // namespace mf
