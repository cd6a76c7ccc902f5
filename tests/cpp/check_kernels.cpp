// Every kernel table of this binary that this machine can run against scalar.cpp, bit for bit, and a digest of what
// scalar.cpp gives, which is the same on every processor. Weights end where memory does, so that reading on would
// crash.
//
//     check_kernels    prints the tables' names, best first, and the digest; exits with 1 where one differs.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../devices/half.h"
#include "../../devices/kernels.h"

using namespace edge_moe;

static uint64_t state = 1, digest = 14695981039346656037ull;

static uint32_t random_bits() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t(state >> 32);
}

static float random_float() { return float(int32_t(random_bits())) / 2147483648.0f; }

static std::vector<float> floats(size_t n) {
  std::vector<float> values(n);
  for (float& value : values) value = random_float();
  return values;
}

static void add_to_digest(const std::vector<float>& values) {
  for (float value : values) {
    uint32_t bits = 0x7fc00000;  // processors differ in the sign of what is not a number
    if (!std::isnan(value)) std::memcpy(&bits, &value, 4);
    digest = (digest ^ bits) * 1099511628211ull;
  }
}

static int failures = 0;

static void compare(const char* table, const std::string& what, const std::vector<float>& got,
                    const std::vector<float>& want) {
  if (std::memcmp(got.data(), want.data(), want.size() * 4) == 0) return;
  std::fprintf(stderr, "%s: %s is not scalar's\n", table, what.c_str());
  ++failures;
}

// `bytes` random bytes before a page that may not be touched.
struct Guarded {
  explicit Guarded(size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), room = (bytes + page - 1) / page * page;
    size = room + page;
    area = static_cast<uint8_t*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0));
    if (area == MAP_FAILED || mprotect(area + room, page, PROT_NONE) != 0) std::abort();
    data = area + room - bytes;
    for (size_t i = 0; i < bytes; ++i) data[i] = uint8_t(random_bits());
  }
  ~Guarded() { munmap(area, size); }
  uint8_t *area, *data;
  size_t size;
};

struct Inputs {
  Inputs(int count, int cols) : values(floats(size_t(count) * cols)) {
    const int blocks = (cols + kBlock - 1) / kBlock;
    for (int block = 0; block < count * blocks; ++block)  // inputs far above the others, in some of the blocks
      if (random_bits() % 3 == 0) values[size_t(block / blocks) * cols + block % blocks * kBlock] *= 3000;
    codes.resize(size_t(count) * blocks * kBlock), lows.resize(codes.size());
    two_planes.resize(size_t(count) * blocks), scales.resize(size_t(count) * blocks);
    for (int i = 0; i < 3; ++i)
      sums[i].resize(size_t(count) * (i == 0 ? 2 * blocks : i == 1 ? blocks : (blocks + 1) / 2));
    x.values = values.data(), x.count = count, x.cols = cols;
    x.quantised = {
        codes.data(), lows.data(), two_planes.data(), scales.data(), {sums[0].data(), sums[1].data(), sums[2].data()}};
  }
  void quantise(const Kernels& kernels) {
    for (size_t t = 0; t < size_t(x.count); ++t)
      kernels.quantise(values.data() + t * x.cols, x.cols, x.quantised.from(t, x.cols));
  }
  // Everything that quantise gives, as floats.
  std::vector<float> all() const {
    std::vector<float> found(codes.begin(), codes.end());
    found.insert(found.end(), lows.begin(), lows.end());
    found.insert(found.end(), two_planes.begin(), two_planes.end());
    found.insert(found.end(), scales.begin(), scales.end());
    for (const auto& of_groups : sums) found.insert(found.end(), of_groups.begin(), of_groups.end());
    return found;
  }
  std::vector<float> values, scales, sums[3];
  std::vector<int8_t> codes, lows;
  std::vector<uint8_t> two_planes;
  Activations x;
};

static const Encoding kEncodings[] = {
    {Codec::kAffine, 1}, {Codec::kAffine, 2}, {Codec::kAffine, 3},    {Codec::kAffine, 4},   {Codec::kAffine, 5},
    {Codec::kAffine, 6}, {Codec::kAffine, 8}, {Codec::kBfloat16, 16}, {Codec::kFloat32, 32}, {Codec::kMxfp4, 4},
};

