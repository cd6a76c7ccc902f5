// The worth of each record, by LFRU (least frequently and recently used): decides which records are evicted.
//
// Each use adds one to a record's score, and scores halve every half_life layers computed, so frequency decides and
// recency breaks ties. Layers run in order, and plain LRU would evict exactly the record that is needed soonest. Scores
// survive eviction and start from the calibration frequencies. Instead of halving scores, a use adds 2^(clock /
// half_life) to the record's worth, so a worth changes only with uses of its own record.
// bench/laboratory/cache_policies.py compares this with other policies and half-lives on recorded text.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

namespace edge_moe {

// Tokens after which a use has half its weight in the choice of records to evict. On the reference model, decoding text
// with slots for 20, 30, 50 and 70 % of its experts: 35, 53, 79 and 94 % hits; with 512 tokens 30, 46, 72 and 90; with
// 4, 34, 50, 77 and 93; with LRU 13, 49, 73 and 92.
inline constexpr int kHalfLifeTokens = 32;

class Worths {
 public:
  // start: the initial worth of each record. half_life: in layers computed.
  Worths(std::vector<double> start, double half_life) : worths_(std::move(start)), half_life_(half_life) {}

  double of(int record) const { return worths_[record]; }
  const std::vector<double>& all() const { return worths_; }

  void use(int record, int uses) { worths_[record] += uses * unit_; }

  // Count a layer computed. Returns true if all worths were rescaled, by a power of two that preserves their order; the
  // oldest ones may become 0.
  bool tick() {
    const bool rebase = ++clock_ >= kRebase * half_life_;
    if (rebase) {
      clock_ -= kRebase * half_life_;
      for (double& worth : worths_) worth = std::ldexp(worth, -kRebase);
    }
    unit_ = std::exp2(clock_ / half_life_);
    return rebase;
  }

 private:
  static constexpr int kRebase = 512;  // in half-lives, well within the range of a double

  std::vector<double> worths_;  // by record: sum of its uses, each times unit_ at the time
  const double half_life_;
  double clock_ = 0, unit_ = 1;  // layers computed since the last rescaling; worth of a use now
};

}  // namespace edge_moe
