#include "head.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <memory>
#include <stdexcept>

namespace bitdistill {
namespace {

// Rows computed in float32 at once to get a first bound on the largest logits.
constexpr int kFirstGuesses = 16;
// Beyond this many wanted rows the bounds save nothing.
constexpr int kMostWanted = 256;
// Nor beyond this norm of a hidden state, where float32 may overflow.
constexpr double kLargestNorm = 1e30;
// Panels of one share of a step.
constexpr int kSharePanels = 64;

bool read_file(int file, uint64_t offset, std::size_t size, uint8_t* out) {
  while (size > 0) {
    const ssize_t got = pread(file, out, size, off_t(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    out += got;
    offset += uint64_t(got);
    size -= std::size_t(got);
  }
  return true;
}

void require(bool read) {
  if (read) return;
  throw std::invalid_argument("the packed file cannot be read any more: it was truncated or its disk failed");
}

void read_row(const Kernels& kernels, const Int8Rows& rows, int v, uint8_t* scratch, int8_t* w_int8, float* scale) {
  const uint64_t panel = uint64_t(v / kPanelRows) * rows.panel_bytes();
  uint8_t *const next = scratch + rows.panel_bytes(), *const rest = next + rows.next_bytes();
  require(read_file(rows.file, rows.scan_offset + panel, rows.panel_bytes(), scratch) &&
          read_file(rows.file, rows.next_offset + v * rows.next_bytes(), rows.next_bytes(), next) &&
          read_file(rows.file, rows.rest_offset + v * rows.rest_bytes(), rows.rest_bytes(), rest) &&
          read_file(rows.file, rows.scale_offset + v * sizeof(float), sizeof(float),
                    reinterpret_cast<uint8_t*>(scale)));
  kernels.decode_row(scratch, v % kPanelRows, next, rest, rows.num_groups(), w_int8);
}

bool goes_before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// x . row = row_scale * (x . w_int8) + shared, with the column scales in the x of the right side.
struct Query {
  std::vector<float> x;  // (padded_size)
  float shared;          // what the mean adds to every logit

  Query(const Int8Rows& rows, const float* hidden) : x(rows.padded_size()) {
    double sum = 0;
    for (int d = 0; d < rows.size; ++d) {
      x[d] = hidden[d] * rows.column_scale[d];
      sum += double(hidden[d]) * rows.mean[d];
    }
    shared = float(sum);
  }
};

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

}  // namespace

void read_rows(const Kernels& kernels, const Int8Rows& rows, const std::vector<int>& ids, int8_t* w_int8,
               float* scale) {
  std::vector<uint8_t> scratch(rows.panel_bytes() + rows.next_bytes() + rows.rest_bytes());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    read_row(kernels, rows, ids[i], scratch.data(), w_int8 + i * rows.padded_size(), scale + i);
  }
}

void copy_scan(Team& team, const Int8Rows& rows, uint8_t* copy) {
  std::atomic<bool> is_read{true};
  const std::size_t share_bytes = kSharePanels * rows.panel_bytes(), bytes = rows.num_panels() * rows.panel_bytes();
  team.run(int((bytes + share_bytes - 1) / share_bytes), [&](int share, int) {
    const std::size_t first = share * share_bytes, size = std::min(share_bytes, bytes - first);
    if (!read_file(rows.file, rows.scan_offset + first, size, copy + first)) is_read = false;
  });
  require(is_read);
}

void row_logits(const Kernels& kernels, const Int8Rows& rows, const float* x, int num_x, std::size_t stride,
                const std::vector<int>& ids, float* logits) {
  std::vector<int8_t> w_int8(ids.size() * rows.padded_size());
  std::vector<float> scale(ids.size());
  read_rows(kernels, rows, ids, w_int8.data(), scale.data());
  for (int t = 0; t < num_x; ++t) {
    const Query query(rows, x + t * stride);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const float value = kernels.dot(query.x.data(), w_int8.data() + i * rows.padded_size(), rows.padded_size());
      logits[t * ids.size() + i] = value * scale[i] + query.shared;
    }
  }
}

void all_logits(Team& team, const Kernels& kernels, const Int8Rows& rows, const float* x, int num_x, std::size_t stride,
                float* logits) {
  std::atomic<bool> is_read{true};
  const int num_panels = rows.num_panels();
  std::vector<Query> queries;
  for (int t = 0; t < num_x; ++t) queries.emplace_back(rows, x + t * stride);
  team.run((num_panels + kSharePanels - 1) / kSharePanels, [&](int share, int) {
    std::vector<uint8_t> rest(kPanelRows * rows.rest_bytes());
    std::vector<int8_t> w_int8(rows.padded_size());
    for (int panel = share * kSharePanels; panel < std::min(num_panels, (share + 1) * kSharePanels); ++panel) {
      const int first = panel * kPanelRows, count = std::min(kPanelRows, rows.vocab_size - first);
      if (!read_file(rows.file, rows.rest_offset + first * rows.rest_bytes(), count * rows.rest_bytes(), rest.data())) {
        is_read = false;
        return;
      }
      for (int r = 0; r < count; ++r) {
        kernels.decode_row(rows.scan + panel * rows.panel_bytes(), r, rows.next + (first + r) * rows.next_bytes(),
                           rest.data() + r * rows.rest_bytes(), rows.num_groups(), w_int8.data());
        for (int t = 0; t < num_x; ++t) {
          const float value = kernels.dot(queries[t].x.data(), w_int8.data(), rows.padded_size());
          logits[std::size_t(t) * rows.vocab_size + first + r] = value * rows.row_scale[first + r] + queries[t].shared;
        }
      }
    }
  });
  require(is_read);
}

namespace {

// top_rows without bounds.
std::vector<Candidate> top_of_all(Team& team, const Kernels& kernels, const Int8Rows& rows, const float* hidden,
                                  int count, HeadStatistics* statistics) {
  const int V = rows.vocab_size;
  std::vector<float> logits(V);
  all_logits(team, kernels, rows, hidden, 1, rows.padded_size(), logits.data());
  if (!std::all_of(logits.begin(), logits.end(), [](float logit) { return std::isfinite(logit); })) return {};
  std::vector<Candidate> all(V);
  for (int v = 0; v < V; ++v) all[v] = {logits[v], v};
  std::partial_sort(all.begin(), all.begin() + std::min(count, V), all.end(), goes_before);
  all.resize(std::min(count, V));
  if (statistics != nullptr) *statistics = {V, V};
  return all;
}

float largest_of(const float* values) {  // of a panel
  float largest[4] = {values[0], values[1], values[2], values[3]};
  for (int r = 4; r < kPanelRows; ++r) largest[r % 4] = std::max(largest[r % 4], values[r]);
  return std::max(std::max(largest[0], largest[1]), std::max(largest[2], largest[3]));
}

// Rows from `first` on, by their values, to a heap of the `count` best, smallest first.
void keep_best(std::vector<Candidate>& best, int count, int first, int num_rows, const float* values) {
  for (int r = 0; r < num_rows; ++r) {
    if (int(best.size()) == count) {
      if (values[r] <= best.front().logit) continue;
      std::pop_heap(best.begin(), best.end(), goes_before);
      best.pop_back();
    }
    best.push_back({values[r], first + r});
    std::push_heap(best.begin(), best.end(), goes_before);
  }
}

// The steps of top_rows.
struct Search {
  Team& team;
  const Kernels& kernels;
  const Int8Rows& rows;
  const Query& whole;
  const QuantizedQuery& query;
  const int count;

