// Python bindings of the engine: the trunk and records it is made from, forward passes, counters.
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <map>
#include <numeric>

#include "../../devices/python/arrays.h"
#include "../../devices/python/encodings.h"
#include "../../devices/python/gil.h"
#include "bind_config.h"
#include "bind_records.h"
#include "cuda_math.h"
#include "engine.h"

using namespace edge_moe;

namespace {

// path, offset, rows, cols, (codec, width, group)
using TableRow = std::tuple<std::string, uint64_t, uint64_t, int, EncodingTuple>;

std::vector<TableFile> table_files(const EngineConfig& c, const std::vector<TableRow>& rows) {
  expect(rows.size() == c.ngrams.size(), "tables must have one entry for each of ngrams");
  std::vector<TableFile> files;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto& [path, offset, count, cols, encoded] = rows[i];
    uint64_t needed = 0;
    for (const auto& hashes : c.ngrams[i].sizes) needed = std::accumulate(hashes.begin(), hashes.end(), needed);
    expect(cols == c.ngrams[i].cols && count >= needed, "a table must have a row for each value of its hashes");
    files.push_back({path, offset, count, row_layout(encoding_of(encoded), cols)});
  }
  return files;
}

void check_layouts(const EngineConfig& c, const std::vector<RecordLayout>& layouts) {
  for (const RecordLayout& layout : layouts) {
    const MatrixLayout &gate = layout.matrices[kGate], &up = layout.matrices[kUp];
    const int gate_rows = c.activation.gate == Gate::kRelu2 ? 0 : c.expert_hidden;
    expect(gate.rows == gate_rows && up.rows == c.expert_hidden && up.cols == c.dim,
           "layouts must be of experts of this model's dimensions");
  }
}

// Raise ValueError for encodings that the device cannot multiply.
void check_kernels(const Device& device, const std::vector<TrunkTensor>& tensors,
                   const std::vector<RecordLayout>& layouts) {
  auto check = [&](const Encoding& e, const std::string& what) {
    expect(device.multiplies(e), what + ": device " + device.name() + " has no kernels for " + traits(e.codec).name +
                                     " of " + std::to_string(e.width) + " bits; update edge-moe");
  };
  for (const TrunkTensor& tensor : tensors) check(tensor.layout.encoding, tensor.name);
  for (const RecordLayout& layout : layouts)
    for (const MatrixLayout& matrix : layout.matrices) check(matrix.encoding, "experts");
}

// A view of memory, for the time of a call.
template <typename T>
nb::object view_of(std::span<T> memory) {
  using View = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
  return nb::cast(View(memory.data(), {memory.size()}, nb::handle()), nb::rv_policy::reference);
}

using MaskArrays = std::vector<ArrayIn<float, 1>>;

Engine::MaskRouters mask_routers(const EngineConfig& c, const MaskArrays& arrays) {
  if (arrays.empty()) return {};
  expect(arrays.size() == size_t(c.layers), "mask routers must have one entry a layer");
  Engine::MaskRouters routers;
  for (int layer = 0; layer < c.layers; ++layer) {
    const size_t top_k = c.top_k[layer], values = top_k * (c.dim + 2 * top_k + 1);
    routers.emplace_back(arrays[layer].data(), arrays[layer].shape(0));
    expect(routers.back().empty() || (top_k && routers.back().size() == values),
           "a mask router must have top_k rows of dim + 2 * top_k + 1 values");
  }
  return routers;
}

using BoundEngine = OfProcess<Engine>;

void check_sequence(const Engine& engine, int sequence) {
  expect(sequence >= 0 && sequence < engine.config().sequences, "there is no such sequence");
}

// Call Engine::step with Python's GIL released, and return its logits as an array (rows, vocab).
ArrayOut<float> run_step(BoundEngine& self, const std::vector<Engine::Part>& parts, const nb::object& stop) {
  std::span<const float> logits;
  Engine& engine = *self;
  try {
    GilReleased released;
    logits = engine.step(parts, [&] {
      return released.with_gil([&] {
        try {
          return unwanted_by(stop);
        } catch (nb::python_error& error) {
          error.restore();
          return true;
        }
      });
    });
  } catch (const Interrupted&) {
    if (PyErr_Occurred()) throw nb::python_error();
    throw;
  }
  const size_t vocab = engine.config().vocab;
  return to_numpy(std::vector<float>(logits.begin(), logits.end()), {logits.size() / vocab, vocab});
}

