// The largest logits of a token, without reading all of the vocabulary's rows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "head.h"

namespace bitdistill {
namespace {

// Rows computed in float32 at once to get a floor under the largest logits, unless more are wanted.
constexpr int kFirstGuesses = 4;
// Beyond this many wanted rows the bounds save nothing.
constexpr int kMostWanted = 256;
// Nor beyond this norm of a hidden state, where float32 may overflow.
constexpr double kLargestNorm = 1e30;
// Panels, and rows, that a thread takes at once.
constexpr int kSharePanels = 64, kShareRows = 128;
// How many rows ahead a thread asks for their next bits: all of a share's rows at once take twice as long.
constexpr int kRowsAhead = 16;
// The largest logit is below the best row's value by the upper bits by no more than this part of what the bound allows,
// hardly ever: that part is some standard deviations where rows have hundreds of columns. Whether it was decides how
// often the rows are scanned, never the result.
constexpr float kUsualPart = 0.125f;

bool goes_before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The first `count` in their order.
void keep_first(std::vector<Candidate>& candidates, int count) {
  const std::size_t kept = std::min(candidates.size(), std::size_t(count));
  std::partial_sort(candidates.begin(), candidates.begin() + kept, candidates.end(), goes_before);
  candidates.resize(kept);
}

// x = scale * x_int8 + error, and what the bounds need of it.
struct QuantizedQuery {
  std::vector<int8_t> x_int8;
  float scale;
  int32_t sum;
  double norm = 0, norm_int8 = 0, norm_error = 0;  // of x, of scale * x_int8, and of the error
  double rounding;  // of float32: times the norm of a row, more than any value below is off by
  double sum_x = 0;

  QuantizedQuery(const Kernels& kernels, const float* x, int size) : x_int8(size) {
    scale = kernels.quantize(x, size, x_int8.data(), &sum);
    double squares = 0, errors = 0;
    for (int i = 0; i < size; ++i) {
      const double quantized = double(scale) * x_int8[i], error = x[i] - quantized;
      squares += quantized * quantized;
      errors += error * error;
      norm += double(x[i]) * x[i];
      sum_x += x[i];
    }
    norm = std::sqrt(norm) * (1 + 1e-6);
    norm_int8 = std::sqrt(squares) * (1 + 1e-6);
    // A float32 dot product of `size` terms in 16 or more sums is off by at most (size / 16 + 8) * 2^-24 * |x| . |w|;
    // the coarse values below, a few roundings, by less than 2^-21 of theirs.
    rounding = norm * ((size / 16 + 8) * 0x1p-24 + 0x1p-20);
    norm_error = std::sqrt(errors) * (1 + 1e-6) + rounding;
  }
};

// top_rows without bounds.
std::vector<Candidate> top_of_all(Team& team, const Kernels& kernels, const Int8Rows& rows, const float* hidden,
                                  int count, HeadStatistics* statistics) {
  const int V = rows.vocab_size;
  std::vector<float> logits(V);
  all_logits(team, kernels, rows, hidden, 1, rows.padded_size(), logits.data());
  if (!std::all_of(logits.begin(), logits.end(), [](float logit) { return std::isfinite(logit); })) return {};
  std::vector<Candidate> all(V);
  for (int v = 0; v < V; ++v) all[v] = {logits[v], v};
  keep_first(all, count);
  if (statistics != nullptr) *statistics = {V, V};
  return all;
}

// The steps of top_rows.
struct Search {
  // A row that may be among the largest: the most that its logit can be without the mean, and its sum over `scan`.
  struct Row {
    float bound;
    int32_t sum;
    int id;
  };
  // What a thread finds, and the memory it works in.
  struct alignas(64) Found {
    std::vector<Row> rows;
    std::vector<Candidate> best;      // by `scan`, a heap of `count`, the smallest first; then logits
    float smallest_best = -INFINITY;  // a row above it is one of the best
    std::vector<uint8_t> rest;
    std::vector<int8_t> w_int8;
  };

  Team& team;
  const Kernels& kernels;
  const Int8Rows& rows;
  const Query& whole;
  const QuantizedQuery& query;
  const int count;

  // q . w = 8 q . (u >> 3) + q . (u & 7) - 128 sum q; the lower bits are taken for their middle, 3.5. Twice that is an
  // integer. What the mean adds is the same for all rows, and left out.
  const ScanQuery scan_query{(7 - 256) * query.sum, 0.5f * query.scale, float(query.norm_int8 * (1 + 1e-6)),
                             float(query.norm_error * (1 + 1e-6))};
  const float middle_x = float(1.5 * query.sum_x), per_next_error = float(query.norm * (1 + 1e-6));
  const float middle_norm = 1.5f * std::sqrt(float(rows.padded_size()));  // of the vector of middles
  const std::vector<uint8_t> no_rest = std::vector<uint8_t>(rows.rest_bytes());

