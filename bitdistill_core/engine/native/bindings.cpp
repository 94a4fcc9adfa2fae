// Python's door to the engine: types and the GIL, no arithmetic. bitdistill_core/engine/{kernels,decoder}.py validate.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <deque>
#include <stdexcept>

#include "base3.h"
#include "dispatch.h"
#include "measure.h"
#include "model.h"

namespace nb = nanobind;
using namespace bitdistill;

namespace {

template <class T, int DIMENSIONS>
using Array = nb::ndarray<T, nb::ndim<DIMENSIONS>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
template <class T>
using NumPy = nb::ndarray<nb::numpy, T, nb::ndim<2>, nb::c_contig>;

const Kernels& kernels_named(const std::string& name) {
  const Kernels* found = find_kernels(name);
  if (found == nullptr) throw std::invalid_argument("no such kernel on this processor: " + name);
  return *found;
}

std::vector<std::string> available_names() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
  return names;
}

std::vector<std::pair<std::string, std::string>> built_names() {
  std::vector<std::pair<std::string, std::string>> names;
  for (const Kernels* kernels : built_kernels()) names.emplace_back(kernels->name, kernels->needs);
  return names;
}

NumPy<float> new_matrix(std::size_t rows, std::size_t columns) {
  float* data = new float[rows * columns];
  const nb::capsule owner(data, [](void* pointer) noexcept { delete[] static_cast<float*>(pointer); });
  return NumPy<float>(data, {rows, columns}, owner);
}

// N and K are those of the matrix; `codes` are (num_panels, num_lines, 64) of two bits or
// (num_panels, bytes) of base 3.
Linear codes_of(const Codes& codes, int n, int k, int num_blocks) {
  return Linear(codes.data(), n, k, num_blocks, codes.ndim() == 2);
}

// `weight_scale` is (num_panels, num_blocks, 16), or (1, 1, 16) for all panels.
Linear linear_of(const Codes& codes, const Array<const float, 3>& weight_scale, int n, int k) {
  Linear linear = codes_of(codes, n, k, int(weight_scale.shape(1)));
  linear.weight_scale = weight_scale.data();
  linear.scale_stride = weight_scale.shape(0) == 1 ? 0 : weight_scale.shape(1) * kPanelRows;
  return linear;
}

// x (T, K) INT8 times packed weights, exact sums (T, N); K and N are padded.
void ternary_matmul(const Array<const int8_t, 2>& x, const Codes& codes, const Array<int32_t, 2>& out,
                    const std::string& kernel, int num_threads) {
  const Kernels& kernels = kernels_named(kernel);
  const int T = int(x.shape(0)), K = int(x.shape(1)), N = int(out.shape(1));
  const Linear linear = codes_of(codes, N, K, 1);
  const int8_t* x_data = x.data();
  int32_t* out_data = out.data();
  const nb::gil_scoped_release released;
  Team team(num_threads);
  exact_sums(team, kernels, linear, x_data, T, out_data);
}

// x (T, K), quantised token by token, times packed weights and their scales, (T, padded N).
void ternary_linear(const Array<const float, 2>& x, const Codes& codes, const Array<const float, 3>& weight_scale,
                    const Array<float, 2>& out, const std::string& kernel,
                    int num_threads) {
  const Kernels& kernels = kernels_named(kernel);
  const int T = int(x.shape(0)), K = int(x.shape(1)), N = int(out.shape(1));
  const Linear linear = linear_of(codes, weight_scale, N, K);
  const float* x_data = x.data();
  float* out_data = out.data();
  const nb::gil_scoped_release released;
  Team team(num_threads);
  std::vector<Scratch> scratch(num_threads);
  Int8Tokens tokens;
  quantize_tokens(team, kernels, scratch.data(), x_data, K, K, linear.num_blocks, T, Norm{}, Norm{}, tokens);
  const Product product{&linear, &tokens, out_data, std::size_t(N), false};
  multiply(team, kernels, scratch.data(), &product, 1);
}

bool streams_base3(const std::string& kernel) { return kernels_named(kernel).gemv_base3 != nullptr; }

bool are_sound(const Codes& codes, int n, int k, int num_blocks) {
  const Linear linear = codes_of(codes, n, k, num_blocks);
  const nb::gil_scoped_release released;
  return is_sound(linear);
}

