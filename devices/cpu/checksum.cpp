// CRC-32C by table, or by the processor's instruction where the compiler can assume or dispatch it.
#include "../checksum.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace edge_moe {

bool cpu_has_crc32c();  // dispatch.cpp

namespace {

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? 0x82F63B78u : 0);
    table[i] = value;
  }
  return table;
}

constexpr std::array<uint32_t, 256> kTable = make_table();

uint32_t by_table(const uint8_t* data, size_t bytes, uint32_t crc) {
  for (size_t i = 0; i < bytes; ++i) crc = (crc >> 8) ^ kTable[(crc ^ data[i]) & 255];
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t by_instruction(const uint8_t* data, size_t bytes, uint32_t crc) {
  uint64_t value = crc;
  size_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, data + i, 8);
    value = _mm_crc32_u64(value, word);
  }
  return by_table(data + i, bytes - i, uint32_t(value));
}
#elif defined(__ARM_FEATURE_CRC32)
uint32_t by_instruction(const uint8_t* data, size_t bytes, uint32_t crc) {
  size_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, data + i, 8);
    crc = __crc32cd(crc, word);
  }
  return by_table(data + i, bytes - i, crc);
}
#else
uint32_t by_instruction(const uint8_t* data, size_t bytes, uint32_t crc) { return by_table(data, bytes, crc); }
#endif

}  // namespace

uint32_t crc32c(const void* data, size_t bytes, uint32_t seed) {
  static const bool instruction = cpu_has_crc32c();
  const uint8_t* first = static_cast<const uint8_t*>(data);
  return ~(instruction ? by_instruction(first, bytes, ~seed) : by_table(first, bytes, ~seed));
}

}  // namespace edge_moe
