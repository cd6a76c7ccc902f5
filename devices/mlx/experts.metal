// Routing, and the experts of a layer that a token has chosen, each encoded as its record says.
//
// MSL functions; kernels.py makes kernels of them. A simdgroup has 32 lanes, which share the columns of a product.
//
// arena: the memory of all slots, in words; a page is 1024 of them. A token's chosen experts are its places, in order
// of rank: pages[place] is where an expert's record begins, -1 without one, and kind_of[place] says which of `kinds` it
// is. Of each kind there are 24 numbers, 8 for each of gate, up and down: its form, where codes (in words), scales and
// biases (in values) and the output bias (in words) begin, and its group. Form 0: there is no such matrix; 1 to 8:
// affine codes of so many bits; 16: bfloat16; 20: MXFP4. An output bias at 0: there is none.

constant constexpr int kNumbers = 24, kForm = 0, kCodes = 1, kScales = 2, kBiases = 3, kOutputBias = 4, kGroup = 5;
constant constexpr int kBfloat16 = 16, kMxfp4 = 20;

inline float bfloat16_at(const device ushort* values, uint at) { return as_type<float>(uint(values[at]) << 16); }

// ---- a part of some rows of a product: x (cols,), rows first to first + R - 1, of which the last may be repeated

// The sum of 32 codes of B bits times x. Codes whose width divides 32 are not shifted down: x was scaled by a power of
// two instead, in spread(), which changes no bit of a product.
template <int B>
inline float dot_codes(const device uint* codes, const thread float* x) {
  uint words[B];
  for (int i = 0; i < B; ++i) words[i] = codes[i];
  float sum = 0.0f;
  for (int i = 0; i < 32; ++i) {  // every shift is a constant when this is unrolled
    const int bit = i * B, at = bit / 32, low = bit % 32;
    uint code;
    if (32 % B == 0) {
      code = words[at] & (((1u << B) - 1u) << low);
    } else {
      code = words[at] >> low;
      if (low + B > 32) code |= words[at + 1] << (32 - low);
      code &= (1u << B) - 1u;
    }
    sum = fma(float(code), x[i], sum);
  }
  return sum;
}

template <int B>
inline void spread(thread float* x) {
  if (32 % B == 0)
    for (int i = 0; i < 32; ++i) x[i] *= 1.0f / float(1u << (i * B % 32));
}

template <int B, int R>
inline void affine_rows(const device uint* record, const device int* matrix, int rows, int cols, int first,
                        const device float* x, uint lane, thread float* sums) {
  const device uint* codes = record + matrix[kCodes];
  const device ushort* scales = reinterpret_cast<const device ushort*>(record) + matrix[kScales];
  const device ushort* biases = reinterpret_cast<const device ushort*>(record) + matrix[kBiases];
  const int group = matrix[kGroup], chunks = cols / 32, groups = cols / group;
  for (int chunk = int(lane); chunk < chunks; chunk += 32) {
    float inputs[32], all = 0.0f;
    for (int i = 0; i < 32; ++i) {
      inputs[i] = x[chunk * 32 + i];
      all += inputs[i];
    }
    spread<B>(inputs);
    for (int r = 0; r < R; ++r) {
      const uint row = uint(min(first + r, rows - 1)), at = row * uint(groups) + uint(chunk * 32 / group);
      const float product = dot_codes<B>(codes + (row * uint(chunks) + uint(chunk)) * uint(B), inputs);
      sums[r] = fma(bfloat16_at(scales, at), product, fma(bfloat16_at(biases, at), all, sums[r]));
    }
  }
}

// Twice the value of an E2M1 code.
inline float e2m1_twice(uint code) {
  const uint low = code & 7u;
  const float size = float(low < 2u ? low : (2u + (low & 1u)) << (low / 2u - 1u));
  return code & 8u ? -size : size;
}

// Half of an E8M0 scale, 2^(exponent - 128).
inline float e8m0_half(uint exponent) { return as_type<float>(max(exponent << 23, 1u << 22)) * 0.5f; }

