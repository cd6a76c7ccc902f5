// Norms, activations, attention and softmax over sixteen lanes: the same source for every instruction set.
// Each cpu/*.cpp sets kRegister, the floats of its vector registers, and includes this file once inside its
// own namespace. It is compiled with its own flags and -ffp-contract=off, so the compiler may vectorise but
// not reorder or fuse, and every build gives the same bits.

// Sixteen sums, as a vector type of the compilers: gcc 12 would keep an array of floats in memory.
typedef float Register __attribute__((vector_size(kRegister * 4)));
struct Lanes {
  Register parts[kLanes / kRegister];
};

// Folds sixteen lanes to one sum: lane j plus lane j + 8, then + 4, + 2 and + 1.
inline float fold(const float* lanes) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight eights[2];
  std::memcpy(eights, lanes, 64);
  const Eight eight = eights[0] + eights[1];
  Four fours[2];
  std::memcpy(fours, &eight, 32);
  const Four four = fours[0] + fours[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

inline float fold(const Lanes& lanes) {
  float values[kLanes];
  std::memcpy(values, &lanes, 64);
  return fold(values);
}

inline void add_values(Lanes& lanes, const float* x) {
  for (int i = 0; i < kLanes / kRegister; ++i) {
    Register a;
    std::memcpy(&a, x + i * kRegister, sizeof(a));
    lanes.parts[i] = lanes.parts[i] + a;
  }
}

// lanes += x * y, unfused
inline void add_products(Lanes& lanes, const float* x, const float* y) {
  for (int i = 0; i < kLanes / kRegister; ++i) {
    Register a, b;
    std::memcpy(&a, x + i * kRegister, sizeof(a));
    std::memcpy(&b, y + i * kRegister, sizeof(b));
    lanes.parts[i] = lanes.parts[i] + a * b;
  }
}

// The same for fewer than sixteen values.
inline void add_last_products(Lanes& lanes, const float* x, const float* y, int count) {
  float padded[2][kLanes] = {};
  std::memcpy(padded[0], x, size_t(count) * 4);
  std::memcpy(padded[1], y, size_t(count) * 4);
  add_products(lanes, padded[0], padded[1]);
}

// The sum of the squares of x.
inline float squares_of(const float* x, int n) {
  Lanes lanes = {};
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) add_products(lanes, x + i, x + i);
  if (whole < n) add_last_products(lanes, x + whole, x + whole, n - whole);
  return fold(lanes);
}

void l2_norm(const float* x, float eps, float scale, float* y, int n) {
  const float factor = scale / std::sqrt(squares_of(x, n) + eps);
  for (int i = 0; i < n; ++i) y[i] = x[i] * factor;
}

