// The recurrence of gated delta nets and Mamba-2 for all instruction sets; scalar.cpp defines the result.
//
// Each cpu/*.cpp includes this file after packed.inl and attend.inl, inside its own namespace. Columns of a state do
// not depend on one another, so a few registers of columns are taken through all tokens at a time: their part of the
// state stays in the first-level cache.

constexpr int kDeltaRegisters = 4;  // of columns at a time

// The columns of `Registers` registers from `first` on.
template <int Registers>
inline void delta_columns(const DeltaHead& h, const float* from, float* to, int first) {
  const auto at = [&](const float* state, int i, int r) {
    return load_cached(state + size_t(i) * h.v_dim + first + r * kTileRows);
  };
  for (int t = 0; t < h.tokens; ++t, from = to) {
    const float *q = h.q + t * h.stride, *k = h.k + t * h.stride, *v = h.v + t * h.stride + first;
    const Vector decay = broadcast(h.decay[t * h.gate_stride]), write = broadcast(h.write[t * h.gate_stride]);
    Vector known[Registers], change[Registers], out[Registers];
    unrolled<Registers>([&](auto r) { known[r] = broadcast(0.0f); });
    for (int i = 0; h.replaces && from && i < h.head_dim; ++i) {
      const Vector key = broadcast(k[i]);
      unrolled<Registers>([&](auto r) { known[r] = fma(multiply(at(from, i, r), decay), key, known[r]); });
    }
    unrolled<Registers>([&](auto r) {
      change[r] = multiply(fma(broadcast(-1.0f), known[r], load_cached(v + r * kTileRows)), write);
      out[r] = broadcast(0.0f);
    });
    for (int i = 0; i < h.head_dim; ++i) {
      const Vector key = broadcast(k[i]), query = broadcast(q[i]);
      unrolled<Registers>([&](auto r) {
        const Vector before = from ? multiply(at(from, i, r), decay) : broadcast(0.0f);
        const Vector s = fma(key, change[r], before);
        std::memcpy(to + size_t(i) * h.v_dim + first + r * kTileRows, &s, sizeof s);
        out[r] = fma(s, query, out[r]);
      });
    }
    unrolled<Registers>(
        [&](auto r) { std::memcpy(h.out + t * h.out_stride + first + r * kTileRows, &out[r], sizeof(Vector)); });
  }
}

void delta_rule(const DeltaHead& h, const float* from, float* to) {
  int column = 0;
  const auto all_of = [&](auto registers) {
    for (; column + registers * kTileRows <= h.v_dim; column += registers * kTileRows)
      delta_columns<registers>(h, from, to, column);
  };
  all_of(std::integral_constant<int, kDeltaRegisters>{});
  all_of(std::integral_constant<int, 1>{});
  delta_from(h, from, to, column);
}