template <int R>
inline void mxfp4_rows(const device uint* record, const device int* matrix, int rows, int cols, int first,
                       const device float* x, uint lane, thread float* sums) {
  const device uint* codes = record + matrix[kCodes];
  const device uchar* scales = reinterpret_cast<const device uchar*>(record) + matrix[kScales];
  const int chunks = cols / 32;
  for (int chunk = int(lane); chunk < chunks; chunk += 32) {
    float inputs[32];
    for (int i = 0; i < 32; ++i) inputs[i] = x[chunk * 32 + i];
    for (int r = 0; r < R; ++r) {
      const uint at = uint(min(first + r, rows - 1)) * uint(chunks) + uint(chunk);
      float product = 0.0f;
      for (int word = 0; word < 4; ++word) {
        const uint eight = codes[at * 4u + uint(word)];
        for (int i = 0; i < 8; ++i) product = fma(e2m1_twice(eight >> (4 * i)), inputs[word * 8 + i], product);
      }
      sums[r] = fma(e8m0_half(scales[at]), product, sums[r]);
    }
  }
}

template <int R>
inline void bfloat16_rows(const device uint* record, const device int* matrix, int rows, int cols, int first,
                          const device float* x, uint lane, thread float* sums) {
  const device ushort* values = reinterpret_cast<const device ushort*>(record + matrix[kCodes]);
  for (int col = int(lane); col < cols; col += 32) {
    const float input = x[col];
    for (int r = 0; r < R; ++r)
      sums[r] = fma(bfloat16_at(values, uint(min(first + r, rows - 1)) * uint(cols) + uint(col)), input, sums[r]);
  }
}

// The whole of R rows of a product, with the output bias, in every lane.
template <int R>
inline void rows_of(const device uint* record, const device int* matrix, int rows, int cols, int first,
                    const device float* x, uint lane, thread float* sums) {
  for (int r = 0; r < R; ++r) sums[r] = 0.0f;
  switch (matrix[kForm]) {  // the same for all lanes of a simdgroup
    case 1: affine_rows<1, R>(record, matrix, rows, cols, first, x, lane, sums); break;
    case 2: affine_rows<2, R>(record, matrix, rows, cols, first, x, lane, sums); break;
    case 3: affine_rows<3, R>(record, matrix, rows, cols, first, x, lane, sums); break;
    case 4: affine_rows<4, R>(record, matrix, rows, cols, first, x, lane, sums); break;
    case 5: affine_rows<5, R>(record, matrix, rows, cols, first, x, lane, sums); break;
    case 6: affine_rows<6, R>(record, matrix, rows, cols, first, x, lane, sums); break;
    case 8: affine_rows<8, R>(record, matrix, rows, cols, first, x, lane, sums); break;
    case kBfloat16: bfloat16_rows<R>(record, matrix, rows, cols, first, x, lane, sums); break;
    case kMxfp4: mxfp4_rows<R>(record, matrix, rows, cols, first, x, lane, sums); break;
  }
  for (int r = 0; r < R; ++r) sums[r] = simd_sum(sums[r]);
  if (matrix[kOutputBias] == 0) return;
  const device float* bias = reinterpret_cast<const device float*>(record + matrix[kOutputBias]);
  for (int r = 0; r < R; ++r) sums[r] += bias[min(first + r, rows - 1)];
}

// ---- gate, up and activation

constant constexpr int kSilu = 0, kGelu = 1, kRelu2 = 3;  // 2: clamped SwiGLU, of `numbers` alpha, limit and shift

template <int ACTIVATION>
inline float activated(float gate, float up, const device float* numbers) {
  if (ACTIVATION == kRelu2) return up > 0.0f ? up * up : 0.0f;
  if (ACTIVATION == kSilu) return gate / (1.0f + exp(-gate)) * up;
  if (ACTIVATION == kGelu) {  // in its tanh form
    const float u = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1.0f + exp(-2.0f * u)) * up;
  }
  const float limit = numbers[1], low = min(gate, limit);
  return low / (1.0f + exp(-(numbers[0] * low))) * (min(max(up, -limit), limit) + numbers[2]);
}

// Four rows of `inner`, (places of all tokens, hidden), by a simdgroup; zeros for a place without a record. x: (tokens,
// dim). place: of all tokens, of which each has `places`.
template <int ACTIVATION>
inline void gate_up(const device float* x, const device uint* arena, const device int* pages,
                    const device int* kind_of, const device int* kinds, const device float* numbers, int dim,
                    int hidden, int places, uint place, int first, uint lane, device float* inner) {
  const int page = pages[place];
  float gate[4], up[4];
  for (int r = 0; r < 4; ++r) gate[r] = 0.0f, up[r] = 0.0f;
  if (page >= 0) {
    const device uint* record = arena + size_t(page) * 1024u;
    const device int* matrices = kinds + kind_of[place] * kNumbers;
    const device float* inputs = x + place / uint(places) * uint(dim);
    if (ACTIVATION != kRelu2) rows_of<4>(record, matrices, hidden, dim, first, inputs, lane, gate);
    rows_of<4>(record, matrices + 8, hidden, dim, first, inputs, lane, up);
  }
  for (int r = 0; r < 4; ++r)
    if (int(lane) == r && first + r < hidden)
      inner[place * uint(hidden) + uint(first + r)] = page < 0 ? 0.0f : activated<ACTIVATION>(gate[r], up[r], numbers);
}

