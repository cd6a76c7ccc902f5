// Python bindings of Residency, for clients that compute on records themselves: in the processor's memory, or in
// theirs.
#include <algorithm>
#include <cmath>
#include <optional>

#include "../../devices/python/gil.h"
#include "bind_records.h"
#include "given_memory.h"
#include "interrupt.h"
#include "residency.h"

using namespace edge_moe;

namespace {

using Buffer = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const Kernels& scalar() { return find_kernels("scalar"); }

void check_buffer(const Buffer& buffer, size_t bytes) {
  expect(buffer.size() >= bytes, "memory must have at least " + std::to_string(bytes) + " bytes");
  expect(reinterpret_cast<uintptr_t>(buffer.data()) % kSmallAlignment == 0, "memory must begin at a multiple of 4096");
}

// A store, and the residency of its records in the processor's memory, or in arrays that a function of Python's
// returns.
struct Client {
  Client(const std::vector<std::string>& files, std::vector<Record> records, size_t bytes, int readers,
         double half_life, nb::object memory)
      : store(files, std::move(records), {}, false),
        device(memory.is_none() ? cpu_device(scalar()) : given(std::move(memory))),
        residency(store, *device, bytes, readers, half_life) {}

  // Allocating calls Python, so its GIL must be held.
  std::unique_ptr<Device> given(nb::object memory) {
    is_given = true;
    return std::make_unique<GivenDevice>(scalar(), [this, memory](size_t bytes) {
      buffer.reset();
      buffer = nb::cast<Buffer>(memory(bytes));
      check_buffer(*buffer, bytes);
      return buffer->data();
    });
  }

  int checked(int record) const {
    expect(record >= 0 && record < int(store.records().size()), "no such record");
    return record;
  }
  Residency::Acquired acquire(int record, int uses) {
    const Residency::Acquired acquired = residency.acquire(checked(record), uses);
    if (acquired != Residency::Acquired::kNoSlot) ++wanted[record];
    return acquired;
  }
  void release(int record) {
    expect(wanted[checked(record)] > 0, "this record is not acquired");
    --wanted[record];
    residency.release(record);
  }

  // record, and whether it was in memory
  using Taken = std::vector<std::tuple<int, bool>>;
  Taken take(std::vector<std::tuple<int, int>> records, const nb::object& stop, const nb::object& begun);
  void wait(const nb::object& stop);

  ExpertStore store;
  bool is_given = false;
  std::optional<Buffer> buffer;
  std::unique_ptr<Device> device;
  Residency residency;
  std::vector<int> wanted = std::vector<int>(store.records().size());  // acquires not yet released
};

// Pin records (record, uses), as many as there is memory for, and wait until they are there; none if what the client
// has pinned leaves no memory. Those in memory come first, so that none of them is evicted for the others. begun() is
// called once, when the reads of the others have been asked for.
Client::Taken Client::take(std::vector<std::tuple<int, int>> records, const nb::object& stop, const nb::object& begun) {
  for (const auto& [record, uses] : records) checked(record);
  const bool pinned = std::any_of(wanted.begin(), wanted.end(), [](int count) { return count > 0; });
  std::stable_partition(records.begin(), records.end(), [&](auto& one) { return residency.holds(std::get<0>(one)); });
  Taken taken;
  try {
    while (taken.empty() && !records.empty()) {
      for (const auto& [record, uses] : records) {
        const Residency::Acquired acquired = acquire(record, uses);
        if (acquired == Residency::Acquired::kNoSlot) break;
        taken.emplace_back(record, acquired == Residency::Acquired::kHit);
      }
      if (!taken.empty() && !begun.is_none()) begun();
      for (const auto& one : taken)
        while (!residency.bytes(std::get<0>(one))) wait(stop);
      if (!taken.empty() || pinned) break;
      wait(stop);  // records that are read ahead take the memory
    }
  } catch (...) {
    for (const auto& one : taken) release(std::get<0>(one));
    throw;
  }
  return taken;
}

void Client::wait(const nb::object& stop) {
  {
    GilReleased released;
    residency.wait(Interrupt::kAskEvery);
  }
  if (!unwanted_by(stop)) return;
  if (PyErr_Occurred()) throw nb::python_error();
  throw Interrupted();
}

using BoundClient = OfProcess<Client>;

}  // namespace