void expand(const Codes& w_base3, int num_blocks, const Array<uint8_t, 3>& w_packed, int k) {
  const Linear linear = codes_of(w_base3, int(w_packed.shape(0)) * kPanelRows, k, num_blocks);
  uint8_t* const lines = w_packed.data();
  const nb::gil_scoped_release released;
  expand_base3(linear, lines);
}

// `measure` of a table of kernels, for Python by the table's name.
template <class... Sizes>
auto by_name(double (*measure)(const Kernels&, Sizes...)) {
  return [measure](const std::string& kernel, Sizes... sizes) { return measure(kernels_named(kernel), sizes...); };
}

using Largest = std::vector<std::pair<int, float>>;

// A model and the arrays its pointers point into.
class PackedModel {
 public:
  PackedModel(const nb::dict& config, const nb::list& layers, const nb::object& final_norm, const nb::dict& embedding,
              const nb::dict& head, const Array<uint8_t, 3>& head_scan, const Array<uint8_t, 3>& head_next,
              const std::string& kernel, int num_threads) {
    std::vector<Layer> list;
    arrays_.push_back(nb::cast(head_scan));
    arrays_.push_back(nb::cast(head_next));
    for (const nb::handle item : layers) list.push_back(read_layer(nb::cast<nb::dict>(item)));
    model_ = std::make_unique<Model>(read_config(config), std::move(list), floats(final_norm), read_rows_of(embedding),
                                     read_rows_of(head), head_scan.data(), head_next.data(), kernels_named(kernel),
                                     num_threads);
  }

  std::unique_ptr<KeyValueCache> new_cache(int capacity, bool half) const {
    return std::make_unique<KeyValueCache>(model_->num_layers, model_->config.num_key_value_heads,
                                           model_->config.head_dim, capacity, half);
  }