  const int num_panels = rows.num_panels(), num_shares = (num_panels + kSharePanels - 1) / kSharePanels;
  const float half_scale = 0.5f * query.scale;
  const float per_error = float(query.norm_int8 * (1 + 1e-6)), per_row_norm = float(query.norm_error * (1 + 1e-6));
  const float middle_x = float(1.5 * query.sum_x), per_next_error = float(query.norm * (1 + 1e-6));
  const float middle_norm = 1.5f * std::sqrt(float(rows.padded_size()));  // of the vector of middles
  const std::vector<uint8_t> no_rest = std::vector<uint8_t>(rows.rest_bytes());

  // Of `scan`: the sum of each row, and the most that a row of each panel can reach.
  const std::unique_ptr<int32_t[]> sums =
      std::make_unique_for_overwrite<int32_t[]>(std::size_t(num_panels) * kPanelRows);
  const std::unique_ptr<float[]> panel_bound = std::make_unique_for_overwrite<float[]>(num_panels);
  std::vector<std::vector<Candidate>> found = std::vector<std::vector<Candidate>>(num_shares);  // in each share
  std::vector<Candidate> guesses = {};
  std::vector<int> guessed = {};  // their ids, in order
  float floor = -INFINITY, least = -INFINITY;  // of the logits; of what a row must reach without the mean
  std::atomic<bool> is_read{true}, is_finite{true};
  std::atomic<int> num_refined{0}, num_exact{0};

