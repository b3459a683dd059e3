// Batch normalization on raw pointers: what the kernels compute, and the arguments they take.
//
// An array is seen as (groups, outer, channel, inner) with strides of its own. Statistics are taken over outer and inner, for each
// group and channel. The formulas are those of src/evennorm/core/moments.py and core/normalize.py:
//
//   y  = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta [+ residual])
//   dx = gamma / sqrt(variance + epsilon) * (dz - sum dz / n - xhat * sum(dz * xhat) / n),   dz = dy * activation'
//
// Half precision is read and written as it is and computed in float. Results do not depend on the number of workers.
#pragma once

#include <cstdint>

#include "workers.h"

namespace evennorm {

enum class Dtype { float32, float64, bfloat16, float16 };

struct Shape {
  int64_t groups, outer, channel, inner;
};

// Elements of a plane up to which the bits of its activation mask lie right behind those of the plane before, with a byte begun
// for each row of planes; longer planes begin a byte each.
constexpr int64_t kBundledPlane = 9;

struct View {
  void* data = nullptr;  // null where an optional array is absent
  int64_t group = 0, outer = 0, channel = 0, inner = 0;  // strides, in elements
};

// Running statistics, one value per channel, which a forward pass updates as core/running.py defines. Of the type computed in.
struct Running {
  void* mean = nullptr;       // null where there are none to update
  void* mean_low = nullptr;   // what rounding took from the mean
  void* variance = nullptr;
  int64_t* batches = nullptr;  // counts every batch, and with a decay below 0 only those not skipped; or null
  int64_t* skipped = nullptr;  // counts the batches that changed nothing, because they were empty or not finite; or null
  double decay = 0;  // weight of the old values; below 0, all counted batches weigh the same
  bool unbiased = true;
};

// Arrays without strides are dense, of the type that is computed in: double for float64, else float.
struct Forward {
  Dtype dtype;
  Shape shape;
  View x, residual, y;
  const void* gamma;     // (channel), or null for 1
  const void* beta;      // (channel), or null for 0
  void* mean;            // (groups, channel): the mean rounded to a float
  void* mean_low;        // (groups, channel): what rounding left; null at inference
  void* variance;        // (groups, channel), biased
  uint8_t* mask;         // the activation mask, mask_bytes long: a bit per element, 1 if its derivative is 1; or null
  double epsilon;
  double negative_slope;  // 1: no activation, 0: relu or relu6, else leaky relu
  double limit;           // 6: relu6, else infinite
  Running running{};      // updated by the moments of this batch, not by given ones
};

struct Backward {
  Dtype dtype;
  Shape shape;
  View dy, x, dx, d_residual;  // d_residual only if an activation comes after the residual; else it is dy
  const void* gamma;
  const void* beta;
  const void* mean;
  const void* mean_low;
  const void* variance;
  const uint8_t* mask;   // the activation mask that forward wrote; null where it is recomputed from x
  const void* d_mean;      // (groups, channel): derivatives that reach the moments in another way, or null
  const void* d_variance;
  void* sum_dz;          // (groups, channel); both sums may be null where gradient_sums and input_gradient are one call
  void* sum_dz_centred;  // (groups, channel): sum of dz * (x - mean)
  void* d_gamma;         // (channel), or null
  void* d_beta;
  double epsilon;
  double negative_slope;
  double limit;
  double count;  // values behind each mean: outer * inner, or more where statistics are synchronized
};

// One set of kernels per instruction set; `operations()` is the best that this processor has.
struct Operations {
  const char* name;
  // False if running statistics skipped the batch; true if they were updated, or there are none.
  bool (*moments)(const Forward&, Workers&);
  bool (*forward)(const Forward&, Workers&);  // moments, then normalize while the data is still in cache
  void (*normalize)(const Forward&, Workers&);
  void (*gradient_sums)(const Backward&, Workers&);
  void (*input_gradient)(const Backward&, Workers&);
  void (*backward)(const Backward&, Workers&);  // gradient_sums, then input_gradient
  // Bytes of an output's activation mask: every run of contiguous elements starts on a new byte, short planes a row at a time.
  int64_t (*mask_bytes)(const Shape&, const View& y);
};

const Operations& operations();
const Operations* operations(const char* name);  // "avx512", "avx2" or "baseline"; null if this processor does not have it

}  // namespace evennorm
