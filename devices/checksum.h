// CRC-32C (Castagnoli), the checksum of every record and of the trunk: it detects any burst error of up to 32 bits, and
// x86 and Arm compute it in hardware at several GB/s, faster than the disks that records are read from.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edge_moe {

// `seed` is the checksum of the preceding bytes, 0 at the start.
uint32_t crc32c(const void* data, size_t bytes, uint32_t seed = 0);

// The checksum at the end of a table's row of so many bytes: of the row's number and of all before the checksum.
inline uint32_t row_checksum(const uint8_t* row, size_t bytes, int64_t number) {
  return crc32c(row, bytes - sizeof(uint32_t), crc32c(&number, sizeof number));
}

}  // namespace edge_moe