  std::vector<Found> found = std::vector<Found>(team.num_threads());
  std::vector<Candidate> guesses = {};
  std::vector<int> guessed = {};               // their ids, in order
  float floor = -INFINITY, least = -INFINITY;  // of the logits; of what a row must reach without the mean
  std::atomic<float> least_found{-INFINITY};   // rows with bounds below it were left out
  std::atomic<bool> is_read{true}, is_finite{true};
  std::atomic<int> num_refined{0}, num_exact{0};

  // The upper five bits of every row: finds the rows that look largest by them, and those whose bounds are above the
  // largest value so far, or nearly. With a floor that has been found: those whose bounds reach it.
  void scan() {
    const bool has_floor = !guesses.empty();
    const int num_panels = rows.num_panels();
    least_found = least;
    for (Found& own : found) own.rows.clear();
    team.run((num_panels + kSharePanels - 1) / kSharePanels, [&](int share, int thread) {
      Found& own = found[thread];
      int32_t sums[kPanelRows];
      float values[kPanelRows], bounds[kPanelRows], numbers[3][kPanelRows] = {};
      for (int panel = share * kSharePanels; panel < std::min(num_panels, (share + 1) * kSharePanels); ++panel) {
        const int first = panel * kPanelRows, filled = std::min(kPanelRows, rows.vocab_size - first);
        const float *scale = rows.row_scale + first, *error = rows.scan_error + first, *norm = rows.row_norm + first;
        for (const float* row : {scale, error, norm}) __builtin_prefetch(row);  // comes during the multiplication
        kernels.scan_panel(rows.scan + panel * rows.panel_bytes(), rows.num_groups(), query.x_int8.data(), sums);
        if (filled < kPanelRows) {
          std::copy_n(scale, filled, numbers[0]), std::copy_n(error, filled, numbers[1]);
          std::copy_n(norm, filled, numbers[2]);
          scale = numbers[0], error = numbers[1], norm = numbers[2];
        }
        const float reach = least_found.load(std::memory_order_relaxed);
        uint32_t kept = kernels.bound_rows(sums, scale, error, norm, scan_query, reach, values, bounds);
        for (kept &= (1u << filled) - 1; kept != 0; kept &= kept - 1) {
          const int r = __builtin_ctz(kept);
          own.rows.push_back({bounds[r], sums[r], first + r});
          if (!has_floor && values[r] > own.smallest_best) keep_best(own, {values[r], first + r}, bounds[r]);
        }
      }
    });
  }

  void keep_best(Found& own, const Candidate& row, float bound) {
    if (int(own.best.size()) == count) {
      std::pop_heap(own.best.begin(), own.best.end(), goes_before);
      own.best.pop_back();
    }
    own.best.push_back(row);
    std::push_heap(own.best.begin(), own.best.end(), goes_before);
    if (int(own.best.size()) < count) return;
    own.smallest_best = own.best.front().logit;
    const float usual = own.smallest_best - kUsualPart * (bound - row.logit);
    float reach = least_found.load(std::memory_order_relaxed);
    while (usual > reach && !least_found.compare_exchange_weak(reach, usual, std::memory_order_relaxed)) {
    }
  }

  // x . w of a row whose `rest` is given.
  float dot(int v, const uint8_t* rest, Found& own) const {
    own.w_int8.resize(rows.padded_size());
    kernels.decode_row(rows.scan + v / kPanelRows * rows.panel_bytes(), v % kPanelRows,
                       rows.next + v * rows.next_bytes(), rest, rows.num_groups(), own.w_int8.data());
    return kernels.dot(whole.x.data(), own.w_int8.data(), rows.padded_size());
  }

  // The logit of a row, all of which is read.
  float exact(int v, Found& own) {
    own.rest.resize(rows.rest_bytes());
    if (!read_rest(rows, v, own.rest.data())) is_read = false;
    const float logit = dot(v, own.rest.data(), own) * rows.row_scale[v] + whole.shared;
    if (!std::isfinite(logit)) is_finite = false;
    return logit;
  }

  // The best of those rows in float32: the count-th largest is a floor under the result.
  void set_floor() {
    for (Found& own : found) {
      guesses.insert(guesses.end(), own.best.begin(), own.best.end());
      own.best.clear();
    }
    keep_first(guesses, std::max(count, kFirstGuesses));
    num_exact = int(guesses.size());
    team.run(num_exact, [&](int i, int thread) { guesses[i].logit = exact(guesses[i].id, found[thread]); });
    for (const Candidate& guess : guesses) guessed.push_back(guess.id);
    std::sort(guessed.begin(), guessed.end());
    if (!is_finite || int(guesses.size()) < count) return;
    std::sort(guesses.begin(), guesses.end(), goes_before);
    floor = guesses[count - 1].logit;
    // Less than the difference, by more than its rounding.
    least = floor - whole.shared - 0x1p-21f * (std::abs(floor) + std::abs(whole.shared));
  }

