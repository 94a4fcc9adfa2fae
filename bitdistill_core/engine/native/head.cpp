#include "head.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <stdexcept>

namespace bitdistill {
namespace {

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

void read_row(const Kernels& kernels, const Int8Rows& rows, int v, uint8_t* scratch, int8_t* w_int8, float* scale) {
  const uint64_t panel = uint64_t(v / kPanelRows) * rows.panel_bytes();
  uint8_t *const next = scratch + rows.panel_bytes(), *const rest = next + rows.next_bytes();
  require_read(read_file(rows.file, rows.scan_offset + panel, rows.panel_bytes(), scratch) &&
               read_file(rows.file, rows.next_offset + v * rows.next_bytes(), rows.next_bytes(), next) &&
               read_rest(rows, v, rest) &&
               read_file(rows.file, rows.scale_offset + v * sizeof(float), sizeof(float),
                         reinterpret_cast<uint8_t*>(scale)));
  kernels.decode_row(scratch, v % kPanelRows, next, rest, rows.num_groups(), w_int8);
}

}  // namespace

void require_read(bool is_read) {
  if (is_read) return;
  throw std::invalid_argument("the packed file cannot be read any more: it was truncated or its disk failed");
}

Query::Query(const Int8Rows& rows, const float* hidden) : x(rows.padded_size()) {
  double sum = 0;
  for (int d = 0; d < rows.size; ++d) {
    x[d] = hidden[d] * rows.column_scale[d];
    sum += double(hidden[d]) * rows.mean[d];
  }
  shared = float(sum);
}

bool read_rest(const Int8Rows& rows, int v, uint8_t* rest) {
  return read_file(rows.file, rows.rest_offset + v * rows.rest_bytes(), rows.rest_bytes(), rest);
}

void read_rows(const Kernels& kernels, const Int8Rows& rows, const std::vector<int>& ids, int8_t* w_int8,
               float* scale) {
  std::vector<uint8_t> scratch(rows.panel_bytes() + rows.next_bytes() + rows.rest_bytes());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    read_row(kernels, rows, ids[i], scratch.data(), w_int8 + i * rows.padded_size(), scale + i);
  }
}

void copy_streamed(Team& team, const Int8Rows& rows, uint8_t* scan, uint8_t* next) {
  struct Part {
    uint64_t offset;
    std::size_t bytes;
    uint8_t* copy;
  };
  const Part parts[] = {{rows.scan_offset, rows.num_panels() * rows.panel_bytes(), scan},
                        {rows.next_offset, rows.vocab_size * rows.next_bytes(), next}};
  const std::size_t share_bytes = kSharePanels * rows.panel_bytes();
  std::atomic<bool> is_read{true};
  for (const Part& part : parts) {
    team.run(int((part.bytes + share_bytes - 1) / share_bytes), [&](int share, int) {
      const std::size_t first = share * share_bytes, size = std::min(share_bytes, part.bytes - first);
      if (!read_file(rows.file, part.offset + first, size, part.copy + first)) is_read = false;
    });
  }
  require_read(is_read);
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
  require_read(is_read);
}

}  // namespace bitdistill