  NumPy<float> forward(const std::vector<Array<const int32_t, 1>>& ids, const std::vector<int>& parents,
                       const std::vector<int>& outputs, KeyValueCache* cache) {
    std::vector<Segment> segments;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      int start = cache == nullptr ? 0 : cache->length;
      if (parents[i] >= 0) start = segments[parents[i]].start + segments[parents[i]].length;
      segments.push_back({ids[i].data(), int(ids[i].shape(0)), start, parents[i]});
    }
    NumPy<float> hidden = new_matrix(outputs.size(), model_->hidden_stride);
    float* data = hidden.data();
    const nb::gil_scoped_release released;
    model_->forward(segments, outputs, cache, data);
    return hidden;
  }

  NumPy<float> row_logits(const Array<const float, 2>& hidden, const std::vector<int>& rows) {
    NumPy<float> logits = new_matrix(hidden.shape(0), rows.size());
    const float* from = hidden.data();
    const int count = int(hidden.shape(0));
    float* to = logits.data();
    const nb::gil_scoped_release released;
    model_->row_logits(from, count, rows, to);
    return logits;
  }

  NumPy<float> logits(const Array<const float, 2>& hidden) {
    NumPy<float> logits = new_matrix(hidden.shape(0), model_->config.vocab_size);
    const float* from = hidden.data();
    const int count = int(hidden.shape(0));
    float* to = logits.data();
    const nb::gil_scoped_release released;
    model_->logits(from, count, to);
    return logits;
  }

  // The largest (token, logit) of a hidden state, and the statistics of the search.
  std::pair<Largest, std::pair<int, int>> top(const Array<const float, 2>& hidden, int count) {
    const float* from = hidden.data();
    HeadStatistics statistics;
    const nb::gil_scoped_release released;
    Largest largest = largest_of(from, count, &statistics);
    return {std::move(largest), {statistics.refined, statistics.exact}};
  }

  // The largest (token, logit) behind one more token of a sequence.
  Largest step(int token, KeyValueCache& cache, int count) {
    const int32_t id = token;
    const nb::gil_scoped_release released;
    std::vector<float> hidden(model_->hidden_stride);
    model_->forward({{&id, 1, cache.length, -1}}, {0}, &cache, hidden.data());
    return largest_of(hidden.data(), count, nullptr);
  }

 private:
  Largest largest_of(const float* hidden, int count, HeadStatistics* statistics) {
    Largest largest;
    for (const Candidate& candidate : model_->top(hidden, count, statistics)) {
      largest.emplace_back(candidate.id, candidate.logit);
    }
    return largest;
  }

  const float* floats(const nb::object& array) {
    if (array.is_none()) return nullptr;
    arrays_.push_back(array);
    return nb::cast<Array<const float, 1>>(array).data();
  }

  Linear read_linear(const nb::dict& from) {
    arrays_.push_back(from["codes"]);
    arrays_.push_back(from["weight_scale"]);
    Linear linear = linear_of(nb::cast<Codes>(from["codes"]), nb::cast<Array<const float, 3>>(from["weight_scale"]),
                              nb::cast<int>(from["n"]), nb::cast<int>(from["k"]));
    linear.input_norm = floats(from["input_norm"]);
    if (const float* bias = floats(from["bias"])) {
      biases_.emplace_back(bias, bias + linear.n).resize(round_up(linear.n, kPanelRows));
      linear.bias = biases_.back().data();
    }
    return linear;
  }

  Layer read_layer(const nb::dict& from) {
    Layer layer;
    const nb::dict linears = nb::cast<nb::dict>(from["linears"]), norms = nb::cast<nb::dict>(from["norms"]);
    const auto linear = [&](const char* name) { return read_linear(nb::cast<nb::dict>(linears[name])); };
    const auto norm = [&](const char* name) -> const float* {
      return norms.contains(name) ? floats(norms[name]) : nullptr;
    };
    layer.q = linear("q_proj"), layer.k = linear("k_proj"), layer.v = linear("v_proj"), layer.o = linear("o_proj");
    layer.gate = linear("gate_proj"), layer.up = linear("up_proj"), layer.down = linear("down_proj");
    layer.norms = {norm("input_layernorm"),           norm("post_attention_layernorm"),
                   norm("pre_feedforward_layernorm"), norm("post_feedforward_layernorm"),
                   norm("q_norm"),                    norm("k_norm")};
    layer.window = nb::cast<int>(from["window"]);
    layer.rope = nb::cast<int>(from["rope"]);
    return layer;
  }

  Int8Rows read_rows_of(const nb::dict& from) {
    Int8Rows rows;
    arrays_.push_back(from["scan"]);
    rows.scan = nb::cast<Array<const uint8_t, 3>>(from["scan"]).data();
    arrays_.push_back(from["next"]);
    rows.next = nb::cast<Array<const uint8_t, 3>>(from["next"]).data();
    rows.row_scale = floats(from["row_scale"]);
    rows.column_scale = floats(from["column_scale"]);
    rows.mean = floats(from["mean"]);
    rows.row_norm = floats(from["row_norm"]);
    rows.scan_error = floats(from["scan_error"]);
    rows.next_error = floats(from["next_error"]);
    rows.file = nb::cast<int>(from["file"]);
    rows.scan_offset = nb::cast<uint64_t>(from["scan_offset"]);
    rows.next_offset = nb::cast<uint64_t>(from["next_offset"]);
    rows.rest_offset = nb::cast<uint64_t>(from["rest_offset"]);
    rows.scale_offset = nb::cast<uint64_t>(from["scale_offset"]);
    rows.vocab_size = nb::cast<int>(from["vocab_size"]);
    rows.size = nb::cast<int>(from["size"]);
    return rows;
  }

  static ModelConfig read_config(const nb::dict& from) {
    const auto integer = [&](const char* name) { return nb::cast<int>(from[name]); };
    const auto real = [&](const char* name) { return nb::cast<float>(from[name]); };
    ModelConfig config;
    config.hidden_size = integer("hidden_size");
    config.intermediate_size = integer("intermediate_size");
    config.num_heads = integer("num_attention_heads");
    config.num_key_value_heads = integer("num_key_value_heads");
    config.head_dim = integer("head_dim");
    config.vocab_size = integer("vocab_size");
    config.norm_eps = real("rms_norm_eps");
    config.norm_offset = real("norm_weight_offset");
    config.sub_norm_eps = real("sub_norm_eps");
    config.embedding_multiplier = real("embedding_multiplier");
    config.attention_scale = real("attention_scale");
    config.logit_softcap = real("final_logit_softcapping");
    config.has_feedforward_norms = nb::cast<bool>(from["has_feedforward_norms"]);
    config.activation =
        nb::cast<std::string>(from["hidden_activation"]) == "silu" ? Activation::kSilu : Activation::kGeluTanh;
    config.frequencies = nb::cast<std::vector<std::vector<float>>>(from["frequencies"]);
    return config;
  }

  std::vector<nb::object> arrays_;
  std::deque<std::vector<float>> biases_;
  std::unique_ptr<Model> model_;
};

}  // namespace

