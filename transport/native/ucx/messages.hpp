// The path of messages: where UCX has no remote memory access of its own (TCP), reads and writes travel as active
// messages that the owner's thread carries out.
//
// UCX would emulate put and get itself, by raw addresses in the owner's process. That is not used: a client that goes away
// during such a get ends the owner ("Fatal: unexpected error" in ucp_request.inl; UCX 1.22), and nothing is checked. Here
// the owner checks registration and bounds of every operation, and refuses one by one.
//   to the owner   read:   Message, then `count` Entry            → data, for every entry
//                  write:  Message, then the bytes
//                  pack:   Message, then `count` times: Entry, its bytes, up to 7 bytes of padding; small writes together
//                  flush:  Message, `count` writes were sent      → written, when all of them were carried out
//   to the client  data:   Message, then the bytes
//                  packed: Message, then `count` times: Entry (status in `serial`), its bytes, padding
//                  written: Message, then `count` numbers of writes that were refused
// Messages to an owner are numbered: it carries them out in the order in which they were sent, or not at all.
#pragma once

#include <cstdint>

namespace mf {

inline constexpr unsigned kRequestId = 3, kReplyId = 4;
inline constexpr uint16_t kRead = 1, kWrite = 2, kFlush = 3, kData = 4, kWritten = 5, kPack = 6, kPacked = 7;
inline constexpr uint16_t kGood = 0, kRefused = 1;
// A message with its headers fits into one of UCX's TCP segments of 256 KiB, so nothing is put together on arrival.
inline constexpr uint32_t kMessageBytes = 240 * 1024;
inline constexpr uint32_t kEntriesPerMessage = 256;
// What is shorter is copied together with its neighbours: a message costs more than a copy of this.
inline constexpr uint32_t kSmallBytes = 16 * 1024;

struct Message {
    uint16_t kind;
    uint16_t status;
    uint32_t batch;
    uint32_t chunk;
    uint32_t count;
    uint64_t serial;  // write: of the registration
    uint64_t offset;
    uint32_t length;
    uint32_t sequence;  // of messages to the owner on this connection
};

struct Entry {
    uint64_t serial;
    uint64_t offset;
    uint32_t length;
    uint32_t chunk;
};

inline constexpr uint64_t padded(uint64_t bytes) { return (bytes + 7) / 8 * 8; }
inline constexpr uint64_t packed_bytes(uint64_t bytes) { return sizeof(Entry) + padded(bytes); }

}  // namespace mf
