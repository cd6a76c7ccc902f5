// The indexer of sparse attention, as in runtime/src/indexer.cpp, and the choice of the positions with the highest
// scores, as choose_top() of runtime/src/choose.cpp makes it; scalar.cpp defines the bits of the scores.
#include "../choice.h"
#include "index.h"
#include "values.cuh"

namespace edge_moe::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kHeadsAtOnce = 8;  // that share a loaded key
constexpr int kAhead = 16;       // values that a thread loads at a time
constexpr int kChoosers = 256;   // threads that choose the positions of a token
constexpr int kDigits = 256;     // values of eight bits

// Each warp stores one head of one token, or the token's key.
EDGE_MOE_KERNEL(kWarp)
store_index_kernel(float* q, float* k, const float* norm, const float* norm_bias, const float* cos, const float* sin,
                   IndexHeads heads, IndexCache cache, Span span) {
  const int lane = int(threadIdx.x), half = heads.rope_dim / 2, head = int(blockIdx.x), n = heads.dim;
  const size_t token = size_t(span.first) + blockIdx.y, at = size_t(*span.position + int(token));
  const bool is_key = head == heads.heads;
  float* x = is_key ? k + token * n : q + (token * heads.heads + head) * n;
  if (is_key) {
    const Moments its = moments(x, n, heads.norm_eps);
    for (int i = lane; i < n; i += kWarp) x[i] = (x[i] - its.mean) * its.inverse * norm[i] + norm_bias[i];
    __syncwarp();
  }
  const int step = heads.interleaved ? 2 : 1, apart = heads.interleaved ? 1 : half;
  for (int i = lane; i < half; i += kWarp) {
    const float c = cos[at * half + i], s = sin[at * half + i], a = x[i * step], b = x[i * step + apart];
    x[i * step] = a * c - b * s;
    x[i * step + apart] = b * c + a * s;
  }
  if (!is_key) return;
  __syncwarp();
  const size_t place = at / kKeyBlock * n * kKeyBlock + at % kKeyBlock;
  for (int i = lane; i < n; i += kWarp) put(cache.keys, cache.half, place + size_t(i) * kKeyBlock, x[i]);
}

// Each thread computes one position for one token.
EDGE_MOE_KERNEL(kThreads)
index_scores_kernel(const float* q, const float* weights, IndexHeads heads, IndexCache cache, Span span, int top,
                    float* scores) {
  EDGE_MOE_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);  // (dim, kHeadsAtOnce)
  const int n = heads.dim, begin = int(blockIdx.x) * kThreads, at = begin + int(threadIdx.x);
  const int end = end_of(span, int(blockIdx.z)) / heads.block, from = at < end ? at : end - 1;
  if (begin >= end || end <= top) return;
  const size_t token = size_t(span.first) + blockIdx.z;
  const size_t key = size_t(from / kKeyBlock) * n * kKeyBlock + from % kKeyBlock;
  float score = 0.0f;
  for (int first = 0; first < heads.heads; first += kHeadsAtOnce) {
    const int count = heads.heads - first < kHeadsAtOnce ? heads.heads - first : kHeadsAtOnce;
    __syncthreads();
    for (int i = int(threadIdx.x); i < kHeadsAtOnce * n; i += kThreads)
      values[i % n * kHeadsAtOnce + i / n] =
          i / n < count ? q[(token * heads.heads + first + i / n) * n + i % n] : 0.0f;
    __syncthreads();
    float sums[kHeadsAtOnce] = {};
    each_value<kAhead>(cache.keys, cache.half, key, kKeyBlock, n, [&](int d, float value) {
      EDGE_MOE_UNROLL
      for (int head = 0; head < kHeadsAtOnce; ++head)
        sums[head] = fmaf(values[d * kHeadsAtOnce + head], value, sums[head]);
    });
    EDGE_MOE_UNROLL
    for (int head = 0; head < kHeadsAtOnce; ++head) {
      if (head >= count) continue;
      const float product = heads.scale * sums[head];
      const float weight = weights ? weights[token * heads.heads + first + head] : 1.0f;
      score = score + weight * (product > 0.0f ? product : 0.0f);
    }
  }
  if (at < end) scores[blockIdx.z * cache.positions + at] = score;
}