  int end_of(int share) const { return std::min(num_panels, (share + 1) * kSharePanels); }
  int rows_of(int panel) const { return std::min(kPanelRows, rows.vocab_size - panel * kPanelRows); }

  void prefetch_bounds(int panel) const {
    for (const float* row : {rows.row_scale, rows.scan_error, rows.row_norm}) {
      __builtin_prefetch(row + panel * kPanelRows);
    }
  }

  // Values of a panel's rows by their upper five bits, and the most that they can be; -infinity beyond the vocabulary.
  // q . w = 8 q . (u >> 3) + q . (u & 7) - 128 sum q; the lower bits are taken for their middle, 3.5. Twice that is an
  // integer. What the mean adds is the same for all rows, and left out.
  void coarse(int panel, float* values, float* bounds) const {
    const uint32_t middle = uint32_t((7 - 256) * query.sum);  // the sum of the two fits int32, each alone may not
    // Copies, which no store to `values` changes, and a plain loop of 16, for the compiler to vectorise.
    const float half_scale = this->half_scale, per_error = this->per_error, per_row_norm = this->per_row_norm;
    const int first = panel * kPanelRows, own = rows_of(panel);
    const auto fill = [&](int filled) {
      for (int r = 0; r < filled; ++r) {
        const float scale = rows.row_scale[first + r], error = rows.scan_error[first + r];
        values[r] = half_scale * float(int32_t(16 * uint32_t(sums[first + r]) + middle)) * scale;
        const float bound = values[r] + scale * (per_error * error + per_row_norm * rows.row_norm[first + r]);
        bounds[r] = bound == bound ? bound : INFINITY;  // beyond float32 nothing is known
      }
    };
    if (own == kPanelRows) return fill(kPanelRows);
    fill(own);
    for (int r = own; r < kPanelRows; ++r) values[r] = bounds[r] = -INFINITY;
  }

  // The upper five bits of every row: finds the rows that look largest by them.
  void scan() {
    team.run(num_shares, [&](int share, int) {
      std::vector<Candidate>& best = found[share];
      float values[kPanelRows], bounds[kPanelRows];
      for (int panel = share * kSharePanels; panel < end_of(share); ++panel) {
        prefetch_bounds(panel);  // which come from memory while the panel is multiplied
        kernels.scan_panel(rows.scan + panel * rows.panel_bytes(), rows.num_groups(), query.x_int8.data(),
                           sums.get() + std::size_t(panel) * kPanelRows);
        coarse(panel, values, bounds);
        panel_bound[panel] = largest_of(bounds);
        if (int(best.size()) == count && largest_of(values) <= best.front().logit) continue;
        keep_best(best, count, panel * kPanelRows, rows_of(panel), values);
      }
    });
  }

  // x . w of a row whose `rest` is given.
  float dot(int v, const uint8_t* rest, int8_t* w_int8) const {
    kernels.decode_row(rows.scan + v / kPanelRows * rows.panel_bytes(), v % kPanelRows,
                       rows.next + v * rows.next_bytes(), rest, rows.num_groups(), w_int8);
    return kernels.dot(whole.x.data(), w_int8, rows.padded_size());
  }

  // The logit of a row, all of which is read.
  float exact(int v, uint8_t* rest, int8_t* w_int8) {
    if (!read_file(rows.file, rows.rest_offset + v * rows.rest_bytes(), rows.rest_bytes(), rest)) is_read = false;
    const float logit = dot(v, rest, w_int8) * rows.row_scale[v] + whole.shared;
    if (!std::isfinite(logit)) is_finite = false;
    return logit;
  }