NB_MODULE(_native, module) {
  module.attr("MAX_K") = kMaxK;
  module.def("available_kernels", &available_names, "Names of the kernels this processor can run, fastest first.");
  module.def("built_kernels", &built_names, "Name of each kernel in this build, and what a processor needs for it.");
  module.def("ternary_matmul", &ternary_matmul, nb::arg("x").noconvert(), nb::arg("codes").noconvert(),
             nb::arg("out").noconvert(), nb::arg("kernel"), nb::arg("num_threads"),
             "Fills out (T, N) with the exact sums of x (T, K) and the codes of (N, K) weights.");
  module.def("ternary_linear", &ternary_linear, nb::arg("x").noconvert(), nb::arg("codes").noconvert(),
             nb::arg("weight_scale").noconvert(), nb::arg("out").noconvert(), nb::arg("kernel"), nb::arg("num_threads"),
             "Fills out (T, padded N) with the products of x (T, K), quantised token by token, and scaled weights.");
  module.def("streams_base3", &streams_base3, nb::arg("kernel"),
             "Whether a kernel reads base 3 as it lies in the file.");
  module.def("is_sound", &are_sound, nb::arg("codes").noconvert(), nb::arg("n"), nb::arg("k"), nb::arg("num_blocks"),
             "Whether the codes of (N, K) weights are all ternary.");
  module.def("expand_base3", &expand, nb::arg("w_base3").noconvert(), nb::arg("num_blocks"),
             nb::arg("w_packed").noconvert(), nb::arg("k"),
             "Fills w_packed (N/16, K/16, 64) with the codes of w_base3.");
  nb::class_<KeyValueCache>(module, "KeyValueCache")
      .def_ro("capacity", &KeyValueCache::capacity)
      .def_rw("length", &KeyValueCache::length)
      .def_prop_ro("num_bytes", &KeyValueCache::bytes);
  nb::class_<PackedModel>(module, "Model")
      .def(nb::init<const nb::dict&, const nb::list&, const nb::object&, const nb::dict&, const nb::dict&,
                    const Array<uint8_t, 3>&, const Array<uint8_t, 3>&, const std::string&, int>(),
           nb::arg("config"), nb::arg("layers"), nb::arg("final_norm"), nb::arg("embedding"), nb::arg("head"),
           nb::arg("head_scan").noconvert(), nb::arg("head_next").noconvert(), nb::arg("kernel"),
           nb::arg("num_threads"))
      .def("new_cache", &PackedModel::new_cache, nb::arg("capacity"), nb::arg("half"))
      .def("forward", &PackedModel::forward, nb::arg("ids"), nb::arg("parents"), nb::arg("outputs"),
           nb::arg("cache").none(), "Final hidden states (outputs, padded hidden size) of tokens in the batch.")
      .def("row_logits", &PackedModel::row_logits, nb::arg("hidden"), nb::arg("rows"))
      .def("logits", &PackedModel::logits, nb::arg("hidden"))
      .def("top", &PackedModel::top, nb::arg("hidden"), nb::arg("count"),
           "The largest (token, logit), and of how many rows it took the sixth bit, and the whole row in float32.")
      .def("step", &PackedModel::step, nb::arg("token"), nb::arg("cache"), nb::arg("count"),
           "The largest (token, logit) behind one more token of the sequence in the cache.");
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  module.def("measure_multiply_add_ceiling", &measure_multiply_add_ceiling, nb::arg("num_threads"), nb::arg("seconds"),
             released);
  module.def("measure_read_bandwidth", &measure_read_bandwidth, nb::arg("num_threads"), nb::arg("megabytes"), released);
  module.def("measure_gemm", by_name(measure_gemm), nb::arg("kernel"), nb::arg("n"), nb::arg("k"), nb::arg("tokens"),
             nb::arg("num_threads"), nb::arg("repeats"), released);
  module.def("measure_gemv", by_name(measure_gemv), nb::arg("kernel"), nb::arg("n"), nb::arg("k"),
             nb::arg("num_threads"), nb::arg("repeats"), nb::arg("base3"), released);
}
