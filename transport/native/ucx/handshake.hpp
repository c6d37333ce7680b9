// What client and owner say to each other when they connect: one active message each way.
//   hello    Hello, then `count` RegionName
//   welcome  Welcome, then `count` bytes: 1 where the region is there, 0 where it is gone
#pragma once

#include <cstdint>
#include <cstring>

namespace mf {

inline constexpr uint32_t kHandshakeMagic = 0x5543464d;  // "MFCU"
inline constexpr uint16_t kHandshakeVersion = 1;
inline constexpr unsigned kHelloId = 1, kWelcomeId = 2;
inline constexpr size_t kNonceBytes = 16;
inline constexpr uint32_t kMaxRegionsPerHello = 65536;

struct Hello {
    uint32_t magic;
    uint16_t version;
    uint16_t reserved;
    uint8_t owner[kNonceBytes];     // which life of the owner is meant
    uint8_t identity[kNonceBytes];  // of the client
    uint32_t count;
    uint32_t number;  // of this hello on its connection; the welcome repeats it
};

struct RegionName {
    uint64_t region_id;
    uint64_t serial;  // of the registration
};

enum class Answer : uint16_t { ok = 0, other_owner = 1, other_version = 2, malformed = 3 };

struct Welcome {
    uint32_t magic;
    uint16_t version;
    uint16_t answer;
    uint32_t count;
    uint32_t number;
};

}  // namespace mf