  // The best of those rows in float32: the count-th largest is a floor under the result. False where one is not finite.
  bool set_floor() {
    for (const std::vector<Candidate>& best : found) guesses.insert(guesses.end(), best.begin(), best.end());
    const std::size_t num_kept = std::min(std::size_t(std::max(count, kFirstGuesses)), guesses.size());
    std::partial_sort(guesses.begin(), guesses.begin() + num_kept, guesses.end(), goes_before);
    guesses.resize(num_kept);
    std::vector<uint8_t> rest(rows.rest_bytes());
    std::vector<int8_t> w_int8(rows.padded_size());
    for (Candidate& guess : guesses) guess.logit = exact(guess.id, rest.data(), w_int8.data());
    if (!is_finite) return false;
    std::sort(guesses.begin(), guesses.end(), goes_before);
    if (int(guesses.size()) >= count) {
      floor = guesses[count - 1].logit;
      // Less than the difference, by more than its rounding.
      least = floor - whole.shared - 0x1p-21f * (std::abs(floor) + std::abs(whole.shared));
    }
    for (const Candidate& guess : guesses) guessed.push_back(guess.id);
    std::sort(guessed.begin(), guessed.end());
    num_exact = int(guesses.size());
    return true;
  }

  // The other rows of a share that may reach the floor, all of them before the first is refined: their next bits come
  // from memory meanwhile.
  std::vector<int> candidates_of(int share) const {
    std::vector<int> panels, candidates;
    for (int panel = share * kSharePanels; panel < end_of(share); ++panel) {
      if (panel_bound[panel] < least) continue;
      panels.push_back(panel);
      prefetch_bounds(panel);
      __builtin_prefetch(sums.get() + std::size_t(panel) * kPanelRows);
    }
    float values[kPanelRows], bounds[kPanelRows];
    for (const int panel : panels) {
      coarse(panel, values, bounds);
      for (int r = 0; r < rows_of(panel); ++r) {
        const int v = panel * kPanelRows + r;
        if (bounds[r] < least || std::binary_search(guessed.begin(), guessed.end(), v)) continue;
        candidates.push_back(v);
        const uint8_t* const next = rows.next + v * rows.next_bytes();
        for (std::size_t line = 0; line < rows.next_bytes(); line += kLineBytes) __builtin_prefetch(next + line);
      }
    }
    return candidates;
  }

  // By its next bit too a row is below the floor. q . w = 4 q . (u >> 2) + q . (u & 3) - 128 sum q, with 1.5 for the
  // lowest two bits. Twice that is an integer.
  bool is_below_by_next_bit(int v) const {
    const uint8_t* const next = rows.next + v * rows.next_bytes();
    const int32_t bit_sum = kernels.next_dot(next, rows.num_groups(), query.x_int8.data());
    const int32_t twice = int32_t(16 * uint32_t(sums[v]) + 8 * uint32_t(bit_sum) + uint32_t((3 - 256) * query.sum));
    const float scale = rows.row_scale[v], value = half_scale * float(twice) * scale;
    return value + scale * (per_error * rows.next_error[v] + per_row_norm * rows.row_norm[v]) < least;
  }

  // The same with x in the place of a q.
  bool is_below_without_error(int v, int8_t* w_int8) const {
    const float most = dot(v, no_rest.data(), w_int8) + middle_x + per_next_error * rows.next_error[v] +
                       float(query.rounding) * (2 * rows.row_norm[v] + rows.next_error[v] + middle_norm);
    return most * rows.row_scale[v] < least;
  }

  // Every other row that may reach the floor: by its next bit, then with x, then in float32.
  void refine() {
    team.run(num_shares, [&](int share, int) {
      found[share].clear();
      std::vector<uint8_t> rest(rows.rest_bytes());
      std::vector<int8_t> w_int8(rows.padded_size());
      const std::vector<int> candidates = candidates_of(share);
      int computed = 0;
      for (const int v : candidates) {
        if (is_below_by_next_bit(v) || is_below_without_error(v, w_int8.data())) continue;
        ++computed;
        const float logit = exact(v, rest.data(), w_int8.data());
        if (logit >= floor) found[share].push_back({logit, v});
      }
      num_refined += int(candidates.size());
      num_exact += computed;
    });
  }

  std::vector<Candidate> result() const {
    std::vector<Candidate> result;
    for (const Candidate& guess : guesses) {
      if (guess.logit >= floor) result.push_back(guess);
    }
    for (const std::vector<Candidate>& best : found) result.insert(result.end(), best.begin(), best.end());
    const std::size_t wanted = std::min(result.size(), std::size_t(count));
    std::partial_sort(result.begin(), result.begin() + wanted, result.end(), goes_before);
    result.resize(wanted);
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
  if (!search.set_floor()) return {};
  search.refine();
  require(search.is_read);
  if (!search.is_finite) return {};
  if (statistics != nullptr) *statistics = {search.num_refined, search.num_exact};
  return search.result();
}

}  // namespace bitdistill