  void prefetch(const Row& row) const {
    const uint8_t* const next = rows.next + row.id * rows.next_bytes();
    for (std::size_t line = 0; line < rows.next_bytes(); line += kLineBytes) __builtin_prefetch(next + line);
    for (const float* numbers : {rows.next_error, rows.row_scale, rows.row_norm}) __builtin_prefetch(numbers + row.id);
  }

  // By its next bit too a row is below the floor. q . w = 4 q . (u >> 2) + q . (u & 3) - 128 sum q, with 1.5 for the
  // lowest two bits. Twice that is an integer.
  bool is_below_by_next_bit(const Row& row) const {
    const int v = row.id;
    const uint8_t* const next = rows.next + v * rows.next_bytes();
    const int32_t bit_sum = kernels.next_dot(next, rows.num_groups(), query.x_int8.data());
    const int32_t twice = int32_t(16 * uint32_t(row.sum) + 8 * uint32_t(bit_sum) + uint32_t((3 - 256) * query.sum));
    const float scale = rows.row_scale[v], value = scan_query.half_scale * float(twice) * scale;
    const float error = scan_query.per_error * rows.next_error[v] + scan_query.per_row_norm * rows.row_norm[v];
    return std::isfinite(value) && value + scale * error < least;
  }

  // The same with x in the place of a q.
  bool is_below_without_error(int v, Found& own) const {
    const float most = dot(v, no_rest.data(), own) + middle_x + per_next_error * rows.next_error[v] +
                       float(query.rounding) * (2 * rows.row_norm[v] + rows.next_error[v] + middle_norm);
    return most * rows.row_scale[v] < least;
  }

  // Of the rows found, the others that may reach the floor: by their next bit, then with x, then in float32.
  void refine() {
    struct Share {
      const Row *first, *last;
    };
    std::vector<Share> shares;
    for (const Found& own : found) {
      for (const Row *row = own.rows.data(), *end = row + own.rows.size(); row < end; row += kShareRows) {
        shares.push_back({row, std::min(row + kShareRows, end)});
      }
    }
    team.run(int(shares.size()), [&](int share, int thread) {
      Found& own = found[thread];
      Row kept[kShareRows];
      int num_kept = 0, computed = 0;
      for (const Row* row = shares[share].first; row < shares[share].last; ++row) {
        kept[num_kept] = *row;
        if (row->bound >= least && !std::binary_search(guessed.begin(), guessed.end(), row->id)) ++num_kept;
      }
      for (int i = 0; i < std::min(kRowsAhead, num_kept); ++i) prefetch(kept[i]);
      for (int i = 0; i < num_kept; ++i) {
        if (i + kRowsAhead < num_kept) prefetch(kept[i + kRowsAhead]);
        if (is_below_by_next_bit(kept[i]) || is_below_without_error(kept[i].id, own)) continue;
        ++computed;
        const float logit = exact(kept[i].id, own);
        if (logit >= floor) own.best.push_back({logit, kept[i].id});
      }
      num_refined += num_kept;
      num_exact += computed;
    });
  }

  std::vector<Candidate> result() const {
    std::vector<Candidate> result;
    for (const Candidate& guess : guesses) {
      if (guess.logit >= floor) result.push_back(guess);
    }
    for (const Found& own : found) result.insert(result.end(), own.best.begin(), own.best.end());
    keep_first(result, count);
    return result;
  }
};

}  // namespace

std::vector<Candidate> top_rows(Team& team, const Kernels& kernels, const Int8Rows& rows, const float* hidden,
                                int count, HeadStatistics* statistics) {
  const Query whole(rows, hidden);
  const QuantizedQuery query(kernels, whole.x.data(), rows.padded_size());
  if (count > kMostWanted || !(query.norm < kLargestNorm)) {
    return top_of_all(team, kernels, rows, hidden, count, statistics);
  }
  Search search{team, kernels, rows, whole, query, count};
  search.scan();
  search.set_floor();
  if (search.is_finite && search.least_found > search.least) search.scan();  // rows left out may reach the floor
  if (search.is_finite) search.refine();
  require_read(search.is_read);
  if (!search.is_finite) return {};
  if (statistics != nullptr) *statistics = {search.num_refined, search.num_exact};
  return search.result();
}

}  // namespace bitdistill
