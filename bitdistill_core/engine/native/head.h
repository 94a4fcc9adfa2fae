// INT8 rows of the vocabulary: embedding lookup (head.cpp), and the output head that reads as little of them as it can
// (search.cpp).
#pragma once

#include <vector>

#include "linear.h"

namespace bitdistill {

// Row v ~ mean + column_scale * row_scale[v] * w_int8[v], in the layouts of panels.py; u = w_int8 + 128. Arrays of rows
// are mapped memory, but for the copies of `scan` and `next` that an output head reads. `rest`, and single rows with
// their scale, are read from the file, so that they never count as memory of the process.
struct Int8Rows {
  const uint8_t* scan = nullptr;
  const uint8_t* next = nullptr;
  const float* row_scale = nullptr;
  const float* column_scale = nullptr;  // (size)
  const float* mean = nullptr;          // (size)
  const float* row_norm = nullptr;      // ||w_int8[v]||
  const float* scan_error = nullptr;  // ||(u & 7) - 3.5||, what `scan` leaves out
  const float* next_error = nullptr;  // ||(u & 3) - 1.5||, what `scan` and `next` leave out
  int file = -1;
  uint64_t scan_offset = 0, next_offset = 0, rest_offset = 0, scale_offset = 0;
  int vocab_size = 0, size = 0;

  int num_groups() const { return (size + kGroupK - 1) / kGroupK; }
  int padded_size() const { return num_groups() * kGroupK; }
  int num_panels() const { return (vocab_size + kPanelRows - 1) / kPanelRows; }
  std::size_t panel_bytes() const { return std::size_t(num_groups()) * kScanGroupBytes; }
  std::size_t next_bytes() const { return std::size_t(num_groups()) * kNextGroupBytes; }
  std::size_t rest_bytes() const { return std::size_t(num_groups()) * kRestGroupBytes; }
};

// x . row = row_scale * (x . w_int8) + shared, with the column scales in the x of the right side.
struct Query {
  std::vector<float> x;  // (padded_size)
  float shared;          // what the mean adds to every logit

  Query(const Int8Rows& rows, const float* hidden);
};

struct Candidate {
  float logit;
  int id;
};

// How far each stage of `top_rows` narrowed the vocabulary.
struct HeadStatistics {
  int refined = 0;  // rows whose `next` was read
  int exact = 0;    // rows computed in float32
};

// w_int8 (num_ids, padded_size) and row_scale (num_ids) of some rows, from the file.
void read_rows(const Kernels& kernels, const Int8Rows& rows, const std::vector<int>& ids, int8_t* w_int8, float* scale);

// Row v of `rest`, from the file; false where that cannot be read any more.
bool read_rest(const Int8Rows& rows, int v, uint8_t* rest);
// Throws std::invalid_argument where a file could not be read.
void require_read(bool is_read);

// The whole of `scan` and `next`, read from the file.
void copy_streamed(Team& team, const Int8Rows& rows, uint8_t* scan, uint8_t* next);

// logits[i] = x . row of the rows `ids`.
void row_logits(const Kernels& kernels, const Int8Rows& rows, const float* x, int num_x, std::size_t stride,
                const std::vector<int>& ids, float* logits);

// All of them, (num_x, vocab_size).
void all_logits(Team& team, const Kernels& kernels, const Int8Rows& rows, const float* x, int num_x, std::size_t stride,
                float* logits);

// The `count` largest logits of x, exactly as all_logits has them, largest first, ties by the lowest id; none where a
// logit that it computes is not finite.
//
// x times the column scales = a q + e with q INT8. The upper five bits of all rows give q . w to within the
// Cauchy-Schwarz bound of what they leave out; rows that may still be among the largest get their next bit, which
// halves the bound, and then lose the error of q as well; the few that remain are read whole and computed in float32.
// The bounds are proven, so the result never depends on luck.
std::vector<Candidate> top_rows(Team& team, const Kernels& kernels, const Int8Rows& rows, const float* x, int count,
                                HeadStatistics* statistics);

}  // namespace bitdistill
