// .safetensors files: an index in JSON and raw bytes. Read with plain reads, one tensor at a time, so that a model's weights
// are never in memory twice.
#pragma once

#include <cstdint>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "bundle.hpp"

namespace af {

struct Stored {
  std::string type;  // the format's own name: "F32", "BF16", "I8", "F8_E4M3", …
  std::vector<int64_t> shape;
  uint64_t offset, bytes;  // in the file
};

class Safetensors {
 public:
  // Throws Error.
  explicit Safetensors(const fs::path& path);
  const std::map<std::string, Stored>& index() const { return index_; }
  // nullptr: no such tensor.
  const Stored* find(const std::string& name) const;
  void read(const Stored& tensor, void* into);

 private:
  fs::path path_;
  std::ifstream file_;
  std::map<std::string, Stored> index_;
};

// The index of a file with `size` bytes, of which the first `header.size()` + 8 are the index. Throws Damage.
std::map<std::string, Stored> parsed_index(std::string_view header, uint64_t size);

// Write one float32 tensor; whole or not at all.
void save_tensor(const fs::path& path, const std::string& name, const float* data, const std::vector<int64_t>& shape);

}  // namespace af
