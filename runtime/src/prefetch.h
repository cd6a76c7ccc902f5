// Whether reading ahead pays: the share of records read ahead of their layer that it then used.
//
// Only idle readers read ahead, while a layer is computed. A record that is then used hides its whole read; one that
// is not delays the next layer's reads by as much at the most, and takes another's place. So it pays from about half.
#pragma once

#include <cstdint>

namespace edge_moe {

class PrefetchGate {
 public:
  // Asked once a token: is it open? A closed one opens for kTrial tokens in kPause.
  bool open(uint64_t read_ahead, uint64_t used) {
    if (read_ahead - read_ahead_ >= kEnough) {  // judged by those since the last judgement
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