// Each block chooses for one token: it finds the lowest key that is chosen, eight bits at a time, and then writes the
// blocks' positions, or their numbers, of which each thread has a run.
EDGE_MOE_KERNEL(kChoosers)
choose_kernel(const float* scores, size_t positions, Span span, int top, int block, bool expands, int32_t* chosen,
              int32_t* counts) {
  __shared__ int of_digit[kDigits];
  __shared__ int digit, still;
  __shared__ int above[kChoosers], ties[kChoosers];
  const int thread = int(threadIdx.x), seen = end_of(span, int(blockIdx.x)), end = seen / block;
  const int size = expands ? block : 1, tail = seen % block % size;
  const size_t token = size_t(span.first) + blockIdx.x;
  int32_t* to = chosen + token * (size_t(top) * size + size - 1);
  if (thread == 0) counts[token] = end > top ? top * size + tail : 0;
  if (end <= top) return;
  const float* x = scores + blockIdx.x * positions;
  uint32_t least = 0;
  int wanted = top;  // of the keys whose upper bits are those of `least`
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = thread; i < kDigits; i += kChoosers) of_digit[i] = 0;
    __syncthreads();
    for (int i = thread; i < end; i += kChoosers) {
      const uint32_t key = order_key(x[i]);
      if (shift == 24 || key >> (shift + 8) == least >> (shift + 8)) atomicAdd(&of_digit[key >> shift & 255], 1);
    }
    __syncthreads();
    if (thread == 0) {
      int at = kDigits - 1, left = wanted;
      while (of_digit[at] < left) left -= of_digit[at--];
      digit = at, still = left;
    }
    __syncthreads();
    least |= uint32_t(digit) << shift, wanted = still;
    __syncthreads();
  }
  const int run = (end + kChoosers - 1) / kChoosers, begin = thread * run, stop = begin + run < end ? begin + run : end;
  above[thread] = ties[thread] = 0;
  for (int i = begin; i < stop; ++i) {
    const uint32_t key = order_key(x[i]);
    above[thread] += key > least, ties[thread] += key == least;
  }
  __syncthreads();
  int before = 0, equal = 0;
  for (int i = 0; i < thread; ++i) before += above[i], equal += ties[i];
  for (int i = thread; i < tail; i += kChoosers) to[size_t(top) * size + i] = end * size + i;
  to += size_t(before + (equal < wanted ? equal : wanted)) * size;
  for (int i = begin; i < stop; ++i) {
    const uint32_t key = order_key(x[i]);
    if (key > least || (key == least && equal++ < wanted))
      for (int j = 0; j < size; ++j) *to++ = i * size + j;
  }
}

}  // namespace

void store_index_keys(float* q, float* k, const float* norm, const float* norm_bias, const float* cos, const float* sin,
                      const IndexHeads& heads, const IndexCache& cache, const Span& span, Stream stream) {
  EDGE_MOE_LAUNCH(store_index_kernel, dim3(unsigned(heads.heads + 1), unsigned(span.count)), dim3(kWarp), 0, stream, q,
                  k, norm, norm_bias, cos, sin, heads, cache, span);
}

void index_scores(const float* q, const float* weights, const IndexHeads& heads, const IndexCache& cache,
                  const Span& span, int top, float* scores, Stream stream) {
  EDGE_MOE_LAUNCH(index_scores_kernel, dim3(pieces(size_t(span.most) + 1, kThreads), 1, unsigned(span.count)),
                  dim3(kThreads), size_t(kHeadsAtOnce) * heads.dim * sizeof(float), stream, q, weights, heads, cache,
                  span, top, scores);
}

void choose_top(const float* scores, size_t positions, const Span& span, int top, int block, bool expands,
                int32_t* chosen, int32_t* counts, Stream stream) {
  EDGE_MOE_LAUNCH(choose_kernel, dim3(unsigned(span.count)), dim3(kChoosers), 0, stream, scores, positions, span, top,
                  block, expands, chosen, counts);
}

}  // namespace edge_moe::cuda