// ---- down, weighted sum and residual

// Four rows of a place's product with down, to sums[place of the token * 4].
inline void down_rows(const device float* inner, const device uint* arena, const device int* pages,
                      const device int* kind_of, const device int* kinds, int dim, int hidden, uint place, int first,
                      uint lane, thread float* sums) {
  for (int r = 0; r < 4; ++r) sums[r] = 0.0f;
  if (pages[place] < 0) return;
  const device uint* record = arena + size_t(pages[place]) * 1024u;
  rows_of<4>(record, kinds + kind_of[place] * kNumbers + 16, dim, hidden, first, inner + place * uint(hidden), lane,
             sums);
}

// ---- routing of one token, by one simdgroup: lane l has the experts l, l + 32...

constant constexpr int kSoftmax = 0, kSigmoid = 1, kSparsemixer = 2, kSqrtSoftplus = 3;

// The root of log(1 + exp(x)). The logarithm is a series of (e / (2 + e)), where e is at most 1: exact where e is small.
inline float sqrt_softplus(float x) {
  const float e = exp(-fabs(x)), s = e / (2.0f + e), t = s * s;
  float sum = 1.0f / 13.0f;
  for (int n = 11; n > 0; n -= 2) sum = fma(sum, t, 1.0f / float(n));
  return sqrt(max(x, 0.0f) + 2.0f * s * sum);
}

// Order the experts by weight, the largest first, and those without a number last. Ties go to the lower number, or stay
// in their order.
template <int N, bool BY_NUMBER>
inline void sort(thread int* ids, thread float* weights) {
  int rank[N], old_ids[N];
  float old_weights[N];
  for (int i = 0; i < N; ++i) {
    old_ids[i] = ids[i], old_weights[i] = weights[i], rank[i] = 0;
    for (int j = 0; j < N; ++j) {
      const bool tie = BY_NUMBER ? ids[j] < ids[i] : j < i;
      const bool before = weights[j] > weights[i] || (weights[j] == weights[i] && tie);
      rank[i] += ids[j] < 0 ? ids[i] < 0 && j < i : ids[i] < 0 || before;
    }
  }
  for (int place = 0; place < N; ++place)
    for (int i = 0; i < N; ++i)
      if (rank[i] == place) ids[place] = old_ids[i], weights[place] = old_weights[i];
}

// The lane's part of a score becomes the lowest where the expert's group is not one of the best. A group's score is
// that of its best expert, or the sum of its two best; a group without experts is the worst.
template <int EXPERTS, int GROUPS>
inline void close_groups(thread float* worth, const device int* group_of, int top_groups, bool two, uint lane) {
  constexpr int EACH = (EXPERTS + 31) / 32;
  float best[GROUPS];
  for (int group = 0; group < GROUPS; ++group) {
    float top = -INFINITY, second = -INFINITY;
    for (int i = 0; i < EACH; ++i) {
      const int expert = i * 32 + int(lane);
      if (expert >= EXPERTS || group_of[expert] != group) continue;
      if (worth[i] > top)
        second = top, top = worth[i];
      else
        second = max(second, worth[i]);
    }
    best[group] = simd_max(top);
    const int owner = simd_min(top == best[group] ? int(lane) : 32);
    second = simd_max(int(lane) == owner ? second : top);
    if (two && second > -INFINITY) best[group] += second;
  }
  bool open[GROUPS];
  for (int group = 0; group < GROUPS; ++group) open[group] = false;
  for (int n = 0; n < top_groups; ++n) {
    int chosen = -1;
    float most = 0.0f;
    for (int group = 0; group < GROUPS; ++group)
      if (!open[group] && (chosen < 0 || best[group] > most)) chosen = group, most = best[group];
    for (int group = 0; group < GROUPS; ++group) open[group] = open[group] || group == chosen;
  }
  for (int i = 0; i < EACH; ++i) {
    const int expert = i * 32 + int(lane);
    bool stays = false;
    for (int group = 0; group < GROUPS; ++group)
      stays = stays || (expert < EXPERTS && open[group] && group_of[expert] == group);
    if (!stays) worth[i] = -INFINITY;
  }
}

