// How much each record is wanted: LFRU, by which it is decided whose memory another record gets.
//
// Every use adds one to a record's score and scores halve every half_life layers computed, so frequency decides and
// recency breaks ties. Layers run in order, and plain LRU would evict exactly the record that is needed soonest. Scores
// outlive eviction and start from the calibration frequencies. They are kept in a unit that grows instead: a use adds
// 2^(clock / half_life) to a record's worth, and none fades. So a worth changes with uses of its own record alone. How
// this compares with other policies on recorded text, and which half-life is best: bench/laboratory/cache_policies.py.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

namespace edge_moe {

class Worths {
 public:
  // start: of each record. half_life: in layers computed.
  Worths(std::vector<double> start, double half_life) : worths_(std::move(start)), half_life_(half_life) {}

  double of(int record) const { return worths_[record]; }
  const std::vector<double>& all() const { return worths_; }

  void use(int record, int uses) { worths_[record] += uses * unit_; }

  // A layer was computed. True when all worths have a new unit, by a power of two that leaves their order as it is; the
  // oldest may end as nothing.
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
  static constexpr int kRebase = 512;  // half-lives, far from what a double holds

  std::vector<double> worths_;  // by record: its uses, each times the unit of its time
  const double half_life_;
  double clock_ = 0, unit_ = 1;  // layers computed since the last rebase; of a use now
};

}  // namespace edge_moe