static void check_products(const Kernels& kernels, bool reference) {
  for (Encoding e : kEncodings)
    for (int group : {32, 64, 128})
      for (int groups : {1, 3, 9, 40})
        for (int rows : {1, 7, 50}) {
          if (e.codec == Codec::kMxfp4 && group != 32) continue;
          const int width = e.width, cols = width < 16 ? group * groups : 10 * groups + 7;
          const Guarded codes(codes_bytes(rows, cols, width)), scales(4 * size_t(rows) * groups);
          for (int i = 0; i < rows * groups; ++i) {  // no infinities, nor what is not a number
            scales.data[4 * i + 1] = uint8_t(0x3c + random_bits() % 4 + random_bits() % 2 * 128);
            scales.data[4 * i + 3] = uint8_t(0x3c + random_bits() % 4 + random_bits() % 2 * 128);
          }
          if (e.codec == Codec::kMxfp4)
            for (int i = 0; i < rows * groups; ++i) scales.data[i] = uint8_t(0x70 + random_bits() % 16);
          for (size_t i = 0; width >= 16 && i < codes_bytes(rows, cols, width); ++i)
            if (i % (width / 8) == size_t(width / 8 - 1)) codes.data[i] = uint8_t(0x3c + random_bits() % 4);
          Matrix m;
          m.codes = codes.data, m.rows = rows, m.cols = cols, m.width = width, m.group = group;
          m.codec = e.codec;
          m.scales = reinterpret_cast<const uint16_t*>(scales.data), m.biases = m.scales + size_t(rows) * groups;
          Inputs inputs(70, cols);
          inputs.quantise(kScalarKernels);
          const std::string what = traits(e.codec).name + (" of " + std::to_string(width)) + " bits, group " +
                                   std::to_string(group) + ", " + std::to_string(rows) + " x " + std::to_string(cols);
          for (int tokens : {1, 2, 11, rows == 7 ? 70 : 3}) {
            Activations x = inputs.x;
            x.count = tokens;
            std::vector<float> want(size_t(tokens) * rows), got(want.size());
            kScalarKernels.matmul(m, x, want.data(), rows, 0, rows);
            kernels.matmul(m, x, got.data(), rows, 0, rows / 3);
            kernels.matmul(m, x, got.data(), rows, rows / 3, rows);
            compare(kernels.name, what + ", " + std::to_string(tokens) + " tokens", got, want);
            if (reference) add_to_digest(want);
          }
          std::vector<float> want(cols), got(cols);
          kScalarKernels.dequantise_row(m, rows - 1, want.data());
          kernels.dequantise_row(m, rows - 1, got.data());
          compare(kernels.name, what + ", last row", got, want);
          if (reference) add_to_digest(want);
        }
}