// The largest of the lanes' values that is not -INFINITY, and the expert that has it, EXPERTS if there is none; of
// several the lower number.
template <int EXPERTS>
inline int best_of(const thread float* values, uint lane, thread float* most) {
  constexpr int EACH = (EXPERTS + 31) / 32;
  float best = -INFINITY;
  int at = EXPERTS;
  for (int i = 0; i < EACH; ++i)
    if (values[i] > best) best = values[i], at = i * 32 + int(lane);
  *most = simd_max(best);
  return simd_min(best == *most ? at : EXPERTS);
}

// numbers: factor of the logits, addend of the sum of weights that are scaled to one, factor of the final weights,
// threshold of kSparsemixer. bias, group_of, expert_scale: (EXPERTS,), read where there is one. given: (GIVEN,), the
// experts to choose from, -1 for none; all if GIVEN is 0. ids, weights: (TOP_K,).
template <int EXPERTS, int TOP_K, int SCORE, int GROUPS, bool BIASED, bool RENORMALISED, bool SCALED, int GIVEN>
inline void route(const device float* logits, const device float* bias, const device int* group_of,
                  const device float* expert_scale, const device float* numbers, const device int* given,
                  int top_groups, bool two, uint lane, thread int* ids, thread float* weights) {
  constexpr int EACH = (EXPERTS + 31) / 32;
  float score[EACH], worth[EACH], top = -INFINITY;
  for (int i = 0; i < EACH; ++i) {
    const int expert = i * 32 + int(lane);
    score[i] = expert < EXPERTS ? logits[expert] * numbers[0] : -INFINITY;
    top = max(top, score[i]);
  }
  if (SCORE == kSoftmax) {
    top = simd_max(top);
    float all = 0.0f;
    for (int i = 0; i < EACH; ++i) score[i] = exp(score[i] - top), all += score[i];
    all = simd_sum(all);
    for (int i = 0; i < EACH; ++i) score[i] = score[i] / all;
  }
  if (SCORE == kSigmoid)
    for (int i = 0; i < EACH; ++i) score[i] = 1.0f / (1.0f + exp(-score[i]));
  if (SCORE == kSqrtSoftplus)
    for (int i = 0; i < EACH; ++i) score[i] = sqrt_softplus(score[i]);
  for (int i = 0; i < EACH; ++i) {
    const int expert = i * 32 + int(lane);
    worth[i] = expert >= EXPERTS ? -INFINITY : BIASED ? score[i] + bias[expert] : score[i];
    bool listed = GIVEN == 0;
    for (int n = 0; n < GIVEN; ++n) listed = listed || given[n] == expert;
    if (!listed) worth[i] = -INFINITY;
  }
  if (GROUPS > 1) close_groups<EXPERTS, GROUPS>(worth, group_of, top_groups, two, lane);

  for (int k = 0; k < TOP_K; ++k) {
    float most;
    const int chosen = best_of<EXPERTS>(worth, lane, &most);
    float weight = 0.0f;
    if (SCORE == kSparsemixer) {  // a softmax over those that are left and not far below the best
      for (int i = 0; i < EACH; ++i)
        if (worth[i] > -INFINITY && !((most - worth[i]) / max(fabs(worth[i]), most) > numbers[3]))
          weight += exp(worth[i] - most);
      weight = 1.0f / simd_sum(weight);
    } else {
      for (int i = 0; i < EACH; ++i)
        if (i * 32 + int(lane) == chosen) weight = score[i];
      weight = simd_sum(weight);
    }
    for (int i = 0; i < EACH; ++i)
      if (i * 32 + int(lane) == chosen) worth[i] = -INFINITY;
    ids[k] = chosen < EXPERTS ? chosen : -1;
    weights[k] = chosen < EXPERTS ? weight : 0.0f;
  }

  if (BIASED) sort<TOP_K, true>(ids, weights);
  if (SCORE == kSparsemixer) sort<TOP_K, false>(ids, weights);
  float sum = 0.0f;
  for (int k = 0; k < TOP_K; ++k) sum += weights[k];
  for (int k = 0; k < TOP_K; ++k) {
    if (RENORMALISED && SCORE != kSparsemixer) weights[k] /= sum + numbers[1];
    weights[k] *= numbers[2];
  }
  if (!SCALED) return;
  for (int k = 0; k < TOP_K; ++k)
    if (ids[k] >= 0) weights[k] *= expert_scale[ids[k]];
  sort<TOP_K, false>(ids, weights);
}
