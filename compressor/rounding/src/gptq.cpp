// GPTQ and its refinement on one group of columns; see gptq.h.
#include "gptq.h"

#include <algorithm>
#include <vector>

#include "../../../runtime/src/threads.h"
#include "affine.h"

namespace edge_moe {

namespace {

constexpr int kRowsATask = 16;

// Runs task(row) for every row, in pieces of kRowsATask.
template <typename Task>
void for_rows(int rows, int threads, Task&& task) {
  ThreadPool pool(rows > kRowsATask ? threads : 1);
  pool.run((rows + kRowsATask - 1) / kRowsATask, [&](int piece, int) {
    for (int row = piece * kRowsATask; row < std::min(rows, (piece + 1) * kRowsATask); ++row) task(row);
  });
}

void gptq_row(const GroupColumns& group, int row, int width, const float* factor, const float* importance,
              float* errors) {
  const int n = group.n;
  float* w = group.weights + size_t(row) * n;
  uint8_t* codes = group.codes + size_t(row) * n;
  float fitted[kMostGroup];
  const Affine a = fit_group(w, importance, n, width, true, fitted);
  const float top_code = float((1 << width) - 1);
  for (int j = 0; j < n; ++j) {
    const float code = nearest_code(w[j], a.scale, a.bias, top_code);
    const float error = (w[j] - (a.scale * code + a.bias)) / factor[j * n + j];
    const float* along = factor + size_t(j) * n;
    for (int k = j + 1; k < n; ++k) w[k] -= error * along[k];
    codes[j] = uint8_t(code);
    errors[size_t(row) * n + j] = error;
  }
  group.scales[row] = a.scale;
  group.biases[row] = a.bias;
}

// One row's codes, rounded weights, and gradient E H as the group's entries of E change.
struct RowState {
  float codes[kMostGroup], rounded[kMostGroup], gradient[kMostGroup];
};

// Finds scale and bias that minimise the objective for fixed codes; false if, rounded to bfloat16, they gain nothing.
bool fit_scale_and_bias(RowState& s, float& scale, float& bias, int n, const float* moment, const float* row_sums) {
  float along_codes[kMostGroup] = {};  // H * codes
  for (int j = 0; j < n; ++j)
    for (int k = 0; k < n; ++k) along_codes[k] += s.codes[j] * moment[size_t(j) * n + k];
  double a11 = 0, a12 = 0, a22 = 0, r1 = 0, r2 = 0;
  for (int j = 0; j < n; ++j) {
    a11 += double(s.codes[j]) * along_codes[j], a12 += double(s.codes[j]) * row_sums[j], a22 += row_sums[j];
    r1 += double(s.codes[j]) * s.gradient[j], r2 += s.gradient[j];
  }
  const double determinant = a11 * a22 - a12 * a12;
  if (!(determinant > 1e-9 * a11 * a22)) return false;  // all codes are equal, or almost
  const float new_scale = from_bfloat16(to_bfloat16(scale + float((r1 * a22 - r2 * a12) / determinant)));
  const float new_bias = from_bfloat16(to_bfloat16(bias + float((r2 * a11 - r1 * a12) / determinant)));
  const double ds = double(new_scale) - scale, db = double(new_bias) - bias;
  if (!(ds * ds * a11 + 2 * ds * db * a12 + db * db * a22 < 2 * (ds * r1 + db * r2))) return false;
  for (int j = 0; j < n; ++j) {
    s.rounded[j] = new_scale * s.codes[j] + new_bias;
    s.gradient[j] -= float(ds) * along_codes[j] + float(db) * row_sums[j];
  }
  scale = new_scale, bias = new_bias;
  return true;
}

bool improve_codes(RowState& s, float scale, float bias, int n, float top_code, const float* moment) {
  bool changed = false;
  for (int j = 0; j < n; ++j) {
    const float* along = moment + size_t(j) * n;
    if (!(along[j] > 0.0f)) continue;
    const float code = nearest_code(s.rounded[j] + s.gradient[j] / along[j], scale, bias, top_code);
    if (code == s.codes[j]) continue;
    const float rounded = scale * code + bias, change = s.rounded[j] - rounded;  // of E
    for (int k = 0; k < n; ++k) s.gradient[k] += change * along[k];
    s.codes[j] = code;
    s.rounded[j] = rounded;
    changed = true;
  }
  return changed;
}

}  // namespace

void gptq_group(const GroupColumns& group, int width, const float* factor, float* errors, int threads) {
  std::vector<float> importance(group.n);  // of a column's error, given that later columns compensate for it
  for (int j = 0; j < group.n; ++j) {
    const float diagonal = factor[size_t(j) * group.n + j];
    importance[j] = 1.0f / (diagonal * diagonal);
  }
  const float largest = *std::max_element(importance.begin(), importance.end());
  for (float& value : importance) value /= largest;
  for_rows(group.rows, threads, [&](int row) { gptq_row(group, row, width, factor, importance.data(), errors); });
}

void refine_group(const GroupColumns& group, int width, const float* gradient, const float* moment, int rounds,
                  float* change, int threads) {
  const int n = group.n;
  std::vector<float> row_sums(n, 0.0f);
  for (int j = 0; j < n; ++j)
    for (int k = 0; k < n; ++k) row_sums[j] += moment[size_t(j) * n + k];
  for_rows(group.rows, threads, [&](int row) {
    RowState s;
    uint8_t* codes = group.codes + size_t(row) * n;
    float &scale = group.scales[row], &bias = group.biases[row];
    float* out = change + size_t(row) * n;
    for (int j = 0; j < n; ++j) {
      s.codes[j] = codes[j];
      s.rounded[j] = out[j] = scale * s.codes[j] + bias;
      s.gradient[j] = gradient[size_t(row) * n + j];
    }
    for (int round = 0; round < rounds; ++round) {
      const bool fitted = fit_scale_and_bias(s, scale, bias, n, moment, row_sums.data());
      if (!improve_codes(s, scale, bias, n, float((1 << width) - 1), moment) && !fitted) break;
    }
    for (int j = 0; j < n; ++j) {
      codes[j] = uint8_t(s.codes[j]);
      out[j] -= s.rounded[j];
    }
  });
}

}  // namespace edge_moe
