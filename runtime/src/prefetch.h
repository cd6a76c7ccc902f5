// Whether reading ahead pays: judged by the share of records read ahead that their layer then used.
//
// Only idle readers read ahead, while a layer is computed. A record that is used hides its whole read; one that is not
// delays the next layer's reads by at most one read, and evicts another record. So it pays from a share of about half.
#pragma once

#include <cstdint>

namespace edge_moe {

class PrefetchGate {
 public:
  // Whether to read ahead; to be called once per token. If it does not pay, tried for kTrial tokens in every kPause.
  bool open(uint64_t read_ahead, uint64_t used) {
    if (read_ahead - read_ahead_ >= kEnough) {  // judged by those read since the last judgement
      pays_ = 2 * (used - used_) >= read_ahead - read_ahead_;
      read_ahead_ = read_ahead, used_ = used;
    }
    ++tokens_;
    return pays_ || tokens_ % kPause < kTrial;
  }

 private:
  static constexpr uint64_t kEnough = 64, kPause = 256, kTrial = 8;
  uint64_t read_ahead_ = 0, used_ = 0, tokens_ = 0;
  bool pays_ = true;
};

}  // namespace edge_moe
