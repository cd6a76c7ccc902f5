// Norms, activations, attention and softmax as plain loops over 16 lanes: the same source for every instruction
// set. Each cpu/*.cpp includes this file once inside its own namespace and is compiled with its own flags and
// -ffp-contract=off, so the compiler may vectorise but not reorder or fuse, and every build gives the same bits.

inline float fold(const float* lanes) {
  float a[kLanes];
  for (int j = 0; j < kLanes; ++j) a[j] = lanes[j];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) a[j] = a[j] + a[j + half];
  return a[0];
}

// exp(x) to about 2 ulp: x = n*ln2 + r, a polynomial in r, n into the exponent. Own code because libm's differs
// between machines. Results below 2^-126 flush to zero.
inline float exp_lane(float x) {
  x = x > 88.0f ? 88.0f : x;
  float keep = x < -87.0f ? 0.0f : 1.0f;
  x = x < -87.0f ? -87.0f : x;
  float n = x * 1.44269504f + 12582912.0f;  // round to nearest by adding 1.5 * 2^23
  n = n - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power * keep;
}

void rms_norm(const float* x, const float* weight, float eps, float* y, int n) {
  float lanes[kLanes] = {};
  int whole = n / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] = lanes[j] + x[i + j] * x[i + j];
  for (int i = whole; i < n; ++i) lanes[i - whole] = lanes[i - whole] + x[i] * x[i];
  float inverse = 1.0f / std::sqrt(fold(lanes) / float(n) + eps);
  for (int i = 0; i < n; ++i) y[i] = x[i] * inverse * weight[i];
}

void gate_up(float* gate, const float* up, int n, int activation) {
  if (activation == 0) {
    for (int i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exp_lane(-gate[i])) * up[i];
  } else {
    for (int i = 0; i < n; ++i) {  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u))
      float u = 0.7978845608f * (gate[i] + 0.044715f * gate[i] * gate[i] * gate[i]);
      gate[i] = gate[i] / (1.0f + exp_lane(-2.0f * u)) * up[i];
    }
  }
}

// In place; returns the sum of exp(x - max), with x[i] left as exp(x[i] - max).
inline float exponentiate(float* x, int begin, int end) {
  float top = x[begin];
  for (int i = begin + 1; i < end; ++i) top = x[i] > top ? x[i] : top;
  float lanes[kLanes] = {};
  // Lanes follow the absolute position, so a window that starts elsewhere or a longer prompt sums alike.
  for (int i = begin; i < end; ++i) x[i] = exp_lane(x[i] - top);
  for (int i = begin; i < end; ++i) lanes[i % kLanes] = lanes[i % kLanes] + x[i];
  return fold(lanes);
}

void softmax(float* x, int n) {
  float inverse = 1.0f / exponentiate(x, 0, n);
  for (int i = 0; i < n; ++i) x[i] = x[i] * inverse;
}

void add_scaled(float* y, const float* x, float weight, int n) {
  for (int i = 0; i < n; ++i) y[i] = y[i] + weight * x[i];
}

void attend(const float* q, const float* k, const float* v, int begin, int end, int head_dim, float scale,
            float* scores, float* out) {
  int whole = head_dim / kLanes * kLanes;
  for (int position = begin; position < end; ++position) {
    const float* key = k + size_t(position) * head_dim;
    float lanes[kLanes] = {};
    for (int i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lanes[j] = lanes[j] + q[i + j] * key[i + j];
    for (int i = whole; i < head_dim; ++i) lanes[i - whole] = lanes[i - whole] + q[i] * key[i];
    scores[position] = fold(lanes) * scale;
  }
  float inverse = 1.0f / exponentiate(scores, begin, end);
  for (int i = 0; i < head_dim; ++i) out[i] = 0.0f;
  for (int position = begin; position < end; ++position)
    add_scaled(out, v + size_t(position) * head_dim, scores[position] * inverse, head_dim);
}
