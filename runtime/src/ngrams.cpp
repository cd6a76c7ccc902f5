// Which rows of the tables of n-gram embeddings a step needs; see runtime/layers/ngrams.py.
#include "engine.h"

namespace edge_moe {

namespace {

// The row of each hash for the token at ids[position], to `rows`.
void hashed_rows(const NGramConfig& its, std::span<const int32_t> ids, int position, int64_t* rows) {
  uint64_t mixed = uint64_t(ids[position]) * uint64_t(its.factors[0]);
  int64_t first = 0;
  bool reaches = true;  // the text goes on that far back
  for (int back = 1; back < its.longest(); ++back) {
    reaches = reaches && position >= back && ids[position - back] != its.end;
    mixed ^= uint64_t(reaches ? ids[position - back] : its.end) * uint64_t(its.factors[back]);
    for (int64_t size : its.sizes[back - 1]) {
      const int64_t rest = int64_t(mixed) % size;
      *rows++ = first + (rest < 0 ? rest + size : rest);
      first += size;
    }
  }
}

}  // namespace

// Note the step's tokens, and begin to read what they need.
void Engine::read_ngrams(const Step& step) {
  if (config_.ngrams.empty()) return;
  for (const TokenSpan& span : step.spans)
    std::copy_n(ids_.data() + span.first, span.count, sequences_[span.sequence].ids.data() + span.position);
  for (size_t table = 0; table < config_.ngrams.size(); ++table) {
    const NGramConfig& its = config_.ngrams[table];
    table_rows_.resize(size_t(step.tokens) * its.heads());
    for (const TokenSpan& span : step.spans)
      for (int i = 0; i < span.count; ++i)
        hashed_rows(its, sequences_[span.sequence].ids, span.position + i,
                    table_rows_.data() + size_t(span.first + i) * its.heads());
    tables_->read(int(table), table_rows_);
  }
}

// Add a layer's embeddings of n-grams, if it has any.
void Engine::add_ngrams(int layer, const Step& step) {
  for (size_t table = 0; table < config_.ngrams.size(); ++table) {
    if (config_.ngrams[table].layer != layer) continue;
    tables_->wait(int(table));
    math_->ngrams(layer, step, table_values_[table]);
  }
}

// The memory of a run for tables, without what the readers' threads take.
size_t table_bytes(const EngineConfig& c) {
  size_t bytes = 0;
  for (const NGramConfig& its : c.ngrams) {
    bytes += size_t(c.chunk) * its.inputs() * sizeof(float) + size_t(c.chunk) * its.heads() * sizeof(int64_t);
    bytes += RowTables::bytes_for(1, size_t(c.chunk) * its.heads(), 0);
  }
  return bytes + (c.ngrams.empty() ? 0 : size_t(c.sequences) * c.context * sizeof(int32_t));
}

}  // namespace edge_moe