void bind_residency(nb::module_& m) {
  m.attr("HALF_LIFE_TOKENS") = kHalfLifeTokens;
  nb::class_<BoundClient>(
      m, "Residency",
      "Expert residency: acquires, counts, reads and evicts records; see residency.h. Only one thread at a time\n"
      "may call it.")
      .def(
          "__init__",
          [](BoundClient* self, const std::vector<std::string>& files, ArrayIn<int64_t, 2> records,
             ArrayIn<float, 1> frequency, uint64_t bytes, int readers, double half_life, std::vector<int> experts,
             const nb::object& memory) {
            expect(readers >= 1, "readers must be at least 1");
            expect(std::isfinite(half_life) && half_life > 0, "half_life must be above 0");
            if (experts.empty()) experts.push_back(int(records.shape(0)));
            std::vector<Record> table = make_records(experts, records, frequency, {});
            new (self)
                BoundClient(std::make_unique<Client>(files, std::move(table), bytes, readers, half_life, memory));
          },
          nb::arg("files"), nb::arg("records"), nb::arg("frequency"), nb::arg("bytes"), nb::arg("readers") = 4,
          nb::arg("half_life") = 100.0, nb::arg("experts") = nb::list(), nb::arg("memory") = nb::none(),
          "records: int64 (records, 4 or more): index of the file, offset, bytes, CRC32C. frequency: float32\n"
          "(records,), initial scores. bytes: memory of all slots together. half_life: of scores, in calls of tick().\n"
          "experts: how many of the records are each layer's, for messages. memory: memory(bytes) returns a writable\n"
          "uint8 array of at least so many bytes, at a multiple of 4096, where the slots will be; when it is called\n"
          "again, by resize(), nobody uses the former array. Without it the slots are in the core's memory.\n\n"
          "Raises ValueError for less memory than the largest record, DamagedFile if a record lies outside its file\n"
          "and OSError if a file cannot be read.")
      .def(
          "acquire",
          [](BoundClient& self, int record, int uses) {
            return self->acquire(record, uses) != Residency::Acquired::kNoSlot;
          },
          nb::arg("record"), nb::arg("uses") = 1,
          "Pin a record, starting its read if it is not in memory; false if too much is pinned. uses: to be counted.")
      .def(
          "take",
          [](BoundClient& self, std::vector<std::tuple<int, int>> records, const nb::object& stop,
             const nb::object& begun) { return self->take(std::move(records), stop, begun); },
          nb::arg("records"), nb::arg("stop") = nb::none(), nb::arg("begun") = nb::none(),
          "Pin records (record, uses), as many of them as there is memory for, and wait until they are there. Returns\n"
          "(record, whether it was in memory already) of each; none if what is acquired leaves no memory. Raises what\n"
          "a read raised, and Interrupted when stop() returns true; then none is pinned. begun() is called when the\n"
          "reads have been asked for.")
      .def(
          "release", [](BoundClient& self, int record) { self->release(record); }, nb::arg("record"),
          "Undo one acquire().")
      .def(
          "offsets",
          [](const BoundClient& self, int first, int count) {
            const int records = int(self->store.records().size());
            expect(first >= 0 && count >= 0 && count <= records - first, "no such record");
            std::vector<int64_t> offsets(count);
            self->residency.offsets(first, offsets);
            return to_numpy(std::move(offsets), {size_t(count)});
          },
          nb::arg("first"), nb::arg("count"), nb::rv_policy::move,
          "int64 (count,): where the records from `first` on are in memory, -1 for one that is not ready.")
      .def(
          "read_ahead",
          [](BoundClient& self, ArrayIn<int32_t, 1> records) {
            for (size_t i = 0; i < records.shape(0); ++i) self->checked(records.data()[i]);
            self->residency.read_ahead({records.data(), records.shape(0)});
          },
          nb::arg("records"),
          "records: int32, those that may be acquired soon, most likely first; they are not pinned.")
      .def(
          "protect",
          [](BoundClient& self, int first, int count) {
            expect(first >= 0 && count >= 0 && count <= int(self->store.records().size()) - first, "no such record");
            self->residency.protect(first, count);
          },
          nb::arg("first"), nb::arg("count"),
          "Let no read ahead evict the `count` records from `first` on, and those of an earlier call again.")
      .def(
          "wait",
          [](BoundClient& self, double seconds) {
            GilReleased released;
            return self->residency.wait(std::chrono::milliseconds(int64_t(seconds * 1000)));
          },
          nb::arg("seconds") = 1.0,
          "Wait until a read has ended since the last call; false if none does within `seconds`.")
      .def(
          "bytes",
          [](BoundClient& self, int record) -> nb::object {
            expect(self->wanted[self->checked(record)] > 0, "this record is not acquired");
            const uint8_t* bytes = self->residency.bytes(record);
            if (!bytes) return nb::none();
            const size_t count = self->store.records()[record].padded;
            return nb::cast(nb::ndarray<nb::numpy, const uint8_t, nb::c_contig>(bytes, {count}, nb::find(self)));
          },
          nb::arg("record"),
          "uint8 (bytes,) of an acquired record, until it is released; None while it is being read. Raises the\n"
          "read's error.")
      .def_prop_ro(
          "table",
          [](BoundClient& self) {
            std::vector<int32_t> now;
            for (const std::atomic<int32_t>& slot : self->residency.table())
              now.push_back(slot.load(std::memory_order_acquire));
            const size_t records = now.size();
            return to_numpy(std::move(now), {records});
          },
          nb::rv_policy::move, "int32 (records,): the slot of each record that is ready now, else -1.")
      .def(
          "slot",
          [](BoundClient& self, int number) {
            const Slot slot = self->residency.slot(number);
            return std::make_tuple(slot.offset, slot.bytes, slot.record);
          },
          nb::arg("number"), "(offset, bytes, record) of a slot; record -1 for free memory.")
      .def(
          "begin_epoch", [](BoundClient& self) { self->residency.begin_epoch(); },
          "Evict no record that has a slot now until end_epoch().")
      .def("end_epoch", [](BoundClient& self) { self->residency.end_epoch(); })
      .def(
          "tick", [](BoundClient& self) { self->residency.tick(); }, "Advance the clock by one: a layer was computed.")
      .def(
          "resize",
          [](BoundClient& self, uint64_t bytes) {
            Client& client = *self;
            if (client.is_given) return client.residency.resize(bytes);
            GilReleased released;
            client.residency.resize(bytes);
          },
          nb::arg("bytes"),
          "Resize the slots; what is given up is returned to the system. Raises ValueError for less than the largest\n"
          "record and RuntimeError while a record is acquired or an epoch is open.")
      .def_prop_ro("direct", [](const BoundClient& self) { return self->store.direct(); })
      .def(
          "inject",
          [](BoundClient& self, const std::string& kind, int record, int64_t after, int64_t times, uint64_t value) {
            if (record != -1) self->checked(record);
            self->store.inject(read_fault(kind, after, times, value), record);
          },
          nb::arg("kind"), nb::arg("record") = -1, nb::arg("after") = 0, nb::arg("times") = -1, nb::arg("value") = 0,
          "For tests: see Engine.inject.")
      .def("clear_faults", [](BoundClient& self) { self->store.clear_faults(); })
      .def_prop_ro("faults_met", [](const BoundClient& self) { return self->store.faults_met(); })
      .def_prop_ro(
          "worths",
          [](const BoundClient& self) {
            std::vector<double> worths = self->residency.worths();
            const size_t records = worths.size();
            return to_numpy(std::move(worths), {records});
          },
          nb::rv_policy::move, "float64 (records,): the worth of each, which decides eviction; see worths.h.")
      .def_prop_ro("counters", [](const BoundClient& self) {
        const ResidencyStats stats = self->residency.stats();
        nb::dict d;
        d["hits"] = stats.hits, d["misses"] = stats.misses, d["bytes_read"] = stats.bytes_read;
        d["read_ahead"] = stats.read_ahead, d["read_ahead_used"] = stats.read_ahead_used;
        d["records_held"] = self->residency.records_held(), d["bytes"] = self->residency.bytes();
        return d;
      });

  m.def(
      "read_trunk",
      [](const std::string& path, uint64_t bytes, uint32_t checksum, const std::vector<TensorRow>& tensors,
         Buffer memory) {
        GilReleased released;
        Interrupt interrupt([&] { return released.with_gil([] { return unwanted_by(nb::none()); }); });
        const GivenDevice device(scalar(), [&](size_t needed) {
          check_buffer(memory, needed);
          return memory.data();
        });
        try {
          const Trunk trunk(path, bytes, checksum, trunk_tensors(tensors), device, &interrupt);
        } catch (const Interrupted&) {
          released.with_gil([] { throw nb::python_error(); });  // raised by the signal handler
        }
      },
      nb::arg("path"), nb::arg("bytes"), nb::arg("checksum"), nb::arg("tensors"), nb::arg("memory"),
      "Read a trunk into memory, a uint8 array at a multiple of 4096 with trunk_room(bytes) bytes, and check it like\n"
      "Engine, which has the arguments.");
  m.def("trunk_room", &Trunk::room, nb::arg("bytes"),
        "The memory that read_trunk() needs for a file of so many bytes.");
}