const Kernels& best_kernels() {
  int count;
  return *available_kernels(&count)[0];
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::exception<DamagedFile>(m, "DamagedFile", PyExc_OSError);
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const SystemError& error) {
      PyErr_SetString(error.error == ENOMEM ? PyExc_MemoryError : PyExc_OSError, error.what());
    } catch (const FileInUse& error) {
      PyErr_SetString(PyExc_OSError, error.what());
    } catch (const cuda::NoMemory& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    }
  });
  nb::exception<KvOverflow>(m, "KvOverflow").doc() = "A key or value was too large for a KV cache in half precision.";
  nb::exception<Interrupted>(m, "Interrupted").doc() = "A call ended because `stop` returned true.";

  nb::class_<PrefetchGate>(m, "PrefetchGate", "Whether reading ahead pays; see prefetch.h.")
      .def(nb::init<>())
      .def("open", &PrefetchGate::open, nb::arg("read_ahead"), nb::arg("used"),
           "Whether to read ahead; called once per token, with both totals so far.");

  nb::class_<BoundEngine>(m, "Engine", "The forward pass over a bundle; everything is allocated on construction.")
      .def(
          "__init__",
          [](BoundEngine* self, const EngineConfig& config, const std::string& trunk_path, uint64_t trunk_bytes,
             uint32_t trunk_checksum, const std::vector<TensorRow>& tensors, const std::vector<std::string>& files,
             const std::vector<RecordLayout>& layouts, ArrayIn<int64_t, 2> records, ArrayIn<float, 1> frequency,
             bool mapped, uint64_t slot_bytes, int readers, const std::string& kernels, const MaskArrays& otp,
             const MaskArrays& loss, const std::string& on, bool graphs, const std::vector<TableRow>& tables) {
            check_config(config);
            expect(on == "cpu" || on == "cuda", "device must be cpu or cuda");
            const Kernels& host = kernels.empty() ? best_kernels() : find_kernels(kernels);
            std::vector<TrunkTensor> trunk_table = trunk_tensors(tensors);
            std::vector<Record> record_table = make_records(config.experts, records, frequency, layouts.size());
            check_layouts(config, layouts);
            const std::vector<TableFile> table_list = table_files(config, tables);
            const Engine::MaskRouters otp_routers = mask_routers(config, otp);
            const Engine::MaskRouters loss_routers = mask_routers(config, loss);
            std::unique_ptr<Engine> engine;
            try {
              GilReleased released;
              Interrupt interrupt([&] { return released.with_gil([] { return unwanted_by(nb::none()); }); });
              std::unique_ptr<Device> device = on == "cuda" ? cuda_device(host, graphs) : cpu_device(host);
              expect(!mapped || device->reads_maps(), "this device reads no mapped records");
              check_kernels(*device, trunk_table, layouts);
              Trunk trunk(trunk_path, trunk_bytes, trunk_checksum, std::move(trunk_table), *device, &interrupt);
              ExpertStore store(files, std::move(record_table), layouts, mapped);
              engine = std::make_unique<Engine>(config, std::move(device), std::move(trunk), std::move(store),
                                                slot_bytes, readers, otp_routers, loss_routers, table_list);
            } catch (const Interrupted&) {
              throw nb::python_error();  // raised by the signal handler
            }
            new (self) BoundEngine(std::move(engine));
          },
          nb::arg("config"), nb::arg("trunk_path"), nb::arg("trunk_bytes"), nb::arg("trunk_checksum"),
          nb::arg("tensors"), nb::arg("files"), nb::arg("layouts"), nb::arg("records"), nb::arg("frequency"),
          nb::arg("mapped"), nb::arg("slot_bytes"), nb::arg("readers"), nb::arg("kernels") = "",
          nb::arg("otp") = nb::list(), nb::arg("loss") = nb::list(), nb::arg("device") = "cpu",
          nb::arg("graphs") = true, nb::arg("tables") = nb::list(),
          "tensors: (name, rows, cols, (codec, width, group), offsets of the parts in the trunk file). layouts:\n"
          "RecordLayout objects. records: int64 (experts of all layers, 5), layer by layer: file, offset, bytes,\n"
          "checksum, index of its layout. slot_bytes: memory for records if they are not mapped. frequency: float32\n"
          "(experts of all layers,), use of each expert during calibration. otp, loss: the mask routers of a rule:\n"
          "float32 (top_k * (dim + 2 * top_k + 1),) per layer, empty for a layer without experts; an empty list for\n"
          "no mask routers. device: cpu or cuda. graphs: use CUDA graphs where possible; results do not depend on\n"
          "it. tables: of n-gram embeddings, (path, offset, rows, cols, (codec, width, group)).\n\n"
          "Raises DamagedFile, an OSError, if a file does not match the tables, OSError if it cannot be read,\n"
          "MemoryError if memory runs out and RuntimeError for errors of the GPU.")
      .def(
          "forward",
          [](BoundEngine& self, ArrayIn<int32_t, 1> tokens, int want, const nb::object& stop, int sequence) {
            return run_step(self, {{sequence, {tokens.data(), tokens.shape(0)}, Engine::Want(want)}}, stop);
          },
          nb::arg("tokens"), nb::arg("want"), nb::arg("stop") = nb::none(), nb::arg("sequence") = 0,
          "Run step() for one sequence.")
      .def(
          "step",
          [](BoundEngine& self, const std::vector<std::tuple<int, ArrayIn<int32_t, 1>, int>>& parts,
             const nb::object& stop) {
            std::vector<Engine::Part> asked;
            for (const auto& [sequence, tokens, want] : parts)
              asked.push_back({sequence, {tokens.data(), tokens.shape(0)}, Engine::Want(want)});
            return run_step(self, asked, stop);
          },
          nb::arg("parts"), nb::arg("stop") = nb::none(),
          "Run int32 tokens (at most `chunk` together) of some sequences at their next positions. parts: (sequence,\n"
          "tokens, want); want 0: no logits, 1: the last row, 2: all rows. Returns float32 (rows, vocab), part by\n"
          "part; no part's bits depend on the others. stop() is called about twenty times a second; if it returns\n"
          "true, the call raises Interrupted and positions do not change. A signal handler that raises ends the call\n"
          "too.")
      .def(
          "set_prune",
          [](BoundEngine& self, const std::string& rule, std::vector<float> threshold, float price, float protect,
             int sequence) {
            const std::map<std::string, Prune> rules = {{"off", Prune::kOff},
                                                        {"ratio", Prune::kRatio},
                                                        {"share", Prune::kShare},
                                                        {"otp", Prune::kOtp},
                                                        {"loss", Prune::kLoss}};
            expect(rules.count(rule), "rule must be off, ratio, share, otp or loss");
            check_sequence(*self, sequence);
            self->set_prune(sequence, {rules.at(rule), std::move(threshold), price, protect});
          },
          nb::arg("rule"), nb::arg("threshold") = nb::list(), nb::arg("price") = 0.0f, nb::arg("protect") = 0.0f,
          nb::arg("sequence") = 0,
          "Set the rule by which a sequence's tokens keep experts from now on; see prune.h. threshold: one per\n"
          "layer, for ratio and share. price: per expert, for otp and loss. protect: share of a prompt's tokens that\n"
          "keep all.")
      .def(
          "set_prefetch", [](BoundEngine& self, bool on) { self->set_prefetch(on); }, nb::arg("on"),
          "Whether idle readers may read experts of the next layer ahead; results do not depend on it.")
      .def_prop_ro("position", [](const BoundEngine& self) { return self->position(0); })
      .def(
          "truncate",
          [](BoundEngine& self, int positions, int sequence) {
            check_sequence(*self, sequence);
            return self->truncate(sequence, positions);
          },
          nb::arg("positions"), nb::arg("sequence") = 0,
          "Truncate a sequence to its first `positions` positions, or to fewer if its state can only be restored to\n"
          "fewer. Returns how many are left.")
      .def(
          "restorable",
          [](const BoundEngine& self, int positions, int sequence) {
            check_sequence(*self, sequence);
            return self->restorable(sequence, positions);
          },
          nb::arg("positions"), nb::arg("sequence") = 0,
          "How many of the first `positions` positions truncate() would leave.")
      .def(
          "snapshot",
          [](BoundEngine& self, int sequence) {
            check_sequence(*self, sequence);
            self->snapshot(sequence);
          },
          nb::arg("sequence") = 0,
          "Keep the recurrent state of a sequence at its position, so that it can be truncated to it, or copied from\n"
          "there. The least recently used snapshots make room for new ones.")
      .def(
          "copy_positions",
          [](BoundEngine& self, int from, int to, int positions) {
            check_sequence(*self, from), check_sequence(*self, to);
            Engine& engine = *self;
            GilReleased released;
            engine.copy_positions(from, to, positions);
          },
          nb::arg("from_"), nb::arg("to"), nb::arg("positions"),
          "Copy the first positions of a sequence, which restorable() has returned, to another one, which then has "
          "only\n"
          "these.")
      .def(
          "saved_bytes", [](const BoundEngine& self, int positions) { return self->saved_bytes(positions); },
          nb::arg("positions"), "How many bytes save_positions() writes.")
      .def(
          "save_positions",
          [](BoundEngine& self, int positions, const nb::callable& write, int sequence) {
            check_sequence(*self, sequence);
            self->save(sequence, positions, [&](std::span<const uint8_t> piece) { write(view_of(piece)); });
          },
          nb::arg("positions"), nb::arg("write"), nb::arg("sequence") = 0,
          "Call write(uint8 (n,)) for what a sequence knows of its first positions, which restorable() has returned, "
          "in\n"
          "pieces of at most 1 MiB, each valid during its call.")
      .def(
          "load_positions",
          [](BoundEngine& self, ArrayIn<int32_t, 1> ids, const nb::callable& read, int sequence) {
            check_sequence(*self, sequence);
            expect(ids.shape(0) <= size_t(self->config().context), "there are more ids than the context has positions");
            self->load(sequence, {ids.data(), ids.shape(0)}, [&](std::span<uint8_t> piece) { read(view_of(piece)); });
          },
          nb::arg("ids"), nb::arg("read"), nb::arg("sequence") = 0,
          "Let a sequence know, in place of what it knew, what save_positions() wrote of the tokens `ids`: read(uint8\n"
          "(n,)) has to fill its argument with the next bytes. If it raises, the sequence is empty.")
      .def(
          "sequence_counters",
          [](const BoundEngine& self, int sequence) {
            check_sequence(*self, sequence);
            const SequenceStats& stats = self->stats(sequence);
            nb::dict d;
            d["tokens"] = stats.tokens, d["experts_used"] = stats.experts_used, d["moe_tokens"] = stats.moe_tokens;
            d["dropped_weight"] = stats.dropped_weight, d["expert_hits"] = stats.expert_hits;
            d["expert_misses"] = stats.expert_misses, d["bytes_read"] = stats.bytes_read;
            return d;
          },
          nb::arg("sequence"),
          "The `counters` of one sequence: an expert that several sequences use in a step counts for the first of\n"
          "them, and records read ahead count for none.")
      .def(
          "resize_slots",
          [](BoundEngine& self, uint64_t bytes) {
            Engine& engine = *self;
            GilReleased released;
            engine.resize_slots(bytes);
          },
          nb::arg("bytes"),
          "Resize the memory for experts, between two steps; what is given up is returned to the system, and mapped\n"
          "records are read into slots from now on. Results do not depend on it.")
      .def_prop_ro("kernels", [](const BoundEngine& self) { return self->device().name(); })
      .def_prop_ro(
          "in_place", [](const BoundEngine& self) { return self->device().in_place(); },
          "Whether records are read straight to where kernels use them; else each is copied to the GPU.")
      .def_prop_ro("direct", [](const BoundEngine& self) { return self->store().direct(); })
      .def(
          "inject",
          [](BoundEngine& self, const std::string& kind, int record, int64_t after, int64_t times, uint64_t value) {
            expect(!self->store().mapped(), "a resident engine reads no records");
            expect(record >= -1 && record < int(self->store().records().size()), "no such record");
            self->store().inject(read_fault(kind, after, times, value), record);
          },
          nb::arg("kind"), nb::arg("record") = -1, nb::arg("after") = 0, nb::arg("times") = -1, nb::arg("value") = 0,
          "For tests: make reads of a record (-1: of any) fail, after `after` good ones, `times` times (-1: from\n"
          "then on). kind: \"error\", with errno `value` (EIO); \"end\", as at the end of the file; \"short\",\n"
          "at most `value` bytes per read (4096); \"flip\", a bit of byte `value`; \"slow\", `value` bytes a\n"
          "second (50 MB). A read is one pread. Several calls add up. May be called from any thread during a step.")
      .def(
          "clear_faults", [](BoundEngine& self) { self->store().clear_faults(); },
          "Undo inject(), waking up reads that are being slowed down.")
      .def_prop_ro(
          "worths",
          [](const BoundEngine& self) {
            std::vector<double> worths = self->residency().worths();
            const size_t records = worths.size();
            return to_numpy(std::move(worths), {records});
          },
          nb::rv_policy::move,
          "The worth of each record, which decides eviction, float64 (experts of all layers,); see worths.h.")
      .def_prop_ro("faults_met", [](const BoundEngine& self) { return self->store().faults_met(); })
      .def_prop_ro(
          "counters",
          [](const BoundEngine& self) {
            const ResidencyStats cache = self->residency().stats();
            const EngineStats& stats = self->stats();
            nb::dict d;
            d["records_held"] = self->residency().records_held();
            d["uncounted_bytes"] = self->device().uncounted_bytes();
            d["expert_hits"] = cache.hits;
            d["expert_misses"] = cache.misses;
            d["bytes_read"] = cache.bytes_read;
            d["read_ahead"] = cache.read_ahead;
            d["read_ahead_used"] = cache.read_ahead_used;
            d["tokens"] = stats.tokens.load();
            d["experts_used"] = stats.experts_used.load();
            d["moe_tokens"] = stats.moe_tokens.load();
            d["dropped_weight"] = stats.dropped_weight.load();
            return d;
          },
          "records_held: records in slots now. uncounted_bytes: GPU memory that peak_bytes() does not count. Totals\n"
          "since construction: expert_hits, expert_misses, bytes_read, read_ahead (records), read_ahead_used (of\n"
          "these), tokens, experts_used (token, layer and expert triples), moe_tokens (token and layer pairs),\n"
          "dropped_weight (share of routing weight, summed over those pairs).");
}
