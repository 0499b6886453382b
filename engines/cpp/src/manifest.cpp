#include "manifest.hpp"

#include <set>

namespace af {
namespace {

const std::set<std::string> bidirectional_graphs = {"transition"};
const std::set<std::string> causal_graphs = {"text", "chunk", "compress"};

void check_texts(const Value& value) {
  for (const auto& [key, item] : value.members()) item.text();
}

Tensor read_tensor(const Value& value) {
  Record record(value);
  Tensor tensor{record.text("name"), record.word("dtype", {"float32", "float16", "bfloat16", "int64"}), {}};
  for (const Value& axis : record.required("shape").items()) {
    if (axis.is_text()) {
      tensor.shape.emplace_back(axis.text());
    } else {
      tensor.shape.emplace_back(axis.integer());
    }
  }
  record.done();
  return tensor;
}

Graph read_graph(const Value& value) {
  Record record(value);
  Graph graph{record.text("file"), {}, {}};
  record.integer("opset");
  for (const Value& item : record.required("inputs").items()) graph.inputs.push_back(read_tensor(item));
  for (const Value& item : record.required("outputs").items()) graph.outputs.push_back(read_tensor(item));
  record.done();
  return graph;
}

// What a runtime does not need is checked all the same: a manifest is right, or it is refused.
void check_source(const Value& value) {
  Record record(value);
  record.word("kind", {"folder", "hub", "random"});
  record.text("location");
  if (const auto revision = record.optional("revision", true)) revision->text();
  if (const auto seed = record.optional("seed", true)) seed->integer();
  if (const auto variant = record.optional("variant", true)) variant->text();
  record.done();
}

void check_quantization(const Value& value) {
  Record record(value);
  record.text("base");
  record.required("smooth").boolean();
  record.word("attention", {"high", "fp8"});
  record.text("weights");
  record.done();
}

void check_achieved(const Value& value) {
  Record record(value);
  for (const auto& [key, item] : record.required("weight_bytes").members()) item.integer();
  for (const char* share : {"quantized_flops", "quantized_weights"}) {
    if (const auto found = record.optional(share)) found->number();
  }
  if (const auto kept = record.optional("full_precision_layers")) check_texts(*kept);
  record.done();
}

int64_t positive(const Value& value) {
  const int64_t number = value.integer();
  if (number < 1) throw Damage(value.place(), "Input should be greater than 0");
  return number;
}

VideoFormat read_video(const Value& value) {
  Record record(value);
  const VideoFormat video{positive(record.required("spatial_factor")),
                          positive(record.required("temporal_factor")),
                          record.integer("fps"),
                          record.integer("text_tokens"),
                          record.integer("frames"),
                          record.integer("height"),
                          record.integer("width")};
  record.done();
  return video;
}

std::array<int64_t, 3> read_patch(const Value& value) {
  const auto items = value.items();
  if (items.size() != 3) throw Damage(value.place(), "Input should have 3 items");
  return {positive(items[0]), positive(items[1]), positive(items[2])};
}

}  // namespace

Architecture Architecture::read(const Value& config) {
  Record record(config);
  bool has_image_dim = false;  // a null is a value, too
  for (const auto& [key, item] : config.members()) {
    if (key.starts_with("_")) record.optional(key);
    has_image_dim = has_image_dim || key == "image_dim";
  }
  const std::string name = record.word("_class_name", {"AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel"});
  Architecture a{};
  a.heads = positive(record.required("num_attention_heads"));
  a.head_channels = positive(record.required("attention_head_dim"));
  positive(record.required("ffn_dim"));
  a.layers = positive(record.required("num_layers"));
  // Exports write every key; a default of ours could be another one than the export's
  a.patch = read_patch(record.required("patch_size"));
  a.in_channels = positive(record.required("in_channels"));
  const int64_t out_channels = positive(record.required("out_channels"));
  a.text_channels = positive(record.required("text_dim"));
  positive(record.required("freq_dim"));
  record.required("cross_attn_norm").boolean();
  for (const char* number : {"eps", "gate_value"}) record.required(number).number();
  if (!has_image_dim) throw Damage(config.place(), "lacks image_dim");
  if (const auto image = record.optional("image_dim", true))
    throw Damage(image->place(), "image embeddings are not part of AnyFlow models");
  a.rope_frames = positive(record.required("rope_max_seq_len"));
  const Value delta = record.required("deltatime_type");
  if (delta.text() != "r" && delta.text() != "t-r") throw Damage(delta.place(), "allowed are 'r' and 't-r'");
  const auto compressed = record.optional("compressed_patch_size", true);
  const auto limit = record.optional("full_chunk_limit", true);
  const auto partition = record.optional("chunk_partition", true);
  record.done();
  const int given = (compressed ? 1 : 0) + (limit ? 1 : 0) + (partition ? 1 : 0);
  a.causal = name == "AnyFlowFARTransformer3DModel";
  if (given != (a.causal ? 3 : 0)) throw Damage(config.place(), "chunks belong to causal models, and to no others");
  if (a.causal) {
    a.compressed_patch = read_patch(*compressed);
    a.full_chunk_limit = positive(*limit);
    for (const Value& length : partition->items()) a.chunk_partition.push_back(positive(length));
  }
  if (a.patch[0] != 1 || a.patch[1] != a.patch[2]) throw Damage(config.place(), "patch_size: allowed is [1, p, p]");
  if (a.in_channels != out_channels) throw Damage(config.place(), "in_channels and out_channels have to be equal");
  if (a.head_channels % 2) throw Damage(config.place(), "attention_head_dim has to be even");
  return a;
}

Files read_files(const Value& value) {
  Files files;
  for (const auto& [name, item] : value.members()) {
    Record record(item);
    files[name] = {record.integer("bytes"), record.text("sha256")};
    record.done();
  }
  return files;
}

Manifest Manifest::read(const Value& root) {
  Record record(root);
  if (const auto number = record.optional("schema")) number->integer();
  Manifest m{};
  m.kind = record.word("kind", {"bidirectional", "causal"});
  m.model = record.text("model");
  const Value config = record.required("config");
  config.members();
  check_source(record.required("source"));
  m.precision = record.text("precision");
  if (const auto quantization = record.optional("quantization", true)) check_quantization(*quantization);
  check_achieved(record.required("achieved"));
  record.text("target");
  if (record.optional("attention_op", true)) record.word("attention_op", {"attention", "primitive"});
  std::set<std::string> names;
  for (const auto& [name, item] : record.required("graphs").members()) m.graphs[name] = read_graph(item), names.insert(name);
  const Value ranges = record.required("ranges");
  Record schedule(record.required("schedule"));
  m.shift = schedule.number("shift"), m.steps = schedule.integer("steps");
  schedule.done();
  m.video = read_video(record.required("video"));
  check_texts(record.required("tools"));
  m.files = read_files(record.required("files"));
  record.done();
  if (names != (m.causal() ? causal_graphs : bidirectional_graphs))
    throw Damage("graphs", "a " + m.kind + " bundle holds other graphs");
  m.ranges = Ranges::read(ranges);
  m.architecture = Architecture::read(config);
  if (m.architecture.causal != m.causal()) throw Damage("kind", "the config describes a model of the other kind");
  return m;
}

int64_t element_bytes(const std::string& type) { return type == "int64" ? 8 : type == "float32" ? 4 : 2; }

std::string cache_type(const Manifest& manifest) {
  for (const auto& [name, graph] : manifest.graphs) {
    for (const Tensor& tensor : graph.outputs) {
      if (tensor.name == "key.0") return tensor.type;
    }
  }
  return "float32";  // nothing is cached
}

}  // namespace af
