// manifest.json, typed. Tensor names, types and shapes are read from here and written down nowhere else.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "json.hpp"
#include "ranges.hpp"

namespace af {

// The transformer's numbers that running it needs; see anyflow_deploy/models.py.
struct Architecture {
  int64_t heads, head_channels, layers, in_channels, text_channels, rope_frames;
  std::array<int64_t, 3> patch;
  bool causal = false;
  std::array<int64_t, 3> compressed_patch{};
  int64_t full_chunk_limit = 0;
  std::vector<int64_t> chunk_partition;

  static Architecture read(const Value& config);
};

struct Tensor {
  std::string name, type;
  std::vector<std::variant<int64_t, std::string>> shape;  // a number, or the name of a range
};

struct Graph {
  std::string file;
  std::vector<Tensor> inputs, outputs;
};

struct File {
  int64_t bytes;
  std::string sha256;
};

using Files = std::map<std::string, File>;
Files read_files(const Value& value);

struct VideoFormat {
  int64_t spatial_factor, temporal_factor, fps, text_tokens, frames, height, width;
};

struct Manifest {
  std::string kind, model, precision;
  Architecture architecture;
  std::map<std::string, Graph> graphs;
  Ranges ranges;
  double shift;
  int64_t steps;
  VideoFormat video;
  Files files;

  bool causal() const { return kind == "causal"; }

  static constexpr int64_t schema = 1;
  // Throws Damage; the schema is known to be right.
  static Manifest read(const Value& root);
};

// Elements of types as the manifest names them, in bytes.
int64_t element_bytes(const std::string& type);
// Of a causal bundle's keys and values.
std::string cache_type(const Manifest& manifest);

}  // namespace af
