// Python bindings of Residency in the processor's memory, for clients that compute on records themselves.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>

#include "../../devices/python/arrays.h"
#include "../../devices/python/gil.h"
#include "residency.h"

using namespace edge_moe;

namespace {

std::vector<Record> table_of(ArrayIn<int64_t, 2> rows, ArrayIn<float, 1> frequency) {
  expect(rows.shape(1) == 4, "records must be (records, 4)");
  expect(frequency.shape(0) == rows.shape(0), "frequency must have one value a record");
  std::vector<Record> records(rows.shape(0));
  for (size_t i = 0; i < records.size(); ++i) {
    const int64_t* row = rows.data() + 4 * i;
    Record& r = records[i];
    r.expert = int(i), r.file = int(row[0]), r.offset = uint64_t(row[1]), r.padded = uint64_t(row[2]);
    r.checksum = uint32_t(row[3]), r.frequency = frequency.data()[i];
  }
  return records;
}

// A store, and the residency of its records in the processor's memory.
struct Client {
  Client(const std::vector<std::string>& files, std::vector<Record> records, size_t bytes, int readers,
         double half_life)
      : store(files, std::move(records), {}, false),
        device(cpu_device(scalar())),
        residency(store, *device, bytes, readers, half_life) {}
  static const Kernels& scalar() { return find_kernels("scalar"); }

  int checked(int record) const {
    expect(record >= 0 && record < int(store.records().size()), "no such record");
    return record;
  }
  void want(int record) { ++wanted[checked(record)]; }
  void release(int record) {
    expect(wanted[checked(record)] > 0, "this record is not acquired");
    --wanted[record];
    residency.release(record);
  }

  ExpertStore store;
  std::unique_ptr<Device> device;
  Residency residency;
  std::vector<int> wanted = std::vector<int>(store.records().size());  // acquires not yet released
};

}  // namespace

void bind_residency(nb::module_& m) {
  nb::class_<Client>(
      m, "Residency",
      "Expert residency: acquires, counts, reads and evicts records; see residency.h. Only one thread at a time\n"
      "may call it.")
      .def(
          "__init__",
          [](Client* self, const std::vector<std::string>& files, ArrayIn<int64_t, 2> records,
             ArrayIn<float, 1> frequency, uint64_t bytes, int readers, double half_life) {
            expect(readers >= 1, "readers must be at least 1");
            expect(std::isfinite(half_life) && half_life > 0, "half_life must be above 0");
            new (self) Client(files, table_of(records, frequency), bytes, readers, half_life);
          },
          nb::arg("files"), nb::arg("records"), nb::arg("frequency"), nb::arg("bytes"), nb::arg("readers") = 4,
          nb::arg("half_life") = 100.0,
          "records: int64 (records, 4): index of the file, offset, bytes, CRC32C. frequency: float32 (records,),\n"
          "initial scores. bytes: memory of all slots together. half_life: of scores, in calls of tick().\n\n"
          "Raises ValueError for less memory than the largest record, DamagedFile if a record lies outside its file\n"
          "and OSError if a file cannot be read.")
      .def(
          "acquire",
          [](Client& self, int record, int uses) {
            self.checked(record);
            if (self.residency.acquire(record, uses) == Residency::Acquired::kNoSlot) return false;
            self.want(record);
            return true;
          },
          nb::arg("record"), nb::arg("uses") = 1,
          "Pin a record, starting its read if it is not in memory; false if too much is pinned. uses: to be counted.")
      .def(
          "release", [](Client& self, int record) { self.release(record); }, nb::arg("record"), "Undo one acquire().")
      .def(
          "read_ahead",
          [](Client& self, ArrayIn<int32_t, 1> records) {
            for (size_t i = 0; i < records.shape(0); ++i) self.checked(records.data()[i]);
            self.residency.read_ahead({records.data(), records.shape(0)});
          },
          nb::arg("records"),
          "records: int32, those that may be acquired soon, most likely first; they are not pinned.")
      .def(
          "wait",
          [](Client& self, double seconds) {
            GilReleased released;
            return self.residency.wait(std::chrono::milliseconds(int64_t(seconds * 1000)));
          },
          nb::arg("seconds") = 1.0,
          "Wait until a read has ended since the last call; false if none does within `seconds`.")
      .def(
          "bytes",
          [](Client& self, int record) -> nb::object {
            expect(self.wanted[self.checked(record)] > 0, "this record is not acquired");
            const uint8_t* bytes = self.residency.bytes(record);
            if (!bytes) return nb::none();
            const size_t count = self.store.records()[record].padded;
            return nb::cast(nb::ndarray<nb::numpy, const uint8_t, nb::c_contig>(bytes, {count}, nb::find(self)));
          },
          nb::arg("record"),
          "uint8 (bytes,) of an acquired record, until it is released; None while it is being read. Raises the\n"
          "read's error.")
      .def_prop_ro(
          "table",
          [](Client& self) {
            std::vector<int32_t> now;
            for (const std::atomic<int32_t>& slot : self.residency.table())
              now.push_back(slot.load(std::memory_order_acquire));
            const size_t records = now.size();
            return to_numpy(std::move(now), {records});
          },
          nb::rv_policy::move, "int32 (records,): the slot of each record that is ready now, else -1.")
      .def(
          "slot",
          [](Client& self, int number) {
            const Slot slot = self.residency.slot(number);
            return std::make_tuple(slot.offset, slot.bytes, slot.record);
          },
          nb::arg("number"), "(offset, bytes, record) of a slot; record -1 for free memory.")
      .def(
          "begin_epoch", [](Client& self) { self.residency.begin_epoch(); },
          "Evict no record that has a slot now until end_epoch().")
      .def("end_epoch", [](Client& self) { self.residency.end_epoch(); })
      .def(
          "tick", [](Client& self) { self.residency.tick(); }, "Advance the clock by one: a layer was computed.")
      .def(
          "resize",
          [](Client& self, uint64_t bytes) {
            GilReleased released;
            self.residency.resize(bytes);
          },
          nb::arg("bytes"),
          "Resize the slots; what is given up is returned to the system. Raises ValueError for less than the largest\n"
          "record and RuntimeError while a record is acquired or an epoch is open.")
      .def_prop_ro("counters", [](const Client& self) {
        const ResidencyStats stats = self.residency.stats();
        nb::dict d;
        d["hits"] = stats.hits, d["misses"] = stats.misses, d["bytes_read"] = stats.bytes_read;
        d["read_ahead"] = stats.read_ahead, d["read_ahead_used"] = stats.read_ahead_used;
        d["records_held"] = self.residency.records_held(), d["bytes"] = self.residency.bytes();
        return d;
      });
}
