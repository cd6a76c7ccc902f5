// Tables of Python's as the core's records and tensors; see bind_records.h.
#include "bind_records.h"

#include <cerrno>
#include <map>
#include <numeric>

using namespace edge_moe;

std::vector<TrunkTensor> trunk_tensors(const std::vector<TensorRow>& rows) {
  std::vector<TrunkTensor> tensors;
  for (const auto& [name, n, cols, encoded, offsets] : rows) {
    MatrixLayout layout;
    layout.rows = n, layout.cols = cols, layout.encoding = encoding_of(encoded);
    expect(int(offsets.size()) == traits(layout.encoding.codec).parts, "a tensor must have an offset for each part");
    for (size_t part = 0; part < offsets.size(); ++part)
      layout.parts[part] = {offsets[part], part_bytes(layout.encoding, int(part), n, cols)};
    tensors.push_back({name, layout});
  }
  return tensors;
}

std::vector<Record> make_records(const std::vector<int>& experts, ArrayIn<int64_t, 2> rows, ArrayIn<float, 1> frequency,
                                 std::optional<size_t> layouts) {
  const size_t count = std::accumulate(experts.begin(), experts.end(), size_t(0));
  const size_t cols = rows.shape(1);
  expect(rows.shape(0) == count && (layouts ? cols == 5 : cols >= 4), "records must be (experts of all layers, 5)");
  expect(frequency.shape(0) == count, "frequency must have one value a record");
  std::vector<Record> records;
  records.reserve(count);
  for (int layer = 0; layer < int(experts.size()); ++layer)
    for (int expert = 0; expert < experts[layer]; ++expert) {
      const int64_t* row = rows.data() + records.size() * cols;
      Record r;
      r.layer = layer, r.expert = expert;
      r.file = int(row[0]), r.offset = uint64_t(row[1]), r.padded = uint64_t(row[2]), r.checksum = uint32_t(row[3]);
      r.frequency = frequency.data()[records.size()];
      if (layouts) {
        expect(row[4] >= 0 && size_t(row[4]) < *layouts, "a record's layout is not one of layouts");
        r.layout = int(row[4]);
      }
      records.push_back(r);
    }
  return records;
}

ReadFault read_fault(const std::string& kind, int64_t after, int64_t times, uint64_t value) {
  const std::map<std::string, std::pair<FaultKind, uint64_t>> kinds = {{"error", {FaultKind::kError, EIO}},
                                                                       {"end", {FaultKind::kEnd, 0}},
                                                                       {"short", {FaultKind::kShort, 4096}},
                                                                       {"flip", {FaultKind::kFlip, 0}},
                                                                       {"slow", {FaultKind::kSlow, 50'000'000}}};
  expect(kinds.count(kind), "kind must be error, end, short, flip or slow");
  ReadFault fault{kinds.at(kind).first};
  fault.after = after, fault.times = times, fault.value = value ? value : kinds.at(kind).second;
  return fault;
}

bool unwanted_by(const nb::object& stop) {
  return PyErr_CheckSignals() != 0 || (!stop.is_none() && nb::cast<bool>(stop()));
}