void rms_norm(const float* x, const float* weight, float eps, float* y, int n) {
  const float inverse = 1.0f / std::sqrt(squares_of(x, n) / float(n) + eps);
  for (int i = 0; i < n; ++i) y[i] = x[i] * inverse * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, float* y, int n) {
  Lanes sums = {}, squares = {};
  float some[kLanes];
  // each(values) of sixteen at a time, shifted by `shift`; the last are filled up with zeros
  const auto in_lanes = [&](float shift, auto each) {
    const int whole = n / kLanes * kLanes;
    for (int i = 0; i < whole; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) some[j] = x[i + j] - shift;
      each();
    }
    if (whole == n) return;
    for (int j = 0; j < kLanes; ++j) some[j] = whole + j < n ? x[whole + j] - shift : 0.0f;
    each();
  };
  in_lanes(0.0f, [&] { add_values(sums, some); });
  const float mean = fold(sums) / float(n);
  in_lanes(mean, [&] { add_products(squares, some, some); });
  const float inverse = 1.0f / std::sqrt(fold(squares) / float(n) + eps);
  for (int i = 0; i < n; ++i) y[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

template <Gate Kind>
void gate_up_of(float* gate, const float* up, int n, const Activation& its) {
  const float alpha = its.alpha, limit = its.limit, shift = its.shift;
  for (int i = 0; i < n; ++i) gate[i] = gated(gate[i], up[i], {Kind, alpha, limit, shift});
}

void gate_up(float* gate, const float* up, int n, const Activation& activation) {
  auto* loop = activation.gate == Gate::kSilu      ? gate_up_of<Gate::kSilu>
               : activation.gate == Gate::kGelu    ? gate_up_of<Gate::kGelu>
               : activation.gate == Gate::kSigmoid ? gate_up_of<Gate::kSigmoid>
               : activation.gate == Gate::kClamped ? gate_up_of<Gate::kClamped>
               : activation.gate == Gate::kRelu2   ? gate_up_of<Gate::kRelu2>
                                                   : gate_up_of<Gate::kBilinear>;
  loop(gate, up, n, activation);
}

void convolve(const Convolution& c, float* x, int tokens, int begin, int end) {
  const int past = c.reach();
  const auto input = [&](int t) { return t < 0 ? c.past + size_t(t + past) * c.channels : x + t * c.stride; };
  // The inputs that the next tokens need, before they are overwritten.
  for (int t = tokens - past; t < tokens; ++t) {
    float* to = c.next + size_t(t - tokens + past) * c.channels;
    if (t < 0 && !c.past)
      std::memset(to + begin, 0, size_t(end - begin) * sizeof(float));
    else
      std::memcpy(to + begin, input(t) + begin, size_t(end - begin) * sizeof(float));
  }
  for (int t = tokens - 1; t >= 0; --t) {  // backwards: a token's input is needed by later tokens
    float* y = x + t * c.stride;
    const float* own = c.weights + size_t(c.kernel - 1) * c.channels;
    for (int i = begin; i < end; ++i) y[i] = own[i] * y[i];
    for (int at = 1; at < c.kernel && (c.past || t >= at * c.apart); ++at) {
      const float *from = input(t - at * c.apart), *weights = c.weights + size_t(c.kernel - 1 - at) * c.channels;
      for (int i = begin; i < end; ++i) y[i] = std::fma(weights[i], from[i], y[i]);
    }
    for (int i = begin; c.bias && i < end; ++i) y[i] = y[i] + c.bias[i];
    for (int i = begin; c.silu && i < end; ++i) y[i] = gated(y[i], 1.0f, {Gate::kSilu});
  }
}

// delta_rule() for columns from `first` on, one by one.
inline void delta_from(const DeltaHead& h, const float* from, float* to, int first) {
  for (int t = 0; t < h.tokens; ++t, from = to) {
    const float *q = h.q + t * h.stride, *k = h.k + t * h.stride, *v = h.v + t * h.stride;
    const float decay = h.decay[t * h.gate_stride], write = h.write[t * h.gate_stride];
    for (int j = first; j < h.v_dim; ++j) {
      const auto before = [&](int i) { return from ? from[size_t(i) * h.v_dim + j] * decay : 0.0f; };
      float known = 0.0f, out = 0.0f;
      for (int i = 0; h.replaces && i < h.head_dim; ++i) known = std::fma(before(i), k[i], known);
      const float change = (v[j] - known) * write;
      for (int i = 0; i < h.head_dim; ++i) {
        const float s = std::fma(k[i], change, before(i));
        to[size_t(i) * h.v_dim + j] = s;
        out = std::fma(s, q[i], out);
      }
      h.out[t * h.out_stride + j] = out;
    }
  }
}

// Replaces x[i] by exp(x[i] - top), and returns their sum and that of the sink's.
inline float exponentiate(float* x, int begin, int end, float sink) {
  float tops[kLanes];
  int i = begin;
  for (float& top : tops) top = x[begin];
  for (; i + kLanes <= end; i += kLanes)
    for (int j = 0; j < kLanes; ++j) tops[j] = x[i + j] > tops[j] ? x[i + j] : tops[j];
  for (; i < end; ++i) tops[0] = x[i] > tops[0] ? x[i] : tops[0];
  float top = tops[0];
  for (int j = 1; j < kLanes; ++j) top = tops[j] > top ? tops[j] : top;
  top = sink > top ? sink : top;
  for (i = begin; i < end; ++i) x[i] = exp_lane(x[i] - top);

  // Lanes follow the absolute position, so the order of the sum does not depend on the window or the prompt's length.
  Lanes lanes = {};
  for (i = begin / kLanes * kLanes; i < end; i += kLanes) {
    if (i >= begin && i + kLanes <= end) {
      add_values(lanes, x + i);
    } else {
      float padded[kLanes] = {};
      for (int j = 0; j < kLanes; ++j)
        if (i + j >= begin && i + j < end) padded[j] = x[i + j];
      add_values(lanes, padded);
    }
  }
  return fold(lanes) + exp_lane(sink - top);
}

void softmax(float* x, int begin, int end, float sink) {
  const float inverse = 1.0f / exponentiate(x, begin, end, sink);
  for (int i = begin; i < end; ++i) x[i] = x[i] * inverse;
}

void add_scaled(float* y, const float* x, float weight, int n) {
  for (int i = 0; i < n; ++i) y[i] = y[i] + weight * x[i];
}

void add_positive(float* y, const float* x, float weight, int n) {
  for (int i = 0; i < n; ++i) y[i] = y[i] + weight * (x[i] > 0.0f ? x[i] : 0.0f);
}

inline float as_float(float value) { return value; }
inline float as_float(uint16_t half) { return half_to_float(half); }

// The first step of quantise() for one block: its inputs, padded with zeros if there are fewer.
inline const float* block_inputs(const float* x, int cols, int block, float* padded) {
  const float* in = x + block * kBlock;
  const int count = cols - block * kBlock;
  if (count >= kBlock) return in;
  std::memset(padded, 0, kBlock * sizeof(float));
  std::memcpy(padded, in, size_t(count) * sizeof(float));
  return padded;
}

// The last step of quantise(): stores all of a block but its codes. sums: of each half, in steps of the lows.
inline void store_block(const Quantised& to, int block, bool two, float scale, const int* sums) {
  auto sum = [&](int steps) { return scale * (float(steps) * kLowStep); };
  to.two_planes[block] = two;
  to.scales[block] = scale;
  to.sums[0][2 * block] = sum(sums[0]);
  to.sums[0][2 * block + 1] = sum(sums[1]);
  to.sums[1][block] = sum(sums[0] + sums[1]);
}

inline void pair_sums(const Quantised& to, int blocks) {
  const float* of = to.sums[1];
  for (int pair = 0; pair < (blocks + 1) / 2; ++pair)
    to.sums[2][pair] = 2 * pair + 1 < blocks ? of[2 * pair] + of[2 * pair + 1] : of[2 * pair];
}