static void check_vectors(const Kernels& kernels, bool reference) {
  auto both = [&](const std::string& what, auto call) {
    std::vector<float> want = call(kScalarKernels);
    compare(kernels.name, what, call(kernels), want);
    if (reference) add_to_digest(want);
  };
  for (int n : {1, 5, 16, 33, 100, 256, 1000}) {
    const std::string of = " of " + std::to_string(n);
    std::vector<float> a = floats(n), b = floats(n), q = floats(n);
    for (float& value : a) value *= 20;
    for (float largest : {20.0f, 300.0f, INFINITY})  // a block has one plane, two, or what is not finite
      both("quantise" + of, [&](const Kernels& its) {
        Inputs inputs(1, n);
        inputs.values = a;
        inputs.values[n / 3] = largest;
        if (n > 20) inputs.values[17] = NAN;
        inputs.x.values = inputs.values.data();
        inputs.quantise(its);
        return inputs.all();
      });
    auto in_place = [&](auto call) {
      return [&, call](const Kernels& its) {
        std::vector<float> y = a;
        call(its, y.data());
        return y;
      };
    };
    both("rms_norm" + of, in_place([&](const Kernels& its, float* y) { its.rms_norm(y, b.data(), 1e-6f, y, n); }));
    both("layer_norm" + of,
         in_place([&](const Kernels& its, float* y) { its.layer_norm(y, b.data(), q.data(), 1e-6f, y, n); }));
    for (const Activation& activation : {Activation{Gate::kSilu},
                                         {Gate::kGelu},
                                         {Gate::kSigmoid},
                                         {Gate::kClamped, 1.702f, 1.5f},
                                         {Gate::kBilinear},
                                         {Gate::kRelu2}})
      both("activation " + std::to_string(int(activation.gate)) + of,
           in_place([&](const Kernels& its, float* y) { its.gate_up(y, b.data(), n, activation); }));
    both("l2_norm" + of, in_place([&](const Kernels& its, float* y) { its.l2_norm(y, 1e-6f, 0.3f, y, n); }));
    both("softmax with a sink" + of, in_place([&](const Kernels& its, float* y) { its.softmax(y, 0, n, 1.5f); }));
    both("softmax" + of, in_place([&](const Kernels& its, float* y) { its.softmax(y, 0, n, kNoSink); }));
    both("add_scaled" + of, in_place([&](const Kernels& its, float* y) { its.add_scaled(y, b.data(), 0.3f, n); }));
    both("add_positive" + of, in_place([&](const Kernels& its, float* y) { its.add_positive(y, b.data(), -0.3f, n); }));
    std::vector<uint16_t> halves(48 * size_t(n));
    for (uint16_t& half : halves) half = float_to_half(floats(1)[0]);
    std::vector<float> keys = floats(48 * size_t(n)), values = floats(48 * size_t(n));
    for (int queries : {1, 3, 7, 13})
      for (bool half : {false, true})
        both("attention of " + std::to_string(queries) + of, [&](const Kernels& its) {
          KeyValues cache{keys.data(), values.data(), size_t(n), half};
          if (half) cache.keys = cache.values = halves.data();
          std::vector<float> out(size_t(queries) * n), scores(size_t(queries) * 48);
          std::vector<const float*> q_rows(queries, q.data());
          std::vector<float*> out_rows;
          for (int i = 0; i < queries; ++i) out_rows.push_back(out.data() + size_t(i) * n);
          its.attend_scores(q_rows.data(), queries, cache, 5, 37, n, 0.2f, scores.data(), 48);
          for (int i = 0; i < queries; ++i)
            its.softmax(scores.data() + size_t(i) * 48, 5 + i % 3, 37, i % 2 ? kNoSink : 0.3f * i);
          its.attend_values(scores.data(), 48, queries, cache, 7, 37, n, out_rows.data());
          return out;
        });
    both("widen" + of, [&](const Kernels& its) {
      std::vector<float> y(n);
      its.widen(halves.data(), y.data(), n);
      return y;
    });
  }
}

static void check_delta(const Kernels& kernels, bool reference) {
  constexpr int kTokens = 5;
  for (auto [head_dim, v_dim] : {std::pair{7, 5}, {16, 64}, {64, 100}, {128, 128}}) {
    const size_t channels = 2 * size_t(head_dim) + v_dim;
    const std::vector<float> qkv = floats(kTokens * channels), gates = floats(2 * kTokens),
                             weights = floats(4 * channels);
    const std::vector<float> state = floats(size_t(head_dim) * v_dim), inputs = floats(3 * channels);
    for (auto [begins, mamba] : {std::pair{true, false}, {false, false}, {true, true}, {false, true}}) {
      const auto all = [&](const Kernels& its) {
        std::vector<float> x = qkv, next(inputs.size()), to(state.size()), out(kTokens * size_t(v_dim));
        const Convolution conv = {
            weights.data(), begins ? nullptr : inputs.data(), next.data(), 4, int(channels), channels,
            begins,         mamba ? weights.data() : nullptr};
        its.convolve(conv, x.data(), kTokens, 1, int(channels));
        const DeltaHead head = {
            &x[0], &x[head_dim],  &x[2 * head_dim], &gates[0], &gates[kTokens], out.data(), channels,
            1,     size_t(v_dim), kTokens,          head_dim,  v_dim,           !mamba};
        its.delta_rule(head, begins ? nullptr : state.data(), to.data());
        for (const auto* values : {&next, &to, &out}) x.insert(x.end(), values->begin(), values->end());
        return x;
      };
      const std::vector<float> want = all(kScalarKernels);
      compare(kernels.name, std::string(mamba ? "Mamba-2 of " : "delta net of ") + std::to_string(head_dim),
              all(kernels), want);
      if (reference) add_to_digest(want);
    }
  }
}

int main() {
  int count;
  const Kernels* const* tables = available_kernels(&count);
  for (int i = 0; i < count; ++i) {
    state = 1;
    check_products(*tables[i], i == 0);
    check_vectors(*tables[i], i == 0);
    check_delta(*tables[i], i == 0);
    std::printf("%s ", tables[i]->name);
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(digest));
  return failures ? 1 : 0;
}
